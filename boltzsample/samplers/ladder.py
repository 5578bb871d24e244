"""Ladders of inverse temperatures from a base p_0 to a target p, and how they are made.

Level k is pi_k = p_0^(1-b_k) p^(b_k), 0 = b_0 < b_1 < ... < b_K = 1. From equally weighted particles of pi_(k-1), the next b is the one
at which the weights v = (p / p_0)^(b - b_(k-1)) have the conditional ESS (sum v)^2 / (n sum v^2) asked for, by bisection
(Zhou, Johansen & Aston 2016, J. Comput. Graph. Stat. 25(3), section 3.3). Moves at pi_k are made in whitened coordinates z, x = m + L z,

    L L^T = E[g g^T]^-1,        g = grad log pi_k:

the covariance of a Gaussian, and for a mixture that of its modes, not the distance between them, which would wreck a metric made of the
particles' covariance (RECIPES.md, advice 2). Without a gradient there is only the latter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from boltzsample.maps import Dense, Diagonal

DENSE_UP_TO = 128  # dimensions
BISECTIONS = 50
LEAST = 1e-12  # a step up: it only parts what has a density from what has none
OUTLYING = 10.0  # scores longer than this many medians are cut to it: one spike must not shrink all steps


class Rung(NamedTuple):
    """A level of all replicates: inverse temperature and step size (replicates, 1), and the map that whitens it."""

    beta: Tensor
    h: Tensor
    map: Diagonal | Dense


@dataclass(frozen=True, eq=False)
class Ladder:
    """Frozen rungs, the first axis of all tensors. beta, h: (levels, replicates, 1); a replicate that arrived repeats beta = 1."""

    beta: Tensor
    h: Tensor
    map: Diagonal | Dense

    @staticmethod
    def of(rungs: Sequence[Rung]) -> Ladder:
        beta, h, maps = zip(*rungs, strict=True)
        return Ladder(torch.stack(beta), torch.stack(h), over(torch.stack, _of_one_kind(maps)))

    @staticmethod
    def join(ladders: Sequence[Ladder]) -> Ladder:
        """The ladders of several groups of replicates as one; the shorter ones repeat their last rung."""
        if len(ladders) == 1:
            return ladders[0]
        levels = max(len(ladder.beta) for ladder in ladders)
        each = [ladder.at(torch.arange(levels).clamp(max=len(ladder.beta) - 1)) for ladder in ladders]

        def cat(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat(list(parts), 1)

        maps = _of_one_kind([e.map for e in each])
        return Ladder(cat([e.beta for e in each]), cat([e.h for e in each]), over(cat, maps))

    @property
    def replicates(self) -> int:
        return self.beta.shape[1]

    def at(self, levels: Tensor) -> Ladder:
        return Ladder(self.beta[levels], self.h[levels], over(lambda part: part[0][levels], [self.map]))

    def of_replicates(self, which: slice) -> Ladder:
        """The ladder of some replicates; of a single one, for as many as are asked for."""
        if self.replicates == 1:
            return self
        return Ladder(self.beta[:, which], self.h[:, which], over(lambda part: part[0][:, which], [self.map]))

    def rungs(self) -> Iterator[Rung]:
        for k in range(len(self.beta)):
            yield Rung(self.beta[k], self.h[k], over(lambda part, k=k: part[0][k], [self.map]))


def _of_one_kind(maps: Sequence[Diagonal | Dense]) -> Sequence[Diagonal | Dense]:
    """The maps, diagonal ones as dense where others are."""
    if all(isinstance(map, Diagonal) for map in maps):
        return maps
    return [Dense(map.m, torch.diag_embed(map.s[..., 0, :])) if isinstance(map, Diagonal) else map for map in maps]


def over(do: Any, maps: Sequence[Diagonal | Dense]) -> Diagonal | Dense:
    """The map whose tensors are `do` of those of the maps, which are of one kind."""
    m = do([map.m for map in maps])
    if isinstance(maps[0], Diagonal):
        return Diagonal(m, do([map.s for map in maps]))  # type: ignore[union-attr]
    return Dense(m, do([map.L for map in maps]))  # type: ignore[union-attr]


def next_beta(ratio: Tensor, beta: Tensor, cess: float) -> Tensor:
    """The next inverse temperatures (replicates, 1) from log p - log p_0 (replicates, n) at beta; 1 where that is near enough.

    Also 1 where no particle has any density: there is nothing to climb.
    """

    def near(to: Tensor) -> Tensor:
        v = torch.where(to > beta, (to - beta) * ratio, 0.0)
        found = (2 * v.logsumexp(-1, keepdim=True) - (2 * v).logsumexp(-1, keepdim=True)).exp() / ratio.shape[-1]
        return ~(found < cess)

    low, high = beta, torch.ones_like(beta)
    top = near(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        good = near(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(top, 1.0, torch.maximum(low, beta + LEAST).clamp(max=1.0))


def whitening(x: Tensor, score: Tensor | None) -> Diagonal | Dense | None:
    """The map of a level from particles x (replicates, n, dim) and their scores, or without; None where these do not allow one."""
    x, n, dim = x.double(), x.shape[1], x.shape[-1]
    m = x.mean(1, keepdim=True)
    vectors = x - m if score is None else _cut(score.double())
    if dim > DENSE_UP_TO or n < 10 * dim:
        variance = vectors.square().mean(1, keepdim=True)
        s = variance.sqrt() if score is None else variance.rsqrt()
        return Diagonal(m, s) if _sound(s) and bool(m.isfinite().all()) else None
    second = vectors.mT @ vectors / n
    second = second + dim / n * torch.diag_embed(second.diagonal(dim1=-2, dim2=-1))
    L, failed = torch.linalg.cholesky_ex(second)
    if bool((failed != 0).any()) or not bool(m.isfinite().all()):
        return None
    if score is not None:
        L, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L))
    return None if bool((failed != 0).any()) or not bool(L.isfinite().all()) else Dense(m, L)


def _cut(score: Tensor) -> Tensor:
    scale = score.abs().median(1, keepdim=True).values
    length = (score / torch.where(scale > 0, scale, 1.0)).norm(dim=-1, keepdim=True)
    cut: Tensor = score * (OUTLYING * length.median(1, keepdim=True).values / length.clamp(min=1e-300)).clamp(max=1.0)
    return cut


def _sound(scale: Tensor) -> bool:
    return bool((scale.isfinite() & (scale > 0)).all())
