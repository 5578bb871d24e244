"""The suite: every problem by every method, each run scored against the truth card and kept in a ledger.

    python -m benchmarks run                                          # the quick set, every method, seeds 0 1 2
    python -m benchmarks run --problem funnel-sd3 --method mcmc --seeds 0 1 2 3 4 --n 20000
    python -m benchmarks run --problem all --budget 1000000 --ledger zoo.jsonl
    python -m benchmarks table --ledger zoo.jsonl

Runs go through `bz.sample` alone, and samplers see `problem.target` alone. What is in the ledger already (problem, method, seed,
n, budget, dtype) is not run again, unless --again says so. Exit code 1: a run raised an error.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import boltzsample as bz
from benchmarks import ledger
from benchmarks.scores import score
from benchmarks.tables import table
from boltzsample.registry import METHODS
from targets import PROBLEMS, Problem, problem

VERSION = 1  # of the scores: raise it where a score changes its meaning, and old lines are run again
QUICK = ("gaussian-corr-d10", "student-t5-d10", "banana", "two-modes-far", "gmm40-fab", "funnel-sd3", "many-well-d6", "cancer")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Job:
    """One run. Its fields and VERSION are the key of its line."""

    problem: str
    method: str
    seed: int
    n: int
    budget: int | None
    dtype: str
    suite: int = VERSION

    def sample(self, p: Problem) -> bz.Result:
        return bz.sample(
            p.target, method=self.method, n=self.n, seed=self.seed, budget=self.budget, dtype=DTYPES[self.dtype], progress=False
        )


KEY = tuple(Job.__dataclass_fields__)


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Seed after seed, so that a suite stopped half-way has whole tables."""
    names = list(PROBLEMS) if "all" in (args.problem or ()) else args.problem or QUICK
    for seed in args.seeds:
        for name in names:
            for method in args.method or METHODS:
                yield Job(name, method, seed, args.n, args.budget, args.dtype)


def measure(job: Job) -> ledger.Record:
    """The line of one run; an error of the library is a result like any other. Raises ImportError, ledger.Interrupted."""
    p = problem(job.problem)
    record = {**asdict(job), **ledger.here(), "threads": torch.get_num_threads()}
    try:
        result = ledger.whole(job.sample(p))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]} ({Path(where.filename).name}:{where.lineno})"
        return record | {"status": "error", "error": what, "flags": [], "scores": {}, "config": {}}
    flags = {flag.code: flag.severity for flag in reversed(result.flags)}  # the worst first, so it is what stays
    return record | {"status": str(result.status), "error": None, "flags": flags, "scores": score(p, result), "config": result.config}


def run(args: argparse.Namespace) -> int:
    """Run what the ledger lacks, a line each, then print the table of what was asked for."""
    torch.set_num_threads(args.threads)
    known, wanted = ledger.latest(_read(args.ledger), KEY), list(jobs(args))
    missing = {job.problem: why for job in wanted if (why := _why_not(job.problem))}
    for job in wanted:
        key = ledger.key(asdict(job), KEY)
        if job.problem in missing or (key in known and not args.again):
            continue
        try:
            known[key] = measure(job)
        except ledger.Interrupted:
            print("interrupted: that run is not kept, the others are", file=sys.stderr)
            return 130
        ledger.append(args.ledger, known[key])
        print(_told(known[key]), flush=True)
    found = [known[key] for job in wanted if (key := ledger.key(asdict(job), KEY)) in known]
    print(f"\n{table(found)}")
    print(*missing.values(), sep="\n", end="", file=sys.stderr)
    return 1 if missing or any(r["status"] == "error" for r in found) else 0


def show(args: argparse.Namespace) -> int:
    """Print the table of a ledger."""
    if not args.ledger.exists():
        print(f"there is no ledger {args.ledger}; make one with: python -m benchmarks run --ledger {args.ledger}", file=sys.stderr)
        return 1
    found = ledger.latest(_read(args.ledger), KEY).values()
    print(table([r for r in found if r.get("suite") == VERSION]))
    return 0


def _why_not(name: str) -> str:
    try:
        problem(name)
    except ImportError as error:  # the extra `data` is missing
        return str(error)
    return ""


def _read(path: Path) -> list[ledger.Record]:
    records, broken = ledger.read(path)
    if broken:
        print(f"{path}: {broken} broken line(s) passed over, as a killed run leaves them", file=sys.stderr)
    return records


def _told(r: ledger.Record) -> str:
    name = f"{r['problem']} {r['method']} seed {r['seed']}: {r['status']}"
    if r["error"]:
        return f"{name}: {r['error']}"
    s = r["scores"]
    worst = f"worst |z| {float(s['worst_z']):.2f}" if s["worst_z"] is not None else "no answers"
    return f"{name}, {worst}, ESS {s['ess']:.0f}, {s['evaluations']:,} evaluations, {s['seconds']:.1f} s"


def add_command(commands: Any) -> None:
    """The verbs `run` and `table`."""
    parser = _parser(commands, "run", "problem x method x score, kept in a ledger", run)
    parser.add_argument("--problem", nargs="+", choices=["all", *PROBLEMS], metavar="NAME", help=f"default: {' '.join(QUICK)}; or all")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), metavar="NAME", help=f"default: all of {' '.join(METHODS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S")
    parser.add_argument("--n", type=int, default=4_000, help="draws of a run (default %(default)s)")
    parser.add_argument("--budget", type=int, metavar="E", help="evaluations a run may take (default: no limit)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float64")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default %(default)s)")
    parser.add_argument("--again", action="store_true", help="run what the ledger has already, too; the later line counts")
    _parser(commands, "table", "the Markdown table of a ledger", show)


def _parser(commands: Any, name: str, about: str, work: Any) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(name, help=about, description=__doc__, formatter_class=formatter)
    parser.add_argument("--ledger", type=Path, default=Path("suite.jsonl"), metavar="PATH", help="JSON lines (default %(default)s)")
    parser.set_defaults(run=work)
    return parser
