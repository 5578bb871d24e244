"""Chains on posteriors p(x | y), y = alpha x + sigma xi, and the posterior means that Tweedie's formula asks for.

    grad log p_sigma(y) = (alpha E[x | y] - y) / sigma^2                       (Robbins 1956; Miyasawa 1961; Efron 2011, JASA 106)

Several chains for every y, all of them one batch, in coordinates z of a frame x = m(y) + L z that whitens the posterior as far as it is
known. The posterior's score g = grad_z log p(x | y) has mean zero under it (Stein's identity), so

    E[x | y] = m + L E[z + G g]        for any matrix G,

and G = E[g g^T]^-1 is the best one, as E[z g^T] = -I. Of a Gaussian posterior z + G g is its mean at every draw: no noise is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from boltzsample.errors import PositiveInfinityError
from boltzsample.kernels import HMC
from boltzsample.kernels.adapt import with_step
from boltzsample.kernels.kernel import ChainState, StepSized
from boltzsample.maps import Dense, Diagonal
from boltzsample.samplers.noised import by_row
from boltzsample.streams import Rng
from boltzsample.target import Target, log_prob_and_grad
from boltzsample.views import Observed, Pullback

TURN = math.pi / 2
GAIN = 1.0  # of log h for each unit of acceptance missed, while it is tuned


@dataclass(frozen=True, eq=False)
class Units:
    """The target in the coordinates z of an affine map, in float64 outside and in the run's dtype inside; NaN is no density."""

    target: Target
    map: Diagonal | Dense
    dtype: torch.dtype

    @property
    def dim(self) -> int:
        return self.target.dim

    def log_prob(self, z: Tensor) -> Tensor:
        return self.target.log_prob(self.x(z)).double() + self.map.log_det

    def grad_log_prob(self, z: Tensor) -> Tensor:
        return self.log_prob_and_grad(z)[1]

    def log_prob_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_p, grad = log_prob_and_grad(self.target, self.x(z))
        _, _, vjp = self.map.push_vjp(z)
        return log_p.double() + self.map.log_det, vjp(grad.double()).nan_to_num(0.0, 0.0, 0.0)

    def x(self, z: Tensor) -> Tensor:
        """The user's coordinates, in the run's dtype."""
        return self.map.push(z)[0].to(self.dtype)


@dataclass(frozen=True, eq=False)
class Frame:
    """The map x = m + L_j z of every row: m (rows, dim), L (J, dim, dim) or one number (), j (rows,)."""

    m: Tensor
    L: Tensor
    j: Tensor

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.m + by_row(self.L, self.j.expand(z.shape[:-1]), z), z.new_zeros(())

    def push_vjp(self, z: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        return *self.push(z), lambda g: by_row(self.L.mT if self.L.ndim else self.L, self.j.expand(g.shape[:-1]), g)


@dataclass(frozen=True, eq=False)
class Scaled:
    """The map x = scale z."""

    scale: Tensor

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale * z, z.new_zeros(())

    def push_vjp(self, z: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        return *self.push(z), lambda g: self.scale * g


@dataclass(frozen=True)
class Inner:
    """Posterior chains: how many for each y, how many transitions at each level, and the kernel that makes them (None: HMC with a number
    of leapfrogs by dimension). Its step is tuned.

    >>> Inner(chains=2).ready(32).kernel.L
    3
    """

    chains: int = 4
    transitions: int = 2
    kernel: StepSized | None = None

    def __post_init__(self) -> None:
        for name in ("chains", "transitions"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; wanted an integer >= 1")

    def ready(self, dim: int) -> Inner:
        """With a kernel."""
        if self.kernel is not None:
            return self
        h = torch.tensor(dim**-0.25, dtype=torch.float64)
        return replace(self, kernel=HMC(h=h, L=math.ceil(1.2 * dim**0.25)))

    @property
    def moves(self) -> StepSized:
        """The kernel. Raises ValueError before `ready`."""
        if self.kernel is None:
            raise ValueError("these chains have no kernel yet: ask ready(dim) for them")
        return self.kernel

    @property
    def longest(self) -> float:
        """The longest step: HMC's trajectories turn back after a quarter of a period."""
        return TURN / self.moves.L if isinstance(self.moves, HMC) else math.inf

    def price(self, levels: int, more: int = 0) -> int:
        """Evaluations of the chains of one y over so many levels, with `more` transitions beside."""
        each = sum(self.moves.price)
        return self.chains * (levels * (1 + self.transitions * each) + more * each)


class Seen(NamedTuple):
    """What chains showed at one level: positions z and scores g of every kept step (steps, rows, dim), acceptance (steps, rows)."""

    z: Tensor
    g: Tensor
    accept: Tensor


@dataclass
class Spent:
    """What the chains of a block have asked for: transitions and states made, in rows, and what went wrong on the way."""

    transitions: int = 0
    inits: int = 0
    nan: int = 0
    accepted: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.transitions + other.transitions, self.inits + other.inits, self.nan + other.nan, self.accepted + other.accepted
        )


def posterior(target: Units, y: Tensor, alpha: Tensor, sigma: Tensor, frame: Frame | Scaled) -> Pullback:
    """p(x | y) of every row y (rows, dim), in the coordinates z of the frame."""
    return Pullback(Observed(target, y, alpha, sigma), frame)


def look(view: Pullback, z: Tensor, kernel: StepSized, steps: int, rng: Rng, spent: Spent) -> Seen:
    """`steps` transitions of every chain on a `posterior`, from z (rows, dim). Raises PositiveInfinityError."""
    state: ChainState = kernel.init(view, z)
    state = state._replace(log_p=state.log_p.nan_to_num(-torch.inf, torch.inf, -torch.inf))
    spent.inits += len(z)
    _refuse_infinite(state.log_p, z, view)
    seen = []
    for _ in range(steps):
        state, info = kernel.step(view, state, kernel.draw(rng, z.shape[:-1], z.shape[-1]))
        _refuse_infinite(info.log_p, info.x, view)
        spent.transitions += len(z)
        spent.nan += int((info.log_p.isnan() & info.x.isfinite().all(-1)).sum())
        spent.accepted += float(info.accept_prob.sum())
        seen.append((state.x, state.grad, info.accept_prob))
    return Seen(*(torch.stack(part) for part in zip(*seen, strict=True)))


def tuned(kernel: StepSized, accept: Tensor, longest: float) -> StepSized:
    """The kernel with its step moved towards its target acceptance, by one transition's acceptance probabilities."""
    log_h = kernel.h.log() + GAIN * (accept.mean() - kernel.target_accept)
    return with_step(kernel, log_h.exp().clamp(max=longest))  # type: ignore[no-any-return]


def _refuse_infinite(log_p: Tensor, z: Tensor, view: Pullback) -> None:
    if bool((log_p == torch.inf).any()):
        target: Any = view.target  # Observed, of Units
        raise PositiveInfinityError.at(target.target.x(view.map.push(z)[0])[log_p == torch.inf][0])
