"""Ascents and Laplace's approximation: where they end, what they say of it, what they cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import boltzsample as bz
from boltzsample.ascent import ascend
from boltzsample.laplace import Laplace, distinct, laplace
from boltzsample.streams import Stream
from boltzsample.target import Target
from targets import problem
from tests.counted import Counted
from tests.small import normal, normal_log_prob


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def points(n: int, dim: int, spread: float = 1.0, seed: int = 0) -> Tensor:
    return spread * Stream(seed, ("points",)).rng().normal(n, dim)


def rotated(dim: int, condition: float) -> tuple[Target, Tensor, Tensor]:
    """A Gaussian with mean 3 and precision Q diag(1 .. condition) Q^T: target, mean, precision."""
    q = torch.linalg.qr(points(dim, dim, seed=1))[0]
    P = q @ torch.diag(torch.logspace(0, math.log10(condition), dim, dtype=torch.float64)) @ q.T
    m = torch.full((dim,), 3.0, dtype=torch.float64)
    return bz.from_log_prob(lambda x: -0.5 * ((x - m) @ P * (x - m)).sum(-1), dim=dim), m, P


# ---- ascents ----


@pytest.mark.parametrize(("dim", "condition"), [(1, 1.0), (2, 1e2), (10, 1e2), (10, 1e4), (2, 1e4)])
def test_quadratics(dim: int, condition: float) -> None:
    target, _, _ = rotated(dim, condition)
    top = ascend(target, points(32, dim, 5.0), reach=1.0, rounds=300)
    assert bool(top.converged.all()) and float(top.log_p.min()) > -1e-4


@pytest.mark.xfail(reason="BUG: with condition 1e8 'converged' is said 3.7 nats below the top: the memory has not seen the long axis")
def test_converged_means_converged_at_condition_1e8() -> None:
    top = ascend(rotated(2, 1e8)[0], points(32, 2, 5.0), reach=1.0, rounds=300)
    assert float(top.log_p[top.converged].min()) > -1e-2


def test_axis_aligned_scales_of_16_decades() -> None:
    s = torch.logspace(-8, 8, 5, dtype=torch.float64)
    target = bz.from_log_prob(lambda x: -0.5 * (x / s).square().sum(-1), dim=5)
    top = ascend(target, s * points(16, 5), reach=1e-8, rounds=300)
    assert bool((top.log_p >= target.log_prob(s * points(16, 5))).all())  # whatever it does, it climbs


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("reach", [1e-2, 1.0])
def test_scales(scale: float, reach: float) -> None:
    target = bz.from_log_prob(lambda x: -0.5 * (x / scale).square().sum(-1), dim=3)
    top = ascend(target, scale * points(16, 3, 3.0), reach=reach * scale, rounds=60)
    assert bool(top.converged.all()) and float(top.log_p.min()) > -1e-6


def test_rosenbrock() -> None:
    target = bz.from_log_prob(lambda x: -((1 - x[..., 0]) ** 2) - 100 * (x[..., 1] - x[..., 0] ** 2) ** 2, dim=2)
    top = ascend(target, points(32, 2, 3.0), reach=0.1, rounds=300)
    assert bool(top.converged.all()) and float(top.log_p.min()) > -1e-3


def test_two_modes_are_both_found() -> None:
    top = ascend(problem("two-modes-far").target, tensor(-20.0, 1.0, -3.0, 4.0, 0.1, 0.0, 30.0, -5.0).reshape(4, 2), reach=1.0, rounds=100)
    assert torch.allclose(top.x, tensor(-15.0, 0, -15, 0, 15, 0, 15, 0).reshape(4, 2), atol=1e-3)


def test_landing_on_the_top_is_converging() -> None:
    top = ascend(problem("two-modes-far").target, tensor(4.0, 0.0, 30.0, -5.0).reshape(2, 2), reach=1.0, rounds=100)
    assert float(top.grad.norm(dim=-1).max()) < 1e-100 and bool(top.converged.all())


def test_where_the_density_is_not_finite_nothing_moves() -> None:
    cut = bz.from_log_prob(lambda x: torch.where(x[..., 0] > 0, normal_log_prob(x - 2.0), -torch.inf), dim=2)
    counted = Counted(cut)
    x = torch.tensor([[-1.0, 0.0], [math.nan, 0.0], [math.inf, 1.0], [1.0, 0.0]], dtype=torch.float64)
    top = ascend(counted, x, reach=0.1, rounds=50)
    assert torch.equal(top.x[:3].nan_to_num(), x[:3].nan_to_num()) and top.converged.tolist() == [False, False, False, True]
    assert torch.allclose(top.x[3], tensor(2.0, 2.0), atol=1e-3)
    assert x[3].tolist() == [1.0, 0.0]  # the input is left alone


def test_an_ascent_stays_inside_the_support() -> None:
    slope = bz.from_log_prob(lambda x: torch.where((x.abs() < 1).all(-1), 3 * x.sum(-1), -torch.inf), dim=2)
    top = ascend(slope, torch.zeros(1, 2, dtype=torch.float64), reach=0.5, rounds=100)
    assert bool(top.log_p.isfinite().all()) and not bool(top.converged.any()) and float(top.x.min()) > 0.9


def test_an_ascent_ends_above_its_ceiling() -> None:
    target, x = rotated(10, 1e4)[0], points(16, 10, 5.0)
    top = ascend(target, x, reach=1.0, rounds=300, ceiling=-50.0)
    assert bool((top.log_p > -50).all()) and not bool(top.converged.any())
    assert top.rows < 0.5 * ascend(target, x, reach=1.0, rounds=300).rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_top_already(dtype: torch.dtype) -> None:
    counted = Counted(normal())
    top = ascend(counted, torch.zeros(3, 2, dtype=dtype), reach=1.0, rounds=50)
    assert bool(top.converged.all()) and top.rows == counted.total == 3 and top.x.dtype == dtype


@pytest.mark.parametrize("height", [0.0, 29.3])
@pytest.mark.parametrize("away", [1e-15, 1e-13, 1e-12, 1e-9])
def test_at_the_top_up_to_rounding(away: float, height: float) -> None:
    """Steps along a gradient of rounding errors fail or lead nowhere, and with no step made there is no memory that says it is the top."""
    narrow = bz.from_log_prob(lambda x: -((x - 1) / 0.09).square().sum(-1) / 2 + height, dim=32)
    top = ascend(narrow, 1 + away * points(64, 32).sign(), reach=25.0, rounds=80)
    assert bool(top.converged.all()) and torch.allclose(top.x, torch.ones(1, 32, dtype=top.x.dtype), atol=1e-8)


def test_a_long_step_that_fails_on_a_floor_is_no_top() -> None:
    """exp(-r^2 / 2) on a floor that falls by 1e-13 r^2: the gradient promises next to nothing, and 40 nats are not far."""
    floor = bz.from_log_prob(lambda x: torch.logaddexp(-0.5 * x.square().sum(-1), -40 - 1e-13 * x.square().sum(-1)), dim=8)
    x = torch.nn.functional.normalize(points(64, 8), dim=-1)
    top = ascend(floor, 12 * x, reach=30.0, rounds=200)
    assert bool((top.log_p[top.converged] > -1e-6).all()) and bool(top.converged.any())


def test_without_a_top_nothing_converges() -> None:
    top = ascend(bz.from_log_prob(lambda x: x.square().sum(-1), dim=2), points(3, 2), reach=1.0, rounds=60)
    assert not bool(top.converged.any())


@pytest.mark.parametrize("name", ["cancer", "two-modes-near", "student-t5-d10"])
def test_every_row_is_counted_and_dtype_kept(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        counted = Counted(problem(name).target)
        top = ascend(counted, points(24, counted.dim).to(dtype), reach=1.0, rounds=80)
        assert top.rows == counted.grad_rows == counted.total <= 24 * 81
        assert top.x.dtype == dtype and int(top.converged.sum()) >= 20
        assert torch.allclose(top.log_p, counted.log_prob(top.x), rtol=1e-5)


# ---- Laplace ----

L = torch.tensor([[2.0, 0.0, 0.0], [0.5, 0.1, 0.0], [1.0, -0.3, 30.0]], dtype=torch.float64)
MEAN = tensor(1.0, -2.0, 300.0)
SCALE = L.square().sum(-1).sqrt()


def _gaussian() -> Target:
    P = torch.linalg.inv(L @ L.T)
    return bz.from_log_prob(lambda x: -0.5 * ((x - MEAN) @ P * (x - MEAN)).sum(-1) + 7.0, dim=3)


def at(target: Target, x: Tensor, scale: Tensor) -> tuple[Laplace, int]:
    return laplace(target, x, target.log_prob(x), scale)


@pytest.mark.parametrize("away", [0.0, 0.5])
def test_laplace_is_exact_for_gaussians_and_newton_goes_to_the_top(away: float) -> None:
    counted = Counted(_gaussian())
    x = MEAN + away * SCALE
    hill, rows = laplace(counted, x, _gaussian().log_prob(x), SCALE)
    exact = 7.0 + 1.5 * math.log(2 * math.pi) + float(L.diagonal().log().sum())
    assert hill.proper and abs(hill.log_mass - exact) < 1e-6
    assert torch.allclose(hill.x, MEAN, atol=1e-6) and rows == counted.total
    assert rows == (6 if away == 0 else 13)


def test_laplace_draws_have_its_covariance() -> None:
    """40,000 draws: each entry of the whitened second moment is within 5 standard errors, 3e-6 for six entries."""
    hill, _ = at(_gaussian(), MEAN, SCALE)
    x = hill.draw(points(40_000, 3))
    z = torch.linalg.solve_triangular(L, (x - MEAN).T, upper=False)
    error = z @ z.T / 40_000 - torch.eye(3, dtype=torch.float64)
    assert float((error.abs() / (1 + torch.eye(3, dtype=torch.float64)).sqrt()).max()) < 5 / 200
    assert torch.allclose(hill.radius2(x), z.square().sum(0), rtol=1e-4)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: -(x[..., 0] ** 2) + x[..., 1] ** 2,  # a saddle
        lambda x: x.square().sum(-1),  # a pit
        lambda x: 0.0 * x.sum(-1),  # a plain
        lambda x: 10.0 * x[..., 0] - x[..., 1] ** 2,  # a slope
        lambda x: torch.where(x[..., 0] > 1e-9, -x.sum(-1), -torch.inf),  # an edge
    ],
    ids=["saddle", "pit", "plain", "slope", "edge"],
)
def test_improper_where_there_is_no_optimum(fn: bz.Target) -> None:
    hill, _ = at(bz.from_log_prob(fn, dim=2), torch.zeros(2, dtype=torch.float64), tensor(1.0, 1.0))
    assert not hill.proper


def test_newton_finishes_a_tired_ascent_in_a_long_valley() -> None:
    target, m, _ = rotated(5, 1e6)
    tired = ascend(target, points(1, 5, 5.0), reach=1.0, rounds=6)
    hill, _ = laplace(target, tired.x[0], tired.log_p[0], torch.ones(5, dtype=torch.float64))
    assert hill.proper and torch.allclose(hill.x, m, atol=1e-4)


# ---- groups ----


def test_distinct_groups_are_led_by_their_best() -> None:
    x = torch.tensor([[0.0, 0.0], [0.01, 0.0], [5.0, 0.0], [5.01, 0.0], [5.0, 3.0]], dtype=torch.float64)
    leaders, group = distinct(x, tensor(0.0, 1.0, 2.0, 1.0, 0.5), tensor(1.0, 1.0), 8)
    assert leaders.tolist() == [2, 1, 4] and group.tolist() == [1, 1, 0, 0, 2]
    leaders, group = distinct(x, tensor(0.0, 1.0, 2.0, 1.0, 0.5), tensor(1.0, 1e3), 2)
    assert leaders.tolist() == [2, 1] and group.tolist() == [1, 1, 0, 0, 0]  # in units of the scale
    leaders, group = distinct(x, tensor(0.0, 1.0, 2.0, 1.0, 0.5), tensor(1.0, 1.0), 2)
    assert leaders.tolist() == [2, 1] and group[4] == -1  # too many groups


def test_points_of_zero_density_lead_nothing() -> None:
    x = points(4, 2, 10.0)
    leaders, group = distinct(x, tensor(1.0, -math.inf, 0.0, -math.inf), tensor(1.0, 1.0), 8)
    assert leaders.tolist() == [0, 2] and group.tolist() == [0, -1, 1, -1]
