"""Where flows meet hard edges, NaN, short splines, small budgets and users who ask for too much: what is said, and what it costs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import zuko
from torch import Tensor

import boltzsample as bz
from boltzsample.backend import Backend
from boltzsample.errors import ShapeError
from boltzsample.flows.base import DefensiveBase, Normal
from boltzsample.flows.choose import choose
from boltzsample.flows.families import make_flow
from boltzsample.flows.flow import Flow, NoInverse
from boltzsample.flows.look import look
from boltzsample.flows.objectives import InDtype, reverse_kl, reverse_kl_path
from boltzsample.flows.train import Training, train
from boltzsample.kernels import LocalThenIndependent
from boltzsample.progress import Interrupt, Progress
from boltzsample.samplers.sampler import Budget, Ledger, Run
from boltzsample.samplers.starts import Starts
from boltzsample.samplers.wide_source import wide_source
from boltzsample.streams import Rng, Stream
from boltzsample.views import Tempered
from targets import problem
from tests.counted import Counted
from tests.small import codes

QUICK = Training(steps=60, rounds=1, batch=128, look=512)
SHORT = bz.MCMC(chains=64, warmup=40)


def normal(x: Tensor) -> Tensor:
    return -0.5 * x.square().sum(-1)


def rng(name: str = "test") -> Rng:
    return Stream(0).child(name).rng()


def run(starts: Starts | None = None, **settings: Any) -> Run:
    return Run(Backend(compile=False), Stream(0), starts or Starts(None), Ledger(), Budget(), Progress(False), Interrupt(), **settings)


# ---- looks and steps ----


def test_mass_beyond_a_hard_edge_costs_what_it_weighs() -> None:
    """Half of N(0, I) is cut off: log Z = log pi in two dimensions, and the identity's bound is exact, for the cut flow is the target."""
    half = bz.from_log_prob(lambda x: torch.where(x[:, 0] > 0, normal(x), -torch.inf), dim=2)
    seen = look(make_flow("realnvp", 2, rng(), base=Normal(2)), half, 4_000, rng())
    assert abs(seen.elbo - math.log(math.pi)) < 4.5 * seen.stderr < 0.1
    assert abs(seen.log_z - seen.elbo) < 1e-9 and seen.gap > 0.01  # the error bar counts the coin of the edge


def test_a_nan_gradient_has_no_say() -> None:
    """At a third of the points the gradient is NaN and log_prob is not: the step is that of the others."""
    flow, noise = make_flow("realnvp", 2, rng(), base=Normal(2)).copy(), rng("bend")
    for p in flow.parameters():
        p.add_(0.3 / math.sqrt(p.shape[-1]) * noise.normal(*p.shape))
    flow.layers.requires_grad_(True)

    class Torn:
        dim = 2

        def log_prob(self, x: Tensor) -> Tensor:
            return normal(x - 1)

        def grad_log_prob(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1] > 0.5, torch.nan, 1 - x)

    z = rng("z").normal(90, 2)
    whole = bz.from_log_prob(lambda x: normal(x - 1), dim=2)
    kept = flow.push(z)[0][:, 0] <= 0.5
    told = InDtype(Torn(), torch.float64)
    for target in (Torn(), told, Tempered(told, torch.ones(()))):
        for objective in (reverse_kl, reverse_kl_path):
            step, right = objective(flow, target, z), objective(flow, whole, z[kept])
            assert 10 < int(kept.sum()) < 80 and torch.equal(step.log_w.isnan(), ~kept)
            mine, theirs = (torch.autograd.grad(s.loss * n, flow.parameters()) for s, n in ((step, 90), (right, int(kept.sum()))))
            assert max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True)) < 1e-9


def test_plain_gradients_take_many_short_steps() -> None:
    asked = Training(steps=10, rounds=1, look=100, enough=-1.0)
    for family, steps, batch in (("realnvp", 10, 256), ("affine-iaf", 30, 128)):
        trained = train(make_flow(family, 2, rng()), bz.from_log_prob(normal, dim=2), run(), asked)
        assert len(trained.history["elbo"]) == steps and trained.rows == (100, steps * batch)
    fixed = train(make_flow("affine-iaf", 2, rng()), bz.from_log_prob(normal, dim=2), run(), replace(asked, batch=32))
    assert fixed.rows == (100, 320)


def test_an_order_of_cause_and_effect_is_found_by_the_pilots() -> None:
    target = problem("funnel-sd3").target
    chosen = choose(target, run(wide_source(target, Backend(), Stream(0), gradient=True)))
    assert chosen.name == "affine-iaf, scaled by points"


# ---- splines that end ----


def test_short_splines_made_elsewhere_are_seen() -> None:
    """zuko's end at 5: of N(0, 3^2) a tenth lies beyond in each coordinate. Held either way, bent, alone or among others, autoregressive
    or in couplings."""
    x = 3 * rng("x").normal(2_000, 3)
    beyond = float((x.abs() > 5).any(-1).double().mean())
    made = [zuko.flows.NSF(3, transforms=1), zuko.flows.NSF(3, transforms=1, passes=2), zuko.flows.NSF(3, transforms=2)]
    for foreign in made:
        for one_pass in (False, True):
            flow = Flow.from_zuko(foreign.double(), one_pass=one_pass)
            found = float(flow.out_of_range(x))
            assert found >= beyond > 0.2 and found < 0.5
            assert float(flow.out_of_range(x / 10)) < 0.001
    assert float(Flow.from_zuko(zuko.flows.MAF(3).double()).out_of_range(100 * x)) == 0.0


def test_pyro_splines_are_seen() -> None:
    pyro = pytest.importorskip("pyro.distributions.transforms")
    flow = Flow.from_pyro([pyro.spline_coupling(2, bound=2.0), pyro.affine_coupling(2)], dim=2)
    assert float(flow.out_of_range(torch.tensor([[0.1, 0.1], [9.0, 0.1]]))) == 0.5


def test_chains_beyond_the_splines_are_flagged() -> None:
    flow = make_flow("spline-coupling", 2, rng(), bound=1.5)
    r = bz.sample(bz.from_log_prob(normal, dim=2), bz.LatentMCMC(flow, mcmc=SHORT), n=2_000, fit=False, seed=0, witness=False)
    assert "OUT_OF_RANGE" in codes(r)


# ---- before anything is spent ----


@pytest.mark.parametrize("sampler", [bz.FlowIS("affine-iaf"), bz.LatentMCMC(make_flow("iaf", 2, rng()))])
def test_draws_for_a_flow_without_an_inverse_are_refused_at_the_door(sampler: Any) -> None:
    target = Counted(bz.from_log_prob(normal, dim=2))
    x = rng().normal(100, 2)
    with pytest.raises(NoInverse, match="realnvp"):
        bz.sample(target, sampler, seed=0, data=bz.Draws.from_arrays(x, normal(x)))
    with pytest.raises(ShapeError, match="wanted the same"):
        bz.sample(target, bz.FlowIS(make_flow("realnvp", 3, rng())), seed=0)
    assert target.log_prob_rows == target.grad_rows == 0


# ---- budgets ----


def test_replicates_share_what_is_left() -> None:
    whole = replace(run(replicates=4, reserve=100), budget=Budget(evaluations=10_100, seconds=1000.0))
    assert whole.part(0).budget.evaluations == 100 + 2_500 and whole.part(3).budget == whole.budget
    whole.ledger.add("training", (0, 4_000))
    assert whole.part(1).budget.evaluations == 100 + 4_000 + 2_000
    seconds = whole.part(2).budget.seconds
    assert seconds is not None and abs(seconds - 500) < 1 and run().part(0).budget == Budget()


@pytest.mark.parametrize("method", [bz.FlowIS, bz.LatentMCMC])
def test_replicates_get_equal_training_out_of_a_budget(method: Any) -> None:
    """Training could take all of the budget four times over; every replicate gets its part of it, and the budget holds."""
    asked = Training(steps=2_000, rounds=1, batch=128, look=256, share=0.7)
    more = {"mcmc": SHORT} if method is bz.LatentMCMC else {}
    target = Counted(bz.from_log_prob(lambda x: normal(x - 1), dim=2))
    r = bz.sample(target, method("realnvp", asked, **more), n=500, seed=0, replicates=3, budget=120_000, witness=False)
    assert target.log_prob_rows + target.grad_rows <= 120_000
    for part in r.replicates:
        assert part.draws.log_prob.numel() >= 500 and float(part.expectation().value.sub(1).abs().max()) < 0.5


def test_pools_and_the_bridge_are_priced_before_they_are_paid() -> None:
    target = Counted(bz.from_log_prob(normal, dim=2))
    sampler = bz.LatentMCMC("realnvp", Training(steps=40, rounds=1, batch=64, look=256, share=0.7), mcmc=SHORT)
    for budget in (60_000, 100_000):
        target.log_prob_rows = target.grad_rows = 0
        r = bz.sample(target, sampler, n=100_000, seed=0, budget=budget, witness=False)
        assert target.log_prob_rows + target.grad_rows <= budget
        assert r.draws.ledger["log Z"][0] > 200 and abs(float(r.log_z().value) - math.log(2 * math.pi)) < 4.5 * float(r.log_z().stderr)


def test_chains_that_were_never_fitted_make_independence_moves() -> None:
    """In a flow with 4 modes' worth of distance between two modes local moves never cross; independence moves do."""
    flow = Flow(DefensiveBase(2, share=0.5, scale=8.0, df=None), make_flow("realnvp", 2, rng()).layers)
    kernel = bz.LatentMCMC(flow, mcmc=SHORT)._production(0, 2, run()).kernel
    assert isinstance(kernel, LocalThenIndependent)
    r = bz.sample(bz.from_log_prob(normal, dim=2), bz.LatentMCMC(flow, mcmc=SHORT), n=2_000, fit=False, seed=0, witness=False)
    assert abs(float(r.expectation(lambda x: x[..., 0] ** 2).value) - 1) < 0.3


def test_compiling_by_itself_waits_for_a_later_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round may be the last, so "auto" never compiles in it, and later only where the steps pay."""
    import boltzsample.flows.train as module

    made: list[bool] = []

    class Recorded(module.Stepper):
        def __init__(self, fn: Any, compile: bool, *rest: Any) -> None:
            made.append(compile)
            super().__init__(fn, False, *rest)

    monkeypatch.setattr(module, "Stepper", Recorded)
    monkeypatch.setattr(module, "COMPILE_FROM", 30)
    asked = Training(steps=10, rounds=2, batch=16, look=4_000, enough=-1.0)
    for compile, family, wanted in (("auto", "realnvp", [False, True]), ("auto", "affine-iaf", [False]), (True, "realnvp", [True])):
        made.clear()
        there = replace(run(), backend=Backend(compile=compile))
        trained = train(make_flow(family, 2, rng()), bz.from_log_prob(lambda x: normal(x - 1), dim=2), there, asked)
        assert made == wanted and len(trained.looks) == len(trained.seconds) == 2
