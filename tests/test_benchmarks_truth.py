"""The rule by which truth cards are judged: how far two right derivations may lie apart, and that a wrong one does not pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from boltzsample.streams import Stream
from targets import PROBLEMS, Truth, make_truth, read_truth
from targets.long_runs import FALSE_FAILURES, compare, limit, moments


def test_a_right_card_fails_once_in_a_thousand() -> None:
    """Independent comparisons of 64 chain averages: the union bound is nearly sharp. 2e5 cards: 1e-3 to within 4.5 errors of 7e-5."""
    rng, numbers, df, cards = np.random.default_rng(3), 20, 63, 200_000
    worst = np.max([np.abs(stats.t.rvs(df, size=cards, random_state=rng)) for _ in range(numbers)], axis=0)
    share = float((worst > limit(numbers, df)).mean())
    assert abs(share - FALSE_FAILURES) < 4.5 * (FALSE_FAILURES / cards) ** 0.5


def test_more_comparisons_and_fewer_chains_widen_it() -> None:
    assert limit(1, 1e9) == pytest.approx(stats.norm.isf(5e-4), abs=1e-4)
    assert limit(1, 63) < limit(106, 63) < limit(106, 31) and limit(106, 511) < limit(106, 63)


def two_samplers(shift: float) -> dict[str, Any]:
    g = Stream(4).rng().generator
    a, b = (torch.randn(64, 1_000, 30, generator=g, dtype=torch.float64) for _ in range(2))
    b[..., 7] += shift
    log_z = {"one": (0.0, 0.01), "two": (0.01, 0.01)}
    return compare(moments(a, 2.0), moments(b, 2.0), log_z, {"A": a, "B": b})


def test_two_samplers_that_differ_do_not_pass() -> None:
    """A mean that is off by .05 sd: 9 joint errors of .0056."""
    right, wrong = two_samplers(0.0), two_samplers(0.05)
    assert right["passed"] and right["comparisons"] == 92 and right["limits of |z|"]["moments"] == pytest.approx(4.78, abs=0.01)
    assert not wrong["passed"]


def moved(truth: Truth, by: float) -> Truth:
    q = truth["mean"]
    return replace(truth, quantities=dict(truth.quantities) | {"mean": replace(q, value=q.value + by * q.stderr)})


def test_a_stochastic_card_is_judged_by_its_own_errors(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    truth = read_truth("ionosphere")
    allowed = make_truth.allowed_z(truth, truth)
    assert allowed == limit(3 * 34 + 2, 63)
    near, far = (moved(truth, by * allowed * 2**0.5) for by in (0.98, 1.02))
    assert make_truth.disagreements(truth, near) == [] and len(make_truth.disagreements(truth, far)) == 1
    assert make_truth.worst_z(truth["mean"], far["mean"]) == pytest.approx(1.02 * allowed)

    monkeypatch.setattr(make_truth, "derive", lambda p, seed: (far, True))
    assert make_truth.main(["ionosphere", "--check"]) == 1
    told = capsys.readouterr().out
    assert "mean: differs by 1.02 times" in told and f"(limit {allowed:.2f})" in told


def test_all_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    seen: list[str] = []
    monkeypatch.setattr(make_truth, "_check", lambda name, seed: seen.append(name) or 0)
    assert make_truth.main(["--all", "--check"]) == 0 and seen == list(PROBLEMS)
    for wrong in ([], ["--check"], ["--all", "banana"]):
        with pytest.raises(SystemExit):
            make_truth.main(wrong)
    assert "--all" in capsys.readouterr().err
