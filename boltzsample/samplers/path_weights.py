"""Exact weights of sampled paths: two Gaussian kernels a step, at any step size.

A path x_0 -> x_1 -> ... -> x_K from a start law q_0 by forward kernels f_k(x_(k+1) | x_k), meant to end in the density gamma = Z pi.
With any backward kernels b_k(x_k | x_(k+1)),

    log w = log gamma(x_K) + sum_k log b_k(x_k | x_(k+1)) - log q_0(x_0) - sum_k log f_k(x_(k+1) | x_k),        E w = Z,

exactly, whatever the kernels: discretization, a poor score or a wrong reference cost effective draws, not correctness. The densities
are those of the kernels that made the step; a Girsanov integral discretized apart, or log dP^u / dP^ref of a learned reference, is not
this and is silently wrong (ALGORITHMS.md, section 3.3). Backward paths from draws of pi have the same weight, and

    E_forward log w <= log Z <= E_backward log w.

Annealed importance sampling is the case of kernels that leave a density invariant (Neal 2001); for diffusions: Vargas, Grathwohl &
Doucet (2023), arXiv:2302.13834, section 3; Zhang & Chen (2022), arXiv:2111.15141.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from boltzsample.streams import Rng

LOG_2_PI = math.log(2 * math.pi)


class Law(Protocol):
    """The law of a batch of points: one draw for each, and the log-density (float64) at one point for each."""

    def draw(self, rng: Rng) -> Tensor: ...

    def log_prob(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, sd^2) with independent coordinates. mean: (*batch, dim); sd > 0: broadcasts against it.

    >>> Gaussian(torch.zeros(1, 2), torch.ones(())).log_prob(torch.ones(1, 2))          # -log 2 pi - 1
    tensor([-2.8379], dtype=torch.float64)
    """

    mean: Tensor
    sd: Tensor

    def draw(self, rng: Rng) -> Tensor:
        return self.mean + self.sd.to(self.mean) * rng.normal(*self.mean.shape)

    def log_prob(self, x: Tensor) -> Tensor:
        sd = self.sd.double()
        z = (x.double() - self.mean.double()) / sd
        return -0.5 * z.square().sum(-1) - (sd.log() + LOG_2_PI / 2).expand_as(z).sum(-1)


class WeightedPath(NamedTuple):
    """Ends of paths and their log-weights less log gamma: x (*batch, dim), log_ratio (*batch), float64."""

    x: Tensor
    log_ratio: Tensor


Kernels = Callable[[int, Tensor], Law]  # (k, the point it starts from) -> the law of the next


def walk(x: Tensor, log_q: Tensor, forward: Kernels, backward: Kernels, K: int, rng: Rng) -> WeightedPath:
    """Forward paths from x with log-density log_q: sum_k (log b_k - log f_k) - log q_0; add log gamma at the ends."""
    total = -log_q.double()
    for k in range(K):
        f = forward(k, x)
        y = f.draw(rng)
        total = total + backward(k, y).log_prob(x) - f.log_prob(y)
        x = y
    return WeightedPath(x, total)


def walk_back(x: Tensor, log_q: Callable[[Tensor], Tensor], forward: Kernels, backward: Kernels, K: int, rng: Rng) -> WeightedPath:
    """Backward paths from draws x of the target: their starts x_0, and the same log-ratio; add log gamma at the draws."""
    total = torch.zeros(x.shape[:-1], dtype=torch.float64, device=x.device)
    for k in reversed(range(K)):
        b = backward(k, x)
        y = b.draw(rng)
        total = total + b.log_prob(y) - forward(k, y).log_prob(x)
        x = y
    return WeightedPath(x, total - log_q(x).double())


def retrace(x: Tensor, backward: Kernels, K: int, rng: Rng) -> list[Tensor]:
    """A backward path from x: its places x_0, ..., x_K = x, all of them kept; `walk_back` keeps none."""
    trail = [x]
    for k in reversed(range(K)):
        trail.append(backward(k, trail[-1]).draw(rng))
    return trail[::-1]


def along(trail: list[Tensor], log_q: Tensor, forward: Kernels, backward: Kernels) -> Tensor:
    """The log-ratio of a path with these places, forward kernels asked for in their own order: they may depend on what came before."""
    total = -log_q.double()
    for k, (x, y) in enumerate(pairwise(trail)):
        total = total + backward(k, y).log_prob(x) - forward(k, x).log_prob(y)
    return total
