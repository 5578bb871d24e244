"""Concentric rings in the plane; r = |x|.

`rings-slips` is a mixture of rings, normalized up to what N(c_k, s^2) puts below 0 (3e-12):

    p(x) = sum_k w_k N(r; c_k, s^2) / (2 pi r),   c = 1, 2, 3, 4,   s = 0.15,   w_k = 1/4.      Grenioux et al. (2024), arXiv:2402.10758

`rings-pis` looks at the nearest ring only and is unnormalized, so that each ring weighs by its length (1 : 3 : 5):

    log p(x) = -100 min_k (r - c_k)^2,   c = 1, 3, 5.                                            Zhang & Chen (2022), arXiv:2111.15141
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from targets.line import Law, uniform
from targets.problem import Problem

DIM = 2


@dataclass(frozen=True)
class RingMixture:
    """sum_k weights_k N(r; radii_k, sd^2) / (2 pi r)."""

    weights: Tensor  # (k,)
    radii: Tensor  # (k,)
    sd: float

    @property
    def dim(self) -> int:
        return DIM

    def log_prob(self, x: Tensor) -> Tensor:
        r = _radius(x)
        return torch.logsumexp(self._log_terms(r), -1) - (2 * math.pi * r).log()

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_grad(x)[1]

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = _radius(x)
        log_terms = self._log_terms(r)  # (*batch, k)
        share = torch.softmax(log_terms, -1)
        slope = (share * (self.radii.to(x) - r[..., None])).sum(-1) / self.sd**2 - 1 / r
        return torch.logsumexp(log_terms, -1) - (2 * math.pi * r).log(), (slope / r)[..., None] * x

    def radial(self) -> Law:
        """The law of r, up to its constant: log p + log(2 pi r)."""
        return Law(lambda r: torch.logsumexp(self._log_terms(r), -1), 0.0, float(self.radii.max()) + 14 * self.sd)

    def _log_terms(self, r: Tensor) -> Tensor:
        z = (r[..., None] - self.radii.to(r)) / self.sd
        return self.weights.to(r).log() - 0.5 * z.square() - math.log(self.sd * math.sqrt(2 * math.pi))


@dataclass(frozen=True)
class NearestRing:
    """-sharpness min_k (r - radii_k)^2."""

    radii: Tensor  # (k,)
    sharpness: float

    @property
    def dim(self) -> int:
        return DIM

    def log_prob(self, x: Tensor) -> Tensor:
        return -self.sharpness * self._gap(_radius(x)).square()

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_grad(x)[1]

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = _radius(x)
        gap = self._gap(r)
        return -self.sharpness * gap.square(), (-2 * self.sharpness * gap / r)[..., None] * x

    def radial(self) -> Law:
        """The law of r, up to its constant: log p + log(2 pi r)."""
        high = float(self.radii.max()) + 10 / math.sqrt(self.sharpness)
        return Law(lambda r: -self.sharpness * self._gap(r).square() + (2 * math.pi * r).log(), 0.0, high)

    def _gap(self, r: Tensor) -> Tensor:
        gaps = r[..., None] - self.radii.to(r)  # (*batch, k)
        return gaps.gather(-1, gaps.abs().argmin(-1, keepdim=True))[..., 0]


def _radius(x: Tensor) -> Tensor:
    return x.square().sum(-1).clamp_min(1e-30).sqrt()


def ring_draws(law: Law, n: int, generator: torch.Generator) -> Tensor:
    """n exact draws (n, 2): the radius by its inverse CDF, the angle uniform."""
    u = uniform((n, 2), generator)
    r, angle = law.quantile(u[:, 0].contiguous()), 2 * math.pi * u[:, 1]
    return r[:, None] * torch.stack([angle.cos(), angle.sin()], -1)


def rings_slips() -> Problem:
    """Four rings of equal weight."""
    target = RingMixture(torch.full((4,), 0.25, dtype=torch.float64), torch.arange(1, 5, dtype=torch.float64), 0.15)
    return Problem("rings-slips", target, "four concentric rings of equal weight in the plane", partial(ring_draws, target.radial()))


def rings_pis() -> Problem:
    """Three rings that weigh by their lengths."""
    target = NearestRing(torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64), 100.0)
    return Problem("rings-pis", target, "three concentric rings of weights 1 : 3 : 5 in the plane", partial(ring_draws, target.radial()))
