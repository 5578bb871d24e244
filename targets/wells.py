"""Products of quartic wells and Gaussians, unnormalized, log Z by one-dimensional quadrature.

    log p(x) = -sum_i (a_i x_i^4 + b_i x_i^2 + c_i x_i) - const

Lineages:

    many-well-dD      pairs (well, Gaussian): x_1^4 - 6 x_1^2 - x_1/2 + x_2^2/2, D/2 of them, so 2^(D/2) modes of unequal weight,
                      log Z = 10.2934797 a pair. Midgley et al. (2023), FAB, arXiv:2208.01893; also GFN, AFT, Beyond ELBOs
    multi-well-...    m wells (x^2 - delta)^2, then Gaussians x^2/2; d = 5, m = 5, delta = 4 and d = 50, m = 5, delta = 2.
                      Berner, Richter & Ullrich (2024), arXiv:2211.01364 (SDE); also UDB, SCLD
    double-well       x_1^4 - 4 x_1^2 + x_2^2/2, of bgflow. Noe et al. (2019), Science 365, eaaw1147, up to the tilt

MultCDiff writes x^2 for the Gaussians of multi-well: `multi_well(..., precision=2)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from targets.line import Law, uniform
from targets.problem import Problem


@dataclass(frozen=True)
class QuarticProduct:
    """Independent coordinates with energies a x^4 + b x^2 + c x, a >= 0, and b > 0 where a = 0."""

    a: Tensor  # (dim,)
    b: Tensor  # (dim,)
    c: Tensor  # (dim,)
    constant: float = 0.0

    @property
    def dim(self) -> int:
        return self.a.shape[0]

    def log_prob(self, x: Tensor) -> Tensor:
        a, b, c = self.a.to(x), self.b.to(x), self.c.to(x)
        x2 = x.square()
        return -((a * x2 + b) * x2 + c * x).sum(-1) - self.constant

    def grad_log_prob(self, x: Tensor) -> Tensor:
        a, b, c = self.a.to(x), self.b.to(x), self.c.to(x)
        return -(4 * a * x.square() + 2 * b) * x - c

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_prob(x), self.grad_log_prob(x)

    def laws(self) -> dict[tuple[float, float, float], Law]:
        """The one-dimensional laws that occur, by their (a, b, c)."""
        return {abc: _law(*abc) for abc in self.columns()}

    def columns(self) -> list[tuple[float, float, float]]:
        """(a, b, c) of each coordinate."""
        return list(zip(self.a.tolist(), self.b.tolist(), self.c.tolist(), strict=True))


def _law(a: float, b: float, c: float, depth: float = 100.0) -> Law:
    """The law of one coordinate, cut where its energy has risen to about `depth`."""
    reach = math.sqrt((abs(b) + math.sqrt(b * b + 4 * a * depth)) / (2 * a) if a > 0 else depth / b)
    return Law(lambda x: -(a * x**4 + b * x**2 + c * x), -reach, reach)


def quartic_draws(target: QuarticProduct, n: int, generator: torch.Generator) -> Tensor:
    """n exact draws (n, dim), each coordinate by its inverse CDF."""
    u, laws = uniform((n, target.dim), generator), target.laws()
    return torch.stack([laws[abc].quantile(u[:, i].contiguous()) for i, abc in enumerate(target.columns())], -1)


def many_well(d: int = 32) -> Problem:
    """d/2 pairs of a tilted double well and a Gaussian."""
    target = _product([(1.0, -6.0, -0.5), (0.0, 0.5, 0.0)] * (d // 2))
    about = f"many-well in {d} dimensions, 2^{d // 2} modes"
    return Problem(f"many-well-d{d}", target, about, partial(quartic_draws, target))


def multi_well(d: int = 5, m: int = 5, delta: float = 4.0, precision: float = 1.0) -> Problem:
    """m wells (x^2 - delta)^2 and d - m Gaussians precision x^2/2."""
    target = _product([(1.0, -2 * delta, 0.0)] * m + [(0.0, precision / 2, 0.0)] * (d - m), m * delta**2)
    about = f"{m} symmetric double wells in {d} dimensions, {2**m} equal modes"
    return Problem(f"multi-well-d{d}-m{m}-delta{delta:g}", target, about, partial(quartic_draws, target))


def double_well() -> Problem:
    """bgflow's double well in the plane, untilted."""
    target = _product([(1.0, -4.0, 0.0), (0.0, 0.5, 0.0)])
    return Problem("double-well", target, "symmetric double well in the plane", partial(quartic_draws, target))


def _product(columns: list[tuple[float, float, float]], constant: float = 0.0) -> QuarticProduct:
    a, b, c = torch.tensor(columns, dtype=torch.float64).unbind(-1)
    return QuarticProduct(a.clone(), b.clone(), c.clone(), constant)
