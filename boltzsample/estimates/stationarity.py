"""Tests that short chains have forgotten where they began (TRUST 2(a)): each one function, each with p < 1e-3 after Holm over the columns.

NESTED_RHAT: K groups of chains with a common start. If the chains have forgotten it, their means y_kc are exchangeable and

    F = MS_between / MS_within ~ F(K - 1, M - K)        (one-way analysis of variance of the chain means),

which replaces a fixed threshold on the nested R-hat = sqrt(1 + B/V) of Margossian et al. (2024, Bayesian Anal., arXiv 2110.13017).
DRIFT: D_m = mean of the second half - mean of the first half of chain m; t = mean(D) / (sd(D) / sqrt(M)), M - 1 degrees.
START_MEMORY: Spearman's r between f(start) and the mean of the chain; t = r sqrt((M - 2) / (1 - r^2)), M - 2 degrees.
"""

from __future__ import annotations

import math

import torch
from scipy import special, stats
from torch import Tensor

from boltzsample.estimates.columns import holm, located
from boltzsample.flags import Flag

LEVEL = 1e-3
MIN_UNITS = 8  # fewer chains have too little power to say "no drift"


def nested_rhat_test(z: Tensor, group: Tensor | None) -> tuple[Flag, ...]:
    """NESTED_RHAT for z (units, draws, k) with `group` (units,); nothing where no group has two chains."""
    if group is None:
        return ()
    _, f, (df1, df2) = nested_rhat(z, group)
    if df1 < 1 or df2 < 1:
        return ()
    p = torch.as_tensor(stats.f.sf(f.numpy(), df1, df2))
    critical = float(stats.f.isf(LEVEL, df1, df2))
    return located("NESTED_RHAT", holm(p, LEVEL), f, critical, detail=f"F test over {df1 + 1} groups of chains")


def nested_rhat(z: Tensor, group: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """nested R-hat (k,), the F statistic (k,) and its degrees of freedom; NaN where no group has two chains."""
    label, size = group.cpu().unique(return_inverse=True, return_counts=True)[1:]
    m, groups = len(label), len(size)
    y = z.mean(1)  # (units, k)
    y = y - y.mean(0)
    mean = y.new_zeros(groups, y.shape[1]).index_add(0, label, y) / size[:, None]
    between = (size[:, None] * mean.square()).sum(0)
    within = (y - mean[label]).square().sum(0)
    df = (groups - 1, m - groups)
    if min(df) < 1:
        return torch.full_like(within, math.nan), torch.full_like(within, math.nan), df
    inside = z.var(1).mean(0) if z.shape[1] > 1 else torch.zeros_like(within)
    rhat = (1 + mean.var(0) / (within / df[1] + inside)).sqrt()
    return rhat, (between / df[0]) / (within / df[1]), df


def drift_test(z: Tensor) -> tuple[Flag, ...]:
    """DRIFT for z (units, draws, k); nothing for fewer than 8 chains or 2 draws."""
    m, n, _ = z.shape
    if m < MIN_UNITS or n < 2:
        return ()
    d = z[:, -(n // 2) :].mean(1) - z[:, : n // 2].mean(1)  # (units, k)
    t = d.mean(0).abs() / (d.std(0) / math.sqrt(m))
    critical = float(special.stdtrit(m - 1, 1 - LEVEL / 2))
    return located("DRIFT", holm(_two_sided(t, m - 1), LEVEL), t, critical, detail="t of the difference between the halves")


def start_memory_test(z: Tensor, z_start: Tensor | None) -> tuple[Flag, ...]:
    """START_MEMORY for z (units, draws, k) and f at the starts (units, k); columns with a non-finite or constant start are skipped."""
    m = z.shape[0]
    if z_start is None or m < MIN_UNITS:
        return ()
    known = z_start.isfinite().all(0)
    r = spearman(torch.where(known, z_start, torch.zeros_like(z_start)), z.mean(1))
    t = r.abs() * ((m - 2) / (1 - r.square()).clamp(min=1e-300)).sqrt()
    critical = float(special.stdtrit(m - 2, 1 - LEVEL / 2))
    least = critical / math.sqrt(m - 2 + critical**2)
    return located("START_MEMORY", holm(_two_sided(t, m - 2), LEVEL), r.abs(), least, detail="rank correlation")


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of the columns of a and b (m, k), ties at their mean rank; NaN where a column is constant."""
    ra, rb = (torch.as_tensor(stats.rankdata(v.numpy(), axis=0)) for v in (a, b))
    ra, rb = ra - ra.mean(0), rb - rb.mean(0)
    return (ra * rb).sum(0) / (ra.square().sum(0) * rb.square().sum(0)).sqrt()


def _two_sided(t: Tensor, df: int) -> Tensor:
    return torch.as_tensor(2 * special.stdtr(df, -t.numpy()))
