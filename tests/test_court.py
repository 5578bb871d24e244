"""The court's own verdicts, and a small court: two problems, 50 replicates each.

A cell that fails is heard again with 200 fresh replicates, so a right bar turns this file red in 1 of 10^6 runs. Bars too short by 1.5
cover .81: 50 replicates see that in a single cell with probability .64, and there are twenty cells, ten to a run.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

import boltzsample as bz
from benchmarks.__main__ import main
from benchmarks.court import NORMAL_X0, TRIALS, Trial, faults, hear, marginal, questions, records
from benchmarks.verdicts import HEADER, RULE, Cell, Record, clopper_pearson, is_hit, judge, row, z_score
from boltzsample.backend import Backend
from boltzsample.densities import StudentT
from boltzsample.kernels import HMC
from boltzsample.kernels.chains import Chains
from boltzsample.kernels.kernel import Noise
from boltzsample.maps import Diagonal
from boltzsample.samplers.starts import Starts
from boltzsample.streams import LANE, Stream, block_steps
from boltzsample.views import Pullback
from targets import problem
from tests.small import SMALL, normal

BY_NAME = {t.problem: t for t in TRIALS}
SMALL_COURT = [replace(BY_NAME["gaussian-corr-d10"], n=3_200), replace(BY_NAME["two-modes-near"], n=4_800)]


# ---- verdicts ----


def record(z: float, status: str = "ok", se: float = 0.1, **other: Any) -> Record:
    """A run that misses a truth of 1 by z standard errors, with a normal 95% interval."""
    est = 1 + z * se
    return {"f": "f", "est": est, "se": se, "lo": est - 1.96 * se, "hi": est + 1.96 * se, "truth": 1.0, "truth_se": 0.0} | {
        "status": status,
        "flags": [] if status == "ok" else ["CODE"],
        **other,
    }


def normal_scores(n: int, scale: float = 1.0) -> list[float]:
    return [float(scale * stats.norm.ppf((i + 0.5) / n)) for i in range(n)]


CASES = {
    "PASS": [record(z) for z in normal_scores(200)],
    "SILENT": [record(z) for z in normal_scores(200, 1.5)],
    "SILENT: confident and wrong": [record(z) for z in [*normal_scores(193), 6, 7, -8, 9, 9, 9, 9]],
    "WIDE": [record(z) for z in normal_scores(200, 0.4)],
    "LOUD": [record(30, "untrusted") for _ in range(192)] + [record(0) for _ in range(8)],
    "WOLF": [record(z, "caution") for z in normal_scores(200)],
    "NOEVIDENCE": [record(30, "caution") for _ in range(85)] + [record(0) for _ in range(15)],
}


@pytest.mark.parametrize("name", CASES)
def test_verdict(name: str) -> None:
    assert judge(CASES[name]).verdict == name.split(":")[0]


def test_flagged_misses_do_not_count_and_unflagged_ones_do() -> None:
    fair = [record(z) for z in normal_scores(100)]
    assert judge([*fair, *[record(9, "caution") for _ in range(20)]]).verdict == "PASS"
    assert judge([*fair, *[record(9) for _ in range(20)]]).verdict == "SILENT"


@pytest.mark.parametrize("bad", [{"se": 0.0}, {"se": float("nan")}, {"lo": float("nan")}, {"est": float("nan")}], ids=str)
def test_an_answer_without_a_bar_is_a_miss(bad: Any) -> None:
    assert not is_hit(record(0.0, **bad))
    cell = judge([record(0.0), record(0.0, **bad)])
    assert (cell.hits, cell.unflagged) == (1, 2)


def test_the_truth_has_an_error_too() -> None:
    off = record(3.0)
    assert not is_hit(off) and z_score(off) == pytest.approx(3)
    unsure = off | {"truth_se": 0.15}
    assert is_hit(unsure) and z_score(unsure) == pytest.approx(3 / (1 + 2.25) ** 0.5)


def test_asymmetric_intervals_are_taken_as_they_are() -> None:
    assert is_hit(record(3.0, lo=0.9)) and not is_hit(record(1.0, lo=1.01))


def test_numbers_of_a_cell() -> None:
    scores = normal_scores(4000)
    cell = judge([record(z) for z in scores])
    assert cell.mean_z == pytest.approx(0.798, abs=2e-3) and cell.rms_z == pytest.approx(1, abs=2e-3) == cell.ratio
    assert cell.coverage[0] < 0.95 < cell.coverage[1] and not cell.is_noisy
    assert judge([record(0, "caution") for _ in range(9)] + [record(0)] * 191).is_noisy
    assert not judge([record(0, "caution") for _ in range(8)] + [record(0)] * 192).is_noisy
    assert clopper_pearson(0, 10) == (0.0, pytest.approx(0.3085, abs=1e-4)) and clopper_pearson(10, 10)[1] == 1.0


def test_what_is_a_fault() -> None:
    trial = Trial("funnel-sd3", n=1, loud=("E x_1^2",), heavy=("sd x_0",))
    quiet, loud, wrong = (judge(CASES[name]) for name in ("PASS", "LOUD", "SILENT"))
    some = judge([record(0, "caution") for _ in range(40)] + [record(z) for z in normal_scores(160)])
    assert faults(trial, "E x_0", quiet) == [] and faults(trial, "E x_0", wrong) == ["SILENT"]
    assert faults(trial, "E x_1^2", quiet) == ["must be flagged"] and faults(trial, "E x_1^2", loud) == []
    assert faults(trial, "E x_0", some) == ["flagged too often"] and faults(trial, "sd x_0", some) == []
    assert faults(replace(trial, easy=False), "E x_0", some) == []


def test_the_table_is_a_table() -> None:
    assert HEADER.count("|") == RULE.count("|") == row("p", "E x_0", judge(CASES["WOLF"])).count("|")


# ---- questions ----


@pytest.mark.parametrize("name", [*BY_NAME, "two-modes-far", *sorted(NORMAL_X0 - BY_NAME.keys())])
def test_quantiles_agree_with_the_card(name: str) -> None:
    law, tail = marginal(problem(name)), problem(name).truth["tail"]
    if law is not None:
        assert law(1 - float(tail.value)) == pytest.approx(float(tail.at), abs=1e-6)
    assert len(questions(problem(name))) == (10 if law else 7)


@pytest.mark.parametrize("name", [n for n in BY_NAME if n not in ("cancer", "funnel-sd3")])
def test_exact_draws_pass(name: str) -> None:
    """20,000 independent draws: no |z| over 4.5 in ten questions."""
    p = problem(name)
    assert p.exact_sampler is not None
    result = bz.result(bz.Draws.from_arrays(p.exact_sampler(20_000, torch.Generator().manual_seed(0))))
    for q in questions(p):
        e = q.ask(result)
        assert abs(float(e.value) - q.truth) < 4.5 * float(e.stderr), q.name


# ---- what it rests on ----


def test_no_two_numbers_are_drawn_twice() -> None:
    """Not by another replicate, lane or block, nor by another replicate's starts."""
    target, unit = normal(), Diagonal(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    chains = Chains.start(target, HMC(), unit, torch.zeros(2, 2 * LANE, 2, dtype=torch.float64), Backend(), Stream(0), 0)
    noise = torch.cat([chains._noise("draw", block).normal.clone() for block in (0, 1)])
    assert noise.shape == (2 * block_steps(2), 2, 2 * LANE, 2) and noise.unique().numel() == noise.numel()
    starts = Starts(StudentT(unit))._first(Stream(0), Backend(), 2, 2 * LANE, 0)
    assert starts.shape == (2, 2 * LANE, 2) and starts.unique().numel() == starts.numel()


def test_sampling_is_the_frozen_kernel_step_by_step() -> None:
    """Nothing adapts in `sample`: its draws are those of the fitted kernel, stepped by hand with the same noise."""
    fitted = replace(bz.sample(normal(), replace(SMALL, kernel=HMC(L=2)), 640, seed=3, witness=False).sampler, warmup=5)
    starts = Stream(5).rng().normal(32, 2)
    draws = bz.sample(normal(), fitted, 640, seed=4, fit=False, starts=starts, witness=False).draws
    view = Pullback(normal(), fitted.map)
    state = fitted.kernel.init(view, fitted.map.pull(starts[None]))
    for name, steps in (("settle", 5), ("draw", 20)):
        stream = Stream(4).child("mcmc", "sampling", name, "replicate", 0, "lane", 0, "block", 0)
        noise = fitted.kernel.draw(stream.rng(), (block_steps(2), LANE), 2)
        for t in range(steps):
            state, _ = fitted.kernel.step(view, state, Noise(*(part[t, None, :32] for part in noise)))
            if name == "draw":
                torch.testing.assert_close(draws.x[:, t], fitted.map.push(state.x)[0][0])
                torch.testing.assert_close(draws.log_prob[:, t], normal().log_prob(draws.x[:, t]))


def test_records_of_replicates_differ() -> None:
    estimates = [r["est"] for r in records(replace(SMALL_COURT[0], n=64, warmup=20), 6, 2) if r["f"] == "E x_0"]
    assert len(set(estimates)) == 6


# ---- a small court ----


@cache
def heard(number: int) -> tuple[dict[str, tuple[Cell, list[str]]], list[Record]]:
    kept: list[Record] = []

    class Kept:
        def writelines(self, lines: Any) -> None:
            kept.extend(json.loads(line) for line in lines)

        def flush(self) -> None: ...

    out: Any = Kept()
    return hear(SMALL_COURT[number], 50, seed=1, out=out), kept


@pytest.mark.parametrize("number", range(len(SMALL_COURT)), ids=lambda i: SMALL_COURT[i].problem)
def test_error_bars_hold(number: int) -> None:
    verdicts, _ = heard(number)
    table = "\n".join(row(SMALL_COURT[number].problem, name, cell) for name, (cell, _) in verdicts.items())
    assert not any(wrong for _, wrong in verdicts.values()), table
    assert all(cell.verdict == "PASS" for cell, _ in verdicts.values()), table


def test_bars_too_short_by_half_would_be_seen() -> None:
    everything = [r for number in range(len(SMALL_COURT)) for r in heard(number)[1]]
    short = [
        r | {"se": r["se"] / 1.5, "lo": r["est"] - (r["est"] - r["lo"]) / 1.5, "hi": r["est"] + (r["hi"] - r["est"]) / 1.5}
        for r in everything
    ]
    assert judge(everything).verdict == "PASS"
    assert judge(short).verdict == "SILENT"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "court.jsonl"
    command = ["coverage", "--replicates", "2", "--problem", "funnel-sd3", "--n", "512", "--warmup", "20", "--out", str(out)]
    codes = [main(command), main(command)]
    printed = capsys.readouterr().out
    assert codes == [0, 0] and "| funnel-sd3 | E x_1^2 |" in printed and "0 broken promises" in printed
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 2 * 2 * 10  # appended, not overwritten
    named = {"court_version", "commit", "target", "method", "f", "replicate", "seed", "est", "se", "df", "lo", "hi", "truth", "truth_se"}
    assert set(lines[0]) == named | {"flags", "status", "n_logp", "seconds", "versions"}
    assert lines[:20] == [{**b, "seconds": a["seconds"]} for a, b in zip(lines[:20], lines[20:], strict=True)]
