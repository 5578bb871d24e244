"""Objectives and training: every objective has the exact score as its minimum, and the mix the least variance."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import boltzsample as bz
from boltzsample.backend import Backend
from boltzsample.networks import Denoiser, Posterior
from boltzsample.progress import Interrupt, Progress
from boltzsample.samplers.sampler import Budget, Ledger, Run
from boltzsample.samplers.starts import Starts
from boltzsample.scores.objectives import Batch, Denoising, Implicit, Mixed, Objective, Sliced, Targeted, spread_loss, told
from boltzsample.scores.pool import Pool
from boltzsample.scores.training import ScoreTraining, teach
from boltzsample.streams import Stream
from tests.closed_denoiser import MixtureDenoiser, gaussian, skew

OBJECTIVES: list[Objective] = [Denoising(), Targeted(), Mixed(), Sliced(), Implicit()]
LOW, HIGH = 0.2, 5.0


def run(seed: int = 0, budget: Budget | None = None) -> Run:
    return Run(Backend(), Stream(seed), Starts(None), Ledger(), budget or Budget(), Progress(False), Interrupt())


def gradient(exact: MixtureDenoiser, x: Tensor) -> Tensor:
    y = x.clone().requires_grad_(True)
    with torch.enable_grad():
        return torch.autograd.grad(exact.log_prob(y).sum(), y)[0]


def pool(exact: MixtureDenoiser, n: int = 20_000, seed: int = 0) -> Pool:
    x = exact.sample(n, seed)
    return Pool(x, gradient(exact, x), None, None, torch.arange(n), LOW, HIGH)


def batch(exact: MixtureDenoiser, n: int, seed: int = 0) -> Batch:
    """In float64."""
    x, g = exact.sample(n, seed), torch.Generator().manual_seed(seed + 1)
    s = (math.log(LOW) + math.log(HIGH / LOW) * torch.rand(n, generator=g, dtype=torch.float64)).exp()
    v = torch.randint(0, 2, x.shape, generator=g).double() * 2 - 1
    return Batch(x, gradient(exact, x), s, torch.randn(x.shape, generator=g, dtype=torch.float64), v)


class Bent(nn.Module):
    """The exact denoiser, moved by e times a smooth field of (x, s)."""

    def __init__(self, exact: MixtureDenoiser, e: float, direction: int) -> None:
        super().__init__()
        self.exact, self.e, self.direction = exact, e, direction

    def forward(self, x: Tensor, s: Tensor) -> Posterior:
        D, S = self.exact(x, s)
        fields = (torch.tanh(x), torch.cos(x.flip(-1)), torch.ones_like(x), x / (1 + s[:, None].square()))
        s2 = s[:, None].square()
        return Posterior(D + self.e * s2 / (1 + s2) * fields[self.direction], S)


@pytest.mark.parametrize("direction", range(4))
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_the_exact_score_is_the_minimum(objective: Objective, direction: int) -> None:
    """Along any line through the exact denoiser the loss is a parabola with its minimum at 0: within 4.5 standard errors, and the
    curvature is that of the weighted square, the same for all objectives."""
    exact = skew()
    b = batch(exact, 40_000)
    ready = objective.prepared(b.x0[:2000], None if b.grad is None else b.grad[:2000], LOW, HIGH, Stream(0).rng())
    e = 0.3
    with torch.no_grad():
        up, none, down = (ready(Bent(exact, t, direction), b)[0] for t in (e, 0.0, -e))  # type: ignore[arg-type]
    slope, curvature = (up - down) / (2 * e), (up + down - 2 * none) / e**2
    assert abs(float(slope.mean())) < 4.5 * float(slope.std()) / math.sqrt(len(slope))
    moved = (Bent(exact, 1.0, direction)(b.x, b.s).mean - exact(b.x, b.s).mean).square().sum(-1) / b.s.square()
    wanted = float(moved.mean()) * (1 if isinstance(objective, Sliced | Implicit) else 2)
    assert float(curvature.mean()) == pytest.approx(wanted, rel=0.1) and float(slope.std()) / math.sqrt(len(slope)) < wanted


def test_a_wrong_target_moves_the_minimum() -> None:
    """Planted: the gradient term with s in place of s^2 is seen by the slope."""
    exact, e = skew(), 0.3
    b = batch(exact, 40_000)
    assert b.grad is not None
    wrong = b.x + b.s[:, None] * b.grad
    up, down = ((Bent(exact, t, 3)(b.x, b.s).mean - wrong).square().sum(-1) / b.s.square() for t in (e, -e))
    slope = (up - down) / (2 * e)
    assert abs(float(slope.mean())) > 10 * float(slope.std()) / math.sqrt(len(slope))


@pytest.mark.parametrize("exact", [gaussian(), skew()], ids=["gaussian", "mixture"])
def test_the_mix_has_no_more_variance_than_either_at_any_level(exact: MixtureDenoiser) -> None:
    """Var of the three targets about the exact denoiser, at 12 levels, on fresh draws: at most 3% above the smaller, which is sampling
    error of k; and at some level well below both."""
    x0 = exact.sample(20_000, seed=4)
    mix = Mixed().prepared(x0[:5000], gradient(exact, x0[:5000]), LOW, HIGH, Stream(0).rng())
    assert isinstance(mix, Mixed)
    best = []
    for s in torch.linspace(math.log(LOW), math.log(HIGH), 12).double().exp():
        b = Batch(x0, gradient(exact, x0), s.expand(len(x0)), Stream(1).rng().normal(*x0.shape), x0)
        k = mix.share(b.s)[:, None]
        D = exact(b.x, b.s).mean
        one, other, mixed = (float((t - D).square().sum(-1).mean()) for t in (x0, told(b), (1 - k) * x0 + k * told(b)))
        assert mixed <= 1.03 * min(one, other)
        best.append(mixed / min(one, other))
    assert min(best) < 0.8


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_training_converges_to_the_exact_score(objective: Objective) -> None:
    """The mean of |D - exact|^2 / s^2, the nats lost per unit of log s, falls below a twentieth of what it is untrained; the Gaussian's
    spread is learned as well."""
    exact = gaussian()
    settings = ScoreTraining(objective, steps=400, rounds=1, width=32, depth=2, waves=1, lr=5e-3)
    done = teach(pool(exact), pool(exact, 2000, seed=9), settings, run())
    b = batch(exact, 4000, seed=3)
    truth = exact(b.x, b.s)

    @torch.no_grad()
    def lost(net: Denoiser) -> float:
        return float(((net(b.x, b.s).mean - truth.mean).square().sum(-1) / b.s.square()).mean())

    untrained = lost(Denoiser(2, Stream(0).rng(torch.float32)))
    assert lost(done.net) < untrained / 20
    worst = (done.net(b.x, b.s).factor.diagonal(dim1=-2, dim2=-1) / truth.factor.diagonal(dim1=-2, dim2=-1)).log().abs().mean()
    assert worst < 0.1 and len(done.history) == 400 and len(done.looks) == 2


def test_the_spread_is_that_of_the_posterior() -> None:
    """Its likelihood is highest at the exact factor, full or diagonal, and leaves D alone."""
    b = batch(gaussian(), 20_000)
    for full in (True, False):
        exact = replace(gaussian(), full=full)
        seen = exact(b.x, b.s)
        losses = [float(spread_loss(Posterior(seen.mean, c * seen.factor), b.x0).mean()) for c in (0.8, 1.0, 1.25)]
        assert losses[1] < min(losses[0], losses[2])
    mean = seen.mean.clone().requires_grad_(True)
    factor = seen.factor.clone().requires_grad_(True)
    with torch.enable_grad():
        spread_loss(Posterior(mean, factor), b.x0).sum().backward()
    assert mean.grad is None and factor.grad is not None


def test_weighted_draws_teach_the_weighted_law() -> None:
    """Draws of N(0, I) with weights to N((1, 0), I)."""
    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings = ScoreTraining(Denoising(), steps=400, rounds=1, width=32, depth=2, waves=0, lr=5e-3)
    weighted = Pool(x, None, None, x[:, 0], torch.arange(len(x)), LOW, HIGH)
    done = teach(*weighted.split(Stream(0).rng()), settings, run())
    at, s = torch.tensor([[1.0, 0.0], [3.0, 1.0]]), torch.tensor([1.0, 1.0])
    wanted = (at + torch.tensor([1.0, 0.0])) / 2
    assert (done.net(at, s).mean - wanted).abs().max() < 0.1


def test_groups_are_held_out_whole() -> None:
    x = torch.arange(1000.0)[:, None]
    p = Pool(x, None, None, None, torch.arange(1000) % 50, LOW, HIGH)
    train, held = p.split(Stream(0).rng())
    assert len(held.z) == 100 and len(train.z) == 900 and not set(train.group.tolist()) & set(held.group.tolist())


def test_noise_is_stratified_and_batches_repeat() -> None:
    p = pool(gaussian(), 100)
    one, two = (p.batch(64, Stream(0).rng(torch.float32)) for _ in range(2))
    assert torch.equal(one.s, two.s) and torch.equal(one.x0, two.x0)
    cell = ((one.s / LOW).log() / math.log(HIGH / LOW) * 64).floor()
    assert torch.equal(cell, torch.arange(64.0))


class Content:
    """A guide that is content with anything."""

    def enough(self, net: Denoiser, r: int) -> tuple[bool, dict[str, float]]:
        return True, {"ess": 1.0}

    def renewed(self, net: Denoiser, r: int, found: dict[str, float]) -> None:
        return None


def test_training_stops_where_nothing_is_to_be_learned_or_the_budget_ends() -> None:
    normal = Pool(torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)), None, None, None, torch.arange(4000), LOW, HIGH)
    settings = ScoreTraining(Denoising(), steps=30, rounds=4)
    done = teach(*normal.split(Stream(0).rng()), settings, run())
    assert done.looks[-1].steps <= 120 and not done.notes  # of 1200
    asked = teach(*normal.split(Stream(0).rng()), settings, run(), Content())
    assert asked.looks[-1].steps == 0 and asked.looks[0].found == {"ess": 1.0}
    late = teach(*pool(skew(), 4000).split(Stream(0).rng()), settings, run(budget=Budget(seconds=1e-9)))
    assert [f.code for f in late.notes] == ["STOPPED_EARLY"]


def test_the_global_generator_is_left_alone_and_inputs_untouched() -> None:
    before, p = torch.get_rng_state(), pool(gaussian(), 500)
    kept = p.z.clone()
    teach(*p.split(Stream(0).rng()), ScoreTraining(steps=5, rounds=1), run())
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(p.z, kept)


def test_settings_are_checked() -> None:
    for wrong in ({"steps": 0}, {"batch": 1.5}, {"lr": 0.0}, {"share": 0.0}, {"width": True}):
        with pytest.raises(ValueError, match="wanted"):
            ScoreTraining(**wrong)  # type: ignore[arg-type]


def test_a_model_survives_the_disk(tmp_path: Path) -> None:
    target = bz.from_log_prob(lambda x: -0.5 * ((x - 1) / 2).square().sum(-1), dim=2)
    sampler = bz.Diffusion(steps=4, training=ScoreTraining(steps=5, rounds=1, width=8, depth=2))
    model = bz.sample(target, sampler, n=100, seed=0, budget=60_000, witness=False).sampler.models[0]
    again = type(model).load(model.save(tmp_path / "model.safetensors"))
    one, two = (m.reverse.draw(50, 2, Stream(1).rng()) for m in (model, again))
    assert torch.equal(one.x, two.x) and torch.equal(one.log_ratio, two.log_ratio)
    assert again.defense == model.defense == 0.1
    assert again.rule == model.rule and again.looks == model.looks and torch.equal(again.map.m, model.map.m)
    (tmp_path / "text").write_text("no model")
    with pytest.raises(ValueError, match="safetensors"):
        type(model).load(tmp_path / "text")
