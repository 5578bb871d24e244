"""Two Gaussians, normalized (log Z = 0): one correlated with unequal scales, one ill-conditioned and rotated.

Correlated, of AR(1) type, in any dimension d:

    Cov(x_i, x_j) = s_i s_j rho^|i-j|,   s log-spaced from 0.3 to 4.5,   m_i = (-1)^i (1 + 4 i/d),   i = 0..d-1.

With z_i = (x_i - m_i)/s_i it factors: u_0 = z_0 and u_i = (z_i - rho z_{i-1})/c, c = sqrt(1 - rho^2), are independent N(0, 1).

Ill-conditioned: x = m + Q y, y_i ~ N(0, v_i), v log-spaced from 1e-4 to 1e4, with the Householder reflection

    Q = I - 2 w w^T,   w proportional to (1, 2, ..., d),   |w| = 1,   m_i = i/d - 0.3.

Q mixes every coordinate with every other, so a diagonal preconditioner cannot undo the condition number 1e8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from targets.problem import Problem, Pushforward

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class CorrelatedGaussian:
    """N(mean, Cov) with Cov_ij = scale_i scale_j rho^|i-j|, |rho| < 1."""

    mean: Tensor  # (dim,)
    scale: Tensor  # (dim,)
    rho: float

    @property
    def dim(self) -> int:
        return self.mean.shape[0]

    def log_prob(self, x: Tensor) -> Tensor:
        return self._log_prob_of(self._whiten(x))

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self._grad_of(self._whiten(x))

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = self._whiten(x)
        return self._log_prob_of(u), self._grad_of(u)

    def _whiten(self, x: Tensor) -> Tensor:
        z = (x - self.mean.to(x)) / self.scale.to(x)
        c = math.sqrt(1 - self.rho**2)
        return torch.cat([z[..., :1], (z[..., 1:] - self.rho * z[..., :-1]) / c], -1)  # (*batch, dim)

    def _log_prob_of(self, u: Tensor) -> Tensor:
        log_det = self.scale.to(u).log().sum() + (self.dim - 1) * 0.5 * math.log1p(-(self.rho**2))
        return -0.5 * u.square().sum(-1) - log_det - 0.5 * self.dim * LOG_2PI

    def _grad_of(self, u: Tensor) -> Tensor:
        c = math.sqrt(1 - self.rho**2)
        own = torch.cat([u[..., :1], u[..., 1:] / c], -1)  # z_i in u_i
        following = torch.cat([self.rho * u[..., 1:] / c, torch.zeros_like(u[..., :1])], -1)  # z_i in u_{i+1}
        return (following - own) / self.scale.to(u)


@dataclass(frozen=True)
class IllConditionedGaussian:
    """N(mean, Q diag(variances) Q), Q = I - 2 w w^T the reflection along the unit vector `normal`."""

    mean: Tensor  # (dim,)
    variances: Tensor  # (dim,)
    normal: Tensor  # (dim,), w

    @property
    def dim(self) -> int:
        return self.mean.shape[0]

    def log_prob(self, x: Tensor) -> Tensor:
        y = self.reflect(x - self.mean.to(x))
        return -0.5 * (y.square() / self.variances.to(x)).sum(-1) - 0.5 * self._log_det(x)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_grad(x)[1]

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.reflect(x - self.mean.to(x))
        y_over_v = y / self.variances.to(x)
        return -0.5 * (y * y_over_v).sum(-1) - 0.5 * self._log_det(x), -self.reflect(y_over_v)

    def reflect(self, x: Tensor) -> Tensor:
        """Q x, its own inverse."""
        w = self.normal.to(x)
        return x - 2 * (x * w).sum(-1, keepdim=True) * w

    def _log_det(self, x: Tensor) -> Tensor:
        return self.variances.to(x).log().sum() + self.dim * LOG_2PI


def push_correlated(target: CorrelatedGaussian, u: Tensor) -> Tensor:
    """u ~ N(0, I), (n, dim), to exact draws: z_i = rho z_{i-1} + c u_i."""
    c = math.sqrt(1 - target.rho**2)
    z = [u[..., 0]]
    for i in range(1, target.dim):
        z.append(target.rho * z[-1] + c * u[..., i])
    return target.mean.to(u) + target.scale.to(u) * torch.stack(z, -1)


def push_ill_conditioned(target: IllConditionedGaussian, u: Tensor) -> Tensor:
    """u ~ N(0, I), (n, dim), to exact draws m + Q sqrt(v) u."""
    return target.mean.to(u) + target.reflect(target.variances.to(u).sqrt() * u)


def correlated(d: int = 10, rho: float = 0.9) -> Problem:
    """The correlated Gaussian in d dimensions."""
    i = torch.arange(d, dtype=torch.float64)
    mean = (1 + 4 * i / d) * (1 - 2 * (i % 2))
    scale = torch.logspace(math.log10(0.3), math.log10(4.5), d, dtype=torch.float64)
    target = CorrelatedGaussian(mean, scale, rho)
    about = f"Gaussian in {d} dimensions, neighbours correlated at {rho:g}, scales from 0.3 to 4.5"
    return Problem(f"gaussian-corr-d{d}", target, about, Pushforward(partial(push_correlated, target), d))


def ill_conditioned(d: int = 100) -> Problem:
    """The rotated Gaussian of condition number 1e8 in d dimensions."""
    i = torch.arange(d, dtype=torch.float64)
    normal = (i + 1) / (i + 1).square().sum().sqrt()
    target = IllConditionedGaussian(i / d - 0.3, torch.logspace(-4, 4, d, dtype=torch.float64), normal)
    about = f"Gaussian in {d} dimensions, variances from 1e-4 to 1e4, rotated"
    return Problem(f"gaussian-ill-d{d}", target, about, Pushforward(partial(push_ill_conditioned, target), d))
