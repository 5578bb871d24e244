"""Chains in motion: a batch of (replicates, chains) moved by a kernel in the coordinates z of a map, x = T(z).

The only mutable object of a run. Noise is drawn in blocks of steps, a lane of chains at a time, from named streams; steps go
chunk by chunk (whole lanes); everything that happened is metered inside the step, so that no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from boltzsample.backend import Backend, Stepper, halved, is_out_of_memory
from boltzsample.errors import PositiveInfinityError
from boltzsample.kernels.kernel import Kernel, Noise
from boltzsample.streams import LANE, Stream, block_steps
from boltzsample.target import Target
from boltzsample.views import Pullback

T = TypeVar("T")


class Meter(NamedTuple):
    """Running counts of what the chains did, per chain."""

    moves: Tensor  # (*batch) accepted proposals
    divergent: Tensor  # (*batch) diverged trajectories
    nan: Tensor  # (*batch) proposals whose log_prob was NaN
    posinf: Tensor  # (*batch) proposals whose log_prob was +inf
    bad_x: Tensor  # (*batch, dim) the last of either, in z

    @staticmethod
    def zeros(like: Tensor) -> Meter:
        n = torch.zeros(like.shape[:-1], dtype=torch.int64, device=like.device)
        return Meter(n, n, n, n, torch.full_like(like, torch.nan))


def advance(kernel: Kernel, target: Target, state: Any, meter: Meter, noise: Noise) -> tuple[Any, Meter, Tensor]:
    """One transition, metered. Returns the new state, the new meter and each chain's acceptance probability."""
    state, info = kernel.step(target, state, noise)
    nan = torch.isnan(info.log_p) & info.x.isfinite().all(-1)  # an integrator that overflowed is no fault of the density
    posinf = torch.isposinf(info.log_p)
    meter = Meter(
        meter.moves + info.accepted,
        meter.divergent + info.divergent,
        meter.nan + nan,
        meter.posinf + posinf,
        torch.where((nan | posinf)[..., None], info.x, meter.bad_x),
    )
    return state, meter, info.accept_prob


@dataclass
class Chains:
    """A batch of chains: `state` in z (replicates, chains, ...), `kernel` and `map` of this moment, and the `meter`."""

    target: Target
    kernel: Kernel
    map: Any
    state: Any
    meter: Meter
    backend: Backend
    stream: Stream
    stepper: Stepper[tuple[Any, Meter, Tensor]]
    rows: int = 0  # transitions made, counted in chains
    inits: int = 0  # states initialized, counted in chains
    split: bool = False

    @staticmethod
    def start(target: Target, kernel: Kernel, map: Any, x: Tensor, backend: Backend, stream: Stream, transitions: int) -> Chains:
        """Chains at x (replicates, chains, dim), about to make that many transitions."""
        z = map.pull(x)
        stepper = backend.stepper(advance, transitions)
        chains = Chains(target, kernel, map, None, Meter.zeros(z), backend, stream, stepper)
        return chains._init(z)

    def _init(self, z: Tensor) -> Chains:
        self.state = self.kernel.init(Pullback(self.target, self.map), z)
        self.inits += z.shape[:-1].numel()
        return self

    @property
    def x(self) -> Tensor:
        """Positions in x (replicates, chains, dim)."""
        x: Tensor = self.map.push(self.state.x)[0]
        return x

    @property
    def log_prob(self) -> Tensor:
        """log_prob at x (replicates, chains)."""
        log_p: Tensor = self.state.log_p - self.map.push(self.state.x)[1]
        return log_p

    def retune(self, kernel: Kernel, map: Any | None = None) -> None:
        """Another kernel; with another map the chains stay where they are in x, and the meter starts anew."""
        self.kernel = kernel
        if map is not None:
            x, self.map = self.x, map
            self.meter = Meter.zeros(self.state.x)
            self._init(map.pull(x))

    def forget(self) -> None:
        """Start the meter anew."""
        self.meter = Meter.zeros(self.state.x)

    def steps(self, n: int, name: str) -> Iterator[Tensor]:
        """Make n transitions with the noise called `name`; yields each one's acceptance probabilities (replicates, chains)."""
        dim = self.state.x.shape[-1]
        for block in range(-(-n // block_steps(dim))):
            noise = self._noise(name, block)
            for t in range(min(block_steps(dim), n - block * block_steps(dim))):
                yield self._step(Noise(*(part[t] for part in noise)))
            self.check()

    def check(self) -> None:
        """Raise PositiveInfinityError where a proposal had log_prob = +inf."""
        hit = self.meter.posinf > 0
        if bool(hit.any()):
            x = self.map.push(self.meter.bad_x)[0][hit][0]
            raise PositiveInfinityError(
                f"log_prob returned +inf at x = {x.tolist()}; a log-density may be -inf but never +inf: look for a division by zero "
                "or an unbounded spike there (the point is in the exception's .x)",
                x,
            )

    def bad_points(self) -> Tensor:
        """Points (k, dim) in x where log_prob was NaN, one per chain at most."""
        bad: Tensor = self.map.push(self.meter.bad_x)[0][self.meter.nan > 0]
        return bad

    def _noise(self, name: str, block: int) -> Noise:
        """A block of noise, (steps, replicates, chains, ...): one generator for each replicate, lane and block."""
        replicates, chains, dim = self.state.x.shape
        parts = [
            [self._lane(name, r, lane, block, dim) for lane in range(-(-chains // LANE))] for r in range(replicates)
        ]
        return Noise(*(torch.stack([torch.cat(lanes, 1)[:, :chains] for lanes in rows], 1) for rows in _transpose(parts)))

    def _lane(self, name: str, replicate: int, lane: int, block: int, dim: int) -> Noise:
        stream = self.stream.child(name, "replicate", replicate, "lane", lane, "block", block)
        return self.kernel.draw(stream.rng(self.backend.dtype, self.backend.device), (block_steps(dim), LANE), dim)

    def _step(self, noise: Noise) -> Tensor:
        while True:
            try:
                pieces = [self._move(part, noise) for part in self._chunks()]
                break
            except (RuntimeError, torch.OutOfMemoryError) as error:
                smaller = halved(self.backend, -(-self.state.x.shape[1] // LANE)) if is_out_of_memory(error) else None
                if smaller is None:
                    raise
                self.backend, self.split = smaller, True
        self.state, self.meter, accept = pieces[0] if len(pieces) == 1 else _join(pieces)
        self.rows += accept.numel()
        return accept

    def _move(self, part: slice, noise: Noise) -> tuple[Any, Meter, Tensor]:
        state = type(self.state)(*(s[:, part] for s in self.state))
        meter = Meter(*(m[:, part] for m in self.meter))
        here = Noise(*(n[:, part] for n in noise))
        return self.stepper(self.kernel, Pullback(self.target, self.map), state, meter, here)

    def _chunks(self) -> list[slice]:
        chains = self.state.x.shape[1]
        size = chains if self.backend.chunk is None else self.backend.chunk * LANE
        return [slice(i, i + size) for i in range(0, chains, size)]


def _transpose(parts: list[list[Noise]]) -> Iterator[list[tuple[Tensor, ...]]]:
    """[replicate][lane] of Noise -> for each field, [replicate][lane] of tensors."""
    for field_index in range(len(Noise._fields)):
        yield [tuple(lane[field_index] for lane in row) for row in parts]


def _join(pieces: list[tuple[Any, Meter, Tensor]]) -> tuple[Any, Meter, Tensor]:
    states, meters, accepts = zip(*pieces, strict=True)
    state = type(states[0])(*(torch.cat(s, 1) for s in zip(*states, strict=True)))
    return state, Meter(*(torch.cat(m, 1) for m in zip(*meters, strict=True))), torch.cat(accepts, 1)


def widen(obj: T, index: int) -> T:
    """The tuned tensors of replicate `index` alone, for a frozen dataclass whose tensor fields lead with replicates."""
    changes = {f.name: v[index : index + 1] for f in fields(obj) if isinstance(v := getattr(obj, f.name), Tensor) and v.ndim}  # type: ignore[arg-type]
    return replace(obj, **changes)  # type: ignore[type-var]
