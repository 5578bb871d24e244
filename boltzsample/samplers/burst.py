"""A burst: a short run of MALA (a random walk without a gradient) in which every point adapts a step of its own.

It takes a point off the cliffs of a badly scaled density, where the common step of a batch would collapse, but not out of its
region. Its draws are never reported: a step that adapts has no invariant law.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from boltzsample.kernels import MALA, Noise, RandomWalk
from boltzsample.streams import Rng
from boltzsample.target import Target

STEPS = 60


class Burst(NamedTuple):
    """What was visited: x (STEPS, k, dim) and log_p (STEPS, k)."""

    x: Tensor
    log_p: Tensor


def price(points: int, gradient: bool) -> tuple[int, int]:
    """(log_prob rows, log_prob_and_grad rows) of a burst."""
    rows = (STEPS + 1) * points
    return (0, rows) if gradient else (rows, 0)


def draw(rng: Rng, points: int, dim: int) -> Noise:
    """The noise of a burst, (STEPS, points, ...)."""
    return RandomWalk().draw(rng, (STEPS, points), dim)


def burst(target: Target, x: Tensor, reach: Tensor, noise: Noise, gradient: bool) -> Burst:
    """A burst from x (k, dim) with first steps of length about `reach` (k)."""
    log_h = 2 * reach.log() if gradient else reach.log()
    state: Any = None
    seen = []
    for i in range(STEPS):
        kernel: Any = MALA(log_h.exp()) if gradient else RandomWalk(log_h.exp())
        state = kernel.init(target, x) if state is None else state
        state, info = kernel.step(target, state, Noise(*(part[i] for part in noise)))
        log_h = log_h + 8.0 / (i + 8) * (info.accept_prob - kernel.target_accept)
        seen.append(state)
    return Burst(torch.stack([s.x for s in seen]), torch.stack([s.log_p for s in seen]))


def travelling(log_p: Tensor, window: float) -> Tensor:
    """Which points (k) have not arrived: log_p (steps, k) rises over the second half (mean rise 3 of its errors above zero), or
    lies more than `window` below the median of those that do not rise.

    A chain in equilibrium does not rise, and one that leaves an optimum falls. The median, not the best: at the optimum of a
    funnel log_p is a hundred nats above its typical values.
    """
    rise = log_p[len(log_p) // 2 :].diff(dim=0).nan_to_num(nan=torch.inf)
    up = rise.mean(0) > 3 * rise.std(0) / len(rise) ** 0.5
    calm = log_p[-1] if bool(up.all()) else log_p[-1][~up]
    low: Tensor = log_p[-1] < calm.median() - window
    return low if bool(up.all()) else up | low
