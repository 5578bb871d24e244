"""What a density must be before any computing is spent on it; each failure is one sentence: what came, what was wanted, what to try.

`check_interface` asks at four arbitrary points (-inf is legal there): shape, dtype, device, the same answer twice, no dependence
between the points of a batch, batches of more axes, untouched input, no +inf, and whether there is a gradient. `check_gradient`
(gradcheck.py) asks at points of finite log-density for a finite gradient that agrees with differences of log_prob. Both say what
they cost, in rows of evaluations; no global state is touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from boltzsample.errors import (
    BatchCrosstalkError,
    DeviceError,
    DtypeError,
    GradMismatchError,
    MutatesInputError,
    NoGradient,
    NondeterministicError,
    PositiveInfinityError,
    ShapeError,
)
from boltzsample.gradcheck import Checked, ask, check_gradient, plain, show
from boltzsample.target import Target, as_given

__all__ = ["Checked", "check_gradient", "check_interface"]


def check_interface(target: Target, x: Tensor) -> Checked:
    """Asks `target` at the first four rows of x (k >= 4, dim), where log_prob may be -inf or NaN.

    Raises ShapeError, DtypeError, DeviceError, NondeterministicError, BatchCrosstalkError, MutatesInputError,
    PositiveInfinityError, or GradMismatchError where `log_prob_and_grad` and `log_prob` disagree; errors of the user's own code
    pass through unchanged.

    >>> from boltzsample.adapters import from_log_prob
    >>> check_interface(from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=2), torch.randn(4, 2))
    Checked(has_gradient=True, log_prob_rows=17, grad_rows=8)
    """
    _check_points(target, x)
    x = x[:4]
    with plain(x):
        log_p = ask(target.log_prob, x)
        _check_values(log_p, x)
        _check_agreement(target, x, log_p)
        _check_more_axes(target, x, log_p)
        has_gradient, grad_rows = _check_joint(target, x, log_p)
    return Checked(has_gradient, log_prob_rows=17, grad_rows=grad_rows)


def _check_points(target: Target, x: Tensor) -> None:
    kind = type(target).__name__
    missing = [name for name in ("dim", "log_prob", "grad_log_prob") if not hasattr(target, name)]
    if missing:
        raise TypeError(f"{kind} has no {' and no '.join(missing)}; add it, or pass from_log_prob(log_prob, dim) instead")
    if isinstance(target.dim, bool) or not isinstance(target.dim, int) or target.dim < 1:
        raise ShapeError(f"{kind}.dim is {target.dim!r}, wanted an int of 1 or more; give the number of coordinates of a point")
    if x.dim() != 2 or x.shape[0] < 4 or x.shape[1] != target.dim:
        raise ShapeError(f"got points of shape {tuple(x.shape)}, wanted (4 or more, {target.dim}); make the last axis the coordinates")
    if not x.is_floating_point():
        raise DtypeError(f"got points of dtype {x.dtype}, wanted floating point; convert them, for example by .double()")


def _check_values(log_p: object, x: Tensor) -> None:
    log_p = _check_tensor(log_p, x, "log_prob")
    if log_p.shape != x.shape[:-1]:
        hint = "sum over the coordinates with .sum(-1)"
        if log_p.shape == (*x.shape[:-1], 1):
            hint = "drop the last axis with .squeeze(-1), or sum over it with .sum(-1)"
        elif log_p.dim() == 0:
            hint = "sum over the coordinates only, .sum(-1), not over the points; or pass vectorized=False if it takes one point"
        elif log_p.shape == (len(x), len(x)):
            hint = "an (n,) met an (n, 1) and broadcast: sum every term with .sum(-1), without keepdim"
        raise ShapeError(f"log_prob of points {tuple(x.shape)} returned shape {tuple(log_p.shape)}, wanted {tuple(x.shape[:-1])}; {hint}")
    if torch.isposinf(log_p).any():
        at = x[torch.isposinf(log_p)][0]
        raise PositiveInfinityError(
            f"log_prob returned +inf at x = {show(at)}, wanted a finite number or -inf; look there for a division by zero "
            "or an overflow, or bound the density away from that spike",
            at.clone(),
        )


def _check_tensor(out: object, x: Tensor, name: str) -> Tensor:
    if not isinstance(out, Tensor):
        raise DtypeError(f"{name} returned a {type(out).__name__}, wanted a torch.Tensor; build it from x with torch operations")
    if out.device != x.device:
        raise DeviceError(f"{name} returned a tensor on {out.device} for points on {x.device}; move its constants to x.device")
    if out.dtype != x.dtype:
        raise DtypeError(
            f"{name} returned {out.dtype} for points of {x.dtype}; make its constants and casts follow x.dtype, "
            f"or sample in another precision with dtype={out.dtype if out.dtype in (torch.float32, torch.float64) else torch.float64}"
        )
    return out


def _check_agreement(target: Target, x: Tensor, log_p: Tensor) -> None:
    """The same points again, one of them alone, and all in another order: three times the same answer."""
    again = ask(target.log_prob, x)
    if not _close(again, log_p, relative=0.0).all():
        raise NondeterministicError(
            f"two calls of log_prob at the same points gave {_numbers(log_p)} and {_numbers(again)}, wanted the same values; "
            "switch dropout, minibatches and noise off, as by module.eval()"
        )
    one = int(log_p.isfinite().int().argmax())  # a finite one tells more
    for value, wanted, how in (
        (ask(target.log_prob, x[one : one + 1]), log_p[one : one + 1], "alone"),
        (ask(target.log_prob, x.flip(0)), log_p.flip(0), "with the batch in reverse order"),
    ):
        if not _close(value, wanted, log_p).all():
            raise BatchCrosstalkError(
                f"log_prob of a point depends on the other points of its batch: {_numbers(wanted)} among {len(x)} points became "
                f"{_numbers(value)} {how}; reduce over the last axis only, .sum(-1), and use no batch statistics"
            )


def _check_more_axes(target: Target, x: Tensor, log_p: Tensor) -> None:
    wanted = "wanted a log_prob for any leading axes, (*batch, dim) to (*batch); use .sum(-1), or wrap it in from_log_prob(log_prob, dim)"
    try:
        value = ask(target.log_prob, x.reshape(2, 2, -1))
    except (DtypeError, DeviceError, MutatesInputError):
        raise
    except Exception as error:
        raise ShapeError(f"log_prob failed on points of shape (2, 2, {x.shape[-1]}); {wanted}") from error
    if not isinstance(value, Tensor) or value.shape != (2, 2):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(f"log_prob of points (2, 2, {x.shape[-1]}) returned {got} instead of shape (2, 2); {wanted}")
    if not _close(value.reshape(-1), log_p, log_p).all():
        raise BatchCrosstalkError(
            f"log_prob gave {_numbers(log_p)} for 4 points and {_numbers(value.reshape(-1))} for the same as (2, 2) points; {wanted}"
        )


def _check_joint(target: Target, x: Tensor, log_p: Tensor) -> tuple[bool, int]:
    """(has a gradient, rows asked): one pass at (4, dim) and at (2, 2, dim)."""
    try:
        joint, grad = ask(lambda y: as_given(target, y), x)
    except NoGradient:
        return False, 4
    _check_gradient_like(grad, x)
    if not isinstance(joint, Tensor) or joint.shape != log_p.shape or not _close(joint, log_p, log_p).all():
        raise GradMismatchError(
            f"log_prob_and_grad says log_prob = {_numbers(joint)} where log_prob says {_numbers(log_p)}; make both the same density"
        )
    x3 = x.reshape(2, 2, -1)
    try:
        _, grad3 = ask(lambda y: as_given(target, y), x3)
    except (DtypeError, DeviceError, MutatesInputError):
        raise
    except Exception as error:
        raise ShapeError(
            f"the gradient failed on points of shape {tuple(x3.shape)}; support any leading axes (*batch, dim), "
            "or wrap it in from_log_prob(log_prob, dim, grad=grad_log_prob)"
        ) from error
    _check_gradient_like(grad3, x3)
    return True, 8


def _check_gradient_like(grad: object, x: Tensor) -> None:
    grad = _check_tensor(grad, x, "grad_log_prob")
    if grad.shape != x.shape:
        raise ShapeError(
            f"grad_log_prob of points {tuple(x.shape)} returned {tuple(grad.shape)}, wanted {tuple(x.shape)}; return one per coordinate"
        )


def _close(value: object, wanted: Tensor, batch: Tensor | None = None, relative: float = 1e-4) -> Tensor:
    """Elementwise: the same, NaN and infinities included, up to `relative` of the size of wanted and to rounding.

    A constant in log p counts as little as it should: the size is at most the spread over the batch. 1e-6 never matters.
    """
    if not isinstance(value, Tensor) or value.shape != wanted.shape:
        return torch.zeros_like(wanted, dtype=torch.bool)
    finite = wanted if batch is None else batch
    finite = finite[finite.isfinite()]
    big = finite.abs().max() if finite.numel() else wanted.new_zeros(())
    spread = finite.max() - finite.min() if finite.numel() else big
    size = wanted.abs().minimum(spread + 1).clamp(min=1e-2)
    near = (value - wanted).abs() <= relative * size + 1e3 * torch.finfo(wanted.dtype).eps * big
    return near | (value == wanted) | (value.isnan() & wanted.isnan())


def _numbers(value: object) -> str:
    return "[" + ", ".join(f"{v:.6g}" for v in value.flatten()[:4].tolist()) + "]" if isinstance(value, Tensor) else repr(value)
