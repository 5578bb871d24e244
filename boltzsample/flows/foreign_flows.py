"""Flows made elsewhere: zuko's flows and transforms, Pyro's and torch's transforms, as a Flow."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import zuko
from torch import Tensor, nn
from torch.distributions import Transform

from boltzsample.flows.base import Base, DefensiveBase
from boltzsample.flows.flow import Flow

# Pyro 1.9.1: Sylvester's log-det is not that of its map, and quadratic splines lose their inverse in the tails
REFUSED = {"Sylvester": "its log-det is wrong in Pyro", "quadratic": "Pyro's quadratic splines break in the tails; use order='linear'"}
ZUKO_BOUND = inspect.signature(zuko.transforms.MonotonicRQSTransform).parameters["bound"].default
CLOSED = {zuko.transforms.MonotonicAffineTransform, zuko.transforms.MonotonicRQSTransform}  # the inverse of others is approximate
CHEAP = {"AffineCoupling", "SplineCoupling", "Spline", "Permute", "AffineTransform", "GeneralizedChannelPermute", "ComposeTransformModule"}


class ZukoLayers(nn.Module):
    """A zuko transform as layers. `inverted`: T is its inverse."""

    def __init__(self, transform: Any, inverted: bool) -> None:
        super().__init__()
        self.transform, self.inverted = transform, inverted
        slow = [m for m in transform.modules() if isinstance(m, zuko.flows.MaskedAutoregressiveTransform)]
        self.has_pull = inverted or not slow
        self.inverts = all(_univariate(m) in CLOSED for m in slow)

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._backward(z) if self.inverted else self._forward(z)

    def pull(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._forward(x) if self.inverted else self._backward(x)

    def outside(self, x: Tensor) -> Tensor:
        """Which points x (n, dim) meet a spline beyond its interval on their way back to z, (n,) bool."""
        t = self.transform
        steps = [(part(), _bound(part)) for part in (t.transforms if isinstance(t, zuko.lazy.LazyComposedTransform) else [t])]
        back = [(step.inv, bound) for step, bound in reversed(steps)]
        return _beyond(x, steps if self.inverted else back)

    def _forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = self.transform().call_and_ladj(y)
        return out

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        t = self.transform()
        u = t.inv(y)
        return u, -t.log_abs_det_jacobian(u, y)


class TorchLayers(nn.Module):
    """torch or Pyro transforms of vectors, applied in turn."""

    def __init__(self, transforms: Sequence[Any]) -> None:
        super().__init__()
        self.parts = list(transforms)
        self.modules_ = nn.ModuleList(t for t in transforms if isinstance(t, nn.Module))
        self.has_pull = all(type(t).__name__ in CHEAP for t in transforms)

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_det = z.new_zeros(z.shape[:-1])
        for t in self.parts:
            x = t(z)
            log_det, z = log_det + _per_point(t, t.log_abs_det_jacobian(z, x)), x
            _forget(t)
        return z, log_det

    def pull(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.shape[:-1])
        for t in reversed(self.parts):
            z = t.inv(x)
            log_det, x = log_det - _per_point(t, t.log_abs_det_jacobian(z, x)), z
            _forget(t)
        return x, log_det

    def outside(self, x: Tensor) -> Tensor:
        """As ZukoLayers has it."""
        return _beyond(x, [(partial(_inverse, t), _pyro_bound(t)) for t in reversed(self.parts)])


def _pyro_bound(t: Any) -> float:
    """Where Pyro's splines end; those of a coupling are its parts."""
    parts = (t, *t.modules()) if isinstance(t, nn.Module) else (t,)
    return min((float(b) for m in parts if (b := getattr(m, "bound", None)) is not None), default=math.inf)


def _inverse(t: Any, x: Tensor) -> Tensor:
    z: Tensor = t.inv(x)
    _forget(t)
    return z


def _bound(part: Any) -> float:
    """Where the splines of a lazy zuko transform end: they are the identity beyond."""
    options = getattr(getattr(part, "univariate", None), "keywords", {})
    return float(options.get("bound", ZUKO_BOUND)) if _univariate(part) is zuko.transforms.MonotonicRQSTransform else math.inf


def _univariate(part: Any) -> Any:
    make = getattr(part, "univariate", None)
    return getattr(make, "func", make)


def _beyond(x: Tensor, steps: Sequence[tuple[Any, float]]) -> Tensor:
    """Which points x (n, dim) are beyond the bound of any of the maps that they go through, (n,) bool."""
    if all(bound == math.inf for _, bound in steps):
        return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    out = x.new_zeros(x.shape[:-1], dtype=torch.bool)
    for step, bound in steps:
        out = out | (x.abs() > bound).any(-1)
        x = step(x)
    return out


def _per_point(t: Any, log_det: Tensor) -> Tensor:
    return log_det.sum(-1) if t.domain.event_dim == 0 else log_det


def _forget(t: Any) -> None:
    """Pyro's transforms remember their last call, graph and all: no copy could be made of them."""
    for name in ("_cached_x_y", "_cached_log_scale", "_cached_log_df_inv_dx", "_cached_logDetJ"):
        if name in vars(t):
            vars(t)[name] = (None, None) if name == "_cached_x_y" else None
    for part in getattr(t, "parts", ()):
        _forget(part)


def from_zuko(flow: Any, dim: int | None = None, *, base: Base | None = None, one_pass: bool = False) -> Flow:
    """A Flow from a zuko flow or lazy transform, copied.

    A zuko flow takes data to its base, so T is the inverse of its transform: what was trained on data keeps its density, but an
    autoregressive one is pushed in dim passes. With one_pass=True, and for a lone transform, T is the transform itself: right for
    a flow yet to be trained on a target. dim: needed for a lone transform. base: the defensive one by default, whatever zuko's.

    Raises TypeError, ValueError.

    >>> import zuko
    >>> Flow.from_zuko(zuko.flows.NSF(3, transforms=2), one_pass=True).has_pull
    False
    """
    if not isinstance(flow, zuko.lazy.Flow | zuko.lazy.LazyTransform):
        raise TypeError(f"flow is a {type(flow).__name__}; wanted a zuko flow, such as zuko.flows.NSF(dim), or a zuko lazy transform")
    whole = isinstance(flow, zuko.lazy.Flow)
    dim = flow.base().event_shape.numel() if whole and dim is None else dim
    if dim is None:
        raise ValueError("a lone zuko transform does not say its dimension; pass dim=")
    transform = copy.deepcopy(flow.transform if whole else flow)
    return Flow(DefensiveBase(dim) if base is None else base, ZukoLayers(transform, whole and not one_pass))


def from_pyro(transforms: Any, dim: int, *, base: Base | None = None) -> Flow:
    """A Flow from Pyro (or torch) transforms of R^dim, in the order in which they take the base to x; copied.

    Raises TypeError, and ValueError for Pyro's Sylvester flows and quadratic splines, which are wrong in Pyro.

    >>> import torch
    >>> from pyro.distributions.transforms import affine_autoregressive
    >>> flow = Flow.from_pyro([affine_autoregressive(3)], dim=3)
    >>> flow.has_pull, flow.push(torch.zeros(5, 3))[0].shape
    (False, torch.Size([5, 3]))
    """
    listed = list(transforms) if isinstance(transforms, list | tuple | nn.ModuleList) else [transforms]
    for t in listed:
        if not isinstance(t, Transform):
            raise TypeError(f"got a {type(t).__name__} among the transforms; wanted torch or Pyro transforms")
        for inner in t.modules() if isinstance(t, nn.Module) else [t]:
            reason = REFUSED.get(type(inner).__name__) or REFUSED.get(str(getattr(inner, "order", "")))
            if reason:
                raise ValueError(f"the transform {type(inner).__name__} cannot be used: {reason}; use another one, or make_flow")
        for part in (t, *(t.modules() if isinstance(t, nn.Module) else ())):
            _forget(part)
    return Flow(DefensiveBase(dim) if base is None else base, TorchLayers(copy.deepcopy(listed)))
