"""Replica exchange in motion: ladders of levels pi_k ~ p_0^(1-b_k) p^(b_k), moved by one batched kernel, with swaps between.

Levels 1..K of all replicates are one batch of Chains, (replicates * K, ladders), with a step size and a map for each level. Level 0,
the base p_0, needs no kernel: it is drawn anew every round. What a swap needs is known already: from log pi_k and its gradient and
those of p_0, log p = (log pi_k - (1 - b_k) log p_0) / b_k. So a round costs one evaluation a ladder more than its moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from boltzsample.densities import StudentT
from boltzsample.errors import PositiveInfinityError
from boltzsample.kernels.adapt import with_step
from boltzsample.kernels.chains import Chains
from boltzsample.kernels.exchange import exchange, take
from boltzsample.maps import Dense, Diagonal
from boltzsample.samplers.sampler import Run
from boltzsample.samplers.warm_up import spent
from boltzsample.streams import LANE, block_steps
from boltzsample.target import Target, log_prob_and_grad
from boltzsample.views import Pullback, Tempered


@dataclass(frozen=True, eq=False)
class Rungs:
    """A ladder, tuned. base p_0; beta: (replicates, K + 1) from 0 to 1; h: (replicates * K, 1) and map, with the same leading axis, of
    the levels above the base."""

    base: StudentT
    beta: Tensor
    h: Tensor
    map: Diagonal | Dense

    @property
    def replicates(self) -> int:
        return self.beta.shape[0]

    @property
    def levels(self) -> int:
        return self.beta.shape[1] - 1

    def pick(self, index: Tensor, beta: Tensor) -> Rungs:
        """Rungs of the given inverse temperatures (replicates, K + 1), each tuned as the one of the index (replicates, K) is here."""
        rows = (index + self.levels * torch.arange(len(index), device=index.device)[:, None]).flatten()
        return Rungs(self.base, beta, self.h[rows], at(self.map, rows))

    def of(self, replicates: int) -> Rungs:
        """The same rungs for as many replicates."""
        if self.replicates == replicates:
            return self
        rows = torch.arange(self.levels, device=self.beta.device).repeat(replicates)
        return Rungs(self.base, self.beta.expand(replicates, -1), self.h[rows], at(self.map, rows))


def at(map: Diagonal | Dense, rows: Tensor) -> Diagonal | Dense:
    """Some of a stack of maps."""
    return Diagonal(map.m[rows], map.s[rows]) if isinstance(map, Diagonal) else Dense(map.m[rows], map.L[rows])


class Here(NamedTuple):
    """Points of all levels but the base, and the target there: x (replicates, K, ladders, dim), log_p and its gradient."""

    x: Tensor
    log_p: Tensor
    grad: Tensor


class Seen(NamedTuple):
    """A target at points where it is known already: whoever asks for its value there is given that, and no evaluation is spent."""

    dim: int
    log_p: Tensor
    grad: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        return self.log_p

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.grad

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_p, self.grad


class Round(NamedTuple):
    """A round, before its swaps. x (replicates, ladders, dim) and log_p of the coldest level; s = log p - log p_0 (replicates, K + 1,
    ladders) of all; swap: acceptance probabilities (replicates, K, ladders) of all neighbours; accept: of the moves (replicates * K,
    ladders)."""

    x: Tensor
    log_p: Tensor
    s: Tensor
    swap: Tensor
    accept: Tensor


@dataclass(eq=False)
class Replicas:
    """Ladders in motion. fresh: which points (replicates, K, ladders) came from the base and have not reached the coldest level since;
    trips (replicates, ladders): how often one did; swaps (replicates, ladders): those of the coldest level."""

    target: Target
    rungs: Rungs
    chains: Chains
    run: Run
    phase: str
    fresh: Tensor
    trips: Tensor
    swaps: Tensor
    made: int = 0  # rounds
    nan: int = 0
    bad: list[Tensor] = field(default_factory=list)

    @staticmethod
    def start(target: Target, rungs: Rungs, kernel: Any, x: Tensor, run: Run, phase: str, transitions: int) -> Replicas:
        """Ladders at x (replicates * K, ladders, dim)."""
        view, stream = tempered(target, rungs), run.stream.child("tempering", phase)
        chains = Chains.start(view, with_step(kernel, rungs.h), rungs.map, x, run.backend, stream, transitions)
        zeros = torch.zeros(rungs.replicates, rungs.levels, x.shape[1], dtype=torch.int64, device=x.device)
        return Replicas(target, rungs, chains, run, phase, zeros.bool(), zeros[:, 0], zeros[:, 0])

    @property
    def price(self) -> int:
        """Evaluations of one round of a single move."""
        return (1 + self.rungs.levels * sum(self.chains.kernel.price)) * self.trips.numel()

    def why_stop(self, sweeps: int, share: float = 1.0) -> str | None:
        """The flag code that forbids one more round, or None."""
        return self.run.must_stop(spent(self.chains) + sweeps * self.price, share)

    def rounds(self, n: int, sweeps: int, name: str, share: float = 1.0) -> Iterator[Round]:
        """n rounds of `sweeps` moves and a round of swaps, or as many as the share of the budget and the user allow, but one."""
        fresh = self._from_base(name)
        accept = torch.zeros_like(self.chains.state.log_p)
        for t, path in enumerate(self.chains.strides(n * sweeps, name, 1), 1):
            accept = accept + path.accept_prob[0] / sweeps
            if t % sweeps:
                continue
            yield self._round(path.x[0], path.log_p[0], accept, *next(fresh))
            accept = torch.zeros_like(accept)
            if t < n * sweeps and self.why_stop(sweeps, share):
                self.chains.check()
                return

    def forget(self) -> None:
        """Count anew from here."""
        self.chains.forget()
        self.trips, self.swaps, self.fresh = torch.zeros_like(self.trips), torch.zeros_like(self.swaps), torch.zeros_like(self.fresh)
        self.nan, self.bad = 0, []

    def retune(self, rungs: Rungs) -> None:
        """Other rungs, as many: the points stay where they are."""
        chains, here = self.chains, self._here(self.chains.x, self.chains.log_prob)
        self.rungs = rungs
        kernel: Any = chains.kernel
        chains.target, chains.kernel, chains.map = tempered(self.target, rungs), with_step(kernel, rungs.h), rungs.map
        chains.state = self._state(here)
        chains.forget()

    def _round(self, x: Tensor, log_p: Tensor, accept: Tensor, drawn: Here, uniform: Tensor) -> Round:
        here = self._here(x, log_p)
        whole = Here(*(torch.cat(parts, 1) for parts in zip(drawn, here, strict=True)))
        s = whole.log_p.double() - self.rungs.base.log_prob(whole.x).double()
        swaps = exchange(s, self.rungs.beta.double(), uniform, odd=bool(self.made % 2))
        self._swap(whole, swaps.source)
        self.made += 1
        return Round(here.x[:, -1], here.log_p[:, -1], s, swaps.accept_prob, accept)

    def _swap(self, whole: Here, source: Tensor) -> None:
        there = Here(*(take(part, source)[:, 1:] for part in whole))
        stays = (source == torch.arange(source.shape[1], device=source.device)[:, None])[:, 1:]
        self.swaps = self.swaps + ~stays[:, -1]
        kept, state = stays.flatten(0, 1), self.chains.state
        swapped = self._state(there)
        self.chains.state = type(state)(
            *(torch.where(kept if old.ndim == 2 else kept[..., None], old, new) for old, new in zip(state, swapped, strict=True))
        )
        fresh = take(torch.cat([torch.ones_like(self.fresh[:, :1]), self.fresh], 1), source)[:, 1:]
        self.trips = self.trips + fresh[:, -1]
        self.fresh = torch.cat([fresh[:, :-1], torch.zeros_like(fresh[:, -1:])], 1)

    def _here(self, x: Tensor, log_pi: Tensor) -> Here:
        """The target at the points of the levels (replicates * K, ladders, dim), from log pi_k there."""
        shape = self.fresh.shape
        b, (log_p0, grad0) = self.rungs.beta[:, 1:, None].flatten(0, 1), log_prob_and_grad(self.rungs.base, x)
        log_p = (log_pi - (1 - b) * log_p0) / b
        grad = torch.zeros_like(x)
        if hasattr(self.chains.state, "grad"):
            grad = (_pushed(self.chains.map, self.chains.state.grad) - (1 - b)[..., None] * grad0) / b[..., None]
        return Here(x.reshape(*shape, -1), log_p.reshape(shape), grad.reshape(*shape, -1))

    def _state(self, here: Here) -> Any:
        """The kernel's state at points where the target is known."""
        x, log_p, grad = (part.flatten(0, 1) for part in here)
        view = tempered(Seen(self.target.dim, log_p, grad), self.rungs)
        return self.chains.kernel.init(Pullback(view, self.chains.map), self.chains.map.pull(x))

    def _from_base(self, name: str) -> Iterator[tuple[Here, Tensor]]:
        """For each round: draws of the base with the target there, (replicates, 1, ladders), and uniforms (replicates, K, ladders)."""
        replicates, levels, ladders = self.fresh.shape
        steps, lanes = block_steps(self.target.dim), range(-(-ladders // LANE))
        for block in count():
            parts = [[self._lane(name, block, r, lane, steps, levels) for lane in lanes] for r in range(replicates)]
            x, u = (torch.stack([torch.cat([part[i] for part in row], 2)[:, :, :ladders] for row in parts]) for i in (0, 1))
            for t in range(steps):
                yield self._evaluated(x[:, t]), u[:, t]

    def _lane(self, name: str, block: int, replicate: int, lane: int, steps: int, levels: int) -> tuple[Tensor, Tensor]:
        stream = self.chains.stream.child("base", name, "replicate", replicate, "lane", lane, "block", block)
        rng = stream.rng(self.run.backend.dtype, self.run.backend.device)
        x = self.rungs.base.sample(rng, steps * LANE)
        return x.reshape(steps, 1, LANE, -1), rng.uniform(steps, levels, LANE)

    def _evaluated(self, x: Tensor) -> Here:
        """The target at draws of the base (replicates, 1, ladders, dim); NaN counts as no density."""
        if hasattr(self.chains.state, "grad"):
            log_p, grad = log_prob_and_grad(self.target, x)
        else:
            log_p, grad = self.target.log_prob(x), torch.zeros_like(x)
        self.run.ledger.add(self.phase, (0, 1) if hasattr(self.chains.state, "grad") else (1, 0), log_p.numel())
        if bool((log_p == torch.inf).any()):
            raise PositiveInfinityError.at(x[log_p == torch.inf][0])
        undefined = torch.isnan(log_p)
        if bool(undefined.any()):
            self.nan += int(undefined.sum())
            self.bad = [*self.bad[:100], x[undefined][:1]]
        return Here(x, torch.where(undefined, -torch.inf, log_p), grad)


def tempered(target: Any, rungs: Rungs) -> Tempered:
    """The densities of all levels but the base."""
    return Tempered(target, rungs.beta[:, 1:].reshape(-1, 1), rungs.base)


def _pushed(map: Diagonal | Dense, grad: Tensor) -> Tensor:
    """The gradient with respect to x from that with respect to z."""
    if isinstance(map, Diagonal):
        return grad / map.s
    pushed: Tensor = torch.linalg.solve_triangular(map.L, grad, upper=False, left=False)
    return pushed
