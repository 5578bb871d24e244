"""diffusion with its defaults over seeds: path bounds, effective share, log Z, modes, cost.

Every seed is a run of its own, end to end: pool, training, weighted draws, second look, all evaluations counted. The gap EUBO - ELBO is of
paths of kernels alone (no defensive ones), the upper side from 2,000 exact draws of the zoo's sampler, where there is one, walked back
by the backward kernels: with the 64 levels of the run, and with 128 of the same denoiser, not calibrated. Core seconds are CPU time of
the whole run in one thread. `--step`: seconds of a training step, compiled beside eager, and peak memory.

    python -m benchmarks diffusion --problem gmm40-fab --seeds 0 1 2
    python -m benchmarks diffusion --step
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import boltzsample as bz
from benchmarks import ledger
from boltzsample.samplers.diffusion_pool import NOISE
from boltzsample.samplers.reverse import Reverse, ess
from boltzsample.schedules import VE, Levels
from boltzsample.scores.model import ScoreModel
from boltzsample.streams import Stream
from boltzsample.views import Pullback
from targets import Problem, problem

PROBLEMS = {"gmm40-fab": 10_000, "many-well-d32": 20_000, "funnel-sd3": 10_000, "cancer": 10_000, "ionosphere": 10_000}
LEVELS = (64, 128)
EXACT, PATHS = 2_000, 10_000
VERSION = 1


@dataclass(frozen=True)
class Job:
    """One run; its fields are the key of its line."""

    problem: str
    seed: int
    n: int
    version: int = VERSION


KEY = tuple(Job.__dataclass_fields__)


def walked(p: Problem, model: ScoreModel, K: int, seed: int) -> dict[str, float]:
    """ELBO, EUBO and the effective share of K levels of a trained denoiser; of its own levels with its own calibration."""
    assert p.exact_sampler is not None
    x = p.exact_sampler(EXACT, torch.Generator().manual_seed(90_000 + seed)).double()
    view, z, rng = Pullback(p.target, model.map), model.map.pull(x), Stream(seed).child("benchmark", K).rng()
    levels = Levels.even(VE(1e-4, 1e4), NOISE, float(model.levels.sigma[-2] / model.levels.alpha[-2]), K - 1).to_data()
    with torch.no_grad():
        paths = model.reverse if levels.steps == model.levels.steps else Reverse(model.net, levels)
        forth, back = paths.draw(PATHS, p.target.dim, rng), paths.back(z, rng)
        lower, upper = forth.log_ratio + view.log_prob(forth.x), back.log_ratio + view.log_prob(z)
    return {f"elbo {K}": float(lower.mean()), f"eubo {K}": float(upper.mean()), f"ess {K}": ess(lower)}


def measure(job: Job) -> ledger.Record:
    """The line of one run."""
    p, began = problem(job.problem), time.process_time()
    r = bz.sample(p.target, "diffusion", n=job.n, seed=job.seed, progress=False)
    core, est, model = time.process_time() - began, r.log_z(), r.sampler.models[0]
    assert r.draws.log_weight is not None
    found: dict[str, Any] = {"log_z": float(est.value), "stderr": float(est.stderr), "ess": ess(r.draws.log_weight.flatten())}
    found["flow"] = r.sampler.flows[0] is not None
    if p.exact_sampler is not None and not found["flow"]:
        for K in LEVELS:
            found |= walked(p, model, K, job.seed)
    if (modes := p.truth.quantities.get("mode_weights")) is not None:
        w = torch.softmax(r.draws.log_weight.flatten(), 0)
        found["modes"] = int(((w[:, None] * modes.f(r.draws.x[:, 0])).sum(0) > 0).sum())
    spent = {"evaluations": r.evaluations, "core": core, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    flags = {f.code: f.severity for f in r.flags}
    return {**asdict(job), **ledger.here(), "threads": torch.get_num_threads(), **found, "status": str(r.status), **spent, "flags": flags}


HEAD = (
    "problem | runs | ok/caution/untrusted | log Z: rms error | bar | ESS % (least) | gap at 64 levels (most) | path ESS % "
    "| gap at 128 (most) | path ESS % | modes | evaluations | core s (most) | MB"
)


def row(name: str, found: list[ledger.Record]) -> str:
    """One line of the table."""
    truth = float(problem(name).truth["log_z"].value)
    rms = math.sqrt(statistics.fmean((float(r["log_z"]) - truth) ** 2 for r in found))
    counts = "/".join(str(sum(r["status"] == s for r in found)) for s in ("ok", "caution", "untrusted"))
    shares = [100 * float(r["ess"]) for r in found]
    cells = []
    for K in LEVELS:
        gaps = [float(r[f"eubo {K}"]) - float(r[f"elbo {K}"]) for r in found if f"elbo {K}" in r]
        paths = [100 * float(r[f"ess {K}"]) for r in found if f"elbo {K}" in r]
        cells += [f"{statistics.fmean(gaps):.3f} ({max(gaps):.3f})", f"{statistics.median(paths):.0f}"] if gaps else ["", ""]
    modes = str(min(r["modes"] for r in found)) if "modes" in found[0] else ""
    core, rows, memory = ([float(r[key]) for r in found] for key in ("core", "evaluations", "megabytes"))
    bar = statistics.fmean(float(r["stderr"]) for r in found)
    cost = f"{statistics.median(rows):.2e} | {statistics.median(core):.0f} ({max(core):.0f}) | {max(memory):.0f}"
    share = f"{statistics.median(shares):.0f} ({min(shares):.0f})"
    return f"| {name} | {len(found)} | {counts} | {rms:.4f} | {bar:.4f} | {share} | {' | '.join(cells)} | {modes} | {cost} |"


# ---- the training step ----


def steps(dim: int, batch: int, repeats: int) -> str:
    """Median seconds of a training step (loss, gradient, Adam), eager and compiled, in turns."""
    from boltzsample.backend import Backend
    from boltzsample.progress import Interrupt, Progress
    from boltzsample.samplers.sampler import Budget, Ledger, Run
    from boltzsample.samplers.starts import Starts
    from boltzsample.scores.pool import DTYPE, Pool
    from boltzsample.scores.training import Lesson, ScoreTraining

    z = torch.randn(20_000, dim, generator=torch.Generator().manual_seed(0))
    pool = Pool(z, -z, None, None, torch.arange(len(z)), 0.1, NOISE)
    run = Run(Backend(), Stream(0), Starts(None), Ledger(), Budget(), Progress(False), Interrupt())
    compiled = replace(run, backend=Backend(compile=True))
    lessons = [Lesson(*pool.split(Stream(0).rng()), ScoreTraining(batch=batch), r) for r in (run, compiled)]
    began = time.perf_counter()
    lessons[1].step_once(Stream(0).rng(DTYPE), 1.0)
    compiling, pairs = time.perf_counter() - began, []
    for i in range(repeats):
        took = {}
        for k in (0, 1) if i % 2 else (1, 0):
            rng, began = Stream(i).rng(DTYPE), time.perf_counter()
            for _ in range(20):
                lessons[k].step_once(rng, 1.0)
            took[k] = (time.perf_counter() - began) / 20
        pairs.append((took[0], took[1]))
    eager, fast, ratio = (statistics.median(v) for v in zip(*((a, b, a / b) for a, b in pairs), strict=True))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return f"| d={dim} | {batch} | {1e3 * eager:.2f} | {1e3 * fast:.2f} | {ratio:.2f} | {compiling:.0f} | {memory:.0f} |"


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    if args.step:
        print("| target | batch | eager, ms a step | compiled | ratio | compiling, s | peak MB |\n|---|---|---|---|---|---|---|")
        for dim in (2, 32):
            for batch in (512, 1024):
                print(steps(dim, batch, args.repeats), flush=True)
        return 0
    print(f"| {HEAD} |\n{'|---' * (HEAD.count('|') + 1)}|")
    known = ledger.latest(ledger.read(args.ledger)[0], KEY)
    for name in args.problem:
        found = []
        for seed in args.seeds:
            job = Job(name, seed, args.n or PROBLEMS[name])
            key = ledger.key(asdict(job), KEY)
            if key not in known and not args.table:
                known[key] = measure(job)
                ledger.append(args.ledger, known[key])
            found += [known[key]] if key in known else []
        if found:
            print(row(name, found), flush=True)
    return 0


def add_command(commands: Any) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("diffusion", help="diffusions: path bounds, ESS, log Z", description=__doc__, formatter_class=formatter)
    parser.add_argument("--problem", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(16)), metavar="S")
    parser.add_argument("--n", type=int, help="draws (default: by problem)")
    parser.add_argument("--step", action="store_true", help="instead: seconds of a training step, compiled beside eager")
    parser.add_argument("--repeats", type=int, default=9, help="of --step")
    parser.add_argument("--table", action="store_true", help="only what the ledger has")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ledger", type=Path, default=Path("diffusion.jsonl"), metavar="PATH")
    parser.set_defaults(run=run)
