"""Stationary chains with a known answer, and draws for values of f that were made by hand."""

import math

import torch
from torch import Tensor

from boltzsample.draws import Draws, Estimate


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chains(m: int, n: int, tau: float, k: int = 400, seed: int = 0) -> Tensor:
    """Stationary AR(1) chains (m, n, k) with N(0, 1) marginals and autocorrelation time tau."""
    g, rho = rng(seed), (tau - 1) / (tau + 1)
    x = [torch.randn(m, k, generator=g, dtype=torch.float64)]
    for _ in range(n - 1):
        x.append(rho * x[-1] + math.sqrt(1 - rho**2) * torch.randn(m, k, generator=g, dtype=torch.float64))
    return torch.stack(x, 1)


def draws_of(y: Tensor) -> Draws:
    """Draws whose x moves, for an f that is made by hand."""
    x = torch.randn(*y.shape[:2], 1, generator=rng(99), dtype=torch.float64)
    return Draws(x, x[..., 0])


def codes(est: Estimate) -> set[str]:
    return {f.code for f in est.flags}
