"""Expectations, standard deviations, probabilities and covariances with error bars that hold (TRUST 2(a), (b)).

    expectation: the mean over all draws, bar between or within chains (chains.py); one draw per unit is the case of independent draws.
    sd:          v = mean c^2 + Var(mean), c = x - mean; the bar of mean c^2 (its own ESS, not that of x), interval by the square root.
    probability: the mean of an indicator; few hits: Clopper-Pearson with the effective number of draws; none: the rule of three.
    covariance:  C_ij = mean c_i c_j + Cov(mean_i, mean_j), bar from the influence function c_i c_j.

ess is the variance of f over stderr^2: the number of independent draws with the same bar.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from boltzsample.draws import Draws, Estimate
from boltzsample.errors import ShapeError
from boltzsample.estimates.assembly import effective_draws, ess_flags, finish, in_units, no_mean, probability_bar, refuse
from boltzsample.estimates.chains import mean_bar
from boltzsample.estimates.columns import Columns, columns, located, on_cpu, unlocated
from boltzsample.estimates.diagnostics import COARSE, checks
from boltzsample.estimates.far import moment_flags
from boltzsample.estimates.weighted import usable, weighted_bar, weighted_expectation, weights
from boltzsample.flags import Flag

MAX_BYTES = 2**31


@on_cpu
def expectation(y: Tensor, draws: Draws, y_start: Tensor | None = None, y_far: Tensor | None = None) -> Estimate:
    """E f from y (units, draws, *shape), the values of f at the draws; `y_start` (units, *shape) are those at the chains' starts, and
    `y_far` (3, rays, *shape) at draws.far.

    Boolean f, or f of values 0 and 1 only, is treated as a probability. Raises ShapeError.

    >>> import torch
    >>> x = torch.randn(64, 50, 1, generator=torch.Generator().manual_seed(0))
    >>> expectation(x[..., 0], Draws.from_arrays(x))
    -0.007 +- 0.040 (95%, ok)
    """
    if draws.log_weight is not None:
        return weighted_expectation(y, draws, y_far)
    f = columns(y, draws)
    bar = mean_bar(f.z)
    flags = bar.flags + checks(f, draws, y_start)
    ess = effective_draws(f, bar)
    if bool(f.binary.any()):
        bar, ess, rare = probability_bar(f, bar, ess, draws)
        flags += rare
    flags += moment_flags(f, y_far, draws.fall, ess)
    bar, more = refuse(f, bar, flags)
    flags += more + ess_flags(ess, f)
    heavy = no_mean(flags, len(ess))
    value = torch.where(f.finite & ~heavy, f.centre, torch.full_like(f.centre, math.nan))
    return finish(f, value, in_units(f, bar), ess, flags, draws)


@on_cpu
def probability(event: Tensor, draws: Draws, y_start: Tensor | None = None) -> Estimate:
    """P(event) from `event` (units, draws, *shape), boolean or of values 0 and 1. Raises ShapeError, ValueError.

    >>> import torch
    >>> x = torch.randn(64, 50, 1, generator=torch.Generator().manual_seed(0))
    >>> probability(x[..., 0] > 1, Draws.from_arrays(x))
    0.158 +- 0.013 (95%, ok)
    """
    if event.dtype != torch.bool and not bool(((event == 0) | (event == 1)).all()):
        raise ValueError("an event has other values than True and False; did you mean expectation(f), or f(x) > c?")
    return expectation(event.bool(), draws, y_start)


@on_cpu
def sd(y: Tensor, draws: Draws, y_start: Tensor | None = None, y_far: Tensor | None = None) -> Estimate:
    """The standard deviation of f from y (units, draws, *shape); starts and far points as `expectation`. Raises ShapeError.

    >>> import torch
    >>> x = torch.randn(64, 50, 1, generator=torch.Generator().manual_seed(0))
    >>> sd(x[..., 0], Draws.from_arrays(x))
    1.002 +- 0.027 (95%, ok)
    """
    f = columns(usable(y, draws), draws)
    c, var_mean = _centred(f.z, draws)
    start = f.standard_start(y_start)
    far = None if y_far is None else f.standard(y_far).square()
    squares = expectation(c.square(), draws, None if start is None else start.square(), far)
    v = squares.value + var_mean.diagonal()
    root = v.sqrt()
    ends = (v + squares.interval - squares.value).clamp(min=0).sqrt()
    flags = squares.flags + _unsettled(f.z, draws, start) + located("COARSE_F", f.coarse > COARSE, f.coarse, COARSE) + bad_values(f)
    return _restated(f, squares, root, squares.stderr / (2 * root), ends, flags)


@on_cpu
def covariance(y: Tensor, draws: Draws, y_far: Tensor | None = None) -> Estimate:
    """The covariance matrix (k, k) of f from y (units, draws, k). Raises ShapeError.

    >>> import torch
    >>> x = torch.randn(64, 50, 2, generator=torch.Generator().manual_seed(0))
    >>> covariance(x, Draws.from_arrays(x)).value.shape
    torch.Size([2, 2])
    """
    if y.ndim != 3 or y.numel() * (y.shape[-1] + 1) * 4 > MAX_BYTES:
        wanted = "(units, draws, k) with k(k+1)/2 products per draw within 2 GiB: choose fewer components"
        raise ShapeError(f"f has shape {tuple(y.shape)}; wanted {wanted}")
    f = columns(usable(y, draws), draws)
    c, var_mean = _centred(f.z, draws)
    i, j = torch.triu_indices(len(f.centre), len(f.centre)).unbind(0)
    far = None if y_far is None else f.standard(y_far)
    products = expectation(c[..., i] * c[..., j], draws, None, None if far is None else far[..., i] * far[..., j])
    shift = var_mean[i, j]
    pairs = replace(f, scale=f.scale[i] * f.scale[j], finite=f.finite[i] & f.finite[j], shape=i.shape)
    means = [replace(m, index=_touching(m.index, i, j)) for m in _unsettled(f.z, draws, None)]
    flags = (*products.flags, *means, *bad_values(pairs))
    full = _restated(pairs, products, products.value + shift, products.stderr, products.interval + shift, flags)
    return _symmetric(full, i, j, len(f.centre))


UNSETTLED = {"NESTED_RHAT", "RHAT", "DRIFT", "START_MEMORY", "TAU_UNRESOLVED", "BARS_DISAGREE"}


def _unsettled(z: Tensor, draws: Draws, start: Tensor | None) -> tuple[Flag, ...]:
    """What is to be said of the means of z: a spread about means that chains do not share is the spread of their starts.

    Two far modes have the same (x - m)^2 everywhere, so its own checks stay quiet.
    """
    return tuple(f for f in expectation(z, draws, start).flags if f.code in UNSETTLED and f.severity != "info")


def _touching(index: tuple[int, ...] | None, i: Tensor, j: Tensor) -> tuple[int, ...] | None:
    """The pairs (i, j) that one of the components is part of."""
    if index is None:
        return None
    return tuple(p for p, (a, b) in enumerate(zip(i.tolist(), j.tolist(), strict=True)) if a in index or b in index)


def bad_values(f: Columns) -> tuple[Flag, ...]:
    return located("NONFINITE_F", ~f.finite, torch.ones_like(f.scale))


def _centred(z: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """z (units, draws, k) minus its mean, and the (k, k) covariance of that mean, which the centring took away."""
    w = None if draws.log_weight is None else weights(draws.log_weight)
    if w is not None:
        mean, _, g = weighted_bar(z, w)
        influence = g.sum(1)  # (units, k)
        return z - mean, influence.T @ influence
    y = z.mean(1)
    return z, y.T @ y / (len(y) * max(len(y) - 1, 1))


def _restated(f: Columns, squares: Estimate, value: Tensor, stderr: Tensor, ends: Tensor, flags: tuple[Flag, ...]) -> Estimate:
    """A second-moment estimate, in units of f's scale, brought back to f's units and shape."""
    nan = torch.full_like(value, math.nan)
    value, stderr, df, low, high = (torch.where(f.finite, v, nan) for v in (value, stderr, squares.df, *ends))
    ends = f.shaped(torch.stack([f.back(low), f.back(high)]))
    value, stderr, df, ess = (f.shaped(v) for v in (f.back(value), f.back(stderr), df, squares.ess))
    return Estimate(value, stderr, df, ends, ess, squares.method, squares.witnesses, unlocated(flags, f.shape))


def _symmetric(pairs: Estimate, i: Tensor, j: Tensor, k: int) -> Estimate:
    """Upper-triangle components (k(k+1)/2,) to (k, k), flags included."""
    where = torch.zeros(k, k, dtype=torch.long)
    where[i, j] = where[j, i] = torch.arange(len(i))
    number = where.flatten().tolist()
    value, stderr, df, ends, ess = (v[..., where] for v in (pairs.value, pairs.stderr, pairs.df, pairs.interval, pairs.ess))
    flags = tuple(
        g if g.index is None else replace(g, index=tuple(c for c, pair in enumerate(number) if pair in set(g.index))) for g in pairs.flags
    )
    return Estimate(value, stderr, df, ends, ess, pairs.method, pairs.witnesses, flags)
