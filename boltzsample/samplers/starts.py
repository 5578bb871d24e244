"""Starts: where chains begin, and the wide source (wide_source.py) that superchains and witnesses hang on.

Without the user's starts, chains begin at draws of the wide base, eight to a draw (superchains), each draw taken through a
burst of its own first. Draws on the cliffs of a curved or stiff density climb to the height of typical points before that: the
common step of a batch would collapse for them. They climb no higher, so flat directions stay as wide as they were drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from boltzsample.ascent import ascend
from boltzsample.backend import Backend
from boltzsample.densities import StudentT
from boltzsample.errors import InitFailed, ShapeError
from boltzsample.kernels import Noise
from boltzsample.maps import Dense, Diagonal
from boltzsample.samplers import burst as bursts
from boltzsample.streams import LANE, Stream
from boltzsample.target import Target

WIDEN = 3.0  # the base is this much wider than what was reached
SUPERCHAIN = 8  # chains that share a start
TRIES = 100
CLIMB_ROUNDS = 50


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
    height: float = -torch.inf  # log_prob of the lower points reached

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

    def chains(self, target: Target, backend: Backend, stream: Stream, replicates: int, chains: int) -> tuple[Tensor, tuple[int, int]]:
        """Starting points (replicates, chains, dim) of finite log_prob, and the rows spent on finding them.

        Raises InitFailed.
        """
        group = self.groups(chains).to(backend.device)
        if self.given is not None:
            return self.given[group].expand(replicates, chains, -1).clone(), (0, 0)
        x, tries = self._finite(target, backend, stream, replicates, int(group.max()) + 1)
        assert self.base is not None
        x, climbed = self._settled(target, backend, stream, x)
        rows = bursts.price(x.shape[0] * x.shape[1], self.has_gradient)
        return x[:, group], (rows[0] + tries, rows[1] + climbed)

    def _settled(self, target: Target, backend: Backend, stream: Stream, x: Tensor) -> tuple[Tensor, int]:
        """x (replicates, starts, dim) after climb and burst, and the gradient rows of the climb.

        Each start depends on itself alone, and is moved in chunks as chains are.
        """
        assert self.base is not None
        replicates, starts, dim = x.shape
        reach = (narrowed(self.base.map).log_det / dim).exp()  # the geometric mean of the scales
        climbed = 0
        size = starts if backend.chunk is None else backend.chunk * LANE // SUPERCHAIN
        for r in range(replicates):
            lanes = [stream.child("burst", r, lane).rng(backend.dtype, backend.device) for lane in range(-(-starts // LANE))]
            noise = Noise(*(torch.cat(part, 1) for part in zip(*(bursts.draw(rng, LANE, dim) for rng in lanes), strict=True)))
            for i in range(0, starts, size):
                part = slice(i, min(i + size, starts))
                here = Noise(*(n[:, part] for n in noise))
                if self.has_gradient:
                    climb = ascend(target, x[r, part], reach=reach, rounds=CLIMB_ROUNDS, ceiling=self.height)
                    x[r, part], climbed = climb.x, climbed + climb.rows
                x[r, part] = bursts.burst(target, x[r, part], reach.expand(part.stop - i), here, self.has_gradient).x[-1]
        return x, climbed

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


def user_starts(name: str, points: Tensor, dim: int) -> Tensor:
    """The user's points, (dim,) or (k, dim), as (k, dim). Raises ShapeError."""
    if points.ndim not in (1, 2) or points.shape[-1] != dim or 0 in points.shape:
        raise ShapeError(f"{name} has shape {tuple(points.shape)}; wanted ({dim},) or (k, {dim}): one point, or k points to share out")
    return points.reshape(-1, dim)


def narrowed(map: Diagonal | Dense) -> Diagonal | Dense:
    """The map without the widening."""
    return Diagonal(map.m, map.s / WIDEN) if isinstance(map, Diagonal) else Dense(map.m, map.L / WIDEN)
