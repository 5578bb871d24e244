"""bz.sample when things go wrong: budgets that end, Ctrl-C, a density that raises. Nothing drawn is lost, and no part is sold as whole."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import boltzsample as bz
from targets import problem
from tests.counted import Counted
from tests.small import SMALL, codes, normal, normal_log_prob, sample, severity

MALA = replace(SMALL, kernel=bz.MALA())
GIVEN = [[0.5, 0.5], [-0.5, 0.5]]


class At:
    """N(0, I) that acts at its k-th call."""

    def __init__(self, k: int, act: Callable[[], Any]) -> None:
        self.k, self.act, self.calls = k, act, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.k:
            self.act()
        return normal_log_prob(x)

    def target(self) -> bz.Target:
        return bz.from_log_prob(self, dim=2)


def calls(method: Any = MALA, **settings: Any) -> int:
    """How many calls the whole run makes."""
    fn = At(0, lambda: None)
    sample(fn.target(), method, starts=GIVEN, witness=False, **settings)
    return fn.calls


def run_at(k: int, act: Callable[[], Any], method: Any = MALA, **settings: Any) -> bz.Result:
    return sample(At(k, act).target(), method, **{"starts": GIVEN, "witness": False, **settings})


# ---- budgets ----

BUDGETS = {"gaussian-corr-d10": 60_000, "two-modes-near": 41_000, "cancer": 100_000, "banana": 40_000, "funnel-sd3": 45_000}
OVER = pytest.mark.xfail(
    reason="BUG: in 100 dimensions the search alone takes 31,000, and one step of each phase is made whatever it costs"
)


@pytest.mark.parametrize(("name", "budget"), [*BUDGETS.items(), pytest.param("gaussian-ill-d100", 40_000, marks=OVER)])
def test_a_budget_of_evaluations_is_not_exceeded(name: str, budget: int) -> None:
    counted = Counted(problem(name).target)
    result = bz.sample(counted, "mcmc", 40_000, seed=0, budget=budget)
    assert result.evaluations == counted.total <= budget
    assert "STOPPED_EARLY" in codes(result) and result.status != "ok"
    assert result.config["budget"] == {"evaluations": budget, "seconds": None}


def test_a_budget_that_suffices_changes_nothing() -> None:
    free, bounded = sample(normal()), sample(normal(), budget=10**6)
    assert torch.equal(free.draws.x, bounded.draws.x) and "STOPPED_EARLY" not in codes(bounded)
    assert bounded.evaluations < 10**6


def test_what_a_budget_leaves_undrawn_is_said() -> None:
    result = sample(normal(), MALA, n=64_000, starts=GIVEN, witness=False, budget=20_000)
    flag = next(f for f in result.flags if f.code == "STOPPED_EARLY")
    assert flag.detail == f"{result.draws.x.shape[1]} of 2000 draws a chain" and flag.severity == "caution"
    assert result.evaluations <= 20_000 < result.evaluations + 64


@pytest.mark.parametrize("budget", [1000, 5_000, 20_000])
def test_a_budget_that_ends_before_stationarity_is_not_believed(budget: int) -> None:
    """Chains that start 40 sd away and are stopped after a step or two of warm-up."""
    result = bz.sample(normal(), "mcmc", 4_000, seed=0, budget=budget, starts=[30.0, 30.0])
    wrong = bool((result.means.value / result.means.stderr).abs().max() > 6)
    assert not wrong or result.status == "untrusted"


@pytest.mark.parametrize("budget", [5_000, 20_000])
def test_a_small_budget_with_starts_is_not_exceeded(budget: int) -> None:
    assert bz.sample(normal(), "mcmc", 4_000, seed=0, budget=budget, starts=[0.0, 0.0]).evaluations <= budget


def test_the_reserve_keeps_the_witness_paid() -> None:
    counted = Counted(normal())
    result = sample(counted, n=10**6, budget=100_000, compile=False)
    assert counted.total <= 100_000 and "witness" in result.ledger and not codes(result) & {"SINGLE_WITNESS"}


def _slow(seconds: float) -> bz.Target:
    def log_prob(x: Tensor) -> Tensor:
        time.sleep(seconds)
        return normal_log_prob(x)

    return bz.from_log_prob(log_prob, dim=2)


def test_a_budget_of_seconds() -> None:
    began = time.monotonic()
    result = sample(_slow(0.002), MALA, n=10**6, starts=GIVEN, witness=False, compile=False, budget=bz.Budget(seconds=0.8))
    assert time.monotonic() - began < 2.5  # 0.8 and a machine under load
    assert severity(result, "STOPPED_EARLY") == "caution" and 16 <= result.draws.x.shape[1] < 1000


@pytest.mark.xfail(reason="BUG: the clock of budget seconds starts after the search for starts, which never looks at it")
def test_a_budget_of_seconds_counts_the_search() -> None:
    began = time.monotonic()
    sample(_slow(0.01), MALA, budget=bz.Budget(seconds=0.3))
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize("thin", [1, 3])
def test_stopped_before_the_first_draw(thin: int) -> None:
    result = sample(normal(), replace(MALA, thin=thin), starts=GIVEN, witness=False, budget=200)
    assert {"STOPPED_EARLY"} <= codes(result) and result.status != "ok"


def test_positive_infinity_is_an_error_in_a_run_cut_short() -> None:
    spike = bz.from_log_prob(lambda x: torch.where(x.norm(dim=-1) > 2.5, torch.inf, normal_log_prob(x)), dim=2)
    walker = bz.MCMC(kernel=bz.RandomWalk(h=torch.tensor(1.0)), chains=32, warmup=0)
    with pytest.raises(bz.errors.PositiveInfinityError):
        sample(spike, walker, n=32 * 200, starts=GIVEN, witness=False, fit=False, budget=3_000)


# ---- Ctrl-C ----


def _ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("back", [2, 10, 18])
def test_ctrl_c_while_sampling_returns_what_is_there(back: int, capfd: pytest.CaptureFixture[str]) -> None:
    whole = run_at(0, lambda: None)
    handler = signal.getsignal(signal.SIGINT)
    part = run_at(calls() - back, _ctrl_c)
    kept = part.draws.x.shape[1]
    assert kept == 20 - back and torch.equal(part.draws.x, whole.draws.x[:, :kept])
    assert part.status == "untrusted" and f"{kept} of 20 draws a chain" in {f.detail for f in part.flags if f.code == "INTERRUPTED"}
    assert signal.getsignal(signal.SIGINT) is handler and "stopping after this step" in capfd.readouterr().err
    assert "INTERRUPTED" not in codes(whole)


@pytest.mark.parametrize("back", [30, 50])
def test_ctrl_c_in_the_warm_up(back: int) -> None:
    part = run_at(calls() - back, _ctrl_c)
    assert part.status == "untrusted" and part.draws.x.shape == (32, 1, 2)
    details = {f.detail for f in part.flags if f.code == "INTERRUPTED"}
    assert any("warm-up steps" in d for d in details) and any("draws a chain" in d for d in details)
    assert part.summary().startswith("status: untrusted")


def test_ctrl_c_in_the_search_for_starts() -> None:
    part = run_at(60, _ctrl_c, starts=None, witness=True)
    assert part.status == "untrusted" and "INTERRUPTED" in codes(part) and part.draws.x.shape[1] == 1


def test_ctrl_c_with_replicates_and_thinning() -> None:
    part = run_at(calls(replicates=2) - 10, _ctrl_c, replicates=2)
    assert part.status == "untrusted" and all("INTERRUPTED" in codes(r) for r in part.replicates)
    thinned = replace(MALA, thin=2)
    assert run_at(calls(thinned) - 10, _ctrl_c, thinned).draws.x.shape[1] == 15


def test_ctrl_c_in_the_warm_up_with_thinning() -> None:
    thinned = replace(MALA, thin=2)
    assert "INTERRUPTED" in codes(run_at(calls(thinned) - 50, _ctrl_c, thinned))


def test_ctrl_c_in_the_audit_keeps_the_draws() -> None:
    whole = At(0, lambda: None)
    sample(whole.target(), MALA, starts=GIVEN)
    fn = At(whole.calls - 2, _ctrl_c)
    result = sample(fn.target(), MALA, starts=GIVEN)
    assert fn.calls == whole.calls and result.draws.x.shape == (32, 20, 2)


def test_sigterm_is_a_ctrl_c() -> None:
    assert "INTERRUPTED" in codes(run_at(calls() - 10, lambda: os.kill(os.getpid(), signal.SIGTERM)))


def test_a_second_ctrl_c_stops_at_once() -> None:
    def twice() -> None:
        _ctrl_c()
        _ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        run_at(calls() - 10, twice)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- a density that raises ----


class Mine(Exception):
    """An error of the user's own."""


def _raise() -> None:
    raise Mine("at a point that matters")


@pytest.mark.parametrize("back", [0, 10, 18])
def test_an_error_while_sampling_carries_what_was_drawn(back: int) -> None:
    whole = run_at(0, lambda: None)
    with pytest.raises(Mine, match="at a point that matters") as caught:
        run_at(calls() - back, _raise)
    partial = caught.value.partial  # type: ignore[attr-defined]
    kept = 19 - back
    assert partial.x.shape == (32, kept, 2) and torch.equal(partial.x, whole.draws.x[:, :kept])
    assert any(f"stopped after {kept} of 20 draws a chain" in note for note in caught.value.__notes__)
    assert caught.traceback[-1].name == "_raise"
    assert bool(bz.result(partial).means.value.isfinite().all())


def test_an_error_in_the_first_step_of_sampling_is_the_users() -> None:
    with pytest.raises(Mine) as caught:
        run_at(calls() - 19, _raise)
    assert caught.value.partial.x.shape == (32, 0, 2)  # type: ignore[attr-defined]


@pytest.mark.parametrize("back", [25, 50])
def test_an_error_in_the_warm_up_is_the_users(back: int) -> None:
    with pytest.raises(Mine):
        run_at(calls() - back, _raise)


@pytest.mark.parametrize("k", [1, 3, 7, 20, 60, 100])
def test_an_error_before_any_sampling_is_the_users(k: int) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises((Mine, bz.errors.ShapeError)) as caught:
        run_at(k, _raise, starts=None)
    assert isinstance(caught.value, Mine) or isinstance(caught.value.__cause__, Mine)
    assert signal.getsignal(signal.SIGINT) is handler and torch.is_grad_enabled()


def test_rejected_points_are_not_errors() -> None:
    """Fault 14: RejectPoint counts as -inf; a normal cut at |x_0| < 1."""

    def log_prob(x: Tensor) -> Tensor:
        if bool((x[:, 0].abs() > 1).any()):
            raise bz.RejectPoint
        return normal_log_prob(x)

    result = sample(bz.from_log_prob(log_prob, dim=2), bz.MCMC(kernel=bz.RandomWalk(), chains=8, warmup=10), n=128, starts=[0.0, 0.0])
    assert float(result.draws.x[..., 0].abs().max()) <= 1 and "NAN_EVAL" not in codes(result)


def test_an_interrupt_in_the_witness_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    run = importlib.import_module("boltzsample.run")
    witnesses = run._witnesses

    def stopped(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return witnesses(*args)

    monkeypatch.setattr(run, "_witnesses", stopped)
    result = sample(normal())
    assert "INTERRUPTED" in {flag.code for flag in result.flags} and result.status == "caution" and len(result.draws.x.flatten(0, 1)) == 640
