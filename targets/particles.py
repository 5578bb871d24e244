"""DW4: four particles in the plane, each pair in a double well of its distance r.

    log p = -sum_{i<j} a (r_ij - r_0)^4 + b (r_ij - r_0)^2,   a = 0.9, b = -4, r_0 = 4,

each unordered pair once, as bgflow and DEM (Akhound-Sadegh et al. 2024, arXiv:2402.06121) have it; papers write half the sum
over ordered pairs. The density does not change when all particles move together, so on R^8 it has no integral. This target
lives where it has one: on the mean-free subspace, in the six coordinates of an orthonormal basis,

    particle = H x,   H (4, 3) with orthonormal columns that sum to zero (Helmert),

x holding the planar components of each column together. `readout` gives the eight coordinates of the particles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from targets.problem import Problem

PLANE = 2


@dataclass(frozen=True)
class DoubleWellParticles:
    """`basis` (particles, particles - 1): orthonormal columns that sum to zero."""

    basis: Tensor
    a: float = 0.9
    b: float = -4.0
    r_0: float = 4.0

    @property
    def dim(self) -> int:
        return PLANE * self.basis.shape[1]

    def log_prob(self, x: Tensor) -> Tensor:
        return self._log_prob_of(self._arms(x)[2])

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_grad(x)[1]

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        between, arms, r = self._arms(x)
        u = r - self.r_0
        slope = -(4 * self.a * u.square() + 2 * self.b) * u / r  # of each pair, over r
        return self._log_prob_of(r), (between.mT @ (slope[..., None] * arms)).flatten(-2)

    def readout(self, x: Tensor) -> Tensor:
        """Particle after particle, (*batch, 2 particles); their mean is zero."""
        particles: Tensor = self.basis.to(x) @ x.unflatten(-1, (-1, PLANE))
        return particles.flatten(-2)

    def _arms(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The matrix from coordinates to pairs (pairs, particles - 1), the arms (*batch, pairs, 2) and their lengths."""
        basis = self.basis.to(x)
        i, j = torch.triu_indices(len(basis), len(basis), 1, device=x.device)
        between = basis[i] - basis[j]
        arms = between @ x.unflatten(-1, (-1, PLANE))
        return between, arms, arms.square().sum(-1).clamp_min(1e-30).sqrt()

    def _log_prob_of(self, r: Tensor) -> Tensor:
        u2 = (r - self.r_0).square()
        return -((self.a * u2 + self.b) * u2).sum(-1)


def helmert(n: int) -> Tensor:
    """(n, n - 1): column k is (1, ..., 1, -k, 0, ..., 0)/sqrt(k (k + 1)), k ones."""
    k = torch.arange(1, n, dtype=torch.float64)
    i = torch.arange(n, dtype=torch.float64)[:, None]
    columns: Tensor = ((i < k).double() - k * (i == k).double()) / (k * (k + 1)).sqrt()
    return columns


def dw4() -> Problem:
    """Four particles."""
    about = "four particles in the plane in pairwise double wells, on the mean-free subspace, 6 dimensions"
    return Problem("dw4", DoubleWellParticles(helmert(4)), about)
