"""A density computed outside of torch, as a Target: what from_numpy and from_jax share.

A Foreign target hands points out and takes values and gradients back; torch sees no step between, so nothing is compiled, and its
gradient exists only where the function supplies one. Its log_prob can be used in other torch code (autograd, torch.func.vmap):
first derivatives only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import constraints

from boltzsample.adapters import in_user_space
from boltzsample.errors import BoltzsampleError, NoGradient, RejectPoint, ShapeError
from boltzsample.target import Target

Value = Callable[[Tensor], Tensor]
Both = Callable[[Tensor], tuple[Tensor, Tensor]]


class NotCompilable(BoltzsampleError, RuntimeError):
    """torch.compile met a density that is computed outside of torch."""

    code = "NOT_COMPILABLE"


@dataclass(frozen=True, eq=False)
class Foreign:
    """A density known by `value`, (n, dim) to (n,), and `both`, (n, dim) to ((n,), (n, dim)), or None where it has no gradient."""

    value: Value
    both: Both | None
    dim: int
    names: tuple[str, ...] | None = None
    compilable: ClassVar[bool] = False

    def log_prob(self, x: Tensor) -> Tensor:
        self._check_eager()
        tracked = self.both is not None and torch.is_grad_enabled() and x.requires_grad
        if not tracked and not _transformed(x):
            return self.ask(x.detach())
        log_p: Tensor = _Outside.apply(self, x)[0]  # type: ignore[no-untyped-call]
        return log_p

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_grad(x)[1]

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_eager()
        return self.ask_both(x.detach())

    def ask(self, x: Tensor) -> Tensor:
        """log_prob at x (*batch, dim), no autograd."""
        log_p = _rejecting(lambda rows: (self.value(rows),), x.reshape(-1, self.dim))[0]
        return log_p.reshape(x.shape[:-1])

    def ask_both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log_prob and gradient at x (*batch, dim), no autograd. Raises NoGradient."""
        if self.both is None:
            raise NoGradient(
                "this density has no gradient; give grad= or value_and_grad= to from_numpy, or use a method without gradients "
                "(boltzsample methods lists them)"
            )
        log_p, grad = _rejecting(self.both, x.reshape(-1, self.dim))
        return log_p.reshape(x.shape[:-1]), grad.reshape(x.shape)

    def _check_eager(self) -> None:
        if torch.compiler.is_compiling():
            raise NotCompilable("this density is computed outside of torch and cannot be compiled; sample with compile=False")


def _transformed(x: Tensor) -> bool:
    """Whether x is inside of torch.func transforms, which hide what requires a gradient."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def _rejecting(fn: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    """fn(x); where it raises RejectPoint, which names no point, each is asked alone and the rejected ones have density zero."""
    if len(x) == 0:
        return x.sum(-1), x.clone()
    try:
        return fn(x)
    except RejectPoint:
        rows = [_row(fn, row) for row in x.split(1)]
        return tuple(torch.cat(part) for part in zip(*rows, strict=True))


def _row(fn: Callable[[Tensor], tuple[Tensor, ...]], row: Tensor) -> tuple[Tensor, Tensor]:
    try:
        log_p, *grad = fn(row)
    except RejectPoint:
        return row.new_full((1,), -torch.inf), torch.zeros_like(row)
    return log_p, grad[0] if grad else torch.zeros_like(row)


class _Outside(torch.autograd.Function):
    """log_prob and its gradient at x, for torch code around the density."""

    @staticmethod
    def forward(target: Foreign, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach()
        return (target.ask(x), torch.zeros_like(x)) if target.both is None else target.ask_both(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Foreign, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.target = inputs[0]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[None, Tensor]:
        if ctx.target.both is None:
            ctx.target.ask_both(g)  # raises NoGradient
        (grad,) = ctx.saved_tensors
        return None, g[..., None] * grad

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, int], target: Foreign, x: Tensor) -> tuple[Any, tuple[int, int]]:
        return _Outside.apply(target, x.movedim(in_dims[1], 0)), (0, 0)  # type: ignore[no-untyped-call]


def foreign(
    make: Callable[[torch.Size], tuple[Value, Both | None]],
    dim: int,
    support: constraints.Constraint | None,
    names: Sequence[str] | None,
    event_shape: Sequence[int] | None,
) -> Target:
    """A Foreign target in the user's space; `make` gets the event's shape. Raises ShapeError, UnsupportedSupport."""
    return in_user_space(lambda d, shape, labels: Foreign(*make(shape), d, labels), dim, support, names, event_shape)


def check_shape(shape: Sequence[int], n: int, wanted: Sequence[int], name: str) -> None:
    """Raises ShapeError where what `name` returned for n points has not the shape wanted."""
    if tuple(shape) != tuple(wanted):
        per_point = tuple(wanted[1:]) or "a number"
        raise ShapeError(
            f"{name} returned shape {tuple(shape)} for {n} points, wanted {tuple(wanted)}; sum over the coordinates only (axis=-1), "
            f"or pass vectorized=False if it takes one point and returns {per_point}"
        )


def dtype_name(x: Tensor) -> str:
    """float64, not torch.float64: what NumPy understands."""
    return str(x.dtype).removeprefix("torch.")
