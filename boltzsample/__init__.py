"""boltzsample: sample unnormalized densities; expectations and log Z with error bars that hold, or a loud word.

Names are imported when first used, so that `boltzsample --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from boltzsample.adapters import from_log_prob
    from boltzsample.draws import Draws, Estimate
    from boltzsample.errors import RejectPoint
    from boltzsample.flags import Flag, Status
    from boltzsample.imitation import imitate
    from boltzsample.jax_density import from_jax
    from boltzsample.kernels import HMC, MALA, ULA, RandomWalk
    from boltzsample.laws import from_torch_distribution
    from boltzsample.numpy_density import from_numpy
    from boltzsample.pyro_model import from_pyro
    from boltzsample.results import Result, result
    from boltzsample.run import importance, sample
    from boltzsample.samplers.ais import AIS
    from boltzsample.samplers.diffusion import Diffusion
    from boltzsample.samplers.flow_is import FlowIS
    from boltzsample.samplers.latent import LatentMCMC
    from boltzsample.samplers.mcmc import MCMC
    from boltzsample.samplers.mixture_is import MixtureIS
    from boltzsample.samplers.posterior import Inner
    from boltzsample.samplers.rdmc import RDMC
    from boltzsample.samplers.sampler import Budget
    from boltzsample.samplers.slips import SLIPS
    from boltzsample.samplers.smc import SMC
    from boltzsample.samplers.tempering import Tempering
    from boltzsample.schedules import OU, VE, VP, Levels, LinearSDE, Localization
    from boltzsample.storage import load
    from boltzsample.target import Target, log_prob_and_grad
    from boltzsample.views import Constrained, Observed, Pullback, Tempered

_HOME = {
    "from_log_prob": "adapters",
    "from_jax": "jax_density",
    "imitate": "imitation",
    "from_numpy": "numpy_density",
    "from_torch_distribution": "laws",
    "from_pyro": "pyro_model",
    "Draws": "draws",
    "Estimate": "draws",
    "RejectPoint": "errors",
    "Flag": "flags",
    "Status": "flags",
    "HMC": "kernels",
    "MALA": "kernels",
    "ULA": "kernels",
    "RandomWalk": "kernels",
    "Result": "results",
    "result": "results",
    "importance": "run",
    "sample": "run",
    "AIS": "samplers.ais",
    "Diffusion": "samplers.diffusion",
    "FlowIS": "samplers.flow_is",
    "LatentMCMC": "samplers.latent",
    "MCMC": "samplers.mcmc",
    "MixtureIS": "samplers.mixture_is",
    "Budget": "samplers.sampler",
    "Inner": "samplers.posterior",
    "RDMC": "samplers.rdmc",
    "SLIPS": "samplers.slips",
    "SMC": "samplers.smc",
    "Tempering": "samplers.tempering",
    "OU": "schedules",
    "VE": "schedules",
    "VP": "schedules",
    "Levels": "schedules",
    "LinearSDE": "schedules",
    "Localization": "schedules",
    "load": "storage",
    "Target": "target",
    "log_prob_and_grad": "target",
    "Constrained": "views",
    "Observed": "views",
    "Pullback": "views",
    "Tempered": "views",
}

__all__ = [
    "AIS", "HMC", "MALA", "MCMC", "OU", "RDMC", "SLIPS", "SMC", "ULA", "VE", "VP", "Budget", "Constrained", "Diffusion",
    "Draws", "Estimate", "Flag", "FlowIS", "Inner", "LatentMCMC", "Levels", "LinearSDE", "Localization", "MixtureIS",
    "Observed", "Pullback", "RandomWalk", "RejectPoint", "Result", "Status", "Target", "Tempered", "Tempering", "from_jax",
    "from_log_prob", "from_numpy", "from_pyro", "from_torch_distribution", "imitate", "importance", "load", "log_prob_and_grad",
    "result", "sample",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'boltzsample' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"boltzsample.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
