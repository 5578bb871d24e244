"""Neal's funnel, normalized (log Z = 0).

    x_0 ~ N(0, sd^2),   x_i | x_0 ~ N(0, e^{x_0}),   i = 1..d-1,   with e^{x_0} the *variance*.

`funnel-sd3` has sd = 3 and d = 10: E x_i^2 = e^{4.5} = 90, yet E x_i^4 = 3 e^{18}, so sample averages of x_i^2 converge
too slowly to judge by; use P(x_0 > c) and the moments of x_0. Neal (2003), Annals of Statistics 31(3), 705-767, section 8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from targets.problem import Problem, Pushforward

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Funnel:
    """x_0 ~ N(0, sd^2) and dim - 1 coordinates of variance e^{x_0}."""

    dim: int = 10
    sd: float = 3.0

    def log_prob(self, x: Tensor) -> Tensor:
        x_0 = x[..., 0]
        q = (x[..., 1:] * (-0.5 * x_0).exp()[..., None]).square().sum(-1)
        log_norm = math.log(self.sd) + 0.5 * self.dim * LOG_2PI
        return -0.5 * (x_0 / self.sd).square() - 0.5 * q - 0.5 * (self.dim - 1) * x_0 - log_norm

    def grad_log_prob(self, x: Tensor) -> Tensor:
        x_0 = x[..., 0]
        z = x[..., 1:] * (-0.5 * x_0).exp()[..., None]  # (*batch, dim - 1)
        grad_0 = -x_0 / self.sd**2 + 0.5 * z.square().sum(-1) - 0.5 * (self.dim - 1)
        return torch.cat([grad_0[..., None], -z * (-0.5 * x_0).exp()[..., None]], -1)


def push_funnel(target: Funnel, z: Tensor) -> Tensor:
    """z ~ N(0, I), (n, dim), to exact draws."""
    x_0 = target.sd * z[..., :1]
    return torch.cat([x_0, (0.5 * x_0).exp() * z[..., 1:]], -1)


def funnel(d: int = 10, sd: float = 3.0) -> Problem:
    """The funnel; its card is kept for d = 10, sd = 3."""
    target = Funnel(d, sd)
    name = f"funnel-sd{sd:g}" if d == 10 else f"funnel-sd{sd:g}-d{d}"
    about = f"Neal's funnel in {d} dimensions, x_0 of standard deviation {sd:g}"
    return Problem(name, target, about, Pushforward(partial(push_funnel, target), d))
