"""What the unweighted samplers share around their walks: what a budget allows, pilots, blocks of walks, the flags of what came out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from boltzsample.draws import Draws
from boltzsample.errors import PositiveInfinityError
from boltzsample.flags import Flag, flag
from boltzsample.kernels.adapt import moved
from boltzsample.maps import Dense, Diagonal
from boltzsample.samplers.posterior import Inner, Units
from boltzsample.samplers.sampler import Run, nan_flags
from boltzsample.samplers.unweighted import BEGIN, TRIALS, Plan, Step, Walked, Walkers, planned, verdicts, walked
from boltzsample.schedules import Levels
from boltzsample.streams import Rng
from boltzsample.target import Target

BLOCK = 256  # walks of one batch
PILOT = 64  # walks of the pilot
GUESS = 1000  # draws, to share out a budget by
SHARE = 0.7  # of what the budget has left, for so many draws


class Start(Protocol):
    """Where n walks and their chains begin: y (n, dim), x (n, chains, dim), in the units of the walk."""

    def __call__(self, levels: Levels, n: int, chains: int, rng: Rng) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Fitted:
    """A walk made ready: its units, its chains, its plan and its start."""

    units: Diagonal | Dense
    inner: Inner
    plan: Plan
    start: Start


def affordable_walk(tried: list[tuple[int, Inner, int]], dim: int, corrector: int, run: Run) -> tuple[int, Inner, int]:
    """The first of these (steps, chains, Langevin steps of the start) that the budget has room for, or the last."""
    ready = [(K, inner.ready(dim), start) for K, inner, start in tried]
    if run.budget.evaluations is None:
        return ready[0]
    left = SHARE * (run.budget.evaluations - run.reserve - run.ledger.total)
    return next((r for r in ready if _guess(*r, corrector) * GUESS <= left), ready[-1])


def _guess(K: int, inner: Inner, start: int, corrector: int) -> int:
    """The price of such a walk, importance starts left out."""
    return Plan(Levels(torch.linspace(1, 2, K + 1), torch.ones(K + 1)), torch.ones(0), torch.zeros(0), start, corrector).price(inner)


class Walk(NamedTuple):
    """How walks go: where they start, the step from level to level, Langevin steps of the start and corrections at each level, and whether
    the chains of the first level are drawn by importance."""

    start: Start
    step: Step
    steps: int
    corrector: int
    importance: bool


def plan_walks(target: Target, units: Diagonal | Dense, levels: Levels, inner: Inner, walk: Walk, run: Run) -> Fitted:
    """Pilot walks, entered under "pilot"."""
    rng = run.stream.child("pilot").rng(torch.float64, run.backend.device)
    here = moved(levels, replace(run.backend, dtype=torch.float64))
    view = Units(target, units, run.backend.dtype)
    n, importance = PILOT, walk.importance
    if run.budget.evaluations is not None:
        one = inner.price(walk.steps + len(levels.alpha) * (1 + TRIALS + walk.corrector), BEGIN + TRIALS * len(levels.alpha))
        n = max(8, min(n, (run.budget.evaluations - run.reserve - run.ledger.total) // (10 * one)))
        importance &= _guess(levels.steps, inner, walk.steps, walk.corrector) * 2 * GUESS <= run.budget.evaluations
    walkers = Walkers(view, here, inner, *walk.start(here, n, inner.chains, rng), rng)
    with run.progress.phase("pilot walks", 1) as bar:
        plan = planned(walkers, walk.steps, walk.corrector, walk.step, importance)
        account(run, "pilot", walkers)
        bar.update(1, evaluations=run.ledger.total)
    return Fitted(units, inner, plan, walk.start)


def account(run: Run, phase: str, walkers: Walkers, ends: int = 0) -> None:
    """Enter what the chains of these walks have asked for, and the densities of their ends."""
    run.ledger.add(phase, walkers.inner.moves.price, walkers.spent.transitions)
    run.ledger.add(phase, (0, 1), walkers.spent.inits)
    run.ledger.add(phase, (1, 0), walkers.proposals + ends)


def sample_walks(target: Target, fitted: tuple[Fitted, ...], step: Step, n: int, run: Run, flags: tuple[Flag, ...] = ()) -> Draws:
    """n walks a replicate, or as many as the budget leaves, each a unit. Raises ValueError, PositiveInfinityError."""
    if len(fitted) not in (1, run.replicates) or not fitted:
        raise ValueError(f"this sampler has {len(fitted)} walks made ready for {run.replicates} replicates; leave fit=True")
    said, parts = list(flags), []
    found: list[Walked] = []
    all_walkers: list[Walkers] = []
    with run.progress.phase("sampling", run.replicates) as bar:
        for r in range(run.replicates):
            own = fitted[r % len(fitted)]
            price = own.plan.price(own.inner)
            each = _within_budget(n, price, run, said)
            x, log_p, ends, walkers = _blocks(target, own, step, each, r, run, said)
            parts.append((x, log_p))
            found, all_walkers = found + ends, all_walkers + walkers
            bar.update(1, evaluations=run.ledger.total)
    said += verdicts(found, [w.spent for w in all_walkers], price)
    said += nan_flags(sum(w.spent.nan for w in all_walkers), sum(w.spent.transitions for w in all_walkers), "proposals")
    least = min(len(x) for x, _ in parts)
    x, log_p = (torch.cat([t[:least] for t in part]) for part in zip(*parts, strict=True))
    return Draws(x[:, None], log_p[:, None], flags=tuple(dict.fromkeys(said)), scope="given these walks")


def _within_budget(n: int, price: int, run: Run, said: list[Flag]) -> int:
    limit = run.budget.evaluations
    if limit is None:
        return n
    left = max((limit - run.reserve - run.ledger.total) // (run.replicates * price), 10)
    if left < n:
        said.append(flag("STOPPED_EARLY", detail=f"{left} of {n} draws"))
    return min(n, left)


def _blocks(
    target: Target, own: Fitted, step: Step, n: int, r: int, run: Run, said: list[Flag]
) -> tuple[Tensor, Tensor, list[Walked], list[Walkers]]:
    to = replace(run.backend, dtype=torch.float64)
    plan, inner, start = moved(own.plan, to), moved(own.inner, to), moved(own.start, to)
    view = Units(target, moved(own.units, to), run.backend.dtype)
    xs: list[Tensor] = []
    logs: list[Tensor] = []
    found: list[Walked] = []
    walkers: list[Walkers] = []
    for b, first in enumerate(range(0, n, BLOCK)):
        size = min(BLOCK, n - first)
        if xs and (why := run.must_stop(size * plan.price(inner))) is not None:
            said.append(flag(why, detail=f"{first} of {n} draws"))
            break
        rng = run.stream.child("walks", r, b).rng(torch.float64, run.backend.device)
        y, chains = start(plan.levels, size, inner.chains, rng)
        block = Walkers(view, plan.levels, inner, y, chains, rng)
        ends = walked(block, plan, step)
        x = view.x(ends.x)
        log_p = target.log_prob(x)
        account(run, "sampling", block, size)
        if bool((log_p == torch.inf).any()):
            raise PositiveInfinityError.at(x[log_p == torch.inf][0])
        xs, logs, found, walkers = [*xs, x], [*logs, log_p], [*found, ends], [*walkers, block]
    return torch.cat(xs), torch.cat(logs), found, walkers
