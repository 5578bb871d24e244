"""Targets out of what users already have: here, a function."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from boltzsample.errors import BoltzsampleError, RejectPoint, ShapeError
from boltzsample.target import FunctionTarget, LogProb, Target
from boltzsample.views import Constrained


class VectorizeError(BoltzsampleError, RuntimeError):
    """A function of one point could not be run on many points at once."""

    code = "VECTORIZE"


def from_log_prob(
    fn: LogProb,
    dim: int,
    *,
    grad: LogProb | None = None,
    vectorized: bool = True,
    support: constraints.Constraint | None = None,
    names: Sequence[str] | None = None,
    event_shape: Sequence[int] | None = None,
) -> Target:
    """A Target from a log-density `fn`, up to a constant.

    fn maps (n, dim) to (n,), or (n, *event_shape) to (n,); with vectorized=False one point, (dim,), to a scalar. `grad`, where given,
    maps the same points to gradients of their shape; autograd supplies it otherwise. With a `support` of
    `torch.distributions.constraints` fn lives on that support and the Target in R^n, its log-det added (`views.Constrained`);
    results come back in fn's space. `names` has one name for each of the dim coordinates of fn's space. -inf, or raising
    `RejectPoint`, means density zero.

    Raises ShapeError where dim, event_shape and names disagree, UnsupportedSupport where no bijection exists, and (when called)
    VectorizeError where torch.func.vmap cannot run fn.

    >>> normal = from_log_prob(lambda x: -0.5 * (x**2).sum(-1), dim=2)
    >>> normal.log_prob(torch.ones(3, 2))
    tensor([-1., -1., -1.])
    >>> one_point = from_log_prob(lambda x: -0.5 * x @ x, dim=2, vectorized=False)
    >>> one_point.grad_log_prob(torch.ones(1, 2))
    tensor([[-1., -1.]])
    >>> dirichlet = from_log_prob(lambda p: (p.log() * torch.tensor([1.0, 2.0, 4.0])).sum(-1), dim=3, support=constraints.simplex)
    >>> dirichlet.dim
    2
    """

    def make(d: int, shape: torch.Size, labels: tuple[str, ...] | None) -> Target:
        value, slope = (fn, grad) if vectorized else (_over_points(fn), None if grad is None else _over_points(grad))
        if event_shape is not None:
            value, slope = _shaped(value, shape), None if slope is None else _shaped(slope, shape, flatten=True)
        return FunctionTarget(value, d, slope, labels)

    return in_user_space(make, dim, support, names, event_shape)


def in_user_space(
    make: Callable[[int, torch.Size, tuple[str, ...] | None], Target],
    dim: int,
    support: constraints.Constraint | None,
    names: Sequence[str] | None,
    event_shape: Sequence[int] | None,
) -> Target:
    """The target that `make(dim, event's shape, names)` returns, on its support: what all adapters ask of their arguments.

    Raises ShapeError, UnsupportedSupport.
    """
    dim, labels = _dim(dim), None if names is None else tuple(names)
    if labels is not None and len(labels) != dim:
        raise ShapeError(f"names has {len(labels)} entries for dim={dim}; give one name for each coordinate")
    shape = torch.Size((dim,) if event_shape is None else event_shape)
    if shape.numel() != dim:
        raise ShapeError(f"event_shape {tuple(shape)} holds {shape.numel()} numbers, got dim={dim}; make dim their number")
    target = make(dim, shape, labels)
    if support is None and event_shape is None:
        return target
    return Constrained(target, constraints.real if support is None else support, tuple(shape))


def _dim(dim: int) -> int:
    try:
        d = operator.index(dim)
    except TypeError:
        raise ShapeError(f"dim must be a whole number, got {dim!r}; give the number of coordinates of a point") from None
    if d < 1:
        raise ShapeError(f"dim must be 1 or more, got {d}; a density needs at least one coordinate")
    return d


def _shaped(fn: LogProb, shape: torch.Size, flatten: bool = False) -> LogProb:
    """fn of points of this shape, as a function of flat ones."""

    def on_flat(flat: Tensor) -> Tensor:
        out = fn(flat.reshape(-1, *shape))
        return out.reshape(flat.shape) if flatten else out

    return on_flat


def _over_points(fn: LogProb) -> LogProb:
    many = torch.func.vmap(fn)

    def on_batch(x: Tensor) -> Tensor:
        try:
            out: Tensor = many(x)
        except RejectPoint:
            raise
        except (RuntimeError, ValueError) as error:
            if "vmap" not in str(error):  # the user's own error
                raise
            raise VectorizeError(
                "torch.func.vmap could not run log_prob on many points at once (its words are above); use torch.where in place of `if` "
                "on values, no .item(), no random numbers, return a tensor, or write log_prob for a batch (n, dim) -> (n,)"
            ) from error
        return out

    return on_batch
