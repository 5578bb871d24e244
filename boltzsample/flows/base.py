"""Bases of flows: the standard normal, and the defensive mixture

    base(z) = (1 - a) N(z; 0, I) + a wide(z),        a = .1,

whose wide part goes through the same flow: log q(x) = log base(z) - log|det J_T(z)| needs no inverse, and wherever q is too thin
in the tails by less than the wide part is wide, weights are bounded again. Draw i comes from the wide part iff i mod 10 = 9, so
every batch of tens has the same split; all draws are weighted by the density of the mixture (the balance heuristic: Veach &
Guibas 1995, SIGGRAPH, section 3; defensive mixtures: Hesterberg 1995, Technometrics 37(2)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from boltzsample.densities import StudentT
from boltzsample.maps import Diagonal
from boltzsample.streams import Rng

LOG_2PI = math.log(2 * math.pi)


class Base(Protocol):
    """A normalized density on R^dim with an exact sampler."""

    @property
    def dim(self) -> int: ...

    def sample(self, rng: Rng, n: int) -> Tensor: ...

    def log_prob(self, z: Tensor) -> Tensor: ...

    def grad_log_prob(self, z: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Normal:
    """N(0, s^2 I) on R^dim; s is `scale`.

    >>> Normal(2).log_prob(torch.zeros(1, 2))
    tensor([-1.8379])
    """

    dim: int
    scale: float = 1.0

    def sample(self, rng: Rng, n: int) -> Tensor:
        """n draws (n, dim) in the rng's dtype and on its device."""
        z = rng.normal(n, self.dim)
        return z if self.scale == 1.0 else self.scale * z

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * (z / self.scale).square().sum(-1) - self.dim * (0.5 * LOG_2PI + math.log(self.scale))

    def grad_log_prob(self, z: Tensor) -> Tensor:
        return -z / self.scale**2


@dataclass(frozen=True)
class DefensiveBase:
    """(1 - share) N(0, I) + share * wide, wide = t_df of scale `scale`, or with df=None N(0, scale^2 I).

    share: 1/k for an integer k >= 2; every k-th draw is a wide one. scale: None means 1 for the Student-t and 1.2 for the normal. The
    defaults are the cheapest of those whose error bars held on heavy tails (docs/flows.md).

    Raises ValueError for a share that is no 1/k.

    >>> from boltzsample.streams import Stream
    >>> base = DefensiveBase(2, scale=50.0, df=None)
    >>> (base.sample(Stream(0).rng(), 30).norm(dim=-1) > 6).nonzero().flatten()
    tensor([ 9, 19, 29])
    """

    dim: int
    share: float = 0.1
    scale: float | None = None
    df: int | None = 5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5 or abs(1 / self.share - self.period) > 1e-9:
            raise ValueError(f"share is {self.share!r}; wanted 1/k for an integer k >= 2, such as 0.1: every k-th draw is a wide one")

    @property
    def period(self) -> int:
        """Every period-th draw is wide."""
        return round(1 / self.share)

    def wide(self, like: Tensor | None = None) -> Normal | StudentT:
        """The wide part, in the dtype and on the device of `like`."""
        if self.df is None:
            return Normal(self.dim, 1.2 if self.scale is None else self.scale)
        s = 1.0 if self.scale is None else self.scale
        one = torch.ones(self.dim) if like is None else like.new_ones(self.dim)
        return StudentT(Diagonal(0 * one, s * one), df=self.df)

    def is_wide(self, n: int) -> Tensor:
        """(n,) bool: which of the draws 0 .. n-1 come from the wide part."""
        return torch.arange(n) % self.period == self.period - 1

    def sample(self, rng: Rng, n: int) -> Tensor:
        """n draws (n, dim) in the rng's dtype and on its device."""
        z = rng.normal(n, self.dim)
        last = slice(self.period - 1, None, self.period)
        if self.df is None:
            z[last] *= self.wide().scale  # type: ignore[union-attr]
        else:
            z[last] = self.wide(z).sample(rng, len(z[last]))
        return z

    def log_prob(self, z: Tensor) -> Tensor:
        narrow, wide = self._parts(z)
        return torch.logaddexp(narrow, wide)

    def grad_log_prob(self, z: Tensor) -> Tensor:
        narrow, wide = self._parts(z)
        share = torch.sigmoid(wide - narrow)[..., None]
        return (1 - share) * -z + share * self.wide(z).grad_log_prob(z)

    def _parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithms of both terms of the mixture."""
        return math.log1p(-self.share) + Normal(self.dim).log_prob(z), math.log(self.share) + self.wide(z).log_prob(z)


def narrow(base: Base) -> Base:
    """What a flow is trained on: N(0, I) for a defensive base, the base itself otherwise."""
    return Normal(base.dim) if isinstance(base, DefensiveBase) else base


BASES: dict[str, Any] = {"Normal": Normal, "DefensiveBase": DefensiveBase}  # what a saved flow may name
