"""The wide source: a search for the regions of a density, from which everything global is drawn.

Scale search: z ~ N(0, I) times s for s = 1e-6 .. 1e6; keep finite log_prob; a short ascent from each; a burst from each end,
joined by Laplace draws at the distinct optima (a short burst cannot know the long axes of an ill-conditioned density). Points
whose log_prob still rises are travelling and dropped. The wide base is a Student-t_5 with the mean and 3^2 times the covariance
of all points reached: never a Laplace covariance alone (the funnel's only optimum is at v = -40), never the draws it will be
used to judge.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from boltzsample.ascent import Ascent, ascend, evolve
from boltzsample.backend import Backend
from boltzsample.densities import StudentT
from boltzsample.errors import InitFailed
from boltzsample.laplace import distinct, laplace
from boltzsample.maps import Dense, Diagonal
from boltzsample.samplers import burst as bursts
from boltzsample.samplers.starts import TRIES, WIDEN, Starts
from boltzsample.streams import Stream
from boltzsample.target import Target

PER_SCALE = 8  # points for each of the 13 scales
ASCENT_ROUNDS = 100  # 30 leave a Student-t started at 1e4 on its way
POLISH_ROUNDS = 200
EVOLVE_ROUNDS = 150
DENSE_UP_TO = 500  # dimensions
LAPLACE_UP_TO = 200  # dimensions: a Hessian costs 2 dim gradients
MOST_OPTIMA = 8
SHRINK = 1e-3


def wide_source(target: Target, backend: Backend, stream: Stream, *, gradient: bool, modes: Tensor | None = None) -> Starts:
    """Search scales, climb, wander, and fit the wide base to the points reached. Raises InitFailed."""
    x, log_rows = _search(target, backend, stream)
    grad_rows = 0
    if modes is not None:
        x = torch.cat([x, modes])
    climb = None
    if gradient:
        climb = ascend(target, x, reach=_reach(x), rounds=ASCENT_ROUNDS)
        grad_rows, x = climb.rows, climb.x
    else:
        climbers = stream.child("evolve").rng(backend.dtype, backend.device)
        x = evolve(target, x, reach=_reach(x), rng=climbers, rounds=EVOLVE_ROUNDS)
        log_rows += (EVOLVE_ROUNDS + 1) * len(x)
    rng = stream.child("burst").rng(backend.dtype, backend.device)
    seen = bursts.burst(target, x, _reach(x), bursts.draw(rng, *x.shape), gradient)
    arrived = ~bursts.travelling(seen.log_p, _window(target))
    reached = seen.x[bursts.STEPS // 2 :, arrived].reshape(-1, target.dim)
    spent = bursts.price(len(x), gradient)
    rows = (log_rows + spent[0], grad_rows + spent[1])
    if climb is not None and target.dim <= LAPLACE_UP_TO:
        extra, (log_more, grad_more) = _laplace_draws(target, climb, reached, backend, stream)
        reached, rows = torch.cat([reached, extra]), (rows[0] + log_more, rows[1] + grad_more)
    height = float(seen.log_p[-1, arrived].quantile(0.1))
    return Starts(StudentT(_widened(reached)), reached=reached, modes=modes, rows=rows, has_gradient=gradient, height=height)


def _search(target: Target, backend: Backend, stream: Stream) -> tuple[Tensor, int]:
    """Points of finite log_prob over all scales (k, dim), and the rows spent."""
    scales = torch.logspace(-6, 6, 13, dtype=backend.dtype, device=backend.device).repeat_interleave(PER_SCALE)
    rows = 0
    for attempt in range(TRIES):
        rng = stream.child("scale search", attempt).rng(backend.dtype, backend.device)
        x = scales[:, None] * rng.normal(len(scales), target.dim)
        found: Tensor = x[target.log_prob(x).isfinite()]
        rows += len(x)
        if len(found) > 0:
            return found, rows
    raise InitFailed(
        f"log_prob was -inf or NaN at all {rows} points tried, at scales from 1e-6 to 1e6 around 0; pass starts= with points inside "
        "the support, or support= for a constrained density"
    )


def _reach(x: Tensor) -> Tensor:
    tenth: Tensor = 0.1 * x.norm(dim=-1).clamp(min=1e-6)
    return tenth


def _laplace_draws(
    target: Target, climb: Ascent, reached: Tensor, backend: Backend, stream: Stream
) -> tuple[Tensor, tuple[int, int]]:
    """Draws (k, dim) of the Laplace approximations at the distinct optima, as many in all as the burst's."""
    scale = reached.std(0).clamp(min=1e-12)
    leaders, _ = distinct(climb.x, climb.log_p, scale, MOST_OPTIMA)
    tops = ascend(target, climb.x[leaders], reach=_reach(climb.x[leaders]), rounds=POLISH_ROUNDS)
    leaders, _ = distinct(tops.x, tops.log_p, scale, MOST_OPTIMA)  # not only the converged: a long valley is not climbed in a day
    rng = stream.child("laplace").rng(backend.dtype, backend.device)
    draws, spent, asked = [reached[:0]], tops.rows, 0
    for top in leaders:
        hill, rows = laplace(target, tops.x[top], tops.log_p[top], scale)
        spent += rows
        if hill.proper:
            x = hill.draw(rng.normal(-(-len(reached) // len(leaders)), target.dim))
            draws.append(x[target.log_prob(x) > hill.log_p - target.dim / 2 - _window(target)])
            asked += len(x)
    return torch.cat(draws), (asked, spent)


def _window(target: Target) -> float:
    """How far below the typical ones a point may lie, in nats: log_p of a Gaussian spreads by sqrt(dim / 2)."""
    return 10.0 + 4.0 * math.sqrt(target.dim / 2)


def _widened(points: Tensor) -> Diagonal | Dense:
    """The map of the wide base: the mean and 3 times the covariance factor of the points."""
    n, dim = points.shape
    m, scale = points.mean(0), points.std(0).clamp(min=1e-12)
    if dim > DENSE_UP_TO or n < 2 * dim:
        return Diagonal(m, WIDEN * scale)
    z = ((points - m) / scale).double()
    corr = (1 - SHRINK) * (z.T @ z) / n + SHRINK * torch.eye(dim, dtype=torch.float64, device=points.device)
    L, bad = torch.linalg.cholesky_ex(corr)
    return Diagonal(m, WIDEN * scale) if bool(bad) else Dense(m, WIDEN * scale[:, None] * L.to(points))
