"""The phi^4 chain: a double well at each site, neighbours coupled, both ends tied to zero.

    log p(phi) = -beta U,   U = (c/2) sum_{i=0..N} (phi_{i+1} - phi_i)^2 + (1/c) sum_{i=1..N} [(1 - phi_i^2)^2/4 + b phi_i],

c = a N, phi_0 = phi_{N+1} = 0, a = 0.1, beta = 20. The field b > 0 favours the negative well: P(phi_mid > 0) = 4.1e-4 at
b = 0.025, N = 100, so that unweighted draws hardly see it, and the truth comes from the transfer matrix
(`targets/transfer_matrix.py`). Gabrie, Rotskoff & Vanden-Eijnden (2022), PNAS 119(10), e2109420119; SLIPS, arXiv:2402.10758.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from targets.problem import Problem


@dataclass(frozen=True)
class Phi4:
    """`dim` sites, inverse temperature beta, field b, coupling c = a dim."""

    dim: int = 100
    b: float = 0.0
    a: float = 0.1
    beta: float = 20.0

    @property
    def c(self) -> float:
        return self.a * self.dim

    def log_prob(self, x: Tensor) -> Tensor:
        steps = torch.diff(pad(x, (1, 1)), dim=-1)  # (*batch, dim + 1)
        wells = (1 - x.square()).square() / 4 + self.b * x
        return -self.beta * (self.c / 2 * steps.square().sum(-1) + wells.sum(-1) / self.c)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        around = pad(x, (1, 1))
        curvature = 2 * x - around[..., :-2] - around[..., 2:]
        return -self.beta * (self.c * curvature + ((x.square() - 1) * x + self.b) / self.c)


def phi4(d: int = 100, b: float = 0.0) -> Problem:
    """The chain of d sites in the field b."""
    name = f"phi4-b{b:g}" if d == 100 else f"phi4-d{d}-b{b:g}"
    return Problem(name, Phi4(d, b), f"phi^4 chain of {d} sites in the field {b:g}: two wells, nearly straight between them")
