"""log Z and masses of modes over seeds: how large the errors are, and how large they are said to be.

    python -m benchmarks evidence --case gmm40-fab --seeds 0..15

Every seed is a run of its own from nothing, exploration included. Printed are root mean square errors and the mean of the standard
errors reported: of log Z, and of one more number of the problem,

    modes    total variation between the estimated and the true weights of the modes, over what as many exact draws would have on average
    wells    the worst error of P(x_i > 0) over the wells, in points
    ratio    log of the mass at x_(d/2) > 0 over the mass below
    weight   the relative error of the larger mode's weight: mean absolute, in percent

A mode .4 times as wide as another has .4^32 of its volume in 32 dimensions: no random point and no ladder of temperatures that starts
elsewhere comes near it. Climbs from cold starts, all coordinates equal, find it where it lies along 1_d. Turned away from there the run
is wrong and `ok`, and right where the mode is given by modes=.

Printed too are the modes found, the ESS said over the true one (1 / E_p[w / Z], from exact draws) where the proposal can be asked, and the
statuses of log Z.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import boltzsample as bz
from benchmarks.scores import kish, modes
from targets import Problem, problem
from targets.mixture_forms import mixture_form
from targets.modes import ALIKE, two_modes
from targets.problem import Truth

Record = dict[str, Any]
LEAST, MOST = 0.5, 1.2  # of the ESS said, over the true one
WIDTHS = (ALIKE[0], 0.4 * ALIKE[1])


@dataclass(frozen=True)
class Case:
    """A problem, the draws asked for, what is measured beside log Z, and bounds: on log Z, on the other, on evaluations, on the modes
    found, and on the effective draws. method: whatever the command says."""

    problem: Callable[[], Problem]
    n: int
    measure: str
    log_z: float = math.inf
    bound: float = math.inf
    evaluations: float = math.inf
    told: bool = False  # the modes are given by modes=
    modes: int = 0
    n_eff: float = 0.0
    method: str = ""


def unlike(d: int, turned: bool = False) -> Problem:
    """Two modes of widths 1:0.4, with their truth in closed form."""
    p = two_modes(d, widths=WIDTHS, turned=turned)
    return replace(p, known=Truth(p.name, {q.name: q for q in mixture_form(p.target)}, {}))


CASES: dict[str, Case] = {
    "gmm40-fab": Case(partial(problem, "gmm40-fab"), 20_000, "modes", 0.005, 1.3, 5e5, modes=40),
    "gmm40-curved": Case(partial(problem, "gmm40-curved"), 20_000, "modes", 0.02, evaluations=2e6),
    "many-well-d32": Case(partial(problem, "many-well-d32"), 45_000, "wells", 0.02, 1.0, 1.5e7, n_eff=1.5e4),
    "many-well-d32, bare smc": Case(partial(problem, "many-well-d32"), 18_000, "", 0.05, evaluations=1.2e7, method="smc"),
    "phi4-b0.025": Case(partial(problem, "phi4-b0.025"), 20_000, "ratio", bound=0.05, evaluations=3e6),
    "phi4-b0.05": Case(partial(problem, "phi4-b0.05"), 20_000, "ratio", bound=0.1, evaluations=3e6),
    "funnel-sd3": Case(partial(problem, "funnel-sd3"), 10_000, "", 0.01),
    "two-modes-d32": Case(partial(problem, "two-modes-d32"), 20_000, "weight", bound=2.0),
    "two-modes-d64": Case(partial(problem, "two-modes-d64"), 20_000, "weight", bound=2.0),
    "two-modes-d32, widths 1:0.4, given": Case(partial(unlike, 32), 20_000, "weight", bound=2.0, told=True),
    "two-modes-d64, widths 1:0.4, given": Case(partial(unlike, 64), 20_000, "weight", bound=2.0, told=True),
    "two-modes-d32, widths 1:0.4": Case(partial(unlike, 32), 20_000, "weight", bound=2.0),
    "two-modes-d64, widths 1:0.4": Case(partial(unlike, 64), 20_000, "weight", bound=2.0),
    "two-modes-d32, widths 1:0.4, turned": Case(partial(unlike, 32, turned=True), 20_000, "weight"),  # wrong: see above
}


def one(case: Case, method: str, seed: int) -> Record:
    """One run and its errors."""
    p, began = case.problem(), time.monotonic()
    modes = p.truth["mode_weights"].at if case.told else None
    method = case.method or method
    result = bz.sample(p.target, method, case.n, seed=seed, modes=modes, progress=False)
    z = result.log_z()
    record: Record = {"seed": seed, "log_z": float(z.value) - float(p.truth["log_z"].value), "stderr": float(z.stderr)}
    record |= {"status": str(z.status), "run": str(result.status), "evaluations": result.evaluations}
    record |= {"seconds": round(time.monotonic() - began, 1), "flags": sorted({f.code for f in z.flags if f.severity != "info"})}
    record |= {"chosen": next((f.detail for f in result.flags if f.code == "AUTO"), method)}
    return record | (MEASURES[case.measure](p, result) if case.measure else {}) | _true_ess(p, result)


def _modes(p: Problem, result: bz.Result) -> Record:
    found = modes(p, result)
    return {"error": found["mode_tv"] / found["mode_tv_floor"], "modes": found["modes_found"]}


def _wells(p: Problem, result: bz.Result) -> Record:
    e, truth = result.probability(lambda x: x[..., ::2] > 0), p.truth["positive"].value[::2]
    worst = int((e.value - truth).abs().argmax())
    share = kish(result)
    n_eff = None if share is None else share * result.draws.log_prob.numel()
    return {"error": 100 * float(e.value[worst] - truth[worst]), "bar": 100 * float(e.stderr[worst]), "n_eff": n_eff}


def _ratio(p: Problem, result: bz.Result) -> Record:
    middle = p.target.dim // 2
    e, truth = result.probability(lambda x: x[..., middle] > 0), float(p.truth["positive"].value[middle])
    value, to_odds = float(e.value), 1 / (float(e.value) * (1 - float(e.value)))
    error = math.log(value / (1 - value)) - math.log(truth / (1 - truth)) if 0 < value < 1 else -math.inf
    return {"error": error, "bar": float(e.stderr) * to_odds if value else math.nan, "of": str(e.status)}


def _weight(p: Problem, result: bz.Result) -> Record:
    e = result.expectation(p.truth["mode_weights"].f)[0]
    truth = float(p.truth["mode_weights"].value[0])
    return {"error": 100 * (float(e.value) - truth) / truth, "bar": 100 * float(e.stderr) / truth, "of": str(e.status)}


MEASURES: dict[str, Callable[[Problem, bz.Result], Record]] = {"modes": _modes, "wells": _wells, "ratio": _ratio, "weight": _weight}


def _true_ess(p: Problem, result: bz.Result) -> Record:
    """Kish's ESS per draw of the weights over 1 / E_p[w / Z] from exact draws, where a mixture was chosen."""
    mixtures, share = getattr(getattr(result.sampler, "chosen", result.sampler), "mixtures", ()), kish(result)
    if not mixtures or p.exact_sampler is None or share is None:
        return {}
    x = p.exact_sampler(20_000, torch.Generator().manual_seed(1))
    log_w = p.target.log_prob(x).double() - mixtures[0].log_prob(x) - float(p.truth["log_z"].value)
    return {"ess": share, "ess_true": math.exp(math.log(len(x)) - float(log_w.logsumexp(0)))}


def row(name: str, case: Case, records: list[Record]) -> tuple[str, bool]:
    """A row of the table, and whether all bounds hold."""
    rms, bar = _rms([r["log_z"] for r in records]), statistics.mean(r["stderr"] for r in records)
    errors = [r["error"] for r in records if "error" in r]
    other = (statistics.mean(map(abs, errors)) if case.measure in ("weight", "modes") else _rms(errors)) if errors else 0.0
    bars = [r["bar"] for r in records if "bar" in r]
    most, seconds = max(r["evaluations"] for r in records), statistics.median(r["seconds"] for r in records)
    ratios = [r["ess"] / r["ess_true"] for r in records if "ess_true" in r]
    holds = [rms <= case.log_z, bar <= case.log_z, other <= case.bound, most <= case.evaluations]
    holds += [statistics.mean(bars) <= case.bound] if bars else []
    holds += [r["modes"] >= case.modes for r in records if "modes" in r]
    holds += [(r["n_eff"] or 0) >= case.n_eff for r in records if "n_eff" in r]
    holds += [LEAST <= ratio <= MOST for ratio in ratios]
    cells = [name, str(len(records)), f"{rms:.4f}", f"{bar:.4f}", f"{case.measure} {other:.3g}" if errors else ""]
    cells += [f"{statistics.mean(bars):.3g}" if bars else "", f"{min(r['modes'] for r in records)}" if "modes" in records[0] else ""]
    cells += [
        f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else "",
        f"{most:.3g}",
        f"{seconds:.1f}",
        _said(Counter(r["status"] for r in records)),
    ]
    chosen = Counter(r["chosen"].split(":")[0] for r in records)
    return "| " + " | ".join([*cells, _said(chosen), "" if all(holds) else "**missed**"]) + " |", all(holds)


def _rms(values: list[float]) -> float:
    return math.sqrt(statistics.mean(v * v for v in values)) if values else math.nan


def _said(counts: Counter[str]) -> str:
    return ", ".join(f"{what} {n}" for what, n in counts.most_common())


HEADER = (
    "| problem | seeds | RMS log Z | mean bar | other | its bar | fewest modes | ESS said/true | evaluations, at most | seconds "
    "| log Z is | chosen | |"
)


def add_command(commands: Any) -> None:
    parser = commands.add_parser("evidence", help="log Z and masses of modes over seeds, against the truth")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this one (may be repeated)")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--seeds", default="0..15", help="FIRST..LAST (default: 0..15)")
    parser.add_argument("--out", type=Path, help="append one line of JSON a run")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 where a bound is missed."""
    torch.set_num_threads(1)
    first, _, last = args.seeds.partition("..")
    seeds = range(int(first), int(last or first) + 1)
    print(HEADER + "\n" + "|---" * 13 + "|", flush=True)
    missed = 0
    for name in args.case or CASES:
        records = []
        for seed in seeds:
            records.append(one(CASES[name], args.method, seed))
            if args.out:
                with args.out.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"case": name, "method": CASES[name].method or args.method, **records[-1]}) + "\n")
        line, holds = row(name, CASES[name], records)
        print(line, flush=True)
        missed += not holds
    return int(missed > 0)
