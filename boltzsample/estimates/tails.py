"""How heavy is a tail: the shape k of a generalized Pareto law fitted to the largest values.

k >= 1/2: the variance is infinite; k >= 1: so is the mean. Fit of Zhang & Stephens (2009, Technometrics 51, 316, eqs. 7-8): with the n
exceedances x_1 <= ... <= x_n, q = x_{n/4}, and m = 30 + sqrt(n) grid points

    b_j = 1/x_n + (1 - sqrt(m / (j - 1/2))) / (3 q),      k(b) = mean_i log(1 - b x_i),      L(b) = n (log(-b / k(b)) - k(b) - 1),

b is the mean of the b_j with weights proportional to exp L(b_j), and the answer is k(b). The tail is the floor(3 sqrt(S)) largest of S
values, at most S/5 (Vehtari, Simpson, Gelman, Yao & Gabry 2024, J. Mach. Learn. Res. 25, 72).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_TAIL = 20
CALM = 4.0  # largest weight over the mean below which there is no tail to speak of
SURE = 100  # values from which a tail of k = 1/2 is fitted with k < 0 in 1 of 3,000


def khat(values: Tensor, tail: int | None = None) -> Tensor:
    """k-hat (k,) of the upper tail of each column of values (S, k), of `tail` values; NaN where S < 100 or where ties leave no tail to fit.

    >>> x = torch.distributions.Pareto(1.0, 2.0).icdf(torch.linspace(0.0005, 0.9995, 1000).double())
    >>> 0.4 < khat(x[:, None]).item() < 0.6
    True
    """
    tail = tail_length(values.shape[0]) if tail is None else tail
    if tail < MIN_TAIL:
        return values.new_full(values.shape[1:], math.nan)
    top = values.topk(tail + 1, dim=0).values  # descending
    excess = (top[:-1] - top[-1]).flip(0)
    block = max(1, 2**22 // (tail * (30 + math.isqrt(tail))))
    return torch.cat([_pareto_shape(part) for part in excess.split(block, dim=1)])


def is_calm(w: Tensor) -> bool:
    """Whether no weight (S,) is larger than 4 times their mean. k-hat of such weights is the shape of their bulk: it was 1.1 for a
    proposal of ESS 93% whose density is nowhere below half of the target's. Of p = N(0, 1) and q = N(0, s^2) with true k = 1 - s^2 = .36
    the largest of 1000 weights is 5 times the mean."""
    return bool(w.max() <= CALM * w.mean())


def ends(values: Tensor) -> Tensor:
    """Whether the values (S, k) end: (k,) bool. A lump of large but bounded values over a thin rest looks like a heavy tail to one fit
    over both; a fit to the upper quarter of that tail alone sees the end, k < 0. Never where that quarter has fewer than 100 values."""
    quarter = tail_length(values.shape[0]) // 4
    if quarter < SURE:
        return torch.zeros(values.shape[1:], dtype=torch.bool)
    return khat(values, quarter) < 0


def tail_length(s: int) -> int:
    """floor(3 sqrt(S)), at most S/5."""
    return min(math.floor(3 * math.sqrt(s)), s // 5)


def _pareto_shape(x: Tensor) -> Tensor:
    n = x.shape[0]
    m = 30 + math.isqrt(n)
    j = torch.arange(1, m + 1, dtype=x.dtype)[:, None]
    quartile = x[int(n / 4 + 0.5) - 1]
    b = 1 / x[-1] + (1 - (m / (j - 0.5)).sqrt()) / (3 * quartile)  # (m, k)
    k = torch.log1p(-b[:, None] * x).mean(1)
    log_l = n * (torch.log(-b / k) - k - 1)
    b_mean = (b * torch.softmax(log_l, 0)).sum(0)
    return torch.log1p(-b_mean * x).mean(0)
