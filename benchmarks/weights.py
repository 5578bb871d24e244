"""How good a trained flow is as a proposal, and at what price: the ESS of its weights, log Z by two ways, Laplace's beside.

    python -m benchmarks weights                                   # funnel, cancer, German credit; seeds 0-4; minutes each
    python -m benchmarks weights --problem cancer --seeds 0 1 --ledger weights.jsonl

flow-is          bz.sample(method="flow-is", n=10_000) with its defaults: search, pilots, training, draws, second look, all counted
one round        the same with Training(rounds=1): what a quarter of the steps buys
12 couplings     flow-is with a flow of one's own, 12 couplings in Laplace's units, no pilots
latent-mcmc      the same with method="latent-mcmc": its log Z is by bridge sampling between chains and flow
Laplace          10,000 draws of Laplace's approximation N(x*, H^-1) at the best optimum of 32 ascents, weighted

ESS is Kish's, (sum w)^2 / sum w^2, in percent of the draws. Seconds are those of the core (CPU time): with one thread the wait on an idle
machine, whatever else runs. Runs are kept in a ledger, as those of the suite. Exit code 1: no flow of them has a
median ESS of --least, or two ways to log Z further than four joint errors apart.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import boltzsample as bz
from benchmarks import ledger
from benchmarks.scores import kish
from boltzsample.ascent import ascend
from boltzsample.flows.families import make_flow
from boltzsample.flows.train import Training
from boltzsample.laplace import Laplace, laplace
from boltzsample.maps import Dense
from boltzsample.streams import Stream
from targets import Problem, problem

PROBLEMS = ("funnel-sd3", "cancer", "german-credit")
CONFLICT = 4.0
FLOWS = ("flow-is", "one round", "12 couplings")


Found = tuple[bz.Result, int]  # and evaluations that its ledger does not know of
KEY = tuple(ledger.Job.__dataclass_fields__)


def flow_is(p: Problem, job: ledger.Job) -> Found:
    return bz.sample(p.target, "flow-is", n=job.n, seed=job.seed, progress=False), 0


def one_round(p: Problem, job: ledger.Job) -> Found:
    return bz.sample(p.target, bz.FlowIS(training=Training(rounds=1)), n=job.n, seed=job.seed, progress=False), 0


def deeper(p: Problem, job: ledger.Job) -> Found:
    hill, rows = best_hill(p, job.seed)
    L = torch.linalg.cholesky(torch.cholesky_inverse(hill.C))
    rng = Stream(job.seed).child("deeper").rng()
    flow = make_flow("realnvp", p.target.dim, rng, layers=12, whitening=Dense(hill.x, L))
    return bz.sample(p.target, bz.FlowIS(flow), n=job.n, seed=job.seed, progress=False), rows


def chains(p: Problem, job: ledger.Job) -> Found:
    return bz.sample(p.target, "latent-mcmc", n=job.n, seed=job.seed, progress=False), 0


def by_laplace(p: Problem, job: ledger.Job) -> Found:
    hill, rows = best_hill(p, job.seed)
    q = torch.distributions.MultivariateNormal(hill.x, precision_matrix=hill.C @ hill.C.T)
    return bz.importance(p.target, q, n=job.n, seed=job.seed, witness=False, progress=False), rows


def best_hill(p: Problem, seed: int) -> tuple[Laplace, int]:
    """Laplace's approximation at the best optimum of 32 ascents from N(0, I), and the evaluations it took."""
    points = Stream(seed).child("laplace").rng().normal(32, p.target.dim)
    climb = ascend(p.target, points, reach=0.1 * points.norm(dim=-1), rounds=1000)
    top = climb.log_p.argmax()
    hill, rows = laplace(p.target, climb.x[top], climb.log_p[top], torch.ones_like(points[0]))
    return hill, rows + climb.rows


WAYS: dict[str, Callable[[Problem, ledger.Job], Found]] = {
    "flow-is": flow_is,
    "one round": one_round,
    "12 couplings": deeper,
    "latent-mcmc": chains,
    "Laplace": by_laplace,
}


def measure(job: ledger.Job) -> ledger.Record:
    """The line of one run."""
    p, began = problem(job.problem), time.process_time()
    r, before = WAYS[job.way](p, job)
    core = time.process_time() - began
    est, flags = r.log_z(), {f.code: f.severity for f in r.flags}
    found = {
        "log_z": float(est.value),
        "stderr": float(est.stderr),
        "log_z_status": str(est.status),
        "ess": kish(r),
        "status": str(r.status),
    }
    spent = {"evaluations": r.evaluations + before, "seconds": r.seconds, "core": core}
    return {**asdict(job), **ledger.here(), "threads": torch.get_num_threads(), **found, **spent, "flags": flags}


def row(name: str, way: str, found: list[ledger.Record]) -> str:
    """One line of the table."""
    truth = problem(name).truth["log_z"]
    ess = [100 * e for r in found if (e := ledger.number(r["ess"])) is not None]
    errors = [float(r["log_z"]) - float(truth.value) for r in found]
    rms, bar = math.sqrt(statistics.fmean(e * e for e in errors)), statistics.fmean(float(r["stderr"]) for r in found)
    shares = f"{statistics.median(ess):.1f} ({min(ess):.1f})" if ess else ""
    seconds, evaluations = ([r[key] for r in found] for key in ("core", "evaluations"))
    spread = max(float(r["log_z"]) for r in found) - min(float(r["log_z"]) for r in found)
    counts = "/".join(str(sum(r["status"] == s for r in found)) for s in ("ok", "caution", "untrusted"))
    cost = f"{statistics.median(seconds):.0f} ({max(seconds):.0f}) | {statistics.median(evaluations):.2e} ({max(evaluations):.2e})"
    return f"| {name} | {way} | {len(found)} | {counts} | {shares} | {rms:.4f} | {bar:.4f} | {spread:.4f} | {cost} |"


def apart(one: list[ledger.Record], other: list[ledger.Record]) -> float:
    """The largest distance of two estimates of log Z of one seed, in joint standard errors."""
    pairs = [(a, b) for a in one for b in other if a["seed"] == b["seed"]]
    joint = [(float(a["log_z"]) - float(b["log_z"])) / math.hypot(float(a["stderr"]), float(b["stderr"])) for a, b in pairs]
    return max((abs(z) for z in joint), default=math.nan)


HEAD = "problem | way | runs | ok/caution/untrusted | ESS % (least) | log Z: rms error | bar | spread | core s (most) | evaluations (most)"


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    print(f"| {HEAD} |\n{'|---' * (HEAD.count('|') + 1)}|")
    known = ledger.latest(ledger.read(args.ledger)[0], KEY)
    broken, lines = False, []
    for name in args.problem:
        found: dict[str, list[ledger.Record]] = {}
        for way in args.way:
            for seed in args.seeds:
                job = ledger.Job(name, way, seed, args.n)
                key = ledger.key(asdict(job), KEY)
                if key not in known:
                    known[key] = measure(job)
                    ledger.append(args.ledger, known[key])
                found.setdefault(way, []).append(known[key])
            print(row(name, way, found[way]), flush=True)
        if {"flow-is", "latent-mcmc"} <= found.keys():
            worst = apart(found["flow-is"], found["latent-mcmc"])
            lines.append(f"{name}: importance sampling and bridge sampling at most {worst:.1f} joint errors apart")
            broken |= not worst <= CONFLICT
        medians = [statistics.median(100 * float(r["ess"]) for r in found[way]) for way in FLOWS if way in found]
        broken |= bool(medians) and max(medians) < args.least
    print("", *lines, sep="\n")
    return int(broken)


def add_command(commands: Any) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("weights", help="trained flows as proposals: ESS, log Z", description=__doc__, formatter_class=formatter)
    parser.add_argument("--problem", nargs="+", default=PROBLEMS, metavar="NAME")
    parser.add_argument("--way", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), metavar="S")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--least", type=float, default=95.0, help="percent of ESS wanted of a flow (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ledger", type=Path, default=Path("weights.jsonl"), metavar="PATH")
    parser.set_defaults(run=run)
