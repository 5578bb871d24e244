"""The warm-up of chains: step size all the time, the preconditioner at the end of each window, the number of leapfrogs once.

Everything here happens in `fit`; what it leaves behind is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from boltzsample.flags import Severity, flag
from boltzsample.kernels import HMC
from boltzsample.kernels.adapt import DualAveraging, Moments, efficiency, with_step
from boltzsample.kernels.chains import Chains
from boltzsample.kernels.transitions import Path
from boltzsample.progress import Progress
from boltzsample.samplers.sampler import Run

PILOT_SHARE = 0.2  # of the budget
WARMUP_SHARE = 0.6  # pilot included
DENSE_UP_TO = 128  # dimensions
PILOT_L = 8  # leapfrogs while the pilot warms up
MOST_LEAPFROGS = 64
MOVES = 10  # transitions to judge a number of leapfrogs by
WINDOWS = [(0.15, True), (0.2, True), (0.35, True), (0.3, False)]  # shares of the warm-up; does a new preconditioner follow?


def until_stopped(chains: Chains, n: int, name: str, run: Run, share: float = 1.0, stride: int = 1) -> Iterator[Path]:
    """n transitions, or as many as this share of the budget and the user allow; one stride is always made."""
    goal = chains.rows + n * chains.state.log_p.numel()
    for path in chains.strides(n, name, stride):
        yield path
        if chains.rows < goal and why_stop(chains, run, share, stride):
            chains.check()
            return


def why_stop(chains: Chains, run: Run, share: float = 1.0, stride: int = 1) -> str | None:
    """The flag code that forbids one more stride, or None."""
    one_more = chains.stride(stride) * sum(chains.kernel.price) * chains.state.log_p.numel() * (2 if chains.glides else 1)
    return run.must_stop(spent(chains) + one_more, share)


def spent(chains: Chains) -> int:
    """Evaluations these chains have cost that are not in the ledger yet."""
    return (chains.rows + chains.again) * sum(chains.kernel.price) + chains.inits


def account(run: Run, phase: str, chains: Chains) -> None:
    """Write what these chains have cost into the ledger."""
    a, b = chains.kernel.price
    run.ledger.add(phase, (a, b), chains.rows + chains.again)
    run.ledger.add(phase, (1, 0) if b == 0 else (0, 1), chains.inits)


def warm_up(chains: Chains, warmup: int, dense: bool | None, run: Run, bar: Progress, share: float = WARMUP_SHARE) -> None:
    """Adapt the chains in place and leave them with a frozen kernel and map; nothing at all for no steps."""
    kernel: Any = chains.kernel
    if warmup == 0:
        return
    replicates = chains.state.x.shape[0]
    h = kernel.h.to(chains.state.x).expand(replicates, 1).clone()
    windows = WINDOWS if warmup >= 20 else [(1.0, False)]
    for i, (part, metric) in enumerate(windows):
        if i and why_stop(chains, run, share):
            break
        paths = until_stopped(chains, max(1, round(part * warmup)), f"window {i}", run, share)
        h, moments = _window(chains, h, paths, max(1, round(part * warmup)), _dense(dense, chains), run, bar)
        if metric and moments.n > 0:
            chains.retune(with_step(kernel, h), moments.refine(chains.map))
    chains.retune(with_step(kernel, h))
    made = chains.rows // chains.state.log_p.numel()
    if made < warmup - len(windows) and share == WARMUP_SHARE and (why := why_stop(chains, run, share)):
        severity: Severity | None = "untrusted" if made < warmup // 2 else None  # too little for any preconditioner
        run.notes.append(flag(why, severity=severity, detail=f"{made} of {warmup} warm-up steps"))


def _window(
    chains: Chains, h: Tensor, paths: Iterator[Path], steps: int, dense: bool, run: Run, bar: Progress
) -> tuple[Tensor, Moments]:
    """Tune the step size from h (replicates, 1) on for some steps; its average, and the moments of the second half in z."""
    kernel: Any = chains.kernel
    tuner = DualAveraging.start(h)
    moments = Moments.start(chains.state.x, dense and chains.state.x.shape[1] * steps > 20 * chains.state.x.shape[-1])
    chains.retune(with_step(kernel, tuner.h))
    diverged = chains.meter.divergent
    for i, path in enumerate(paths):
        accept, outside = path.accept_prob[0], None
        if isinstance(kernel, HMC):  # which tells what flew off from what left the support
            outside, diverged = (accept == 0) & (chains.meter.divergent == diverged), chains.meter.divergent
        tuner = tuner.update(accept, kernel.target_accept, harmonic=kernel.price[1] > 0, outside=outside)
        chains.retune(with_step(kernel, tuner.h))
        if i >= steps // 2:
            moments = moments.update(chains.state.x)
        bar.update(acceptance=path.accept_prob.mean, evaluations=lambda: run.ledger.total + spent(chains))
    return tuner.frozen, moments


def _dense(dense: bool | None, chains: Chains) -> bool:
    return chains.state.x.shape[-1] <= DENSE_UP_TO if dense is None else dense


def best_leapfrogs(pilot: Chains, warmup: int, dense: bool | None, run: Run, bar: Progress) -> int:
    """The number of leapfrogs L = 1, 2, 4, ... with the most effective draws for each gradient, on chains then forgotten."""
    warm_up(pilot, warmup, dense, run, bar, PILOT_SHARE)
    account(run, "pilot", pilot)
    best, best_score, L = PILOT_L, -1.0, 1
    while L <= MOST_LEAPFROGS and not run.must_stop(MOVES * L * pilot.state.log_p.numel(), PILOT_SHARE):
        score = _score(pilot, L, run)
        if score > best_score:
            best, best_score = L, score
        elif 2 * best < L:
            break
        L *= 2
    return best


def _score(pilot: Chains, L: int, run: Run) -> float:
    kernel: HMC = pilot.kernel  # type: ignore[assignment]
    trial = replace(pilot, kernel=replace(kernel, L=L), rows=0, inits=0)
    path = [pilot.state.x]
    for _ in trial.steps(MOVES, f"L {L}"):
        path.append(trial.state.x)
    account(run, "pilot", trial)
    x = torch.stack(path)
    return efficiency(x[:-1], x[1:]) / L
