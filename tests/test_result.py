"""Result: questions in the user's space, the verdict, and the screen that shows them (fault 58: golden text)."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from boltzsample.draws import Draws
from boltzsample.errors import BatchCrosstalkError, DtypeError, ShapeError
from boltzsample.estimates.diagnostics import doubtful_tails
from boltzsample.flags import Status, flag
from boltzsample.report import summary_dict
from boltzsample.results import Result, result
from boltzsample.screen import plus_minus, render


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class LogNormal:
    """x ~ N(0, 1) in the sampler's space; the user thinks in exp(x)."""

    dim = 3

    def log_prob(self, x: Tensor) -> Tensor:
        return -0.5 * x.square().sum(-1)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return -x

    def readout(self, x: Tensor) -> Tensor:
        return x.exp()


class Named(LogNormal):
    def readout(self, x: Tensor) -> Any:
        return {"scale": x[..., 0].exp(), "w": x[..., 1:, None]}


def run(units: int = 64, draws: int = 32, dim: int = 3, seed: int = 0, **kw: Any) -> Draws:
    x = normal(units, draws, dim, seed=seed)
    return Draws(x, -0.5 * x.square().sum(-1), witnesses=("optimum audit: one optimum",), **kw)


# ---- questions ----


def test_expectation_of_coordinates_and_of_functions() -> None:
    r = Result(run())
    x = r.draws.x
    assert torch.allclose(r.expectation().value, x.mean((0, 1)))
    for f in (lambda x: x[..., 0] ** 2, lambda x: x[:, 0] ** 2):  # a flat batch: both ways of indexing mean the same
        assert torch.allclose(r.expectation(f).value, x[..., 0].square().mean())
    assert r.expectation(lambda x: torch.stack([x, x**2], -1)).value.shape == (3, 2)
    assert r.sd().value.shape == (3,) and torch.allclose(r.sd().value, x.flatten(0, 1).std(0), rtol=1e-3)
    assert r.covariance().value.shape == (3, 3)
    assert r.covariance(lambda x: x[:, :2]).value.shape == (2, 2)
    assert r.probability(lambda x: x[..., 0] > 1).value == (x[..., 0] > 1).double().mean()
    assert r.quantile(lambda x: x[..., 0], 0.9).value == pytest.approx(1.2816, abs=0.15)


def test_questions_are_asked_in_the_users_space() -> None:
    r = Result(run(256, 64), LogNormal())
    est = r.expectation(lambda x: x[..., 0])
    assert abs(float(est) - math.exp(0.5)) < 4.5 * float(est.stderr)  # the mean of exp(N(0, 1)); of N(0, 1) it would be 0
    assert r.labels == ("x[0]", "x[1]", "x[2]")


def test_a_dict_readout_hands_f_the_dict() -> None:
    r = Result(run(starts=normal(64, 3, seed=1)), Named())
    x = r.draws.x
    assert r.labels == ("scale", "w[0, 0]", "w[1, 0]")
    assert torch.allclose(r.expectation(lambda d: d["scale"]).value, x[..., 0].exp().mean())
    assert torch.allclose(r.expectation().value, torch.stack([x[..., 0].exp().mean(), x[..., 1].mean(), x[..., 2].mean()]))
    starts = r.start_values
    assert isinstance(starts, dict) and starts["w"].shape == (64, 2, 1)


def test_f_at_the_starts_reaches_the_tests_of_memory() -> None:
    memory = normal(64, 1, 1, seed=3)
    d = run(units=64, dim=1)
    d = replace(d, x=d.x + memory, starts=3 * memory[:, 0])
    assert "START_MEMORY" in {f.code for f in Result(d).flags}
    assert "START_MEMORY" not in {f.code for f in Result(replace(d, x=d.x - memory)).flags}


@pytest.mark.parametrize(
    ("f", "error", "says"),
    [
        (lambda x: x.sum(), ShapeError, r"shape \(\) for 3 points; wanted \(3,\) or \(3, k\)"),
        (lambda x: x.sum(0)[:2], ShapeError, r"shape \(2,\) for 3 points"),
        (lambda x: 1.0, ShapeError, r"shape \(\)"),
        (lambda x: x - x.mean(0), BatchCrosstalkError, r"one point at a time; replace sums and means"),
        (lambda x: x[:, 0] / x[:, 0].abs().max(), BatchCrosstalkError, "three points alone"),
        (lambda x: x.sum(0), ShapeError, r"shape \(3,\) for 2048 points"),  # dim = 3 passes for three points
        (lambda x: torch.complex(x, x), DtypeError, "real numbers"),
    ],
)
def test_wrong_functions_are_refused(f: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Result(run()).expectation(f)


def test_events_are_booleans_and_p_is_inside() -> None:
    r = Result(run())
    with pytest.raises(DtypeError, match="wanted booleans"):
        r.probability(lambda x: x[..., 0])
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        r.quantile(p=1.0)
    assert r.probability(lambda x: (x[..., 0] > 0).float()).value == r.probability(lambda x: x[..., 0] > 0).value


def test_f_may_be_scaled_and_may_raise() -> None:
    r = Result(run())
    assert torch.allclose(r.expectation(lambda x: 1e-9 * x).value * 1e9, r.expectation().value)
    with pytest.raises(BatchCrosstalkError):  # found at any scale
        r.expectation(lambda x: 1e-9 * (x - x.mean(0)))
    with pytest.raises(ZeroDivisionError):
        r.expectation(lambda x: 1 / 0)  # type: ignore[arg-type,return-value]


def test_f_cannot_change_the_draws() -> None:
    r = Result(run(starts=normal(64, 3)))
    before = r.draws.x.clone()
    r.expectation(lambda x: x.mul_(2))
    assert torch.equal(r.draws.x, before)
    with pytest.raises(dataclasses.FrozenInstanceError):
        r.draws = run()  # type: ignore[misc]


def test_non_finite_f_is_untrusted_not_an_error() -> None:
    est = Result(run()).expectation(lambda x: x[..., 0].log())
    assert est.status is Status.UNTRUSTED and "NONFINITE_F" in {f.code for f in est.flags}


def test_names() -> None:
    assert Result(run(), names=("a", "b", "c")).labels == ("a", "b", "c")
    with pytest.raises(ShapeError, match="2 names for 3 coordinates"):
        _ = Result(run(), names=("a", "b")).labels


# ---- the verdict ----


def test_status_is_the_worst_of_run_and_coordinates() -> None:
    assert Result(run()).status is Status.OK
    assert Result(run(flags=(flag("OOM_SPLIT"),))).status is Status.OK
    assert Result(run(flags=(flag("STOPPED_EARLY"),))).status is Status.CAUTION
    assert Result(run(flags=(flag("STOPPED_EARLY"), flag("INTERRUPTED")))).flags[0].code == "INTERRUPTED"  # the worst first
    heavy = run()
    heavy.x[..., 1] = torch.distributions.StudentT(torch.tensor(1.0)).sample(heavy.x.shape[:2]).double()
    assert Result(heavy).status is Status.UNTRUSTED


def test_log_z_counts_only_where_it_is_promised() -> None:
    est = Result(run()).log_z()
    assert math.isnan(est.value) and est.status is Status.UNTRUSTED and "NO_LOG_Z" in {f.code for f in est.flags}
    assert Result(run(), config={"log_z": False}).status is Status.OK
    assert Result(run(), config={"log_z": True}).status is Status.UNTRUSTED


def test_flags_are_not_repeated() -> None:
    r = Result(run(flags=(flag("STOPPED_EARLY"),)))
    assert [f.code for f in r.flags] == ["STOPPED_EARLY"]


def test_replicates_answer_together() -> None:
    parts = tuple(Result(run(seed=s)) for s in range(6))
    whole = replace(parts[0].draws, x=torch.cat([p.draws.x for p in parts]), log_prob=torch.cat([p.draws.log_prob for p in parts]))
    r = Result(whole, replicates=parts)
    est = r.expectation(lambda x: x[..., 0])
    values = torch.stack([p.expectation(lambda x: x[..., 0]).value for p in parts])
    assert torch.allclose(est.value, values.mean()) and torch.allclose(est.stderr, values.std() / math.sqrt(6))
    assert r.covariance().value.shape == (3, 3) and r.sd().value.shape == (3,)
    failed = (*parts[:5], Result(replace(parts[5].draws, flags=(flag("INTERRUPTED"),))))
    assert Result(whole, replicates=failed).status is Status.UNTRUSTED
    assert [f.code for f in Result(whole, replicates=failed).flags].count("INTERRUPTED") == 1
    assert "6 replicates" in r.summary()


def test_draws_made_elsewhere() -> None:
    x = normal(64, 32, 3)
    r = result(Draws.from_arrays(x))
    assert r.status is Status.CAUTION and [f.code for f in r.flags] == ["SINGLE_WITNESS"]
    with_target = result(Draws.from_arrays(x), LogNormal())
    assert torch.equal(with_target.draws.log_prob, -0.5 * x.square().sum(-1))
    assert torch.allclose(with_target.expectation().value, x.exp().mean((0, 1)))
    with pytest.raises(ShapeError, match="the draws have 2 coordinates and the target 3"):
        result(Draws.from_arrays(x[..., :2]), LogNormal())
    assert not result(replace(Draws.from_arrays(x), witnesses=("an exact sampler",))).flags


def test_bz_result_is_the_function() -> None:
    import boltzsample as bz

    _ = bz.sample  # imports boltzsample.results on its way
    assert bz.result(Draws.from_arrays(normal(64, 32, 3))).status is Status.CAUTION


def test_what_the_run_cost() -> None:
    r = Result(run(ledger={"starts": (10, 20), "sampling": (0, 300)}, seconds={"starts": 0.5, "sampling": 1.0}))
    assert r.evaluations == 330 and r.seconds == 1.5 and r.ledger["starts"] == (10, 20)
    assert repr(r).startswith("Result(status: ok, draws made elsewhere: 2,048 draws of 3 coordinates in 64 chains, 330 evaluations")


def test_questions_under_inference_mode_and_with_gradients() -> None:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def f(x: torch.Tensor) -> torch.Tensor:
        return x @ weight

    est = Result(run()).expectation(f)
    assert not est.value.requires_grad
    with torch.inference_mode():
        assert torch.equal(Result(run()).expectation(f).value, est.value)


# ---- the screen ----

GOLDEN_DICT: dict[str, Any] = {
    "status": "untrusted",
    "flags": [
        {
            "code": "DRIFT", "severity": "untrusted", "meaning": "the halves differ", "detail": "", "value": 21.9, "threshold": 3.33,
            "coordinates": ["a", "b", "c", "d", "e"], "remedy": "increase warmup or n",
        },
        {
            "code": "SINGLE_WITNESS", "severity": "caution", "meaning": "nobody looked", "detail": "witness=False", "value": None,
            "threshold": None, "coordinates": None, "remedy": "leave witness=True",
        },
        *[
            {
                "code": c, "severity": "caution", "meaning": "m", "detail": "", "value": None, "threshold": None, "coordinates": None,
                "remedy": "r",
            }
            for c in ("A", "B", "B")
        ],
        {
            "code": "NOTE", "severity": "info", "meaning": "mcmc was used", "detail": "", "value": None, "threshold": None,
            "coordinates": None, "remedy": "name a method",
        },
    ],
    "method": "mcmc",
    "chains": 256,
    "draws_per_chain": 16,
    "replicates": 0,
    "scope": "given this kernel",
    "error_bars": "between 256 chains",
    "weighted": False,
    "independent": False,
    "coordinates": [
        {
            "name": "a", "status": "ok", "codes": [], "mean": 0.01234, "low": -0.01966, "high": 0.04434, "sd": 1.0031, "ess": 3810.4,
            "rhat": None, "nested_rhat": 1.0031,
        },
        {
            "name": "b", "status": "untrusted", "codes": ["DRIFT"], "mean": 2.5e-9, "low": 2.3e-9, "high": 2.7e-9, "sd": 3e-9, "ess": 990.0,
            "rhat": None, "nested_rhat": 1.2,
        },
        {
            "name": "c", "status": "untrusted", "codes": ["NONFINITE_F"], "mean": None, "low": None, "high": None, "sd": None, "ess": None,
            "rhat": None, "nested_rhat": None,
        },
    ],
    "rhat_note": "not applicable: 16 draws per chain, 256 chains",
    "acceptance": 0.8123,
    "log_z": {"value": None, "stderr": None, "text": "nan", "status": "untrusted", "not_estimated": "use smc"},
    "evaluations": {"total": 123456, "phases": {"starts": [1000, 2456], "sampling": [0, 120000]}},
    "seconds": 2.13,
    "witnesses": ["optimum audit: 1 optimum from 256 wide starts, none missed"],
    "checks": {"passed": ["stuck chains", "heavy tails"], "found": ["drift"], "not_checked": {"R-hat": "16 draws per chain"}},
}  # fmt: skip

GOLDEN_TEXT = """\
status: untrusted
  untrusted: DRIFT: the halves differ (at a, b, c, d and 1 more; 21.9, threshold 3.33); increase warmup or n
  caution: SINGLE_WITNESS: nobody looked (witness=False); leave witness=True
  caution: A: m; r
  and 2 more in result.flags: B

mcmc: 4,096 draws (256 chains x 16); error bars between 256 chains, given this kernel

                   mean +- error (95%)         sd      ESS
a                       0.012 +- 0.032      1.003    3,810
b                  2.50e-09 +- 2.0e-10      3e-09      990  untrusted: DRIFT
c                         not a number          -        -  untrusted: NONFINITE_F
R-hat not applicable: 16 draws per chain, 256 chains

nested R-hat 1.200 at worst; acceptance 0.81
log Z: not estimated by this method; use smc
evaluations: 123,456, 122,456 of them with gradient (starts 3,456, sampling 120,000); 2.1 s
witness: optimum audit: 1 optimum from 256 wide starts, none missed
note: NOTE: mcmc was used; name a method
No problems detected by: stuck chains, heavy tails
Not checked: R-hat (16 draws per chain)"""


def test_golden_summary() -> None:
    assert render(GOLDEN_DICT) == GOLDEN_TEXT


def test_golden_log_z_is_not_its_error() -> None:
    s = GOLDEN_DICT | {"log_z": {"value": -12.3, "stderr": 0.1, "text": "-12.30 +- 0.20 (95%, ok)", "not_estimated": None}}
    assert "log Z: -12.30 +- 0.20 (95%, ok)" in render(s).splitlines()


def test_independent_weighted_draws_are_not_asked_what_only_chains_can_answer() -> None:
    n = 4_000
    r = Result(Draws.from_arrays(normal(n, 2), torch.zeros(n), torch.zeros(n)))
    text = r.summary()
    assert "4,000 draws (independent, weighted)" in text and "R-hat" not in text and "stuck chains" not in text
    assert "tails of the weights" in text.split("No problems detected by")[1]
    assert "tails of the weights" not in Result(run()).summary()


def test_the_summary_says_what_the_estimates_say() -> None:
    r = Result(run(200, 20, acceptance=0.7, group=torch.arange(200) // 10, starts=normal(200, 3, seed=5)), config={"method": "mcmc"})
    lines = r.summary().splitlines()
    assert lines[0] == "status: ok"
    est = r.expectation()
    half = float(est.interval[1, 1] - est.interval[0, 1]) / 2
    row = next(line for line in lines if line.startswith("x[1]"))
    assert f"{float(est.value[1]):.3f} +- {half:.3f}" in row and f"{float(est.ess[1]):,.0f}" in row
    assert f"{float(r.sd().value[1]):.4g}" in row
    assert any(line.startswith("R-hat not applicable: 20 draws per chain") for line in lines)
    checked = " ".join(lines[lines.index(next(line for line in lines if line.startswith("No problems"))) :])
    for name in ("nested R-hat", "drift between halves", "memory of the starts", "missing modes"):
        assert name in checked.split("Not checked")[0]
    assert "R-hat" in checked.split("Not checked")[1]


def test_checks_that_could_not_be_made_are_named() -> None:
    found = summary_dict(result(Draws.from_arrays(normal(400, 2))))["checks"]
    assert found["not_checked"].keys() >= {"R-hat", "nested R-hat", "drift between halves", "memory of the starts", "missing modes"}
    assert not set(found["passed"]) & found["not_checked"].keys()


def test_long_chains_show_rhat() -> None:
    assert "R-hat" in Result(run(8, 1000)).summary().split("x[0]")[0]


def test_many_coordinates_fit_one_screen_and_the_worst_are_shown() -> None:
    d = run(64, 32, dim=200)
    d.x[:, :, 123] += torch.linspace(0, 3, 32)
    text = Result(d).summary()
    assert len(text.splitlines()) < 45
    assert any(line.startswith("x[123]") and "untrusted: DRIFT" in line for line in text.splitlines())
    assert text.splitlines()[0] == "status: untrusted" and "at x[123]" in text
    for name in ("x[0]", "x[199]", "... "):
        assert f"\n{name}" in text


def test_the_summary_is_strict_json() -> None:
    for d in (run(), run(1, 1), run(2, 3), replace(run(), x=torch.ones(64, 32, 3).double())):
        s = json.loads(json.dumps(summary_dict(Result(d)), allow_nan=False))
        assert s["status"] in ("ok", "caution", "untrusted")
        assert render(s).splitlines()[0] == f"status: {s['status']}"
    assert Result(run(1, 1)).status is Status.UNTRUSTED


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (1.00312, 0.011, "1.003 +- 0.011"), (-123.456, 12.0, "-123 +- 12"), (5e8, 2e5, "5.0000e+08 +- 2.0e+05"),
        (0.0, 1e-12, "0.0e+00 +- 1.0e-12"), (1e5, 0.5, "100000.00 +- 0.50"), (3.0, 0.0, "3 +- unknown"),
        (math.pi, 1e-5, "3.141593 +- 0.000010"),
    ],
)  # fmt: skip
def test_plus_minus(value: float, half: float, text: str) -> None:
    assert plus_minus(value, value - half, value + half) == text


def test_a_tail_beside_a_heavy_one_has_to_be_seen_light():
    u = (torch.randperm(4000, generator=torch.Generator().manual_seed(0)).double() + 0.5).reshape(4000, 1) / 4000
    cauchy = (math.pi * (torch.rand(4000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5)).tan()
    x = torch.stack([torch.special.ndtri(u), u**-0.45, u**-0.3, cauchy], -1)  # k-hat 0, .45 (of finite variance, just so), .3 and 1
    heavy, light = result(Draws.from_arrays(x)), result(Draws.from_arrays(x[..., :3]))

    doubt = heavy.expectation(lambda x: x[..., 1])
    (found,) = (g for g in doubt.flags if g.code == "HEAVY_F")
    assert found.severity == "caution" and found.index is None and doubt.value.isfinite()
    assert found.value == pytest.approx(0.45, abs=0.02)
    assert heavy.means[1].status == "caution" and heavy.means[3].status == "untrusted"  # the coordinates themselves are asked, too
    for r, f in ((heavy, lambda x: x[..., 0]), (heavy, lambda x: x[..., 2]), (light, lambda x: x[..., 1])):
        assert "HEAVY_F" not in {g.code for g in r.expectation(f).flags}
    few = doubtful_tails(x[..., 2], heavy.draws, torch.tensor(200.0, dtype=torch.float64))
    assert [g.severity for g in few] == ["caution"]  # of 200 effective draws ten are in the tail, and .3 is within an error of .5
