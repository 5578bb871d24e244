"""Four real posteriors: worst-coordinate bulk ESS per second of `mcmc`, beside numpyro's NUTS in the same run.

    OMP_NUM_THREADS=2 python -m benchmarks posteriors                     # the four regressions, medians of 3, threads 2
    python -m benchmarks posteriors --problem cancer --repeats 5 --out posteriors.jsonl

The same density on both sides (prior, likelihood, standardized data), the same ESS (arviz, bulk, the smallest over coordinates).
Ours is bz.sample(method="mcmc") with its defaults in float64 and in float32, and compiled; theirs NUTS with its defaults: 4 chains,
vectorized, float32, 1000 steps of warm-up and 1000 draws. Every repeat runs all of them, in turn forwards and backwards, each with
a fresh seed. Medians; seconds are apart:

    compile   tracing and compiling as torch and jax report it, of the first run, with nothing cached on disk
    warm-up   all else before the first draw: search for starts, pilot, adaptation
    sampling  making the draws; ESS/s stands on these seconds alone, "with warm-up" on both
    audit     ours only: after the draws, a second look for missed modes

"ESS 4000 after" is compile + warm-up + 4000/(ESS/s) + audit: the wait in a fresh process, imports left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import boltzsample as bz
from benchmarks import ledger
from targets import Problem, problem

REGRESSIONS = ("cancer", "german-credit", "ionosphere", "sonar")
GOAL = 4_000  # the ESS that the last column waits for
DRAWS = 64_000  # of ours: 250 for each of 256 chains
NUTS = {"num_warmup": 1_000, "num_samples": 1_000, "num_chains": 4}
PEER = "NUTS float32 (numpyro)"
HEADER = (
    "| problem | sampler | ESS/s | of NUTS | with warm-up | ESS | compile s | warm-up s | sampling s | audit s | ESS 4000 after s "
    "| error of a mean (sd) |"
)


class Timed(NamedTuple):
    """One run: its draws (chains, draws, dim) and where its seconds went."""

    x: np.ndarray
    compile: float
    warm_up: float
    sampling: float
    audit: float = 0.0


Contestant = Callable[[int], Timed]  # seed -> a run


# ---- ours ----


@cache
def torch_compiles() -> list[list[float]]:
    """[begin, end] of every compilation from now on, in seconds of time.monotonic."""
    from torch._dynamo.callback import callback_handler  # the only door to when, not only how long

    spans: list[list[float]] = []
    callback_handler.register_start_callback(lambda _: spans.append([time.monotonic(), time.monotonic()]))
    callback_handler.register_end_callback(lambda _: spans[-1].__setitem__(1, time.monotonic()))
    return spans


def ours(p: Problem, dtype: torch.dtype, compile: Any, n: int, seed: int) -> Timed:
    """bz.sample; its own clock tells the phases apart, and compilations are taken out of the phase in which they fall."""
    spans = torch_compiles()
    spans.clear()
    result = bz.sample(p.target, method="mcmc", n=n, seed=seed, dtype=dtype, compile=compile, progress=False)
    ended, seconds = time.monotonic(), dict(result.draws.seconds)
    sampling, audit = seconds.pop("sampling"), seconds.pop("witness", 0.0)
    first_draw = ended - audit - sampling
    before = sum(end - begin for begin, end in spans if begin < first_draw)
    during = sum(end - begin for begin, end in spans if begin >= first_draw)
    return Timed(result.draws.x.double().numpy(), before + during, sum(seconds.values()) - before, sampling - during, audit)


# ---- theirs ----


@cache
def jax_compiles() -> list[float]:
    """Seconds of every tracing, lowering and compilation of jax from now on."""
    import jax

    spent: list[float] = []

    def listen(name: str, seconds: float, **_: Any) -> None:
        if name.startswith("/jax/core/compile/"):
            spent.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return spent


def nuts(p: Problem, seed: int) -> Timed:
    """NUTS of numpyro in float32 on the same sum, starts uniform on (-2, 2)."""
    import jax
    import numpyro  # type: ignore[import-untyped]
    from numpyro import infer

    numpyro.enable_x64(False)
    key, start = jax.random.split(jax.random.PRNGKey(seed))
    x0 = jax.random.uniform(start, (NUTS["num_chains"], p.target.dim), minval=-2.0, maxval=2.0)
    chains = infer.MCMC(infer.NUTS(potential_fn=potential(p)), chain_method="vectorized", progress_bar=False, **NUTS)
    warm_up, before = _clocked(lambda: chains.warmup(key, init_params=x0), chains)
    sampling, during = _clocked(lambda: chains.run(jax.random.split(key)[0]), chains)
    return Timed(np.asarray(chains.get_samples(group_by_chain=True), dtype=float), before + during, warm_up, sampling)


def potential(p: Problem) -> Callable[[Any], Any]:
    """-log_prob of the regression up to a constant, in jax."""
    import jax
    from jax import numpy as jnp

    target: Any = p.target
    rows, precision = jnp.asarray(target.signed.numpy(), jnp.float32), 1 / target.prior_sd**2
    return lambda w: 0.5 * precision * (w * w).sum() - jax.nn.log_sigmoid(rows @ w).sum()


def _clocked(work: Callable[[], Any], chains: Any) -> tuple[float, float]:
    """Seconds without and of compiling."""
    import jax

    spent = jax_compiles()
    spent.clear()
    began = time.monotonic()
    work()
    jax.block_until_ready(chains.last_state.z)
    took = time.monotonic() - began
    return took - sum(spent), sum(spent)


# ---- the table ----


def contestants(p: Problem, n: int) -> dict[str, Contestant]:
    """Who runs, by name."""
    return {
        "mcmc float64": partial(ours, p, torch.float64, "auto", n),
        "mcmc float32": partial(ours, p, torch.float32, "auto", n),
        "mcmc float32, compiled": partial(ours, p, torch.float32, True, n),
        PEER: partial(nuts, p),
    }


def worst_ess(x: np.ndarray) -> float:
    """The smallest bulk ESS over coordinates. x: (chains, draws, dim)."""
    import arviz

    return min(float(arviz.ess(x[:, :, i], method="bulk")) for i in range(x.shape[2]))


def repeats(p: Problem, n: int, count: int, seed: int) -> Iterator[ledger.Record]:
    """A line for every run; the order is turned round from one repeat to the next."""
    running = list(contestants(p, n).items())
    mean, sd = p.truth["mean"].value.numpy(), p.truth["sd"].value.numpy()
    for repeat in range(count):
        for name, contestant in running if repeat % 2 == 0 else reversed(running):
            run = contestant(1_000 * seed + repeat)
            ess, seconds = worst_ess(run.x), run._asdict()
            off = float(np.abs((run.x.mean((0, 1)) - mean) / sd).max())
            del seconds["x"]
            yield {"problem": p.name, "sampler": name, "repeat": repeat, "draws": run.x[..., 0].size, "ess": ess, **seconds, "error": off}


def rows(found: Sequence[ledger.Record]) -> Iterator[str]:
    """The lines of one problem's table."""
    peer = {r["repeat"]: _rate(r) for r in found if r["sampler"] == PEER}
    for name in dict.fromkeys(r["sampler"] for r in found):
        runs = [r for r in found if r["sampler"] == name]
        of = {key: statistics.median(r[key] for r in runs) for key in ("warm_up", "sampling", "audit", "ess", "error")}
        compiling = next(r["compile"] for r in runs if r["repeat"] == 0)
        rate, warm = (statistics.median(map(f, runs)) for f in (_rate, _rate_with_warm_up))
        ratio = statistics.median(_rate(r) / peer[r["repeat"]] for r in runs)
        wait = compiling + of["warm_up"] + GOAL / rate + of["audit"]
        rates = f"{rate:.0f} | {ratio:.2f} | {warm:.0f} | {of['ess']:.0f}"
        seconds = f"{compiling:.1f} | {of['warm_up']:.2f} | {of['sampling']:.2f} | {of['audit']:.2f} | {wait:.1f}"
        yield f"| {found[0]['problem']} | {name} | {rates} | {seconds} | {of['error']:.3f} |"


def _rate(r: ledger.Record) -> float:
    return float(r["ess"] / r["sampling"])


def _rate_with_warm_up(r: ledger.Record) -> float:
    return float(r["ess"] / (r["sampling"] + r["warm_up"]))


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if find_spec("numpyro") is None:
        print("NUTS runs in numpyro, which is not installed; install it with: pip install 'boltzsample[bench]'", file=sys.stderr)
        return 1
    torch.set_num_threads(args.threads)
    here = {**ledger.here(), "threads": args.threads, "jax": version("jax"), "numpyro": version("numpyro")}
    print(f"threads {args.threads} of {os.cpu_count()}, torch {torch.__version__}, jax {here['jax']}, numpyro {here['numpyro']}", end=", ")
    print(f"{here['machine']['processor']}, commit {here['commit']}, medians of {args.repeats}\n")
    print(f"{HEADER}\n{'|---' * (HEADER.count('|') - 1)}|", flush=True)
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty  # what an earlier run left there would make compiling look short
        for name in args.problem or REGRESSIONS:
            found = []
            for r in repeats(problem(name), args.n, args.repeats, args.seed):
                found.append(r)
                if args.out:
                    ledger.append(args.out, {**r, **here, "n": args.n})
            print(*rows(found), sep="\n", flush=True)
    return 0


def add_command(commands: Any) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    about = "ESS per second on four real posteriors, beside numpyro's NUTS (extra `bench`)"
    parser = commands.add_parser("posteriors", help=about, description=__doc__, formatter_class=formatter)
    parser.add_argument("--problem", nargs="+", choices=REGRESSIONS, metavar="NAME", help=f"default: {' '.join(REGRESSIONS)}")
    parser.add_argument("--n", type=int, default=DRAWS, help="draws of ours (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of torch; jax takes the cores it finds (bind with taskset)")
    parser.add_argument("--out", type=Path, help="append one line of JSON for each run")
    parser.set_defaults(run=run)
