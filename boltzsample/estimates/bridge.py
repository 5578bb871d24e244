"""log Z by bridge sampling between draws of the target and draws of a known law q (TRUST 2(f)).

With l = log ptilde - log q at N1 draws of the target and n2 independent draws of q, s1 = n1 / (n1 + n2), n1 the effective number of
the N1, s2 = 1 - s1, the optimal bridge of Meng & Wong (1996, Statistica Sinica 6, 831, equation 4.1) solves

    r = mean_q[ e^l / (s1 e^l + s2 r) ] / mean_p[ 1 / (s1 e^l + s2 r) ],      log Z = log r.

With p = ptilde / r, f1 = p / (s1 p + s2 q) at the draws of q, f2 = q / (s1 p + s2 q) at those of the target,

    se^2 = log(1 + var(f1) / (n2 mean(f1)^2) + var(mean of f2) / mean(f2)^2)        (Fruhwirth-Schnatter 2004, Econometrics J. 7, 143),

the second variance between the means of independent chains, so that autocorrelation is in it. q must not have been fitted to
these very draws. No overlap gives a small se: the overlap of p and q, int min(p, q), is estimated too and must reach .05.
A mode that both miss is missing from log Z.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from boltzsample.draws import Estimate
from boltzsample.errors import ShapeError
from boltzsample.estimates.chains import between
from boltzsample.estimates.columns import on_cpu
from boltzsample.estimates.intervals import t_quantile
from boltzsample.flags import Flag, flag

ROUNDS = 1000
LEAST_OVERLAP = 0.05


@on_cpu
def bridge(target_side: Tensor, q_side: Tensor, group: Tensor | None = None) -> Estimate:
    """log Z from l = log ptilde - log q at draws of the target (chains, draws) and at draws of q (n,), float64. `group` (chains,)
    numbers the starts that chains share: the spread between starts counts where it is the larger one.

    A single chain has no error bar (NO_ERROR_BAR). Raises ShapeError for fewer than two draws of q.

    >>> import torch
    >>> rng = torch.Generator().manual_seed(0)
    >>> x, y = torch.randn(64, 20, generator=rng).double(), 1.2 * torch.randn(1000, generator=rng).double()
    >>> l = lambda x: -0.5 * x**2 + 0.5 * (x / 1.2) ** 2 + math.log(1.2)            # Z = sqrt(2 pi), q normalized without it
    >>> bridge(l(x), l(y))
    -0.000 +- 0.011 (95%, ok)
    """
    if target_side.ndim != 2 or q_side.ndim != 1 or len(q_side) < 2:
        came = f"{tuple(target_side.shape)} and {tuple(q_side.shape)}"
        raise ShapeError(f"bridge got shapes {came}; wanted (chains, draws) and (n,) with n of 2 or more")
    if len(target_side) < 2:
        return _nothing((flag("ONE_UNIT"), flag("NO_ERROR_BAR")))
    lp, lq = target_side.double(), q_side.double().nan_to_num(nan=-torch.inf)
    n2 = len(lq)
    if not bool(lp.isfinite().all()) or not bool(lq.max().isfinite()):
        return _nothing((flag("BAD_WEIGHTS"),))
    log_r, n1 = float(lp.median()), float(lp.numel())
    for _ in range(2):  # once with all draws, once with their effective number
        log_r = _root(lp, lq, log_r, n1)
        n1 = _effective(_f2(lp, log_r, n1, n2))
    log_r = _root(lp, lq, log_r, n1)
    return _estimate(lp, lq, log_r, n1, group)


def _root(lp: Tensor, lq: Tensor, log_r: float, n1: float) -> float:
    """The fixed point of log r, from a start."""
    log_s1, log_s2 = _shares(n1, len(lq))
    for _ in range(ROUNDS):
        above = (lq - torch.logaddexp(log_s1 + lq, log_s2 + log_r)).logsumexp(0) - math.log(len(lq))
        below = (-torch.logaddexp(log_s1 + lp, log_s2 + log_r)).flatten().logsumexp(0) - math.log(lp.numel())
        new = float(above - below)
        if abs(new - log_r) < 1e-10:
            return new
        log_r = new
    return log_r


def _shares(n1: float, n2: int) -> tuple[Tensor, Tensor]:
    s = torch.tensor([n1, n2], dtype=torch.float64).log()
    return s[0] - s.logsumexp(0), s[1] - s.logsumexp(0)


def _f2(lp: Tensor, log_r: float, n1: float, n2: int) -> Tensor:
    log_s1, log_s2 = _shares(n1, n2)
    return (-torch.logaddexp(log_s1 + lp - log_r, log_s2)).exp()


def _effective(f2: Tensor) -> float:
    """The number of independent draws with the same error of the mean."""
    stderr = float(between(f2[..., None]).stderr[0])
    return min(float(f2.var()) / stderr**2, float(f2.numel())) if stderr > 0 else float(f2.numel())


def _estimate(lp: Tensor, lq: Tensor, log_r: float, n1: float, group: Tensor | None) -> Estimate:
    n2, chains = len(lq), len(lp)
    log_s1, log_s2 = _shares(n1, n2)
    f1, f2 = (lq - log_r - torch.logaddexp(log_s1 + lq - log_r, log_s2)).exp(), _f2(lp, log_r, n1, n2)
    of_q = f1.var() / (n2 * f1.mean().square())
    of_p, units = f2.mean(1).var() / (chains * f2.mean().square()), chains
    if group is not None and 1 < (starts := int(group.max()) + 1) < chains:
        means = torch.bincount(group.cpu(), weights=f2.mean(1)) / torch.bincount(group.cpu())
        between_starts = means.var() / (starts * f2.mean().square())
        of_p, units = (between_starts, starts) if between_starts > of_p else (of_p, units)
    stderr = torch.log1p(of_q + of_p).sqrt()
    df = (of_q + of_p).square() / (of_q.square() / (n2 - 1) + of_p.square() / (units - 1))  # Welch & Satterthwaite
    overlap = float(torch.minimum((lq - log_r).exp(), torch.ones_like(lq)).mean())
    flags: tuple[Flag, ...] = ()
    if overlap < LEAST_OVERLAP:
        flags += (flag("NO_OVERLAP", value=overlap, threshold=LEAST_OVERLAP),)
    if not float(stderr) > 0:
        return _nothing((flag("NO_ERROR_BAR"),))
    value, half = torch.tensor(log_r, dtype=torch.float64), t_quantile(0.975, df) * stderr
    method = f"bridge sampling, {chains} chains and {n2:,} draws of the proposal, overlap {overlap:.2f}"
    return Estimate(value, stderr, df, torch.stack([value - half, value + half]), stderr.square().expm1().pow(-1), method, (), flags)


def _nothing(flags: tuple[Flag, ...]) -> Estimate:
    nan = torch.tensor(math.nan, dtype=torch.float64)
    return Estimate(nan, nan, nan, torch.stack([nan, nan]), nan, "bridge sampling", (), flags)
