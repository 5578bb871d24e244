"""Quantiles with asymmetric intervals (TRUST 2(a)).

The p-quantile q of all S draws is an order statistic; the number of draws below the true quantile is Binomial(S, p) but for correlation.
With E the effective number of draws of the indicator I = 1(x <= q), its bar from the chains as for any other f, the 95% interval is

    x_(S l / E) .. x_(S u / E),      l, u - 1 = the 2.5% and the 97.5% quantile of Binomial(E, p)

(David & Nagaraja 2003, Order Statistics, section 7.1, for E = S; E is shrunk for the uncertainty of the bar, Korn & Graubard 1998). The
Beta quantiles of Vehtari et al. (2021, section 4.4) cover .88 in 100 independent draws at p = .95 and .93 in 400; these .96. A side
with l = 0 or u > E is unbounded. Pooling first matters: the mean of per-chain quantiles has a bias of order 1/N. stderr is the
interval's length over 2 x 1.96.
"""

from __future__ import annotations

import math

import torch
from scipy import stats
from torch import Tensor

from boltzsample.draws import Draws, Estimate
from boltzsample.estimates.assembly import effective_draws, ess_flags, ess_of_x, finish, judged_ess
from boltzsample.estimates.chains import Bar, mean_bar
from boltzsample.estimates.columns import Columns, columns, located, on_cpu
from boltzsample.estimates.diagnostics import checks, value_checks
from boltzsample.estimates.intervals import korn_graubard
from boltzsample.estimates.weighted import usable, weight_flags, weighted_bar, weights
from boltzsample.flags import Flag, flag

FEW_BEYOND = 20


@on_cpu
def quantile(y: Tensor, p: float, draws: Draws, y_start: Tensor | None = None) -> Estimate:
    """The p-quantile of f, 0 < p < 1, from y (units, draws, *shape). Raises ShapeError, ValueError.

    >>> import torch
    >>> x = torch.randn(64, 50, 1, generator=torch.Generator().manual_seed(0))
    >>> quantile(x[..., 0], 0.5, Draws.from_arrays(x))
    -0.028 +- 0.041 (95%, ok)
    """
    if not 0 < p < 1:
        raise ValueError(f"p is {p}; wanted a number between 0 and 1, like 0.95")
    f = columns(usable(y, draws), draws)
    ordered, mass = _distribution(f.z, draws)
    q = _at(ordered, mass, torch.full_like(f.scale, p))
    below = columns((f.z <= q).double(), draws)
    bar, ess, n_eff, flags = _indicator_bar(below, draws)
    if draws.log_weight is None:
        start = f.standard_start(y_start)
        flags += _of_indicator(checks(below, draws, None if start is None else (start <= q).double())) + ess_flags(ess, below)

    beyond = min(p, 1 - p) * (ess if draws.log_weight is not None or f.z.shape[1] == 1 else judged_ess(ess, below))
    low, high = _order_statistics(ordered, mass, p, n_eff)
    length = high - low
    tied = length == 0
    flags += value_checks(f) + located("EXTREME_QUANTILE", beyond < FEW_BEYOND, beyond, FEW_BEYOND, worst=min)
    flags += located("CONSTANT_F", tied & f.finite & ~f.constant, f.centre + f.back(q), detail="the order statistics are tied")
    nan = torch.full_like(q, math.nan)
    value, low, high = (torch.where(f.finite, f.centre + f.back(v), nan) for v in (q, low, high))
    stderr = torch.where(tied | ~f.finite | ~length.isfinite(), nan, f.back(length) / (2 * 1.959964))
    bar = bar._replace(stderr=stderr, lower=low, upper=high, method=f"order statistics, {bar.method}")
    return finish(f, value, bar, ess, flags, draws)


def _indicator_bar(below: Columns, draws: Draws) -> tuple[Bar, Tensor, Tensor, tuple[Flag, ...]]:
    """The bar of the indicator, its ESS (k,), the number of draws an exact interval may use, and flags."""
    nan = torch.full_like(below.scale, math.nan)
    m, n, _ = below.z.shape
    if draws.log_weight is None:
        bar = mean_bar(below.z)
        ess = effective_draws(below, bar)
        n_eff = korn_graubard(ess, bar.df, m * n)
        if bool(below.constant.any()):  # p is beyond the last draw
            ess, n_eff = (torch.where(below.constant, ess_of_x(draws), v) for v in (ess, n_eff))
        return bar, ess, n_eff, bar.flags
    w = weights(draws.log_weight)
    if w is None:
        return Bar(nan, nan, nan, nan, "none"), nan, nan, (flag("BAD_WEIGHTS"),)
    mean, bar, _ = weighted_bar(below.z, w)
    ess = (w.share[..., None] * (below.z - mean).square()).sum((0, 1)) / bar.stderr.square()
    return bar, ess, korn_graubard(ess, bar.df, m * n), bar.flags + weight_flags(w, draws)


def _of_indicator(flags: tuple[Flag, ...]) -> tuple[Flag, ...]:
    """Findings about the indicator that also concern the quantile."""
    return tuple(g for g in flags if g.code not in ("CONSTANT_F", "NONFINITE_F", "HEAVY_F"))


def _distribution(z: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """The draws in order (S, k) and the probability up to and including each (S, k)."""
    ordered, order = z.flatten(0, 1).sort(0)
    w = None if draws.log_weight is None else weights(draws.log_weight)
    if draws.log_weight is not None and w is None:
        return torch.full_like(ordered, math.nan), torch.ones_like(ordered)
    if w is None:
        mass = torch.arange(1, len(ordered) + 1, dtype=torch.float64)[:, None] / len(ordered)
        return ordered, mass.expand_as(ordered)
    return ordered, w.share.flatten()[order].cumsum(0).clamp(max=1.0)


def _at(ordered: Tensor, mass: Tensor, p: Tensor) -> Tensor:
    """The smallest draw (k,) with probability p (k,) up to it; the rounding of the sums is forgiven."""
    index = torch.searchsorted(mass.T.contiguous(), p[:, None] - 1e-12)[:, 0].clamp(max=len(ordered) - 1)
    return ordered.gather(0, index[None])[0]


def _order_statistics(ordered: Tensor, mass: Tensor, p: float, ess: Tensor) -> tuple[Tensor, Tensor]:
    """The ends (k,) of the interval, infinite where the draws do not bound that side."""
    e = ess.nan_to_num(nan=1.0).floor().clamp(min=1.0)
    low, up = (torch.as_tensor(stats.binom.ppf(t, e.numpy(), p)) for t in (0.025, 0.975))
    first, last = _at(ordered, mass, low / e), _at(ordered, mass, (up + 1) / e)
    return torch.where(low == 0, -math.inf, first), torch.where(up == e, math.inf, last)
