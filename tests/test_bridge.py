"""Bridge sampling counts chains, not draws."""

import math

import pytest
import torch
from torch import Tensor

from boltzsample.estimates.bridge import bridge
from tests.ar1 import rng


def log_ratio(x: Tensor) -> Tensor:
    """N(0, 1) without its constant over N(0, .6^2) with it: log Z = log sqrt(2 pi)."""
    return -0.5 * x**2 + 0.5 * (x / 0.6) ** 2 + math.log(0.6) + 0.5 * math.log(2 * math.pi)


def test_draws_that_repeat_do_not_shrink_the_bar() -> None:
    """Every draw of the target stands forty times in a row: the same bar (counting draws: .6 of it)."""
    x = torch.randn(64, 4, generator=rng(0), dtype=torch.float64)
    y = 0.6 * torch.randn(1000, generator=rng(1), dtype=torch.float64)
    once, forty = bridge(log_ratio(x), log_ratio(y)), bridge(log_ratio(x.repeat_interleave(40, 1)), log_ratio(y))
    assert float(forty.stderr) == pytest.approx(float(once.stderr), rel=0.02)
    assert abs(float(forty.value) - 0.5 * math.log(2 * math.pi)) < 4.5 * float(forty.stderr)
