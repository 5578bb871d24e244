"""Densities without a finite integral are named, and no density of the zoo is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import boltzsample as bz
from boltzsample.backend import Backend
from boltzsample.densities import StudentT
from boltzsample.falls import falls
from boltzsample.improper import follow, improper_flags
from boltzsample.maps import Diagonal
from boltzsample.samplers.sampler import Ledger
from boltzsample.samplers.starts import Starts
from boltzsample.streams import Stream
from boltzsample.target import LogProb
from targets import PROBLEMS
from targets.controls import control
from tests.counted import Counted
from tests.small import codes, sample
from tests.zoo import get


def look(target: bz.Target) -> tuple[bz.Flag, ...]:
    one = torch.ones(target.dim, dtype=torch.float64)
    return improper_flags(follow(target, Starts(StudentT(Diagonal(0 * one, one))), Backend(), Stream(0), Ledger()))


def far_and_nu(target: bz.Target) -> tuple[Tensor, list[float]]:
    """Points far out, and nu of each ray where it falls like a power."""
    one = torch.ones(target.dim, dtype=torch.float64)
    source, run = Starts(StudentT(Diagonal(0 * one, one))), (Backend(), Stream(0), Ledger())
    far, fall = falls(target, source, follow(target, source, *run), *run)
    return (torch.empty(3, 0, target.dim), []) if far is None or fall is None else (far, (fall / math.log(100)).tolist())


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_density_of_the_zoo_is_called_improper(name: str) -> None:
    assert look(get(name).target) == ()


@pytest.mark.parametrize("name", PROBLEMS)
def test_nu_of_the_zoo(name: str) -> None:
    """Of all problems the Student t_5 alone falls like a power."""
    assert far_and_nu(get(name).target)[1] == pytest.approx([5.0] * 64 if name.startswith("student-t5") else [], rel=3e-3)


def test_independent_heavy_coordinates_are_found_along_their_axes() -> None:
    two = bz.from_log_prob(lambda x: -2 * torch.log1p(x[..., 0].square()) - 0.5 * x[..., 1:].square().sum(-1), dim=4)
    far, nu = far_and_nu(two)
    assert nu == pytest.approx([3.0, 3.0], rel=1e-3) and far[..., 1:].abs().max() == 0


def test_a_ridge_that_narrows_has_no_tube() -> None:
    """p = (1 + x_0^2)^-2 exp(-x_1^2 (1 + x_0^2)): its mass falls like r^-4, and nobody says r^-3."""
    ridge = bz.from_log_prob(lambda x: -2 * torch.log1p(x[..., 0].square()) - x[..., 1].square() * (1 + x[..., 0].square()), dim=2)
    assert far_and_nu(ridge)[1] == []


def test_a_cone_with_a_heavy_tail_is_found() -> None:
    half = bz.from_log_prob(lambda x: torch.where(x[..., 0] > 0, -2.5 * torch.log1p(x.square().sum(-1)), -0.5 * x.square().sum(-1)), dim=2)
    far, nu = far_and_nu(half)
    cones = torch.tensor(nu) < 3.5  # beside the axis itself, where a tube of constant width gives 4
    assert 20 <= int(cones.sum()) <= 44 and bool((far[:, cones, 0] > 0).all())
    assert torch.tensor(nu)[cones].tolist() == pytest.approx([3.0] * int(cones.sum()), rel=1e-3)


def test_a_line_that_bends_is_none() -> None:
    """A lognormal of sd 20 in log x, whose log_prob is nearly straight at 6 to 18, and a half-Cauchy, where it is straight."""
    positive = torch.distributions.constraints.positive
    wide = bz.from_log_prob(lambda x: (-0.5 * (x.log() / 20).square() - x.log()).sum(-1), dim=1, support=positive)
    heavy = bz.from_log_prob(lambda x: -torch.log1p(x.square()).sum(-1), dim=1, support=positive)
    assert far_and_nu(wide)[1] == [] and len(far_and_nu(heavy)[1]) == 2


@pytest.mark.parametrize(
    "log_prob",
    [
        lambda x: torch.log(torch.exp(-0.5 * x.square().sum(-1)) + 1e-300),  # IMPROPER_SUSPECTED says what there is to say
        lambda x: torch.log(torch.exp(-12.5 * (x - 1).square().sum(-1)) + 1e-300) - torch.log1p(x.square()).sum(-1),
        lambda x: torch.logaddexp(-0.5 * x.square().sum(-1), -60 - torch.log1p(x.square()).sum(-1)),
        lambda x: -0.5 * (x / torch.tensor([1e3, 1e-6], dtype=torch.float64)).square().sum(-1),
    ],
    ids=["a floor", "a floor under a Cauchy prior", "a tail that nobody meets", "unlike scales"],
)
def test_tails_that_are_none(log_prob: LogProb) -> None:
    r = sample(bz.from_log_prob(log_prob, dim=2))
    assert r.draws.far is None and bool(r.expectation().value.isfinite().all())


def test_an_inverse_gamma_is_proper() -> None:
    """In log x its log_prob falls like -1/x, to -1e308 where x can be no smaller, and that is no plateau."""
    r = sample(bz.from_log_prob(lambda x: (-4 * x.log() - 1 / x).sum(-1), dim=1, support=torch.distributions.constraints.positive))
    assert "IMPROPER_SUSPECTED" not in codes(r)


def test_a_cauchy_is_proper() -> None:
    assert look(control("cauchy").target) == ()


@pytest.mark.parametrize(
    "log_prob",
    [lambda x: 0 * x[..., 0], lambda x: -0.5 * x[..., 0] ** 2, lambda x: -torch.log1p(x.norm(dim=-1)), lambda x: 3 * x[..., 1]],
    ids=["flat", "flat along an axis", "1/r", "growing"],
)
def test_improper_ones_are_named(log_prob: LogProb) -> None:
    (found,) = look(bz.from_log_prob(log_prob, dim=2))
    assert found.code == "IMPROPER_SUSPECTED" and "log r along" in found.detail


def test_a_run_on_an_improper_density_is_untrusted_and_counted() -> None:
    counted = Counted(bz.from_log_prob(lambda x: -0.5 * x[..., 0] ** 2, dim=2))
    r = bz.sample(counted, "mcmc", n=500, seed=0, witness=False)
    assert "IMPROPER_SUSPECTED" in codes(r) and r.status == "untrusted" and r.expectation(lambda x: x[..., 0]).status == "untrusted"
    assert r.evaluations == counted.total


def test_auto_wastes_no_time_on_an_improper_density_and_has_no_log_z_for_it() -> None:
    r = bz.sample(control("flat").target, n=500, seed=0, witness=False)
    assert isinstance(r.sampler.chosen, bz.MCMC) and r.status == "untrusted"
    assert math.isnan(float(r.log_z().value)) and "IMPROPER_SUSPECTED" in codes(r) and not {"exploration", "training"} & set(r.ledger)


def test_one_over_x_is_called_improper_and_not_a_wrong_gradient() -> None:
    """Its pole draws the search to points where no difference agrees with any gradient."""
    with pytest.raises(bz.errors.ImproperSuspected, match=r"falls like -1 log r along -?x\[0\]"):
        bz.sample(control("reciprocal").target, "mcmc", n=500, seed=0)


def test_a_wrong_gradient_of_a_density_is_called_that() -> None:
    halved = bz.from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=2, grad=lambda x: -0.5 * x)
    with pytest.raises(bz.errors.GradMismatchError):
        bz.sample(halved, "mcmc", n=500, seed=0)
