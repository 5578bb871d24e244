"""A cloud of particles between a base and a target: weighed, resampled, moved, and looked at, a level at a time (annealing.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from boltzsample.backend import Backend
from boltzsample.errors import PositiveInfinityError
from boltzsample.flows.base import Base
from boltzsample.kernels import HMC, RandomWalk, Scaling
from boltzsample.kernels.adapt import with_step
from boltzsample.kernels.chains import Chains
from boltzsample.maps import Diagonal
from boltzsample.samplers.ladder import Ladder, Rung
from boltzsample.streams import Stream
from boltzsample.target import Target
from boltzsample.views import Pullback, Tempered

GAIN = 0.2  # of log h for each unit of acceptance missed
ACCEPT = 0.8  # of HMC: what a trajectory costs is spent already
TURN = math.pi / 2  # a quarter of a turn in whitened coordinates: trajectories get no longer than that
HIGH = (0.9, 0.98)  # quantiles of log_prob: a narrow place that is still being filled shows there first
JITTER = 0.6  # h U(.4, 1.6), of every particle its own


class Shape(NamedTuple):
    """How many particles there are."""

    replicates: int
    ensembles: int
    particles: int


class Known(NamedTuple):
    """A target at points where it is known already, and asking costs no evaluation."""

    state: Any
    dim: int

    def log_prob(self, x: Tensor) -> Tensor:
        log_p: Tensor = self.state.log_p
        return log_p

    def grad_log_prob(self, x: Tensor) -> Tensor:
        grad: Tensor = self.state.grad
        return grad

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.state.log_p, self.state.grad


def annealing_kernel(L: int, gradient: bool) -> HMC | RandomWalk:
    """The kernel of the moves; each level brings its own step size."""
    return HMC(h=torch.tensor(0.5), L=L, jitter=JITTER, target_accept=ACCEPT) if gradient else RandomWalk(h=torch.tensor(1.0))


@dataclass(eq=False)
class Cloud:
    """Particles x (replicates, ensembles * particles, dim) between base and target, each ensemble with noise of its own.

    log_w (replicates, ensembles, particles): what they weigh by now, the same within an ensemble where it is resampled. eve: the number
    of the first particle each descends from. beta (replicates, 1). resampled (replicates,): how often.
    """

    target: Target
    base: Base
    kernel: Any
    moves: int
    shape: Shape
    stream: Stream
    chains: Chains
    beta: Tensor
    log_w: Tensor
    eve: Tensor
    resampled: Tensor
    first: int = 0  # the number of the first replicate
    level: int = 0
    nan: int = 0
    bad: list[Tensor] = field(default_factory=list)
    accepted: float = 0.0

    @staticmethod
    def at(
        x: Tensor, target: Target, base: Base, kernel: Any, moves: int, shape: Shape, backend: Backend, stream: Stream, first: int = 0
    ) -> Cloud:
        """A cloud at x (replicates, ensembles * particles, dim), before its first level."""
        chains = Chains.start(target, kernel, unit_map(x), x, backend, stream, moves)
        r, n = shape.replicates, shape.particles
        log_w = torch.zeros(shape, dtype=torch.float64, device=x.device)
        zeros = torch.zeros(r, 1, dtype=x.dtype, device=x.device)
        eve = torch.arange(n, device=x.device).expand(shape)
        never = torch.zeros(r, dtype=torch.int64, device=x.device)
        return Cloud(target, base, kernel, moves, shape, stream, chains, zeros, log_w, eve, never, first)

    @staticmethod
    def start(target: Target, base: Base, kernel: Any, moves: int, shape: Shape, backend: Backend, stream: Stream, first: int = 0) -> Cloud:
        """A cloud of draws of the base. first: the number of the first replicate, where others run elsewhere."""
        rows = []
        for r in range(first, first + shape.replicates):
            rngs = [stream.child(*_names(r, e), "base").rng(backend.dtype, backend.device) for e in range(shape.ensembles)]
            rows.append(torch.cat([base.sample(rng, shape.particles) for rng in rngs]))
        return Cloud.at(torch.stack(rows), target, base, kernel, moves, shape, backend, stream, first)

    @property
    def log_z(self) -> Tensor:
        """log Zhat (replicates, ensembles); NaN where the target was not reached."""
        log_z = self.log_w.logsumexp(-1) - math.log(self.shape.particles)
        return torch.where(self.beta < 1, math.nan, log_z)

    @property
    def variance(self) -> Tensor:
        """V (replicates, ensembles)."""
        r, e, n = self.shape
        share = torch.zeros(r, e, n, dtype=torch.float64, device=self.eve.device)
        share.scatter_add_(-1, self.eve, torch.softmax(self.log_w, -1))
        return 1 - (n / (n - 1)) ** (self.resampled[:, None] + 1.0) * (1 - share.square().sum(-1))

    @property
    def eves(self) -> Tensor:
        """How many first particles have descendants (replicates,)."""
        alive = torch.zeros(self.shape, dtype=torch.bool, device=self.eve.device).scatter_(-1, self.eve, True)
        return alive.sum((1, 2))

    @property
    def price(self) -> int:
        """Evaluations of one more level."""
        return math.prod(self.shape) * (1 + round_price(self.kernel, self.moves))

    def look(self) -> Tensor:
        """Evaluate the target where the particles are: log p - log p_0 (replicates, ensembles * particles) in float64, -inf for NaN.

        Raises PositiveInfinityError.
        """
        if self.level:
            self.chains.target = self.target
            self.chains.retune(self.kernel, unit_map(self.chains.state.x))
        x, log_p = self.chains.state.x, self.chains.state.log_p
        if bool((log_p == torch.inf).any()):
            raise PositiveInfinityError.at(x[log_p == torch.inf][0])
        undefined = torch.isnan(log_p)
        self._undefined(int(undefined.sum()), x[undefined])
        ratio = log_p.double() - self.base.log_prob(x).double()
        return torch.where(torch.isnan(ratio), -torch.inf, ratio)

    def weigh(self, ratio: Tensor, beta: Tensor, resample: bool = True) -> None:
        """Weigh the particles for beta (replicates, 1), and resample those of replicates that are still climbing."""
        rise = beta.double() - self.beta.double()
        v = torch.where(rise != 0, rise * ratio, 0.0).reshape(self.shape)
        self.log_w, self.beta = self.log_w + v, beta
        if resample:
            index = self._resampled(v, rise[:, 0] > 0)
            self.log_w = (self.log_w.logsumexp(-1, keepdim=True) - math.log(self.shape.particles)).expand(self.shape).contiguous()
            self.eve = self.eve.gather(-1, index)
            self.resampled = self.resampled + (rise[:, 0] > 0)
            state = self.chains.state
            self.chains.state = type(state)(*(_gather(part, index, self.shape) for part in state))

    def _resampled(self, v: Tensor, climbing: Tensor) -> Tensor:
        """Whom each particle is replaced by (replicates, ensembles, particles): multinomial, by inversion of the cumulative weights."""
        share = torch.softmax(v, -1).cumsum(-1)
        share = share / share[..., -1:]
        rows = [[self._rng(r, e, "resample", torch.float64).uniform(v.shape[-1]) for e in range(v.shape[1])] for r in range(v.shape[0])]
        u = torch.stack([torch.stack(row) for row in rows])
        index = torch.searchsorted(share, u, right=True).clamp(max=v.shape[-1] - 1)
        stay = ~climbing[:, None, None] | ~(v > -torch.inf).any(-1, keepdim=True)  # an ensemble without any density has no one to follow
        return torch.where(stay, torch.arange(v.shape[-1], device=v.device), index)

    def move(self, rung: Rung, tune: bool = False, back: bool = False) -> Tensor:
        """The moves of a level, in the order of the way back where asked for; the step size after them, tuned towards the acceptance
        the kernel aims at where asked for."""
        chains, state = self.chains, self.chains.state
        view = Tempered(Known(state, self.target.dim), rung.beta, self.base)
        chains.target, chains.map = Tempered(self.target, rung.beta, self.base), rung.map
        chains.state = self.kernel.init(Pullback(view, rung.map), rung.map.pull(state.x))
        return self._moves(rung.h, tune, back)

    def settling(self, rounds: int) -> int:
        """What `settle` costs."""
        return math.prod(self.shape) * rounds * round_price(self.kernel, self.moves)

    def settle(self, ladder: Ladder, rounds: int) -> Tensor:
        """As many rounds of moves more at the last level, and what they changed in every ensemble's means of log_prob, of being among the
        highest 10% and 2%, and of the coordinates (replicates, ensembles, 3 + dim): noise, where the particles were the target's before.
        """
        high = self.chains.log_prob.double().quantile(self.log_w.new_tensor(HIGH), dim=1).T[:, None]  # (replicates, 1, 2)
        before = self._means(high)
        for _ in range(rounds):
            self._moves(ladder.h[-1])
        return self._means(high) - before

    def _means(self, high: Tensor) -> Tensor:
        log_p = self.chains.log_prob.double()[..., None]
        panel = torch.cat([log_p, (log_p > high).double(), self.chains.x.double()], -1)
        return panel.reshape(*self.shape, -1).mean(2)

    def _moves(self, h: Tensor, tune: bool = False, back: bool = False) -> Tensor:
        chains, noise, self.accepted = self.chains, self._noise(self.kernel, "move", self.moves), 0.0
        if not back:
            self._scale()
        for m in range(self.moves):
            chains.kernel = with_step(self.kernel, h)
            accept = chains.move(type(noise)(*(part[m : m + 1] for part in noise))).accept_prob[0]
            mean = accept.nan_to_num(nan=0.0).mean(-1, keepdim=True)
            self.accepted += float(mean.mean()) / self.moves
            h = _tuned(h, mean, self.kernel) if tune else h
        if back:  # what undoes a sequence of reversible moves is the same moves in the opposite order
            self._scale()
        chains.check()
        self._undefined(int(chains.meter.nan.sum()), chains.bad_points())
        chains.forget()
        self.level += 1
        return h

    def _scale(self) -> None:
        """A scale move about the level's mean: particles that lag behind in a heavy tail have a long way home by gradients."""
        chains, rows, scaling = self.chains, self.chains.rows, Scaling(gradient=self.kernel.price[1] > 0)
        chains.kernel = scaling
        chains.move(self._noise(scaling, "scale", 1))
        chains.kernel, chains.rows = self.kernel, rows
        chains.inits += math.prod(self.shape)  # it costs as much

    def _undefined(self, count: int, points: Tensor) -> None:
        self.nan += count
        if count:
            self.bad.append(points[:100])

    def _rng(self, r: int, e: int, what: str, dtype: torch.dtype) -> Any:
        return self.stream.child(*_names(self.first + r, e), "level", self.level, what).rng(dtype, self.chains.backend.device)

    def _noise(self, kernel: Any, what: str, moves: int) -> Any:
        r, e, n = self.shape
        dtype, dim = self.chains.backend.dtype, self.target.dim
        rows = [[kernel.draw(self._rng(i, j, what, dtype), (moves, n), dim) for j in range(e)] for i in range(r)]
        fields = zip(*((torch.cat(part, 1) for part in zip(*row, strict=True)) for row in rows), strict=True)
        return type(rows[0][0])(*(torch.stack(parts, 1) for parts in fields))


def round_price(kernel: Any, moves: int) -> int:
    """Evaluations of so many moves and a scale move, for each particle."""
    return moves * int(sum(kernel.price)) + 1


def _tuned(h: Tensor, accept: Tensor, kernel: Any) -> Tensor:
    tuned: Tensor = h * (GAIN * (accept - kernel.target_accept)).exp()
    return tuned.clamp(max=longest(kernel))


def longest(kernel: Any) -> float:
    return TURN / kernel.L if isinstance(kernel, HMC) else math.inf


def unit_map(x: Tensor, replicates: int | None = None) -> Diagonal:
    """z = x, for all or for each of some replicates."""
    zero = torch.zeros_like(x[0, 0])
    zero = zero if replicates is None else zero.expand(replicates, 1, -1)
    return Diagonal(zero, torch.ones_like(zero))


def _gather(part: Tensor, index: Tensor, shape: Shape) -> Tensor:
    """The chosen particles of part (replicates, ensembles * particles, ...)."""
    grouped = part.reshape(*shape, *part.shape[2:])
    where = index.reshape(*shape, *[1] * (part.ndim - 2)).expand_as(grouped)
    return grouped.gather(2, where).reshape(part.shape)


def _names(r: int, e: int) -> tuple[str | int, ...]:
    return "replicate", r, "ensemble", e
