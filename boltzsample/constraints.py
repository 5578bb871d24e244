"""From a support of `torch.distributions.constraints` to the bijection onto it (the mathematics is in bijections.py)."""

from __future__ import annotations

import torch
from torch.distributions import biject_to
from torch.distributions import constraints as C

from boltzsample.bijections import Between, Bijection, Cholesky, CorrCholesky, Half, Identity, Joined, Registered, Simplex
from boltzsample.errors import BoltzsampleError, ShapeError


class UnsupportedSupport(BoltzsampleError, ValueError):
    """A support with no bijection from R^n."""

    code = "UNSUPPORTED_SUPPORT"


def bijection(support: C.Constraint, event_shape: torch.Size) -> Bijection:
    """The bijection onto points of shape event_shape on this support. Raises UnsupportedSupport, or ShapeError where shapes disagree.

    >>> bijection(C.simplex, torch.Size([3])).push(torch.zeros(2))[0]
    tensor([0.3333, 0.3333, 0.3333])
    """
    if isinstance(support, C.MixtureSameFamilyConstraint):
        return bijection(support.base_constraint, event_shape)
    if isinstance(support, C.independent):  # the log-det is summed over the whole event anyway
        return bijection(support.base_constraint, event_shape)
    _check(support, event_shape)
    if isinstance(support, (C.cat, C.stack)):
        return _joined(support, event_shape)
    made = _elementwise(support, event_shape) or _matrix(support, event_shape) or _registered(support, event_shape)
    if made is None:
        raise UnsupportedSupport(
            f"no bijection onto {support!r} is known; write the density in unconstrained coordinates with its log-det, "
            "or register one with torch.distributions.biject_to.register"
        )
    if made.size == 0:
        raise UnsupportedSupport(f"{support!r} of shape {tuple(event_shape)} is a single point with nothing to sample; give more parts")
    return made


def _check(support: C.Constraint, event_shape: torch.Size) -> None:
    if C.is_dependent(support):
        raise UnsupportedSupport(f"{support!r} depends on parameters; take the support of an instance, such as Uniform(0.0, 2.0).support")
    if support.is_discrete:
        raise UnsupportedSupport(f"{support!r} is discrete and boltzsample samples continuous densities; sum that variable out of log_prob")
    if support.event_dim > len(event_shape):
        raise ShapeError(f"{support!r} needs points of {support.event_dim} axes, got event_shape {tuple(event_shape)}; pass event_shape=")


def _elementwise(support: C.Constraint, shape: torch.Size) -> Bijection | None:
    match support:
        case C.greater_than() | C.greater_than_eq():
            return Half(shape, support.lower_bound, 1.0)
        case C.less_than():
            return Half(shape, support.upper_bound, -1.0)
        case C.interval() | C.half_open_interval():
            return Between(shape, support.lower_bound, support.upper_bound)
    return Identity(shape) if isinstance(support, type(C.real)) else None


def _matrix(support: C.Constraint, shape: torch.Size) -> Bijection | None:
    if isinstance(support, type(C.simplex)):
        return Simplex(shape)
    lower, correlation = isinstance(support, type(C.lower_cholesky)), isinstance(support, type(C.corr_cholesky))
    covariance = isinstance(support, (type(C.positive_definite), type(C.positive_semidefinite)))
    if (lower or correlation or covariance) and shape[-1] != shape[-2]:
        raise ShapeError(f"{support!r} needs square matrices, got event_shape {tuple(shape)}; pass event_shape=(d, d)")
    return CorrCholesky(shape) if correlation else Cholesky(shape, covariance) if lower or covariance else None


def _registered(support: C.Constraint, shape: torch.Size) -> Bijection | None:
    try:
        transform = biject_to(support)
    except NotImplementedError:
        return None
    return Registered(shape, transform) if transform.bijective else None


def _joined(support: C.cat | C.stack, shape: torch.Size) -> Joined:
    """Axis `dim` of a cat or a stack counts within the event."""
    if not shape:
        raise ShapeError("a cat or a stack needs points of one axis or more, got event_shape (); pass event_shape=")
    axis, stacked = support.dim % len(shape), isinstance(support, C.stack)
    lengths = list(support.lengths) if isinstance(support, C.cat) else [1] * len(support.cseq)
    if sum(lengths) != shape[axis]:
        raise ShapeError(
            f"the parts of this {'stack' if stacked else 'cat'} add up to {sum(lengths)} along axis {axis} of the event, "
            f"got event_shape {tuple(shape)}; pass lengths= or event_shape="
        )
    shapes = [torch.Size([*shape[:axis], n, *shape[axis + 1 :]]) for n in lengths]
    inner = [torch.Size([*s[:axis], *s[axis + 1 :]]) if stacked else s for s in shapes]
    parts = tuple(bijection(c, s) for c, s in zip(support.cseq, inner, strict=True))
    return Joined(tuple(shapes), axis - len(shape), parts)
