"""Langevin kernels: unadjusted (ULA) and Metropolis-adjusted (MALA).

From x, with step size h, take one Euler step of the Langevin diffusion of pi,

    y = x + h grad log pi(x) + sqrt(2h) xi,        xi ~ N(0, I).

ULA moves to y: approximate, with a bias of order h. MALA accepts y with probability min(1, r), where

    r = pi(y) q(x | y) / (pi(x) q(y | x)),         q(y | x) = N(y; x + h grad log pi(x), 2h I),

and is exact. Roberts & Tweedie (1996), Bernoulli 2(4), 341-363.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from boltzsample.kernels.kernel import ChainState, Noise, StepInfo, as_step, first_step, metropolis
from boltzsample.streams import Rng
from boltzsample.target import Target, log_prob_and_grad


@dataclass(frozen=True)
class ULA:
    """Unadjusted Langevin with step size h > 0: approximate, flagged UNADJUSTED. Price: one `log_prob_and_grad` per chain.

    A step to a point of zero or undefined density is refused. `target_accept` is the acceptance MALA would have at its h.

    >>> import torch
    >>> ULA(h=torch.tensor(0.1)).price
    (0, 1)
    """

    h: Tensor = field(default_factory=first_step)
    target_accept: float = 0.9

    def __post_init__(self) -> None:
        object.__setattr__(self, "h", as_step(self.h))

    @property
    def price(self) -> tuple[int, int]:
        return 0, 1

    def init(self, target: Target, x: Tensor) -> ChainState:
        return ChainState(x, *log_prob_and_grad(target, x))

    def draw(self, rng: Rng, batch: tuple[int, ...], dim: int) -> Noise:
        return Noise(normal=rng.normal(*batch, dim), uniform=rng.uniform(*batch), jitter=rng.uniform(*batch))

    def step(self, target: Target, state: ChainState, noise: Noise) -> tuple[ChainState, StepInfo]:
        hd = self.h[..., None]
        x, log_p_x, grad_x = state

        y = x + hd * grad_x + (2 * hd).sqrt() * noise.normal
        log_p_y, grad_y = log_prob_and_grad(target, y)

        always = torch.where(log_p_y > -torch.inf, torch.inf, -torch.inf)
        moved, info = metropolis(state, ChainState(y, log_p_y, grad_y), always, noise.uniform)

        # what MALA would have accepted: the only handle adaptation has on the bias
        log_q_y_given_x = -(y - x - hd * grad_x).square().sum(-1) / (4 * self.h)
        log_q_x_given_y = -(x - y - hd * grad_y).square().sum(-1) / (4 * self.h)
        log_r = (log_p_y + log_q_x_given_y) - (log_p_x + log_q_y_given_x)
        return moved, info._replace(accept_prob=torch.nan_to_num(log_r, nan=-torch.inf).clamp(max=0.0).exp())


@dataclass(frozen=True)
class MALA:
    """MALA with step size h > 0, a tensor that broadcasts against the batch. Price: one `log_prob_and_grad` per chain.

    >>> import torch
    >>> MALA(h=torch.tensor(0.1)).price
    (0, 1)
    """

    h: Tensor = field(default_factory=first_step)
    target_accept: float = 0.574  # Roberts & Rosenthal (1998), JRSS B 60, 255

    def __post_init__(self) -> None:
        object.__setattr__(self, "h", as_step(self.h))

    @property
    def price(self) -> tuple[int, int]:
        return 0, 1

    def init(self, target: Target, x: Tensor) -> ChainState:
        return ChainState(x, *log_prob_and_grad(target, x))

    def draw(self, rng: Rng, batch: tuple[int, ...], dim: int) -> Noise:
        return Noise(normal=rng.normal(*batch, dim), uniform=rng.uniform(*batch), jitter=rng.uniform(*batch))

    def step(self, target: Target, state: ChainState, noise: Noise) -> tuple[ChainState, StepInfo]:
        hd = self.h[..., None]
        x, log_p_x, grad_x = state

        y = x + hd * grad_x + (2 * hd).sqrt() * noise.normal
        log_p_y, grad_y = log_prob_and_grad(target, y)

        log_q_y_given_x = -(y - x - hd * grad_x).square().sum(-1) / (4 * self.h)
        log_q_x_given_y = -(x - y - hd * grad_y).square().sum(-1) / (4 * self.h)
        log_r = (log_p_y + log_q_x_given_y) - (log_p_x + log_q_y_given_x)

        return metropolis(state, ChainState(y, log_p_y, grad_y), log_r, noise.uniform)
