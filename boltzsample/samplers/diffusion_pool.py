"""The pool a denoiser learns from, in scaled units: its source, whitening, gradients, and the finest noise that it needs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from boltzsample.draws import Draws
from boltzsample.errors import InitFailed, ShapeError
from boltzsample.maps import Dense, Diagonal
from boltzsample.samplers.explore import Explored, Explorer
from boltzsample.samplers.sampler import Run
from boltzsample.scores.pool import Pool
from boltzsample.target import Target, log_prob_and_grad
from boltzsample.views import Pullback

NOISE = 5.0  # standard deviation of the noise at the first level, in units of the target's
FINEST, COARSEST = 0.002, 0.4  # of the last level before the data
AT_ONCE = 10_000  # points
DENSE_FROM = 10  # draws a dimension
FEWEST = 10  # draws
FEWEST_GROUPS = 50  # of draws that are held out together


class Climbed(NamedTuple):
    """An explorer, and what it saw: a ladder to climb again."""

    explorer: Explorer
    seen: Explored


def whitened_pool(target: Target, x: Tensor, log_w: Tensor | None, group: Tensor, run: Run) -> tuple[Pool, Diagonal | Dense]:
    """Points x (n, dim) in their own units, with gradients; and the map. Price: a gradient (or log_prob) each, under "training"."""
    map = moments(x, log_w)
    z, view = map.pull(x), Pullback(target, map)
    log_p, grad = asked(view, z, run)
    fine = log_p.isfinite() & z.isfinite().all(-1) & (True if grad is None else grad.isfinite().all(-1))
    if int(fine.sum()) < FEWEST:
        raise InitFailed(f"only {int(fine.sum())} points to learn from have a finite log_prob; pass starts= or data= inside the support")
    pool = Pool(z, grad, log_p.double(), log_w, group, 0.0, NOISE)[fine.nonzero()[:, 0]]
    return replace(pool, low=finest(pool.z, pool.grad)), map


def asked(view: Pullback, z: Tensor, run: Run) -> tuple[Tensor, Tensor | None]:
    """log p (n,) and its gradient (n, dim), None where the density has none, in chunks, entered under "training"."""
    with_gradient = run.starts.has_gradient
    parts = [log_prob_and_grad(view, part) if with_gradient else (view.log_prob(part), part) for part in z.split(AT_ONCE)]
    run.ledger.add("training", (0, len(z)) if with_gradient else (len(z), 0))
    log_p, grad = (torch.cat(part) for part in zip(*parts, strict=True))
    return log_p, grad if with_gradient else None


def by_dimension(dim: int) -> Explorer:
    """More particles in more dimensions, where adaptation biases more and there is more to learn; a pool of about 10^5 places in any."""
    particles = min(max(1024 * dim, 4096), 32768)
    return Explorer(particles=particles, cess=0.6, rounds=min(max(65536 // particles, 2), 8))


def moments(x: Tensor, log_w: Tensor | None) -> Diagonal | Dense:
    """The affine map to mean zero and covariance I of (weighted) points x (n, dim); diagonal where they are few."""
    w = torch.full((len(x),), 1 / len(x), dtype=torch.float64, device=x.device) if log_w is None else torch.softmax(log_w.double(), 0)
    m = (w[:, None] * x.double()).sum(0)
    away = w.sqrt()[:, None] * (x.double() - m)
    S, few = away.T @ away, 1 / float(w.square().sum()) < DENSE_FROM * x.shape[-1]
    scale = S.diagonal().clamp(min=1e-300).sqrt()
    L, bad = torch.linalg.cholesky_ex(S + 1e-9 * torch.diag(S.diagonal()))
    if few or int(bad):
        return Diagonal(m.to(x), torch.where(scale > 1e-150, scale, 1.0).to(x))
    return Dense(m.to(x), L.to(x))


def finest(z: Tensor, grad: Tensor | None) -> float:
    """The noise of the last level: .4 of the smallest scale that gradients show (|g_i| < 1.645 / scale_i nine times in ten), or
    half the distance between neighbours."""
    if grad is not None:
        return _within(0.4 * 1.645 / float(grad[:: max(1, len(grad) // 10_000)].square().quantile(0.9, 0).max().sqrt()))
    some = z[torch.linspace(0, len(z) - 1, min(len(z), 1000), device=z.device).long()]
    near = (torch.cdist(some, some) + 1e9 * torch.eye(len(some), dtype=z.dtype, device=z.device)).amin(1)
    return _within(0.5 * float(near[near > 0].median()) / math.sqrt(z.shape[-1]))


def _within(scale: float) -> float:
    return min(max(scale, FINEST), COARSEST) if math.isfinite(scale) else 0.02


def given(data: Draws, target: Target, run: Run) -> tuple[Tensor, Tensor | None, Tensor]:
    """`drawn`, for a target. Raises ShapeError."""
    if data.x.shape[-1] != target.dim:
        raise ShapeError(f"data= has {data.x.shape[-1]} dimensions and the target {target.dim}; wanted the same")
    return drawn(data, run)


def drawn(data: Draws, run: Run) -> tuple[Tensor, Tensor | None, Tensor]:
    """The user's draws (n, dim), their log-weights (n,) and the chain of each; few chains are cut into pieces."""
    x = data.x.reshape(-1, data.x.shape[-1]).to(run.backend.device, run.backend.dtype)
    units, length = data.x.shape[:2]
    group = torch.arange(len(x), device=x.device) // max(1, min(length, units * length // FEWEST_GROUPS))
    return x, None if data.log_weight is None else data.log_weight.reshape(-1).to(x.device), group


def bare_pool(x: Tensor, log_w: Tensor | None, group: Tensor) -> tuple[Pool, Diagonal | Dense]:
    """Points x (n, dim) in their own units, without gradients; and the map. Raises InitFailed."""
    map = moments(x, log_w)
    z = map.pull(x)
    fine = z.isfinite().all(-1)
    if int(fine.sum()) < FEWEST:
        raise InitFailed(f"only {int(fine.sum())} of {len(x)} draws are finite; wanted {FEWEST} or more to learn from")
    pool = Pool(z, None, None, log_w, group, 0.0, NOISE)[fine.nonzero()[:, 0]]
    return replace(pool, low=finest(pool.z, None)), map
