"""Columns: the values of f, brought to one form.

y (units, draws, *shape) of any dtype becomes z (units, draws, k) in float64 on the CPU with z = (y - centre) / scale, so that every
bar and check below is invariant under y -> a + b y, and a mean far larger than the spread loses no digits: the centre is subtracted
first and the mean of what is left is added to it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from boltzsample.draws import Draws
from boltzsample.errors import ShapeError
from boltzsample.flags import Flag, Severity, flag

P = ParamSpec("P")
T = TypeVar("T")


def on_cpu(f: Callable[P, T]) -> Callable[P, T]:
    """f, with new tensors born on the CPU whatever the user's default device is. A device context costs every torch call within it a
    detour through Python: it is entered only where it is needed, and once."""

    @wraps(f)
    def cpu_f(*args: P.args, **kwargs: P.kwargs) -> T:
        with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"), torch.no_grad():
            return f(*args, **kwargs)

    return cpu_f


@dataclass(frozen=True)
class Columns:
    """f in standard units: `z` (units, draws, k) has mean 0 and variance 1, weighted as the draws are, in
    each column that is neither constant nor non-finite."""

    z: Tensor  # (units, draws, k); 0 in columns with a NaN or inf
    centre: Tensor  # (k,), the pooled mean
    scale: Tensor  # (k,), the pooled standard deviation, 1 where it is 0
    finite: Tensor  # (k,) bool
    constant: Tensor  # (k,) bool: the same value at every draw
    binary: Tensor  # (k,) bool: only the values 0 and 1 (or f is boolean)
    coarse: Tensor  # (k,): 2^-digits of f's dtype at the mean, in units of the scale
    shape: torch.Size  # of f

    def back(self, z: Tensor) -> Tensor:
        """A deviation in standard units, in the units of f."""
        return z * self.scale

    def shaped(self, value: Tensor) -> Tensor:
        """(..., k) back to (..., *shape)."""
        return value.reshape(value.shape[:-1] + self.shape)

    def standard(self, y: Tensor) -> Tensor:
        """f elsewhere, y (*batch, *shape), in standard units (*batch, k)."""
        flat = y.detach().to("cpu", torch.float64).reshape(*y.shape[: y.ndim - len(self.shape)], -1)
        return (flat - self.centre) / self.scale

    def standard_start(self, y_start: Tensor | None) -> Tensor | None:
        """f at the starts (units, *shape) in standard units (units, k)."""
        return None if y_start is None else self.standard(y_start)


def columns(y: Tensor, draws: Draws) -> Columns:
    """The columns of y (units, draws, *shape). Raises ShapeError where y does not belong to the draws."""
    batch = draws.x.shape[:2]
    if y.shape[:2] != batch:
        raise ShapeError(f"f has shape {tuple(y.shape)}; wanted (units, draws) = {tuple(batch)} in front, one value of f per draw")
    flat = y.detach().to("cpu", torch.float64).reshape(*batch, -1)
    finite = flat.isfinite().all(0).all(0)
    flat = torch.where(finite, flat, torch.zeros(()).double())
    pooled = flat.flatten(0, 1)
    constant = (pooled == pooled[0]).all(0)
    binary = ((pooled == 0) | (pooled == 1)).all(0) & finite

    size, share = torch.clamp(pooled.abs().amax(0), min=torch.finfo(torch.float64).tiny), _shares(draws)
    centre = (share * (pooled / size)).sum(0) * size  # dividing by the size first: a sum of values near 1e308 would overflow
    centre = torch.where(constant, pooled[0], centre + (share * (pooled - centre)).sum(0))
    deviation = flat - centre
    reach = deviation.abs().flatten(0, 1).amax(0)
    reach = torch.where(reach > 0, reach, torch.ones_like(reach))
    bessel = len(pooled) / max(len(pooled) - 1, 1)
    spread = (share * (deviation / reach).flatten(0, 1).square()).sum(0).mul(bessel).sqrt() * reach
    scale = torch.where(constant | (spread == 0), torch.ones_like(spread), spread)
    z = torch.where(constant, torch.zeros(()).double(), deviation / scale)
    coarse = (torch.finfo(y.dtype).eps if y.is_floating_point() else 0.0) * centre.abs() / scale
    return Columns(z, centre, scale, finite, constant, binary, coarse, y.shape[2:])


def _shares(draws: Draws) -> Tensor:
    """The normalized weights of all draws (units * draws, 1). A proposal with long tails has draws whose f is 1e18 and whose weight is
    next to nothing: about an unweighted centre every digit of the weighted mean would be lost."""
    n = draws.x.shape[0] * draws.x.shape[1]
    if draws.log_weight is None or not bool(draws.log_weight.max().isfinite()):
        return torch.full((n, 1), 1 / n, dtype=torch.float64)
    return torch.softmax(draws.log_weight.detach().to("cpu", torch.float64).flatten(), 0)[:, None]


def located(
    code: str,
    where: Tensor,
    value: Tensor,
    threshold: float | None = None,
    *,
    severity: Severity | None = None,
    detail: str = "",
    worst: Callable[[list[float]], float] = max,
) -> tuple[Flag, ...]:
    """One flag for the columns `where` (k,) is true, carrying the worst of their values; none where it is true nowhere."""
    index = tuple(where.nonzero().flatten().tolist())
    if not index:
        return ()
    return (flag(code, value=worst(value[where].tolist()), threshold=threshold, severity=severity, detail=detail, index=index),)


def unlocated(flags: tuple[Flag, ...], shape: torch.Size) -> tuple[Flag, ...]:
    """The flags of a scalar f concern no component in particular."""
    return flags if len(shape) else tuple(replace(f, index=None) for f in flags)


def holm(p: Tensor, level: float) -> Tensor:
    """Which of the p-values (k,) are rejected at family level `level` (Holm 1979, Scand. J. Stat. 6, 65): (k,) bool. NaN never is."""
    ordered, order = torch.where(p.isnan(), torch.ones_like(p), p).sort()
    keep = (ordered * torch.arange(len(p), 0, -1) <= level).long().cumprod(0).bool()
    return torch.zeros_like(keep).scatter(0, order, keep)
