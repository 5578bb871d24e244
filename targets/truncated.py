"""Independent Gaussians cut off at zero: log p is -inf where any coordinate is not positive.

    log p(x) = sum_i log N(x_i; m_i, s_i^2)  where all x_i > 0,   log Z = sum_i log Phi(m_i/s_i),

with m_i spread from -0.5 to 1.5 and s_i log-spaced from 0.5 to 2, so that the edge cuts through the bulk, near it or far from it.
Nothing bends the density towards the edge: a sampler meets it at full height.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from targets.line import uniform
from targets.problem import Problem

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class TruncatedGaussian:
    """N(mean, diag(scale^2)) on x > 0, with the constant of the whole Gaussian."""

    mean: Tensor  # (dim,)
    scale: Tensor  # (dim,)

    @property
    def dim(self) -> int:
        return self.mean.shape[0]

    def log_prob(self, x: Tensor) -> Tensor:
        s = self.scale.to(x)
        z = (x - self.mean.to(x)) / s
        log_p = -0.5 * z.square().sum(-1) - s.log().sum() - 0.5 * self.dim * LOG_2PI
        return torch.where((x > 0).all(-1), log_p, -torch.inf)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        grad = (self.mean.to(x) - x) / self.scale.to(x).square()
        return torch.where((x > 0).all(-1, keepdim=True), grad, 0.0)


def truncated_draws(target: TruncatedGaussian, n: int, generator: torch.Generator) -> Tensor:
    """n exact draws (n, dim): x = m - s Phi^{-1}(u Phi(m/s)), u uniform."""
    u = uniform((n, target.dim), generator)
    m, s = target.mean.to(u), target.scale.to(u)
    x: Tensor = m - s * torch.special.ndtri(u * torch.special.ndtr(m / s))
    return x


def truncated_gaussian(d: int = 5) -> Problem:
    """The Gaussian on the positive orthant in d dimensions."""
    mean = torch.linspace(-0.5, 1.5, d, dtype=torch.float64)
    target = TruncatedGaussian(mean, torch.logspace(math.log10(0.5), math.log10(2), d, dtype=torch.float64))
    about = f"Gaussian in {d} dimensions, cut off where a coordinate is not positive"
    return Problem("truncated-gaussian", target, about, partial(truncated_draws, target))
