"""A Target is a log-density up to a constant: `dim`, `log_prob`, `grad_log_prob`, nothing else.

Samplers call `log_prob_and_grad(target, x)`, which takes one pass where the target offers a method of that name.
Nobody differentiates through a target: its gradient is asked for, never derived from outside (HOUSE.md, contracts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from boltzsample.errors import NoGradient, RejectPoint

LogProb = Callable[[Tensor], Tensor]


@runtime_checkable
class Target(Protocol):
    """An unnormalized log-density on R^dim.

    `log_prob` maps (*batch, dim) to (*batch); `grad_log_prob` maps (*batch, dim) to (*batch, dim). -inf is a legal value
    (zero density). Two optional methods are found when present: `log_prob_and_grad(x)` (both in one pass) and
    `readout(x)` (the point in the space its user thinks in: a tensor, or a dict of named tensors).

    >>> class Normal:
    ...     dim = 2
    ...     def log_prob(self, x): return -0.5 * x.square().sum(-1)
    ...     def grad_log_prob(self, x): return -x
    >>> isinstance(Normal(), Target)
    True
    """

    @property
    def dim(self) -> int: ...

    def log_prob(self, x: Tensor) -> Tensor: ...

    def grad_log_prob(self, x: Tensor) -> Tensor: ...


def log_prob_and_grad(target: Target, x: Tensor) -> tuple[Tensor, Tensor]:
    """log_prob (*batch) and its gradient (*batch, dim) at x (*batch, dim), in one pass where the target can.

    A gradient that is NaN, as autograd's often is where the density is zero, is set to zero: to a kernel any force that depends on
    x alone is right, and NaN is none. (Its log_prob stays NaN where it is; and no mask here may look at log_prob, or a trajectory
    would have to compute it at every point.)
    """
    log_p, grad = (t.detach() for t in as_given(target, x))  # a graph that leaks out would grow along a chain
    if isinstance(target, Bare):
        return log_p, grad
    return log_p, torch.where(grad == grad, grad, 0.0)  # torch.isnan is not vectorized by inductor


def as_given(target: Target, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the target itself answers for log_prob and gradient, in one pass where it can; preflight looks at this."""
    joint = getattr(target, "log_prob_and_grad", None)
    with torch.enable_grad():  # samplers run without; a user's own gradient may well call autograd
        return (target.log_prob(x), target.grad_log_prob(x)) if joint is None else cast("tuple[Tensor, Tensor]", joint(x))


@dataclass(frozen=True)
class Bare:
    """A target whose NaN gradients `log_prob_and_grad` leaves as they are, for those who throw away what a NaN has touched."""

    target: Target

    @property
    def dim(self) -> int:
        return self.target.dim

    def log_prob(self, x: Tensor) -> Tensor:
        return self.target.log_prob(x)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.target.grad_log_prob(x)

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return as_given(self.target, x)


def readout(target: Target, x: Tensor) -> Tensor | dict[str, Tensor]:
    """x (*batch, dim) in the space the target's user thinks in; x itself where the target has no `readout`."""
    read = getattr(target, "readout", None)
    return x if read is None else cast("Tensor | dict[str, Tensor]", read(x))


def compilable(target: Target) -> bool:
    """Whether torch.compile can see through a target: False where it, or what it views, says `compilable = False` (NumPy, JAX, Pyro)."""
    inside = [getattr(target, name) for name in ("target", "base") if getattr(target, name, None) is not None]
    return bool(getattr(target, "compilable", True)) and all(compilable(t) for t in inside)


@dataclass(frozen=True)
class FunctionTarget:
    """A Target made of a function `fn`, from (n, dim) to (n,), and an optional gradient, from (n, dim) to (n, dim).

    Batches of any shape are flattened before `fn` sees them. Without `grad`, autograd supplies it.
    """

    fn: LogProb
    dim: int
    grad: LogProb | None = None
    names: tuple[str, ...] | None = None

    def log_prob(self, x: Tensor) -> Tensor:
        if x.dim() == 2:  # as it came: a wrong shape is for preflight to name, not for a reshape to hide
            return self._call(x)
        log_p = self._call(x.reshape(-1, self.dim))
        return log_p.reshape(x.shape[:-1] + log_p.shape[1:])

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_grad(x)[1] if self.grad is None else self._grad(x.reshape(-1, self.dim)).reshape(x.shape)

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, self.dim)
        log_p, grad = value_and_grad(self._call, flat) if self.grad is None else (self._call(flat), self._grad(flat))
        return log_p.reshape(x.shape[:-1] + log_p.shape[1:]), grad if x.dim() == 2 else grad.reshape(x.shape)

    def _call(self, flat: Tensor) -> Tensor:
        try:
            return self.fn(flat)
        except RejectPoint:  # it names no point, so each is asked alone
            return torch.cat([_or(-torch.inf, self.fn, row) for row in flat.split(1)])

    def _grad(self, flat: Tensor) -> Tensor:
        assert self.grad is not None
        try:
            return self.grad(flat)
        except RejectPoint:
            return torch.cat([_or(0.0, self.grad, row) for row in flat.split(1)])


def _or(rejected: float, fn: LogProb, row: Tensor) -> Tensor:
    try:
        return fn(row)
    except RejectPoint:
        return (row if rejected == 0.0 else row.sum(-1)) * 0.0 + rejected


def value_and_grad(fn: LogProb, x: Tensor) -> tuple[Tensor, Tensor]:
    """fn(x) (n,) and its gradient (n, dim) by autograd, whatever grad or inference mode the caller is in."""
    if torch.compiler.is_compiling():  # torch.autograd.grad has no place in a full graph
        log_p, vjp = cast("tuple[Tensor, Callable[[Tensor], tuple[Tensor]]]", torch.func.vjp(fn, x))
        return log_p, vjp(torch.ones_like(log_p))[0]
    with torch.inference_mode(False), torch.enable_grad():
        y = (x.clone() if x.is_inference() else x.detach()).requires_grad_(True)
        log_p = fn(y)
        if not log_p.requires_grad:
            raise NoGradient(
                "log_prob returned a value that autograd cannot differentiate (a detached tensor or NumPy inside?); "
                "pass grad= to from_log_prob, or use a method without gradients (boltzsample methods lists them)"
            )
        (grad,) = torch.autograd.grad(log_p, y, torch.ones_like(log_p), allow_unused=True)
    return log_p.detach(), torch.zeros_like(x) if grad is None else grad
