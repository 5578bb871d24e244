"""Training flows: objectives against each other and against the truth, bad steps, counts, stops, the choice of the default."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import boltzsample as bz
from boltzsample.backend import Backend, compile_whole
from boltzsample.flows.base import DefensiveBase, Normal
from boltzsample.flows.choose import choose, laplace_map
from boltzsample.flows.families import make_flow
from boltzsample.flows.flow import Flow, NoInverse
from boltzsample.flows.look import look
from boltzsample.flows.objectives import forward_kl, reverse_kl, reverse_kl_path
from boltzsample.flows.optimizer import PATIENCE
from boltzsample.flows.train import Training, train
from boltzsample.maps import Dense
from boltzsample.progress import Interrupt, Progress
from boltzsample.samplers.sampler import Budget, Ledger, Run
from boltzsample.samplers.starts import Starts
from boltzsample.samplers.wide_source import wide_source
from boltzsample.streams import Rng, Stream
from boltzsample.target import log_prob_and_grad
from targets import problem
from tests.counted import Counted

QUICK = Training(steps=150, rounds=1, batch=128, look=2048)
COVARIANCE = torch.tensor([[4.0, 1.2, 0.0], [1.2, 1.0, -0.3], [0.0, -0.3, 0.5]], dtype=torch.float64)
LOG_Z = 0.7
PRECISION = torch.linalg.inv(COVARIANCE)
NORM = 1.5 * math.log(2 * math.pi) + 0.5 * float(torch.logdet(COVARIANCE))


def gaussian_log_prob(x: Tensor) -> Tensor:
    away = x - 1.0
    return -0.5 * ((away @ PRECISION.to(x)) * away).sum(-1) - NORM + LOG_Z


def gaussian() -> bz.Target:
    """N(1, COVARIANCE) times e^.7."""
    return bz.from_log_prob(gaussian_log_prob, dim=3)


def rng(name: str = "test", dtype: torch.dtype = torch.float64) -> Rng:
    return Stream(0).child(name).rng(dtype)


def run(starts: Starts | None = None, budget: Budget | None = None, seed: int = 0, **settings: Any) -> Run:
    return Run(Backend(**settings), Stream(seed), starts or Starts(None), Ledger(), budget or Budget(), Progress(False), Interrupt())


def bent(family: str, dim: int = 3, **options: Any) -> Flow:
    flow, noise = make_flow(family, dim, rng("init"), **options).copy(), rng("bend")
    for p in flow.parameters():
        p.add_(0.4 / math.sqrt(p.shape[-1]) * noise.normal(*p.shape))
    return flow


def gradient(flow: Flow, loss: Tensor) -> Tensor:
    grads = torch.autograd.grad(loss, flow.parameters(), allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(flow.parameters(), grads, strict=True)])


# ---- objectives ----


def test_the_surrogate_is_the_gradient_of_the_kl() -> None:
    """Against autograd through the density itself, at the same noise: equal to rounding."""
    flow = bent("realnvp", base=Normal(3), whitening=Dense(torch.ones(3).double(), torch.linalg.cholesky(COVARIANCE)))
    flow.layers.requires_grad_(True)
    z = rng().normal(64, 3)
    x, log_det = flow.push(z)
    direct = gradient(flow, (flow.base.log_prob(z) - log_det - gaussian_log_prob(x)).mean())
    step = reverse_kl(flow, gaussian(), z)
    assert (gradient(flow, step.loss) - direct).abs().max() < 1e-10
    assert (step.log_w - (gaussian_log_prob(x) + log_det - flow.base.log_prob(z))).abs().max() < 1e-10


@pytest.mark.parametrize("family", ["realnvp", "nice", "spline-coupling", "maf"])
def test_the_carried_score_is_that_of_the_inverse(family: str) -> None:
    """Path gradients with the score carried along against those with grad_x log q through `pull`: equal to rounding."""
    flow = bent(family, whitening=Dense(torch.ones(3).double(), torch.linalg.cholesky(COVARIANCE)))
    z = rng().normal(20, 3)
    x = flow.push(z)[0].detach().requires_grad_(True)
    with torch.enable_grad():
        (by_inverse,) = torch.autograd.grad(flow.log_prob(x).sum(), x)
    _, g = log_prob_and_grad(gaussian(), x)
    flow.layers.requires_grad_(True)
    direct = gradient(flow, -(flow.push(z)[0] * (g - by_inverse)).sum(-1).mean())
    assert (gradient(flow, reverse_kl_path(flow, gaussian(), z).loss) - direct).abs().max() < 1e-8


def test_path_and_plain_gradients_have_the_same_mean() -> None:
    """400 batches of 64; the difference of means in a fixed random direction, |z| < 4.5 (false failures: 7e-6)."""
    flow = bent("realnvp", layers=2, hidden=(8,))
    flow.layers.requires_grad_(True)
    noise, way = rng(), rng("way").normal(sum(p.numel() for p in flow.parameters()))
    difference = []
    for _ in range(400):
        z = flow.base.sample(noise, 64)
        plain, path = (gradient(flow, f(flow, gaussian(), z).loss) @ way for f in (reverse_kl, reverse_kl_path))
        difference.append(plain - path)
    d = torch.stack(difference)
    assert d.std() > 0.01 and d.mean().abs() < 4.5 * d.std() / 20


@pytest.mark.parametrize("family", ["realnvp", "spline-coupling", "nice"])
def test_the_path_gradient_has_no_variance_at_the_optimum(family: str) -> None:
    """Whitened by the exact covariance, the identity is the optimum: the path gradient is zero, the plain one is not."""
    flow = make_flow(family, 3, rng(), base=Normal(3), whitening=Dense(torch.ones(3).double(), torch.linalg.cholesky(COVARIANCE)))
    flow.layers.requires_grad_(True)
    z = rng().normal(50, 3)
    assert gradient(flow, reverse_kl_path(flow, gaussian(), z).loss).abs().max() < 1e-10
    assert gradient(flow, reverse_kl(flow, gaussian(), z).loss).abs().max() > 1e-2


def test_the_compiled_objective_is_the_eager_one() -> None:
    flow = bent("realnvp", layers=2, hidden=(8,))
    flow.layers.requires_grad_(True)
    z = rng().normal(32, 3)
    compiled = compile_whole(lambda z: reverse_kl_path(flow, gaussian(), z))(z)
    eager = reverse_kl_path(flow, gaussian(), z)
    assert (gradient(flow, compiled.loss) - gradient(flow, eager.loss)).abs().max() < 1e-10


def test_forward_kl_is_the_weighted_likelihood() -> None:
    flow, x, log_w = bent("realnvp"), rng().normal(30, 3), rng("w").normal(30)
    flow.layers.requires_grad_(True)
    step = forward_kl(flow, x, gaussian_log_prob(x), log_w)
    w = log_w.exp() / log_w.exp().sum()
    assert (step.loss + (w * flow.log_prob(x)).sum()).abs() < 1e-12
    with pytest.raises(NoInverse):
        forward_kl(bent("affine-iaf"), x, gaussian_log_prob(x))


def test_draws_without_a_finite_density_have_no_say() -> None:
    flow = bent("realnvp", base=Normal(3))
    flow.layers.requires_grad_(True)
    z = rng().normal(64, 3)
    inside = flow.push(z)[0][:, 0] < 0.5
    walled = bz.from_log_prob(lambda x: torch.where(x[:, 0] < 0.5, gaussian_log_prob(x), -torch.inf), dim=3)
    for f in (reverse_kl, reverse_kl_path):
        step, kept = f(flow, walled, z), f(flow, gaussian(), z[inside])
        assert torch.equal(step.log_w.isnan(), ~inside)
        assert (gradient(flow, step.loss) * 64 - gradient(flow, kept.loss) * int(inside.sum())).abs().max() < 1e-9


# ---- training ----


@pytest.mark.parametrize("family", ["realnvp", "affine-iaf"])
def test_reverse_kl_finds_a_gaussian_and_its_log_z(family: str) -> None:
    """log Z from 20,000 fresh draws within 4.5 of its standard errors (false failures: 7e-6), ESS of the narrow base above 97%."""
    there = run()
    trained = train(make_flow(family, 3, rng()), gaussian(), there, Training(steps=600, rounds=1, batch=128, lr=1e-2))
    seen = look(trained.flow, gaussian(), 20_000, rng("fresh"))
    error = math.sqrt((1 / seen.ess - 1) / 20_000)
    assert seen.ess > 0.9 and abs(seen.log_z - LOG_Z) < 4.5 * error and error < 0.003
    assert look(trained.flow.with_base(Normal(3)), gaussian(), 20_000, rng("fresh")).ess > 0.97
    assert isinstance(trained.flow.base, DefensiveBase) and trained.flow.dtype == torch.float64


def test_the_funnel_in_seconds() -> None:
    """A target far from Gaussian; log Z = 0 within 4.5 standard errors of 10,000 fresh draws."""
    target = problem("funnel-sd3").target
    trained = train(make_flow("realnvp", 10, rng(), layers=6), target, run(), Training(steps=250, rounds=1, batch=256))
    seen = look(trained.flow, target, 10_000, rng("fresh"))
    assert seen.ess > 0.6 and abs(seen.log_z) < 4.5 * math.sqrt((1 / seen.ess - 1) / 10_000)


def test_the_ledger_counts_what_was_asked() -> None:
    target, there = Counted(gaussian()), run()
    trained = train(make_flow("realnvp", 3, rng()), target, there, Training(steps=20, rounds=2, batch=32, look=100, enough=-1.0))
    assert there.ledger.phases["training"] == trained.rows == (target.log_prob_rows, target.grad_rows)
    assert trained.rows[1] == 32 * 20 * (1 if len(trained.looks) == 1 else 4)
    assert len(trained.history["elbo"]) == trained.rows[1] // 32


def test_numpy_densities_train() -> None:
    precision, norm = PRECISION.numpy(), NORM
    seen = set()

    def log_prob(x: np.ndarray) -> np.ndarray:
        seen.add(x.dtype)
        return -0.5 * (((x - 1.0) @ precision) * (x - 1.0)).sum(-1) - norm + LOG_Z

    target = bz.from_numpy(log_prob, dim=3, grad=lambda x: -(x - 1.0) @ precision)
    there, flow = run(), make_flow("realnvp", 3, rng())
    trained, same = train(flow, target, there, QUICK), train(flow, gaussian(), run(), QUICK)
    assert seen == {np.dtype("float64")}  # asked in the run's dtype, whatever that of the network
    assert trained.looks[-1].ess > 0.9 and abs(trained.looks[-1].elbo - same.looks[-1].elbo) < 1e-3


def test_the_original_and_the_global_generator_are_untouched_and_bits_repeat() -> None:
    flow, before = make_flow("realnvp", 3, rng()), torch.random.get_rng_state()
    kept = {k: t.clone() for k, t in flow.state()[0].items()}
    one, two = (train(flow, gaussian(), run(), QUICK).flow.state()[0] for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert all(torch.equal(kept[k], t) for k, t in flow.state()[0].items())
    assert not torch.equal(kept["layers.layers.1.net.0.weight"], one["layers.layers.1.net.0.weight"])
    assert torch.equal(before, torch.random.get_rng_state()) and torch.is_grad_enabled()


class Flaky:
    """The Gaussian, except that the gradient of calls `first` .. `last` is NaN."""

    dim = 3

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.calls = first, last, 0

    def log_prob(self, x: Tensor) -> Tensor:
        return gaussian_log_prob(x)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_grad(x)[1]

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        bad = self.first <= self.calls <= self.last
        return gaussian_log_prob(x) * (math.nan if bad else 1.0), -((x - 1.0) @ PRECISION.to(x)) * (math.nan if bad else 1.0)


def test_steps_without_a_finite_density_are_skipped_counted_and_rolled_back() -> None:
    trained = train(make_flow("realnvp", 3, rng()), Flaky(60, 60 + 2 * PATIENCE), run(), QUICK)
    assert trained.skipped == 2 * PATIENCE + 1 and trained.rolled_back == 2
    assert [f.code for f in trained.notes] == ["NAN_EVAL"] and trained.notes[0].severity == "caution"
    assert trained.looks[-1].ess > 0.8
    assert not train(make_flow("realnvp", 3, rng()), Flaky(0, 0), run(), QUICK).notes


def test_it_stops_when_nothing_is_left_to_gain() -> None:
    white = Dense(torch.ones(3).double(), torch.linalg.cholesky(COVARIANCE))
    trained = train(make_flow("realnvp", 3, rng(), whitening=white), gaussian(), run(), Training(steps=10, rounds=4, batch=64))
    assert len(trained.looks) == 1 and trained.looks[0].gap < 0.01
    narrow = make_flow("nice", 3, rng(), layers=2)  # additive couplings and a scale cannot be this Gaussian: rounds stop bringing more
    quartic = bz.from_log_prob(lambda x: gaussian_log_prob(x) - 0.1 * x.pow(4).sum(-1), 3)
    trained = train(narrow, quartic, run(), Training(steps=100, rounds=5, batch=64, enough=-1.0))
    gains = [b.elbo - a.elbo - 2 * math.hypot(a.stderr, b.stderr) for a, b in zip(trained.looks, trained.looks[1:], strict=False)]
    assert gains[-1] <= 0 and all(g > 0 for g in gains[:-1])


def test_budgets_end_training_and_say_so() -> None:
    there = run(budget=Budget(evaluations=20_000))
    trained = train(make_flow("realnvp", 3, rng()), gaussian(), there, Training(steps=1_000, batch=128, look=500, share=0.5))
    assert 8_000 < there.ledger.total <= 10_000 and trained.looks[-1].ess > 0.5
    late = run(budget=Budget(seconds=0.5))
    trained = train(make_flow("realnvp", 3, rng()), gaussian(), late, Training(steps=100_000, batch=128, look=500))
    assert [f.code for f in trained.notes] == ["STOPPED_EARLY"] and 3 < len(trained.history["elbo"]) < 1_000


def test_an_interrupt_ends_training_with_what_there_is() -> None:
    there = run()
    there.interrupt.requested = True
    trained = train(make_flow("realnvp", 3, rng()), gaussian(), there, QUICK)
    assert [f.code for f in trained.notes] == ["INTERRUPTED"] and len(trained.looks) == 1


def two_modes(x: Tensor) -> Tensor:
    """Weights 1:2 at x_0 = -6 and 6, unit variance."""
    far = torch.tensor([6.0, 0.0], dtype=x.dtype)
    parts = [math.log(w) - 0.5 * (x - c).square().sum(-1) for w, c in ((1 / 3, -far), (2 / 3, far))]
    return torch.logaddexp(*parts) - math.log(2 * math.pi)


def test_annealing_keeps_both_modes_where_plain_training_drops_one() -> None:
    target = bz.from_log_prob(two_modes, dim=2)
    flow = make_flow("realnvp", 2, rng(), base=Normal(2))
    found = {}
    for anneal in (0.0, 0.9):
        trained = train(flow, target, run(), Training(steps=400, rounds=1, batch=256, anneal=anneal))
        found[anneal] = float((trained.flow.sample(rng(), 4_000)[:, 0] < 0).double().mean())
    assert min(found[0.0], 1 - found[0.0]) < 0.02 and 0.15 < found[0.9] < 0.6


def test_weighted_draws_teach_the_forward_kl() -> None:
    """Draws of a wider Gaussian, weighted: no evaluation in the round, and the flow is the target."""
    x = 1.0 + 1.3 * rng().normal(20_000, 3) @ torch.linalg.cholesky(COVARIANCE).T
    log_q = -0.5 * (((x - 1) @ PRECISION) * (x - 1)).sum(-1) / 1.69 - NORM - 3 * math.log(1.3)
    data = bz.Draws.from_arrays(x, gaussian_log_prob(x), gaussian_log_prob(x) - log_q)
    there = run()
    trained = train(make_flow("realnvp", 3, rng()), gaussian(), there, QUICK, data=data)
    assert there.ledger.phases["training"] == (QUICK.look, 0) and trained.looks[-1].ess > 0.9


# ---- the default ----


def searched(target: bz.Target) -> Run:
    return run(wide_source(target, Backend(), Stream(0), gradient=True))


def test_the_default_is_chosen_by_counted_pilots() -> None:
    target = Counted(gaussian())
    there = searched(gaussian())
    quick = Training(steps=30, rounds=1, batch=64, look=512)
    chosen = choose(target, there, pilot=quick)
    assert [p.name.split(",")[0] for p in chosen.pilots] == ["realnvp"] * 3 + ["affine-iaf"]
    assert there.ledger.phases["pilot"] == (target.log_prob_rows, target.grad_rows)
    assert max(p.look.ess for p in chosen.pilots) > 0.95 and "not whitened" not in chosen.name


def test_laplace_does_not_win_on_the_funnel() -> None:
    target = problem("funnel-sd3").target
    chosen = choose(target, searched(target), pilot=Training(steps=60, rounds=1, batch=128, look=512))
    assert "Laplace" not in chosen.name


def test_laplace_is_exact_on_a_gaussian() -> None:
    """To the 1e-6 nats to which the optimum is climbed: sqrt(2e-6) standard deviations."""
    hill = laplace_map(gaussian(), searched(gaussian()))
    assert hill is not None and ((hill.m - 1).abs() / COVARIANCE.diagonal().sqrt()).max() < math.sqrt(2e-6)
    assert (hill.L @ hill.L.T - COVARIANCE).abs().max() < 1e-6


def test_settings_that_make_no_sense_are_refused() -> None:
    for bad in ({"steps": 0}, {"batch": 1.5}, {"lr": 0.0}, {"anneal": 2.0}, {"share": 0.0}):
        with pytest.raises(ValueError, match="wanted"):
            Training(**bad)  # type: ignore[arg-type]
