"""The contract of a sampler, and the Run it is handed: everything around a target that one call of `bz.sample` fixes once."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from torch import Tensor

from boltzsample.backend import Backend
from boltzsample.draws import Draws
from boltzsample.flags import Flag, Severity, flag
from boltzsample.progress import Interrupt, Progress
from boltzsample.samplers.starts import Starts
from boltzsample.streams import Stream
from boltzsample.target import Target


@dataclass(frozen=True)
class Budget:
    """A limit on evaluations (log_prob rows plus log_prob_and_grad rows, all phases and replicates) and on seconds.

    >>> Budget(evaluations=1_000_000)
    Budget(evaluations=1000000, seconds=None)
    """

    evaluations: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("evaluations", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"budget {name} is {value!r}; wanted a positive number, or None for no limit")


class Ledger:
    """Evaluations spent, by phase: (log_prob rows, log_prob_and_grad rows). One of the two mutable things in a Run."""

    def __init__(self) -> None:
        self.phases: dict[str, tuple[int, int]] = {}
        self.seconds: dict[str, float] = {}

    def add(self, phase: str, rows: tuple[int, int], times: int = 1) -> None:
        a, b = self.phases.get(phase, (0, 0))
        self.phases[phase] = (a + times * rows[0], b + times * rows[1])

    @property
    def total(self) -> int:
        return sum(a + b for a, b in self.phases.values())


@dataclass(frozen=True)
class Run:
    """What one call of `bz.sample` fixes once and hands to its samplers. `reserve` evaluations are kept for the witness;
    `notes` collects flags that belong to no single draw; `handover` is what `fit` leaves for `sample` of the same run."""

    backend: Backend
    stream: Stream
    starts: Starts
    ledger: Ledger
    budget: Budget
    progress: Progress
    interrupt: Interrupt
    replicates: int = 1
    reserve: int = 0
    notes: list[Flag] = field(default_factory=list)
    handover: dict[str, Tensor] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def part(self, r: int) -> Run:
        """The run of replicate r where replicates come one after another: an equal part of what the budget has left."""
        b, waiting = self.budget, self.replicates - r
        evaluations, seconds = b.evaluations, b.seconds
        if evaluations is not None:
            evaluations -= max(evaluations - self.reserve - self.ledger.total, 0) * (waiting - 1) // waiting
        if seconds is not None:
            seconds -= max(seconds - (time.monotonic() - self.began), 0.0) * (waiting - 1) / waiting
        return replace(self, budget=Budget(evaluations, seconds))

    def must_stop(self, price: int = 0, share: float = 1.0) -> str | None:
        """Why the run has to stop before spending `price` more evaluations of this share of its budget: a flag code or None."""
        if self.interrupt.requested:
            return "INTERRUPTED"
        seconds, evaluations = self.budget.seconds, self.budget.evaluations
        late = seconds is not None and time.monotonic() - self.began > share * seconds
        broke = evaluations is not None and self.ledger.total + price > share * (evaluations - self.reserve)
        return "STOPPED_EARLY" if late or broke else None


@dataclass(frozen=True)
class Verdict:
    """What a witness says of one replicate: flags, and the sentence that `ok` prints. `looked`: False where it could not look at all.
    `sees`: the smallest missing share of the mass that it would have seen, where it can tell."""

    flags: tuple[Flag, ...] = ()
    sentence: str | None = None
    looked: bool = True
    sees: float | None = None


ENOUGH_POWER = 0.2  # of the mass: what a look must be able to see missing


def no_look(why: str) -> Verdict:
    """The verdict of a witness that could not look."""
    return Verdict((flag("SINGLE_WITNESS", detail=why),), looked=False)


def nan_flags(count: int, asked: int, of: str) -> tuple[Flag, ...]:
    """NAN_EVAL, by the share of points where log_prob was NaN; nothing where there was none."""
    if not count:
        return ()
    share = count / asked
    severity: Severity = "untrusted" if share > 0.01 else "caution" if share > 0.001 else "info"
    return (flag("NAN_EVAL", value=share, threshold=0.001, severity=severity, detail=f"{count} of {asked} {of}"),)


class Sampler(ABC):
    """A frozen dataclass of settings. `fit` adapts or trains a copy; `sample` draws with everything frozen. `log_z`: whether its draws
    estimate log Z."""

    log_z: ClassVar[bool] = False
    learns: ClassVar[bool] = False  # from draws, the `data` of `fit`

    def check(self, target: Target, data: Draws | None) -> None:  # noqa: B027 (most have nothing to refuse)
        """Raise what can be known to be wrong before anything is spent."""

    def fit(self, target: Target, run: Run, data: Draws | None = None) -> Self:
        """A better copy of itself; the default needs no fitting."""
        return self

    @abstractmethod
    def sample(self, target: Target, n: int, run: Run) -> Draws:
        """At least n draws a replicate; the units of replicate r are the r-th of `run.replicates` equal parts."""

    def second_look(self, target: Target, replicates: list[Draws], run: Run) -> list[Verdict]:
        """What a witness of the method's own says of each replicate, beside the optimum audit that all methods have."""
        return [Verdict()] * len(replicates)


