"""Is `grad_log_prob` the gradient of `log_prob`? Central differences along random directions,

    log p(x + delta) - log p(x - delta) = 2 delta . grad log p(x) + O(|delta|^3),       delta_i = eps^(1/3) scale_i xi_i,

with xi ~ N(0, I) and scale_i the spread of the points in coordinate i. A correct gradient agrees at one step at least: where a
density is narrower than its starts a smaller step is needed, where log p is noisy a larger one; a wrong one agrees at none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from boltzsample.errors import DeviceError, DtypeError, GradMismatchError, InitFailed, MutatesInputError
from boltzsample.target import Target, as_given

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Checked:
    """What a check found and what it cost: rows of `log_prob`, and rows of `log_prob_and_grad`."""

    has_gradient: bool
    log_prob_rows: int
    grad_rows: int


def check_gradient(target: Target, x: Tensor) -> Checked:
    """Asks for a finite gradient at the first four rows of x (k, dim), where log_prob is finite, and compares it with central differences
    along two directions at three of them. All rows of x say how wide the differences are.

    Relative tolerance 1e-3 in float64 and 2e-2 in float32, beyond what rounding of log p explains. A pair that disagrees is tried
    again with other steps; the gradient is wrong where none of them agrees with it (in float32, at more than
    one point). Raises GradMismatchError with the point and both numbers, InitFailed where a point has
    no finite log_prob.

    >>> from boltzsample.adapters import from_log_prob
    >>> halved = from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=1, grad=lambda x: -0.5 * x)
    >>> check_gradient(halved, torch.tensor([[1.0], [3.0]], dtype=torch.float64))
    Traceback (most recent call last):
    boltzsample.errors.GradMismatchError: at x = [1] the slope of log_prob is ... by central differences and ... by the gradient; ...
    """
    points = x[:4]
    with plain(x):
        log_p, grad = ask(lambda y: as_given(target, y), points)
        _check_finite(points, log_p, grad)
        rows = _compare(target, points[:3], log_p[:3], grad[:3], _scale(x))
    return Checked(True, rows, len(points))


def _check_finite(x: Tensor, log_p: Tensor, grad: Tensor) -> None:
    for at, value, slope in zip(x, log_p, grad, strict=True):
        if not value.isfinite():
            raise InitFailed(f"log_prob is {value:.4g} at the start x = {show(at)}, wanted a finite number; give other starts")
        if not slope.isfinite().all():
            raise GradMismatchError(
                f"the gradient is {show(slope)} at x = {show(at)} where log_prob is {value:.6g}, wanted finite numbers; "
                "look for sqrt or log at 0, 0 * inf, or a torch.where whose unused branch overflows"
            )


def _scale(x: Tensor) -> Tensor:
    """How wide the points lie in each coordinate; the size of the coordinate itself where they all agree; 1 where that is 0."""
    spread = (x.amax(0) - x.amin(0)) / 2
    size = x.abs().amax(0)
    spread = torch.where(spread > 1e3 * torch.finfo(x.dtype).eps * size, spread, size)
    return torch.where(spread > 0, spread, 1.0)


def _compare(target: Target, x: Tensor, log_p: Tensor, grad: Tensor, scale: Tensor) -> int:
    """Compares along two directions per point, with other steps where they disagree. Returns the rows of log_prob asked."""
    eps = torch.finfo(x.dtype).eps
    xi = torch.randn(len(x), 2, x.shape[-1], generator=torch.Generator("cpu").manual_seed(3), dtype=torch.float64, device="cpu")
    steps = (eps ** (1 / 3) * scale * xi.to(x)).flatten(0, 1)
    x, log_p, grad = (t.repeat_interleave(2, 0) for t in (x, log_p, grad))
    noise = 8 * eps * log_p.abs().clamp(min=1.0)
    slopes = torch.full_like(torch.stack([log_p, log_p], -1), torch.nan)  # by differences and by the gradient where they quarrel
    undecided, rows = torch.arange(len(x), device=x.device), 0
    for factor in (1.0, 2.0**-2, 2.0**-5, 2.0**-10, 2.0**-15, 2.0**5):
        i = undecided
        pair, agree, clear = _along(target, x[i], log_p[i], grad[i], factor * steps[i], noise[i])
        rows += 2 * len(i)
        heard = pair.isfinite().all(-1) & (clear | slopes[i, 0].isnan())  # a quarrel is not settled by noise
        slopes[i] = torch.where(heard[:, None], pair.where(~agree[:, None], torch.nan), slopes[i])
        undecided = i[~(heard & agree)]
        if not len(undecided):
            return rows
    quarrel = ~slopes[:, 0].isnan()
    troubled = quarrel.view(-1, 2).any(-1).sum()
    if troubled > (0 if x.dtype == torch.float64 or len(x) == 2 else 1):  # float32 steps are wide enough to meet a kink at one point
        _raise_first(x[quarrel], slopes[quarrel])
    return rows


def _along(
    target: Target, x: Tensor, log_p: Tensor, grad: Tensor, delta: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The slopes (n, 2) along delta by differences and by the gradient; whether they agree; whether they stand out of rounding.

    At an optimum both are nearly 0, and what differs is the third derivative: the bend of log_prob over the step counts as size.
    """
    up, down = x + delta, x - delta
    ends = ask(target.log_prob, torch.cat([up, down]))
    difference, terms = ends[: len(x)] - ends[len(x) :], grad * (up - down)  # the step as rounding made it
    predicted = terms.sum(-1)
    bend = (ends[: len(x)] + ends[len(x) :] - 2 * log_p).abs().nan_to_num(nan=0.0, posinf=0.0)
    size = difference.abs().maximum(predicted.abs()).maximum(terms.square().sum(-1).sqrt()).maximum(bend)
    tolerance = 1e-3 if x.dtype == torch.float64 else 2e-2
    agree = (difference - predicted).abs() <= tolerance * size + noise
    return torch.stack([difference, predicted], -1) / (up - down).norm(dim=-1, keepdim=True), agree, noise < 0.1 * size


def _raise_first(x: Tensor, slopes: Tensor) -> None:
    measured, said = slopes[0].tolist()
    raise GradMismatchError(
        f"at x = {show(x[0])} the slope of log_prob is {measured:.6g} by central differences and {said:.6g} by the gradient; "
        "look for detach(), clamp, rounding or a custom backward, or leave grad= out to let autograd supply it"
    )


def ask(fn: Callable[[Tensor], Returned], x: Tensor) -> Returned:
    """fn of a fresh copy of x, which it must leave as it is; torch's own words on mixed dtypes and devices become ours."""
    y = x.clone(memory_format=torch.contiguous_format)
    version = y._version
    try:
        out = fn(y)
    except RuntimeError as error:
        if re.search("same dtype|expected scalar type|same data type", str(error)):
            raise DtypeError(
                f"the density mixes dtypes at points of {x.dtype}; make its constants follow x.dtype, as in a.to(x)"
            ) from error
        if "same device" in str(error):
            raise DeviceError(f"the density mixes devices at points on {x.device}; move its constants there, as in a.to(x)") from error
        raise
    if y._version != version or y.requires_grad or not torch.equal(y.detach(), x):
        done = "set requires_grad on" if y.requires_grad else "wrote to"
        raise MutatesInputError(
            f"the density {done} the points it was given; work on a copy, x.clone() or x.detach(), without in-place operations"
        )
    return out


@contextmanager
def plain(x: Tensor) -> Iterator[None]:
    """The modes that samplers run in, whatever the caller's: normal tensors, no graph, no autocast."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield


def show(x: Tensor, digits: int = 6) -> str:
    """A point, its first six coordinates."""
    return "[" + ", ".join(f"{v:.{digits}g}" for v in x[:6].tolist()) + (", ...]" if x.numel() > 6 else "]")
