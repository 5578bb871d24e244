"""Targets made of targets: tempered, observed through noise, pulled back through a map, constrained to a support.

    Tempered      log pi(x) = beta log p(x) + (1 - beta) log p_0(x)
    Observed      log pi(x) = log p(x) - |y - alpha x|^2 / (2 sigma^2)
    Pullback      log pi(z) = log p(T(z)) + log|det J_T(z)|,                      x = T(z)
    Constrained   the pullback through the bijection from R^n onto the support of p

Every number that a ladder, a schedule or adaptation changes is a tensor that broadcasts against the batch, so one compiled
graph serves all its values. Each view asks its base once per point; nobody differentiates through a base (HOUSE.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import constraints

from boltzsample.bijections import Bijection
from boltzsample.constraints import bijection
from boltzsample.maps import Diagonal, Map, push_vjp  # noqa: F401 (Diagonal is the doctests')
from boltzsample.target import Target, log_prob_and_grad, readout

__all__ = ["Constrained", "Observed", "Pullback", "Tempered"]

Readout = Tensor | dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Tempered:
    """The density p^beta, or p^beta p_0^(1-beta) with a `base` p_0; beta in [0, 1] is a tensor that broadcasts against the batch.

    At beta = 0 the target, and at beta = 1 the base, has no say at all, not even where it is -inf (0 * -inf is NaN).
    The law of a path from base to target: Gelman & Meng (1998), Statistical Science 13(2), equation 26 (the geometric path).

    >>> from boltzsample.adapters import from_log_prob
    >>> cold = from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=2)
    >>> Tempered(cold, torch.tensor([0.0, 0.5, 1.0])).log_prob(torch.ones(3, 2))
    tensor([ 0.0000, -0.5000, -1.0000])
    """

    target: Target
    beta: Tensor
    base: Target | None = None

    @property
    def dim(self) -> int:
        return self.target.dim

    def log_prob(self, x: Tensor) -> Tensor:
        log_p = _times(self.beta, self.target.log_prob(x))
        return log_p if self.base is None else log_p + _times(1 - self.beta, self.base.log_prob(x))

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_grad(x)[1]

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b = self.beta
        log_p, grad = log_prob_and_grad(self.target, x)
        log_p, grad = _times(b, log_p), _times(b[..., None], grad)
        if self.base is None:
            return log_p, grad
        log_p0, grad0 = log_prob_and_grad(self.base, x)
        return log_p + _times(1 - b, log_p0), grad + _times(1 - b[..., None], grad0)

    def readout(self, x: Tensor) -> Readout:
        return readout(self.target, x)


@dataclass(frozen=True, eq=False)
class Observed:
    """p(x | y) for y = alpha x + sigma xi, xi ~ N(0, I), up to a constant: log p(x) - |y - alpha x|^2 / (2 sigma^2).

    y: (*batch, dim); alpha, sigma: tensors that broadcast against the batch.

    >>> from boltzsample.adapters import from_log_prob
    >>> prior = from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=1)
    >>> seen = Observed(prior, y=torch.tensor([[3.0]]), alpha=torch.tensor(1.0), sigma=torch.tensor(0.5))
    >>> seen.grad_log_prob(torch.tensor([[2.0], [2.4]])).round(decimals=3).abs()      # the posterior mean is 3 / (1 + 0.25)
    tensor([[2.],
            [0.]])
    """

    target: Target
    y: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    def dim(self) -> int:
        return self.target.dim

    def log_prob(self, x: Tensor) -> Tensor:
        miss = (self.y - self.alpha[..., None] * x) / self.sigma[..., None]
        return self.target.log_prob(x) - 0.5 * miss.square().sum(-1)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_grad(x)[1]

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        miss = (self.y - self.alpha[..., None] * x) / self.sigma[..., None]
        log_p, grad = log_prob_and_grad(self.target, x)
        return log_p - 0.5 * miss.square().sum(-1), grad + (self.alpha / self.sigma)[..., None] * miss

    def readout(self, x: Tensor) -> Readout:
        return readout(self.target, x)


@dataclass(frozen=True, eq=False)
class Pullback:
    """The density of z when x = T(z) has the density of `target`: log p(T(z)) + log|det J_T(z)|.

    Through an affine map it is a preconditioner, through a flow it is latent-space sampling.

    >>> from boltzsample.adapters import from_log_prob
    >>> narrow = from_log_prob(lambda x: -0.5 * (x / 0.1).square().sum(-1), dim=1)
    >>> unit = Pullback(narrow, Diagonal(torch.tensor([0.0]), torch.tensor([0.1])))
    >>> unit.grad_log_prob(torch.tensor([[2.0]]))
    tensor([[-2.]])
    """

    target: Target
    map: Map

    @property
    def dim(self) -> int:
        return self.target.dim

    def log_prob(self, z: Tensor) -> Tensor:
        x, log_det = self.map.push(z)
        return self.target.log_prob(x) + log_det

    def grad_log_prob(self, z: Tensor) -> Tensor:
        return self.log_prob_and_grad(z)[1]

    def log_prob_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det, vjp = push_vjp(self.map, z)
        log_p, grad = log_prob_and_grad(self.target, x)
        return log_p + log_det, vjp(grad)

    def readout(self, z: Tensor) -> Readout:
        return readout(self.target, self.map.push(z)[0])


@dataclass(frozen=True, eq=False)
class Constrained:
    """A target given on a `support` of `torch.distributions.constraints`, as a target of z in R^n; `readout(z)` is x again.

    `target` sees x of the user's space flattened, (*batch, prod(event_shape)); event_shape defaults to (target.dim,). `dim` is the
    unconstrained size n: d - 1 for a simplex of d parts, d(d + 1)/2 for a d x d covariance. The density of a symmetric or triangular
    matrix is meant with respect to its free entries on and below the diagonal. Raises UnsupportedSupport where no bijection exists.

    >>> from boltzsample.adapters import from_log_prob
    >>> half_normal = from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=1, support=constraints.positive)
    >>> half_normal.log_prob(torch.tensor([[0.0]])), readout(half_normal, torch.tensor([[0.0]]))
    (tensor([-0.5000]), tensor([[1.]]))
    """

    target: Target
    support: constraints.Constraint
    event_shape: tuple[int, ...] | None = None
    _onto: Bijection = field(init=False, repr=False)
    _pullback: Pullback = field(init=False, repr=False)
    _event_shape: torch.Size = field(init=False, repr=False)

    def __post_init__(self) -> None:
        event_shape = torch.Size((self.target.dim,) if self.event_shape is None else self.event_shape)
        onto = bijection(self.support, event_shape)
        object.__setattr__(self, "_onto", onto)
        object.__setattr__(self, "_pullback", Pullback(self.target, onto))
        object.__setattr__(self, "_event_shape", event_shape)

    @property
    def dim(self) -> int:
        return self._onto.size

    @property
    def names(self) -> tuple[str, ...] | None:
        """The names of the coordinates of the user's space, where its target has any."""
        return getattr(self.target, "names", None)

    def log_prob(self, z: Tensor) -> Tensor:
        return self._pullback.log_prob(z)

    def grad_log_prob(self, z: Tensor) -> Tensor:
        return self._pullback.grad_log_prob(z)

    def log_prob_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._pullback.log_prob_and_grad(z)

    def pull(self, x: Tensor) -> Tensor:
        """z (*batch, dim) of points x (*batch, *event_shape) of the user's space, such as starts."""
        return self._onto.pull(x.reshape(*x.shape[: x.dim() - len(self._event_shape)], -1))

    def log_det(self, z: Tensor) -> Tensor:
        """log|det dx/dz| (*batch) at z: what turns a density of x into one of z."""
        return self._onto.push(z)[1]

    def readout(self, z: Tensor) -> Readout:
        x = self._pullback.readout(z)
        return x if isinstance(x, dict) else x.reshape(z.shape[:-1] + self._event_shape)


def _times(b: Tensor, value: Tensor) -> Tensor:
    return torch.where(b > 0, b * value, 0.0)
