"""Modes found: where climbs end, each optimum once, as Laplace's approximation of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from boltzsample.ascent import Ascent
from boltzsample.laplace import Laplace, laplace
from boltzsample.target import Target

SAME = 0.01  # (x - x*)^T H (x - x*) / dim of climbs that ended at the same optimum
NEAR = 0.05  # distance / sqrt(dim) of points that are no optimum, and need not be asked one by one
FEW = 4  # dimensions, in which climbs from random points do as well
COLD = (-2.875, 2.875, 24)  # log10 of the coordinates of cold starts, the first, the last, and how many: a quarter of a decade apart


class Optima(NamedTuple):
    """Distinct optima, the best first; each climb's optimum (n,), -1 for none; whether some were left uncounted; the rows spent."""

    hills: list[Laplace]
    reached: Tensor
    more: bool
    rows: int


def optima(target: Target, climbs: Ascent, most: int) -> Optima:
    """The distinct optima that converged climbs ended at, at most `most`. The target's coordinates are near to unit scale.

    Price: two gradients for each dimension and candidate.
    """
    left, reached = climbs.converged.clone(), torch.full((len(climbs.x),), -1, device=climbs.x.device)
    hills: list[Laplace] = []
    unit, rows, asked = torch.ones_like(climbs.x[0]), 0, 0
    while bool(left.any()) and len(hills) < most and asked < 2 * most:
        best = torch.where(left, climbs.log_p, -torch.inf).argmax()
        hill, spent = laplace(target, climbs.x[best], climbs.log_p[best], unit)
        rows, asked = rows + spent, asked + 1
        near = (climbs.x - climbs.x[best]).norm(dim=-1) < NEAR * climbs.x.shape[-1] ** 0.5
        same = left & (near | at(climbs.x, hill) if hill.proper else near)
        same[best] = True
        if hill.proper:
            known = [i for i, other in enumerate(hills) if bool(at(hill.x, other))]
            reached[same] = known[0] if known else len(hills)
            hills += [] if known else [hill]
        left &= ~same
    return Optima(hills, reached, bool(left.any()), rows)


def cold_starts(target: Target, like: Tensor) -> tuple[Tensor, int]:
    """Points (k, dim) of finite log_prob whose coordinates are all equal, of both signs, in the dtype of `like`, and the rows spent: the
    cold starts of lattice simulations. In many dimensions no random point comes near such a line. Of modes at -c 1_d and c 1_d the second,
    k < 1 times as wide, has the line from c (1 - k) / (1 + k) to c (1 + k) / (1 - k) to itself. None in up to four dimensions.
    """
    if like.shape[-1] <= FEW:
        return like[:0], 0
    c = torch.logspace(*COLD, dtype=like.dtype, device=like.device)
    x = torch.cat([-c, c])[:, None].expand(-1, like.shape[-1])
    return x[target.log_prob(x).isfinite()], len(x)


def at(x: Tensor, hill: Laplace) -> Tensor:
    """Which points (*batch, dim) are at the top of the hill."""
    return hill.radius2(x) < SAME * x.shape[-1]
