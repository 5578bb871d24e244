"""Scale moves: the whole point is stretched or shrunk about the origin, which gradients in a heavy tail would take many steps for.

From z in d dimensions, with s ~ N(0, S^2), propose

    z' = e^s z,

and accept it with probability min(1, e^(d s) pi(z') / pi(z)): the map has the determinant e^(d s), and -s undoes it (Liu & Sabatti
2000, Biometrika 87(2), generalized Gibbs on the group of scalings). The angle of z stays, so that a local kernel has to go with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from boltzsample.kernels.kernel import ChainState, Noise, PointState, StepInfo, metropolis
from boltzsample.streams import Rng
from boltzsample.target import Target, log_prob_and_grad


@dataclass(frozen=True)
class Scaling:
    """A scale move with s ~ N(0, S^2). Price: one `log_prob_and_grad` per chain, or one `log_prob` where there is no gradient.

    S = 1 leaves no heavy tail out: log |z| of a Student t_5 in many dimensions spreads by .35, of a Cauchy law by 1.1.

    >>> Scaling().price
    (0, 1)
    """

    S: float = 1.0
    gradient: bool = True

    @property
    def price(self) -> tuple[int, int]:
        return (0, 1) if self.gradient else (1, 0)

    def init(self, target: Target, x: Tensor) -> ChainState | PointState:
        return ChainState(x, *log_prob_and_grad(target, x)) if self.gradient else PointState(x, target.log_prob(x))

    def draw(self, rng: Rng, batch: tuple[int, ...], dim: int) -> Noise:
        return Noise(normal=rng.normal(*batch, 1), uniform=rng.uniform(*batch), jitter=rng.uniform(*batch))

    def step(self, target: Target, state: Any, noise: Noise) -> tuple[Any, StepInfo]:
        s = self.S * noise.normal  # (*batch, 1)
        new = self.init(target, s.exp() * state.x)
        log_r = new.log_p - state.log_p + state.x.shape[-1] * s[..., 0]

        return metropolis(state, new, log_r, noise.uniform)
