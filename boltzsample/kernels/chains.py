"""Chains in motion: a batch of (replicates, chains) moved by a kernel in the coordinates z of a map, x = T(z).

The only mutable object of a run. Noise is drawn in blocks of steps, a lane of chains at a time, from named streams; steps go
chunk by chunk (whole lanes); everything that happened is metered inside the step, so that no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from boltzsample.backend import ONE_LOOP, Backend, Doubt, Stepper, copy_serially, halved, is_out_of_memory, parallel
from boltzsample.direct import unshared
from boltzsample.errors import PositiveInfinityError
from boltzsample.kernels.kernel import Kernel, Noise
from boltzsample.kernels.transitions import Meter, Path, glide, travel
from boltzsample.streams import LANE, Stream, block_steps
from boltzsample.target import Target, compilable
from boltzsample.views import Pullback

T = TypeVar("T")
MANY = 2**16  # numbers in a batch from which a graph's call costs nothing beside its memory traffic
MANY_GLIDING = 2**17  # the same where leapfrogs stay in registers


Step = Callable[..., tuple[Any, Meter, Path]]


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
    stepper: Stepper[tuple[Any, Meter, Path]]
    glider: Stepper[tuple[Any, tuple[Tensor, Tensor], Path, Tensor]]
    rows: int = 0  # transitions made, counted in chains
    again: int = 0  # transitions made in vain: met NaN, and were made again with masks
    doubts: dict[int, Doubt] = field(default_factory=dict)  # by a chunk's first chain
    inits: int = 0  # states initialized, counted in chains
    split: bool = False
    buffer: Any = None  # a block of noise, of the kernel's own type
    given: tuple[tuple[Any, ...], Kernel, Pullback] | None = None  # what steps are given, and what it was made of

    @staticmethod
    def start(target: Target, kernel: Kernel, map: Any, x: Tensor, backend: Backend, stream: Stream, transitions: int) -> Chains:
        """Chains at x (replicates, chains, dim), about to make that many transitions."""
        able = backend if compilable(target) else backend.eager()
        steppers = able.stepper(travel, transitions), able.stepper(glide, transitions, ONE_LOOP)
        chains = Chains(target, kernel, map, None, Meter.zeros(x), backend, stream, *steppers)
        return chains._init(x)

    def _init(self, x: Tensor) -> Chains:
        view = Pullback(self.target, self.map)
        states = self._by_chunk(lambda part: self.kernel.init(view, self.map.pull(x[:, part])), x.shape[1])
        self.state = type(states[0])(*(torch.cat(s, 1) for s in zip(*states, strict=True)))
        self.inits += x.shape[:-1].numel()
        return self

    @property
    def x(self) -> Tensor:
        """Positions in x (replicates, chains, dim)."""
        z = self.state.x
        return torch.cat(self._by_chunk(lambda part: self.map.push(z[:, part])[0], z.shape[1]), 1)

    @property
    def log_prob(self) -> Tensor:
        """log_prob at x (replicates, chains)."""
        log_p: Tensor = self.state.log_p - self.map.push(self.state.x[:, :1])[1]  # an affine map's log-det is the same everywhere
        return log_p

    def retune(self, kernel: Kernel, map: Any | None = None) -> None:
        """Another kernel; with another map the chains stay where they are in x, and the meter starts anew."""
        if type(kernel) is not type(self.kernel):
            self.buffer = None
        self.kernel = kernel
        if map is not None:
            x, self.map = self.x, map
            self.meter = Meter.zeros(self.state.x)
            self._init(x)

    def forget(self) -> None:
        """Start the meter anew."""
        self.meter = Meter.zeros(self.state.x)

    def steps(self, n: int, name: str) -> Iterator[Tensor]:
        """Make n transitions one by one; yields each one's acceptance probabilities (replicates, chains)."""
        for path in self.strides(n, name, 1):
            yield path.accept_prob[0]

    def strides(self, n: int, name: str, k: int) -> Iterator[Path]:
        """Make n transitions with the noise called `name`, k at a time where they are compiled; fewer are left: one by one, eagerly."""
        dim = self.state.x.shape[-1]
        k = min(self.stride(k), block_steps(dim))
        for block in range(-(-n // block_steps(dim))):
            noise = self._noise(name, block)
            end = min(block_steps(dim), n - block * block_steps(dim))
            whole = end - end % k
            for few in _split(noise, 0, whole, k):
                yield self._stride(few, self.stepper)
            for one in _split(noise, whole, end, 1):
                yield self._stride(one, self.stepper.eager)
            self.check()

    def move(self, noise: Noise) -> Path:
        """As many transitions as this noise (k, replicates, chains, ...) has."""
        return self._stride(noise, self.stepper)

    def stride(self, k: int) -> int:
        """k where a graph of several transitions pays, else 1: not eagerly, and not where their buffers leave the cache."""
        return k if self.stepper.compiled and self.state.x.numel() <= (MANY_GLIDING if self.glides else MANY) else 1

    @property
    def glides(self) -> bool:
        """Whether the quick way is open: compiled, and on the CPU, where asking how it went costs nothing."""
        compiled = self.stepper.compiled and self.glider.compiled
        return compiled and getattr(self.kernel, "keeps_nan", False) and self.backend.device.type == "cpu"

    def check(self) -> None:
        """Raise PositiveInfinityError where a proposal had log_prob = +inf."""
        hit = self.meter.posinf > 0
        if bool(hit.any()):
            raise PositiveInfinityError.at(self.map.push(self.meter.bad_x)[0][hit][0])

    def bad_points(self) -> Tensor:
        """Points (k, dim) in x where log_prob was NaN, one per chain at most."""
        bad: Tensor = self.map.push(self.meter.bad_x)[0][self.meter.nan > 0]
        return bad

    def _noise(self, name: str, block: int) -> Any:
        """A block of noise, (steps, replicates, chains, ...), in a buffer that the next block takes over.

        One generator for each replicate, lane and block; on the CPU as many lanes at once as there are threads.
        """
        replicates, chains, dim = self.state.x.shape
        if self.buffer is None:
            few = self.kernel.draw(self.stream.rng(self.backend.dtype, self.backend.device), (1, 1), dim)
            shape = (block_steps(dim), replicates, chains)
            self.buffer = type(few)(*(part.new_empty(shape + part.shape[2:]) for part in few))
        lanes = [(r, lane) for r in range(replicates) for lane in range(-(-chains // LANE))]
        parallel(lambda where: self._lane(name, block, *where), lanes, self.backend, self.buffer.normal.numel())
        return self.buffer

    def _lane(self, name: str, block: int, replicate: int, lane: int) -> None:
        """Fill one lane of the buffer."""
        stream = self.stream.child(name, "replicate", replicate, "lane", lane, "block", block)
        dim = self.state.x.shape[-1]
        drawn = self.kernel.draw(stream.rng(self.backend.dtype, self.backend.device), (block_steps(dim), LANE), dim)
        for whole, part in zip(self.buffer, drawn, strict=True):
            here = whole[:, replicate, lane * LANE : (lane + 1) * LANE]
            copy_serially(here, part[:, : here.shape[1]])

    def _stride(self, noise: Noise, step: Step) -> Path:
        pieces = self._by_chunk(lambda part: self._move(part, noise, step), self.state.x.shape[1])
        self.state, self.meter, path = pieces[0] if len(pieces) == 1 else _join(pieces)
        self.rows += path.accept_prob.numel()
        return path

    def _move(self, part: slice, noise: Noise, step: Step) -> tuple[Any, Meter, Path]:
        state, meter, here = self.state, self.meter, noise
        if part.stop - part.start < state.x.shape[1]:  # not for all of them: a dozen slices cost as much as a small graph
            state, meter = type(state)(*(s[:, part] for s in state)), Meter(*(m[:, part] for m in meter))
            here = type(noise)(*(n[:, :, part] for n in noise))
        kernel, view = self._given()
        return (self._glide(part.start, kernel, view, state, meter, here) if step is self.stepper else None) or step(
            kernel, view, state, meter, here
        )

    def _given(self) -> tuple[Kernel, Pullback]:
        """The kernel and the target in z, with tensors of their own for graphs: a map or step size of the user's may be known to the
        density, too."""
        now = self.kernel, self.target, self.map
        if self.given is None or any(one is not other for one, other in zip(now, self.given[0], strict=True)):
            kernel, map = unshared((self.kernel, self.map)) if self.stepper.compiled else (self.kernel, self.map)
            self.given = now, kernel, Pullback(self.target, map)
        return self.given[1:]

    def _glide(self, first: int, kernel: Kernel, view: Pullback, state: Any, meter: Meter, noise: Noise) -> tuple[Any, Meter, Path] | None:
        """The quick way; None where it is closed, not worth a try, or met NaN: then the same noise goes the careful way."""
        if not self.glides or not (doubt := self.doubts.setdefault(first, Doubt())).tries():
            return None
        state, (moves, divergent), path, right = self.glider(kernel, view, state, meter, noise)
        if bool(right):
            return state, meter._replace(moves=moves, divergent=divergent), path
        doubt.failed()
        self.again += path.accept_prob.numel()
        return None

    def _by_chunk(self, work: Callable[[slice], T], chains: int) -> list[T]:
        """work done for each chunk of chains; where memory runs out, all of it again in chunks half as large."""
        while True:
            size = chains if self.backend.chunk is None else self.backend.chunk * LANE
            try:
                return [work(slice(i, i + size)) for i in range(0, chains, size)]
            except (RuntimeError, torch.OutOfMemoryError) as error:
                smaller = halved(self.backend, -(-chains // LANE)) if is_out_of_memory(error) else None
                if smaller is None:
                    raise
                self.backend, self.split = smaller, True


def _split(noise: Any, start: int, end: int, k: int) -> Iterator[Any]:
    """Steps start to end of a block, k at a time; views made at once, which costs less than slices one by one."""
    return (type(noise)(*parts) for parts in zip(*(part[start:end].split(k) for part in noise), strict=True)) if end > start else iter(())


def _join(pieces: list[tuple[Any, Meter, Path]]) -> tuple[Any, Meter, Path]:
    states, meters, paths = zip(*pieces, strict=True)
    state = type(states[0])(*(torch.cat(s, 1) for s in zip(*states, strict=True)))
    meter = Meter(*(torch.cat(m, 1) for m in zip(*meters, strict=True)))
    return state, meter, Path(*(torch.cat(p, 2) for p in zip(*paths, strict=True)))
