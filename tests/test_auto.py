"""auto: what it chooses, and that it keeps its word whatever that is."""

from __future__ import annotations

import pytest
import torch

import boltzsample as bz
from boltzsample.auto import FAIR, _agreeing, _worse
from boltzsample.backend import Backend
from boltzsample.progress import Interrupt, Progress
from boltzsample.samplers.bridged import BridgedMCMC
from boltzsample.samplers.refine import Draw
from boltzsample.samplers.sampler import Budget, Ledger, Run
from boltzsample.samplers.wide_source import wide_source
from boltzsample.streams import Stream
from targets import problem
from tests.counted import Counted
from tests.small import codes, no_gradient
from tests.zoo import get


def chosen(r: bz.Result) -> object:
    return r.sampler.chosen  # type: ignore[attr-defined]


def said(r: bz.Result) -> str:
    return next(f.detail for f in r.flags if f.code == "AUTO")


def test_far_modes_are_weighed() -> None:
    """A mixture for 30 standard deviations between the modes; |z| < 4.5 (7e-6)."""
    p = problem("two-modes-far")
    r = bz.sample(p.target, seed=0)
    e, log_z = r.probability(lambda x: x[..., 0] < 0), r.log_z()
    assert isinstance(chosen(r), bz.MixtureIS) and said(r).startswith("mixture-is: pilot ESS")
    assert r.status == e.status == "ok" and abs(float(e) - 0.7) < 4.5 * float(e.stderr) < 0.1
    assert abs(float(log_z)) < 4.5 * float(log_z.stderr) < 0.1
    assert any("SMC from the wide base" in w and "optimum audit: 2 optima" in w for w in log_z.witnesses)


def test_a_posterior_is_sampled_by_chains_with_a_bridge_to_log_z() -> None:
    p = get("cancer")
    r = bz.sample(p.target, n=2_000, seed=0)
    assert isinstance(chosen(r), BridgedMCMC) and "chains agree" in said(r)
    truth, log_z = p.truth["log_z"], r.log_z()
    assert r.status == "ok" and abs(float(log_z) - float(truth.value)) < 4.5 * float(log_z.stderr) + float(truth.stderr)
    assert "bridge sampling" in log_z.method
    z = (r.means.value - p.truth["mean"].value) / (r.means.stderr.square() + p.truth["mean"].stderr.square()).sqrt()
    assert z.abs().max() < 5  # 31 of them: 2e-5


def test_in_many_dimensions_clean_chains_come_before_weights() -> None:
    """Four thousand weights of the mixture look quiet (ESS 81%, k-hat .05 in 25 dimensions); of 6,400 some are 9 to 41 times the mean."""
    r = bz.sample(get("german-credit").target, n=500, seed=3, witness=False)
    assert isinstance(chosen(r), BridgedMCMC)


def test_a_trial_of_chains_has_a_price(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("boltzsample.auto.TRIAL_COST", 50_000)
    target = get("cancer").target
    starts = wide_source(target, Backend(), Stream(0), gradient=True)
    run = Run(Backend(), Stream(0), starts, Ledger(), Budget(), Progress(False), Interrupt())
    assert _agreeing(target, run, clean=False) is None and run.ledger.total < 70_000 and run.notes == []


def test_without_a_gradient_it_is_smc() -> None:
    r = bz.sample(no_gradient(), n=500, seed=0, witness=False)
    assert isinstance(chosen(r), bz.SMC)


@pytest.mark.parametrize("budget", [60_000, 250_000])
def test_a_budget_is_kept(budget: int) -> None:
    counted = Counted(problem("two-modes-far").target)
    r = bz.sample(counted, n=1_000, seed=0, budget=budget)
    assert r.evaluations == counted.total <= budget


def test_seconds_are_kept() -> None:
    r = bz.sample(problem("banana").target, seed=0, budget=bz.Budget(seconds=2.0))
    assert r.seconds < 10 and r.draws.log_prob.numel() > 0


def test_replicates_are_fitted_each_for_itself() -> None:
    r = bz.sample(problem("two-modes-far").target, n=500, seed=0, replicates=3, witness=False)
    assert len(chosen(r).mixtures) == 3 and r.draws.scope == "end to end"  # type: ignore[attr-defined]
    a, b, c = (part.draws.x for part in r.replicates)
    assert not torch.equal(a, b) and not torch.equal(b, c)
    assert abs(float(r.probability(lambda x: x[..., 0] < 0).value) - 0.7) < 0.1


def test_what_is_fitted_can_be_used_again() -> None:
    target = problem("two-modes-far").target
    first = bz.sample(target, n=500, seed=0, witness=False)
    again = bz.sample(target, first.sampler, n=500, seed=1, fit=False, witness=False)
    assert "local chains" not in again.draws.ledger and not torch.equal(first.draws.x, again.draws.x)
    with pytest.raises(ValueError, match="fit=True"):
        bz.sample(target, "auto", n=500, seed=1, fit=False)


def test_a_spike_given_by_the_user_is_weighed() -> None:
    """Half of the mass in a millionth of the volume: found by nobody, right where modes= names it."""
    p = problem("narrow-spike")
    weights = p.truth["mode_weights"]
    r = bz.sample(p.target, seed=0, modes=weights.at)
    e = r.probability(lambda x: weights.f(x)[..., 0] > 0)
    assert r.status == "ok" and abs(float(e.value) - 0.5) < 4.5 * float(e.stderr) < 0.1
    assert "WITNESS_CONFLICT" not in codes(r)


def test_one_lucky_pilot_does_not_make_a_mixture_fair() -> None:
    none = torch.zeros(0)
    lucky = Draw(None, none, none, none, ess=0.33, khat=0.42)
    assert FAIR.fits(lucky) and not FAIR.fits(_worse(lucky, 0.03, 0.3)) and not FAIR.fits(_worse(lucky, 0.4, 0.5))
    assert FAIR.fits(_worse(lucky, 0.4, 0.3))
