"""Intervals at 95%: Student t, Hall's transformation for skewed f, Clopper-Pearson for probabilities.

Hall (1992, J. R. Stat. Soc. B 54, 221): with g the skewness of n values and a = g / sqrt(n), T = (mean - mu) / se has the law of t up to
O(1/n) after h(T) = T + a (T^2/3 + 1/6) + a^2 T^3 / 27 = ((1 + a T/3)^3 - 1) / a + a/6. h is monotone, so

    mu in mean - se h^-1(+-t),      h^-1(x) = (3/a) ((1 + a (x - a/6))^(1/3) - 1).

Clopper & Pearson (1934, Biometrika 26, 404) for x hits in n; Korn & Graubard (1998, Surv. Methodol. 24, 193) for correlated draws:
n becomes the effective sample size times (t_{.975, n-1} / t_{.975, df})^2.
"""

from __future__ import annotations

import math

import torch
from scipy import special, stats
from torch import Tensor


def t_quantile(p: float, df: Tensor) -> Tensor:
    return torch.as_tensor(special.stdtrit(df.numpy(), p), dtype=torch.float64)


def f_quantile(p: float, df1: float, df2: Tensor) -> Tensor:
    return torch.as_tensor(stats.f.ppf(p, df1, df2.numpy()), dtype=torch.float64)


def t_interval(stderr: Tensor, df: Tensor) -> tuple[Tensor, Tensor]:
    """(lower, upper) minus the mean."""
    half = t_quantile(0.975, df) * stderr
    return -half, half


def hall_interval(y: Tensor, stderr: Tensor) -> tuple[Tensor, Tensor]:
    """(lower, upper) minus the mean, for n independent values y (n, k)."""
    n = y.shape[0]
    c = y - y.mean(0)
    skewness = c.pow(3).mean(0) / c.square().mean(0).pow(1.5)
    a = torch.nan_to_num(skewness / math.sqrt(n))
    t = float(special.stdtrit(n - 1, 0.975))
    return -stderr * _inverse_hall(t, a), -stderr * _inverse_hall(-t, a)


def _inverse_hall(x: float, a: Tensor) -> Tensor:
    safe = torch.where(a.abs() < 1e-6, torch.ones_like(a), a)
    u = 1 + safe * (x - safe / 6)
    return torch.where(a.abs() < 1e-6, torch.full_like(a, x), 3 / safe * (u.sign() * u.abs().pow(1 / 3) - 1))


def clopper_pearson(p: Tensor, n: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """(lower, upper) for a probability with p n hits in n draws, n real."""
    hits, tail = (p * n).numpy(), (1 - level) / 2
    misses = n.numpy() - hits
    lower = stats.beta.ppf(tail, hits, misses + 1)
    upper = stats.beta.ppf(1 - tail, hits + 1, misses)
    ends = torch.as_tensor(lower, dtype=torch.float64), torch.as_tensor(upper, dtype=torch.float64)
    return torch.nan_to_num(ends[0], nan=0.0), torch.nan_to_num(ends[1], nan=1.0)


def korn_graubard(ess: Tensor, df: Tensor, n: int) -> Tensor:
    """The effective number of independent draws that an exact interval may use when ess has `df` degrees of freedom."""
    shrink = (t_quantile(0.975, torch.full_like(df, n - 1)) / t_quantile(0.975, df)).square()
    return (ess * shrink).clamp(max=float(n))
