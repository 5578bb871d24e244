"""slips and rdmc beside their rivals: weights of far modes from a pool with wrong weights, and posteriors at equal evaluations.

    python -m benchmarks localization --set pools                  # two unequal modes, straight and curved, d = 32 and 64; 16 seeds
    python -m benchmarks localization --set posteriors             # funnel, rings, cancer, ionosphere, phi^4, n = 2048
    python -m benchmarks localization --set modes                  # eight Gaussians: total variation, unweighted and weighted

pools        The pool is made by chains from the modes, which are given, four of five chains in the *smaller* mode: 20% where 67% is right.
             Printed: the mean absolute error of the larger mode's mass (truth 2/3) in percent of it, the mean bar in points, the least
             and the median ESS, the most evaluations (those of the pool included), the RMS error of log Z.
    slips            bz.sample(SLIPS(), data=pool); pilots weigh the modes anew before the paths are drawn
    slips, kept      SLIPS(reshare=False): the paths start with the wrong weights and nothing but their own repairs them
    mixture-is, smc  from nothing, with their defaults
posteriors   slips with its defaults, then smc and tempering with as many evaluations (draws too, if 2048 take fewer), then mixture-is,
             slips(weights=False) and rdmc with their defaults:
             the worst |z| over the truth card (median of the seeds; all else means), sliced KS of 2000 draws and its floor, log Z's error
             and bar.
modes        total variation of the modes' masses over its floor, evaluations for each draw.

Runs are lines of a ledger; what is there is not run again. `--seeds`, `--problem`, `--way` choose.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import boltzsample as bz
from benchmarks import ledger
from benchmarks.scores import accuracy, evidence, kish, modes, quality
from targets import Problem, problem
from targets.curved import two_modes_curved

N = {"two-modes-d32": 10_000, "two-modes-curved": 10_000, "two-modes-d64": 20_000, "two-modes-curved-d64": 20_000}
POSTERIORS = ("funnel-sd3", "rings-slips", "cancer", "ionosphere", "phi4-b0.025")
FEW = 2048
FULL, MOST = 0.7, 50  # of the evaluations that a rival may have: with fewer it is run again, for more draws, up to so many times as many
KEY = tuple(ledger.Job.__dataclass_fields__)


def of(name: str) -> Problem:
    return two_modes_curved(64) if name == "two-modes-curved-d64" else problem(name)


def pool(p: Problem, seed: int) -> bz.Result:
    """2000 draws of chains that stay in the modes where they start, four fifths of them in the smaller one."""
    at = torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)[:, None].expand(-1, p.target.dim)
    return bz.sample(p.target, bz.MCMC(chains=100, warmup=100), n=2_000, starts=at, seed=seed, witness=False, progress=False)


def from_pool(sampler: bz.SLIPS) -> Callable[[Problem, ledger.Job, int], tuple[bz.Result, int]]:
    def run(p: Problem, job: ledger.Job, budget: int) -> tuple[bz.Result, int]:
        points = pool(p, job.seed)
        done = bz.sample(p.target, sampler, n=job.n, seed=job.seed, data=points.draws, witness=False, progress=False)
        return done, points.evaluations

    return run


def plain(method: Any, equal: bool = False) -> Callable[[Problem, ledger.Job, int], tuple[bz.Result, int]]:
    def run(p: Problem, job: ledger.Job, budget: int) -> tuple[bz.Result, int]:
        limit = budget if equal and budget else None
        n = job.n
        done = bz.sample(p.target, method, n=n, seed=job.seed, budget=limit, progress=False)
        while limit and done.evaluations < FULL * limit and n < MOST * job.n:
            n = min(int(n * limit / done.evaluations), MOST * job.n)
            done = bz.sample(p.target, method, n=n, seed=job.seed, budget=limit, progress=False)
        return done, 0

    return run


WAYS: dict[str, Callable[[Problem, ledger.Job, int], tuple[bz.Result, int]]] = {
    "slips": from_pool(bz.SLIPS()),
    "slips, kept": from_pool(bz.SLIPS(reshare=False)),
    "mixture-is": plain("mixture-is"),
    "smc": plain("smc"),
    "slips, explored": plain("slips"),
    "smc, equal": plain("smc", equal=True),
    "tempering, equal": plain("tempering", equal=True),
    "mixture-is, n": plain("mixture-is"),
    "unweighted": plain(bz.SLIPS(weights=False)),
    "rdmc": plain("rdmc"),
}
SETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pools": (tuple(N), ("slips", "slips, kept", "mixture-is", "smc")),
    "posteriors": (POSTERIORS, ("slips, explored", "smc, equal", "tempering, equal", "mixture-is, n", "unweighted", "rdmc")),
    "modes": (("eight-gaussians",), ("slips, explored", "unweighted", "rdmc", "mixture-is, n")),
}


def measure(job: ledger.Job, budget: int) -> ledger.Record:
    """The line of one run."""
    p = of(job.problem)
    r, before = WAYS[job.way](p, job, budget)
    found = {"evaluations": r.evaluations + before, "seconds": r.seconds, "status": str(r.status), "ess": kish(r)}
    found |= {"flags": sorted({f.code for f in r.flags if f.severity != "info"})}
    if job.problem in N:  # normalized: log Z = 0; the modes are told apart by the sign of the mean coordinate
        e, z = r.probability(lambda x: x.mean(-1) < 0), r.log_z()
        found |= {"mass": float(e.value), "mass_bar": float(e.stderr), "mass_status": str(e.status)}
        found |= {"log_z_error": float(z.value), "log_z_stderr": float(z.stderr)}
    else:
        found |= {**accuracy(p, r), **evidence(p, r), **modes(p, r), **quality(p, r)}
    return {**asdict(job), **ledger.here(), "threads": torch.get_num_threads(), **found}


def pool_row(name: str, way: str, found: list[ledger.Record]) -> str:
    error = [100 * abs(r["mass"] - 2 / 3) / (2 / 3) for r in found]
    bars, ess = [100 * r["mass_bar"] for r in found], [100 * r["ess"] for r in found if r["ess"] is not None]
    z = math.sqrt(statistics.fmean(float(r["log_z_error"]) ** 2 for r in found)) if found[0]["log_z_error"] is not None else math.nan
    share = f"{min(ess):.0f} / {statistics.median(ess):.0f}" if way.startswith(("slips", "mix")) else ""
    said = ", ".join(f"{k} {v}" for k, v in Counter(r["mass_status"] for r in found).most_common())
    cells = [f"{statistics.fmean(error):.2f}", f"{statistics.fmean(bars):.2f}", share, f"{max(r['evaluations'] for r in found):.2e}"]
    cells += [f"{z:.3f}", said, f"{statistics.median(r['seconds'] for r in found):.0f}"]
    return f"| {name} | {way} | {len(found)} | {' | '.join(cells)} |"


def run_row(name: str, way: str, found: list[ledger.Record]) -> str:
    def mean(key: str, form: str, of: Callable[[list[float]], float] = statistics.fmean) -> str:
        numbers = [v for r in found if (v := ledger.number(r.get(key))) is not None]
        return format(of(numbers), form) if numbers else ""

    def middle(key: str) -> str:  # an event met by draws of weight e^-600 alone has a z without end
        return mean(key, ".1f", statistics.median)

    said = ", ".join(f"{k} {v}" for k, v in Counter(r["status"] for r in found).most_common())
    excess = [r["mode_tv"] / r["mode_tv_floor"] for r in found if ledger.number(r.get("mode_tv")) is not None]
    cells = [middle("worst_z"), middle("worst_z_ok"), mean("sliced_ks", ".4f"), mean("sliced_ks_floor", ".4f")]
    cells += [mean("log_z_error", ".3f"), mean("log_z_stderr", ".3f"), f"{statistics.fmean(excess):.2f}" if excess else ""]
    cells += [mean("ess", ".2f"), mean("evaluations", ".2e"), said, mean("seconds", ".0f")]
    return f"| {name} | {way} | {len(found)} | " + " | ".join(cells) + " |"


POOL_HEAD = "problem | way | runs | error % | bar, points | ESS % least / median | evaluations, most | log Z: RMS | the mass is | seconds"
RUN_HEAD = "problem | way | runs | worst z | of ok | sliced KS | floor | log Z error | bar | TV / floor | ESS | evaluations | status | s"


def run(args: argparse.Namespace) -> int:
    """Run what the ledger lacks, then print the table of what was asked for."""
    torch.set_num_threads(args.threads)
    names, ways = SETS[args.set]
    head = POOL_HEAD if args.set == "pools" else RUN_HEAD
    print(f"| {head} |\n{'|---' * (head.count('|') + 1)}|", flush=True)
    known = ledger.latest(ledger.read(args.ledger)[0], KEY)
    for name in args.problem or names:
        for way in args.way or ways:
            found = []
            for seed in args.seeds:
                job = ledger.Job(name, way, seed, N.get(name, FEW))
                key = ledger.key(asdict(job), KEY)
                if key not in known:
                    slips = known.get(ledger.key({**asdict(job), "way": "slips, explored"}, KEY), {})
                    known[key] = measure(job, int(slips.get("evaluations", 0)))
                    ledger.append(args.ledger, known[key])
                found.append(known[key])
            print((pool_row if args.set == "pools" else run_row)(name, way, found), flush=True)
    return 0


def add_command(commands: Any) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("localization", help="slips and rdmc beside their rivals", description=__doc__, formatter_class=formatter)
    parser.add_argument("--set", choices=list(SETS), default="pools")
    parser.add_argument("--problem", nargs="+", metavar="NAME")
    parser.add_argument("--way", nargs="+", choices=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(16)), metavar="S")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ledger", type=Path, default=Path("localization.jsonl"), metavar="PATH")
    parser.set_defaults(run=run)
