"""log Z from weighted draws, with the side that needs no assumption (TRUST 2(d), (i)).

In unit u the weights have mean Z_u; Zhat = mean_u Z_u is unbiased. With M units

    r = var(Z_u) / (M Zhat^2)   (relative variance of Zhat),      log Z = log Zhat + r/2,      se = sqrt(log(1 + r)),

good for r < .1 and weights with k-hat <= .4. Whatever the tail of the weights, Zhat >= 0 has mean Z, so P(Zhat >= 20 Z) <= .05 (Markov):

    log Z >= log Zhat - log 20      with confidence .95;

of R independent replicates the lower bound is min_r log Zhat_r - log(20) / R. An upper bound needs draws of the target itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from boltzsample.draws import Draws, Estimate
from boltzsample.estimates.columns import on_cpu, unlocated
from boltzsample.estimates.intervals import t_quantile
from boltzsample.estimates.replicates import bar_test, merged_flags
from boltzsample.estimates.weighted import weight_flags, weights
from boltzsample.flags import Flag, flag

LARGE = 0.1  # relative variance above which the lognormal interval is not believed


@on_cpu
def log_z(draws: Draws) -> Estimate:
    """log Z; NaN and untrusted (NO_LOG_Z) where the draws carry no weights. The guaranteed lower bound is in `method`.

    >>> import torch
    >>> x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    >>> log_z(Draws.from_arrays(x, log_weight=1.5 - x[:, 0] ** 2 / 8))
    1.3907 +- 0.0044 (95%, ok)
    """
    if draws.evidence:
        own = draws.evidence[0]
        return replace(own, flags=tuple(dict.fromkeys((*draws.flags, *own.flags))), witnesses=draws.witnesses)
    if draws.log_z is not None:
        return _from_means(draws.log_z.detach().to("cpu", torch.float64), draws, ())
    if draws.log_weight is None:
        return _none("no weights", (*draws.flags, flag("NO_LOG_Z")), draws.witnesses)
    w = weights(draws.log_weight)
    if w is None:
        return _none("none", (*draws.flags, flag("BAD_WEIGHTS")), draws.witnesses)
    log_w = draws.log_weight.detach().to("cpu", torch.float64)
    flags = weight_flags(w, draws)
    found = _from_means(log_w.logsumexp(1) - math.log(log_w.shape[1]), draws, flags)
    elbo = float(log_w.mean())  # E log w <= log Z (Jensen)
    return replace(found, method=f"{found.method}; ELBO {elbo:.4g}") if math.isfinite(elbo) else found


@on_cpu
def combine_log_z(estimates: Sequence[Estimate]) -> Estimate:
    """log Z from R replicates: the log of the mean of Zhat_r, not the mean of logs, with the leave-one-out jackknife and t_{R-1}.

    L = log mean_r exp L_r,   L_(-r) without r:   value = R L - (R - 1) mean L_(-r),   se^2 = (R - 1)/R sum (L_(-r) - mean L_(-r))^2.

    The spread of the L_r is held against their own bars, too (SE_MISCALIBRATED). Raises ValueError where there are no replicates.
    """
    if not estimates:
        raise ValueError("there are no replicates to combine; wanted one estimate or more")
    r = len(estimates)
    if r == 1:
        return estimates[0]
    each = torch.stack([e.value.double() for e in estimates])
    own, df = (torch.stack([getattr(e, name).double() for e in estimates])[:, None] for name in ("stderr", "df"))
    flags = merged_flags(estimates, 1) + unlocated(bar_test(each[:, None], own, df), each.shape[1:])
    witnesses = tuple(dict.fromkeys(v for e in estimates for v in e.witnesses))
    if not bool(each.isfinite().all()):
        return _none(f"log of the mean of {r} replicates", flags or (flag("NO_LOG_Z"),), witnesses)
    whole = each.logsumexp(0) - math.log(r)
    leave = torch.stack([torch.cat([each[:i], each[i + 1 :]]).logsumexp(0) for i in range(r)]) - math.log(r - 1)
    value = r * whole - (r - 1) * leave.mean()
    stderr = ((r - 1) / r * (leave - leave.mean()).square().sum()).sqrt()
    bound = float(each.min()) - math.log(20) / r
    return _estimate(value, stderr, r - 1, f"log of the mean of {r} replicates, jackknife", bound, flags, witnesses)


class Bracket(NamedTuple):
    """log Z from both sides: `lower` holds with 95%, `upper` too, where the draws that the reverse paths start from are the target's."""

    lower: float
    upper: float
    forward: Estimate
    reverse: Estimate


def bracket(forward: Draws, reverse: Draws) -> Bracket:
    """log Z between two guaranteed sides (TRUST 2(d)): weighted draws with E w = Z, and reverse paths with E w = 1/Z (`reverse_ais`).

    By Markov's inequality P(mean w >= 20 Z) <= .05 either way: log Z >= log mean w - log 20 and log Z <= -log mean w' + log 20.

    >>> import torch
    >>> x = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> log_w = 1.5 + 0.0 * x[:, 0]
    >>> b = bracket(Draws.from_arrays(x, log_weight=log_w + 0.1 * x[:, 0]), Draws.from_arrays(x, log_weight=-log_w))
    >>> round(b.lower, 1), round(b.upper, 1)                            # 1.5 -+ log 20
    (-1.5, 4.5)
    """
    up, down = log_z(forward), log_z(reverse)
    mirrored = replace(down, value=-down.value, interval=-down.interval.flip(0), method="reverse paths, conditional on the draws")
    ends = [float(d.log_weight.logsumexp((0, 1))) - math.log(d.log_weight.numel()) for d in (forward, reverse) if d.log_weight is not None]
    return Bracket(ends[0] - math.log(20), -ends[1] + math.log(20), up, mirrored)


def _from_means(each: Tensor, draws: Draws, flags: tuple[Flag, ...]) -> Estimate:
    """From per-unit log Z_u (units,)."""
    m = len(each)
    whole = each.logsumexp(0) - math.log(m)
    if m == 1 or not bool(whole.isfinite()):
        lost = flag("NO_ERROR_BAR") if m == 1 else flag("BAD_WEIGHTS")
        none = _none("one unit", (*draws.flags, *flags, lost), draws.witnesses)
        return Estimate(whole, none.stderr, none.df, none.interval, none.ess, none.method, none.witnesses, none.flags)
    r = (each - whole).exp().var() / m
    if float(r) > LARGE:
        flags += (flag("LOG_Z_SPREAD", value=float(r), threshold=LARGE),)
    kind = f"log of the mean weight of {m} units"
    bound = float(whole) - math.log(20)
    return _estimate(whole + r / 2, torch.log1p(r).sqrt(), m - 1, kind, bound, (*draws.flags, *flags), draws.witnesses)


def _estimate(
    value: Tensor, stderr: Tensor, df: float, kind: str, bound: float, flags: tuple[Flag, ...], witnesses: tuple[str, ...]
) -> Estimate:
    degrees = torch.tensor(float(df), dtype=torch.float64)
    half = t_quantile(0.975, degrees) * stderr
    low, high = value - half, value + half
    method = f"{kind}; log Z >= {bound:.4g} at 95% whatever the weights"
    if not bool(stderr > 0):
        flags, nan = (*flags, flag("NO_ERROR_BAR")), torch.full_like(value, math.nan)
        stderr, low, high = nan, nan, nan
    ess = stderr.square().expm1().pow(-1)
    return Estimate(value, stderr, degrees, torch.stack([low, high]), ess, method, witnesses, tuple(dict.fromkeys(flags)))


def _none(method: str, flags: tuple[Flag, ...], witnesses: tuple[str, ...]) -> Estimate:
    nan = torch.tensor(math.nan, dtype=torch.float64)
    return Estimate(nan, nan, nan, torch.stack([nan, nan]), nan, method, witnesses, tuple(dict.fromkeys(flags)))
