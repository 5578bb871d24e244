"""Curved densities with exact samplers, normalized (log Z = 0): the banana and the hybrid Rosenbrock.

Banana, in the plane:

    x_0 ~ N(0, s^2),   x_1 | x_0 ~ N(b (x_0^2 - s^2), 1),   s = 10, b = 0.03.

Haario, Saksman & Tamminen (1999), Computational Statistics 14(3), 375-395, up to the sign of x_1.

Hybrid Rosenbrock, d = 1 + n2 (n1 - 1): a first coordinate x_1 and n2 chains that all start from it, x_{j,1} = x_1,

    log p(x) = -a (x_1 - mu)^2 - b sum_{j=1..n2} sum_{i=2..n1} (x_{j,i} - x_{j,i-1}^2)^2 + const,

so that x_1 ~ N(mu, 1/(2a)) and x_{j,i} | x_{j,i-1} ~ N(x_{j,i-1}^2, 1/(2b)). Coordinates are stored chain after chain.
Pagani, Wiegand & Nadarajah (2022), Scandinavian Journal of Statistics 49(2), 657-680. `rosenbrock` has n1 = 3, n2 = 2,
mu = 1, b = 5 as there, and a = 2 where they have 1/20, which spreads x_{j,3} over thousands.
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
class Banana:
    """x_0 ~ N(0, s^2), x_1 | x_0 ~ N(b (x_0^2 - s^2), 1)."""

    s: float = 10.0
    b: float = 0.03

    @property
    def dim(self) -> int:
        return 2

    def log_prob(self, x: Tensor) -> Tensor:
        x_0, x_1 = x.unbind(-1)
        r = x_1 - self.b * (x_0.square() - self.s**2)
        return -0.5 * (x_0 / self.s).square() - 0.5 * r.square() - math.log(self.s) - LOG_2PI

    def grad_log_prob(self, x: Tensor) -> Tensor:
        x_0, x_1 = x.unbind(-1)
        r = x_1 - self.b * (x_0.square() - self.s**2)
        return torch.stack([-x_0 / self.s**2 + 2 * self.b * x_0 * r, -r], -1)


@dataclass(frozen=True)
class HybridRosenbrock:
    """n2 chains of length n1 that share their first coordinate."""

    n1: int = 3
    n2: int = 2
    mu: float = 1.0
    a: float = 2.0
    b: float = 5.0

    @property
    def dim(self) -> int:
        return 1 + self.n2 * (self.n1 - 1)

    def log_prob(self, x: Tensor) -> Tensor:
        return self._log_prob_of(x[..., 0], self._residuals(x)[1])

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_grad(x)[1]

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before, r = self._residuals(x)
        from_next = 4 * self.b * r * before  # each x_{j,i-1} in the residual after it
        grad_1 = -2 * self.a * (x[..., 0] - self.mu) + from_next[..., 0].sum(-1)
        grad = -2 * self.b * r + torch.cat([from_next[..., 1:], torch.zeros_like(r[..., :1])], -1)
        return self._log_prob_of(x[..., 0], r), torch.cat([grad_1[..., None], grad.flatten(-2)], -1)

    def _residuals(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x_{j,i-1} and r = x_{j,i} - x_{j,i-1}^2, both (*batch, n2, n1 - 1)."""
        chains = x[..., 1:].unflatten(-1, (self.n2, self.n1 - 1))
        first = x[..., :1, None].expand(*x.shape[:-1], self.n2, 1)
        before = torch.cat([first, chains[..., :-1]], -1)
        return before, chains - before.square()

    def _log_prob_of(self, x_1: Tensor, r: Tensor) -> Tensor:
        log_norm = 0.5 * (self.dim * math.log(math.pi) - math.log(self.a) - (self.dim - 1) * math.log(self.b))
        return -self.a * (x_1 - self.mu).square() - self.b * r.square().sum((-2, -1)) - log_norm


def push_banana(target: Banana, z: Tensor) -> Tensor:
    """z ~ N(0, I), (n, 2), to exact draws."""
    x_0 = target.s * z[..., 0]
    return torch.stack([x_0, target.b * (x_0.square() - target.s**2) + z[..., 1]], -1)


def push_rosenbrock(target: HybridRosenbrock, z: Tensor) -> Tensor:
    """z ~ N(0, I), (n, dim), to exact draws, each chain from its first coordinate on."""
    x_1 = target.mu + z[..., :1] / math.sqrt(2 * target.a)
    noise = z[..., 1:].unflatten(-1, (target.n2, target.n1 - 1)) / math.sqrt(2 * target.b)
    chains = [x_1.expand(*z.shape[:-1], target.n2)]
    for i in range(target.n1 - 1):
        chains.append(chains[-1].square() + noise[..., i])
    return torch.cat([x_1, torch.stack(chains[1:], -1).flatten(-2)], -1)


def banana() -> Problem:
    """The banana with s = 10, b = 0.03."""
    target = Banana()
    return Problem("banana", target, "a banana in the plane, 20 wide and 4 high", Pushforward(partial(push_banana, target), 2))


def rosenbrock() -> Problem:
    """The hybrid Rosenbrock in 5 dimensions."""
    target = HybridRosenbrock()
    about = "hybrid Rosenbrock in 5 dimensions: two chains of squares from one root"
    return Problem("rosenbrock", target, about, Pushforward(partial(push_rosenbrock, target), target.dim))
