"""The court's own verdicts, and a small court: the near mixture by every method of the registry that trains nothing and the Gaussian by the
quick ones, 50 replicates each.

A cell that fails is heard again with 200 fresh replicates, so a right bar (.95) turns this file red in 1 of 10^6 runs; a method that is
flagged in 2% of its runs, the most that is allowed, in 1 of 10^3 a cell and 1 of 10^6 after the second hearing. Bars too short by 1.5
cover .81: 50 replicates see that in a single cell with probability .64, and there are a dozen cells to a run.
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
from benchmarks.court import hear
from benchmarks.court_cases import ALL, GIVEN, TRIALS, UNDETECTABLE, UNTRAINED, Trial, cases, shard, trains
from benchmarks.court_controls import CONTROLS, Control, hearings
from benchmarks.court_questions import NORMAL_X0, exact_draws, marginal, order_statistic, questions
from benchmarks.court_runs import Adjourned, Docket, batches, read, records
from benchmarks.court_table import Ruling, court, rule, tables, trial_of
from benchmarks.court_targets import InBlocks, WideT
from benchmarks.ledger import Interrupted
from benchmarks.verdicts import HEADER, RULE, Record, clopper_pearson, is_hit, judge, row, z_score
from boltzsample.backend import Backend
from boltzsample.densities import StudentT
from boltzsample.kernels import HMC
from boltzsample.kernels.chains import Chains
from boltzsample.kernels.kernel import Noise
from boltzsample.maps import Diagonal
from boltzsample.progress import Interrupt
from boltzsample.registry import METHODS
from boltzsample.samplers.starts import Starts
from boltzsample.streams import LANE, Stream, block_steps
from boltzsample.views import Pullback
from targets import problem
from tests.small import SMALL, normal

BY_NAME = {t.problem: t for t in TRIALS}
UNTRAINED_METHODS = [*(m for m in METHODS if not trains(m)), "importance"]
DEAR = {"smc", "tempering"}  # heard on the near mixture alone
WEAK = {"ais", *(name for name, line in METHODS.items() if line.promise == "approximate")}  # rightly flagged where quiet is wanted
SMALL_COURT = [
    replace(t, n=min(t.n, 8_000))
    for t in cases([m for m in UNTRAINED_METHODS if m not in WEAK], ["gaussian-corr-d10", "two-modes-near"])
    if t.problem == "two-modes-near" or t.method not in DEAR
]


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
    "SOME FLAGS": [record(0, "caution") for _ in range(40)] + [record(z) for z in normal_scores(160)],
    "NOEVIDENCE": [record(30, "caution") for _ in range(85)] + [record(0) for _ in range(15)],
}


@pytest.mark.parametrize("name", CASES)
def test_verdict(name: str) -> None:
    assert judge(CASES[name]).verdict == {"SOME FLAGS": "PASS"}.get(name, name.split(":")[0])


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


def faults(trial: Trial, functional: str, name: str) -> tuple[str, ...]:
    return rule(trial, functional, judge(CASES[name])).faults


def test_what_is_a_fault() -> None:
    trial = Trial("two-modes-near", loud=("E x_1^2",), heavy=("sd x_0",), easy=True)
    assert faults(trial, "E x_0", "PASS") == () and faults(trial, "E x_0", "SILENT") == ("silent",)
    assert faults(trial, "E x_1^2", "PASS") == ("must be flagged",) and faults(trial, "E x_1^2", "LOUD") == ()
    assert faults(trial, "E x_0", "SOME FLAGS") == ("flagged too often",) and faults(trial, "sd x_0", "SOME FLAGS") == ()
    assert faults(replace(trial, easy=False), "E x_0", "SOME FLAGS") == ()
    assert faults(replace(trial, loud=(ALL,)), "E x_0", "PASS") == ("must be flagged",)
    uneven = replace(trial, problem="cancer", method="mixture-is")
    assert faults(uneven, "E x_0", "SOME FLAGS") == () and faults(uneven, "log Z", "SOME FLAGS") == ("flagged too often",)
    assert faults(uneven, "E x_0", "SILENT") == ("silent",) and faults(replace(trial, method="ais"), "E x_0", "SOME FLAGS") != ()
    assert faults(replace(trial, method="rdmc"), "E x_0", "SOME FLAGS") == ()
    assert faults(replace(trial, scope=GIVEN), "E x_0", "SOME FLAGS") == ()  # no easy proposal for a problem with heavy functionals


def test_only_what_is_named_may_be_silent() -> None:
    assert faults(Trial(UNDETECTABLE[0].problem), "E x_0", "SILENT") == ()
    assert faults(Trial("two-modes-far"), "E x_0", "SILENT") == ("silent",)
    assert all(len(b.why) > 40 for b in UNDETECTABLE)


def test_the_table_is_a_table() -> None:
    assert HEADER.count("|") == RULE.count("|") == row("p", "E x_0", judge(CASES["WOLF"])).count("|")


# ---- questions ----


@pytest.mark.parametrize("name", BY_NAME)
def test_quantiles_agree_with_the_card(name: str) -> None:
    law, tail = marginal(problem(name)), problem(name).truth["tail"]
    if law is not None:
        assert law(1 - float(tail.value)) == pytest.approx(float(tail.at), abs=1e-6)
    assert len(questions(problem(name), log_z=True)) >= 8


def test_every_marginal_said_to_be_normal_is_asked_about() -> None:
    assert NORMAL_X0 - {"rosenbrock"} <= BY_NAME.keys()


NO_EXACT = ("funnel-sd3", "narrow-spike")  # no error bar for x_1^2; a spike beside a tail looks heavy to k-hat


@pytest.mark.parametrize("name", [n for n in BY_NAME if problem(n).exact_sampler is not None and n not in NO_EXACT])
def test_exact_draws_pass(name: str) -> None:
    """20,000 independent draws: no |z| over 4.5 in a dozen questions."""
    p = problem(name)
    assert p.exact_sampler is not None
    result = bz.result(bz.Draws.from_arrays(p.exact_sampler(20_000, torch.Generator().manual_seed(0))))
    for q in questions(p):
        e = q.ask(result)
        assert abs(float(e.value) - q.truth) < 4.5 * (float(e.stderr) ** 2 + q.truth_se**2) ** 0.5, q.name


def test_order_statistics() -> None:
    """A uniform law: the q-quantile of n draws errs by sqrt(q (1 - q) / n)."""
    value, error = order_statistic(torch.linspace(0, 1, 10_001, dtype=torch.float64), 0.05)
    assert value == pytest.approx(0.05, abs=1e-4) and error == pytest.approx((0.05 * 0.95 / 10_000) ** 0.5, rel=0.05)


def test_measured_truths_agree_with_closed_forms() -> None:
    """E log N(x; m, C) = -(d + log det 2 pi C) / 2, here from the density at its mode; E x_0 x_1 of independent coordinates."""
    p = problem("gaussian-corr-d10")
    asked = {q.name: q for q in questions(p)}
    mode = float(p.target.log_prob(p.truth["mean"].value))
    assert abs(asked["log p"].truth - (mode - 5)) < 4.5 * asked["log p"].truth_se
    assert exact_draws("cancer") is None
    wells = {q.name: q for q in questions(problem("many-well-d6"))}
    mean = problem("many-well-d6").truth["mean"].value
    assert abs(wells["E x_0 x_1"].truth - float(mean[0] * mean[1])) < 4.5 * wells["E x_0 x_1"].truth_se


def test_a_target_in_blocks_is_the_same() -> None:
    target = problem("banana").target
    x = torch.randn(3, 50, target.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mine, its in zip(InBlocks(target).log_prob_and_grad(x), bz.log_prob_and_grad(target, x), strict=True):
        assert torch.equal(mine, its)
    assert torch.equal(InBlocks(target).log_prob(x[0]), target.log_prob(x[0]))


def test_a_court_adjourned_goes_on_where_it_was(tmp_path: Path) -> None:
    trial, file = replace(BY_NAME["banana"], n=64, chains=8, warmup=20), tmp_path / "lines.jsonl"
    with pytest.raises(Adjourned):
        list(Docket(file, seconds=0.0).hear(trial, 2, 0, 1))
    assert len(list(Docket(file).hear(trial, 2, 0, 1))) == 1 and len(list(Docket(file, seconds=0.0).hear(trial, 2, 0, 1))) == 1


def test_the_proposal_is_normalized() -> None:
    """E_q of p/q is one: against its own samples, importance of a normal density with a wide t."""
    wide = WideT(torch.zeros(2, dtype=torch.float64), 1.5 * torch.eye(2, dtype=torch.float64))
    e = bz.importance(bz.from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=2), wide, 20_000, seed=0).log_z()
    assert abs(float(e.value) - 1.8378770664) < 4.5 * float(e.stderr) < 0.05


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
    trial = replace(SMALL_COURT[0], n=64, warmup=20)
    found = [r for own, size in batches(trial, 6, 2) for r in records(trial, own, size)]
    assert len({r["est"] for r in found if r["f"] == "E x_0"}) == 6


# ---- cases and shards ----


def test_shards_share_out_every_case_once_and_evenly() -> None:
    found = cases(UNTRAINED_METHODS)
    parts = [shard(found, i, 3) for i in (1, 2, 3)]
    assert sorted(t.name for part in parts for t in part) == sorted(t.name for t in found)
    loads = [sum(t.cost for t in part) for part in parts]
    assert max(loads) - min(loads) <= max(t.cost for t in found)


def test_every_method_of_the_registry_has_cases() -> None:
    assert {t.method for t in cases()} == {*METHODS, "importance"}
    assert len({t.problem for t in cases(["mcmc"])}) >= 10
    assert [t.scope for t in cases(["mcmc"], ["cancer"])] == [UNTRAINED]
    assert [t.witness for t in cases(["mcmc"], ["two-modes-far"])] == [True, False]


# ---- lines, resumption, tables ----

TINY = replace(BY_NAME["funnel-sd3"], n=512, warmup=20)


def test_what_the_file_holds_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "court.jsonl"
    first = [r for batch in Docket(path).hear(TINY, 3, 0, 1) for r in batch]
    lines = path.read_text().splitlines()
    assert str([r for batch in Docket(path).hear(TINY, 3, 0, 1) for r in batch]) == str(read([path]))  # nan != nan
    assert path.read_text().splitlines() == lines and len(lines) == len(first) == 3 * 12
    path.write_text("\n".join(lines[:-2]) + "\n" + lines[-1][:40])  # killed in the middle of a line
    again = [r for batch in Docket(path).hear(TINY, 3, 0, 1) for r in batch]
    assert str([r["est"] for r in again]) == str([r["est"] for r in first])
    assert len(court(read([path])).rulings) == 12 and {r.cell.replicates for r in court(read([path])).rulings} == {3}


def test_runs_that_were_interrupted_are_no_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, enter = tmp_path / "court.jsonl", Interrupt.__enter__

    def at_once(self: Interrupt) -> Interrupt:
        self.requested = True
        return enter(self)

    monkeypatch.setattr(Interrupt, "__enter__", at_once)
    for trial in (TINY, replace(TINY, method="flow-is", scope=GIVEN)):
        with pytest.raises(Interrupted):
            list(Docket(path).hear(trial, 3, 0, 1))
    assert not path.exists()


def test_a_failing_cell_is_judged_by_its_second_hearing() -> None:
    one = {"case": "two-modes-near / mcmc", "target": "two-modes-near", "method": "mcmc", "scope": UNTRAINED, "witness": True}
    base = one | {"commit": "c", "court_version": 2, "settings": "s"}
    lines = [base | r | {"hearing": 1, "seed": f"0/{i}"} for i, r in enumerate(CASES["SILENT"])]
    assert court(lines).broken == 1 and "silent" in tables(court(lines))
    second = [base | r | {"hearing": 2, "seed": f"1/{i}"} for i, r in enumerate([*CASES["PASS"], *CASES["PASS"]])]
    assert court(lines + second[:50]).broken == 1  # cut short
    lines += second
    assert court(lines).broken == 0 and court(lines).rulings[0].cell.hits == 2 * judge(CASES["PASS"]).hits
    newer = [base | r | {"hearing": 1, "seed": f"0/{i}", "commit": "d"} for i, r in enumerate(CASES["SILENT"])]
    assert court(lines + newer).broken == 1


def test_a_run_that_raises_is_a_broken_promise() -> None:
    class Broken(Trial):
        @property
        def sampler(self) -> Any:
            return bz.MCMC(chains=32, warmup=0, kernel="no kernel")

    (line,) = records(Broken("two-modes-near"), 0, 2)
    assert line["status"] == "error" and "Error" in line["error"]
    found = court([line | {"hearing": 1, "commit": "c", "court_version": 2}])
    assert found.broken == 1 and "ERROR two-modes-near / mcmc" in tables(found)


def test_a_line_knows_its_case() -> None:
    for trial in cases():
        fields = {"target": trial.problem, "method": trial.method, "scope": trial.scope, "witness": trial.witness}
        found = trial_of(fields)
        assert (found.name, found.easy, found.loud) == (trial.name, trial.easy, trial.loud)


# ---- a small court ----


@cache
def heard(number: int) -> tuple[list[Ruling], list[Record]]:
    return hear(SMALL_COURT[number], 50, 1, Docket())


@pytest.mark.parametrize("number", range(len(SMALL_COURT)), ids=lambda i: SMALL_COURT[i].name)
def test_error_bars_hold(number: int) -> None:
    decided, _ = heard(number)
    table = "\n".join(row(r.trial.name, r.functional, r.cell) for r in decided)
    assert not any(r.faults for r in decided), table
    assert all(r.cell.verdict == "PASS" for r in decided), table


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
    command = ["court", "--replicates", "2", "--problem", "funnel-sd3", "--method", "mcmc", "--n", "512", "--warmup", "20"]
    codes = [main([*command, "--out", str(out)]), main(["court", "--table", str(out), "--all"])]
    printed = capsys.readouterr()
    assert codes == [0, 0] and "| funnel-sd3 / mcmc | E x_1^2 |" in printed.out and "0 broken promises" in printed.out
    assert "[1/1 00:00:" in printed.err and UNDETECTABLE[0].why in printed.out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 2 * 12
    named = {"court_version", "commit", "target", "method", "f", "seed", "est", "se", "df", "lo", "hi", "truth", "truth_se"}
    facts = {"flags", "values", "status", "n_logp", "seconds", "heaviest", "versions", "case", "settings", "scope", "witness", "hearing"}
    assert set(lines[0]) == named | facts


@pytest.mark.parametrize("wrong", ["3/2", "0/2", "half"])
def test_a_part_that_is_none(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["court", "--shard", wrong])
    assert "wanted" in capsys.readouterr().err


# ---- controls ----


@pytest.mark.parametrize("hearing", hearings(UNTRAINED_METHODS), ids=lambda h: h.name)
def test_controls_get_no_confident_answer(hearing: Any) -> None:
    found = hearing.control.outcome(hearing.method, 1)
    assert found["held"], found


def test_a_control_that_is_not_told_apart_would_be_seen() -> None:
    """A plain normal density says none of the words."""
    sound = replace(CONTROLS[0], run=lambda method, seed: bz.sample(normal(), SMALL, 3_200, seed=seed, progress=False))
    assert isinstance(sound, Control) and not sound.outcome("mcmc", 0)["held"]
