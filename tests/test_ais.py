"""ais: path weights without bias in both directions, paths as units, and log Z between two sides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import boltzsample as bz
from boltzsample.errors import ShapeError
from boltzsample.estimates.evidence import bracket, log_z
from boltzsample.samplers.ais import AIS, reverse_ais
from targets import problem
from tests.counted import Counted
from tests.small import codes, severity

D = 3
S = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
LOG_Z = 1.5 + float(S.log().sum()) + 0.5 * D * math.log(2 * math.pi)


def log_prob(x: Tensor) -> Tensor:
    return 1.5 - 0.5 * (x / S.to(x)).square().sum(-1)


TARGET = bz.from_log_prob(log_prob, dim=D)
ROUGH = AIS(cess=0.9)  # few levels: weights that vary, moves that matter


def run(target: Any = TARGET, method: Any = ROUGH, n: int = 2000, **settings: Any) -> bz.Result:
    return bz.sample(target, method, n, **{"seed": 0, "witness": False, **settings})


def exact(n: int, seed: int = 0) -> Tensor:
    return S * torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_forward_is_unbiased_and_its_bar_holds() -> None:
    """20,000 paths: |z| < 4.5 for log Z and three second moments (false failure 7e-6 each); the bar is small enough to see 2%."""
    r = run(n=20_000)
    assert abs(float(r.log_z().value) - LOG_Z) < 4.5 * float(r.log_z().stderr) < 0.09
    e = r.expectation(lambda x: x**2)
    assert ((e.value - S**2) / e.stderr).abs().max() < 4.5
    torch.testing.assert_close(r.draws.log_prob[:, 0], log_prob(r.draws.x[:, 0]))


def test_reverse_is_unbiased() -> None:
    """20,000 paths from exact draws: log mean 1/w is -log Z within 4.5 errors, of .02 at most. 1/w needs the finer ladder."""
    fitted = run(method=AIS()).sampler
    counted = Counted(TARGET)
    down = reverse_ais(counted, fitted, exact(20_000), seed=1)
    e = log_z(down)
    assert abs(float(e.value) + LOG_Z) < 4.5 * float(e.stderr) < 0.09
    assert counted.grad_rows == sum(b for _, b in down.ledger.values()) and down.scope == "conditional on the draws"
    assert float(down.log_weight.std()) > 0.1  # type: ignore[union-attr]


def test_reverse_is_as_good_as_its_draws() -> None:
    """Two far modes of .7 and .3. From exact draws the two sides meet. From draws of the first mode alone E 1/w is f / .7, f the share of
    forward paths that end there: then the "upper" side is log .7 / f, whatever log Z is. |z| < 4.5.
    """
    p = problem("two-modes-far")
    assert p.exact_sampler is not None
    x = p.exact_sampler(4000, torch.Generator().manual_seed(0))
    r = run(p.target, AIS(), 4000)
    first = torch.cdist(x, p.truth["mode_weights"].at.to(x)).argmin(-1) == 0  # type: ignore[union-attr]
    both, lame = (bracket(r.draws, reverse_ais(p.target, r.sampler, part, seed=1)) for part in (x, x[first]))
    assert both.lower < 0 < both.upper and both.upper - both.lower == pytest.approx(2 * math.log(20), abs=0.4)
    ended = torch.cdist(r.draws.x[:, 0], p.truth["mode_weights"].at.to(x)).argmin(-1) == 0  # type: ignore[union-attr]
    f = float(ended.double().mean())
    for b, truth in ((both, 0.0), (lame, math.log(0.7 / f))):
        joint = math.hypot(float(b.reverse.stderr), math.sqrt((1 - f) / f / len(ended)))
        assert abs(float(b.reverse.value) - truth) < 4.5 * joint < 0.3
        assert abs(float(b.forward.value)) < 4.5 * float(b.forward.stderr) < 0.3


def test_chains_stay_units() -> None:
    fitted = run().sampler
    down = reverse_ais(TARGET, fitted, exact(600).reshape(20, 30, D), seed=0)
    assert down.x.shape == (20, 30, D) and down.log_weight is not None and down.log_weight.shape == (20, 30)
    with pytest.raises(ShapeError, match="wanted"):
        reverse_ais(TARGET, fitted, torch.zeros(5, 4))
    with pytest.raises(ValueError, match="fitted on one replicate"):
        reverse_ais(TARGET, AIS(), exact(5))


@pytest.mark.parametrize("settings", [{}, {"replicates": 3}, {"budget": 120_000}])
def test_counted_and_shaped(settings: dict[str, Any]) -> None:
    counted = Counted(TARGET)
    r = run(counted, **settings)
    assert r.evaluations == counted.total <= settings.get("budget", math.inf)
    assert r.draws.x.shape[1:] == (1, D) and len(r.draws.x) % settings.get("replicates", 1) == 0


def test_ok_with_a_witness() -> None:
    r = run(method=AIS(), n=4000, witness=True)
    assert r.status == "ok" and abs(float(r.log_z()) - LOG_Z) < 4.5 * float(r.log_z().stderr) < 0.2


def test_the_funnel_is_never_ok() -> None:
    r = run(problem("funnel-sd3").target, AIS(), 4000, replicates=4)
    assert all(q.status == "untrusted" or abs(float(q.log_z().value)) < 4 * float(q.log_z().stderr) for q in r.replicates)


def test_a_broken_climb_has_no_number() -> None:
    r = run(problem("many-well-d32").target, AIS(), budget=60_000)
    assert severity(r, "STOPPED_EARLY") == "untrusted" and r.log_z().value.isnan() and "BAD_WEIGHTS" in codes(r)
