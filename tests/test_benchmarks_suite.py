"""The suite: its ledger loses nothing, its scores see what is wrong, its table counts, and a new method needs no change here.

Seeds are fixed; bounds are those of 4.5 standard errors (a right library fails a reseeded run of this file once in 10^4).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from scipy import stats

import boltzsample as bz
from benchmarks import ledger, suite
from benchmarks.__main__ import main
from benchmarks.scores import accuracy, energy, gaps, kish, picked, score, sliced_ks
from benchmarks.tables import COLUMNS, table
from benchmarks.weights import apart
from boltzsample.flags import flag
from boltzsample.registry import METHODS, Method
from boltzsample.samplers.sampler import Run, Sampler
from boltzsample.streams import Stream
from targets import Problem, Truth, problem


def rng(*path: str) -> torch.Generator:
    return Stream(7).child(*path).rng().generator


def independent(p: Problem, n: int = 4_000, shift: float = 0.0, keep: Any = None) -> bz.Result:
    """A Result of exact draws, moved by `shift` in x_0, only those for which keep(x) holds."""
    assert p.exact_sampler is not None
    x = p.exact_sampler(n, rng("draws"))
    x = x if keep is None else x[keep(x)]
    x[:, 0] += shift
    return replace(bz.result(bz.Draws.from_arrays(x[:, None]), p.target), config={"seed": 0, "log_z": False})


def quick(path: Path, *more: str) -> int:
    return main(["run", "--problem", "gaussian-corr-d10", "--method", "mcmc", "--seeds", "0", "--n", "256", "--ledger", str(path), *more])


# ---- the ledger ----


def test_what_a_kill_leaves_behind_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ledger.jsonl"
    for i in range(2):
        ledger.append(path, {"i": i})
    with path.open("a") as file:
        file.write('{"i": 2, "half')
    assert ledger.read(path) == ([{"i": 0}, {"i": 1}], 1)
    ledger.append(path, {"i": 3})
    assert ledger.read(path) == ([{"i": 0}, {"i": 1}, {"i": 3}], 1)
    path.write_bytes(path.read_bytes() + b'\xff\xfe{"i": 4}\n[5]\n\n')
    assert ledger.read(path) == ([{"i": 0}, {"i": 1}, {"i": 3}], 3)


def test_a_missing_ledger_is_empty_and_the_last_line_of_a_key_counts(tmp_path: Path) -> None:
    assert ledger.read(tmp_path / "none.jsonl") == ([], 0)
    lines = [{"a": 1, "v": 1}, {"a": 2, "v": 2}, {"a": 1, "v": 3}]
    assert ledger.latest(lines, ["a"]) == {(1,): lines[2], (2,): lines[1]}


def test_numbers_that_json_has_not_survive(tmp_path: Path) -> None:
    ledger.append(tmp_path / "l", {"a": [float("inf"), {"b": float("nan")}], "c": 0.1})
    ((line,), _) = ledger.read(tmp_path / "l")
    assert line["c"] == 0.1 and ledger.number(line["a"][0]) == float("inf") and line["a"][1]["b"] == "nan"


# ---- runs ----


def test_a_run_is_one_line_and_is_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = tmp_path / "suite.jsonl"
    assert quick(path) == 0
    (line,), _ = ledger.read(path)
    assert line["problem"] == "gaussian-corr-d10" and line["status"] == "ok" and line["threads"] == 1
    assert {"commit", "versions", "machine", "date", "config", "flags", "scores"} <= set(line)
    assert line["scores"]["evaluations"] > 10_000 and line["scores"]["worst_z"] < 5.5 and line["scores"]["log_z"] is None

    with monkeypatch.context() as patched:
        patched.setattr(suite, "measure", lambda job: pytest.fail("it is in the ledger"))
        assert quick(path) == 0
    assert "| gaussian-corr-d10 | mcmc | n 256 | 1 | 1/0/0 |" in capsys.readouterr().out
    assert quick(path, "--again") == 0
    assert [r["seed"] for r in ledger.read(path)[0]] == [0, 0]


def test_only_the_broken_run_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path, made = tmp_path / "suite.jsonl", []
    monkeypatch.setattr(suite, "measure", lambda job: made.append(job.seed) or line(seed=job.seed, n=job.n))
    run = ["run", "--problem", "gaussian-corr-d10", "--method", "mcmc", "--n", "256", "--ledger", str(path)]
    assert main([*run, "--seeds", "0", "1"]) == 0
    path.write_text(path.read_text()[:-20])
    assert main([*run, "--seeds", "0", "1", "2"]) == 0
    assert made == [0, 1, 1, 2]
    assert "1 broken line" in capsys.readouterr().err and len(ledger.read(path)[0]) == 3


def test_an_error_is_a_line_and_stops_no_other_run(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "suite.jsonl"
    assert quick(path, "--budget", "100") == 1
    assert quick(path) == 0
    first, second = ledger.read(path)[0]
    assert first["status"] == "error" and "budget is 100" in first["error"] and second["status"] == "ok"
    assert main(["table", "--ledger", str(path)]) == 0
    assert "ValueError: budget is 100" in capsys.readouterr().out


def test_an_interrupted_run_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(job: suite.Job) -> ledger.Record:
        raise ledger.Interrupted

    monkeypatch.setattr(suite, "measure", interrupted)
    assert quick(tmp_path / "suite.jsonl") == 130
    assert not (tmp_path / "suite.jsonl").exists()


@dataclass(frozen=True)
class Wide(Sampler):
    """Importance sampling from N(0, 3^2 I): a method that the suite has never heard of."""

    log_z: ClassVar[bool] = True

    def sample(self, target: bz.Target, n: int, run: Run) -> bz.Draws:
        law = torch.distributions.Normal(torch.zeros(target.dim, dtype=torch.float64), 3.0)
        x = 3 * run.stream.child("wide").rng().normal(32, -(-n // 32), target.dim)
        log_p = target.log_prob(x)
        run.ledger.add("sampling", (log_p.numel(), 0))
        return bz.Draws(x, log_p, log_weight=log_p - law.log_prob(x).sum(-1))


def test_a_new_method_appears_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(METHODS, "wide", Method(Wide, False, "weighted", "for this test"))
    path = tmp_path / "suite.jsonl"
    assert main(["run", "--problem", "double-well", "--n", "8000", "--seeds", "3", "--method", "wide", "--ledger", str(path)]) == 0
    (line,), _ = ledger.read(path)
    found = line["scores"]
    assert abs(found["log_z_z"]) < 4.5 and found["log_z_stderr"] < 0.1 and found["worst_z"] < 4.5
    assert f"{abs(found['log_z_error']):.3f}" in capsys.readouterr().out
    assert {job.method for job in suite.jobs(arguments())} == set(METHODS)


def arguments() -> Any:
    import argparse

    return argparse.Namespace(problem=None, method=None, seeds=[0], n=1, budget=None, dtype="float64")


def test_help_shows_examples(capsys: Any) -> None:
    for verb in ("run", "table"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert "python -m benchmarks run --problem funnel-sd3" in capsys.readouterr().out
    assert main(["table", "--ledger", "nowhere.jsonl"]) == 1
    assert "python -m benchmarks run --ledger nowhere.jsonl" in capsys.readouterr().err


# ---- scores ----


def test_exact_draws_pass_and_moved_ones_do_not() -> None:
    p = problem("two-modes-far")
    right, moved = score(p, independent(p)), score(p, independent(p, shift=0.5))
    assert right["worst_z"] < 4.5 and right["mean_error_sd"] < 4.5 / 4_000**0.5
    assert right["sliced_ks"] < 1.3 * right["sliced_ks_floor"] and abs(right["energy"]) < 0.003
    assert right["modes_found"] == 2 and right["mode_tv"] < 4 * right["mode_tv_floor"]
    assert moved["worst_z"] > 4.5 and moved["sliced_ks"] > 2 * moved["sliced_ks_floor"]
    assert moved["ess"] == pytest.approx(4_000, rel=0.1)


def test_the_ess_of_weights_is_kish() -> None:
    p = problem("two-modes-far")
    x = independent(p).draws.x[:4]
    log_w = torch.tensor([0.0, math.log(3.0), -math.inf, 0.0]).double()[:, None]
    found = replace(independent(p), draws=bz.Draws.from_arrays(x, p.target.log_prob(x), log_w))
    assert kish(found) == pytest.approx(25 / 11 / 4)
    none = replace(found, draws=replace(found.draws, log_weight=torch.full_like(log_w, -math.inf)))
    assert kish(none) == 0.0 and kish(independent(p)) is None and score(p, independent(p))["weights_ess"] is None


def test_proposals_are_measured_once_and_two_ways_to_log_z_compared(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "weights.jsonl"
    ask = ["weights", "--problem", "gaussian-corr-d10", "--way", "Laplace", "--seeds", "0", "1", "--n", "2000", "--ledger", str(path)]
    assert main(ask) == main(ask) == 0
    lines, _ = ledger.read(path)
    assert [r["seed"] for r in lines] == [0, 1] and all(r["ess"] > 0.999 and abs(r["log_z"]) < 1e-3 for r in lines)
    assert "| gaussian-corr-d10 | Laplace | 2 |" in capsys.readouterr().out
    one = [{"seed": 0, "log_z": 1.0, "stderr": 0.3}, {"seed": 1, "log_z": 2.0, "stderr": 0.3}]
    other = [{"seed": 0, "log_z": 1.5, "stderr": 0.4}, {"seed": 2, "log_z": 9.0, "stderr": 0.4}]
    assert apart(one, other) == pytest.approx(1.0)


def test_a_lost_mode_is_seen_in_every_score() -> None:
    p = problem("two-modes-far")
    w, at = p.truth["mode_weights"].value, p.truth["mode_weights"].at
    assert at is not None
    lost = score(p, independent(p, keep=lambda x: (x[:, None] - at).norm(dim=-1).argmin(-1) == 0))
    assert lost["modes_found"] == 1 and lost["mode_tv"] == pytest.approx(float(1 - w[0]))
    assert lost["worst_z"] > 100 and lost["energy"] > 0.05 and lost["sliced_ks"] > 0.1


def test_every_number_of_a_card_is_compared_and_named() -> None:
    p = problem("many-well-d6")
    names = [g.name for g in gaps(p, independent(p))]
    assert len(names) == len(set(names)) == 6 * 4 + 1 and {"mean[0]", "positive[5]", "sd[2]", "tail"} <= set(names)


def test_no_answer_is_no_number_but_under_ok_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem("two-modes-far")
    right = independent(p)
    silent = replace(right.means, value=torch.tensor([torch.nan, 0.0], dtype=torch.float64), flags=(flag("HEAVY_F", index=(0,)),))
    monkeypatch.setattr(bz.Result, "expectation", lambda self, f=None: silent if f == p.truth["mean"].f else right.means)
    monkeypatch.setattr(bz.Result, "sd", lambda self: right.means)
    cards = {"mean": p.truth["mean"], "sd": p.truth["sd"]}
    monkeypatch.setattr(Problem, "truth", property(lambda self: Truth(self.name, cards, {})))
    found = accuracy(p, right)
    assert found["numbers"] == 4 and found["unanswered"] == 1 and found["worst_z"] < float("inf") and found["numbers_ok"] == 1

    trusted = replace(silent, flags=())
    monkeypatch.setattr(bz.Result, "expectation", lambda self, f=None: trusted)
    assert accuracy(p, right)["worst_z_ok"] == float("inf")


def test_weighted_draws_are_compared_by_weight() -> None:
    x = 2 * torch.randn(20_000, 1, 1, generator=rng("wide"), dtype=torch.float64)
    log_w = -0.5 * x[..., 0] ** 2 + 0.125 * x[..., 0] ** 2  # from N(0, 2^2) to N(0, 1)
    y = picked(bz.Draws(x, log_w, log_weight=log_w), 2_000, Stream(0))
    assert y is not None and stats.kstest(y[:, 0].numpy(), "norm").pvalue > 1e-4
    thinned = picked(bz.Draws(x, log_w), 100, Stream(0))
    assert thinned is not None and len(set(thinned[:, 0].tolist())) == 100
    assert picked(bz.Draws(x, log_w, log_weight=torch.full_like(log_w, -torch.inf)), 10, Stream(0)) is None


def test_distances_are_those_of_scipy() -> None:
    a, b = torch.randn(2, 300, 1, generator=rng("pair"), dtype=torch.float64) * torch.tensor([[[1.0]], [[1.5]]])
    across = float((a - b.T).abs().mean())
    squared = stats.energy_distance(a[:, 0], b[:, 0]) ** 2  # its within-set averages count a point's distance to itself
    within = [float((v - v.T).abs().mean()) for v in (a, b)]
    assert energy(a, b) == pytest.approx((squared - sum(within) / 299) / (2 * across))
    assert sliced_ks(a, b) == pytest.approx(stats.ks_2samp(a[:, 0], b[:, 0]).statistic)


# ---- the table ----


def line(**other: Any) -> ledger.Record:
    scores = {"worst_z": 1.0, "worst_z_ok": 0.5, "ess": 10.0, "evaluations": 100, "seconds": 1.0, "modes": 3, "modes_found": 2}
    asked = {"problem": "gaussian-corr-d10", "method": "mcmc", "seed": 0, "n": 1, "budget": None, "dtype": "float64"}
    return asked | {"suite": suite.VERSION, "status": "ok", "error": None, "flags": {}, "scores": scores} | other


def test_the_table_has_medians_and_counts() -> None:
    seen = ((0, "ok", 1), (1, "untrusted", 2), (2, "ok", 9))
    runs = [line(seed=s, status=status, scores={"ess": e, "worst_z_ok": e}) for s, status, e in seen]
    text = table([json.loads(json.dumps(r)) for r in [*runs, line(problem="funnel-sd3", budget=1_000_000, dtype="float32")]])
    head, rule, first, second = text.splitlines()
    assert head.count("|") == rule.count("|") == first.count("|") == second.count("|") == len(COLUMNS) + 1
    cells = dict(zip(COLUMNS, (cell.strip() for cell in second.strip("|").split("|")), strict=True))
    assert cells["problem"] == "gaussian-corr-d10" and cells["ok/caution/untrusted"] == "2/0/1" and cells["ESS"] == "2"
    assert cells["worst ok"] == "9.00" and cells["log Z error (bar)"] == "" and cells["runs"] == "3"
    assert "n 1, budget 1e+06, float32" in first and "2/3" in first
    assert table([]) == "no runs yet"
