"""Adaptation: the step size finds its acceptance, the preconditioner composes exactly, a NaN changes nothing for good."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import boltzsample as bz
from boltzsample.kernels import HMC, MALA, RandomWalk
from boltzsample.kernels.adapt import FLOOR, DualAveraging, Moments, efficiency, with_step
from boltzsample.maps import Dense, Diagonal
from boltzsample.streams import Stream
from boltzsample.target import Target
from tests.small import normal, sample


def normals(*shape: int, seed: int = 0) -> Tensor:
    return Stream(seed, ("noise",)).rng().normal(*shape)


# ---- step size ----


def adapted(kernel: Any, target: Target, x: Tensor, steps: int = 300) -> tuple[Tensor, Tensor]:
    """(step sizes, pooled acceptance at them) after dual averaging from kernel.h, chains starting from x (replicates, chains, dim)."""
    rng, batch = Stream(0, ("adapt",)).rng(), x.shape[:-1]
    harmonic = kernel.price[1] > 0
    tuner = DualAveraging.start(kernel.h.expand(len(x), 1).clone())
    state = kernel.init(target, x)
    for _ in range(steps):
        state, info = with_step(kernel, tuner.h).step(target, state, kernel.draw(rng, batch, x.shape[-1]))
        tuner = tuner.update(info.accept_prob, kernel.target_accept, harmonic)
    rates = []
    for _ in range(100):
        state, info = with_step(kernel, tuner.frozen).step(target, state, kernel.draw(rng, batch, x.shape[-1]))
        a = info.accept_prob.clamp(min=FLOOR if harmonic else 0.0)
        rates.append(1 / (1 / a).mean(-1) if harmonic else a.mean(-1))
    return tuner.frozen, torch.stack(rates).mean(0)


@pytest.mark.parametrize("first", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("kernel", [MALA(), HMC(L=4), RandomWalk()], ids=lambda k: type(k).__name__)
def test_dual_averaging_reaches_its_acceptance_from_any_start(kernel: Any, first: float) -> None:
    start = replace(kernel, h=torch.tensor(first, dtype=torch.float64))
    h, rate = adapted(start, normal(5), normals(2, 64, 5))
    assert h.shape == (2, 1) and float((rate - kernel.target_accept).abs().max()) < 0.05


def test_replicates_adapt_alone() -> None:
    """The second replicate of one batch sees a density ten times narrower and finds a step ten times shorter."""
    scale = torch.tensor([1.0, 0.1], dtype=torch.float64)[:, None, None]
    two = bz.from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=5)
    narrow = bz.Pullback(two, Diagonal(torch.zeros(2, 1, 5, dtype=torch.float64), 1 / scale.expand(2, 1, 5)))
    h, _ = adapted(RandomWalk(), narrow, normals(2, 64, 5) * scale)
    assert 7 < float(h[0] / h[1]) < 14


@pytest.mark.parametrize("harmonic", [True, False])
def test_nan_counts_as_rejection_and_never_stays(harmonic: bool) -> None:
    start = DualAveraging.start(torch.ones(1, 1, dtype=torch.float64))
    good, bad = torch.full((1, 8), 0.6, dtype=torch.float64), torch.full((1, 8), torch.nan, dtype=torch.float64)
    mixed = torch.cat([good[:, :4], bad[:, :4]], 1)
    zeros = torch.where(mixed.isnan(), 0.0, mixed)
    assert torch.equal(start.update(mixed, 0.6, harmonic).h, start.update(zeros, 0.6, harmonic).h)
    tuner = start
    for _ in range(50):
        tuner = tuner.update(bad, 0.6, harmonic)
    assert bool(tuner.h.isfinite()) and float(tuner.h) < 1 and bool(tuner.frozen.isfinite())
    for _ in range(400):
        tuner = tuner.update(torch.ones_like(good), 0.6, harmonic)
    assert float(tuner.h) > 1  # it recovers


def test_a_third_outside_a_hard_edge_lets_the_steps_grow_where_as_many_errors_shrink_them() -> None:
    start = DualAveraging.start(torch.ones(1, 1, dtype=torch.float64))
    accept = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64)
    told, untold = start.update(accept, 0.651, True, accept == 0), start.update(accept, 0.651, True)
    assert float(told.h) > 3.0 > float(untold.h)  # 3: where the tuner is drawn to
    all_out = torch.zeros_like(accept)
    assert float(start.update(all_out, 0.651, True, all_out == 0).h) < 3.0


@pytest.mark.parametrize("strange", [torch.inf, -torch.inf, -1.0, 2.0])
def test_other_numbers_that_are_no_probabilities(strange: float) -> None:
    tuner = DualAveraging.start(torch.ones(1, 1, dtype=torch.float64)).update(torch.full((1, 4), strange), 0.6, True)
    assert bool(tuner.h.isfinite()) and bool(tuner.frozen > 0)


def test_a_density_that_turns_nan_does_not_break_the_fit() -> None:
    """Everything beyond 1 is NaN, gradient included: a third of the proposals at first."""
    target = bz.from_log_prob(lambda x: -0.5 * x.square().sum(-1) * torch.where(x[..., 0] > 1, torch.nan, 1.0), dim=2)
    result = sample(target)
    assert bool(result.sampler.kernel.h.isfinite().all()) and bool((result.sampler.kernel.h > 1e-3).all())
    assert bool(result.sampler.map.log_det.isfinite().all()) and bool(result.draws.x.isfinite().all())


# ---- preconditioner ----

DIM = 3
OLD = {
    "diagonal": Diagonal(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.tensor([2.0, 0.1, 30.0], dtype=torch.float64)),
    "dense": Dense(
        torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64),
        torch.tensor([[2.0, 0, 0], [0.3, 0.1, 0], [-4.0, 1.0, 30.0]], dtype=torch.float64),
    ),
}


def moments(z: Tensor, dense: bool, parts: int = 4) -> Moments:
    """Of z (replicates, n, dim), in several updates."""
    out = Moments.start(z, dense)
    for part in z.chunk(parts, 1):
        out = out.update(part)
    return out


def box_points(n: int = 1200, replicates: int = 2) -> Tensor:
    """Uniform, skewed and correlated points without outliers (replicates, n, dim), each replicate another law."""
    u = Stream(0, ("box",)).rng().uniform(replicates, n, DIM)
    A = torch.tensor([[1.0, 0, 0], [0.8, 0.5, 0], [-0.3, 0.2, 0.7]], dtype=torch.float64)
    return (u - 0.4) @ A.T * torch.tensor([1.0, 1.7], dtype=torch.float64)[:replicates, None, None] + 0.3


@pytest.mark.parametrize("dense", [True, False])
def test_moments_in_parts_are_the_moments_of_all(dense: bool) -> None:
    z = box_points()
    out = moments(z, dense, parts=7)
    cov = torch.stack([torch.cov(v.T) for v in z])
    wanted = cov if dense else cov.diagonal(dim1=1, dim2=2)
    assert out.n == 1200 and torch.allclose(out.mean, z.mean(1)) and torch.allclose(out.scatter / 1199, wanted)


@pytest.mark.parametrize("dense", [True, False], ids=["dense scatter", "diagonal scatter"])
@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("twice", [False, True])
def test_refine_is_the_old_map_after_one_that_whitens(old: str, dense: bool, twice: bool) -> None:
    z, before = box_points(), OLD[old]
    known = moments(z, dense)
    if twice:  # the old map then has an axis of replicates already
        before = moments(box_points().flip(0), dense).refine(before)
    new = known.refine(before)
    cov = torch.stack([torch.cov(v.T) for v in z]) * 1200 / 1205 + torch.eye(DIM, dtype=torch.float64) * 5 / 1205
    F = torch.linalg.cholesky(cov) if dense else torch.diag_embed(cov.diagonal(dim1=1, dim2=2).sqrt())
    fresh = normals(2, 50, DIM)
    wanted, log_det = before.push(z.mean(1, keepdim=True) + fresh @ F.mT)
    got, got_log_det = new.push(fresh)
    assert torch.allclose(got, wanted, rtol=1e-10)
    assert torch.allclose(got_log_det, log_det + F.diagonal(dim1=1, dim2=2).log().sum(-1, keepdim=True))
    assert torch.allclose(new.pull(got), fresh)


@pytest.mark.parametrize("old", OLD)
def test_what_was_refined_is_white(old: str) -> None:
    z = 4 * box_points()
    white = moments(z, dense=True).refine(OLD[old]).pull(OLD[old].push(z)[0])
    for w in white:
        assert torch.allclose(torch.cov(w.T), torch.eye(DIM, dtype=torch.float64), atol=0.03)
        assert torch.allclose(w.mean(0), torch.zeros(DIM, dtype=torch.float64), atol=1e-9)


DEGENERATE = {
    "constant": torch.ones(1, 50, DIM, dtype=torch.float64),
    "nan": torch.full((1, 50, DIM), torch.nan, dtype=torch.float64),
    "one infinite": torch.cat([normals(1, 49, DIM), torch.full((1, 1, DIM), torch.inf, dtype=torch.float64)], 1),
    "huge": 1e200 * normals(1, 50, DIM),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("old", OLD)
def test_degenerate_moments_never_make_a_broken_map(case: str, dense: bool, old: str) -> None:
    new = moments(DEGENERATE[case], dense).refine(OLD[old])
    assert bool(new.log_det.isfinite().all()) and bool(new.push(torch.zeros(1, 1, DIM, dtype=torch.float64))[0].isfinite().all())
    if case != "constant":  # shrinkage alone makes a map of equal points
        assert new is OLD[old]


def test_a_singular_direction_keeps_some_width() -> None:
    z = box_points(replicates=1)
    z[..., 2] = z[..., 0]
    new = moments(z, dense=True).refine(OLD["dense"])
    assert isinstance(new, Dense) and bool((new.L.diagonal(dim1=1, dim2=2) > 0).all())


def test_one_wild_chain_does_not_set_the_scale_of_all() -> None:
    z = normals(1, 400, DIM)
    z[0, 0] = 1e6
    new = moments(z, dense=False, parts=1).refine(Diagonal(torch.zeros(DIM, dtype=torch.float64), torch.ones(DIM, dtype=torch.float64)))
    assert isinstance(new, Diagonal) and float(new.s.max()) < 1.5


def test_float32_maps_stay_float32() -> None:
    old = Diagonal(torch.zeros(DIM), torch.ones(DIM))
    for dense in (True, False):
        new = moments(box_points().float(), dense).refine(old)
        assert new.m.dtype == torch.float32 and new.log_det.dtype == torch.float32


# ---- trajectory length ----


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_efficiency_of_autoregressive_moves(rho: float) -> None:
    """x' = rho x + sqrt(1 - rho^2) xi: the mean decides, (1 - rho) / (1 + rho). 60,000 moves: within .02 (5 sd)."""
    x, xi = normals(20_000, 3), normals(20_000, 3, seed=1)
    assert abs(efficiency(x, rho * x + math.sqrt(1 - rho**2) * xi) - (1 - rho) / (1 + rho)) < 0.02


def test_efficiency_listens_to_the_slower_of_mean_and_radius() -> None:
    x, y = normals(20_000, 3), normals(20_000, 3, seed=1)
    assert efficiency(x, x) == 0.0  # nothing moves
    assert efficiency(x, -x) < 1e-3  # the radius never changes: an antithetic mean is not enough
    turned = y * (x.norm(dim=-1) / y.norm(dim=-1))[:, None]
    assert efficiency(x, turned) < 0.05
    assert abs(efficiency(x, y) - 1) < 0.05


def test_efficiency_does_not_depend_on_shift_and_scale_alone() -> None:
    x, y = normals(5_000, 2), 0.6 * normals(5_000, 2) + 0.8 * normals(5_000, 2, seed=1)
    assert abs(efficiency(1e3 + 5 * x, 1e3 + 5 * y) - efficiency(x, y)) < 1e-6


def test_the_pilot_prefers_longer_trajectories_where_they_pay() -> None:
    """Diagonal preconditioning cannot undo a correlation of .99: one leapfrog is a random walk along the ridge."""
    ridge = bz.from_log_prob(lambda x: -0.5 * (x[..., 0].square() + ((x[..., 1] - 0.99 * x[..., 0]) / 0.14).square()), dim=2)
    long = sample(ridge, bz.MCMC(chains=64, warmup=60, dense=False), starts=normals(64, 2), witness=False).sampler.kernel.L
    short = sample(normal(), bz.MCMC(chains=64, warmup=60), starts=normals(64, 2), witness=False).sampler.kernel.L
    assert long >= 4 and short <= 2
