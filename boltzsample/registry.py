"""METHODS: the methods of the library by name. A new method adds one line here, one file, one row in the README."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from boltzsample.samplers.mcmc import MCMC
from boltzsample.samplers.sampler import Sampler


class Method(NamedTuple):
    """A ready-made sampler: how to make it, whether it needs a gradient, what its draws are (exact: in the limit of long runs;
    weighted; approximate), whether it estimates log Z, and one line of what it is for."""

    make: Callable[[], Sampler]
    needs_gradient: bool
    promise: str
    log_z: bool
    summary: str


METHODS: dict[str, Method] = {
    "mcmc": Method(MCMC, False, "exact", False, "256 chains from dispersed starts, HMC adapted across chains, then frozen"),
}

AUTO = "mcmc"  # what method="auto" runs until the portfolio exists


def method(name: str) -> Method:
    """The method called `name`. Raises ValueError naming the known ones.

    >>> method("mcmc").log_z
    False
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r} is not known; known methods: auto, {', '.join(METHODS)}; or pass a Sampler object")
    return METHODS[name]
