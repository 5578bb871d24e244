"""What can be wrong with the draws of f, as flags (TRUST, warning taxonomy) and as the numbers a summary prints.

Every check is a function of tensors; every one is quiet on stationary chains but for a measured share of 0.1-0.2% (docs: trust), and
`doubtful_tails`, asked only beside a coordinate of heavy tails, is not meant to be.
R-hat says something only where a chain has 100 autocorrelation times (it tends to sqrt(1 + 2 (tau - 1) / N) in perfect chains); shorter
chains are judged by the tests of stationarity.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy import special, stats
from torch import Tensor

from boltzsample.draws import Draws
from boltzsample.estimates.chains import BETWEEN, SHORT, between, inner_autocorrelation_time, within
from boltzsample.estimates.columns import Columns, columns, located, on_cpu, unlocated
from boltzsample.estimates.stationarity import drift_test, nested_rhat, nested_rhat_test, start_memory_test
from boltzsample.estimates.tails import khat, tail_length
from boltzsample.flags import Flag

HEAVY = 0.5
COARSE = 0.1  # of a standard deviation: the spacing of floating point numbers at the mean of f
FEW_VALUES = 10


class Numbers(NamedTuple):
    """What a summary prints of f, each of f's shape. `rhat` is NaN where `rhat_note` says why."""

    bulk_ess: Tensor
    tail_ess: Tensor
    rhat: Tensor
    nested_rhat: Tensor
    rhat_note: str


def checks(f: Columns, draws: Draws, y_start: Tensor | None = None) -> tuple[Flag, ...]:
    """All flags of the columns of f over `draws`, given f at the chains' starts (units, *shape) or None."""
    z = f.z
    flags = value_checks(f)
    if z.shape[1] == 1:
        return flags + heavy_check(z)
    flags += stuck_and_twins(draws) + few_switches(f) + heavy_check(z, skip=f.binary)
    flags += nested_rhat_test(z, draws.group) + drift_test(z) + start_memory_test(z, f.standard_start(y_start))
    return flags + rhat_check(z) + tail_check(z, skip=f.binary)


def value_checks(f: Columns) -> tuple[Flag, ...]:
    """NONFINITE_F, CONSTANT_F, COARSE_F."""
    flags = located("NONFINITE_F", ~f.finite, torch.ones_like(f.scale))
    flags += located("CONSTANT_F", f.constant & f.finite & ~f.binary, f.centre)
    return flags + located("COARSE_F", (f.coarse > COARSE) & ~f.constant, f.coarse, COARSE)


def heavy_check(z: Tensor, skip: Tensor | None = None) -> tuple[Flag, ...]:
    """HEAVY_F: k-hat of a tail of f is 1/2 or more: caution within a standard error of k-hat, untrusted above, from 1 on the mean is
    refused. Functions of few values are bounded. Under 256 draws k-hat is too noisy for a caution."""
    k = heaviness(z, skip)
    s = z.shape[0] * z.shape[1]
    clear = HEAVY + 1.5 / math.sqrt(max(tail_length(s), 1))
    flags = located("HEAVY_F", k >= 1, k, 1.0, detail="k-hat: the mean itself may not exist")
    flags += located("HEAVY_F", (k >= clear) & (k < 1), k, clear, detail="k-hat")
    return flags + located("HEAVY_F", (k >= HEAVY) & (k < min(clear, 1.0)) & (s >= 256), k, HEAVY, severity="caution", detail="k-hat")


@on_cpu
def doubtful_tails(y: Tensor, draws: Draws, ess: Tensor) -> tuple[Flag, ...]:
    """HEAVY_F as a caution where k-hat of a tail of f, y (units, draws, *shape) with `ess` effective draws, is below 1/2 by less than a
    standard error, 1.5 / sqrt(effective draws in the tail): to be asked where a coordinate of the same draws has heavy tails, for then a
    light tail of f has to be seen, not supposed."""
    f = columns(y, draws)
    k, s = heaviness(f.z, skip=f.binary), f.z.shape[0] * f.z.shape[1]
    share = (ess.flatten() / s).nan_to_num(nan=1.0).clamp(1 / s, 1.0)
    clear = HEAVY - 1.5 / (tail_length(s) * share).sqrt()
    detail = "k-hat is not clearly below 1/2, and a coordinate of this run has heavy tails"
    return unlocated(located("HEAVY_F", (k >= clear) & (k < HEAVY) & (s >= 256), k, HEAVY, severity="caution", detail=detail), y.shape[2:])


def heaviness(z: Tensor, skip: Tensor | None = None) -> Tensor:
    """k-hat (k,) of the heavier tail; NaN where z takes at most 10 values, or there are under 100 draws. Each tail is fitted alone:
    |f - mean| folds the bulk of a one-sided f onto its tail (of x^2 for normal x, 256 draws: k-hat >= 1/2 in half of all samples)."""
    pooled = z.flatten(0, 1)
    values = 1 + (pooled.sort(0).values.diff(dim=0) > 0).sum(0)
    upper, lower = khat(pooled), khat(-pooled)
    k = torch.fmax(upper, lower)
    unfit = values <= FEW_VALUES if skip is None else (values <= FEW_VALUES) | skip
    return torch.where(unfit, torch.full_like(k, math.nan), k)


def stuck_and_twins(draws: Draws) -> tuple[Flag, ...]:
    """STUCK_CHAIN, SAME_STARTS and DUPLICATE_STREAM: properties of the chains, whatever f is."""
    x = draws.x.detach().to("cpu")
    still = (x == x[:, :1]).all(-1).all(-1)
    stuck = (draws.moves.cpu() == 0) if draws.moves is not None else still & bool(_chance_of_stillness(x, still) < 1e-3)
    m = x.shape[0]
    flags = located("STUCK_CHAIN", stuck.any()[None], stuck.sum()[None].double(), 0, detail=f"of {m} chains")
    twins = m - len(x[~still].flatten(1).unique(dim=0)) - int(still.sum())
    flags += located("DUPLICATE_STREAM", torch.tensor([twins > 0]), torch.tensor([float(twins)]), 0, detail=f"of {m} chains")
    same = draws.starts is not None and m > 1 and bool((draws.starts == draws.starts[:1]).all())
    flags += located("SAME_STARTS", torch.tensor([same]), torch.tensor([float(m)]))
    return tuple(Flag(f.code, f.severity, f.detail, f.value, f.threshold) for f in flags)


def _chance_of_stillness(x: Tensor, still: Tensor) -> float:
    """The expected number of chains that would repeat one point n times, if each step repeats as often as in the moving chains."""
    moving = x[~still]
    if not len(moving):
        return 0.0
    repeats = (moving[:, 1:] == moving[:, :-1]).all(-1).double().mean()
    return float(len(x) * repeats ** (x.shape[1] - 1))


def few_switches(f: Columns) -> tuple[Flag, ...]:
    """FEW_SWITCHES: an indicator changes fewer than 20 times inside the chains, all told. An event so rare that independent draws would
    hardly switch more often is RARE_EVENT's business, unless it never happened: then nothing tells rare from unreachable."""
    m, n, _ = f.z.shape
    hits = torch.where(f.constant[None, None], f.z + f.centre, (f.z > 0).double())
    switches = hits.diff(dim=1).abs().sum((0, 1))
    p = hits.mean((0, 1))
    sticky = switches < p * (1 - p) * m * (n - 1)  # half of what independent draws would show
    few = f.binary & (switches < 20) & (sticky | f.constant)
    return located("FEW_SWITCHES", few, switches, 20, worst=min)


def rhat_check(z: Tensor) -> tuple[Flag, ...]:
    """RHAT: rank-normalized split R-hat above 1.01 (caution) or 1.05 (untrusted), and above its 99.9% quantile for stationary chains
    of the autocorrelation time seen inside the chains; only where chains have 100 such times."""
    m, n, _ = z.shape
    if n < 100 or m < 2:
        return ()
    rhat, tau, applies = rank_rhat(z)
    chance = tau / (n // 2) * float(stats.chi2.isf(5e-4, 2 * m - 1)) / (2 * m - 1)
    beyond = applies & (rhat.square() > 1 + chance)
    flags = located("RHAT", beyond & (rhat > 1.05), rhat, 1.05, severity="untrusted")
    return flags + located("RHAT", beyond & (rhat > 1.01) & (rhat <= 1.05), rhat, 1.01)


def rank_rhat(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R-hat, tau, whether chains are 100 tau long), all (k,): the larger of the split R-hats of the rank-normalized draws and of their
    rank-normalized distance to the median (Vehtari et al. 2021, eqs. 3, 4, 14 and section 4)."""
    ordered = z.flatten(0, 1).sort(0).values
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    bulk, fold = rank_normalize(z), rank_normalize((z - median).abs())
    tau = torch.maximum(inner_autocorrelation_time(bulk), inner_autocorrelation_time(fold)).clamp(min=1.0)
    return torch.maximum(split_rhat(bulk), split_rhat(fold)), tau, z.shape[1] >= 100 * tau


def split_rhat(z: Tensor) -> Tensor:
    """sqrt(var+ / W) over half-chains (k,)."""
    n = z.shape[1] // 2
    halves = torch.cat([z[:, :n], z[:, -n:]])
    return ((n - 1) / n + halves.mean(1).var(0) / halves.var(1).mean(0)).sqrt()


def rank_normalize(z: Tensor) -> Tensor:
    """Normal scores of the pooled ranks, Phi^-1((r - 3/8) / (S + 1/4)), ties at their mean rank."""
    ranks = stats.rankdata(z.flatten(0, 1).numpy(), axis=0)
    return torch.as_tensor(special.ndtri((ranks - 0.375) / (len(ranks) + 0.25))).reshape(z.shape)


def tail_check(z: Tensor, skip: Tensor) -> tuple[Flag, ...]:
    """TAIL_ESS_LOW: the ESS of a 5% or 95% tail is under a third of the bulk's, beyond chance at 1e-3."""
    m = z.shape[0]
    if m < BETWEEN:
        return ()
    ratio = tail_ess(z) / bulk_ess(z)
    threshold = float(stats.f.ppf(5e-4, m - 1, m - 1)) / 3
    return located("TAIL_ESS_LOW", (ratio < threshold) & ~skip, ratio, threshold, worst=min)


@on_cpu
def numbers(y: Tensor, draws: Draws) -> Numbers:
    """Bulk and tail ESS, R-hat and nested R-hat of y (units, draws, *shape), for reading; error bars have their own ESS of the very f."""
    f = columns(y, draws)
    nan = torch.full_like(f.scale, math.nan)
    bad = f.constant | ~f.finite
    m, n = f.z.shape[:2]
    rhat, note = nan, f"not applicable: {n} draw{'s' * (n > 1)} per chain, {m} chain{'s' * (m > 1)}"
    if n >= 100 and m > 1:
        rhat, _, applies = rank_rhat(f.z)
        rhat = torch.where(applies & ~bad, rhat, nan)
        note = "" if bool((applies | bad).all()) else f"not applicable: {n} draws per chain are under 100 autocorrelation times"
    nested = nested_rhat(f.z, draws.group)[0] if draws.group is not None else nan
    found = [torch.where(bad, nan, v) for v in (bulk_ess(f.z), tail_ess(f.z), rhat, nested)]
    bulk, tail, split, nest = (f.shaped(v) for v in found)
    return Numbers(bulk, tail, split, nest, note)


def bulk_ess(z: Tensor) -> Tensor:
    """ESS (k,) of the rank-normalized draws (Vehtari et al. 2021, section 4.1), between chains where there are 16 or more."""
    return _ess(rank_normalize(z))


def tail_ess(z: Tensor) -> Tensor:
    """The smaller ESS (k,) of the indicators of the 5% and the 95% quantile (Vehtari et al. 2021, section 4.3)."""
    ordered = z.flatten(0, 1).sort(0).values
    s = len(ordered)
    ends = ordered[[int(0.05 * (s - 1)), int(0.95 * (s - 1))]]
    return torch.minimum(*(_ess((z <= end).double()) for end in ends))


def _ess(z: Tensor) -> Tensor:
    m, n, _ = z.shape
    if n == 1:
        return torch.full_like(z[0, 0], float(m))
    var = z.flatten(0, 1).var(0)
    if m >= BETWEEN:
        return var / between(z).stderr.square()
    return var / within(z).stderr.square() if n >= SHORT else torch.full_like(z[0, 0], math.nan)
