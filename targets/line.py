"""Laws on an interval by quadrature: normalization, expectations, tails and exact draws of a density known up to a constant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

CELLS = 2**16
NODES, WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(16))  # on (-1, 1)


@dataclass(frozen=True)
class Law:
    """The law on (low, high) whose log-density is `log_density` up to a constant; what lies outside must not matter."""

    log_density: Function
    low: float
    high: float

    @cached_property
    def log_z(self) -> float:
        """log of the integral of exp log_density."""
        u, weights = gauss_legendre(self.low, self.high)
        return float(torch.logsumexp(self.log_density(u) + weights.log(), 0))

    def expect(self, f: Function, low: float | None = None) -> float:
        """E f(u), or E f(u) 1(u > low), by Gauss and Legendre on 400 panels."""
        u, weights = gauss_legendre(self.low if low is None else low, self.high)
        return float(((self.log_density(u) - self.log_z).exp() * weights * f(u)).sum())

    def above(self, c: float) -> float:
        """P(u > c)."""
        return self.expect(torch.ones_like, low=c)

    @cached_property
    def edges_and_cdf(self) -> tuple[Tensor, Tensor]:
        """Edges of CELLS equal cells and the probability below each, (CELLS + 1,) both."""
        edges = torch.linspace(self.low, self.high, CELLS + 1, dtype=torch.float64)
        cdf = torch.cat([edges.new_zeros(1), (self.log_density((edges[1:] + edges[:-1]) / 2) - self.log_z).exp().cumsum(0)])
        return edges, cdf / cdf[-1]

    def quantile(self, q: Tensor) -> Tensor:
        """The q-quantile for each 0 < q < 1, linear inside a cell: draws for uniform q, their CDF right to (cell width)^2."""
        edges, cdf = (v.to(q) for v in self.edges_and_cdf)
        i = torch.searchsorted(cdf, q, right=True).clamp(1, CELLS) - 1
        share = (q - cdf[i]) / (cdf[i + 1] - cdf[i])
        return edges[i] + share * (edges[i + 1] - edges[i])


def gauss_legendre(low: float, high: float, panels: int = 400) -> tuple[Tensor, Tensor]:
    """Nodes and weights (16 panels,) of the composite rule on (low, high)."""
    edges = torch.linspace(low, high, panels + 1, dtype=torch.float64)
    half = (edges[1:] - edges[:-1])[:, None] / 2
    return (edges[:-1, None] + half * (1 + NODES)).flatten(), (half * WEIGHTS).flatten()


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform float64 numbers in the open interval (0, 1)."""
    u = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    return u.clamp(2.0**-54, 1 - 2.0**-53)
