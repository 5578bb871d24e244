"""What the court asks its questions of beside the zoo itself: targets asked in blocks, and proposals as a user would bring them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

import boltzsample as bz
from targets import problem

IN_BLOCKS = frozenset({"cancer", "german-credit"})


@dataclass(frozen=True)
class InBlocks:
    """A target asked a block of points at a time: the products of all points with a thousand cases would not stay in the cache, and take
    three times as long."""

    target: bz.Target
    rows: int = 64

    @property
    def dim(self) -> int:
        return self.target.dim

    def log_prob(self, x: Tensor) -> Tensor:
        parts = [self.target.log_prob(part) for part in x.reshape(-1, self.dim).split(self.rows)]
        return torch.cat(parts).reshape(x.shape[:-1])

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_grad(x)[1]

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [bz.log_prob_and_grad(self.target, part) for part in x.reshape(-1, self.dim).split(self.rows)]
        log_p, grad = (torch.cat(part) for part in zip(*parts, strict=True))
        return log_p.reshape(x.shape[:-1]), grad.reshape(x.shape)


@dataclass(frozen=True, eq=False)
class WideT:
    """A Student t_5 with mean m and scale matrix L L^T: a proposal as a user would bring one, sample(n) and log_prob(x)."""

    m: Tensor
    L: Tensor
    nu: float = 5.0

    def sample(self, n: int) -> Tensor:
        z = torch.randn(n, len(self.m), dtype=self.m.dtype)
        chi2 = torch.distributions.Chi2(torch.tensor(self.nu, dtype=self.m.dtype)).sample((n, 1))
        return self.m + (z / (chi2 / self.nu).sqrt()) @ self.L.T

    def log_prob(self, x: Tensor) -> Tensor:
        d, nu = len(self.m), torch.tensor(self.nu, dtype=x.dtype)
        z = torch.linalg.solve_triangular(self.L, (x - self.m).T, upper=False)
        constant = torch.lgamma((nu + d) / 2) - torch.lgamma(nu / 2) - d / 2 * (nu * torch.pi).log() - self.L.diagonal().log().sum()
        return constant - (nu + d) / 2 * (z.square().sum(0) / nu).log1p()


@cache
def proposal(name: str) -> WideT:
    """A t_5 with the mean and 1.2^2 times the covariance of 20,000 exact draws."""
    p = problem(name)
    assert p.exact_sampler is not None
    x = p.exact_sampler(20_000, torch.Generator().manual_seed(7)).double()
    return WideT(x.mean(0), 1.2 * torch.linalg.cholesky(torch.atleast_2d(torch.cov(x.T))))
