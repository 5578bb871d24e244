"""Objectives: what a denoiser D(x, s) is trained on, x = x_0 + s xi, score (D - x) / s^2 (networks.py). All have the score of the law of
the noised draws as their minimum:

    Denoising   |D - x_0|^2                                              Vincent (2011), Neural Computation 23(7)
    Targeted    |D - (x + s^2 grad log pi(x_0))|^2                       De Bortoli et al. (2024), arXiv:2402.08667
    Mixed       |D - (1 - k) x_0 - k (x + s^2 grad log pi(x_0))|^2       k(s) of least variance
    Sliced      v' grad(score) v + (v' score)^2 / 2                      Song, Garg, Shi & Ermon (2020), arXiv:1905.07088, equation 8
    Implicit    v' grad(score) v + |score|^2 / 2                         Hyvarinen (2005), trace by Hutchinson's probes v

The first three are weighed by 1 / s^2 and the last two by s^2, which is the same: with log s uniform, the mean of |D - E[x_0 | x]|^2 / s^2
is the rate at which paths lose nats to a wrong score. The target's gradient is a better teacher where noise is low, the draw itself where
it is high; given x both have the mean E[x_0 | x], and of all their combinations the k of Mixed has the least variance: that of
E|target|^2 is smallest, as E|D|^2 is the same for all. Targeted and Mixed need draws of pi itself (wrong weights of far modes do no harm).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from boltzsample.networks import Denoiser, Posterior
from boltzsample.streams import Rng

BINS = 40
SHAPE = 0.1  # weight of the spread's likelihood beside the denoiser's loss


class Batch(NamedTuple):
    """Draws x0 (n, dim), the target's gradients there (n, dim) or None, noise levels s (n,), noise xi (n, dim) and probes v (n, dim)."""

    x0: Tensor
    grad: Tensor | None
    s: Tensor
    xi: Tensor
    v: Tensor

    @property
    def x(self) -> Tensor:
        return self.x0 + self.s[:, None] * self.xi


class Objective(Protocol):
    """The loss of each row (n,) of a batch and the denoiser's answer. `prepared`: ready for draws x0, their gradients, low < s < high."""

    def __call__(self, net: Denoiser, batch: Batch) -> tuple[Tensor, Posterior]: ...

    def prepared(self, x0: Tensor, grad: Tensor | None, low: float, high: float, rng: Rng) -> Objective: ...


@dataclass(frozen=True)
class Denoising:
    """Regression on the draw itself."""

    def __call__(self, net: Denoiser, batch: Batch) -> tuple[Tensor, Posterior]:
        seen = net(batch.x, batch.s)
        return _miss(seen.mean, batch.x0, batch.s), seen

    def prepared(self, x0: Tensor, grad: Tensor | None, low: float, high: float, rng: Rng) -> Denoising:
        return self


@dataclass(frozen=True)
class Targeted:
    """Regression on where the target's gradient at the draw points to."""

    def __call__(self, net: Denoiser, batch: Batch) -> tuple[Tensor, Posterior]:
        seen = net(batch.x, batch.s)
        return _miss(seen.mean, told(batch), batch.s), seen

    def prepared(self, x0: Tensor, grad: Tensor | None, low: float, high: float, rng: Rng) -> Targeted:
        return self


@dataclass(frozen=True, eq=False)
class Mixed:
    """Regression on the mean of both with the least variance. k: (BINS,) of log s evenly from log low to log high, filled by `prepared`."""

    k: Tensor | None = None
    low: float = 0.0
    high: float = 0.0

    def __call__(self, net: Denoiser, batch: Batch) -> tuple[Tensor, Posterior]:
        seen = net(batch.x, batch.s)
        k = self.share(batch.s)[:, None]
        return _miss(seen.mean, (1 - k) * batch.x0 + k * told(batch), batch.s), seen

    def prepared(self, x0: Tensor, grad: Tensor | None, low: float, high: float, rng: Rng) -> Denoising | Mixed:
        """k = -E S.(T - S) / E |T - S|^2, S = -xi / s, T the gradients: plain least squares. Denoising where there is no gradient."""
        if grad is None:
            return Denoising()
        S = -rng.normal(BINS, *x0.shape) / self._grid(low, high, x0)[:, None, None]
        T = grad.expand_as(S)
        k = -(S * (T - S)).sum((1, 2)) / (T - S).square().sum((1, 2))
        return Mixed(k.clamp(0, 1).nan_to_num(), low, high)

    def share(self, s: Tensor) -> Tensor:
        """k(s), between the bins by interpolation."""
        assert self.k is not None
        at = (s.log() - math.log(self.low)) / math.log(self.high / self.low) * (BINS - 1)
        j = at.long().clamp(0, BINS - 2)
        return torch.lerp(self.k[j], self.k[j + 1], (at - j).clamp(0, 1))

    def _grid(self, low: float, high: float, like: Tensor) -> Tensor:
        return torch.linspace(math.log(low), math.log(high), BINS, dtype=like.dtype, device=like.device).exp()


@dataclass(frozen=True)
class Sliced:
    """Needs no noise and no gradient of the target: projections of the score on probes."""

    def __call__(self, net: Denoiser, batch: Batch) -> tuple[Tensor, Posterior]:
        seen, curvature, score = _bent(net, batch)
        return curvature + batch.s.square() * (batch.v * score).sum(-1).square() / 2, seen

    def prepared(self, x0: Tensor, grad: Tensor | None, low: float, high: float, rng: Rng) -> Sliced:
        return self


@dataclass(frozen=True)
class Implicit:
    """As Sliced, with the whole score in the second term."""

    def __call__(self, net: Denoiser, batch: Batch) -> tuple[Tensor, Posterior]:
        seen, curvature, score = _bent(net, batch)
        return curvature + batch.s.square() * score.square().sum(-1) / 2, seen

    def prepared(self, x0: Tensor, grad: Tensor | None, low: float, high: float, rng: Rng) -> Implicit:
        return self


def told(batch: Batch) -> Tensor:
    """x + s^2 grad log pi(x_0) (n, dim)."""
    assert batch.grad is not None, "this objective needs gradients of the target at the draws"
    return batch.x + batch.s.square()[:, None] * batch.grad


def spread_loss(seen: Posterior, x0: Tensor) -> Tensor:
    """-log N(x_0; D, S) (n,) up to a constant, for the spread alone: D is held fixed."""
    away = x0 - seen.mean.detach()
    if seen.factor.dim() == x0.dim():
        return 0.5 * (away / seen.factor).square().sum(-1) + seen.factor.log().sum(-1)
    z: Tensor = torch.linalg.solve_triangular(seen.factor, away[..., None], upper=False)[..., 0]
    return 0.5 * z.square().sum(-1) + seen.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _miss(D: Tensor, target: Tensor, s: Tensor) -> Tensor:
    return (D - target).square().sum(-1) / s.square()


def _bent(net: Denoiser, batch: Batch) -> tuple[Posterior, Tensor, Tensor]:
    """What the net says at x; s^2 v' grad(score) v = v' J_D v - |v|^2 (n,); and the score (n, dim)."""
    x, v = batch.x, batch.v
    out: Any = torch.func.vjp(lambda x: net(x, batch.s), x)
    seen, pull = out
    (bent,) = pull(Posterior(v, torch.zeros_like(seen.factor)))  # v' J_D
    score = (seen.mean - x) / batch.s.square()[:, None]
    return seen, (v * bent).sum(-1) - v.square().sum(-1), score
