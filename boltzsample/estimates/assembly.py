"""From bars to an Estimate: exact intervals for probabilities, refusals, the word on few draws, and the last assembly."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from boltzsample.draws import Draws, Estimate
from boltzsample.estimates.chains import SHORT, Bar, inner_autocorrelation_time, mean_bar
from boltzsample.estimates.columns import Columns, columns, located, unlocated
from boltzsample.estimates.intervals import clopper_pearson, korn_graubard
from boltzsample.flags import Flag

FEW_HITS = 20
QUIET = 256  # chains from which the between-chain ESS is known to 10%


def effective_draws(f: Columns, bar: Bar) -> Tensor:
    """Variance of f over squared stderr (k,): z has variance 1 by construction."""
    ess = bar.stderr.pow(-2)
    return torch.where(f.constant | ~f.finite, torch.full_like(ess, math.nan), ess)


def judged_ess(ess: Tensor, f: Columns) -> Tensor:
    """The ESS (k,) that decides on flags. With few chains the between-chain ESS is large just where the bar came out too small, and "ok"
    would pick the bars that miss: there the autocorrelation inside the chains decides, whose noise is another, or twice the first ESS
    should the chains disagree."""
    m, n, _ = f.z.shape
    if n < SHORT or m >= QUIET:
        return ess
    inside = m * n / inner_autocorrelation_time(f.z).clamp(min=0.1)
    return torch.where(ess.isnan(), ess, torch.minimum(inside, 2 * ess) if m >= 4 else ess)


def ess_flags(ess: Tensor, f: Columns) -> tuple[Flag, ...]:
    """ESS_LOW: under 400 caution, under 100 untrusted. Independent draws need no more than 100 for the t interval, then caution."""
    m, n, _ = f.z.shape
    if n == 1:
        return located("ESS_LOW", ~ess.isnan() & (m < 100), torch.full_like(ess, m), 100)
    ess = judged_ess(ess, f)
    flags = located("ESS_LOW", ess < 100, ess, 100, severity="untrusted", worst=min)
    return flags + located("ESS_LOW", (ess >= 100) & (ess < 400), ess, 400, worst=min)


def finish(f: Columns, value: Tensor, bar: Bar, ess: Tensor, flags: Iterable[Flag], draws: Draws) -> Estimate:
    """The Estimate in f's shape, with the flags and witnesses of the draws. bar.lower and bar.upper are the interval's ends."""
    known = {g.code for g in draws.flags}
    own = unlocated(tuple(g for g in flags if g.code not in known or g.index is not None), f.shape)
    ends = f.shaped(torch.stack([bar.lower, bar.upper]))
    value, stderr, df, ess = (f.shaped(v) for v in (value, bar.stderr, bar.df, ess))
    return Estimate(value, stderr, df, ends, ess, bar.method, draws.witnesses, tuple(dict.fromkeys(draws.flags + own)))


def probability_bar(f: Columns, bar: Bar, ess: Tensor, draws: Draws) -> tuple[Bar, Tensor, tuple[Flag, ...]]:
    """(bar, ess, flags) of equally weighted indicators: see probability_interval. An event that never or always happened has no
    correlation of its own to measure: it is judged by the ESS of x."""
    m, n, _ = f.z.shape
    if m * n == 1:
        return bar, ess, ()
    never = f.binary & f.constant
    n_eff = torch.full_like(ess, m * n) if n == 1 else korn_graubard(ess, bar.df, m * n)
    n_eff = torch.where(never, ess_of_x(draws), n_eff) if bool(never.any()) else n_eff
    judged = torch.full_like(ess, m) if n == 1 else judged_ess(ess, f)
    hits = torch.where(never, 0.0, judged * torch.minimum(f.centre, 1 - f.centre))
    bar, rare = probability_interval(f, f.centre, bar, n_eff, hits, always=n == 1)
    return bar, torch.where(never, n_eff, ess), rare


def probability_interval(f: Columns, p: Tensor, bar: Bar, n_eff: Tensor, hits: Tensor, always: bool) -> tuple[Bar, tuple[Flag, ...]]:
    """Clopper-Pearson for the indicators among f, of mean p (k,), in n_eff (k,) effective draws: always, or where there are fewer
    than 20 effective hits (k,). An event seen at no draw or at all: the one-sided rule of three, (1 - 3/n)^n = .05, also as stderr."""
    never = f.binary & f.constant
    rare = f.binary & (hits < FEW_HITS)
    exact = (rare | always) & f.binary
    low, high = clopper_pearson(torch.where(f.binary, p, torch.full_like(p, 0.5)), n_eff)
    three = (3 / n_eff).clamp(max=1.0)
    low = torch.where(never, torch.where(p == 0, torch.zeros_like(p), 1 - three), low)
    high = torch.where(never, torch.where(p == 0, three, torch.ones_like(p)), high)
    bar = bar._replace(
        stderr=torch.where(never, three, bar.stderr),
        df=torch.where(never, torch.full_like(p, math.nan), bar.df),
        lower=torch.where(exact, (low - p) / f.scale, bar.lower),
        upper=torch.where(exact, (high - p) / f.scale, bar.upper),
    )
    return bar, located("RARE_EVENT", rare, hits, FEW_HITS, worst=min)


def ess_of_x(draws: Draws) -> Tensor:
    """() The smallest ESS of the coordinates of x: what an event that never happened is judged by."""
    m, n, _ = draws.x.shape
    if n == 1:
        return torch.tensor(float(m), dtype=torch.float64)
    f = columns(draws.x, draws)
    ess = effective_draws(f, mean_bar(f.z))
    ess = ess[~ess.isnan()]
    return ess.min().clamp(max=float(m * n)) if len(ess) else torch.tensor(float(m), dtype=torch.float64)


def refuse(f: Columns, bar: Bar, flags: tuple[Flag, ...]) -> tuple[Bar, tuple[Flag, ...]]:
    """No bar for columns that are constant, non-finite or without a mean; a zero or NaN bar that nothing explains is NO_ERROR_BAR."""
    none = (f.constant & ~f.binary) | ~f.finite | no_mean(flags, len(f.scale))
    nan = torch.full_like(f.scale, math.nan)
    zero = ~(bar.stderr > 0) & ~none
    explained = any(g.code == "NO_ERROR_BAR" for g in flags)
    more = () if explained else located("NO_ERROR_BAR", zero, bar.stderr)
    stderr, df, lower, upper = (torch.where(none | zero, nan, v) for v in bar[:4])
    return Bar(stderr, df, lower, upper, bar.method), more


def no_mean(flags: Iterable[Flag], k: int) -> Tensor:
    """Which columns (k,) HEAVY_F denies a mean."""
    found = torch.zeros(k, dtype=torch.bool)
    for g in flags:
        if g.code == "HEAVY_F" and g.threshold == 1.0 and g.index is not None:
            found[list(g.index)] = True
    return found


def in_units(f: Columns, bar: Bar) -> Bar:
    """The bar in the units of f, with the interval around the mean."""
    return bar._replace(stderr=f.back(bar.stderr), lower=f.centre + f.back(bar.lower), upper=f.centre + f.back(bar.upper))
