"""The frozen-ladder SMC: unbiased, its own error bar right, nothing of the adapting pass reported."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import boltzsample as bz
from boltzsample.backend import Backend
from boltzsample.flows.base import Normal
from boltzsample.samplers.annealing import Cloud, Shape, adapt, annealing_kernel, climb
from boltzsample.samplers.frozen_smc import FrozenSMC
from boltzsample.streams import Stream
from tests.counted import Counted

D = 4
S = torch.tensor([0.3, 1.0, 0.7, 2.5], dtype=torch.float64)
LOG_Z = 1.5 + float(S.log().sum()) + 0.5 * D * math.log(2 * math.pi)


def log_prob(x: Tensor) -> Tensor:
    return 1.5 - 0.5 * (x / S.to(x)).square().sum(-1)


TARGET = bz.from_log_prob(log_prob, dim=D)
SMC = FrozenSMC(particles=256, moves=1, L=3)


def test_unbiased_and_its_variance_is_what_it_says() -> None:
    """60 seeds: the mean of Zhat / Z within 4 standard errors of 1, and the mean reported relative variance within a factor 2 of the
    one seen (an F ratio on 59 and many degrees: false failure under 1e-3)."""
    found = [SMC(TARGET, Normal(D, 2.0), Stream(seed)) for seed in range(60)]
    ratio = torch.tensor([math.exp(f.log_z - LOG_Z) for f in found])
    said = sum(f.variance for f in found) / len(found)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(60)
    assert 0.5 < float(ratio.var()) / said < 2, (float(ratio.var()), said)


def test_draws_are_of_the_target() -> None:
    x = FrozenSMC(particles=4096)(TARGET, Normal(D, 2.0), Stream(1)).x
    z = (x / S).double()
    assert (z.mean(0).abs() < 0.12).all() and (z.std(0) - 1).abs().max() < 0.08


def test_only_the_second_pass_is_reported() -> None:
    """The first one, which made the ladder on the way, is forgotten but for its price."""
    shape, kernel = Shape(1, 1, 256), annealing_kernel(3, True)
    first, second = (
        Cloud.start(TARGET, Normal(D, 2.0), kernel, 1, shape, Backend(), Stream(7).child(name)) for name in ("adapt", "frozen")
    )
    ladder = adapt(first, SMC.cess, lambda _: None)
    assert ladder is not None and climb(second, ladder, lambda _: None) is None
    found = SMC(TARGET, Normal(D, 2.0), Stream(7))
    assert found.log_z == float(second.log_z) != float(first.log_z) and torch.equal(found.x, second.chains.x[0])


def test_price_is_counted() -> None:
    counted = Counted(TARGET)
    found = SMC(counted, Normal(D, 2.0), Stream(2))
    assert found.rows == counted.total


def test_zero_density_and_nan_are_zero_weight() -> None:
    half = bz.from_log_prob(lambda x: torch.where(x[:, 0] > 0, log_prob(x), torch.where(x[:, 0] < -3, torch.nan, -torch.inf)), dim=D)
    found = FrozenSMC(particles=2048)(half, Normal(D, 2.0), Stream(3))
    assert abs(found.log_z - (LOG_Z - math.log(2))) < 4 * found.stderr < 0.6
    assert bool((found.x[:, 0] > 0).all())


def test_a_single_family_has_no_error_bar() -> None:
    far = bz.from_log_prob(lambda x: -0.5 * ((x - 60) / 0.01).square().sum(-1), dim=D)
    assert FrozenSMC(particles=64, moves=1, L=1, cess=0.3)(far, Normal(D), Stream(4)).stderr == math.inf


@pytest.mark.parametrize("seed", [5, 6])
def test_same_seed_same_bits(seed: int) -> None:
    a, b = (SMC(TARGET, Normal(D, 2.0), Stream(seed)) for _ in range(2))
    assert a.log_z == b.log_z and bool((a.x == b.x).all())


def test_a_ladder_that_was_never_finished_is_not_climbed_again() -> None:
    """No particle of the first pass had any density: there is nothing to freeze, and no number."""
    nowhere = bz.from_log_prob(lambda x: torch.where(x[:, 0] > 1e6, log_prob(x), -torch.inf), dim=D)
    counted = Counted(nowhere)
    found = SMC(counted, Normal(D), Stream(0))
    assert math.isnan(found.log_z) and found.apart(0.0, 0.1) is None
    assert found.rows == counted.total == SMC.particles
