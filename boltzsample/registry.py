"""METHODS: the methods of the library by name. A new method adds one line here, one file, one row in the README."""

from __future__ import annotations

from typing import NamedTuple

from boltzsample.auto import Auto
from boltzsample.samplers.ais import AIS
from boltzsample.samplers.diffusion import Diffusion
from boltzsample.samplers.flow_is import FlowIS
from boltzsample.samplers.latent import LatentMCMC
from boltzsample.samplers.mcmc import MCMC
from boltzsample.samplers.mixture_is import MixtureIS
from boltzsample.samplers.rdmc import RDMC
from boltzsample.samplers.sampler import Sampler
from boltzsample.samplers.slips import SLIPS
from boltzsample.samplers.smc import SMC
from boltzsample.samplers.tempering import Tempering


class Method(NamedTuple):
    """A ready-made sampler: how to make it, whether it needs a gradient, what its draws are (exact: in the limit of long runs;
    weighted; approximate), and one line of what it is for."""

    make: type[Sampler]
    needs_gradient: bool
    promise: str
    summary: str

    @property
    def log_z(self) -> bool:
        """Whether it estimates log Z."""
        return self.make.log_z


METHODS: dict[str, Method] = {
    "auto": Method(Auto, False, "exact", "explores, fits a mixture, chains or a flow, and lets pilots choose what estimates"),
    "mcmc": Method(MCMC, False, "exact", "256 chains from dispersed starts, HMC adapted across chains, then frozen"),
    "smc": Method(SMC, False, "exact", "particles carried from a wide base to the target along a frozen ladder of temperatures"),
    "ais": Method(AIS, False, "weighted", "independent paths up a fine ladder, weighted; backwards, an upper side of log Z"),
    "tempering": Method(Tempering, False, "exact", "replica exchange: chains at a ladder of temperatures that swap places"),
    "mixture-is": Method(MixtureIS, True, "weighted", "modes found, chains in each, a mixture fitted to them and its draws weighted"),
    "slips": Method(SLIPS, True, "weighted", "paths from noise to the target, steered by posterior chains, weighted exactly"),
    "rdmc": Method(RDMC, True, "approximate", "the diffusion to noise walked backwards, by scores of posterior chains"),
    "flow-is": Method(FlowIS, True, "weighted", "a flow trained by reverse KL, its draws made right by importance weights"),
    "diffusion": Method(Diffusion, False, "weighted", "a denoiser taught by MCMC draws, paths from noise to data weighted exactly"),
    "latent-mcmc": Method(LatentMCMC, True, "exact", "chains in the latent space of a trained flow, with independence moves"),
}


def name_of(sampler: Sampler) -> str:
    """The registry's name for a sampler's class, or the class's own in small letters."""
    return next((name for name, line in METHODS.items() if line.make is type(sampler)), type(sampler).__name__.lower())


def method(name: str) -> Method:
    """The method called `name`. Raises ValueError naming the known ones.

    >>> method("mcmc").log_z
    False
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r} is not known; known methods: {', '.join(METHODS)}; or pass a Sampler object")
    return METHODS[name]
