"""Training a denoiser on draws: Adam in rounds of cosine-annealed steps, averaged, each ended by a look at draws held out.

A step takes a batch of draws (picked by their weights, where they have any), a noise level for each, log s uniform and stratified over
(low, high), and goes down the objective plus a tenth of the likelihood of the spread (objectives.py), whose gradient leaves D alone. A
tenth of the particles (or chains) is held out. Training ends

    where the loss held out fell by no more than twice its own (paired) error bar in a round, or
    where `enough`, asked after each round, says so (the sampler asks whether its weights are good), or
    after the last round, at the budget's end, or at an interrupt,

and the parameters come back that were best held out. The network works in float32, in scaled units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from boltzsample.backend import Stepper
from boltzsample.flags import Flag, flag
from boltzsample.flows.optimizer import Optimizer
from boltzsample.networks import Denoiser
from boltzsample.progress import Progress
from boltzsample.samplers.sampler import Run
from boltzsample.scores.objectives import SHAPE, Batch, Mixed, Objective, spread_loss
from boltzsample.streams import Rng

DTYPE = torch.float32
HELD = 10  # one group in so many is held out
MOST_HELD = 2000
COMPILE_FROM = 30_000  # planned steps from which compiling is paid back (docs/diffusion.md)
FUSED: dict[str, bool] = {"epilogue_fusion": True}


@dataclass(frozen=True)
class ScoreTraining:
    """How a denoiser is trained. objective; steps: of the first round, three times as many in each later one; batch: draws a step; lr: of
    Adam; width, depth, waves: of the network; share: of the run's budget, as it stands when training ends.

    Raises ValueError.
    """

    objective: Objective = field(default_factory=Mixed)
    steps: int = 500
    rounds: int = 3
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
        return int(self.steps * 3**r)

    @property
    def planned(self) -> int:
        return sum(self.of_round(r) for r in range(self.rounds))


@dataclass(frozen=True, eq=False)
class Pool:
    """Draws z (n, dim) in scaled units, gradients of log pi there (n, dim) or None, log-weights (n,) or None; group (n,): the number of the
    particle or chain that each was a place of; `low`, `high`: the noise."""

    z: Tensor
    grad: Tensor | None
    log_w: Tensor | None
    group: Tensor
    low: float
    high: float

    def split(self, rng: Rng) -> tuple[Pool, Pool]:
        """(for training, held out): whole groups, at random, for draws of one are alike."""
        groups, member = self.group.unique(return_inverse=True)
        held = rng.uniform(len(groups)).argsort()[member] < max(len(groups) // HELD, 1)
        some = held.nonzero()[:, 0]
        some = some[rng.uniform(len(some)).argsort()[:MOST_HELD]]
        return self[(~held).nonzero()[:, 0]], self[some]

    def __getitem__(self, which: Tensor) -> Pool:
        grad, log_w = (None if t is None else t[which] for t in (self.grad, self.log_w))
        return Pool(self.z[which], grad, log_w, self.group[which], self.low, self.high)

    def batch(self, n: int, rng: Rng) -> Batch:
        """n draws by their weights, each with a noise level: one in each n-th of the range of log s."""
        z, u = self.z, rng.uniform(n)
        j = (u * len(z)).long() if self.log_w is None else torch.searchsorted(torch.softmax(self.log_w, 0).cumsum(0).to(u), u)
        return self._noised(j.clamp(max=len(z) - 1), rng)

    def whole(self, rng: Rng) -> Batch:
        """Every draw once (of weighted ones as many, by their weights)."""
        if self.log_w is not None:
            return self.batch(len(self.z), rng)
        return self._noised(torch.arange(len(self.z), device=self.z.device), rng)

    def _noised(self, j: Tensor, rng: Rng) -> Batch:
        z, n = self.z[j].to(DTYPE), len(j)
        u = (torch.arange(n, device=z.device) + rng.uniform(n)) / n
        s = (math.log(self.low) + math.log(self.high / self.low) * u).exp()
        grad = None if self.grad is None else self.grad[j].to(DTYPE)
        sign = torch.where(rng.uniform(*z.shape) < 0.5, -1.0, 1.0)
        return Batch(z, grad, s, rng.normal(*z.shape), sign)


class Look(NamedTuple):
    """After a round: steps so far, the mean loss held out, and whatever `enough` measured."""

    steps: int
    loss: float
    found: dict[str, float]


@dataclass(frozen=True, eq=False)
class Taught:
    """A trained denoiser. history (steps,): the loss of each batch; looks: one before the first round and one after each."""

    net: Denoiser
    history: Tensor
    looks: tuple[Look, ...]
    notes: tuple[Flag, ...] = ()


Enough = Callable[[Denoiser, int], tuple[bool, dict[str, float]]]  # (net, round) -> does it do? and what was measured


def teach(pool: Pool, held: Pool, settings: ScoreTraining, run: Run, enough: Enough | None = None) -> Taught:
    """Train a denoiser on a pool. Asks the density nothing itself."""
    lesson = _Lesson(pool, held, settings, run)
    if lesson.look(enough):
        return lesson.done()
    for r in range(settings.rounds):
        lesson.round(r)
        if lesson.look(enough) or lesson.stopped or not lesson.improved():
            break
    return lesson.done()


@dataclass(eq=False)
class _Lesson:
    """One training as it goes."""

    pool: Pool
    held: Pool
    settings: ScoreTraining
    run: Run
    steps: int = 0
    stopped: str | None = None
    history: list[Tensor] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
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
                with torch.enable_grad():
                    rows, loss = self.step(self.pool.batch(s.batch, rng))
                self.optimizer.step(loss, 0.5 * (1 + math.cos(math.pi * i / steps)))
                self._record(rows, bar)
        self.optimizer.restart()

    def look(self, enough: Enough | None) -> bool:
        """Judge the averaged parameters; whether they do."""
        rows = self.loss(self.same)[0].detach().double()
        does, found = (False, {}) if enough is None else enough(self.net, len(self.looks))
        self.losses.append(rows)
        self.looks.append(Look(self.steps, float(rows.mean()), found))
        self.kept.append({name: t.clone() for name, t in self.net.state_dict().items()})
        return does

    def improved(self) -> bool:
        """Whether the last round brought more than its own error bar could hide."""
        gain = self.losses[-2] - self.losses[-1]
        return bool(gain.mean() > 2 * gain.std() / math.sqrt(len(gain)))

    def done(self) -> Taught:
        best = min(range(len(self.looks)), key=lambda r: self.looks[r].loss if math.isfinite(self.looks[r].loss) else math.inf)
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
