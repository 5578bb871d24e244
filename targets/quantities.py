"""What the closed forms are made of: exact quantities from moments, tails, weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy import optimize
from torch import Tensor

from targets.problem import Quantity

NORMALIZED = "exact: the density is normalized"


def upper_normal(z: float) -> float:
    """P(N(0, 1) > z)."""
    return 0.5 * math.erfc(z / math.sqrt(2))


def exact(name: str, value: Tensor | float, how: str, at: Tensor | None = None) -> Quantity:
    """A quantity of stderr 0."""
    value = torch.as_tensor(value, dtype=torch.float64)
    return Quantity(name, value, torch.zeros_like(value), how, at)


def moments(mean: Tensor, variance: Tensor, how: str) -> list[Quantity]:
    """mean, second_moment and sd."""
    values = {"mean": mean, "second_moment": variance + mean.square(), "sd": variance.sqrt()}
    return [exact(name, value, how) for name, value in values.items()]


def tail(c: float, probability: float, how: str) -> Quantity:
    """P(x_0 > c)."""
    return exact("tail", probability, how, at=torch.tensor(c, dtype=torch.float64))


def tail_near(upper: Callable[[float], float], low: float, high: float, how: str) -> Quantity:
    """P(x_0 > c) = upper(c) at the c between low and high where it is about .02, rounded to as few decimals (>= 2) as keep it so."""
    wanted = optimize.brentq(lambda c: upper(c) - 0.02, low, high)
    c = next(c for digits in range(2, 9) if 0.015 < upper(c := round(wanted, digits)) < 0.03)
    return tail(c, upper(c), how)


def normal_tail(mean: Tensor, sd: Tensor) -> list[Quantity]:
    """P(x_0 > c) of a normal x_0, two sd above its mean."""
    c = round(float(mean + 2 * sd), 2)
    return [tail(c, upper_normal((c - float(mean)) / float(sd)), "closed form: normal tail")]


def log_z(value: float = 0.0, how: str = NORMALIZED) -> Quantity:
    """log of the integral."""
    return exact("log_z", value, how)
