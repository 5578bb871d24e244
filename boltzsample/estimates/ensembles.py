"""What ensembles say of themselves: units with one weight each, log Zhat_u, such as those of SMC (TRUST 2(e)).

- LOG_Z_SPREAD: the standard deviation of log Zhat_u. Up to .7 the intervals between 16 lognormal units cover .92 and more, at 1 they
  cover .89 (20,000 simulations each); but Zhat_u of particles that lag behind in a heavy tail is more skewed than that: on a Student t_5
  with one or two moves a level 7 of 23 intervals held log Z where the spread was .5 to .7. The logarithm sees it at once, when sum Zhat_u
  itself has not met its tail yet.
- FEW_ANCESTORS: fewer than 30 of all first particles have descendants.
- SE_MISCALIBRATED: the log Zhat_u spread more than each one's own relative variance V_u (Lee & Whiteley 2018) says, f = var log Zhat_u /
  mean log(1 + V_u) ~ F(M - 1, 2 M / c^2), p < 1e-3, c the coefficient of variation of the V_u: their mean has that many degrees of
  freedom by its own first two moments (Satterthwaite 1946). Taken for exact, V flagged 7% of 200 runs on a Student t_5, where c^2 is 1 to
  6 and f is 1.3; of 16 ensembles the spread must now be 1.9 times the bars at c^2 = 1, 2.8 times at 3. Asked where mean V_u <= .1: it is
  no measure of itself beyond.
- UNSETTLED: moves that leave the target invariant changed the mean of log_prob, the share at its top, or a coordinate. Weighted by
  Zhat_u, means before and after have the same expectation Z E f whatever the ladder; so a shift that most ensembles share says that
  their particles lagged behind it, and that a rare ensemble with a large Zhat_u stands for what these have missed. Each
  ensemble counts once (weighted by Zhat_u, the rare one would drown the others), t tests at 1e-3, Holm.
"""

from __future__ import annotations

import math

import torch
from scipy import special, stats
from torch import Tensor

from boltzsample.draws import Draws
from boltzsample.estimates.columns import holm
from boltzsample.flags import Flag, flag

FEW_EVES = 30
SPREAD, TORN = 0.5, 1.5
LEVEL = 1e-3
RELIABLE = 0.1
HEIGHTS = 3  # the first columns of `shift`: log_prob, and the shares of particles at its top


def one_weight_each(share: Tensor) -> bool:
    """Whether the weights (units, draws) are constant within every unit of several draws."""
    return share.shape[1] > 1 and bool((share == share[:, :1]).all())


def ensemble_flags(draws: Draws) -> tuple[Flag, ...]:
    """All of the above; nothing for draws that are no ensembles."""
    log_w = None if draws.log_weight is None else draws.log_weight.detach().cpu().double()
    if log_w is None or not one_weight_each(log_w) or not bool(log_w.max().isfinite()):
        return ()
    log_z = log_w[:, 0]
    return (*_spread(log_z), *_ancestors(draws, log_z), *_bars(draws, log_z), *_shift(draws, log_z))


def by_chance(squares: Tensor, w: Tensor) -> Tensor:
    """Whether the largest of the squared influences (units, k) would be so by chance, in one of a thousand runs, of a handful of units of
    shares w (units,): with G_u = W_u d_u and independent normal d_u, a share s of unit u has

        s / (1 - s) sum_v W_v^2 / W_u^2 ~ t^2 of (sum_v W_v^2)^2 / sum_v W_v^4 degrees, v other than u    (Satterthwaite 1946).
    """
    top, u = squares.max(0)  # (k,)
    odds = top / (squares.sum(0) - top)
    others = w.square().sum() - w[u].square()
    df = others.square() / (w.pow(4).sum() - w[u].pow(4))
    p = 2 * torch.as_tensor(special.stdtr(df.numpy(), -(odds * others).sqrt().div(w[u]).nan_to_num().numpy()))
    return p * squares.numel() > LEVEL


def _spread(log_z: Tensor) -> tuple[Flag, ...]:
    spread = float(log_z.std()) if bool(log_z.isfinite().all()) and len(log_z) > 1 else math.inf
    if spread <= SPREAD or len(log_z) == 1:
        return ()
    torn = spread > TORN
    limit, detail = TORN if torn else SPREAD, "standard deviation of log Z over the ensembles"
    return (flag("LOG_Z_SPREAD", value=spread, threshold=limit, severity="untrusted" if torn else None, detail=detail),)


def _ancestors(draws: Draws, log_z: Tensor) -> tuple[Flag, ...]:
    if draws.ancestor is None:
        return ()
    alive = draws.ancestor[log_z.to(draws.ancestor.device) > -torch.inf]
    eves = len(alive) + int((alive.sort(1).values.diff(dim=1) > 0).sum())
    return (flag("FEW_ANCESTORS", value=eves, threshold=FEW_EVES),) if eves < FEW_EVES else ()


def _bars(draws: Draws, log_z: Tensor) -> tuple[Flag, ...]:
    m = len(log_z)
    own = None if draws.variance is None else draws.variance.cpu().double().clamp(min=0.0)
    if own is None or m < 4 or not 0 < float(own.mean()) <= RELIABLE or not bool(log_z.isfinite().all()):
        return ()
    v = own.log1p()
    f = float(log_z.var() / v.mean())
    df = 2 * m / max(float(v.var() / v.mean().square()), 1e-9)
    if float(stats.f.sf(f, m - 1, df)) > LEVEL:
        return ()
    return (flag("SE_MISCALIBRATED", value=math.sqrt(f), detail="spread of the ensembles over their own bars"),)


def _shift(draws: Draws, log_z: Tensor) -> tuple[Flag, ...]:
    m = len(log_z)
    if draws.shift is None or m < 4:
        return ()
    shift = draws.shift.cpu().double()
    shift = torch.where(shift.isfinite(), shift, 0.0)
    mean, stderr = shift.mean(0), shift.std(0) / math.sqrt(m)
    p = 2 * torch.as_tensor(special.stdtr(m - 1, -(mean / stderr).abs().nan_to_num().numpy()))
    moved = torch.cat([holm(p[:HEIGHTS], LEVEL), holm(p[HEIGHTS:], LEVEL)])
    if not bool(moved.any()):
        return ()
    which = int(torch.where(moved, p, 1.0).argmin())
    heights = ("log_prob", "the share of the highest 10%", "the share of the highest 2%")
    what = heights[which] if which < HEIGHTS else f"coordinate {which - HEIGHTS}"
    return (flag("UNSETTLED", value=float(p[which]), threshold=LEVEL, detail=f"{what} moved by {float(mean[which]):.3g}; p value"),)
