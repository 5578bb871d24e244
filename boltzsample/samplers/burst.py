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
    """What was visited: x (steps, k, dim) and log_p (steps, k)."""

    x: Tensor
    log_p: Tensor


def price(points: int, gradient: bool, steps: int = STEPS) -> tuple[int, int]:
    """(log_prob rows, log_prob_and_grad rows) of a burst."""
    rows = (steps + 1) * points
    return (0, rows) if gradient else (rows, 0)


def draw(rng: Rng, points: int, dim: int, steps: int = STEPS) -> Noise:
    """The noise of a burst, (steps, points, ...)."""
    return RandomWalk().draw(rng, (steps, points), dim)


def burst(target: Target, x: Tensor, reach: Tensor, noise: Noise, gradient: bool) -> Burst:
    """A burst from x (k, dim) with first steps of length about `reach` (k)."""
    log_h = 2 * reach.log() if gradient else reach.log()
    state: Any = None
    seen = []
    for i in range(len(noise.uniform)):
        kernel: Any = MALA(log_h.exp()) if gradient else RandomWalk(log_h.exp())
        state = kernel.init(target, x) if state is None else state
        state, info = kernel.step(target, state, Noise(*(part[i] for part in noise)))
        log_h = log_h + 15.0 / (i + 15) * (info.accept_prob - kernel.target_accept)
        seen.append(state)
    return Burst(torch.stack([s.x for s in seen]), torch.stack([s.log_p for s in seen]))


def arrived(seen: Burst) -> Tensor:
    """Which points (k) were in equilibrium over the second half of a burst: they moved, and log_p did not rise on average.

    A chain in equilibrium does not rise, and one that leaves an optimum falls.
    """
    half = len(seen.x) // 2
    moved = (seen.x[half:].diff(dim=0) != 0).any(-1).double().mean(0) > 0.2
    rise = seen.log_p[half:].diff(dim=0).nan_to_num(nan=torch.inf)
    up: Tensor = rise.mean(0) > 3 * rise.std(0) / len(rise) ** 0.5
    return moved & ~up


def log_mass(seen: Burst) -> Tensor:
    """log of the mass (k), up to a constant, of the region each point wandered through in the second half of a burst: mean log_p
    plus the log of the volume.

    Density alone would judge wrongly: the neck of a funnel and a narrow spike are high but small, a broad region is low but large.
    """
    half = len(seen.x) // 2
    spread = seen.x[half:].std(0).clamp(min=torch.finfo(seen.x.dtype).tiny)
    return seen.log_p[half:].mean(0) + spread.log().sum(-1)
