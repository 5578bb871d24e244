"""The contract of a transition kernel, and the coin that Metropolis kernels toss.

A kernel is a frozen dataclass whose tuned numbers are tensors that broadcast against the batch (a float would recompile).
`step` is pure: no RNG, no Python branch on values. Noise is drawn outside, in blocks, by `draw`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from boltzsample.streams import Rng
from boltzsample.target import Target


class Noise(NamedTuple):
    """Noise of one step, or of a block of steps with one more leading axis. A kernel that needs more has a NamedTuple of its own,
    with `normal` and `uniform` among its fields; the chain loop only slices it."""

    normal: Tensor  # (*batch, dim)
    uniform: Tensor  # (*batch): the coin
    jitter: Tensor  # (*batch): for kernels that jitter their step size


class PointState(NamedTuple):
    """A point and its log-density."""

    x: Tensor  # (*batch, dim)
    log_p: Tensor  # (*batch)


class ChainState(NamedTuple):
    """A point, its log-density and the gradient there."""

    x: Tensor  # (*batch, dim)
    log_p: Tensor  # (*batch)
    grad: Tensor  # (*batch, dim)


class StepInfo(NamedTuple):
    """What one step did, per chain."""

    accept_prob: Tensor  # (*batch) min(1, r), 0 where r is NaN
    accepted: Tensor  # (*batch) bool
    divergent: Tensor  # (*batch) bool: the integrator left its region of validity
    x: Tensor  # (*batch, dim) the proposal
    log_p: Tensor  # (*batch) its log-density
    lost: Tensor  # (*batch) bool: log r is NaN


def first_step() -> Tensor:
    """A step size to begin adaptation with: .25 in the units of the preconditioner. Set h yourself to use a kernel unfitted."""
    return torch.tensor(0.25, dtype=torch.float64)


def as_step(h: Tensor | float) -> Tensor:
    """h as a tensor: a float would be another graph for every value."""
    return h if isinstance(h, Tensor) else torch.tensor(h, dtype=torch.float64)


S = TypeVar("S", PointState, ChainState)


class Kernel(Protocol):
    """A Markov transition. Frozen dataclass; ints are structure, everything tuned is a tensor field."""

    @property
    def price(self) -> tuple[int, int]:
        """(log_prob, log_prob_and_grad) calls per chain and step."""
        ...

    def init(self, target: Target, x: Tensor) -> Any: ...

    def draw(self, rng: Rng, batch: tuple[int, ...], dim: int) -> Any: ...

    def step(self, target: Target, state: Any, noise: Any) -> tuple[Any, StepInfo]: ...


class StepSized(Kernel, Protocol):
    """A kernel with a tuned step size `h` and the acceptance its adaptation aims at."""

    @property
    def h(self) -> Tensor: ...

    @property
    def target_accept(self) -> float: ...


def metropolis(state: S, proposal: S, log_r: Tensor, uniform: Tensor) -> tuple[S, StepInfo]:
    """Accept the proposal iff log u < log r. NaN rejects, and so does a proposal of infinite density.

    A proposal with log_p = +inf is an error the chain loop reports; it must never become a state.
    """
    legal = proposal.log_p < torch.inf  # False for NaN too
    accepted = (torch.log(uniform) < log_r) & legal
    accept_prob = torch.where(legal, torch.nan_to_num(log_r, nan=-torch.inf).clamp(max=0.0).exp(), 0.0)
    chosen = (torch.where(_like(accepted, new), new, old) for new, old in zip(proposal, state, strict=True))
    info = StepInfo(accept_prob, accepted, torch.zeros_like(accepted), proposal.x, proposal.log_p, torch.isnan(log_r))
    return type(state)(*chosen), info


def _like(mask: Tensor, value: Tensor) -> Tensor:
    return mask if mask.ndim == value.ndim else mask[..., None]
