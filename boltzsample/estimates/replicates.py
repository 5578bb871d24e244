"""The gold standard: R independent runs of the same frozen configuration, one estimate e_r each (TRUST 2(i)).

    e = mean_r e_r,      s^2 = sum_r (e_r - e)^2 / (R - 1),      interval e +- t_{.975, R-1} s / sqrt(R).

It contains whatever varies between runs and needs no theory inside; so it also tests the runs' own bars se_r:

    s^2 / mean_r se_r^2 ~ F(R - 1, sum_r df_r)      (chi^2_{R-1} / (R - 1) when the df_r are large),      p < 1e-3: SE_MISCALIBRATED.

What the replicates said of themselves is judged together. With c of R replicates carrying a code,
- CHANCE codes are tests at 1e-3: they keep their severity where P(Bin(R, .002) >= c) < 1e-3, are cautions below 1e-2, else info;
- NOISY codes estimate a property of f: they count where most replicates carry them, or where they cost a replicate its value;
- CURED codes complain of a bar or of too few draws, which the replicates provide: they become info, and are judged anew in total;
- all others (a missed mode, a stuck chain, a NaN, an interruption) speak for the whole, from one replicate on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from scipy import stats
from torch import Tensor

from boltzsample.draws import Estimate
from boltzsample.errors import ShapeError
from boltzsample.estimates.columns import holm, located, on_cpu, unlocated
from boltzsample.estimates.far import enough
from boltzsample.estimates.intervals import t_interval
from boltzsample.flags import Flag, Severity

CHANCE = frozenset({"RHAT", "NESTED_RHAT", "DRIFT", "START_MEMORY", "TAIL_ESS_LOW", "UNSETTLED"})
NOISY = frozenset({"HEAVY_F"})
CURED = frozenset(
    {"ESS_LOW", "RARE_EVENT", "NO_THIRD_MOMENT", "NO_ERROR_BAR", "BARS_DISAGREE"}
    | {"TAU_UNRESOLVED", "TAU_FLOORED", "FEW_UNITS", "SE_MISCALIBRATED"}
)
LADDER: tuple[Severity, ...] = ("info", "caution", "untrusted")
RATE = 2e-3
LEVEL = 1e-3


@on_cpu
def combine(estimates: Sequence[Estimate]) -> Estimate:
    """One estimate from R replicates of equal weight; of one replicate, itself. For log Z see evidence.combine_log_z.

    Raises ShapeError where the replicates' shapes differ, ValueError where there are none.

    >>> import torch
    >>> from boltzsample.draws import Draws
    >>> from boltzsample.estimates.expectation import expectation
    >>> g = torch.Generator().manual_seed(0)
    >>> runs = [torch.randn(64, 50, 1, generator=g) for _ in range(8)]
    >>> combine([expectation(x[..., 0], Draws.from_arrays(x)) for x in runs]).method
    'mean of 8 replicates'
    """
    if not estimates:
        raise ValueError("there are no replicates to combine; wanted one estimate or more")
    shape, r = _one_shape(estimates), len(estimates)
    if r == 1:
        return estimates[0]
    value, stderr, df, ess = (torch.stack([getattr(e, name).flatten() for e in estimates]) for name in ("value", "stderr", "df", "ess"))
    centre = value[0] + (value - value[0]).mean(0)  # (k,)
    error = value.std(0) / math.sqrt(r)
    flags = merged_flags(estimates, len(centre)) + bar_test(value, stderr, df)
    flags += located("NO_ERROR_BAR", ~(error > 0), error, detail=f"{r} replicates")
    flags += _few_draws(ess.nan_to_num(nan=0.0).sum(0), estimates)
    error = torch.where(error > 0, error, torch.full_like(error, math.nan))
    degrees = torch.full_like(error, r - 1)
    ends = torch.stack([centre + half for half in t_interval(error, degrees)]).reshape(2, *shape)
    total = (stderr.square() * ess).nanmean(0) / error.square()  # each replicate's variance of f, averaged, over the new stderr^2
    witnesses = tuple(dict.fromkeys(w for e in estimates for w in e.witnesses))
    value, stderr, df, ess = (v.reshape(shape) for v in (centre, error, degrees, total))
    return Estimate(value, stderr, df, ends, ess, f"mean of {r} replicates", witnesses, unlocated(flags, shape))


def _one_shape(estimates: Sequence[Estimate]) -> torch.Size:
    shapes = {e.value.shape for e in estimates}
    if len(shapes) > 1:
        raise ShapeError(f"replicates have shapes {sorted(tuple(s) for s in shapes)}; wanted one shape")
    return shapes.pop()


def bar_test(value: Tensor, stderr: Tensor, df: Tensor) -> tuple[Flag, ...]:
    """SE_MISCALIBRATED from the replicates' values, bars and degrees of freedom, each (R, k)."""
    r = len(value)
    f = value.var(0) / stderr.square().mean(0)
    own = df.nan_to_num(nan=1.0).sum(0)
    p = torch.as_tensor(stats.f.sf(f.numpy(), r - 1, own.numpy()))
    return located("SE_MISCALIBRATED", holm(p, LEVEL), f.sqrt(), detail="spread of the replicates over their own bars")


def merged_flags(estimates: Sequence[Estimate], k: int) -> tuple[Flag, ...]:
    """The flags of the replicates as flags of the whole, each saying in how many of them it was found."""
    codes = dict.fromkeys(f.code for e in estimates for f in e.flags)
    return tuple(g for code in codes for g in _judged(code, estimates, k))


def _judged(code: str, estimates: Sequence[Estimate], k: int) -> Iterator[Flag]:
    r = len(estimates)
    found = [[f for f in e.flags if f.code == code] for e in estimates]
    carries = torch.stack([_components(flags, k) for flags in found])  # (R, k)
    grave = torch.stack([_components([f for f in flags if f.severity == "untrusted"], k) for flags in found]).sum(0)
    count = carries.sum(0)
    lost = (carries & torch.stack([e.value.flatten().isnan() for e in estimates])).any(0)
    gravest = max((f for flags in found for f in flags), key=lambda f: f.status.rank)
    level = _levels(code, count, grave, r, lost).clamp(max=LADDER.index(gravest.severity))
    detail = f"{int(count.max())} of {r} replicates" + (f"; {gravest.detail}" if gravest.detail else "")
    for rank, severity in enumerate(LADDER):
        where = (count > 0) & (level == rank)
        if bool(where.any()):
            index = None if gravest.index is None else tuple(where.nonzero().flatten().tolist())
            yield Flag(code, severity, detail, gravest.value, gravest.threshold, index)


def _levels(code: str, count: Tensor, grave: Tensor, r: int, lost: Tensor) -> Tensor:
    """(k,) 0 info, 1 caution at most, 2 the replicates' own severity; `grave` of the `count` replicates are untrusted."""
    if code in CHANCE:
        p = torch.as_tensor(stats.binom.sf(count.numpy() - 1, r, RATE))
        return (p < 1e-2).long() + (p < LEVEL).long()
    if code in NOISY:
        return torch.where(lost | (2 * grave > r), 2, (2 * count > r).long())
    if code == "ONE_UNIT":
        return torch.full_like(count, 0 if r >= 16 else 1 if r >= 4 else 2)
    if code == "CONSTANT_F":
        return torch.where(count == r, 2, 0)
    return torch.full_like(count, 0 if code in CURED else 2)


def _components(flags: Sequence[Flag], k: int) -> Tensor:
    found = torch.zeros(k, dtype=torch.bool)
    for f in flags:
        found[list(range(k) if f.index is None else f.index)] = True
    return found


def _few_draws(ess: Tensor, estimates: Sequence[Estimate]) -> tuple[Flag, ...]:
    """ESS_LOW, NO_THIRD_MOMENT and RARE_EVENT over all replicates together; hits are as their flags counted them, at least 20 where there
    is none."""
    flags: tuple[Flag, ...] = ()
    if any(f.code == "ESS_LOW" for e in estimates for f in e.flags):
        flags += located("ESS_LOW", ess < 100, ess, 100, severity="untrusted", worst=min)
        flags += located("ESS_LOW", (ess >= 100) & (ess < 400), ess, 400, worst=min)
    skewed = [f for e in estimates for f in e.flags if f.code == "NO_THIRD_MOMENT"]
    if skewed:
        need = float(enough(torch.tensor(min(f.value or math.inf for f in skewed))))
        flags += located("NO_THIRD_MOMENT", _components(skewed, len(ess)) & (ess < need), ess, need, detail="effective draws", worst=min)
    hits = torch.zeros_like(ess)
    for e in estimates:
        own = torch.full_like(ess, 20.0)
        for f in e.flags:
            if f.code == "RARE_EVENT":
                own[_components([f], len(ess))] = f.value or 0.0
        hits += own
    return flags + located("RARE_EVENT", hits < 20, hits, 20, worst=min)
