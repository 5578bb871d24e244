"""A `torch.distributions` object as a density on R^n: which support it really has, and a copy of it that follows the points.

The support that a distribution names is not always that of its law: a TransformedDistribution names the codomain of its last
transform (all of R for 1 + 2 y with y ~ Exponential), a mixture that of components which may differ, VonMises the real line. So

    x = T(y), y ~ base          is sampled as y on the support of base, where its density is that of base, and read as T(y);
    mixtures                    are unwrapped, components of different supports refused;
    circles, spheres, atoms     are refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily, Transform, TransformedDistribution, constraints

from boltzsample.constraints import UnsupportedSupport
from boltzsample.errors import ShapeError
from boltzsample.target import FunctionTarget, Target, readout
from boltzsample.views import Constrained

CIRCLE = "its support is a circle, a torus or a sphere, with no smooth one-to-one map from R^n"
REFUSED = {
    "VonMises": CIRCLE,
    "SineBivariateVonMises": CIRCLE,
    "SineSkewed": CIRCLE,
    "VonMises3D": CIRCLE,
    "ProjectedNormal": CIRCLE,
    "GeneralizedPareto": "its support changes from an interval to a half-line with the sign of its concentration",
    "Delta": "it is an atom, not a density (in a Pyro model, pyro.deterministic records a computed value)",
    "Unit": "it has no values (in a Pyro model, pyro.factor adds a term to the log-density)",
}


def from_torch_distribution(dist: Distribution, *, names: Sequence[str] | None = None) -> Target:
    """A Target from a `torch.distributions` object with a continuous support and one event: `dist.log_prob`, log Z = 0.

    Results come back in the shape of `dist.event_shape`, () for a scalar law, on its support; mixtures are unwrapped, and a
    TransformedDistribution is sampled on the support of its base. The distribution is copied: parameters follow the dtype and
    device of the points, and later changes to it have no effect. `names` has one name for each number of an event.

    Raises ShapeError where `dist` has a batch shape (several laws at once), and UnsupportedSupport, with the name of the law, for
    discrete laws and for supports with no bijection from R^n.

    >>> from torch.distributions import Beta, Categorical, MixtureSameFamily
    >>> mixture = MixtureSameFamily(Categorical(torch.tensor([0.3, 0.7])), Beta(torch.tensor([2.0, 9.0]), torch.tensor([8.0, 3.0])))
    >>> target = from_torch_distribution(mixture)
    >>> target.log_prob(torch.zeros(1, 1))      # at the middle of (0, 1), times the Jacobian 1/4
    tensor([-2.2473])
    """
    if not isinstance(dist, Distribution):
        raise TypeError(f"dist is a {type(dist).__name__}; wanted a torch.distributions object, such as Normal(0.0, 1.0)")
    if dist.batch_shape:
        raise ShapeError(
            f"{_name(dist)} has batch_shape {tuple(dist.batch_shape)}, that is {dist.batch_shape.numel()} laws at once; for their product "
            f"pass torch.distributions.Independent(dist, {len(dist.batch_shape)}), for one of them index its parameters"
        )
    base, transforms = peel(dist)
    target = _on_support(base, _names(names, dist) if not transforms else None)
    return Image(target, follow_points(transforms), dist.event_shape, _names(names, dist)) if transforms else target


def _on_support(dist: Distribution, names: tuple[str, ...] | None) -> Constrained:
    follow = _Following(dist)
    shape = dist.event_shape
    on = support(follow.dist)

    def log_prob(flat: Tensor) -> Tensor:
        log_p: Tensor = follow(flat).log_prob(flat.reshape(-1, *shape))
        if flat.requires_grad and not log_p.requires_grad:  # a Uniform: its gradient is zero, not missing
            log_p = log_p + 0.0 * flat.sum(-1)
        return log_p

    return Constrained(FunctionTarget(log_prob, shape.numel(), None, names), on, tuple(shape))


def _names(names: Sequence[str] | None, dist: Distribution) -> tuple[str, ...] | None:
    if names is None:
        return None
    if len(names) != dist.event_shape.numel():
        raise ShapeError(f"names has {len(names)} entries for an event of {dist.event_shape.numel()} numbers; give one name for each")
    return tuple(names)


@dataclass(frozen=True, eq=False)
class Image:
    """The law of T(y): sampled as `target` samples y, read as T(y). No Jacobian of T is needed, so T need not be invertible.

    event_shape: that of T(y).
    """

    target: Constrained
    transforms: tuple[Transform, ...]
    event_shape: torch.Size
    names: tuple[str, ...] | None = None

    @property
    def dim(self) -> int:
        return self.target.dim

    def log_prob(self, z: Tensor) -> Tensor:
        return self.target.log_prob(z)

    def grad_log_prob(self, z: Tensor) -> Tensor:
        return self.target.grad_log_prob(z)

    def log_prob_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.target.log_prob_and_grad(z)

    def pull(self, x: Tensor) -> Tensor:
        """z (*batch, dim) of points x (*batch, *event_shape) of the user's space, such as starts."""
        for t in reversed(self.transforms):
            x = follow_points(t, x).inv(x)
        return self.target.pull(x)

    def readout(self, z: Tensor) -> Tensor:
        x: Any = readout(self.target, z)
        for t in self.transforms:
            x = follow_points(t, x)(x)
        out: Tensor = x
        return out


# ---- supports ----


def peel(dist: Distribution) -> tuple[Distribution, tuple[Transform, ...]]:
    """(base, transforms) of a TransformedDistribution that inherits its support; (dist, ()) of any other.

    The named ones, LogNormal or Weibull, state their support themselves.
    """
    if isinstance(dist, Independent):
        base, transforms = peel(dist.base_dist)
        return (Independent(base, len(base.batch_shape)), transforms) if transforms else (dist, ())
    if not isinstance(dist, TransformedDistribution) or type(dist).support is not TransformedDistribution.support:
        return dist, ()
    base, inner = peel(dist.base_dist)
    return base, (*inner, *dist.transforms)


def support(dist: Distribution) -> constraints.Constraint:
    """The support of the law. Raises UnsupportedSupport, with its name, where it is discrete, refused or not to be trusted."""
    name = _name(dist)
    inner = _innermost(dist)
    if type(inner).__name__ in REFUSED:
        raise UnsupportedSupport(f"{name} cannot be sampled: {REFUSED[type(inner).__name__]}; write the density with from_log_prob")
    try:
        on = dist.support
    except NotImplementedError:
        on = None
    if on is None:
        raise UnsupportedSupport(f"{name} states no support; write the density with from_log_prob(..., support=...)")
    if on.is_discrete:
        raise UnsupportedSupport(f"{name} is discrete and boltzsample samples continuous laws; sum it out of the log-density")
    if isinstance(inner, MixtureSameFamily):
        _check_components(inner, name)
    return on


def is_discrete(dist: Distribution) -> bool:
    """Whether the support of the law is discrete; False where it states none."""
    try:
        on = dist.support
    except NotImplementedError:
        return False
    return on is not None and on.is_discrete


def _innermost(dist: Distribution) -> Distribution:
    """Without Independent and what Pyro wraps around a law (expanded, masked)."""
    wrappers = ("Independent", "ExpandedDistribution", "MaskedDistribution")
    while type(dist).__name__ in wrappers:
        dist = dist.base_dist  # type: ignore[attr-defined]
    return dist


def _check_components(mixture: MixtureSameFamily, name: str) -> None:
    """The components must share one support, and not name a wrong one."""
    component = mixture.component_distribution
    support(component)
    advice = "write the mixture with from_log_prob, -inf outside of a component"
    if peel(component)[1]:
        raise UnsupportedSupport(f"{name} has transformed components, whose support torch does not know; {advice}")
    on: Any = component.support
    while isinstance(on, (constraints.independent, constraints.MixtureSameFamilyConstraint)):
        on = on.base_constraint
    bounds = (getattr(on, side, None) for side in ("lower_bound", "upper_bound"))
    if any(isinstance(b, Tensor) and b.dim() for b in bounds):
        raise UnsupportedSupport(f"{name} has components with bounds of their own ({type(_innermost(component)).__name__}); {advice}")


def _name(dist: Distribution) -> str:
    name = type(_innermost(dist)).__name__
    return f"{name} of {type(_innermost(dist.component_distribution)).__name__}" if isinstance(dist, MixtureSameFamily) else name


# ---- copies that follow the points ----


class _Following:
    """A distribution in the dtype and on the device of the points; one copy for each."""

    def __init__(self, dist: Distribution) -> None:
        self.dist: Distribution = follow_points(dist)
        self.made: dict[Any, Distribution] = {}

    def __call__(self, x: Tensor) -> Distribution:
        key = (x.dtype, x.device)
        if key not in self.made:
            self.made[key] = follow_points(self.dist, x)
        return self.made[key]


def follow_points(value: Any, like: Tensor | None = None) -> Any:
    """A copy of a distribution, a transform or a tensor with floating parameters as `like` (without: as they are), and no validation:
    a NaN from a trajectory that left the floats is for samplers to reject, not for log_prob to raise."""
    if isinstance(value, Tensor):
        value = value.detach()
        return value.clone() if like is None else value.to(like) if value.is_floating_point() else value.to(like.device)
    if isinstance(value, (list, tuple)):
        return type(value)(follow_points(v, like) for v in value) if type(value) in (list, tuple) else value
    if not isinstance(value, (Distribution, Transform)) or isinstance(value, torch.nn.Module):
        return value
    if isinstance(value, Transform) and type(value).__name__ == "_InverseTransform":
        return follow_points(value.inv, like).inv  # a copy of it would forget what it is the inverse of
    made = copy.copy(value)
    kept = {name: follow_points(v, like) for name, v in vars(made).items() if name not in ("_inv", "_cached_x_y")}
    vars(made).update(kept)
    if isinstance(made, Distribution):
        vars(made)["_validate_args"] = False
    return made
