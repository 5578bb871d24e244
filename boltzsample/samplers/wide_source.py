"""The wide source: a search for the regions of a density, from which everything global is drawn.

Scale search: z ~ N(0, I) times s for s = 1e-6 .. 1e6; keep finite log_prob; a burst from each, and from the end of a short ascent
from each: ascents alone would end in the narrowest spike of a density and never see the broad region around it. Points that do
not move or still rise are on their way and dropped. Laplace draws at the distinct optima join them (a short burst cannot know
the long axes of an ill-conditioned density). The wide base is a Student-t_5 with the mean and 3^2 times the covariance
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
from boltzsample.samplers.burst import Burst
from boltzsample.samplers.starts import TRIES, WIDEN, Starts
from boltzsample.streams import Stream
from boltzsample.target import Target

PER_SCALE = 8  # points for each of the 13 scales
ASCENT_ROUNDS = 100  # 30 leave a Student-t started at 1e4 on its way
POLISH_ROUNDS = 200
EVOLVE_ROUNDS = 150
LONG_BURST = 150  # steps from where nothing has climbed
DENSE_UP_TO = 500  # dimensions
LAPLACE_UP_TO = 200  # dimensions: a Hessian costs 2 dim gradients
MOST_OPTIMA = 8
SHRINK = 1e-3


def wide_source(target: Target, backend: Backend, stream: Stream, *, gradient: bool, modes: Tensor | None = None) -> Starts:
    """Search scales, climb, wander, and fit the wide base to the points reached. Raises InitFailed."""
    found, log_rows = search(target, backend, stream)
    found = found if modes is None else torch.cat([found, modes])
    rows, climb = (log_rows, 0), None
    if gradient:
        climb = ascend(target, found, reach=_reach(found), rounds=ASCENT_ROUNDS)
        top, rows = climb.x, (log_rows, climb.rows)
    else:
        climbers = stream.child("evolve").rng(backend.dtype, backend.device)
        top = evolve(target, found, reach=_reach(found), rng=climbers, rounds=EVOLVE_ROUNDS)
        rows = (log_rows + (EVOLVE_ROUNDS + 1) * len(found), 0)
    rng = stream.child("burst").rng(backend.dtype, backend.device)
    high = bursts.burst(target, top, _reach(top), bursts.draw(rng, len(top), target.dim), gradient)
    low = bursts.burst(target, found, _reach(found), bursts.draw(rng, len(found), target.dim, LONG_BURST), gradient)
    good = _worth_keeping(high, low, _window(target))
    last = bursts.STEPS // 2
    reached = torch.cat([high.x[-last:], low.x[-last:]], 1)[:, good].flatten(0, 1)
    height = float(torch.cat([high.log_p[-1], low.log_p[-1]])[good].quantile(0.1))
    for steps in (bursts.STEPS, LONG_BURST):
        spent = bursts.price(len(found), gradient, steps)
        rows = (rows[0] + spent[0], rows[1] + spent[1])
    if climb is not None and target.dim <= LAPLACE_UP_TO:
        extra, (log_more, grad_more) = _laplace_draws(target, climb, reached, backend, stream)
        reached, rows = torch.cat([reached, extra]), (rows[0] + log_more, rows[1] + grad_more)
    return Starts(StudentT(_widened(reached)), reached=reached, modes=modes, rows=rows, has_gradient=gradient, height=height)


def _worth_keeping(high: Burst, low: Burst, window: float) -> Tensor:
    """Which points of both bursts have arrived in a region whose mass is within `window` nats of the largest; if none, the largest."""
    arrived = torch.cat([bursts.arrived(high), bursts.arrived(low)])
    mass = torch.cat([bursts.log_mass(high), bursts.log_mass(low)]).nan_to_num(nan=-torch.inf)
    arrived = arrived if bool(arrived.any()) else mass > -torch.inf
    keep: Tensor = arrived & (mass >= mass[arrived].max() - window)
    return keep


def search(target: Target, backend: Backend, stream: Stream) -> tuple[Tensor, int]:
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
        "the support, or support= for a constrained density",
        rows,
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
