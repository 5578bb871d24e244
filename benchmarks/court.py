"""The coverage court: do 95% intervals hold the truth in 95 of 100 runs, and does the library say so where they do not?

Each problem is run R times, independently and *deliberately small* (32 chains, a few dozen draws each), through the public API alone.
Every replicate answers the same questions; each answer is one line of JSON (append-only), each cell one line of the table. A cell
that fails is heard once more with 4R fresh replicates, and that counts. Exit code 1: an interval was silently wrong, an easy problem
was flagged too often, or a functional that has no error bar was not flagged.

    python -m benchmarks coverage --replicates 200 --out coverage.jsonl
    python -m benchmarks coverage --method flow-is --replicates 100        # 10 trainings, 10 runs of each: given the trained proposal
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from scipy import optimize, stats

import boltzsample as bz
from benchmarks.verdicts import HEADER, RULE, Cell, Record, judge, row
from boltzsample.samplers.sampler import Sampler
from targets import Problem, problem

VERSION = 1
NORMAL_X0 = frozenset({"gaussian-corr-d10", "gaussian-ill-d100", "funnel-sd3", "banana", "rosenbrock"})
BATCH = 50  # replicates in one call of bz.sample: these share a wide source and the number of leapfrogs
PER_TRAINING = 10  # replicates of each trained flow
AGAIN = 4


@dataclass(frozen=True)
class Trial:
    """How a problem is run. `easy`: it may not be flagged, except for the functionals in `heavy`, whose bars are hard to know.
    `loud`: functionals that must be flagged, for they have no error bar."""

    problem: str
    n: int
    chains: int = 32
    warmup: int = 100
    thin: int = 1
    easy: bool = True
    heavy: tuple[str, ...] = ()
    loud: tuple[str, ...] = ()
    starts: Any = None
    witness: bool = True
    method: str = "mcmc"

    @property
    def sampler(self) -> Sampler:
        chains = bz.MCMC(chains=self.chains, warmup=self.warmup, thin=self.thin)
        return {"mcmc": chains, "flow-is": bz.FlowIS(), "latent-mcmc": bz.LatentMCMC(mcmc=chains)}[self.method]

    @property
    def is_trained(self) -> bool:
        return self.method != "mcmc"


TRIALS: tuple[Trial, ...] = (
    Trial("gaussian-corr-d10", n=3_200),
    Trial("student-t5-d10", n=6_400, warmup=200, thin=4, heavy=("E x_0^2", "E x_1^2", "E x.x", "sd x_0")),  # x^2 has no third moment
    Trial("two-modes-near", n=6_400),
    Trial("cancer", n=3_200),
    Trial("funnel-sd3", n=1_600, easy=False, loud=("E x_1^2",)),
)


@dataclass(frozen=True)
class Question:
    """A functional: how a Result answers it, and the truth with its error."""

    name: str
    ask: Callable[[bz.Result], bz.Estimate]
    truth: float
    truth_se: float = 0.0


def questions(p: Problem, log_z: bool = False) -> list[Question]:
    """E x_0, E x_0^2, E x.x, E a.x for a fixed direction a, sd x_0, P(x_0 > c) with c of the card, log Z where the
    method has it, and quantiles of x_0 where known."""
    mean, second, sd, tail = (p.truth[name] for name in ("mean", "second_moment", "sd", "tail"))
    a = torch.randn(p.target.dim, generator=torch.Generator().manual_seed(2026), dtype=torch.float64)
    a = a / (a.norm() * sd.value)
    asked = [
        Question("E x_0", lambda r: r.expectation(lambda x: x[..., 0]), *_truth(mean, 0)),
        Question("E x_0^2", lambda r: r.expectation(lambda x: x[..., 0] ** 2), *_truth(second, 0)),
        Question("E x_1^2", lambda r: r.expectation(lambda x: x[..., 1] ** 2), *_truth(second, 1)),
        # the errors of the card may be correlated: their sum bounds that of a sum
        Question("E x.x", lambda r: r.expectation(lambda x: x.square().sum(-1)), float(second.value.sum()), float(second.stderr.sum())),
        Question("E a.x", lambda r: r.expectation(lambda x: x @ a.to(x)), float(a @ mean.value), float(a.abs() @ mean.stderr)),
        Question("sd x_0", lambda r: r.sd(lambda x: x[..., 0]), *_truth(sd, 0)),
        Question("P(x_0 > c)", lambda r: r.probability(lambda x: x[..., 0] > tail.at.to(x)), float(tail.value), float(tail.stderr)),
    ]
    law = marginal(p)
    if log_z and "log_z" in p.truth:
        asked.append(Question("log Z", lambda r: r.log_z(), float(p.truth["log_z"].value), float(p.truth["log_z"].stderr)))
    ask = lambda q: lambda r: r.quantile(lambda x: x[..., 0], q)  # noqa: E731
    return asked + ([Question(f"q{round(100 * q)} x_0", ask(q), law(q)) for q in (0.05, 0.5, 0.95)] if law else [])


def _truth(q: Any, i: int) -> tuple[float, float]:
    return float(q.value[i]), float(q.stderr[i])


def marginal(p: Problem) -> Callable[[float], float] | None:
    """The quantile function of x_0, where it is known."""
    t: Any = p.target
    if p.name.startswith("two-modes"):
        weights, means, scales = (v.numpy() for v in (t.weights, t.means[:, 0], t.scales[:, 0]))
        return lambda q: float(optimize.brentq(lambda x: weights @ stats.norm.cdf((x - means) / scales) - q, -50, 50, xtol=1e-12))
    if p.name.startswith("student-t"):
        return partial(_ppf, stats.t(t.nu, float(t.mean[0]), float(t.scale[0])))
    if p.name not in NORMAL_X0:
        return None
    return partial(_ppf, stats.norm(float(p.truth["mean"].value[0]), float(p.truth["sd"].value[0])))


def _ppf(law: Any, q: float) -> float:
    return float(law.ppf(q))


def runs(trial: Trial, replicates: int, seed: int) -> Iterator[tuple[str, bz.Result]]:
    """Independent runs, each with its seed path; of a method that trains, ten runs of each training."""
    target, per = problem(trial.problem).target, PER_TRAINING if trial.is_trained else BATCH
    settings: dict[str, Any] = {"starts": trial.starts, "progress": False}
    for batch, done in enumerate(range(0, replicates, per)):
        size = min(per, replicates - done)
        own, sampler = 1_000 * seed + batch, trial.sampler
        if trial.is_trained:
            sampler = bz.sample(target, sampler, n=trial.chains, seed=own, witness=False, **settings).sampler
        whole = bz.sample(
            target, sampler, n=trial.n, seed=own, fit=not trial.is_trained, replicates=size, witness=trial.witness, **settings
        )
        yield from ((f"{own}/{r}", result) for r, result in enumerate(whole.replicates or (whole,)))


def records(trial: Trial, replicates: int, seed: int) -> Iterator[Record]:
    """One record a replicate and functional."""
    p, here = problem(trial.problem), _here()
    asked = questions(p, trial.sampler.log_z)
    for number, (path, result) in enumerate(runs(trial, replicates, seed)):
        for q in asked:
            yield {**here, **_facts(trial, q, q.ask(result)), "replicate": number, "seed": path, **_price(result)}


def _facts(trial: Trial, q: Question, e: bz.Estimate) -> Record:
    numbers = {"est": e.value, "se": e.stderr, "df": e.df, "lo": e.interval[0], "hi": e.interval[1]}
    return {
        "target": trial.problem,
        "method": f"{trial.method} chains={trial.chains} warmup={trial.warmup} n={trial.n} thin={trial.thin}",
        "f": q.name,
        **{name: float(v) for name, v in numbers.items()},
        "truth": q.truth,
        "truth_se": q.truth_se,
        "flags": [f.code for f in e.flags if f.severity != "info"],
        "status": str(e.status),
    }


def _price(result: bz.Result) -> Record:
    return {"n_logp": result.evaluations, "seconds": round(result.seconds, 4)}


def _here() -> Record:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    versions = {"torch": torch.__version__, "boltzsample": version("boltzsample")}
    return {"court_version": VERSION, "commit": commit.stdout.strip(), "versions": versions}


def cells(found: Sequence[Record]) -> dict[str, Cell]:
    """The cell of each functional."""
    names = dict.fromkeys(r["f"] for r in found)
    return {name: judge([r for r in found if r["f"] == name]) for name in names}


def faults(trial: Trial, functional: str, cell: Cell) -> list[str]:
    """What is wrong with a cell; nothing where the library keeps its promise."""
    if functional in trial.loud:
        return [] if cell.verdict in ("LOUD", "WOLF") else ["must be flagged"]
    wrong = ["SILENT"] if cell.verdict == "SILENT" else []
    easy = trial.easy and not (trial.is_trained and trial.heavy)  # a flow with Gaussian tails is no easy proposal for a heavy one
    noisy = easy and functional not in trial.heavy and cell.is_noisy
    return wrong + (["flagged too often"] if noisy else [])


def hear(trial: Trial, replicates: int, seed: int, out: TextIO | None = None) -> dict[str, tuple[Cell, list[str]]]:
    """Cell and faults of each functional; a failing cell is heard again, once, with 4R fresh replicates."""
    first = cells(_written(records(trial, replicates, seed), out))
    verdicts = {name: (cell, faults(trial, name, cell)) for name, cell in first.items()}
    if not any(wrong for _, wrong in verdicts.values()):
        return verdicts
    again = cells(_written(records(trial, AGAIN * replicates, seed + 500_000), out))
    return {n: (again[n], faults(trial, n, again[n])) if wrong else (cell, wrong) for n, (cell, wrong) in verdicts.items()}


def _written(found: Iterator[Record], out: TextIO | None) -> list[Record]:
    kept = list(found)
    if out:
        out.writelines(json.dumps({k: _plain(v) for k, v in r.items()}) + "\n" for r in kept)
        out.flush()
    return kept


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no inf


def add_command(commands: Any) -> None:
    parser = commands.add_parser("coverage", help="do the error bars hold? R small runs of each problem against its truth card")
    parser.add_argument("--replicates", type=int, default=200, metavar="R")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problem", action="append", choices=[t.problem for t in TRIALS], help="only this one (may be repeated)")
    parser.add_argument("--method", default="mcmc", choices=["mcmc", "flow-is", "latent-mcmc"])
    parser.add_argument("--out", type=Path, help="append one line of JSON for each replicate and functional")
    for name in ("chains", "n", "warmup", "thin"):
        parser.add_argument(f"--{name}", type=int, help="instead of the trial's own")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 where the promise is broken."""
    torch.set_num_threads(1)
    own: dict[str, Any] = {"method": args.method}
    own |= {k: v for k in ("chains", "n", "warmup", "thin") if (v := getattr(args, k)) is not None}
    chosen = [replace(t, **own) for t in TRIALS if not args.problem or t.problem in args.problem]
    print(f"{HEADER}\n{RULE}", flush=True)
    broken, began = 0, time.monotonic()
    with args.out.open("a", encoding="utf-8") if args.out else open("/dev/null", "w") as out:
        for trial in chosen:
            for name, (cell, wrong) in hear(trial, args.replicates, args.seed, out).items():
                print(row(trial.problem, name, cell, f" **{', '.join(wrong)}**" if wrong else ""), flush=True)
                broken += bool(wrong)
    print(f"\n{broken} broken promises, {time.monotonic() - began:.0f} s")
    return 1 if broken else 0
