"""Transitions in z, metered: `advance` makes one, `travel` some of them as one graph, `glide` the same in a hurry.

A gradient that is NaN counts as zero (`target.log_prob_and_grad`), and the masks that see to it are most of a cheap leapfrog: ten
dependent instructions. `glide` leaves them out. Where a gradient was NaN, an HMC trajectory ends with p = NaN and log r = NaN,
and everything `glide` says is void: the same noise is for `travel` then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from boltzsample.kernels.kernel import Kernel, Noise
from boltzsample.target import Bare, Target
from boltzsample.views import Pullback


class Meter(NamedTuple):
    """Running counts of what the chains did, per chain."""

    moves: Tensor  # (*batch) accepted proposals
    divergent: Tensor  # (*batch) diverged trajectories
    nan: Tensor  # (*batch) proposals whose log_prob was NaN
    posinf: Tensor  # (*batch) proposals whose log_prob was +inf
    bad_x: Tensor  # (*batch, dim) in z: the last point of +inf, else the last of NaN

    @staticmethod
    def zeros(like: Tensor) -> Meter:
        """No two fields are one tensor: a graph compiled for one tensor is another one than for two."""
        moves, divergent, nan, posinf = (torch.zeros(like.shape[:-1], dtype=torch.int64, device=like.device) for _ in range(4))
        return Meter(moves, divergent, nan, posinf, torch.full_like(like, torch.nan))


def advance(kernel: Kernel, target: Target, state: Any, meter: Meter, noise: Noise) -> tuple[Any, Meter, Tensor]:
    """One transition, metered. Returns the new state, the new meter and each chain's acceptance probability."""
    state, info = kernel.step(target, state, noise)
    nan = torch.isnan(info.log_p) & info.x.isfinite().all(-1)  # an integrator that overflowed is no fault of the density
    posinf = torch.isposinf(info.log_p)
    meter = Meter(
        meter.moves + info.accepted,
        meter.divergent + info.divergent,
        meter.nan + nan,
        meter.posinf + posinf,
        torch.where((posinf | (nan & (meter.posinf == 0)))[..., None], info.x, meter.bad_x),
    )
    return state, meter, info.accept_prob


class Path(NamedTuple):
    """A few transitions: positions in x (k, *batch, dim), log_prob there and acceptance probabilities (k, *batch)."""

    x: Tensor
    log_p: Tensor
    accept_prob: Tensor


def travel(kernel: Kernel, target: Pullback, state: Any, meter: Meter, noise: Noise) -> tuple[Any, Meter, Path]:
    """As many transitions in z as the noise (k, *batch, ...) has. This is what is compiled: one graph for all k."""
    steps = []
    for t in range(noise.uniform.shape[0]):
        state, meter, accept = advance(kernel, target, state, meter, type(noise)(*(part[t] for part in noise)))
        x, log_det = target.map.push(state.x)
        steps.append(Path(x, state.log_p - log_det, accept))
    return state, meter, _stacked(steps)


def glide(kernel: Kernel, target: Pullback, state: Any, meter: Meter, noise: Noise) -> tuple[Any, tuple[Tensor, Tensor], Path, Tensor]:
    """`travel` without masks of NaN: state, moves and divergences, Path, and whether they are right.

    They are where no log r was NaN and no log_prob +inf: then no gradient was NaN, and there was nothing else to meter.
    """
    bare = Bare(Pullback(Bare(target.target), target.map))
    moves, divergent, right, steps = meter.moves, meter.divergent, [], []
    for t in range(noise.uniform.shape[0]):
        state, info = kernel.step(bare, state, type(noise)(*(part[t] for part in noise)))
        moves, divergent = moves + info.accepted, divergent + info.divergent
        right.append((~info.lost & (info.log_p < torch.inf)).all())
        x, log_det = target.map.push(state.x)
        steps.append(Path(x, state.log_p - log_det, info.accept_prob))
    return state, (moves, divergent), _stacked(steps), torch.stack(right).all()


def _stacked(steps: list[Path]) -> Path:
    return Path(*(part[0][None] if len(part) == 1 else torch.stack(part) for part in zip(*steps, strict=True)))
