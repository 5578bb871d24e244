"""Means under weighted draws: self-normalized importance sampling (TRUST 2(c)).

With W_i = w_i / sum w over all draws of all units, mu = sum_i W_i f_i and g_i = W_i (f_i - mu), the jackknife that leaves one unit u out
moves mu by -G_u / (1 - W_u), where G_u and W_u sum g_i and W_i over its draws. So, with M units,

    se^2 = (M - 1)/M sum_u (G_u / (1 - W_u))^2,      bias = -sum_u W_u G_u   (subtracted),

which for independent weighted draws (one draw a unit) is the delta method corrected for leverage. Student t with ESS - 1 degrees,
ESS = 1 / sum_u W_u^2; |bias| <= se / sqrt(ESS) by Cauchy and Schwarz, so ESS_LOW also speaks for the bias.
The bar is as good as the weights: k-hat of w and of |g| (tails.py), the largest share of sum g^2 (of events, from a half on), and ESS are
judged at the grade an error bar needs (k-hat <= .4, or .6 where the weights are nearly equal), stricter than the .7 of an estimate.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from boltzsample.draws import Draws, Estimate
from boltzsample.estimates.assembly import finish, in_units, no_mean, probability_interval, refuse
from boltzsample.estimates.chains import Bar
from boltzsample.estimates.columns import Columns, columns, located
from boltzsample.estimates.diagnostics import FEW_VALUES, heavy_check, value_checks
from boltzsample.estimates.ensembles import by_chance, ensemble_flags, one_weight_each
from boltzsample.estimates.far import moment_flags
from boltzsample.estimates.intervals import t_interval
from boltzsample.estimates.tails import ends, is_calm, khat
from boltzsample.flags import Flag, flag

HEAVY_EVENLY = 0.7  # k-hat of evenly resampled draws, whose copies make it noisier; the weights have checks of their own
ENOUGH_FOR_A_TAIL = 1000  # effective draws
PLAIN = 2.0  # times the mean weight: such draws are no fault of the proposal
STEEP = 0.3  # k-hat of f from which its own tail may be heavier than the draws show
COVERED = 6.0  # times the mean: where no weight is above it the proposal reaches the tails of the target
CALM = 0.4  # k-hat of the influences that such weights may leave


class Weights(NamedTuple):
    """Normalized weights (units, draws), their sum over each unit (units,), and Kish's ESS of units and of draws."""

    share: Tensor
    unit: Tensor
    unit_ess: float
    ess: float


def weights(log_weight: Tensor) -> Weights | None:
    """From log-weights (units, draws); None where all are -inf, or some NaN or +inf.

    >>> import torch
    >>> round(weights(torch.zeros(10, 1)).ess, 6)
    10.0
    """
    log_w = log_weight.detach().to("cpu", torch.float64)
    if bool(log_w.isnan().any()) or not bool(log_w.max().isfinite()):
        return None
    share = (log_w - log_w.logsumexp((0, 1))).exp()
    unit = share.sum(1)
    return Weights(share, unit, float(1 / unit.square().sum()), float(1 / share.square().sum()))


def even_index(log_weight: Tensor) -> Tensor:
    """Indices (n,) of n draws of equal weight among n of these log-weights (n,), by systematic steps through the cumulative weights.

    >>> even_index(torch.tensor([0.0, 3.0, 0.0, -20.0], dtype=torch.float64))
    tensor([1, 1, 1, 1])
    """
    share = torch.softmax(log_weight.double(), 0).cumsum(0)
    n = len(share)
    return torch.searchsorted(share, (torch.arange(n, dtype=share.dtype, device=share.device) + 0.5) / n).clamp(max=n - 1)


def weighted_expectation(y: Tensor, draws: Draws, y_far: Tensor | None = None) -> Estimate:
    """E f from y (units, draws, *shape) under draws.log_weight and, where it is known, f at draws.far (3, rays, *shape). Draws of weight 0
    do not count, even where f is not finite there."""
    assert draws.log_weight is not None
    w = weights(draws.log_weight)
    if w is None:
        return _no_weights(columns(y, draws), draws)
    f = columns(usable(y, draws), draws)
    mean, bar, g = weighted_bar(f.z, w)
    flags = bar.flags + value_checks(f) + dead_values(y, draws) + weight_flags(w, draws) + function_flags(f, g, w)
    flags += _heavy(f, draws, w)
    ess = _effective(f.z, mean, bar, w)
    if bool(f.binary.any()):
        p, n_eff = (f.centre + f.back(mean)).clamp(0, 1), torch.where(f.constant, _ess_of_x(draws, w), ess).clamp(max=w.ess)
        bar, rare = probability_interval(f, p, bar, n_eff, n_eff * torch.minimum(p, 1 - p), always=False)
        flags += rare
    flags += moment_flags(f, y_far, draws.fall, ess, mean_alone=not one_weight_each(w.share))
    bar, more = refuse(f, bar, flags)
    lost = ~f.finite | no_mean(flags, len(mean))
    shifted = bar._replace(lower=bar.lower + mean, upper=bar.upper + mean)
    value = torch.where(lost, torch.full_like(mean, math.nan), f.centre + f.back(mean))
    return finish(f, value, in_units(f, shifted), ess, flags + more, draws)


def _heavy(f: Columns, draws: Draws, w: Weights) -> tuple[Flag, ...]:
    """HEAVY_F from draws resampled evenly: the tails of f under the target, not under the proposal. Of few effective draws the tail is
    mostly copies, and says nothing."""
    if draws.log_weight is None or w.ess < ENOUGH_FOR_A_TAIL:
        return ()
    evenly = f.z.flatten(0, 1)[even_index(draws.log_weight.flatten().cpu())]
    return tuple(h for h in heavy_check(evenly[:, None], skip=f.binary) if (h.value or 0.0) >= HEAVY_EVENLY)


def _effective(z: Tensor, mean: Tensor, bar: Bar, w: Weights) -> Tensor:
    """Weighted variance over squared stderr (k,)."""
    return (w.share[..., None] * (z - mean).square()).sum((0, 1)) / bar.stderr.square()


def _ess_of_x(draws: Draws, w: Weights) -> float:
    """The smallest ESS of a coordinate: what an event that never happened is judged by. Independent draws: that of the weights."""
    if w.share.shape[1] == 1:
        return w.ess
    f = columns(draws.x, draws)
    mean, bar, _ = weighted_bar(f.z, w)
    ess = _effective(f.z, mean, bar, w)
    return min(float(ess[~ess.isnan()].min()), w.ess) if bool((~ess.isnan()).any()) else float(len(w.unit))


def weighted_bar(z: Tensor, w: Weights) -> tuple[Tensor, Bar, Tensor]:
    """(bias-corrected mean (k,), bar, influences g (units, draws, k)) of z (units, draws, k)."""
    m, n, _ = z.shape
    mean = (w.share[..., None] * z).sum((0, 1))
    g = w.share[..., None] * (z - mean)
    unit = g.sum(1)  # (units, k)
    stderr = ((m - 1) / m * (unit / (1 - w.unit[:, None])).square().sum(0)).sqrt() if m > 1 else torch.full_like(mean, math.nan)
    bias = -(w.unit[:, None] * unit).sum(0)
    df = torch.full_like(mean, max(w.unit_ess - 1, 1.0))
    flags: tuple[Flag, ...] = ()
    if m < 4:
        flags = (flag("ONE_UNIT"), flag("NO_ERROR_BAR")) if m == 1 else (flag("FEW_UNITS", value=m, threshold=4),)
    kind = f"{m} independent weighted draws" if n == 1 else f"jackknife over {m} weighted units"
    return mean - bias, Bar(stderr, df, *t_interval(stderr, df), kind, flags), g


def weight_flags(w: Weights, draws: Draws) -> tuple[Flag, ...]:
    """KHAT_W, CONCENTRATION of a single weight, ESS_LOW: what the weights say whatever f is; of ensembles, what these say, too.

    Weights that are constant within units are as many as there are units: copies have no tail.
    """
    free = w.unit if one_weight_each(w.share) else w.share.flatten()
    s, ess = len(free), w.unit_ess if one_weight_each(w.share) else w.ess
    k = -math.inf if is_calm(free) else float(_khat(free[:, None]))
    limit, strict = min(1 - 1 / math.log10(max(s, 11)), 0.7), 0.6 if ess / s >= 0.95 else 0.4
    flags: tuple[Flag, ...] = ()
    if k > limit:
        flags += (flag("KHAT_W", value=k, threshold=limit, severity="untrusted"),)
    elif k > strict:
        flags += (flag("KHAT_W", value=k, threshold=strict),)
    ess = min(w.ess, w.unit_ess * w.share.shape[1])
    if ess < 400:
        flags += (flag("ESS_LOW", value=ess, threshold=100 if ess < 100 else 400, severity="untrusted" if ess < 100 else "caution"),)
    largest = float(w.unit.max())
    if largest > 0.5 and len(w.unit) > 2:
        flags += (flag("CONCENTRATION", value=largest, threshold=0.5, severity="untrusted", detail="share of the largest weight"),)
    return flags + ensemble_flags(draws)


def function_flags(f: Columns, g: Tensor, w: Weights) -> tuple[Flag, ...]:
    """KHAT_F and CONCENTRATION of the influences g (units, draws, k): what the weights do to this f.

    A draw of twice the mean weight at most is what exact draws have, too: of 3,200 from a Gaussian the highest carries over 5% of the
    bar of a second moment in 4% of runs, and no proposal is to blame. It may carry twice the limit, unless f has a tail of its own, k-hat
    above .3: of 3,000 runs of exact draws .1% are flagged then for x^2 of a Gaussian, 91% for that of a Student t_5.

    Where no weight of the run is above 6 means and k-hat is .4 at most, the limit is a quarter: flags at a twentieth pick the runs that do
    have their far draws, and leave those that lack them. Of 1,500 runs of 3,200 exact draws of a Student t_5, 107 of 131 unflagged
    intervals of x^2 held at a twentieth, and 505 of 571 so. At 10 means a Gaussian .85 as wide in 5 dimensions would be believed (15 of 22
    intervals of x_0^2 hold), and is not at 6 (1 unflagged of 400 runs, as at a twentieth).

    Of an event the hits are few by nature, and RARE_EVENT counts them: CONCENTRATION speaks of half of the bar alone. Flags at a twentieth
    leave those runs unflagged that lack a heavy hit, and are too low: on a regression under slips, P(x_0 > c) with 75 hits, 29 of 36 such
    intervals held the truth, and 73 of 83 with the flagged ones.
    """
    size = g.abs().flatten(0, 1)
    k = torch.where(f.binary | ends(size), torch.full_like(f.scale, math.nan), _khat(size))
    flags = located("KHAT_F", k > 0.5, k, 0.5)
    unit = g.sum(1).square()
    top, i = unit.max(0)
    share, limit = top / unit.sum(0), max(0.05, 100 / len(unit))
    heavy = (w.unit[i] * len(unit) > PLAIN) | (share > 2 * limit) | (k > STEEP)
    heavy &= (float(w.unit.max()) * len(unit) > COVERED) | (share > 0.25) | ~(k <= CALM)
    much = (share > 0.5) & ~by_chance(unit, w.unit) if one_weight_each(w.share) else share > 0.5
    flags += located("CONCENTRATION", much, share, 0.5, severity="untrusted") if len(unit) > 2 else ()
    return flags + located("CONCENTRATION", (share > limit) & (share <= 0.5) & heavy & ~f.binary, share, limit)


def _khat(values: Tensor) -> Tensor:
    """k-hat (k,) of positive values (S, k); NaN where there are at most 10 different ones (weights of whole units)."""
    different = 1 + (values.sort(0).values.diff(dim=0) > 0).sum(0)
    k = khat(values)
    return torch.where(different <= FEW_VALUES, torch.full_like(k, math.nan), k)


def usable(y: Tensor, draws: Draws) -> Tensor:
    """f with 0 in place of its non-finite values at draws of weight 0: 0 times NaN would be NaN."""
    dead = _dead(y, draws)
    return y if dead is None else torch.where(dead, torch.zeros((), dtype=y.dtype, device=y.device), y)


def dead_values(y: Tensor, draws: Draws) -> tuple[Flag, ...]:
    """How many values `usable` replaced."""
    dead = _dead(y, draws)
    count = 0 if dead is None else int(dead.sum())
    return (flag("NONFINITE_F", value=count, severity="info", detail="at draws of weight 0, left out"),) if count else ()


def _dead(y: Tensor, draws: Draws) -> Tensor | None:
    if draws.log_weight is None or not y.is_floating_point():
        return None
    zero = (draws.log_weight == -math.inf).to(y.device)
    return zero.reshape(*zero.shape, *[1] * (y.ndim - 2)) & ~y.isfinite()


def _no_weights(f: Columns, draws: Draws) -> Estimate:
    nan = torch.full_like(f.scale, math.nan)
    return finish(f, nan, Bar(nan, nan, nan, nan, "none"), nan, (flag("BAD_WEIGHTS"),), draws)
