"""Second witnesses: the optimum audit sees modes that the draws miss, is silent where none is missing, and says when it is no witness."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import boltzsample as bz
from boltzsample.draws import Draws
from boltzsample.target import Target
from boltzsample.witnesses import BALL, CLIMBS, ENOUGH, SHARE, no_audit
from targets import problem
from targets.mixture import GaussianMixture
from targets.modes import two_modes
from tests.counted import Counted
from tests.small import SMALL, codes, no_gradient, normal, normal_log_prob, sample, severity

FAR = problem("two-modes-far").target
RIGHT = {"starts": [[-15.0, 0.0]]}  # all chains in the left mode
GLOBAL = {"SINGLE_WITNESS", "WITNESS_CONFLICT"}
NONE_MISSED = "optimum audit: 1 optimum from 256 wide starts, none missed"


def mixture(weights: list[float], means: list[list[float]], scales: list[float]) -> GaussianMixture:
    tensors = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, [[s, s] for s in scales]))
    return GaussianMixture(*tensors)


def two(weight: float, scale: float = 1.0, apart: float = 30.0) -> GaussianMixture:
    """A mode of this weight and scale to the right of a unit one."""
    return mixture([1 - weight, weight], [[-apart / 2, 0.0], [apart / 2, 0.0]], [1.0, scale])


def from_left(target: Target, n: int = 3200, **settings: Any) -> bz.Result:
    """A run of 64 random walks from the left mode with steps that do not cross."""
    method = bz.MCMC(kernel=bz.RandomWalk(h=torch.tensor(0.1)), chains=64, warmup=0)
    return sample(target, method, n, fit=False, **{**RIGHT, **settings})


# ---- what must be seen ----


@cache
def wide_run() -> bz.Result:
    return bz.sample(FAR, "mcmc", 4_000, seed=0)


def test_chains_from_the_wide_source_do_not_claim_a_mode_weight() -> None:
    result = wide_run()
    weight = result.probability(lambda x: x[..., 0] > 0)
    assert weight.status == "untrusted" and "FEW_SWITCHES" in codes(weight)
    assert result.means[0].status == "untrusted" and result.status == "untrusted"
    assert not codes(result) & GLOBAL  # both modes are visited: it is the weight that is not known
    assert "optimum audit: 2 optima from 256 wide starts, none missed" in result.summary()


def test_within_a_mode_the_same_run_may_be_believed() -> None:
    """x_1 has the same law in both modes: its mean is right, and its own flags are quiet but for chance."""
    est = wide_run().means[1]
    assert abs(float(est.value / est.stderr)) < 4.5


@pytest.mark.parametrize("seed", range(3))
def test_chains_started_in_one_mode_meet_a_conflict(seed: int) -> None:
    result = sample(FAR, seed=seed, **RIGHT)
    assert severity(result, "WITNESS_CONFLICT") == "untrusted" and result.status == "untrusted"
    conflict = next(f for f in result.flags if f.code == "WITNESS_CONFLICT")
    assert "x = [15," in conflict.detail and conflict.value == pytest.approx(0.3, abs=0.01) and conflict.threshold == SHARE
    assert {"WITNESS_CONFLICT", "SAME_STARTS"} <= codes(result)
    weight = result.probability(lambda x: x[..., 0] > 0)
    assert weight.status == "untrusted" and {"WITNESS_CONFLICT", "FEW_SWITCHES"} <= codes(weight)
    assert result.draws.witnesses == () and result.summary().startswith("status: untrusted")


def test_a_default_run_started_in_one_mode_meets_a_conflict() -> None:
    assert all("WITNESS_CONFLICT" in codes(bz.sample(FAR, "mcmc", 4_000, seed=s, **RIGHT)) for s in (2, 4, 5, 6))


def test_each_replicate_is_judged_by_its_own_draws() -> None:
    result = sample(FAR, replicates=2, seed=1, **RIGHT)  # in 2 of 24 replicates of seeds 0 to 11 a chain crosses in its short warm-up
    assert all("WITNESS_CONFLICT" in codes(r) for r in result.replicates) and result.status == "untrusted"
    assert "WITNESS_CONFLICT" in codes(result)


@pytest.mark.parametrize("weight", [0.5, 0.05, 0.01])
def test_a_missed_mode_of_some_weight_is_a_conflict(weight: float) -> None:
    result = from_left(two(weight))
    conflict = [f for f in result.flags if f.code == "WITNESS_CONFLICT"]
    assert len(conflict) == 1 and conflict[0].value == pytest.approx(weight, rel=1e-3)


def test_unequal_widths() -> None:
    """A mode half as wide holds a quarter of the peak's mass at equal height; its share is of masses, not of heights."""
    conflict = next(f for f in from_left(two(0.4, scale=0.5)).flags if f.code == "WITNESS_CONFLICT")
    assert conflict.value == pytest.approx(0.4, rel=1e-3)


def test_a_narrow_mode_in_many_dimensions_is_seen_from_cold_starts() -> None:
    """Chains in the wide mode of a pair of widths 1 : .4 in 32 dimensions: no random point climbs to the other one."""
    target = two_modes(widths=(0.2, 0.08), offset=1.7).target
    found = sample(target, bz.MCMC(chains=64, warmup=50), n=1600, starts=torch.full((1, 32), -1.7))
    assert "WITNESS_CONFLICT" in codes(found) and any("optimum x = [1.7, 1.7" in f.detail for f in found.flags)


def test_three_conflicts_at_most_are_told() -> None:
    places = [[-15.0, 0.0], [15.0, 0.0], [15.0, 12.0], [15.0, -12.0], [0.0, 14.0], [0.0, -14.0]]
    result = from_left(mixture([1 / 6] * 6, places, [1.0] * 6))
    told = [f for f in result.flags if f.code == "WITNESS_CONFLICT"]
    assert len(told) == 3 and len({f.detail for f in told}) == 3


def test_a_mode_told_by_the_user_is_looked_for() -> None:
    """A hundredth as wide and half the mass: no wide climb finds it, the user does."""
    narrow = two(0.5, scale=0.01)
    assert "WITNESS_CONFLICT" not in codes(from_left(narrow))
    told = from_left(narrow, modes=[15.0, 0.0])
    assert "WITNESS_CONFLICT" in codes(told)


# ---- what must not be said ----


@pytest.mark.parametrize("weight", [2e-3, 5e-4, 1e-5])
def test_a_tiny_mode_is_no_conflict(weight: float) -> None:
    """Below a share of 1e-3, or too small to expect 20 draws of it among these 3200."""
    result = from_left(two(weight))
    assert not codes(result) & GLOBAL and "2 optima" in result.draws.witnesses[0]


def test_the_number_of_draws_decides_what_could_have_been_seen() -> None:
    assert "WITNESS_CONFLICT" not in codes(from_left(two(4e-3), n=3200))  # 12.8 draws of it expected
    assert "WITNESS_CONFLICT" in codes(from_left(two(4e-3), n=6400))  # 25.6


def test_one_optimum() -> None:
    result = sample(normal())
    assert result.draws.witnesses == (NONE_MISSED,) and NONE_MISSED in result.summary()
    assert not codes(result) & GLOBAL
    assert result.means.witnesses == (NONE_MISSED,)


def test_a_mode_that_was_visited_is_not_missed() -> None:
    result = sample(FAR, starts=[[-15.0, 0.0], [15.0, 0.0]])
    assert not codes(result) & GLOBAL and "2 optima" in result.draws.witnesses[0]


RING = bz.from_log_prob(lambda x: -0.5 * ((x.norm(dim=-1) - 5) / 0.3) ** 2, dim=2)
PLAIN = bz.from_log_prob(lambda x: -torch.relu(x.abs() - 1).sum(-1), dim=2)  # flat in [-1, 1]^2
DISC = bz.from_log_prob(lambda x: torch.where(x.norm(dim=-1) < 1, 0.0, -torch.inf) + 0 * x.sum(-1), dim=2)
KINK = bz.from_log_prob(lambda x: -x.abs().sum(-1), dim=2)
SLOPE = bz.from_log_prob(lambda x: torch.where((x > 0).all(-1), -x.sum(-1), -torch.inf), dim=2)


@pytest.mark.parametrize("target", [RING, PLAIN, DISC, KINK, SLOPE], ids=["ring", "plain", "disc", "kink", "edge"])
@pytest.mark.parametrize("seed", range(1))
def test_shapes_without_a_proper_optimum_make_no_conflict(target: Target, seed: int) -> None:
    assert "WITNESS_CONFLICT" not in codes(sample(target, replace(SMALL, warmup=60), seed=seed))


@pytest.mark.parametrize("name", ["gaussian-corr-d10", "student-t5-d10", "two-modes-near"])
@pytest.mark.parametrize("seed", range(3))
def test_no_false_conflict(name: str, seed: int) -> None:
    """20 seeds of gaussian, t5 and cancer by default settings: no conflict, each "1 optimum" (not run here: a minute)."""
    result = sample(problem(name).target, replace(SMALL, kernel=bz.HMC(L=4)), seed=seed)
    assert not codes(result) & GLOBAL and result.draws.witnesses[0].endswith("none missed")


def test_no_false_conflict_on_real_data() -> None:
    for seed in range(2):
        result = sample(problem("cancer").target, replace(SMALL, kernel=bz.HMC(L=4)), seed=seed)
        assert result.draws.witnesses == (NONE_MISSED,)


def test_a_draw_near_the_top_is_not_needed_in_high_dimension() -> None:
    """In 60 dimensions no draw is in the ball by chance alone; climbs from the draws find the optimum."""
    result = sample(normal(60), replace(SMALL, kernel=bz.HMC(L=4)))
    assert result.draws.witnesses == (NONE_MISSED,)


# ---- no witness ----


def test_no_witness_was_asked_for() -> None:
    result = sample(normal(), witness=False)
    assert severity(result, "SINGLE_WITNESS") == "caution" and result.draws.witnesses == () and "witness" not in result.ledger
    assert "witness=False" in next(f.detail for f in result.flags if f.code == "SINGLE_WITNESS")


def test_without_a_gradient_there_is_no_audit() -> None:
    result = sample(no_gradient())
    assert severity(result, "SINGLE_WITNESS") == "caution" and "witness" not in result.ledger
    assert next(f.detail for f in result.flags if f.code == "SINGLE_WITNESS") == "the optimum audit needs a gradient"


def test_climbs_that_do_not_converge_are_no_witness() -> None:
    result = sample(KINK)
    assert severity(result, "SINGLE_WITNESS") == "caution" and result.draws.witnesses == ()
    assert f"of {CLIMBS} wide climbs converged" in next(f.detail for f in result.flags if f.code == "SINGLE_WITNESS")


def test_a_budget_too_small_for_the_audit() -> None:
    result = sample(normal(), n=64_000, budget=41_000)
    detail = next(f.detail for f in result.flags if f.code == "SINGLE_WITNESS")
    assert "budget" in detail and "witness" not in result.ledger


def test_a_budget_too_small_for_the_search() -> None:
    result = sample(normal(), starts=[0.0, 0.0], budget=30_000)
    assert "budget" in next(f.detail for f in result.flags if f.code == "SINGLE_WITNESS")


def test_no_audit_above_500_dimensions() -> None:
    starts = torch.zeros(2, 501)
    method = bz.MCMC(kernel=bz.MALA(h=torch.tensor(0.1)), chains=2, warmup=0)
    result = sample(normal(501), method, 32, starts=starts, fit=False)
    assert "500 dimensions" in next(f.detail for f in result.flags if f.code == "SINGLE_WITNESS")


def test_the_verdict_of_nobody() -> None:
    verdict = no_audit("why")
    assert [f.code for f in verdict.flags] == ["SINGLE_WITNESS"] and verdict.flags[0].detail == "why" and verdict.sentence is None


def test_draws_from_elsewhere_have_no_witness() -> None:
    x = torch.randn(64, 50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert "SINGLE_WITNESS" in codes(bz.result(Draws.from_arrays(x)))


# ---- its price, and what it may look at ----


def test_the_audit_is_paid_and_one_set_of_climbs_serves_all_replicates() -> None:
    counted = Counted(normal())
    alone, three = (sample(counted, replace(SMALL, kernel=bz.HMC(L=2)), replicates=r) for r in (1, 3))
    assert alone.evaluations + three.evaluations == counted.total
    assert CLIMBS <= sum(three.ledger["witness"]) < 2 * sum(alone.ledger["witness"]) < 2 * CLIMBS * 81
    assert ENOUGH <= CLIMBS and 0.99 < BALL < 1


def test_the_audit_does_not_depend_on_the_users_starts() -> None:
    """It climbs from the wide source: the conflict names the same optimum wherever the chains began."""
    here, there = sample(FAR, **RIGHT), sample(FAR, starts=[[15.0, 0.0]])
    x = [next(f.detail for f in r.flags if f.code == "WITNESS_CONFLICT") for r in (here, there)]
    assert "x = [15," in x[0] and "x = [-15," in x[1]


def test_the_audit_sees_through_any_preconditioner() -> None:
    """The far mixture stretched by 1e4 in one direction and squeezed in the other."""
    stretch = torch.tensor([1e4, 1e-3], dtype=torch.float64)
    target = bz.from_log_prob(lambda x: FAR.log_prob(x / stretch), dim=2)
    result = sample(target, starts=[[-15.0e4, 0.0]])
    assert "WITNESS_CONFLICT" in codes(result)
    assert math.isclose(next(f.value for f in result.flags if f.code == "WITNESS_CONFLICT") or 0, 0.3, rel_tol=0.05)


def test_both_halves_of_a_symmetric_pair() -> None:
    even = bz.from_log_prob(lambda x: torch.logaddexp(normal_log_prob(x - 8), normal_log_prob(x + 8)), dim=1)
    result = from_left(even, starts=[[-8.0]])
    assert next(f.value for f in result.flags if f.code == "WITNESS_CONFLICT") == pytest.approx(0.5, abs=1e-3)
