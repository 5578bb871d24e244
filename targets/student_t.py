"""Multivariate Student-t with nu degrees of freedom and unequal scales, normalized (log Z = 0).

    p(x) = Gamma((nu+d)/2) / (Gamma(nu/2) (nu pi)^(d/2) prod s_i) (1 + q/nu)^(-(nu+d)/2),   q = sum ((x_i - m_i)/s_i)^2,

with s_i log-spaced from 0.5 to 4 and m_i = (-1)^i (1 + 2 i/d). Uncorrelated but not independent: one chi-square radius
stretches all coordinates together. Moments of order nu and above do not exist. Kotz & Nadarajah (2004), chapter 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from targets.problem import Problem


@dataclass(frozen=True)
class StudentT:
    """Multivariate Student-t: location `mean`, scale matrix diag(scale^2), nu > 0."""

    mean: Tensor  # (dim,)
    scale: Tensor  # (dim,)
    nu: float

    @property
    def dim(self) -> int:
        return self.mean.shape[0]

    def log_prob(self, x: Tensor) -> Tensor:
        return self._log_prob_of(((x - self.mean.to(x)) / self.scale.to(x)).square().sum(-1))

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_grad(x)[1]

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = self.scale.to(x)
        z = (x - self.mean.to(x)) / s
        q = z.square().sum(-1)
        return self._log_prob_of(q), -((self.nu + self.dim) / (self.nu + q))[..., None] * z / s

    def _log_prob_of(self, q: Tensor) -> Tensor:
        nu, d = self.nu, self.dim
        log_norm = math.lgamma((nu + d) / 2) - math.lgamma(nu / 2) - 0.5 * d * math.log(nu * math.pi)
        return log_norm - self.scale.to(q).log().sum() - 0.5 * (nu + d) * torch.log1p(q / nu)


def student_t_draws(target: StudentT, n: int, generator: torch.Generator) -> Tensor:
    """n exact draws (n, dim): m + s z / sqrt(chi2_nu / nu).

    torch draws chi-squares only from its global generator; NumPy draws them from a seed that `generator` gives.
    """
    z = torch.randn(n, target.dim, generator=generator, device=generator.device, dtype=torch.float64)
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    chi2 = torch.from_numpy(np.random.default_rng(int(seed)).chisquare(target.nu, size=(n, 1))).to(z)
    return target.mean.to(z) + target.scale.to(z) * z * (target.nu / chi2).sqrt()


def student_t(nu: float = 5.0, d: int = 10) -> Problem:
    """The Student-t with nu degrees of freedom in d dimensions."""
    i = torch.arange(d, dtype=torch.float64)
    mean = (1 + 2 * i / d) * (1 - 2 * (i % 2))
    target = StudentT(mean, torch.logspace(math.log10(0.5), math.log10(4), d, dtype=torch.float64), nu)
    about = f"multivariate Student-t, {nu:g} degrees of freedom, {d} dimensions, scales from 0.5 to 4"
    return Problem(f"student-t{nu:g}-d{d}", target, about, partial(student_t_draws, target))
