"""Training a denoiser on draws: Adam in rounds of cosine-annealed steps, averaged, each ended by a look at draws held out.

A step takes a batch of draws (picked by their weights, where they have any), a noise level for each, log s uniform and stratified over
(low, high), and goes down the objective plus a tenth of the likelihood of the spread (objectives.py), whose gradient leaves D alone. A
tenth of the particles (or chains) is held out. Training ends

    where the loss held out fell by no more than twice its own (paired) error bar in a round, or
    where its guide, the sampler, says so after a round: it looks at the weights; or
    after the last round, at the budget's end, or at an interrupt,

and the parameters come back that were best held out. The network works in float32, in scaled units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from boltzsample.backend import Stepper
from boltzsample.flags import Flag, flag
from boltzsample.flows.optimizer import Optimizer
from boltzsample.networks import Denoiser
from boltzsample.progress import Progress
from boltzsample.samplers.sampler import Run
from boltzsample.scores.objectives import SHAPE, Batch, Mixed, Objective, spread_loss
from boltzsample.scores.pool import DTYPE, MOST_HELD, Pool
from boltzsample.streams import Rng

COMPILE_FROM = 30_000  # planned steps from which compiling is paid back (docs/diffusion.md)
FUSED: dict[str, bool] = {"epilogue_fusion": True}


@dataclass(frozen=True)
class ScoreTraining:
    """How a denoiser is trained. objective; steps: of the first round, three times as many in the second, nine times in the others; batch:
    draws a step; lr: of Adam; width, depth, waves: of the network; share: of the run's budget, as it stands when training ends.

    Raises ValueError.
    """

    objective: Objective = field(default_factory=Mixed)
    steps: int = 500
    rounds: int = 4
    batch: int = 512
    lr: float = 2e-3
    width: int = 128
    depth: int = 3
    waves: int = 5
    clip: float = 10.0
    share: float = 0.7

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("rounds", 0), ("batch", 1), ("width", 1), ("depth", 1), ("waves", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; wanted an integer >= {least}")
        if not self.lr > 0 or not 0 < self.share <= 1:
            raise ValueError(f"lr is {self.lr}, share {self.share}; wanted lr > 0 and share in (0, 1]")

    def of_round(self, r: int) -> int:
        """Steps of round r = 0, 1, ..."""
        return int(self.steps * 3 ** min(r, 2))

    @property
    def planned(self) -> int:
        return sum(self.of_round(r) for r in range(self.rounds))


class Glance(NamedTuple):
    """After a round: steps so far, the mean loss held out, and whatever `enough` measured."""

    steps: int
    loss: float
    found: dict[str, float]


@dataclass(frozen=True, eq=False)
class Taught:
    """A trained denoiser. history (steps,): the loss of each batch; looks: one before the first round and one after each."""

    net: Denoiser
    history: Tensor
    looks: tuple[Glance, ...]
    notes: tuple[Flag, ...] = ()


class Guide(Protocol):
    """What a sampler has to say to a training."""

    def enough(self, net: Denoiser, r: int) -> tuple[bool, dict[str, float]]:
        """After round r: whether this net does, and what was measured."""
        ...

    def renewed(self, net: Denoiser, r: int, found: dict[str, float]) -> tuple[Pool, Pool] | None:
        """Before round r: better draws for it, and others held out, or None to go on with those there are."""
        ...


def teach(pool: Pool, held: Pool, settings: ScoreTraining, run: Run, guide: Guide | None = None) -> Taught:
    """Train a denoiser on a pool. Asks the density nothing itself."""
    lesson = Lesson(pool, held, settings, run, guide)
    does = lesson.look()
    for r in range(settings.rounds):
        if does or lesson.stopped:
            break
        renewed = lesson.renew(r)
        if r > 0 and not renewed and not lesson.improved():
            break
        lesson.round(r)
        does = lesson.look()
    return lesson.done()


@dataclass(eq=False)
class Lesson:
    """One training as it goes."""

    pool: Pool
    held: Pool
    settings: ScoreTraining
    run: Run
    guide: Guide | None = None
    steps: int = 0
    stopped: str | None = None
    history: list[Tensor] = field(default_factory=list)
    looks: list[Glance] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    kept: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        s, device = self.settings, self.run.backend.device
        self.stream = self.run.stream.child("scores")
        self.net = Denoiser(self.pool.z.shape[-1], self.stream.child("net").rng(DTYPE, device), s.width, s.depth, s.waves)
        self.optimizer = Optimizer(self.net, s.lr, s.clip, 0.99)
        rng = self.stream.child("held").rng(DTYPE, device)
        few = self.pool.z[:MOST_HELD].to(DTYPE), None if self.pool.grad is None else self.pool.grad[:MOST_HELD].to(DTYPE)
        objective = s.objective.prepared(*few, self.pool.low, self.pool.high, rng)
        self.same = self.held.whole(rng)  # the same draws and noise at every look: losses are compared in pairs

        def loss(batch: Batch) -> tuple[Tensor, Tensor]:
            rows, seen = objective(self.net, batch)
            return rows, rows.mean() + SHAPE * spread_loss(seen, batch.x0).mean()

        self.loss = loss
        compile = self.run.backend.compile is True or (self.run.backend.compile == "auto" and s.planned >= COMPILE_FROM)
        self.step = Stepper(loss, compile, FUSED)

    def round(self, r: int) -> None:
        """The steps of round r, as far as the budget goes."""
        steps, s = self.settings.of_round(r), self.settings
        rng = self.stream.child("round", r).rng(DTYPE, self.run.backend.device)
        self.optimizer.restart()
        self.optimizer.average = 1 - 1 / max(steps / 10, 2)
        with self.run.progress.phase("scores", steps) as bar:
            for i in range(steps):
                if (why := self.run.must_stop(0, s.share)) is not None:
                    self.stopped = why
                    break
                self._record(self.step_once(rng, 0.5 * (1 + math.cos(math.pi * i / steps))), bar)
        self.optimizer.restart()

    def step_once(self, rng: Rng, share: float) -> Tensor:
        """One step with `share` of the learning rate: the loss of each row of its batch."""
        with torch.enable_grad():
            rows, loss = self.step(self.pool.batch(self.settings.batch, rng))
        self.optimizer.step(loss, share)
        return rows

    def look(self) -> bool:
        """Judge the averaged parameters; whether they do."""
        does, found = (False, {}) if self.guide is None else self.guide.enough(self.net, len(self.looks))
        self._keep()
        self.looks.append(Glance(self.steps, float(self.losses[-1].mean()), found))
        return does

    def renew(self, r: int) -> bool:
        """Take better draws for round r, where there are any; what was best on the others held out is not asked any more."""
        new = None if self.guide is None or r == 0 else self.guide.renewed(self.net, r, self.looks[-1].found)
        if new is None:
            return False
        self.pool, self.held = new
        self.same = self.held.whole(self.stream.child("held", r).rng(DTYPE, self.run.backend.device))
        self.losses, self.kept = [], []
        self._keep()
        return True

    def _keep(self) -> None:
        self.losses.append(self.loss(self.same)[0].detach().double())
        self.kept.append({name: t.clone() for name, t in self.net.state_dict().items()})

    def improved(self) -> bool:
        """Whether the last round brought more than its own error bar could hide."""
        gain = self.losses[-2] - self.losses[-1]
        return bool(gain.mean() > 2 * gain.std() / math.sqrt(len(gain)))

    def done(self) -> Taught:
        best = int(torch.stack([loss.mean() for loss in self.losses]).nan_to_num(math.inf).argmin())
        self.optimizer.finish()
        self.net.load_state_dict(self.kept[best])
        history = torch.stack(self.history).cpu().double() if self.history else torch.zeros(0, dtype=torch.float64)
        return Taught(self.net, history, tuple(self.looks), self._notes())

    def _record(self, rows: Tensor, bar: Progress) -> None:
        self.history.append(rows.detach().mean())
        self.steps += 1
        bar.update(1, loss=self.history[-1], evaluations=lambda: self.run.ledger.total)

    def _notes(self) -> tuple[Flag, ...]:
        if not self.stopped:
            return ()
        return (flag(self.stopped, severity="caution", detail=f"training ended after {self.steps} of {self.settings.planned} steps"),)
