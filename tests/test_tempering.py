"""Replica exchange: what is adapted and frozen, what is drawn and for which price, log Z, and what it says of itself."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import boltzsample as bz
from boltzsample import errors
from boltzsample.kernels import MALA, ULA, RandomWalk
from boltzsample.samplers import ladder_fit
from boltzsample.samplers.ladder_fit import equal_swaps
from boltzsample.samplers.replicas import Replicas, Rungs
from boltzsample.samplers.tempering import Tempering
from boltzsample.settings import tensors
from targets import problem
from targets.mixture import gaussian_mixture
from targets.modes import isotropic
from tests.counted import Counted
from tests.small import codes, no_gradient, normal, normal_log_prob, severity
from tests.test_run_faults import At

SMALL = Tempering(ladders=16, warmup=60)
LOG_2PI = math.log(2 * math.pi)
GIVEN = [[0.5, 0.5], [-0.5, 0.5]]


def sample(target: bz.Target, method: Any = SMALL, n: int = 320, **settings: Any) -> bz.Result:
    return bz.sample(target, method, n, **{"seed": 0, **settings})


def frozen(sampler: Any) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in tensors(sampler)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def far(dim: int = 2) -> bz.Target:
    """Modes of weights .7 and .3 at -15 and +15 of the first coordinate."""
    m = [[-15.0] + [0.0] * (dim - 1), [15.0] + [0.0] * (dim - 1)]
    return gaussian_mixture(*isotropic((0.7, 0.3), m, (1.0, 1.0)))


# ---- fit ----


def test_fit_adapts_a_copy() -> None:
    fitted = sample(normal()).sampler
    assert SMALL.rungs is None and SMALL.kernel is None and {f.name for f in fields(SMALL)} >= {"rungs"}
    assert isinstance(fitted.rungs, Rungs) and fitted.rungs.beta[0, 0] == 0 and fitted.rungs.beta[0, -1] == 1
    assert bool((fitted.rungs.beta.diff(dim=1) > 0).all())
    before = frozen(fitted)
    again = sample(normal(), fitted, seed=1).sampler
    assert same(frozen(fitted), before) and not torch.equal(again.rungs.beta, fitted.rungs.beta)


def test_the_swap_rates_become_equal() -> None:
    """From a ladder far too cold to one whose rejection rates lie within .1 of their mean; unadapted, the first is .9 or more."""
    blind = bz.sample(problem("gaussian-corr-d10").target, Tempering(temperatures=6), 2000, seed=0)
    assert blind.sampler.rungs.beta.shape == (1, 7)
    beta = blind.sampler.rungs.beta
    replicas = _measured(problem("gaussian-corr-d10").target, blind.sampler)
    assert float((replicas - replicas.mean()).abs().max()) < 0.1, (replicas, beta)


def _measured(target: bz.Target, sampler: Tempering) -> Tensor:
    """The swap rates (K,) of a fitted sampler in a run of its own."""
    seen: list[Tensor] = []
    original = Replicas._round

    def spy(self: Any, *args: Any) -> Any:
        made = original(self, *args)
        seen.append(made.swap.mean((0, 2)))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replicas, "_round", spy)
        bz.sample(target, sampler, 2000, seed=1, fit=False, witness=False)
    return torch.stack(seen[sampler._warmup(sampler.rungs) :]).mean(0)


def test_levels_are_put_where_the_barrier_rises_by_equal_parts() -> None:
    beta = torch.tensor([[0.0, 0.1, 0.2, 1.0]], dtype=torch.float64)
    new, near = equal_swaps(beta, torch.tensor([[0.2, 0.2, 0.8]]))
    torch.testing.assert_close(new, torch.tensor([[0.0, 0.2, 0.2 * 5**0.5, 1.0]], dtype=torch.float64))
    assert near.tolist() == [[1, 2, 2]] or near.tolist() == [[2, 2, 2]]
    same_again, _ = equal_swaps(beta, torch.full((1, 3), 0.4))
    torch.testing.assert_close(same_again, beta)


def test_nothing_adapts_while_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = sample(normal()).sampler
    before = frozen(fitted)
    for owner, name in ((Replicas, "retune"), (ladder_fit._Window, "learn")):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: 1 / 0)
    result = sample(normal(), fitted, fit=False)
    assert result.sampler is fitted and same(frozen(fitted), before)
    with pytest.raises(ZeroDivisionError):
        sample(normal())


@pytest.mark.parametrize("warmup", [0, 1, 19, 21])
def test_any_length_of_warm_up(warmup: int) -> None:
    result = sample(normal(), replace(SMALL, warmup=warmup, temperatures=3), witness=False)
    assert bool(result.draws.x.isfinite().all()) and result.sampler.rungs.levels == 3


@pytest.mark.parametrize(("name", "value"), [("ladders", 0), ("temperatures", 0), ("sweeps", 1.0), ("warmup", True), ("thin", 0)])
def test_bad_settings(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*; wanted an integer >="):
        Tempering(**{name: value})


def test_an_unadjusted_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="ULA"):
        Tempering(kernel=ULA())


# ---- what is drawn ----


@pytest.mark.parametrize(("n", "draws"), [(320, 20), (1, 16), (257, 17)])
def test_n_is_shared_out_and_16_a_ladder_at_least(n: int, draws: int) -> None:
    d = sample(normal(), n=n, witness=False).draws
    assert d.x.shape == (16, draws, 2) and d.log_weight is None
    torch.testing.assert_close(d.log_prob, normal().log_prob(d.x), rtol=1e-9, atol=1e-9)
    assert d.group is not None and d.group.tolist() == list(range(16))
    assert d.starts is not None and len(d.starts.unique(dim=0)) == 16


def test_given_starts_are_shared_out() -> None:
    d = sample(normal(), replace(SMALL, ladders=20), starts=[[0.0, 1.0], [1.0, 1.0], [2.0, 0.0]], witness=False).draws
    assert d.group is not None and d.starts is not None
    assert d.group.tolist() == [u % 16 % 3 for u in range(20)]
    assert all(len(d.starts[d.group == g].unique(dim=0)) == 1 for g in range(3))


def test_same_seed_same_draws_and_any_number_of_ladders() -> None:
    """Given a fitted sampler, a ladder owes nothing to those it runs beside."""
    fitted = sample(normal()).sampler
    a, b = (sample(normal(), replace(fitted, ladders=k, thin=1), n=20 * k, fit=False, witness=False).draws.x for k in (16, 80))
    torch.testing.assert_close(a, b[:16, :20], rtol=1e-9, atol=1e-9)
    assert torch.equal(a, sample(normal(), replace(fitted, thin=1), fit=False, witness=False).draws.x)


def test_replicates_are_independent_and_their_ladders_are_their_own() -> None:
    result = sample(normal(), replicates=3, n=320)
    x = [r.draws.x for r in result.replicates]
    assert len(result.replicates) == 3 and result.draws.x.shape[0] == 48
    assert not any(bool((x[i] == x[j]).all(-1).any()) for i, j in ((0, 1), (1, 2), (0, 2)))
    assert len(result.sampler.rungs.beta[:, 1].unique()) == 3
    z = [(float(r.log_z().value) - LOG_2PI) / float(r.log_z().stderr) for r in result.replicates]
    assert max(map(abs, z)) < 4.5 and abs(float(result.log_z().value) - LOG_2PI) < 0.2
    with pytest.raises(ValueError, match="replicates=3"):
        sample(normal(), result.sampler, fit=False)


def test_one_fitted_replicate_serves_many() -> None:
    fitted = sample(normal()).sampler
    result = sample(normal(), fitted, fit=False, replicates=4)
    assert result.draws.scope == "given this kernel" and len(result.replicates) == 4


@pytest.mark.parametrize("kernel", [None, bz.HMC(L=4), MALA(), RandomWalk()], ids=["default", "HMC", "MALA", "random walk"])
def test_moments_of_a_correlated_gaussian(kernel: Any) -> None:
    """|z| < 4.5 for 21 numbers of 4 kernels: false failure 6e-4."""
    p = problem("gaussian-corr-d10")
    result = sample(p.target, Tempering(kernel=kernel, thin=4 if isinstance(kernel, RandomWalk) else None), 2000, witness=False)
    for quantity, est in (("mean", result.means), ("second_moment", result.expectation(lambda x: x.square()))):
        assert bool(((est.value - p.truth[quantity].value) / est.stderr).abs().max() < 4.5)
    log_z = result.log_z()
    assert abs(float(log_z.value) - float(p.truth["log_z"].value)) < 4.5 * float(log_z.stderr) < 0.7


@pytest.mark.parametrize("dim", [2, 10])
def test_two_far_modes_are_weighed(dim: int) -> None:
    """Thirty standard deviations apart: weights and log Z right within their bars, and ok. |z| < 4.5."""
    result = sample(far(dim), Tempering(), 4000)
    weight, log_z = result.probability(lambda x: x[..., 0] < 0), result.log_z()
    assert weight.status == log_z.status == "ok", (weight.flags, log_z.flags)
    assert abs(float(weight) - 0.7) < 4.5 * float(weight.stderr) < 0.25
    assert abs(float(log_z)) < 4.5 * float(log_z.stderr) < 0.4


def test_log_z_bars_hold() -> None:
    """100 replicates of a run of 1000 draws: 95% intervals hold in 86 or more (false failure 3e-4), and the mean is right."""
    p = problem("two-modes-near")
    result = sample(p.target, Tempering(), 1000, replicates=100, witness=False)
    each = [r.log_z() for r in result.replicates]
    hits = sum(bool(e.interval[0] <= 0 <= e.interval[1]) for e in each)
    values = torch.stack([e.value for e in each])
    assert hits >= 86 and abs(float(values.mean())) < 4.5 * float(values.std()) / 10


def test_dtype_follows_the_run() -> None:
    result = sample(normal(), n=2000, dtype=torch.float32)
    assert result.draws.x.dtype == torch.float32 and result.log_z().value.dtype == torch.float64
    assert abs(float(result.log_z().value) - LOG_2PI) < 4.5 * float(result.log_z().stderr)


def test_on_a_support_with_an_edge() -> None:
    """A hard edge: most of the base has no density; log Z of a quarter of a Gaussian plane."""
    quarter = bz.from_log_prob(lambda x: torch.where((x > 0).all(-1), normal_log_prob(x), -torch.inf), dim=2)
    result = sample(quarter, Tempering(), 2000)
    assert bool((result.draws.x > 0).all())
    log_z = result.log_z()
    assert abs(float(log_z.value) - (LOG_2PI - math.log(4))) < 4.5 * float(log_z.stderr) < 0.4


# ---- the price ----

RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "random walk": {"method": replace(SMALL, kernel=RandomWalk())},
    "sweeps": {"method": replace(SMALL, sweeps=3, kernel=MALA())},
    "replicates": {"replicates": 3},
    "unfitted": {"fit": False},
    "starts": {"starts": GIVEN},
    "starts alone": {"starts": GIVEN, "witness": False},
    "budget": {"budget": 60_000},
    "many ladders in chunks": {"method": replace(SMALL, ladders=96), "chunk": 1},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_ledger_is_what_the_target_counted(name: str) -> None:
    counted = Counted(normal())
    result = sample(counted, **RUNS[name])
    assert result.evaluations == counted.total
    assert sum(b for _, b in result.ledger.values()) == counted.grad_rows


def test_without_a_gradient() -> None:
    counted = Counted(no_gradient())
    result = sample(counted, Tempering(), 2000)
    assert isinstance(result.sampler.kernel, RandomWalk) and result.evaluations == counted.total
    assert abs(float(result.log_z().value) - LOG_2PI) < 4.5 * float(result.log_z().stderr) < 0.5


@pytest.mark.parametrize("budget", [45_000, 60_000, 90_000, 120_000])
def test_a_budget_is_kept_and_said(budget: int) -> None:
    counted = Counted(problem("gaussian-corr-d10").target)
    result = sample(counted, Tempering(), 40_000, budget=budget)
    assert result.evaluations == counted.total <= budget
    assert "STOPPED_EARLY" in codes(result) and result.status != "ok"


# ---- what it says ----


def test_round_trips_are_counted() -> None:
    """Quiet on an easy Gaussian and on far modes; loud where the ladder is far too short, whatever the means look like."""
    for target in (normal(), problem("gaussian-corr-d10").target, far()):
        assert "FEW_ROUND_TRIPS" not in codes(sample(target, Tempering(), 1000))
    short = sample(problem("two-modes-d32").target, Tempering(temperatures=2), 1000)
    assert severity(short, "FEW_ROUND_TRIPS") == "untrusted" and severity(short.log_z(), "NO_OVERLAP") == "untrusted"
    assert short.status == "untrusted"


def test_a_few_round_trips_are_a_caution() -> None:
    fitted = sample(problem("gaussian-corr-d10").target, Tempering()).sampler
    brief = replace(fitted, thin=1)
    assert severity(sample(problem("gaussian-corr-d10").target, brief, n=32 * 36, fit=False), "FEW_ROUND_TRIPS") == "caution"


def test_nan_is_counted_and_located() -> None:
    def log_prob(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 3.5, torch.nan, normal_log_prob(x))

    result = sample(bz.from_log_prob(log_prob, dim=2), Tempering(), 1000)
    assert "NAN_EVAL" in codes(result.draws) and bool(result.draws.log_prob.isfinite().all())
    assert result.draws.bad_x is not None and bool((result.draws.bad_x[:, 0] > 3.5).all())


def test_plus_infinity_is_an_error() -> None:
    def log_prob(x: Tensor) -> Tensor:
        return torch.where(x.norm(dim=-1) > 6.0, torch.inf, normal_log_prob(x))

    with pytest.raises(errors.PositiveInfinityError):
        sample(bz.from_log_prob(log_prob, dim=2), starts=[[0.0, 0.1], [0.1, 0.0]])


def _calls() -> int:
    fn = At(0, lambda: None)
    sample(fn.target(), starts=GIVEN)
    return fn.calls


def test_an_interrupted_run_returns_what_is_there() -> None:
    half = At(int(0.8 * _calls()), lambda: os.kill(os.getpid(), signal.SIGINT))
    result = sample(half.target(), starts=GIVEN)
    assert "INTERRUPTED" in codes(result) and result.status == "untrusted"
    assert bool(result.draws.x.isfinite().all())


def test_a_density_that_raises_leaves_what_was_drawn() -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken") as caught:
        sample(At(int(0.8 * _calls()), broken).target(), starts=GIVEN)
    partial = caught.value.partial  # type: ignore[attr-defined]
    assert isinstance(partial, bz.Draws) and partial.x.shape[0] == 16


def test_a_funnel_is_never_ok() -> None:
    assert sample(problem("funnel-sd3").target, Tempering(), 4000).status != "ok"
