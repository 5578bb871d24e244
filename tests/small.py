"""Small runs: what the tests of samplers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import boltzsample as bz

SMALL = bz.MCMC(chains=32, warmup=40)


def normal_log_prob(x: Tensor) -> Tensor:
    return -0.5 * x.square().sum(-1)


def normal(dim: int = 2) -> bz.Target:
    """N(0, I)."""
    return bz.from_log_prob(normal_log_prob, dim=dim)


def no_gradient(dim: int = 2) -> bz.Target:
    """N(0, I) by NumPy, without a gradient."""
    return bz.from_log_prob(lambda x: torch.from_numpy(-0.5 * (x.detach().numpy() ** 2).sum(-1)), dim=dim)


def sample(target: bz.Target, method: Any = SMALL, n: int = 640, **settings: Any) -> bz.Result:
    """bz.sample of a small run, with seed 0 unless told."""
    return bz.sample(target, method, n, **{"seed": 0, **settings})


def codes(of: Any) -> set[str]:
    """The codes of the flags of a Result, an Estimate or Draws."""
    return {f.code for f in of.flags}


def severity(of: Any, code: str) -> str | None:
    """The severity of the first flag with this code."""
    return next((f.severity for f in of.flags if f.code == code), None)
