"""What every method of the registry keeps, with its defaults on a small budget (diffusion mostly by QUICK). A line in METHODS puts a new
one under these tests."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import constraints

import boltzsample as bz
from boltzsample import errors
from boltzsample.registry import METHODS, name_of
from boltzsample.scores.training import ScoreTraining
from tests.counted import Counted
from tests.small import codes, no_gradient

BUDGET = 160_000
M = torch.tensor([1.0, -3.0, 0.0], dtype=torch.float64)
S = torch.tensor([2.0, 0.1, 1.0], dtype=torch.float64)
LOG_Z = float(S.log().sum()) + 1.5 * math.log(2 * math.pi)
QUICK = {"diffusion": bz.Diffusion(steps=16, training=ScoreTraining(steps=150, rounds=2))}  # its defaults are asked on a support alone
ALL = pytest.mark.parametrize("name", METHODS)


def target() -> bz.Target:
    """N(M, diag S^2)."""
    return bz.from_log_prob(lambda x: -0.5 * ((x - M.to(x)) / S.to(x)).square().sum(-1), dim=3, names=("a", "b", "c"))


@ALL
def test_right_counted_and_repeatable(name: str) -> None:
    """|z| < 4.5 for six numbers a method, and log Z where it is promised: false failure 5e-5 each."""
    counted, method = Counted(target()), QUICK.get(name, name)
    r = bz.sample(counted, method, n=800, seed=0, budget=BUDGET)
    again = bz.sample(target(), method, n=800, seed=0, budget=BUDGET)
    assert torch.equal(r.draws.x, again.draws.x)
    assert r.evaluations == counted.total <= BUDGET
    for e, truth in ((r.expectation(), M), (r.expectation(lambda x: (x - M) ** 2), S**2)):
        assert ((e.value - truth) / e.stderr).abs().max() < 4.5
    assert r.config["method"] == name == name_of(r.sampler) and r.labels[0] == "x[0]"
    assert r.draws.x.shape[:2].numel() >= 800
    torch.testing.assert_close(r.draws.log_prob, target().log_prob(r.draws.x), rtol=1e-9, atol=1e-9)  # of x, not of some z
    log_z = r.log_z()
    if METHODS[name].log_z:
        assert abs(float(log_z.value) - LOG_Z) < 4.5 * float(log_z.stderr) < 0.5
    else:
        assert "NO_LOG_Z" in codes(log_z) and log_z.status == "untrusted"


@ALL
def test_on_a_support(name: str) -> None:
    gamma = bz.from_log_prob(lambda x: (2 * x.log() - x).sum(-1), dim=2, support=constraints.positive)
    r = bz.sample(gamma, name, n=800, seed=0, budget=BUDGET)
    values, e = r.values, r.expectation()
    assert isinstance(values, torch.Tensor) and bool((values > 0).all())
    assert ((e.value - 3) / e.stderr).abs().max() < 4.5


@ALL
def test_without_a_gradient(name: str) -> None:
    if METHODS[name].needs_gradient:
        with pytest.raises(errors.NoGradient, match="gradient"):
            bz.sample(no_gradient(), name, n=200, seed=0)
    else:
        assert bz.sample(no_gradient(), name, n=200, seed=0).status != "ok"


@ALL
def test_float32_and_replicates(name: str) -> None:
    method = QUICK.get(name, name)
    r = bz.sample(target(), method, n=300, seed=0, budget=2 * BUDGET, dtype=torch.float32, replicates=2, witness=False)
    assert r.draws.x.dtype == torch.float32 and len(r.replicates) == 2
    first, second = (part.draws.x for part in r.replicates)
    assert not torch.equal(first, second) and r.draws.scope == "end to end"
    e = r.expectation()
    assert bool(e.stderr.isfinite().all()) and ((e.value - M) / S).abs().max() < 1
