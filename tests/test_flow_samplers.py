"""flow-is, latent-mcmc, importance and the bridge: right where the truth is known, loud where they cannot be, frozen when they draw.

Statistical assertions are at 4.5 standard errors (7e-6 each, about 30 of them) unless said otherwise; seeds are fixed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import boltzsample as bz
from boltzsample import errors
from boltzsample.estimates.bridge import bridge
from boltzsample.flows.base import DefensiveBase, Normal
from boltzsample.flows.families import make_flow
from boltzsample.flows.train import Training
from boltzsample.kernels import HMC, LocalThenIndependent
from boltzsample.maps import Dense, Diagonal
from boltzsample.samplers.frozen_smc import Annealed
from boltzsample.samplers.sampler import Verdict
from boltzsample.samplers.second_look import against
from boltzsample.streams import Stream
from boltzsample.witnesses import no_audit, together
from tests.counted import Counted
from tests.small import codes

QUICK = Training(steps=60, rounds=1, look=512, batch=128)
A = torch.tensor([[1.5, 0.0], [-0.9, 0.4]], dtype=torch.float64)
LOG_Z = 1.0 + math.log(2 * math.pi) + math.log(0.6)


def bent(x: Tensor) -> Tensor:
    """x = m + A y, y_1 normal, y_2 normal around y_1^2 / 2: log Z = LOG_Z."""
    y = torch.linalg.solve(A.to(x), (x - 1.0).mT).mT
    return 1.0 - 0.5 * y[..., 0] ** 2 - 0.5 * (y[..., 1] - 0.5 * y[..., 0] ** 2) ** 2


TARGET = bz.from_log_prob(bent, dim=2)
MEAN = 1.0 + A @ torch.tensor([0.0, 0.5], dtype=torch.float64)
SHORT = bz.MCMC(chains=64, warmup=60)
METHODS: dict[str, Any] = {"flow-is": bz.FlowIS("realnvp", QUICK), "latent-mcmc": bz.LatentMCMC("realnvp", QUICK, mcmc=SHORT)}
BOTH = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def results() -> dict[str, bz.Result]:
    return {name: bz.sample(TARGET, sampler, n=4000, seed=1) for name, sampler in METHODS.items()}


@BOTH
def test_means_and_log_z_are_right(name: str, results: dict[str, bz.Result]) -> None:
    r = results[name]
    means, log_z = r.expectation(), r.log_z()
    assert ((means.value - MEAN) / means.stderr).abs().max() < 4.5
    assert abs(float(log_z.value) - LOG_Z) < 4.5 * float(log_z.stderr) < 0.2
    assert r.config["method"] == name and r.config["log_z"] is True


@BOTH
def test_both_witnesses_speak(name: str, results: dict[str, bz.Result]) -> None:
    said = " ".join(results[name].draws.witnesses)
    assert "optimum audit" in said and "SMC in the latent space" in said and "missing mass" in said


@BOTH
def test_training_ends_before_drawing(name: str, results: dict[str, bz.Result]) -> None:
    """A fitted sampler drawn from twice is the same sampler: not a parameter, step or map moves, and the same seed gives the same bits."""
    sampler = results[name].sampler
    before = {k: v.clone() for k, v in sampler.flows[0].state()[0].items()}
    runs = [bz.sample(TARGET, sampler, n=500, seed=3, fit=False, witness=False) for _ in range(2)]
    assert torch.equal(runs[0].draws.x, runs[1].draws.x)
    after = runs[0].sampler.flows[0].state()[0]
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert runs[0].sampler is sampler and "training" not in runs[0].ledger and "pilot" not in runs[0].ledger
    if name == "latent-mcmc":
        assert isinstance(sampler.fitted[0].kernel, HMC)
        production = sampler._production(0, 2, None).kernel
        assert isinstance(production, LocalThenIndependent) and production.local is sampler.fitted[0].kernel


@BOTH
def test_given_the_proposal_and_end_to_end(name: str, results: dict[str, bz.Result]) -> None:
    given = bz.sample(TARGET, results[name].sampler, n=500, seed=4, fit=False, replicates=3, witness=False)
    assert given.draws.scope == "given this proposal" and len(given.replicates) == 3
    whole = bz.sample(TARGET, METHODS[name], n=500, seed=4, replicates=2, witness=False)
    assert whole.draws.scope == "end to end" and len(whole.sampler.flows) == 2
    first, second = (f.state()[0] for f in whole.sampler.flows)
    assert any(not torch.equal(first[k], second[k]) for k in first)
    for r in (given, whole):
        assert abs(float(r.log_z().value) - LOG_Z) < 4.5 * max(float(r.log_z().stderr), 0.02)


@BOTH
def test_stated_is_counted(name: str) -> None:
    counted = Counted(TARGET)
    r = bz.sample(counted, METHODS[name], n=300, seed=5, compile=False)
    assert sum(a for a, _ in r.ledger.values()) == counted.log_prob_rows
    assert sum(b for _, b in r.ledger.values()) == counted.grad_rows


@BOTH
def test_saved_and_loaded(name: str, results: dict[str, bz.Result], tmp_path: Any) -> None:
    kept = bz.load(results[name].save(tmp_path / "run"))
    old, new = results[name].log_z(), kept.log_z()
    assert float(old.value) == float(new.value) and float(old.stderr) == float(new.stderr) and str(new) == str(old)
    assert kept.status == results[name].status


@BOTH
def test_a_flow_on_one_of_two_far_modes_is_caught(name: str) -> None:
    """A proposal around one mode, fitted well: its weights are perfect, and the audit says what is missing."""
    centres = torch.tensor([[-15.0, 0.0], [15.0, 0.0]], dtype=torch.float64)

    def far(x: Tensor) -> Tensor:
        square = (x[..., None, :] - centres.to(x)).square().sum(-1)
        return torch.logsumexp(-0.5 * square + torch.tensor([0.7, 0.3]).to(x).log(), -1)

    here = make_flow("realnvp", 2, Stream(0).rng(), base=DefensiveBase(2), whitening=Diagonal(centres[0], torch.ones(2).double()))
    r = bz.sample(bz.from_log_prob(far, dim=2), replace(METHODS[name], flow=here), n=2000, seed=0)
    assert r.status == "untrusted" and "WITNESS_CONFLICT" in codes(r)
    assert float(r.log_z().value) == pytest.approx(math.log(2 * math.pi * 0.7), abs=0.02)


def test_a_trained_flow_is_wanted() -> None:
    with pytest.raises(ValueError, match="no trained flow; leave fit=True"):
        bz.sample(TARGET, bz.FlowIS(), n=100, fit=False)


def test_a_flow_of_ones_own_and_data() -> None:
    """A user's draws are learnt from first: the forward KL asks the target nothing."""
    y = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)).double()
    y[:, 1] += 0.5 * y[:, 0] ** 2
    draws = bz.Draws.from_arrays(1.0 + y @ A.T)
    white = Dense(MEAN, A)
    flow = make_flow("realnvp", 2, Stream(0).rng(), base=DefensiveBase(2), whitening=white)
    r = bz.sample(TARGET, bz.FlowIS(flow, QUICK), n=2000, seed=0, data=draws, witness=False)
    assert r.ledger["training"][1] == 0
    assert abs(float(r.log_z().value) - LOG_Z) < 4.5 * float(r.log_z().stderr) < 0.3


def test_nan_regions_and_a_budget_are_said() -> None:
    torn = bz.from_log_prob(lambda x: torch.where(x[..., 0] > 2.0, torch.nan, -0.5 * x.square().sum(-1)), dim=2)
    r = bz.sample(torn, bz.FlowIS("realnvp", QUICK), n=4000, seed=0, starts=torch.zeros(2))
    assert "NAN_EVAL" in codes(r) and r.status != "ok"
    short = bz.sample(TARGET, bz.FlowIS("realnvp", QUICK), n=200_000, seed=0, budget=60_000)
    assert "STOPPED_EARLY" in codes(short) and short.evaluations <= 60_000


def test_infinite_density_is_an_error() -> None:
    spike = bz.from_log_prob(lambda x: torch.where(x[..., 0] > 1.5, torch.inf, -0.5 * x.square().sum(-1)), dim=2)
    flow = make_flow("realnvp", 2, Stream(0).rng(), base=DefensiveBase(2))
    with pytest.raises(errors.PositiveInfinityError):
        bz.sample(spike, bz.FlowIS(flow), n=1000, fit=False, seed=0, starts=torch.zeros(2), witness=False)


def test_a_spline_that_cannot_reach_the_tails_is_flagged() -> None:
    """Where the splines end at 1 a third of the draws lie outside: here no harm is done, elsewhere nothing else would say so."""
    target = bz.from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=2)
    for bound, said in ((1.0, True), (10.0, False)):
        flow = make_flow("spline-coupling", 2, Stream(0).rng(), base=DefensiveBase(2), bound=bound)
        r = bz.sample(target, bz.FlowIS(flow), n=4000, fit=False, seed=0)
        assert ("OUT_OF_RANGE" in codes(r)) is said and (r.status == "ok") is not said


# ---- a proposal of one's own ----


def test_importance_with_torch_distributions() -> None:
    proposal = torch.distributions.MultivariateNormal(MEAN, 2.0 * A @ A.T)
    state = torch.get_rng_state()
    r, again = (bz.importance(TARGET, proposal, n=20_000, seed=0) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(r.draws.x, again.draws.x)
    assert ((r.means.value - MEAN) / r.means.stderr).abs().max() < 4.5
    assert abs(float(r.log_z().value) - LOG_Z) < 4.5 * float(r.log_z().stderr) < 0.2
    assert r.ledger["sampling"] == (20_000, 0)


def test_importance_refuses_what_is_no_proposal() -> None:
    with pytest.raises(TypeError, match="wanted an object with sample and log_prob"):
        bz.importance(TARGET, 3)
    with pytest.raises(errors.ShapeError, match="Independent"):
        bz.importance(TARGET, torch.distributions.Normal(torch.zeros(2), torch.ones(2)), witness=False)


# ---- the bridge ----


def test_bridge_bars_hold() -> None:
    """100 seeds of autocorrelated chains: z has a standard deviation between .8 and 1.25 (false failure 2e-3), and no bias."""
    found = []
    for seed in range(100):
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(32, 1, generator=rng).double()
        chains = [x]
        for _ in range(19):
            chains.append(0.9 * chains[-1] + math.sqrt(1 - 0.81) * torch.randn(32, 1, generator=rng).double())
        x, y = torch.cat(chains, 1), 1.5 * torch.randn(500, generator=rng).double()
        log_ratio = [-0.5 * v**2 + 0.5 * (v / 1.5) ** 2 + math.log(1.5) for v in (x, y)]
        e = bridge(*log_ratio)
        found.append(float(e.value / e.stderr))
    z = torch.tensor(found)
    assert abs(z.mean()) < 0.45 and 0.8 < z.std() < 1.25, (z.mean(), z.std())


def test_bridge_without_overlap_is_untrusted() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 50, generator=rng).double(), 8 + torch.randn(500, generator=rng).double()
    e = bridge(-0.5 * x**2 + 0.5 * (x - 8) ** 2, -0.5 * y**2 + 0.5 * (y - 8) ** 2)
    assert e.status == "untrusted" and "NO_OVERLAP" in codes(e)


# ---- the verdict of two witnesses ----


def test_against() -> None:
    estimate = bz.importance(TARGET, torch.distributions.MultivariateNormal(MEAN, 2.0 * A @ A.T), n=2000, seed=0, witness=False).log_z()
    value = float(estimate.value)
    good = Annealed(torch.zeros(1), value + 0.01, 1e-3, 500, 0)
    assert against(estimate, good).sees is not None and not against(estimate, good).flags
    assert codes(against(estimate, replace(good, log_z=value - 1))) == {"WITNESS_CONFLICT"}
    assert not against(estimate, replace(good, eves=3, log_z=value - 1)).looked


def test_only_a_strong_look_lifts_single_witness() -> None:
    tired, blind = no_audit("tired", looked=True), no_audit("no gradient")
    assert not together(tired, Verdict(sees=0.1)).flags
    assert together(tired, Verdict(sees=0.5)).flags and together(tired, Verdict()).flags and together(blind, Verdict(sees=0.1)).flags


def test_normal_base_needs_no_tens() -> None:
    flow = make_flow("realnvp", 2, Stream(0).rng(), base=Normal(2), whitening=Dense(MEAN, A))
    r = bz.sample(TARGET, bz.FlowIS(flow), n=123, fit=False, seed=0, witness=False)
    assert r.draws.x.shape == (123, 1, 2)


# ---- found by a reviewer ----


def test_importance_in_the_users_space() -> None:
    """On x > 0 the proposal is a law of x, as f and starts are: log Z = 0, E x = 1."""
    half = bz.from_log_prob(lambda x: -x.sum(-1), dim=1, support=constraints.positive)
    proposal = torch.distributions.Independent(torch.distributions.Exponential(torch.tensor([0.5])), 1)
    r = bz.importance(half, proposal, seed=0)
    e, log_z = r.expectation(), r.log_z()
    assert abs(float(e.value[0]) - 1) < 4.5 * float(e.stderr[0]) < 0.2 and abs(float(log_z.value)) < 4.5 * float(log_z.stderr) < 0.2

    class Elsewhere:
        dim = 1
        log_prob = staticmethod(half.log_prob)
        grad_log_prob = staticmethod(half.grad_log_prob)
        readout = staticmethod(torch.exp)

    with pytest.raises(TypeError, match="Jacobian"):
        bz.importance(Elsewhere(), proposal, seed=0)


def test_chains_that_share_starts_are_no_independent_chains() -> None:
    """32 starts, 8 stuck chains each, in two modes: 60 seeds; the bar is not much shorter than the spread (it was half of it)."""
    values, bars = [], []
    for seed in range(60):
        rng = torch.Generator().manual_seed(seed)
        mode = (torch.rand(32, generator=rng) < 0.25).repeat_interleave(8)
        x = torch.where(mode, -6.0, 6.0)[:, None] + torch.randn(256, 10, generator=rng)
        side = torch.where(torch.rand(2000, generator=rng) < 0.9, -6.0, 6.0)
        y = side + torch.randn(2000, generator=rng)

        def ratio(v: Tensor) -> Tensor:
            heights = torch.stack([-0.5 * (v + 6) ** 2, -0.5 * (v - 6) ** 2], -1).double()
            p, q = (torch.logsumexp(heights + torch.tensor(w, dtype=torch.float64).log(), -1) for w in ((0.25, 0.75), (0.9, 0.1)))
            return p - q

        e = bridge(ratio(x), ratio(y), torch.arange(32).repeat_interleave(8))
        values.append(float(e.value))
        bars.append(float(e.stderr))
    spread = torch.tensor(values).std()
    assert 0.7 * spread < sum(bars) / len(bars) < 1.6 * spread, (spread, sum(bars) / len(bars))


def test_log_z_of_chains_that_disagree_is_untrusted() -> None:
    centres = torch.tensor([[-15.0, 0.0], [15.0, 0.0]], dtype=torch.float64)
    far = bz.from_log_prob(lambda x: torch.logsumexp(-0.5 * (x[..., None, :] - centres.to(x)).square().sum(-1), -1), dim=2)
    white = Diagonal(torch.zeros(2).double(), torch.tensor([15.0, 1.0]).double())
    flow = make_flow("realnvp", 2, Stream(0).rng(), base=DefensiveBase(2), whitening=white)
    r = bz.sample(far, bz.LatentMCMC(flow, mcmc=SHORT, independent=None), n=2000, fit=False, seed=0, witness=False)
    assert r.status == "untrusted" and r.log_z().status == "untrusted"


def test_a_witness_cut_short_is_no_witness() -> None:
    r = bz.sample(TARGET, bz.FlowIS("realnvp", Training(steps=20, rounds=1)), n=2000, seed=0, budget=60_000)
    assert "SINGLE_WITNESS" in codes(r) and r.status != "ok" and r.evaluations <= 60_000


def test_what_does_not_fit_is_said_at_the_door() -> None:
    three = make_flow("realnvp", 3, Stream(0).rng())
    for call in (lambda: bz.importance(TARGET, three), lambda: bz.sample(TARGET, bz.FlowIS(three), fit=False)):
        with pytest.raises(errors.ShapeError, match="the flow has 3 dimensions and the target 2"):
            call()
    noisy = make_flow("ffjord", 2, Stream(0).rng(), probes=1)
    with pytest.raises(ValueError, match="Hutchinson"):
        bz.sample(TARGET, bz.FlowIS(noisy), fit=False)
    with pytest.raises(ValueError, match="does not learn from draws"):
        bz.sample(TARGET, "mcmc", data=bz.Draws.from_arrays(torch.zeros(4, 2)))


def test_errors_in_the_latent_space_speak_of_x() -> None:
    spike = bz.from_log_prob(lambda x: torch.where(x[..., 0] > 101.5, torch.inf, -0.5 * (x - 100).square().sum(-1)), dim=2)
    white = Diagonal(torch.full((2,), 100.0).double(), torch.ones(2).double())
    flow = make_flow("realnvp", 2, Stream(0).rng(), base=DefensiveBase(2), whitening=white)
    with pytest.raises(errors.PositiveInfinityError, match=r"x = \[1") as caught:
        bz.sample(spike, bz.LatentMCMC(flow, mcmc=SHORT), n=2000, fit=False, seed=0, starts=torch.full((2,), 100.0), witness=False)
    assert caught.value.x is not None and float(caught.value.x.flatten()[0]) > 101.5


def test_a_fitted_sampler_moves_to_another_dtype(results: dict[str, bz.Result]) -> None:
    for name in METHODS:
        r = bz.sample(TARGET, results[name].sampler, n=500, fit=False, seed=0, dtype=torch.float32, witness=False)
        assert r.draws.x.dtype == torch.float32


def test_one_chain_keeps_its_draws_and_no_gradient_its_weights() -> None:
    lone = bz.LatentMCMC("realnvp", QUICK, mcmc=bz.MCMC(chains=1, warmup=20))
    r = bz.sample(TARGET, lone, n=50, seed=0, witness=False)
    assert r.draws.x.shape[0] == 1 and "NO_ERROR_BAR" in codes(r.log_z())
    blind = bz.from_numpy(lambda x: -0.5 * (x**2).sum(-1), dim=2)
    flow = make_flow("realnvp", 2, Stream(0).rng(), base=DefensiveBase(2))
    assert "SINGLE_WITNESS" in codes(bz.sample(blind, bz.FlowIS(flow), n=500, fit=False, seed=0))
