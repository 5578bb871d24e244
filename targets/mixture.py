"""Mixtures of Gaussians with diagonal covariances, normalized (log Z = 0).

    p(x) = sum_k w_k prod_i N(x_i; m_ki, s_ki^2),

and of these

    two-modes-near   w = (0.7, 0.3), m = (-1, 0), (1.8, 1.2), s = (1, 0.6), (0.5, 0.9): two bumps that overlap
    two-modes-far    w = (0.7, 0.3), m = (-15, 0), (15, 0), s = 1: local moves never cross the 30 standard deviations
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from targets.problem import Problem

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class GaussianMixture:
    """sum_k weights_k N(means_k, diag(scales_k^2)), the weights summing to one."""

    weights: Tensor  # (k,)
    means: Tensor  # (k, dim)
    scales: Tensor  # (k, dim)

    @property
    def dim(self) -> int:
        return self.means.shape[-1]

    def log_prob(self, x: Tensor) -> Tensor:
        z = (x[..., None, :] - self.means.to(x)) / self.scales.to(x)  # (*batch, k, dim)
        return torch.logsumexp(self._log_terms(z), -1)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_grad(x)[1]

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = self.scales.to(x)
        z = (x[..., None, :] - self.means.to(x)) / s  # (*batch, k, dim)
        log_terms = self._log_terms(z)
        share = torch.softmax(log_terms, -1)  # (*batch, k): the probability that x came from component k
        return torch.logsumexp(log_terms, -1), -(share[..., None] * z / s).sum(-2)

    def _log_terms(self, z: Tensor) -> Tensor:
        log_norm = self.scales.to(z).log().sum(-1) + 0.5 * self.dim * LOG_2PI  # (k,)
        return self.weights.to(z).log() - log_norm - 0.5 * z.square().sum(-1)  # (*batch, k)


def mixture_draws(target: GaussianMixture, n: int, generator: torch.Generator) -> Tensor:
    """n exact draws (n, dim): a component for each, then a Gaussian draw of that component."""
    weights = target.weights.to(generator.device)
    k = torch.multinomial(weights, n, replacement=True, generator=generator)  # (n,)
    z = torch.randn(n, target.dim, generator=generator, device=generator.device, dtype=torch.float64)
    return target.means.to(z)[k] + target.scales.to(z)[k] * z


def two_modes_near() -> Problem:
    """Two overlapping modes of unequal weight and shape in the plane."""
    means, scales = [[-1.0, 0.0], [1.8, 1.2]], [[1.0, 0.6], [0.5, 0.9]]
    return _two_modes("two-modes-near", means, scales, "two overlapping modes of weights 0.7 and 0.3 in the plane")


def two_modes_far() -> Problem:
    """Two modes 30 standard deviations apart in the plane."""
    means, scales = [[-15.0, 0.0], [15.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]
    return _two_modes("two-modes-far", means, scales, "two modes of weights 0.7 and 0.3, 30 sd apart, in the plane")


def _two_modes(name: str, means: list[list[float]], scales: list[list[float]], about: str) -> Problem:
    weights, centres, sds = (torch.tensor(values, dtype=torch.float64) for values in ([0.7, 0.3], means, scales))
    target = GaussianMixture(weights, centres, sds)
    return Problem(name, target, about, partial(mixture_draws, target))
