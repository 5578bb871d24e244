"""A user's function at the draws: evaluated once, checked at the door, and never allowed to write to the draws."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from boltzsample.errors import BatchCrosstalkError, DtypeError, ShapeError

Values = Tensor | dict[str, Tensor]
Functional = Callable[[Any], Tensor]


def evaluate(f: Functional, values: Values, batch: torch.Size) -> Tensor:
    """f at values (*batch, *shape): (*batch, *f's shape). f is handed a flat copy, and first three points alone.

    Three points asked alone show a wrong shape before time is spent, and an f that mixes its points (x - x.mean(0)):
    its draws would no longer be draws of one function, and no error bar would hold.
    """
    n, few = batch.numel(), min(3, batch.numel())
    alone = _checked(f(_copy(values, batch, few)), few)
    y = _checked(f(_copy(values, batch, n)), n)
    if alone.shape[1:] != y.shape[1:] or not _same(alone, y[:few]):
        raise BatchCrosstalkError(
            "f gave other values at three points alone than at the same points among all; wanted a function of one point at a time; "
            "replace sums and means over the batch (x.mean(0)) by numbers, such as result.expectation().value"
        )
    return y.reshape(*batch, *y.shape[1:])


def flat(values: Values, batch_ndim: int) -> Tensor:
    """All coordinates side by side, (*batch, coordinates), in the order of `labels`."""
    parts = list(values.values()) if isinstance(values, dict) else [values]
    return torch.cat([v.reshape(*v.shape[:batch_ndim], -1) for v in parts], -1)


def to_cpu(values: Values) -> Values:
    return {key: v.cpu() for key, v in values.items()} if isinstance(values, dict) else values.cpu()


def _copy(values: Values, batch: torch.Size, n: int) -> Any:
    """The first n points in one flat batch; a copy, because f may write to it."""
    if isinstance(values, dict):
        return {key: _copy(v, batch, n) for key, v in values.items()}
    return values.reshape(-1, *values.shape[len(batch) :])[:n].clone()


def _checked(value: Any, n: int) -> Tensor:
    y = torch.as_tensor(value).detach()
    if y.ndim == 0 or len(y) != n:
        raise ShapeError(
            f"f returned shape {tuple(y.shape)} for {n} points; wanted ({n},) or ({n}, k), one value (or k values) a point; "
            "index and sum over the last axis: x[..., 0], x.sum(-1)"
        )
    if y.is_complex():
        raise DtypeError(f"f returned {y.dtype}; wanted real numbers: take the real and the imaginary part separately")
    return y


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of float32 matrix products, whatever the scale."""
    a, b = a.double(), b.double()
    scale = float(a.nan_to_num(0.0, 0.0, 0.0).abs().amax()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * scale, equal_nan=True)


def indicator(y: Tensor) -> Tensor:
    """y, checked to be 0 or 1 everywhere."""
    if not ((y == 0) | (y == 1)).all():
        raise DtypeError("event returned numbers other than 0 and 1; wanted booleans: compare, as in lambda x: x[..., 0] > 2")
    return y


def component_names(name: str, shape: torch.Size) -> tuple[str, ...]:
    """The names of the components of a tensor: x[0], x[1], ...; name itself where it is a scalar."""
    return tuple(f"{name}[{', '.join(map(str, i))}]" for i in product(*map(range, shape))) if shape else (name,)
