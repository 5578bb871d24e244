"""Training a flow on a target: Adam in rounds of cosine-annealed steps, each ended by a look at fresh draws.

A round is `steps` gradient steps with the learning rate on half a cosine from lr to 0; the later ones have three times as many. A path
gradient loses its variance on the way, so 256 draws a step are enough; the plain one keeps it, and many short steps average it best.
After each round the ELBO E_q log w of the averaged parameters and its standard error come from draws of their own. Training stops when

    log Z-hat - ELBO + 2 se <= enough                          what is left of KL(q || p) does not matter any more, or
    ELBO_r - ELBO_(r-1) <= 2 sqrt(se_r^2 + se_(r-1)^2)         the round brought nothing that its own error bar could see,

or at the last round, the budget's end, or an interrupt. The network is trained in float32 and the density asked in the run's
dtype: in float64 steps take 1.4-1.8 times as long for the same result (docs/flows.md). The flow that comes back is in the run's
dtype, and the best of those looked at; the one that went in is left as it was.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from boltzsample.backend import Stepper
from boltzsample.draws import Draws
from boltzsample.flags import Flag, flag
from boltzsample.flows.base import narrow
from boltzsample.flows.flow import Flow
from boltzsample.flows.look import Look, look
from boltzsample.flows.objectives import InDtype, Objective, Step, forward_kl, has_path_gradient, reverse_kl, reverse_kl_path, some
from boltzsample.flows.optimizer import Optimizer
from boltzsample.flows.training import Trained as Trained
from boltzsample.flows.training import Training as Training
from boltzsample.progress import Progress
from boltzsample.samplers.sampler import Run
from boltzsample.streams import Rng
from boltzsample.target import Target
from boltzsample.views import Tempered

COMPILE_FROM = 20_000  # steps of a later round from which compiling is paid back (docs/flows.md); the first round may be the last
CHEAPER = 4  # times less is saved in a step of an autoregressive layer
COMPILING = 300.0  # seconds of budget below which it is not tried
FUSED: dict[str, bool] = {"epilogue_fusion": True}  # inductor's own ways: splines 2.2 times as fast as eager, 1.9 with the house's options
FIRST_BETA = 0.05


def train(
    flow: Flow, target: Target, run: Run, settings: Training | None = None, *, data: Draws | None = None, name: str = "training"
) -> Trained:
    """A trained copy of `flow`, its evaluations entered under `name` in the run's ledger.

    data: weighted draws of the target (from chains, SMC or elsewhere): the first round then minimizes the forward KL on them, asking
    the target nothing. A defensive base takes no part in training: its wide draws are there for what training missed.

    Raises NoGradient, NoInverse (forward KL or path=True with a flow whose inverse is not cheap).
    """
    lesson = _Lesson(flow, target, run, settings or Training(), name)
    lesson.round(0, data)
    for r in range(1, lesson.settings.rounds):
        if lesson.stopped or lesson.converged() or not lesson.affords(r):
            break
        lesson.round(r, None)
    return lesson.done()


@dataclass(eq=False)
class _Lesson:
    """One training as it goes."""

    given: Flow
    target: Target
    run: Run
    settings: Training
    name: str
    looks: list[Look] = field(default_factory=list)
    rounds: list[Flow] = field(default_factory=list)
    history: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rows: tuple[int, int] = (0, 0)
    stopped: str | None = None

    def __post_init__(self) -> None:
        self.began, backend, path = time.monotonic(), self.run.backend, self.settings.path
        self.settings = s = self.settings.filled(has_path_gradient(self.given) if path is None else path)
        self.flow = self.given.to(backend.device, s.dtype).with_base(narrow(self.given.base))
        self.optimizer = Optimizer(self.flow.layers, s.lr or 0.0, s.clip, s.average)
        self.batch: int = s.batch or 0
        self.beta = torch.ones((), dtype=s.dtype, device=backend.device)
        told: Target = InDtype(self.target, backend.dtype)
        told = Tempered(told, self.beta) if s.anneal > 0 else told
        objective: Objective = reverse_kl_path if s.path else reverse_kl
        self.objective = lambda z: objective(self.flow, told, z)
        self.step = Stepper(self.objective, backend.compile is True, FUSED)

    def round(self, r: int, data: Draws | None) -> None:
        """The steps of round r, as far as the budget goes, and a look."""
        rng = self.run.stream.child(self.name, r).rng(self.settings.dtype, self.run.backend.device)
        steps = self._affordable(self.settings.of_round(r))
        if self.run.backend.compile == "auto" and r > 0 and self._pays(steps):
            self.step = Stepper(self.objective, True, FUSED)
        began, seconds = time.monotonic(), self._seconds_left()
        with self.run.progress.phase(self.name, steps) as bar:
            for i in range(steps):
                if (why := self.run.must_stop(self.batch + self.settings.look, self.settings.share)) is not None:
                    self.stopped = why
                    break
                gone: float = max(i / steps, (time.monotonic() - began) / seconds)
                self._flatten(gone if r == 0 else 1.0)
                made = self._made(rng, data)
                self.optimizer.step(made.loss, 0.5 * (1 + math.cos(math.pi * min(gone, 1.0))))
                self._record(made, bar)
        self._look(r)

    def _pays(self, steps: int) -> bool:
        """Whether compiling is paid back in a round of so many steps."""
        hurried = self.run.budget.seconds is not None and self.run.budget.seconds < COMPILING
        return steps >= COMPILE_FROM * (1 if self.settings.path else CHEAPER) and not hurried

    def affords(self, r: int) -> bool:
        """Whether the budget of evaluations has room for a good part of round r."""
        steps = self.settings.of_round(r)
        return bool(4 * self._affordable(steps) >= steps)

    def converged(self) -> bool:
        """Whether the last look says enough, or no better than the one before."""
        new, s = self.looks[-1], self.settings
        if new.gap <= s.enough:
            return True
        if len(self.looks) < 2:
            return False
        old = self.looks[-2]
        return bool(new.elbo - old.elbo <= 2 * math.hypot(new.stderr, old.stderr))

    def done(self) -> Trained:
        best = max(range(len(self.looks)), key=lambda r: self.looks[r].elbo)
        kept = torch.stack(self.history).cpu().double() if self.history else torch.zeros(0, 2, dtype=torch.float64)
        history = {"elbo": kept[:, 0], "sd": kept[:, 1]}
        o, seconds = self.optimizer, tuple(self.seconds)
        return Trained(self.rounds[best], history, tuple(self.looks), self.rows, o.skipped, o.rolled_back, self._notes(), seconds)

    def _made(self, rng: Rng, data: Draws | None) -> Step:
        with torch.enable_grad():
            if data is not None:
                return forward_kl(self.flow, *some(data, self.batch, rng))
            made = self.step(self.flow.base.sample(rng, self.batch))
        self._spend((0, self.batch))
        return made

    def _flatten(self, gone: float) -> None:
        a = self.settings.anneal
        self.beta.fill_(1.0 if gone >= a else FIRST_BETA + (1 - FIRST_BETA) * gone / a)

    def _record(self, made: Step, bar: Progress) -> None:
        log_w = made.log_w.detach()
        fine = torch.where(log_w.isfinite(), log_w, log_w.nanmean())
        self.history.append(torch.stack([fine.mean(), fine.std()]))
        total, n = partial(torch.logsumexp, fine, 0), len(fine)
        bar.update(
            ELBO=fine.mean,
            ESS=lambda: (2 * total() - (2 * fine).logsumexp(0)).exp() / n,
            log_Z=lambda: total() - math.log(n),
            evaluations=lambda: self.run.ledger.total,
        )

    def _look(self, r: int) -> None:
        """Judge the averaged parameters, and let the next round begin there."""
        self.optimizer.restart()
        flow = self.flow.to(dtype=self.run.backend.dtype)
        flow.layers.requires_grad_(False)
        rng = self.run.stream.child(self.name, "look", r).rng(self.run.backend.dtype, self.run.backend.device)
        self.looks.append(look(flow, self.target, self.settings.look, rng))
        self.rounds.append(flow.with_base(self.given.base))
        self.seconds.append(time.monotonic() - self.began)
        self._spend((self.settings.look, 0))

    def _spend(self, rows: tuple[int, int]) -> None:
        self.run.ledger.add(self.name, rows)
        self.rows = self.rows[0] + rows[0], self.rows[1] + rows[1]

    def _affordable(self, steps: int) -> int:
        """Steps of `steps` that the budget of evaluations lets through, so that the cosine ends where they end."""
        limit = self.run.budget.evaluations
        if limit is None:
            return steps
        left = self.settings.share * (limit - self.run.reserve) - self.run.ledger.total - self.settings.look
        return max(0, min(steps, int(left // self.batch)))

    def _seconds_left(self) -> float:
        limit = self.run.budget.seconds
        if limit is None:
            return math.inf
        return max(1e-9, self.settings.share * limit - (time.monotonic() - self.run.began))

    def _notes(self) -> tuple[Flag, ...]:
        notes, steps = [], max(len(self.history), 1)
        if self.stopped:
            notes.append(flag(self.stopped, severity="caution", detail=f"training ended after {steps} of {self.settings.planned} steps"))
        if self.optimizer.skipped:
            share = self.optimizer.skipped / steps
            what = f"{self.optimizer.skipped} of {steps} training steps had no finite gradient and were skipped"
            notes.append(flag("NAN_EVAL", value=share, threshold=0.01, severity="caution" if share > 0.01 else "info", detail=what))
        return tuple(notes)
