"""Hamiltonian Monte Carlo with a fixed number of leapfrog steps and a jittered step size.

With H(x, p) = -log pi(x) + |p|^2 / 2, from x draw p ~ N(0, I) and e = h (1 + J (2u - 1)), u ~ U(0, 1), independent of x.
Then L times

    p <- p + e/2 grad log pi(x),    x <- x + e p,    p <- p + e/2 grad log pi(x),

which preserves volume and is undone by flipping p, and accept the end point with probability

    min(1, r),        log r = H(x, p) - H(x', p').

Duane, Kennedy, Pendleton & Roweth (1987), Phys. Lett. B 195, 216; Neal (2011), arXiv:1206.1901. h is jittered rather than L:
another L is another graph, and jitter breaks the resonance of a fixed trajectory length (Neal 2011, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from boltzsample.kernels.kernel import ChainState, Noise, StepInfo, as_step, first_step, metropolis
from boltzsample.streams import Rng
from boltzsample.target import Target, log_prob_and_grad

DIVERGENCE = 1000.0  # an energy error in nats that no stable trajectory makes


@dataclass(frozen=True)
class HMC:
    """HMC with step size h > 0 (a tensor that broadcasts against the batch) and L >= 1 leapfrog steps, a frozen int.

    `jitter` J in [0, 1) spreads each chain's step size uniformly over h (1 - J, 1 + J). Price: L `log_prob_and_grad` per chain.

    >>> import torch
    >>> HMC(h=torch.tensor(0.1), L=8).price
    (0, 8)
    """

    h: Tensor = field(default_factory=first_step)
    L: int = 8
    jitter: float = 0.3
    keeps_nan: ClassVar[bool] = True  # a NaN gradient on the way leaves p NaN to the end, and log r
    target_accept: float = 0.651  # of the harmonic mean over chains: Hoffman, Radul & Sountsov (2021)

    def __post_init__(self) -> None:
        object.__setattr__(self, "h", as_step(self.h))

    @property
    def price(self) -> tuple[int, int]:
        return 0, self.L

    def init(self, target: Target, x: Tensor) -> ChainState:
        return ChainState(x, *log_prob_and_grad(target, x))

    def draw(self, rng: Rng, batch: tuple[int, ...], dim: int) -> Noise:
        return Noise(normal=rng.normal(*batch, dim), uniform=rng.uniform(*batch), jitter=rng.uniform(*batch))

    def step(self, target: Target, state: ChainState, noise: Noise) -> tuple[ChainState, StepInfo]:
        e = (self.h * (1 + self.jitter * (2 * noise.jitter - 1)))[..., None]  # (*batch, 1)
        p0 = noise.normal

        x, log_p, grad = state
        p = p0 + 0.5 * e * grad
        for i in range(self.L):
            x = x + e * p
            log_p, grad = log_prob_and_grad(target, x)
            p = p + (e if i < self.L - 1 else 0.5 * e) * grad  # two half kicks in a row are one

        kinetic0, kinetic = 0.5 * p0.square().sum(-1), 0.5 * p.square().sum(-1)
        log_r = (log_p - kinetic) - (state.log_p - kinetic0)

        moved, info = metropolis(state, ChainState(x, log_p, grad), log_r, noise.uniform)
        flew_off = ~(kinetic - kinetic0 < DIVERGENCE)  # NaN included
        broke = ~(log_r >= -DIVERGENCE) & (log_p > -float("inf"))  # a hard edge of the support is no divergence
        return moved, info._replace(divergent=flew_off | broke)
