"""Negative controls: densities on which a sampler must not print a confident number. No cards; `wrong` says what is wrong.

    flat          log p = 0 on R^2                            improper, the gradient is zero everywhere
    reciprocal    log p = -log |x| on R                       improper at 0 and at infinity, by a logarithm only
    cauchy        independent Cauchy coordinates in R^2       a proper density without a mean
    nan-region    N(0, I) on R^3, NaN where x_0 > 1.5         6.7 % of the mass cannot be evaluated

`infinite_variance_pair` is a target with a proposal whose importance weights have no variance although log Z and all draws look
well: p = N(0, I), q = N(0, s^2 I), s^2 < 1/2, for E_q (p/q)^2 is finite only where 2 - 1/s^2 > 0. The spike that nobody finds
is `narrow-spike` in `targets/modes.py`: it has a card, for its truth is known.

>>> control("flat").target.log_prob(torch.zeros(3, 2))
tensor([0., 0., 0.])
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from targets.mixture import GaussianMixture, mixture_draws
from targets.problem import ExactSampler, Problem

if TYPE_CHECKING:
    from boltzsample.target import Target


@dataclass(frozen=True)
class Flat:
    """log p = 0."""

    dim: int = 2

    def log_prob(self, x: Tensor) -> Tensor:
        return 0.0 * x.sum(-1)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True)
class Reciprocal:
    """log p = -sum_i log |x_i|."""

    dim: int = 1

    def log_prob(self, x: Tensor) -> Tensor:
        return -x.abs().log().sum(-1)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return -1 / x


@dataclass(frozen=True)
class Cauchy:
    """Independent standard Cauchy coordinates."""

    dim: int = 2

    def log_prob(self, x: Tensor) -> Tensor:
        return -torch.log1p(x.square()).sum(-1) - self.dim * math.log(math.pi)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return -2 * x / (1 + x.square())


@dataclass(frozen=True)
class NaNRegion:
    """N(0, I), and NaN where x_0 > edge."""

    dim: int = 3
    edge: float = 1.5

    def log_prob(self, x: Tensor) -> Tensor:
        log_p = -0.5 * x.square().sum(-1) - 0.5 * self.dim * math.log(2 * math.pi)
        return torch.where(x[..., 0] > self.edge, torch.nan, log_p)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return torch.where(x[..., :1] > self.edge, torch.nan, -x)


@dataclass(frozen=True)
class Control:
    """A named target, what is wrong with it, and exact draws where there is a law to draw from."""

    name: str
    target: Target
    wrong: str
    exact_sampler: ExactSampler | None = None


def cauchy_draws(target: Cauchy, n: int, generator: torch.Generator) -> Tensor:
    """n exact draws (n, dim)."""
    u = torch.rand((n, target.dim), generator=generator, device=generator.device, dtype=torch.float64)
    return torch.tan(math.pi * (u - 0.5))


CONTROLS: dict[str, Callable[[], Control]] = {
    "flat": lambda: Control("flat", Flat(), "improper: the integral is infinite"),
    "reciprocal": lambda: Control("reciprocal", Reciprocal(), "improper: the integral diverges at 0 and at infinity"),
    "cauchy": lambda: Control("cauchy", Cauchy(), "no mean and no variance", partial(cauchy_draws, Cauchy())),
    "nan-region": lambda: Control("nan-region", NaNRegion(), "log_prob is NaN on 6.7 % of the mass"),
}


def control(name: str) -> Control:
    """The control called `name`; ValueError names the known ones."""
    if name not in CONTROLS:
        raise ValueError(f"unknown control {name!r}; known: {', '.join(CONTROLS)}")
    return CONTROLS[name]()


def infinite_variance_pair(d: int = 2, width: float = 0.6) -> tuple[Problem, Problem]:
    """A target and a proposal, normalized both; the weights target/proposal have infinite variance for width < 0.707."""
    return _normal("standard-normal", d, 1.0), _normal("too-narrow", d, width)


def _normal(name: str, d: int, width: float) -> Problem:
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, d, dtype=torch.float64)
    target = GaussianMixture(one, zero, torch.full_like(zero, width))
    return Problem(name, target, f"Gaussian of width {width:g} in {d} dimensions", partial(mixture_draws, target))
