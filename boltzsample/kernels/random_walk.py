"""Random-walk Metropolis.

From x, with scale h, propose

    y = x + h xi,        xi ~ N(0, I),

and accept it with probability min(1, pi(y) / pi(x)); the proposal is symmetric. Needs no gradient.

Metropolis, Rosenbluth, Rosenbluth, Teller & Teller (1953), J. Chem. Phys. 21, 1087.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from boltzsample.kernels.kernel import Noise, PointState, StepInfo, as_step, first_step, metropolis
from boltzsample.streams import Rng
from boltzsample.target import Target


@dataclass(frozen=True)
class RandomWalk:
    """Random-walk Metropolis with scale h > 0, a tensor that broadcasts against the batch. Price: one `log_prob` per chain.

    >>> import torch
    >>> RandomWalk(h=torch.tensor(0.5)).price
    (1, 0)
    """

    h: Tensor = field(default_factory=first_step)
    target_accept: float = 0.234  # Roberts, Gelman & Gilks (1997), Ann. Appl. Probab. 7, 110

    def __post_init__(self) -> None:
        object.__setattr__(self, "h", as_step(self.h))

    @property
    def price(self) -> tuple[int, int]:
        return 1, 0

    def init(self, target: Target, x: Tensor) -> PointState:
        return PointState(x, target.log_prob(x))

    def draw(self, rng: Rng, batch: tuple[int, ...], dim: int) -> Noise:
        return Noise(normal=rng.normal(*batch, dim), uniform=rng.uniform(*batch), jitter=rng.uniform(*batch))

    def step(self, target: Target, state: PointState, noise: Noise) -> tuple[PointState, StepInfo]:
        x, log_p_x = state

        y = x + self.h[..., None] * noise.normal
        log_p_y = target.log_prob(y)
        log_r = log_p_y - log_p_x

        return metropolis(state, PointState(y, log_p_y), log_r, noise.uniform)
