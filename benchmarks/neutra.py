"""From a cold start to ESS 10,000 on Neal's funnel: `latent-mcmc` beside numpyro's NeuTra in the same run.

    OMP_NUM_THREADS=1 python -m benchmarks neutra --repeats 5
    OMP_NUM_THREADS=1 python -m benchmarks neutra --repeats 1 --seed 3 --ledger neutra.jsonl      # one more repeat to those in the file

Both train an autoregressive or coupling flow by reverse KL and sample the pulled-back density (Hoffman et al. 2019, arXiv:1903.03704).
Theirs: AutoIAFNormal with its defaults, Adam 3e-3 for 10,000 steps of SVI, NeuTraReparam, NUTS with 1000 steps of warm-up and 4
vectorized chains. Ours: bz.sample(method="latent-mcmc") with its defaults. ESS is ArviZ's, bulk and tail, of v; the smaller counts.

    seconds(ESS 10^4) = everything before the first draw, compiling included + 10^4 / (ESS of the draws) * seconds of drawing

A wrong answer is not fast: the bias of E v and sd v and R-hat stand beside. Ours also carries a second look at missed mass ("audit").
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import boltzsample as bz
from benchmarks import ledger
from targets import problem

GOAL = 10_000
DRAWS = 20_000
SVI_STEPS = 10_000


class Timed(NamedTuple):
    """Draws of v (chains, draws), seconds before the first draw, of drawing, and of what came after."""

    v: np.ndarray
    before: float
    drawing: float
    after: float


def ours(seed: int) -> Timed:
    began = time.monotonic()
    result = bz.sample(problem("funnel-sd3").target, "latent-mcmc", n=DRAWS, seed=seed, progress=False)
    whole, s = time.monotonic() - began, result.draws.seconds
    return Timed(result.draws.x[..., 0].numpy(), whole - s["sampling"] - s["witness"], s["sampling"], s["witness"])


def neutra(seed: int) -> Timed:
    """numpyro's NeuTra with AutoIAFNormal on the same funnel: v ~ N(0, 3^2), nine x_i ~ N(0, e^v)."""
    import jax
    import numpyro  # type: ignore[import-untyped]
    from jax import numpy as jnp
    from numpyro import distributions as dist
    from numpyro import infer
    from numpyro.infer.autoguide import AutoIAFNormal  # type: ignore[import-untyped]
    from numpyro.infer.reparam import NeuTraReparam  # type: ignore[import-untyped]

    def model() -> None:
        v = numpyro.sample("v", dist.Normal(0.0, 3.0))
        numpyro.sample("x", dist.Normal(jnp.zeros(9), jnp.exp(v / 2)))

    began = time.monotonic()
    guide = AutoIAFNormal(model)
    svi = infer.SVI(model, guide, numpyro.optim.Adam(3e-3), infer.Trace_ELBO())
    fitted = svi.run(jax.random.PRNGKey(seed), SVI_STEPS, progress_bar=False)
    trained = NeuTraReparam(guide, fitted.params)
    kernel = infer.NUTS(trained.reparam(model))
    chains = infer.MCMC(kernel, num_warmup=1000, num_samples=DRAWS // 4, num_chains=4, chain_method="vectorized", progress_bar=False)
    chains.warmup(jax.random.PRNGKey(seed + 1))
    jax.block_until_ready(chains.last_state.z)
    before = time.monotonic() - began
    began = time.monotonic()
    chains.run(jax.random.PRNGKey(seed + 2))
    z = chains.get_samples(group_by_chain=True)["auto_shared_latent"]
    v = np.asarray(trained.transform_sample(z)["v"], dtype=float)
    return Timed(v, before, time.monotonic() - began, 0.0)


CONTESTANTS: dict[str, Callable[[int], Timed]] = {"latent-mcmc": ours, "numpyro NeuTra-IAF": neutra}


def facts(run: Timed) -> dict[str, float]:
    """The numbers of one run."""
    import arviz

    bulk, tail = (float(arviz.ess(run.v, method=kind)) for kind in ("bulk", "tail"))
    wait = run.before + run.drawing * GOAL / min(bulk, tail)
    return {
        "seconds": wait,
        "before": run.before,
        "drawing": run.drawing,
        "audit": run.after,
        "bulk": bulk,
        "tail": tail,
        "rhat": float(arviz.rhat(run.v)),
        "mean": float(run.v.mean()),
        "sd": float(run.v.std()),
    }


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    known = ledger.latest(ledger.read(args.ledger)[0] if args.ledger else [], ("seed", "threads"))
    for seed in range(args.seed, args.seed + args.repeats):
        order = list(CONTESTANTS.items())
        pair = {name: facts(contestant(seed)) for name, contestant in (order if seed % 2 == 0 else reversed(order))}
        known[seed, args.threads] = {"seed": seed, "threads": args.threads, **ledger.here(), "runs": pair}
        if args.ledger:
            ledger.append(args.ledger, known[seed, args.threads])
    pairs = [r["runs"] for (_, threads), r in sorted(known.items()) if threads == args.threads]
    print(f"funnel d = 10, {len(pairs)} repeats, threads {args.threads}, torch {torch.__version__}; medians (worst seconds)\n")
    print("| sampler | s to ESS 10^4 | before the first draw | drawing | audit | bulk ESS | tail ESS | R-hat | E v | sd v |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    found = {name: [pair[name] for pair in pairs] for name in CONTESTANTS}
    for name, runs in found.items():
        m = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        worst = max(r["seconds"] for r in runs)
        rates = f"{m['before']:.1f} | {m['drawing']:.2f} | {m['audit']:.1f} | {m['bulk']:.0f} | {m['tail']:.0f}"
        print(f"| {name} | {m['seconds']:.1f} ({worst:.1f}) | {rates} | {m['rhat']:.3f} | {m['mean']:.3f} | {m['sd']:.3f} |", flush=True)
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(*found.values(), strict=True)]
    print(f"\nours / theirs, paired: median {statistics.median(ratios):.2f}, worst {max(ratios):.2f}")
    return 0


def add_command(commands: Any) -> None:
    parser = commands.add_parser("neutra", help="seconds from a cold start to ESS 10^4 on the funnel, beside numpyro's NeuTra")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ledger", type=Path, metavar="PATH", help="JSON lines to add to; the table is of all repeats in it")
    parser.set_defaults(run=run)
