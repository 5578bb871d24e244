"""Adaptation across chains: step size, preconditioner, trajectory length. It runs in `fit` and is frozen in `sample`.

Step size: dual averaging (Nesterov 2009; Hoffman & Gelman 2014, JMLR 15, section 3.2) on the acceptance of a whole batch, the
harmonic mean for gradient kernels, which listens to the worst chains (Hoffman, Radul & Sountsov 2021, ChEES-HMC, section 3.2).
Preconditioner: the covariance of the chains in a window, in the coordinates of the map so far and shrunk towards it, makes the
next affine map x = m + L z.
Trajectory length: among L = 1, 2, 4, ... the one with the most effective draws for each gradient, as the ChEES criterion

    C(L) = E[ (|x' - m|^2 - |x - m|^2)^2 ] / 4        (Hoffman, Radul & Sountsov 2021, equation 4)

and its relative for x itself imply. C alone, per gradient, prefers trajectories too short for means: on a Gaussian at t = 1 of pi/2.

Everything has a leading axis of replicates, which share nothing. A NaN never reaches adaptation state: it counts as rejection.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from boltzsample.backend import Backend
from boltzsample.kernels.kernel import StepSized
from boltzsample.maps import Dense, Diagonal

FLOOR = 0.1  # one chain in a bad place must not stop all others: its acceptance counts as at least this
EDGE = 0.5  # what a trajectory that left the support counts as: at the acceptance HMC aims at, half of them may


@dataclass(frozen=True)
class DualAveraging:
    """Step sizes of all replicates, (replicates, 1), moving towards a target acceptance; `frozen` is what to use afterwards."""

    log_h: Tensor
    log_h_bar: Tensor
    centre: Tensor
    gap: Tensor  # running mean of target minus acceptance
    t: int = 0

    @staticmethod
    def start(h: Tensor) -> DualAveraging:
        log_h = h.log()
        return DualAveraging(log_h, log_h, log_h + torch.log(torch.tensor(3.0, dtype=h.dtype)), torch.zeros_like(h))

    def update(self, accept_prob: Tensor, target: float, harmonic: bool, outside: Tensor | None = None) -> DualAveraging:
        """After one transition with acceptance probabilities (replicates, chains). Constants of Hoffman & Gelman (2014).

        outside: which chains were rejected at a hard edge of the support. That says nothing of the integrator, and smaller steps
        hardly mend it; counted as errors they would shrink the trajectories until almost none leaves a thin skin.
        """
        a = torch.nan_to_num(accept_prob, nan=0.0).clamp(FLOOR if harmonic else 0.0, 1.0)
        if harmonic and outside is not None:
            a = torch.where(outside, EDGE, a)
        pooled = 1 / (1 / a).mean(-1, keepdim=True) if harmonic else a.mean(-1, keepdim=True)
        t = self.t + 1
        gap = self.gap + (target - pooled - self.gap) / (t + 10)
        log_h = self.centre - t**0.5 / 0.05 * gap
        log_h_bar = self.log_h_bar + t**-0.75 * (log_h - self.log_h_bar)
        return DualAveraging(log_h, log_h_bar, self.centre, gap, t)

    @property
    def h(self) -> Tensor:
        return self.log_h.exp()

    @property
    def frozen(self) -> Tensor:
        """The average to go on with; the step it began with after fewer than 10 updates, which are still a search."""
        return self.log_h_bar.exp() if self.t >= 10 else self.centre.exp() / 3


@dataclass(frozen=True)
class Moments:
    """Running mean (replicates, dim) and scatter (replicates, dim, dim or none) of positions z, in float64."""

    n: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def start(z: Tensor, dense: bool) -> Moments:
        replicates, _, dim = z.shape
        shape = (replicates, dim, dim) if dense else (replicates, dim)
        zeros = torch.zeros(shape, dtype=torch.float64, device=z.device)
        return Moments(0, zeros.new_zeros(replicates, dim), zeros)

    def update(self, z: Tensor) -> Moments:
        """With positions z (replicates, chains, dim): Chan, Golub & LeVeque (1983), pairwise update."""
        z = _tamed(z.double())
        k = z.shape[1]
        mean_k = z.mean(1)
        away, step, n = z - mean_k[:, None], mean_k - self.mean, self.n + k
        if self.scatter.ndim == 3:
            own, jump = away.mT @ away, step[:, :, None] * step[:, None, :]
        else:
            own, jump = away.square().sum(1), step.square()
        return Moments(n, self.mean + step * k / n, self.scatter + own + jump * (self.n * k / n))

    def refine(self, old: Diagonal | Dense) -> Diagonal | Dense:
        """The old map after one that whitens z: what is already known of the shape is kept and improved, never thrown away.

        The old map is returned where the moments are not finite or not positive definite.
        """
        shrink = self.n / (self.n + 5.0)  # towards the old map, as Stan does towards the unit matrix
        cov = shrink * self.scatter / max(self.n - 1, 1)
        factor, bad = _root(cov + (1 - shrink) * _eye(cov))
        if bad or not bool(self.mean.isfinite().all()):
            return old
        m = old.push(self.mean[:, None].to(old.m))[0]
        if isinstance(old, Diagonal):
            s = old.s if old.s.ndim == 3 else old.s.expand(1, 1, -1)
            if factor.ndim == 2:
                return Diagonal(m, s * factor[:, None].to(s))
            return Dense(m, s.mT * factor.to(s))
        L = old.L if old.L.ndim == 3 else old.L[None]
        return Dense(m, L * factor[:, None].to(L) if factor.ndim == 2 else L @ factor.to(L))


def _tamed(z: Tensor) -> Tensor:
    """z (replicates, chains, dim) with chains further than 4 median radii from the median drawn in to there.

    A few chains still on their way from a heavy tail would set the scale of all.
    """
    centre = z.median(1, keepdim=True).values
    away = z - centre
    radius = away.norm(dim=-1, keepdim=True)
    tamed: Tensor = centre + away * (4 * radius.median(1, keepdim=True).values / radius.clamp(min=1e-300)).clamp(max=1.0)
    return tamed


def _eye(cov: Tensor) -> Tensor:
    return torch.ones_like(cov) if cov.ndim == 2 else torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)


def _root(cov: Tensor) -> tuple[Tensor, bool]:
    """A square root of variances (replicates, dim) or covariances (replicates, dim, dim), and whether there is none."""
    if cov.ndim == 2:
        return cov.sqrt(), not bool((cov.isfinite() & (cov > 0)).all())
    if not bool(cov.isfinite().all()):
        return cov, True
    L, info = torch.linalg.cholesky_ex(cov)
    return L, bool((info != 0).any())


def with_step(kernel: StepSized, h: Tensor) -> Any:
    """The kernel with another step size."""
    return replace(kernel, h=h)  # type: ignore[type-var]


def efficiency(before: Tensor, after: Tensor) -> float:
    """Effective draws per move, from moves before -> after (*batch, dim): the smaller of those for x and for |x - m|^2.

    With J = E[(f(x') - f(x))^2] the autocorrelation of f is r = 1 - J / (2 var f), and the effective draws (1 - r) / (1 + r).
    For f = |x - m|^2, J is 4 ChEES; antithetic moves (r < 0) count as independent ones.
    """
    before, after = before.double(), after.double()
    m = before.reshape(-1, before.shape[-1]).mean(0)
    radius, radius_after = (before - m).square().sum(-1), (after - m).square().sum(-1)
    r_square = 1 - (radius_after - radius).square().mean() / (2 * radius.var())
    r_mean = 1 - (after - before).square().sum(-1).mean() / (2 * radius.mean())
    r = torch.maximum(r_square, r_mean).clamp(0.0, 1.0)
    return float((1 - r) / (1 + r))


def moved(tuned: Any, backend: Backend) -> Any:
    """A kernel or map with its tensors in the run's dtype and on its device."""
    to: dict[str, Any] = {}
    for f in fields(tuned):
        value = getattr(tuned, f.name)
        if f.init and isinstance(value, Tensor):
            to[f.name] = value.to(backend.device, backend.dtype)
        elif f.init and is_dataclass(value):
            to[f.name] = moved(value, backend)
    return replace(tuned, **to)
