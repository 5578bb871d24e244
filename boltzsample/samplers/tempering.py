"""Replica exchange (parallel tempering): many independent ladders of temperatures in one batch, adapted, then frozen.

A ladder holds one point at each level pi_k ~ p_0^(1-b_k) p^(b_k), 0 = b_0 < ... < b_K = 1, from the wide source p_0, drawn anew every
round, to the target p. A round is a move of every point and a round of even-odd swaps (kernels/exchange.py). Draws are the points of
the coldest level; ladders share nothing once adapted and are the units of all error bars.

`fit` makes a first ladder by an annealing pilot, then runs all ladders and moves the levels to equal swap rates: with r_k the rejection
rate between neighbours, sum_k r_k up to b is the communication barrier L(b), and the b_k are put where L rises by equal parts; there
are about 2 L(1) + 1 levels, which gives the most round trips for the work (Syed, Bouchard-Cote, Deligiannidis & Doucet 2022, JRSS
B 84(2), sections 4 and 5). `sample` changes nothing any more. log Z is the sum of bridges between neighbours (estimates/bennett.py).

A mode reaches the coldest level from the base, or it was there from the start. Points that made this journey are counted: where there
are hardly any, the weights of far modes repeat the starts (FEW_ROUND_TRIPS).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from boltzsample.densities import StudentT
from boltzsample.draws import Draws
from boltzsample.kernels import HMC, RandomWalk
from boltzsample.kernels.adapt import moved
from boltzsample.kernels.langevin import ULA
from boltzsample.progress import Progress
from boltzsample.samplers.ladder_fit import annealed, first_rungs, warm_up
from boltzsample.samplers.ladder_trace import MIN_DRAWS, Trace, evidence, ladder_flags
from boltzsample.samplers.replicas import Replicas, Rungs
from boltzsample.samplers.sampler import Run, Sampler
from boltzsample.samplers.starts import Starts
from boltzsample.samplers.warm_up import account, spent
from boltzsample.samplers.wide_source import wide_source
from boltzsample.target import Target

MIN_ROUNDS = 250
WARMUP = 200  # rounds at least
ROUNDS_PER_LEVEL = 24  # a round trip takes two to four rounds a level, and every trip renews one level
WALK_SWEEPS = 8  # steps of a random walk between swaps
BLOCK = 16  # ladders whose starts are drawn at once, each its own: what a ladder remembers of it is then in the bars


@dataclass(frozen=True, eq=False)
class Tempering(Sampler):
    """Replica exchange.

    ladders: per replicate, independent of each other. temperatures: levels above the base; None: as many as the barrier between base
    and target asks for, 40 at most. kernel: a Metropolis kernel of the house; None: HMC (a random walk where there is no gradient).
    sweeps: moves between swaps; None: 1, or 8 of a random walk. warmup: rounds of adaptation; None: 200, or 24 for each level. thin:
    rounds per draw kept; None: so many that every ladder has time for several round trips. `fit` fills `rungs`: temperatures, step
    sizes and maps.

    >>> import boltzsample as bz
    >>> target = bz.from_log_prob(lambda x: -0.5 * ((x.abs() - 8) ** 2).sum(-1), dim=1)        # two far modes
    >>> bz.sample(target, Tempering(warmup=100), n=1_000, seed=0).log_z()                      # log(2 sqrt(2 pi)) = 1.612
    1... +- 0... (95%, ok)
    """

    log_z: ClassVar[bool] = True

    ladders: int = 32
    temperatures: int | None = None
    kernel: Any = None
    sweeps: int | None = None
    warmup: int | None = None
    thin: int | None = None
    rungs: Rungs | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, least, free in (
            ("ladders", 1, False), ("temperatures", 1, True), ("sweeps", 1, True), ("warmup", 0, True), ("thin", 1, True)
        ):  # fmt: skip
            value = getattr(self, name)
            if not (value is None and free) and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name} is {value!r}; wanted an integer >= {least}")
        if isinstance(self.kernel, ULA):
            raise ValueError(
                "kernel is ULA, which leaves no level invariant, so no swap is right; wanted a Metropolis kernel such as MALA()"
            )

    def fit(self, target: Target, run: Run, data: Draws | None = None) -> Self:
        """Temperatures, step sizes and maps, from those fitted already; the copy returned is fitted; the ladders go on in `sample`."""
        kernel = self._kernel(target, run)
        rungs = self._fitted(run) or self._first(target, run, kernel)
        sweeps, warmup, starts = self._sweeps(kernel), self._warmup(rungs), self._starts(target, run)
        run.handover["starts"] = starts
        with run.progress.phase("warm-up", warmup) as bar:
            x = annealed(target, rungs, kernel, starts, run, "warm-up")
            replicas = Replicas.start(target, rungs, kernel, x, run, "warm-up", warmup * sweeps)
            warm_up(replicas, warmup, sweeps, bar)
        account(run, "warm-up", replicas.chains)
        run.handover["positions"] = replicas.chains.x
        return replace(self, kernel=kernel, rungs=replicas.rungs)

    def sample(self, target: Target, n: int, run: Run) -> Draws:
        """At least n draws a replicate, at least 16 a ladder; units are the ladders, replicate after replicate."""
        kernel = self._kernel(target, run)
        rungs = self._fitted(run) or self._first(target, run, kernel)
        sweeps, keep = self._sweeps(kernel), max(-(-n // self.ladders), MIN_DRAWS)
        thin = self._thin(keep, rungs, kernel, run)
        starts = run.handover.get("starts")
        starts = self._starts(target, run) if starts is None else starts
        x, settle = run.handover.get("positions"), 0
        if x is None:
            x, settle = annealed(target, rungs, kernel, starts, run, "sampling"), self._warmup(rungs)
        with run.progress.phase("sampling", settle + keep * thin) as bar:
            replicas = Replicas.start(target, rungs, kernel, x, run, "sampling", (settle + keep * thin) * sweeps)
            for _ in replicas.rounds(settle, sweeps, "settle") if settle else ():
                bar.update(evaluations=lambda: run.ledger.total + spent(replicas.chains))
            replicas.forget()
            trace = Trace.empty(replicas, keep, thin)
            try:
                self._record(replicas, trace, run, bar, sweeps)
            except Exception as error:
                error.partial = self._draws(replicas, trace, starts, run)  # type: ignore[attr-defined]
                error.add_note(f"boltzsample: stopped after {trace.kept} of {keep} draws a ladder; they are in this exception's .partial")
                raise
        account(run, "sampling", replicas.chains)
        return self._draws(replicas, trace, starts, run)

    def _record(self, replicas: Replicas, trace: Trace, run: Run, bar: Progress, sweeps: int) -> None:
        for seen in replicas.rounds(len(trace.x) * trace.thin, sweeps, "draw"):
            trace.add(seen.x, seen.log_p, seen.s, seen.swap)
            bar.update(
                acceptance=seen.accept.mean,
                evaluations=lambda: run.ledger.total + spent(replicas.chains),
                round_trips=lambda: float(replicas.trips.double().mean()),
            )
        if trace.kept == 0:  # stopped before the first kept round: where the ladders stand is better than nothing
            trace.keep(seen.x, seen.log_p)

    def _kernel(self, target: Target, run: Run) -> Any:
        if self.kernel is not None:
            return moved(self.kernel, run.backend)
        h = torch.tensor(0.25, dtype=run.backend.dtype, device=run.backend.device)
        if not run.starts.has_gradient:
            return RandomWalk(h=h)
        return HMC(h=h, L=max(1, round(1.2 * target.dim**0.25)))  # about a quarter of a turn in whitened coordinates

    def _sweeps(self, kernel: Any) -> int:
        return self.sweeps or (1 if kernel.price[1] else WALK_SWEEPS)

    def _warmup(self, rungs: Rungs) -> int:
        return max(WARMUP, ROUNDS_PER_LEVEL * (rungs.levels + 1)) if self.warmup is None else self.warmup

    def _thin(self, keep: int, rungs: Rungs, kernel: Any, run: Run) -> int:
        """Rounds for each draw kept: time for round trips, as far as a budget of evaluations goes."""
        if self.thin is not None:
            return self.thin
        wanted = -(-max(MIN_ROUNDS, ROUNDS_PER_LEVEL * (rungs.levels + 1)) // keep)
        if run.budget.evaluations is None:
            return wanted
        a_round: int = run.replicates * self.ladders * (1 + rungs.levels * self._sweeps(kernel) * sum(kernel.price))
        left = run.budget.evaluations - run.reserve - run.ledger.total
        return min(max(left // (a_round * (keep + 2)), 1), wanted)

    def _first(self, target: Target, run: Run, kernel: Any) -> Rungs:
        base = run.starts.base or self._base(target, run)
        return first_rungs(target, base, kernel, self._sweeps(kernel), self.temperatures, run).of(run.replicates)

    def _base(self, target: Target, run: Run) -> StudentT:
        """The wide source, where the user's starts made it needless so far."""
        source = wide_source(target, run.backend, run.stream.child("tempering base"), gradient=run.starts.has_gradient)
        run.ledger.add("starts", source.rows)
        assert source.base is not None
        return source.base

    def _starts(self, target: Target, run: Run) -> Tensor:
        """A start for each ladder (replicates, ladders, dim)."""
        blocks = -(-self.ladders // BLOCK)
        x, rows = run.starts.chains(target, run.backend, run.stream.child("starts"), run.replicates * blocks, BLOCK)
        run.ledger.add("starts", rows)
        return x.reshape(run.replicates, blocks * BLOCK, -1)[:, : self.ladders]

    def _group(self, starts: Starts) -> Tensor:
        if starts.given is None:
            return torch.arange(self.ladders)
        return starts.groups(BLOCK).repeat(-(-self.ladders // BLOCK))[: self.ladders]

    def _fitted(self, run: Run) -> Rungs | None:
        """The rungs in the run's dtype and on its device. Raises ValueError where they are of other replicates."""
        if self.rungs is None:
            return None
        if self.rungs.replicates not in (1, run.replicates):
            raise ValueError(
                f"this sampler was fitted on {self.rungs.replicates} replicates and {run.replicates} were asked for; use "
                f"replicates={self.rungs.replicates}, or a sampler fitted on one"
            )
        rungs: Rungs = moved(self.rungs, run.backend)
        return rungs.of(run.replicates)

    def _draws(self, replicas: Replicas, trace: Trace, starts: Tensor, run: Run) -> Draws:
        x, log_p = trace.units()
        levels = replicas.rungs.levels
        moves = replicas.chains.meter.moves.reshape(run.replicates, levels, -1)[:, -1]
        draws = Draws(
            x=x,
            log_prob=log_p,
            starts=starts.flatten(0, 1),
            group=self._group(run.starts).repeat(run.replicates),
            moves=(moves + replicas.swaps).reshape(-1).cpu(),
            bad_x=torch.cat([replicas.chains.bad_points(), *replicas.bad]),
            flags=ladder_flags(replicas, trace, self._sweeps(replicas.chains.kernel)),
            acceptance=float(moves.double().mean()) / max(trace.made * self._sweeps(replicas.chains.kernel), 1),
        )
        return replace(draws, evidence=evidence(replicas, trace, self._group(run.starts)))
