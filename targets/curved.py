"""Mixtures of bent Gaussians, normalized (log Z = 0): no affine map and no Gaussian fit makes a mode of them easy.

Component k is a Gaussian, bent around its centre by a map that keeps volumes,

    u = x - m_k,   v = (u_1, u_2 - b_k (u_1^2 - s_k1^2), u_3, ...),   p_k(x) = prod_i N(v_i; 0, s_ki^2),

so that its mean stays m_k and Var x_2 = s_k2^2 + 2 b_k^2 s_k1^4. Twins of problems in `targets/modes.py`, weights, means and
scales the same:

    gmm40-curved       b_k = 0.6 with alternating signs: crescents that bend by 1.1 times their thickness
    two-modes-curved   d = 32, b = 4 and -4: 1.3 times
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from targets.modes import gmm40_fab, two_modes
from targets.problem import Problem

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class CurvedMixture:
    """sum_k weights_k p_k, p_k the Gaussian N(means_k, diag(scales_k^2)) bent by bends_k."""

    weights: Tensor  # (k,)
    means: Tensor  # (k, dim)
    scales: Tensor  # (k, dim)
    bends: Tensor  # (k,)

    @property
    def dim(self) -> int:
        return self.means.shape[-1]

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.logsumexp(self._log_terms(self._straightened(x)), -1)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_grad(x)[1]

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self._straightened(x)
        s, b = self.scales.to(x), self.bends.to(x)
        log_terms = self._log_terms(z)
        share = torch.softmax(log_terms, -1)[..., None]  # (*batch, k, 1)
        through_bend = 2 * b * (z[..., 0] * s[:, 0]) * z[..., 1] / s[:, 1]  # u_1 reaches v_2 as well
        pull = z / s - torch.cat([through_bend[..., None], torch.zeros_like(z[..., 1:])], -1)
        return torch.logsumexp(log_terms, -1), -(share * pull).sum(-2)

    def _straightened(self, x: Tensor) -> Tensor:
        """v/s (*batch, k, dim)."""
        u, s = x[..., None, :] - self.means.to(x), self.scales.to(x)
        v_2 = u[..., 1] - self.bends.to(x) * (u[..., 0].square() - s[:, 0].square())
        return torch.cat([u[..., :1], v_2[..., None], u[..., 2:]], -1) / s

    def _log_terms(self, z: Tensor) -> Tensor:
        log_norm = self.scales.to(z).log().sum(-1) + 0.5 * self.dim * LOG_2PI  # (k,)
        return self.weights.to(z).log() - log_norm - 0.5 * z.square().sum(-1)


def curved_draws(target: CurvedMixture, n: int, generator: torch.Generator) -> Tensor:
    """n exact draws (n, dim): a component for each, a Gaussian draw, bent."""
    g = generator
    k = torch.multinomial(target.weights.to(g.device), n, replacement=True, generator=g)  # (n,)
    z = torch.randn(n, target.dim, generator=g, device=g.device, dtype=torch.float64)
    m, s, b = (constants.to(z)[k] for constants in (target.means, target.scales, target.bends))
    u = s * z
    u_2 = u[:, 1] + b * (u[:, 0].square() - s[:, 0].square())
    return m + torch.cat([u[:, :1], u_2[:, None], u[:, 2:]], -1)


def gmm40_curved() -> Problem:
    """Forty crescents with the means and widths of gmm40-fab."""
    bends = 0.6 * (1 - 2 * (torch.arange(40, dtype=torch.float64) % 2))
    return _twin("gmm40-curved", gmm40_fab(), bends, "forty equal crescents, strewn over the square of side 80")


def two_modes_curved(d: int = 32) -> Problem:
    """Two crescents with the weights, means and widths of two-modes-dD."""
    name = "two-modes-curved" if d == 32 else f"two-modes-curved-d{d}"
    about = f"two crescents of weights 0.667 and 0.333 in {d} dimensions"
    return _twin(name, two_modes(d), torch.tensor([4.0, -4.0], dtype=torch.float64), about)


def _twin(name: str, straight: Problem, bends: Tensor, about: str) -> Problem:
    of = straight.target
    assert hasattr(of, "weights") and hasattr(of, "means") and hasattr(of, "scales")
    target = CurvedMixture(of.weights, of.means, of.scales, bends)
    return Problem(name, target, about, partial(curved_draws, target))
