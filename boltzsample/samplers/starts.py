"""Starts: the wide source that everything global hangs on (superchains, witnesses, annealing bases).

Scale search: z ~ N(0, I) times s for s = 1e-6 .. 1e6; keep finite log_prob; a short ascent from each; a short burst of MALA
(random walk without a gradient) with a step of its own from each end, joined by Laplace draws at the distinct optima (a short
burst cannot know the long axes of an ill-conditioned density). Points whose log_prob still rises are travelling and dropped. The
wide base is a Student-t_5 with the mean and 3^2 times the covariance of all points reached: never a Laplace covariance alone (the
funnel's only optimum is at v = -40), never the draws it will be used to judge. Chains start at draws of the base after a burst
of their own, which takes them off the cliffs of a badly scaled density but not out of their region.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from boltzsample.ascent import Ascent, ascend
from boltzsample.backend import Backend
from boltzsample.densities import StudentT
from boltzsample.errors import InitFailed, ShapeError
from boltzsample.kernels import MALA, RandomWalk
from boltzsample.laplace import distinct, laplace
from boltzsample.maps import Dense, Diagonal
from boltzsample.streams import LANE, Rng, Stream
from boltzsample.target import Target

PER_SCALE = 8  # points for each of the 13 scales
ASCENT_ROUNDS = 30
BURST_STEPS = 60
WIDEN = 3.0
SUPERCHAIN = 8  # chains that share a start
TRIES = 100
DENSE_UP_TO = 500  # dimensions
LAPLACE_UP_TO = 200  # dimensions: a Hessian costs 2 dim gradients
MOST_OPTIMA = 8
POLISH_ROUNDS = 200
SHRINK = 1e-3


@dataclass(frozen=True, eq=False)
class Starts:
    """Where chains begin. `base` is the wide source (None if the user's starts make it needless), `reached` (k, dim) the points
    it was fitted to, `given` (k, dim) the user's starts, `modes` (k, dim) the user's modes; `rows` is the source's price."""

    base: StudentT | None
    reached: Tensor | None = None
    given: Tensor | None = None
    modes: Tensor | None = None
    rows: tuple[int, int] = (0, 0)
    has_gradient: bool = True

    def first_map(self, backend: Backend, dim: int) -> Diagonal | Dense:
        """A first guess of the target's location and scale, as an affine map."""
        if self.base is not None:
            return narrowed(self.base.map)
        points = torch.zeros(1, dim, dtype=backend.dtype, device=backend.device) if self.given is None else self.given
        scale = points.std(0) if len(points) > 1 else torch.ones_like(points[0])
        return Diagonal(points.mean(0), torch.where(scale > 0, scale, 1.0))

    def groups(self, chains: int) -> Tensor:
        """(chains,) the number of each chain's start: superchains of 8 that share one, or the user's starts in turn."""
        index = torch.arange(chains)
        if self.given is not None:
            return index % len(self.given)
        return index // SUPERCHAIN if chains >= 4 * SUPERCHAIN else index

    def chains(
        self, target: Target, backend: Backend, stream: Stream, replicates: int, chains: int
    ) -> tuple[Tensor, tuple[int, int]]:
        """Starting points (replicates, chains, dim) of finite log_prob, and the rows spent on finding them.

        Raises InitFailed.
        """
        group = self.groups(chains).to(backend.device)
        if self.given is not None:
            return self.given[group].expand(replicates, chains, -1).clone(), (0, 0)
        x, tries = self._finite(target, backend, stream, replicates, int(group.max()) + 1)
        assert self.base is not None
        reach = (narrowed(self.base.map).log_det / target.dim).exp()  # the geometric mean of the scales
        rng = stream.child("first burst").rng(backend.dtype, backend.device)
        flat = x.reshape(-1, target.dim)
        wander, _, rows = _burst(target, flat, reach.expand(len(flat)), rng, self.has_gradient)
        return wander[-1].reshape(x.shape)[:, group], (rows[0] + tries, rows[1])

    def _finite(self, target: Target, backend: Backend, stream: Stream, replicates: int, starts: int) -> tuple[Tensor, int]:
        """Draws of the base (replicates, starts, dim) of finite log_prob, and the rows spent."""
        x, rows = self._first(stream, backend, replicates, starts, 0), 0
        for attempt in range(1, TRIES + 1):
            lost = ~target.log_prob(x).isfinite()  # NaN and -inf: no place to start
            rows += lost.numel()
            if not bool(lost.any()):
                return x, rows
            x = torch.where(lost[..., None], self._first(stream, backend, replicates, starts, attempt), x)
        raise InitFailed(
            f"{int(lost.sum())} of {lost.numel()} chains found no start with a finite log_prob in {TRIES} draws from the wide source; "
            "pass starts= with points inside the support"
        )

    def _first(self, stream: Stream, backend: Backend, replicates: int, starts: int, attempt: int) -> Tensor:
        """One draw of the base for each start (replicates, starts, dim), by lane: how many there are does not matter."""
        assert self.base is not None
        rows = []
        for r in range(replicates):
            lanes = [stream.child("start", r, lane, attempt).rng(backend.dtype, backend.device) for lane in range(-(-starts // LANE))]
            rows.append(torch.cat([self.base.sample(rng, LANE) for rng in lanes])[:starts])
        return torch.stack(rows)


def user_starts(name: str, points: Tensor, dim: int, backend: Backend) -> Tensor:
    """The user's points as (k, dim) in the run's dtype and on its device. Raises ShapeError."""
    points = torch.as_tensor(points).detach()
    if points.ndim not in (1, 2) or points.shape[-1] != dim or 0 in points.shape:
        raise ShapeError(f"{name} has shape {tuple(points.shape)}; wanted ({dim},) or (k, {dim}): one point, or k points to share out")
    return torch.atleast_2d(points).to(backend.device, backend.dtype)


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
    rng = stream.child("burst").rng(backend.dtype, backend.device)
    wander, log_p, spent = _burst(target, x, _reach(x), rng, gradient)
    reached = wander[BURST_STEPS // 2 :, ~_travelling(log_p, _window(target))].reshape(-1, target.dim)
    rows = (log_rows + spent[0], grad_rows + spent[1])
    if climb is not None and target.dim <= LAPLACE_UP_TO:
        extra, (log_more, grad_more) = _laplace_draws(target, climb, reached, backend, stream)
        reached, rows = torch.cat([reached, extra]), (rows[0] + log_more, rows[1] + grad_more)
    return Starts(StudentT(_widened(reached)), reached=reached, modes=modes, rows=rows, has_gradient=gradient)


def _search(target: Target, backend: Backend, stream: Stream) -> tuple[Tensor, int]:
    """Points of finite log_prob over all scales (k, dim), and the rows spent."""
    scales = torch.logspace(-6, 6, 13, dtype=backend.dtype, device=backend.device).repeat_interleave(PER_SCALE)
    rows = 0
    for attempt in range(TRIES):
        rng = stream.child("scale search", attempt).rng(backend.dtype, backend.device)
        x = scales[:, None] * rng.normal(len(scales), target.dim)
        good = target.log_prob(x).isfinite()
        rows += len(x)
        if bool(good.any()):
            return x[good], rows
    raise InitFailed(
        f"log_prob was -inf or NaN at all {rows} points tried, at scales from 1e-6 to 1e6 around 0; pass starts= with points inside "
        "the support, or support= for a constrained density"
    )


def _reach(x: Tensor) -> Tensor:
    return 0.1 * x.norm(dim=-1).clamp(min=1e-6)


def _burst(target: Target, x: Tensor, reach: Tensor, rng: Rng, gradient: bool) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """BURST_STEPS of a kernel from x (k, dim), each point with a step that adapts for it alone, from `reach` (k) on.

    Returns what was visited (steps, k, dim), its log_prob (steps, k) and the rows spent.
    """
    kernel: Any
    log_h = 2 * reach.log() if gradient else reach.log()
    state: Any = None
    seen = []
    for i in range(BURST_STEPS):
        kernel = MALA(log_h.exp()) if gradient else RandomWalk(log_h.exp())
        state = kernel.init(target, x) if state is None else state
        state, info = kernel.step(target, state, kernel.draw(rng, (len(x),), target.dim))
        log_h = log_h + 8.0 / (i + 8) * (info.accept_prob - kernel.target_accept)
        seen.append(state)
    rows = (BURST_STEPS + 1) * len(x)
    return torch.stack([s.x for s in seen]), torch.stack([s.log_p for s in seen]), ((0, rows) if gradient else (rows, 0))


def _travelling(log_p: Tensor, window: float) -> Tensor:
    """Which points (k) have not arrived: log_p (steps, k) rises over the second half (mean rise 3 of its errors above zero), or
    lies more than `window` below the median of those that do not rise.

    A chain in equilibrium does not rise, and one that leaves an optimum falls. The median, not the best: at the optimum of a
    funnel log_p is a hundred nats above its typical values.
    """
    rise = log_p[len(log_p) // 2 :].diff(dim=0).nan_to_num(nan=torch.inf)
    up = rise.mean(0) > 3 * rise.std(0) / len(rise) ** 0.5
    calm = log_p[-1] if bool(up.all()) else log_p[-1][~up]
    up = up & ~up.all()
    return up | (log_p[-1] < calm.median() - window)


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
            draws.append(x[target.log_prob(x) > hill.log_p - _window(target)])
            asked += len(x)
    return torch.cat(draws), (asked, spent)


def _window(target: Target) -> float:
    """How far below the best a point may lie, in nats: a typical set lies about dim / 2 below its mode."""
    return 20.0 + 2.0 * target.dim


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


def narrowed(map: Diagonal | Dense) -> Diagonal | Dense:
    """The map without the widening."""
    return Diagonal(map.m, map.s / WIDEN) if isinstance(map, Diagonal) else Dense(map.m, map.L / WIDEN)
