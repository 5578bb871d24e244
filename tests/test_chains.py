"""Chains in motion: lanes and chunks do not change a chain, NaN and +inf are counted and located, edges are legal, memory stays flat."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import boltzsample as bz
from boltzsample.backend import Backend
from boltzsample.errors import PositiveInfinityError
from boltzsample.kernels import HMC, MALA, ULA, RandomWalk
from boltzsample.kernels.chains import Chains
from boltzsample.maps import Dense, Diagonal
from boltzsample.streams import LANE, Stream
from boltzsample.target import Target
from targets import problem
from tests.counted import Counted
from tests.small import SMALL, codes, no_gradient, normal, normal_log_prob, sample, severity

KERNELS = {"random walk": RandomWalk(), "ULA": ULA(), "MALA": MALA(), "HMC": HMC(L=4)}
SHEAR = Dense(torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([[2.0, 0.0], [-0.7, 0.5]], dtype=torch.float64))
UNIT = Diagonal(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))


def chains(target: Target, kernel: Any, x: Tensor, map: Any = UNIT, chunk: int | None = None, seed: int = 0) -> Chains:
    """Chains at x (replicates, chains, dim)."""
    return Chains.start(target, kernel, map, x, Backend(chunk=chunk), Stream(seed, ("test",)), 0)


def points(*batch: int, seed: int = 0, dim: int = 2) -> Tensor:
    return Stream(seed, ("points",)).rng().normal(*batch, dim)


def walk(moving: Chains, steps: int) -> Tensor:
    """x after each step (steps, replicates, chains, dim)."""
    return torch.stack([moving.x for _ in moving.steps(steps, "walk")])


# ---- what a chain does depends on itself alone ----


@cache
def fitted(name: str) -> bz.MCMC:
    sampler: bz.MCMC = sample(problem(name).target, replace(SMALL, chains=64), witness=False).sampler
    return replace(sampler, warmup=5)


def frozen_run(name: str, chains: int, **settings: Any) -> bz.Result:
    return sample(problem(name).target, replace(fitted(name), chains=chains), 1, seed=5, fit=False, witness=False, **settings)


@pytest.mark.parametrize("given", [True, False], ids=["starts given", "wide source"])
@pytest.mark.parametrize("name", ["two-modes-near", "gaussian-corr-d10"])
def test_a_chain_is_the_same_among_64_and_among_1024(name: str, given: bool) -> None:
    starts = points(64, dim=problem(name).target.dim) if given else None
    few, many = (frozen_run(name, n, chunk=1, starts=starts).draws for n in (64, 1024))
    assert torch.equal(few.starts, many.starts[:64])
    assert torch.equal(few.x, many.x[:64]) and torch.equal(few.log_prob, many.log_prob[:64])
    assert not bool((many.x[64:128] == few.x).all(-1).any())  # the second lane has noise of its own


def test_a_last_lane_need_not_be_full() -> None:
    few, more = (frozen_run("two-modes-near", n, chunk=1, starts=points(64)).draws for n in (64, 96))
    assert torch.equal(few.x, more.x[:64])


@pytest.mark.parametrize("given", [True, False], ids=["starts given", "wide source"])
def test_replicates_do_not_know_of_each_other(given: bool) -> None:
    starts = points(4) if given else None
    one, two, three = (frozen_run("two-modes-near", 32, starts=starts, replicates=r) for r in (1, 2, 3))
    assert torch.equal(one.draws.x, two.replicates[0].draws.x)
    for a, b in zip(two.replicates, three.replicates, strict=False):
        assert torch.equal(a.draws.x, b.draws.x)
    a, b, c = (r.draws.x for r in three.replicates)
    assert not any(bool((u == v).all(-1).any()) for u, v in ((a, b), (a, c), (b, c)))


def test_chunks_are_the_same_law_and_almost_the_same_bits() -> None:
    x = points(2, 3 * LANE + 5)
    whole, cut = (walk(chains(normal(), HMC(L=4), x, SHEAR, chunk), 10) for chunk in (None, 1))
    assert torch.allclose(whole, cut, rtol=0, atol=1e-10)


def test_the_seed_decides_every_bit() -> None:
    target = problem("two-modes-near").target
    first, again, other = (sample(target, seed=s, replicates=2) for s in (3, 3, 4))
    assert torch.equal(first.draws.x, again.draws.x) and torch.equal(first.draws.log_prob, again.draws.log_prob)
    assert first.flags == again.flags and first.config == again.config and first.ledger == again.ledger
    assert not bool((first.draws.x == other.draws.x).all(-1).any())


def test_noise_has_a_name() -> None:
    x = points(1, 8)
    a, b = chains(normal(), MALA(), x), chains(normal(), MALA(), x)
    assert not bool((torch.stack([a.x for _ in a.steps(3, "one")]) == torch.stack([b.x for _ in b.steps(3, "two")])).any())


# ---- the meter ----


def test_state_map_and_price_fit_together() -> None:
    x = points(2, 16)
    counted = Counted(normal())
    moving = chains(counted, HMC(L=4), x, SHEAR)
    assert torch.allclose(moving.x, x) and torch.allclose(moving.log_prob, normal_log_prob(x))
    start, path = moving.x, walk(moving, 7)
    assert counted.total == moving.inits + moving.rows * sum(moving.kernel.price) == 32 + 7 * 32 * 4
    assert torch.allclose(moving.log_prob, normal_log_prob(path[-1]))
    moved = (path.diff(dim=0, prepend=start[None]) != 0).any(-1).sum(0)
    assert torch.equal(moving.meter.moves, moved)


def test_retuning_the_map_leaves_the_chains_where_they_are() -> None:
    moving = chains(normal(), HMC(L=4), points(2, 16))
    walk(moving, 3)
    x, inits = moving.x, moving.inits
    moving.retune(MALA(), SHEAR)
    assert torch.allclose(moving.x, x) and torch.allclose(moving.log_prob, normal_log_prob(x))
    assert moving.inits == inits + 32 and int(moving.meter.moves.sum()) == 0 and moving.kernel == MALA()


@dataclass
class NanBeyond:
    """N(0, I) that is NaN where x_0 > edge, gradient included; counts its NaN points."""

    edge: float
    seen: int = 0
    dim: int = 2

    def log_prob(self, x: Tensor) -> Tensor:
        return self._spoil(x, normal_log_prob(x))

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return torch.where(self._bad(x)[..., None], torch.nan, -x)

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._spoil(x, normal_log_prob(x)), self.grad_log_prob(x)

    def _bad(self, x: Tensor) -> Tensor:
        return x[..., 0] > self.edge

    def _spoil(self, x: Tensor, log_p: Tensor) -> Tensor:
        self.seen += int(self._bad(x).sum())
        return torch.where(self._bad(x), torch.nan, log_p)


@pytest.mark.parametrize("name", list(KERNELS))
@pytest.mark.parametrize("map", [UNIT, SHEAR], ids=["unit", "shear"])
def test_every_trajectory_that_meets_nan_is_counted(name: str, map: Any) -> None:
    target = NanBeyond(1.5)
    moving = chains(target, KERNELS[name], points(1, 64).clamp(max=1.4), map)
    walk(moving, 40)
    counted = int(moving.meter.nan.sum())
    if name == "HMC":  # one NaN makes the rest of the trajectory NaN: at most L a trajectory
        assert target.seen / 4 <= counted <= target.seen and counted > 100
    else:
        assert counted == target.seen > 30
    bad = moving.bad_points()
    assert len(bad) == int((moving.meter.nan > 0).sum()) and bool((bad[:, 0] > 1.5).all())
    assert bool(moving.log_prob.isfinite().all()) and bool((moving.x[..., 0] <= 1.5).all())


SHARES = {"info": 4.85, "caution": 3.7, "untrusted": 2.5}  # P(N(0, 2) > edge) = .0003, .0044, .039: thresholds .001 and .01


@pytest.mark.parametrize("wanted", SHARES)
def test_nan_eval_by_share(wanted: str) -> None:
    """Random walk with h = 1 from exact draws: about 12,800 proposals y ~ N(0, 2)."""
    target, starts = NanBeyond(SHARES[wanted]), points(64)
    starts = (starts - starts.mean(0)) / starts.std(0)  # so that the first map is the identity
    walker = bz.MCMC(kernel=RandomWalk(torch.tensor(1.0)), chains=64, warmup=0)
    result = sample(target, walker, 12_800, starts=starts, fit=False, witness=False)
    assert severity(result, "NAN_EVAL") == wanted
    assert result.status == wanted or wanted == "info"
    assert bool(target.log_prob(result.draws.bad_x).isnan().all()) and len(result.draws.bad_x) > 0
    assert bool(result.draws.log_prob.isfinite().all())


def test_nan_share_after_settling() -> None:
    target, starts = NanBeyond(1.5), points(64).clamp(max=1.4)
    walker = bz.MCMC(kernel=RandomWalk(torch.tensor(1.0)), chains=64, warmup=500)
    result = sample(target, walker, 64 * 20, starts=starts, fit=False, witness=False)
    share = next(f.value for f in result.flags if f.code == "NAN_EVAL")
    assert share is not None and share > 0.05  # P(N(x, 1) > 1.5) is about .12


def test_no_nan_no_flag() -> None:
    result = sample(normal())
    assert not codes(result) & {"NAN_EVAL", "DIVERGENCES", "UNADJUSTED", "OOM_SPLIT"}
    assert result.draws.bad_x.shape == (0, 2)


def test_divergences_are_counted() -> None:
    """x^4 / 4 with a step ten times too long: the integrator flies off, the density is fine."""
    quartic = bz.from_log_prob(lambda x: -0.25 * x.square().square().sum(-1), dim=2)
    wild = bz.MCMC(kernel=HMC(h=torch.tensor(3.0), L=4), chains=32, warmup=0)
    result = sample(quartic, wild, starts=points(32), fit=False, witness=False)
    assert "DIVERGENCES" in codes(result) and "NAN_EVAL" not in codes(result)


# ---- +inf is never a state ----


@dataclass(frozen=True)
class Spike:
    """N(0, I) with log_prob = +inf in a disc, and NaN in the half-plane beyond it."""

    centre: tuple[float, float] = (2.0, 1.0)
    radius: float = 0.4
    nan_beyond: float = math.inf
    dim: int = 2

    def inside(self, x: Tensor) -> Tensor:
        return (x - x.new_tensor(self.centre)).norm(dim=-1) < self.radius

    def log_prob(self, x: Tensor) -> Tensor:
        log_p = torch.where(x[..., 0] > self.nan_beyond, torch.nan, normal_log_prob(x))
        return torch.where(self.inside(x), torch.inf, log_p)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return -x


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("map", [UNIT, SHEAR], ids=["unit", "shear"])
def test_positive_infinity_is_an_error_with_the_point(name: str, map: Any) -> None:
    moving = chains(Spike(), KERNELS[name], torch.zeros(2, 64, 2, dtype=torch.float64), map)
    with pytest.raises(PositiveInfinityError, match=r"returned \+inf at x = \[") as caught:
        walk(moving, 200)
    assert caught.value.x is not None and bool(Spike().inside(caught.value.x))
    assert bool(moving.state.log_p.isfinite().all())


def test_the_point_is_right_where_nan_came_later() -> None:
    target = Spike(nan_beyond=0.5)
    with pytest.raises(PositiveInfinityError) as caught:
        walk(chains(target, RandomWalk(torch.tensor(1.5)), torch.zeros(1, 64, 2, dtype=torch.float64)), 300)
    assert caught.value.x is not None and bool(target.inside(caught.value.x))


def test_positive_infinity_ends_a_whole_run() -> None:
    with pytest.raises(PositiveInfinityError) as caught:
        sample(Spike(radius=0.8), starts=[0.0, 0.0], witness=False)
    assert bool(Spike(radius=0.8).inside(caught.value.x))


# ---- -inf is an edge ----


@pytest.mark.parametrize("name", ["random walk", "MALA", "HMC"])
def test_hard_edges_are_legal(name: str) -> None:
    """A normal cut at x_0 > 0.3: E x_0 = phi(.3) / Phi(-.3). |z| < 4.5 for two means of three kernels: false failure 1e-4."""
    cut = bz.from_log_prob(lambda x: torch.where(x[..., 0] > 0.3, normal_log_prob(x), -torch.inf), dim=2)
    sampler = bz.MCMC(kernel=KERNELS[name], chains=64, warmup=60, thin=4)
    result = sample(cut, sampler, 64 * 100)
    tail = 0.5 * math.erfc(0.3 / math.sqrt(2))
    truth = torch.tensor([math.exp(-0.045) / math.sqrt(2 * math.pi) / tail, 0.0], dtype=torch.float64)
    assert bool(((result.means.value - truth) / result.means.stderr).abs().max() < 4.5)
    assert bool((result.draws.x[..., 0] > 0.3).all())
    assert not codes(result) & {"NAN_EVAL", "DIVERGENCES", "STUCK_CHAIN", "DRIFT", "START_MEMORY", "NESTED_RHAT", "WITNESS_CONFLICT"}


# ---- memory ----


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())  # isinstance would wake deprecated objects


@pytest.mark.parametrize(("target", "kernel"), [(normal(), MALA()), (no_gradient(), RandomWalk())], ids=["autograd", "numpy"])
def test_memory_is_flat_over_1000_steps(target: Target, kernel: Any) -> None:
    moving = chains(target, kernel, points(1, 32))
    counts = []
    for t, accept in enumerate(moving.steps(1000, "walk")):
        if t in (10, 999):
            counts.append(_tensors())
        assert not accept.requires_grad
    assert counts[1] - counts[0] <= 2
    assert not moving.state.x.requires_grad and moving.state.log_p.grad_fn is None


def test_compiled_chains_stay_compiled_whatever_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large batch goes step by step, but through its graph; only what is left of a stride goes eagerly."""
    for many, graphs in ((10**9, [4, 4]), (1, [1] * 9)):
        monkeypatch.setattr("boltzsample.kernels.chains.MANY", many)
        moving = Chains.start(normal(), MALA(), UNIT, torch.zeros(1, 64, 2, dtype=torch.float64), Backend(compile=True), Stream(0), 0)
        seen: list[int] = []
        moving.stepper._call = lambda *args, seen=seen, moving=moving: (seen.append(len(args[-1].uniform)), moving.stepper.eager(*args))[1]
        for _ in moving.strides(9, "draw", 4):
            pass
        assert seen == graphs
