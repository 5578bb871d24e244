"""SLIPS without weights, as published but for its start time, which nobody tells: the scale comes from the source of starts, the first
noise level from two certificates (window.py), the steps of the chains from a pilot, and the end is a draw of the last posterior.

Grenioux, Noble, Gabrie & Durmus (2024), arXiv:2402.10758, algorithm 1; start by Langevin steps on y, section 4.3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from boltzsample.flags import Flag, flag
from boltzsample.kernels.adapt import moved
from boltzsample.samplers.posterior import Inner, Units
from boltzsample.samplers.sampler import Run
from boltzsample.samplers.unweighted import localization
from boltzsample.samplers.walks import Fitted, Walk, account, affordable_walk, plan_walks
from boltzsample.samplers.window import Window, window
from boltzsample.schedules import Levels, Schedule
from boltzsample.streams import Rng
from boltzsample.target import Target

STEPS = 64
DATA = 0.1  # sigma / alpha at the last level, in the spread of the starts
LANGEVIN = 10  # steps of the start
CHEAPER = ((32, 4, 1), (16, 2, 2), (8, 2, 1), (4, 2, 1))  # steps, chains, transitions where the budget is small
WINDOW_SHARE = 0.2  # of a budget


@dataclass(frozen=True, eq=False)
class Wide:
    """A start that knows nothing but a scale: y from N(0, (alpha^2 + sigma^2) I), its chains at y / alpha, all of them at one place: of far
    modes, chains of one y in different ones would lead it to none."""

    dim: int

    def __call__(self, levels: Levels, n: int, chains: int, rng: Rng) -> tuple[Tensor, Tensor]:
        spread = (levels.alpha[0].square() + levels.sigma[0].square()).sqrt()
        y = spread * rng.normal(n, self.dim)
        return y, (y / levels.alpha[0])[:, None].expand(-1, chains, -1).clone()


def localized(target: Target, schedule: Schedule, steps: int | None, inner: Inner, corrector: int, run: Run) -> tuple[Fitted, Window]:
    """The walk of one replicate made ready, and its window. Entered under "window" and "pilot"."""
    units = moved(run.starts.first_map(run.backend, target.dim), replace(run.backend, dtype=torch.float64))
    points = run.starts.given if run.starts.reached is None else run.starts.reached
    assert points is not None
    view, rng = Units(target, units, run.backend.dtype), run.stream.child("window").rng(torch.float64, run.backend.device)
    with run.progress.phase("window", 1) as bar:
        seen, walkers = window(view, units.pull(points.double()), inner.ready(target.dim), rng)
        for each in walkers:
            account(run, "window", each)
        bar.update(1, evaluations=run.ledger.total)
    tried = [(steps or STEPS, inner, LANGEVIN), *((k, replace(inner, chains=c, transitions=t), 4) for k, c, t in CHEAPER)]
    K, inner, start = affordable_walk(tried, target.dim, corrector, run)
    levels = Levels.even(schedule, seen.start, min(DATA, seen.start / 4), K)
    return plan_walks(target, units, levels, inner, Walk(Wide(target.dim), localization, start, corrector, importance=False), run), seen


def window_flags(windows: tuple[Window, ...]) -> tuple[Flag, ...]:
    """WINDOW_EMPTY, with the evidence."""
    empty = [w for w in windows if not w.inside]
    if not empty:
        return ()
    rows = zip(*empty[0], strict=True)
    said = ", ".join(f"{s:g}: {p:.2f} and {m:.2f}" for s, p, m in rows)
    return (flag("WINDOW_EMPTY", detail=f"between starts over all, posterior and marginal, at noise {said}"),)
