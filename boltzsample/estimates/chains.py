"""Error bars of the mean of z (units, draws, k) over M chains of N draws (TRUST 2(a)).

A1, within chains (long chains). Split every chain in two; with acov_t the autocovariance at lag t averaged over the half-chains,
W = mean of their variances s_m^2, n their length and var+ = (n-1)/n W + var(chain means),

    rho_t = 1 - (W - acov_t) / var+,      P_j = rho_2j + rho_2j+1,      tau = -1 + 2 sum_j P_j,      se^2 = var+ tau / (M N),

the sum stopping at the first negative P_j and made monotone (Geyer 1992, Stat. Sci. 7, 473; Vehtari, Gelman, Simpson, Carpenter &
Burkner 2021, Bayesian Anal. 16, 667, eqs. 3 and 10-12). tau >= 1 / log10(M N), with a flag.

A2, between chains (any N, any autocorrelation): y_m the mean of chain m, se = sd_m(y) / sqrt(M), Student t with M - 1 degrees.

The rule: M >= 16 gives A2; 4 <= M < 16 the larger of both; M < 4 gives A1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from boltzsample.estimates.columns import located
from boltzsample.estimates.intervals import f_quantile, hall_interval, t_interval
from boltzsample.flags import Flag, flag

BETWEEN = 16  # chains from which the between-chain bar stands alone
WORTH = 1.5  # independent draws that a chain must be worth
SHORT = 8  # draws below which a chain says nothing about its own autocorrelation


class Bar(NamedTuple):
    """Error bars of k means, in the units of the columns; `lower` and `upper` are the ends of the 95% interval minus the mean."""

    stderr: Tensor
    df: Tensor
    lower: Tensor
    upper: Tensor
    method: str
    flags: tuple[Flag, ...] = ()


class Within(NamedTuple):
    """A1: standard error, autocorrelation time, its degrees of freedom, and whether tau met its floor; all (k,)."""

    stderr: Tensor
    tau: Tensor
    df: Tensor
    floored: Tensor


def mean_bar(z: Tensor) -> Bar:
    """The error bar of the mean of z (units, draws, k) by the rule above, with its flags; for one draw per unit, see iid.py."""
    m, n, _ = z.shape
    if m >= BETWEEN or (n < SHORT and m >= 2):
        bar = between(z)
        return bar._replace(flags=_short_chains(bar, z) if m >= 4 else (flag("FEW_UNITS", value=m, threshold=4),))
    if n < SHORT:
        nan = z.new_full(z.shape[2:], math.nan)
        return Bar(nan, nan, nan, nan, "none: one short chain", (flag("ONE_UNIT"), flag("NO_ERROR_BAR")))
    a1 = within(z)
    flags = located("TAU_FLOORED", a1.floored, a1.tau, worst=min)
    if m < 8:
        flags += located("TAU_UNRESOLVED", n < 50 * a1.tau, a1.tau, n / 50)
    if m < 4:
        few = flag("ONE_UNIT") if m == 1 else flag("FEW_UNITS", value=m, threshold=4)
        return Bar(a1.stderr, a1.df, *t_interval(a1.stderr, a1.df), f"within {m} chain{'s' * (m > 1)}", (few, *flags))
    return _larger(between(z), a1, m, n, flags)


def _short_chains(bar: Bar, z: Tensor) -> tuple[Flag, ...]:
    """TAU_UNRESOLVED: a whole chain is worth hardly more than one draw: the bar holds only if the starts were draws of the target."""
    m, n, _ = z.shape
    worth = z.flatten(0, 1).var(0) / bar.stderr.square() / m
    return located("TAU_UNRESOLVED", (worth < WORTH) & (n > WORTH), worth, WORTH, worst=min, detail="a chain is worth this many draws")


def between(z: Tensor) -> Bar:
    """A2: Student t over the means of the chains, with Hall's correction for their skewness."""
    m = z.shape[0]
    y = z.mean(1)  # (units, k)
    stderr = y.std(0) / math.sqrt(m)
    df = torch.full_like(stderr, m - 1)
    return Bar(stderr, df, *hall_interval(y, stderr), f"between {m} chains" if z.shape[1] > 1 else f"{m} independent draws")


def within(z: Tensor) -> Within:
    """A1 for z (units, draws >= 8, k)."""
    m, n = z.shape[0], z.shape[1] // 2
    halves = torch.cat([z[:, :n], z[:, -n:]])  # (2 units, n, k)
    tau = autocorrelation_time(halves)
    floor = 1 / math.log10(2 * m * n)
    var = _var_plus(halves)
    stderr = (var * tau.clamp(min=floor) / (2 * m * n)).sqrt()
    # the spectral density at 0 comes from a window of about 3 tau lags on each side: its degrees of freedom are the number of such windows
    df = torch.clamp(2 * m * n / (6 * tau.clamp(min=1)), min=1.0)
    return Within(stderr, tau.clamp(min=floor), df, tau < floor)


def autocorrelation_time(z: Tensor) -> Tensor:
    """tau (k,) of chains z (chains, n, k); disagreement of the chain means counts as correlation (Vehtari et al. 2021, eq. 10)."""
    n = z.shape[1]
    acov = _autocovariance(z)
    total, _ = _geyer(1 - (acov[0] * n / (n - 1) - acov) / _var_plus(z))
    return torch.nan_to_num(2 * total - 1, nan=1.0)


def inner_autocorrelation_time(z: Tensor) -> Tensor:
    """tau (k,) inside the chains z (chains, n, k), blind to their means. Centring at a chain's own mean lowers every autocovariance by the
    variance of that mean, tau var / n. Putting it back in the L lags summed, tau = -1 + 2 S (1 - tau/n) + 2 L tau/n, is solved for tau."""
    acov = _autocovariance(z)
    total, lags = _geyer(acov / acov[0])
    return torch.nan_to_num((2 * total - 1) / (1 - 2 * (lags - total) / z.shape[1]).clamp(min=0.25), nan=1.0)


def _geyer(rho: Tensor) -> tuple[Tensor, Tensor]:
    """The sum S (k,) of the initial positive monotone sequence of pairs of rho (n, k), whose first row counts as 1, and its lags L (k,)."""
    n, k = rho.shape
    rho = torch.cat([torch.ones_like(rho[:1]), rho[1:]])
    pairs = rho[: n // 2 * 2].reshape(-1, 2, k).sum(1)
    positive = (pairs > 0).long().cumprod(0)
    return (pairs.cummin(0).values * positive).sum(0), 2.0 * positive.sum(0)


def _autocovariance(z: Tensor) -> Tensor:
    """Mean over chains of the autocovariance, 1/n scaling, by FFT with zero padding: (chains, n, k) -> (n, k)."""
    n = z.shape[1]
    padded = 2 ** math.ceil(math.log2(2 * n))
    block = max(1, 2**22 // (z.shape[0] * padded))  # columns at a time: the spectra are complex and twice as long
    parts = []
    for part in z.split(block, dim=-1):
        spectrum = torch.fft.rfft(part - part.mean(1, keepdim=True), padded, dim=1)
        parts.append(torch.fft.irfft(spectrum.abs().square().mean(0), padded, dim=0)[:n] / n)
    return torch.cat(parts, -1)


def _var_plus(z: Tensor) -> Tensor:
    n = z.shape[1]
    spread = z.mean(1).var(0) if z.shape[0] > 1 else z.new_zeros(z.shape[2:])
    return (n - 1) / n * z.var(1).mean(0) + spread


def _larger(a2: Bar, a1: Within, m: int, n: int, flags: tuple[Flag, ...]) -> Bar:
    ratio = (a2.stderr / a1.stderr).square()
    low, high = f_quantile(0.001, m - 1, a1.df), f_quantile(0.999, m - 1, a1.df)
    disagree = ((ratio < low) | (ratio > high)) & (n >= 50 * a1.tau)  # A1 is biased low on shorter chains, and A2 is used then anyway
    flags += located("BARS_DISAGREE", disagree, ratio.sqrt())
    use1 = a1.stderr > a2.stderr
    lower, upper = t_interval(a1.stderr, a1.df)
    return Bar(
        torch.where(use1, a1.stderr, a2.stderr),
        torch.where(use1, a1.df, a2.df),
        torch.where(use1, lower, a2.lower),
        torch.where(use1, upper, a2.upper),
        f"larger of between and within {m} chains",
        flags,
    )
