"""Mixtures of Gaussians with diagonal covariances, normalized (log Z = 0).

    p(x) = sum_k w_k prod_i N(x_i; m_ki, s_ki^2),

written in two ways: as differences, right in any precision, and expanded into matrix products,

    sum_i (x_i - m_ki)^2 / s_ki^2 = sum_i x_i^2 / s_ki^2 - 2 sum_i x_i m_ki / s_ki^2 + sum_i m_ki^2 / s_ki^2,

which is several times faster with many components, but cancels: `gaussian_mixture` expands where float32 keeps 1e-3 of it.
Named problems stand in `targets/modes.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class ExpandedMixture:
    """The same density by matrix products around `centre`."""

    weights: Tensor  # (k,)
    means: Tensor  # (k, dim)
    scales: Tensor  # (k, dim)
    centre: Tensor  # (dim,)

    @property
    def dim(self) -> int:
        return self.means.shape[-1]

    def log_prob(self, x: Tensor) -> Tensor:
        precision, pull, constant = self._coefficients(x)
        return torch.logsumexp(_expanded(x - self.centre.to(x), precision, pull, constant), -1)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_grad(x)[1]

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        precision, pull, constant = self._coefficients(x)
        y = x - self.centre.to(x)
        log_terms = _expanded(y, precision, pull, constant)
        share = torch.softmax(log_terms, -1)  # (*batch, k): the probability that x came from component k
        return torch.logsumexp(log_terms, -1), share @ pull - y * (share @ precision)

    def _coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """1/s^2 (k, dim), m/s^2 (k, dim) and what does not depend on x (k,), in float64 until the end."""
        m, precision = self.means - self.centre, self.scales**-2
        constant = self.weights.log() - self.scales.log().sum(-1) - 0.5 * self.dim * LOG_2PI - 0.5 * (m * m * precision).sum(-1)
        return precision.to(x), (m * precision).to(x), constant.to(x)


def _expanded(y: Tensor, precision: Tensor, pull: Tensor, constant: Tensor) -> Tensor:
    return y @ pull.mT - 0.5 * y.square() @ precision.mT + constant  # (*batch, k)


Mixture = GaussianMixture | ExpandedMixture


def gaussian_mixture(weights: Tensor, means: Tensor, scales: Tensor) -> Mixture:
    """The expanded form where max |m - centre|^2 float32-epsilon / min s^2 stays below 1e-3, else differences."""
    centre = (means.amax(0) + means.amin(0)) / 2
    lost = (means - centre).square().sum(-1).max() * 1.2e-7 / scales.min().square()
    return ExpandedMixture(weights, means, scales, centre) if lost < 1e-3 else GaussianMixture(weights, means, scales)


def mixture_draws(target: Mixture, n: int, generator: torch.Generator) -> Tensor:
    """n exact draws (n, dim): a component for each, then a Gaussian draw of that component."""
    weights = target.weights.to(generator.device)
    k = torch.multinomial(weights, n, replacement=True, generator=generator)  # (n,)
    z = torch.randn(n, target.dim, generator=generator, device=generator.device, dtype=torch.float64)
    return target.means.to(z)[k] + target.scales.to(z)[k] * z
