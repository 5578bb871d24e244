"""Seconds of one reverse-KL training step of a flow, beside the peers that are installed.

A step draws noise, pushes it, asks the target (a correlated Gaussian) for its gradient, goes back, and moves the parameters by Adam.
All have 8 couplings (alternating halves), networks of 2 x 64 units, 512 draws, float32, one thread. Ours and a peer run in turns, the
order alternating; the ratio is the median over pairs. Bare zuko is its transform in the one-pass direction, without any of our code.

    python -m benchmarks flows --to-ess funnel-sd3 cancer          # whole trainings: does compile="auto" ever cost time?
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

COUPLINGS, HIDDEN, BATCH, STEPS, PAIRS = 8, (64, 64), 512, 12, 9
Runner = Callable[[int], None]
Push = Callable[[Tensor], tuple[Tensor, Tensor]]


def density(dim: int) -> Callable[[Tensor], Tensor]:
    a = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
    precision = a @ a.T / dim + 0.5 * torch.eye(dim)
    return lambda x: -0.5 * ((x @ precision) * x).sum(-1)


# ---- ours ----


def ours(dim: int, family: str, compile: bool = False, path: bool = False) -> Runner:
    import boltzsample as bz
    from boltzsample.backend import Stepper
    from boltzsample.flows.base import Normal
    from boltzsample.flows.families import make_flow
    from boltzsample.flows.objectives import reverse_kl, reverse_kl_path
    from boltzsample.flows.optimizer import Optimizer
    from boltzsample.flows.train import FUSED
    from boltzsample.streams import Stream

    rng, target = Stream(0).rng(torch.float32), bz.from_log_prob(density(dim), dim=dim)
    flow = make_flow(family, dim, rng, base=Normal(dim), layers=COUPLINGS, hidden=HIDDEN)
    optimizer = Optimizer(flow.layers, 1e-3, 10.0, 0.98)
    objective = reverse_kl_path if path else reverse_kl
    step = Stepper(lambda z: objective(flow, target, z), compile, FUSED)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.step(step(rng.normal(BATCH, dim)).loss, 1.0)

    return run


# ---- peers ----


def peer(dim: int, module: nn.Module, push: Push) -> Runner:
    """The step as one would write it: autograd through the density, torch's Adam."""
    log_p, optimizer = density(dim), torch.optim.Adam(module.parameters(), lr=1e-3)

    def run(steps: int) -> None:
        for _ in range(steps):
            x, log_det = push(torch.randn(BATCH, dim))
            loss = -(log_p(x) + log_det).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def zuko_peer(dim: int, spline: bool) -> Runner:
    import zuko

    more: dict[str, Any] = {}
    if spline:
        more = {"univariate": partial(zuko.transforms.MonotonicRQSTransform, bound=10.0), "shapes": [(8,), (8,), (7,)]}
    flow = zuko.flows.NICE(dim, transforms=COUPLINGS, hidden_features=HIDDEN, **more)
    return peer(dim, flow.transform, lambda z: flow.transform().call_and_ladj(z))


def normflows_peer(dim: int, spline: bool) -> Runner:
    import normflows as nf

    low = dim - dim // 2
    layers: list[nn.Module] = []
    for i in range(COUPLINGS):
        if spline:
            layers += [nf.flows.CoupledRationalQuadraticSpline(dim, 2, 64, num_bins=8, tail_bound=10.0, reverse_mask=bool(i % 2))]
        else:
            net = nf.nets.MLP([low, *HIDDEN, 2 * (dim - low)], init_zeros=True)
            layers += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(dim, mode="swap")]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), layers)
    return peer(dim, flow, flow.forward_and_log_det)


def pyro_peer(dim: int, spline: bool) -> Runner:
    import pyro.distributions.transforms as T

    make = partial(T.spline_coupling, bound=10.0) if spline else T.affine_coupling
    transforms: list[Any] = []
    for _ in range(COUPLINGS):
        transforms += [make(dim, hidden_dims=list(HIDDEN)), T.permute(dim, permutation=torch.arange(dim).flip(0))]

    def push(z: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(z))
        for t in transforms:
            x = t(z)
            total, z = total + t.log_abs_det_jacobian(z, x), x
        return z, total

    return peer(dim, nn.ModuleList(t for t in transforms if isinstance(t, nn.Module)), push)


PEERS: dict[str, Callable[[int, bool], Runner]] = {"zuko": zuko_peer, "normflows": normflows_peer, "pyro": pyro_peer}


# ---- measuring ----


def paired(mine: Runner, theirs: Runner) -> tuple[float, float, float]:
    """Medians: seconds of a step of mine, of theirs, and of the ratio within pairs."""
    for run in (mine, theirs):
        run(3)
    pairs = []
    for i in range(PAIRS):
        order = (mine, theirs) if i % 2 else (theirs, mine)
        took = {run: _seconds(run) for run in order}
        pairs.append((took[mine], took[theirs]))
    a, b = ([pair[k] for pair in pairs] for k in (0, 1))
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in pairs)


def _seconds(run: Runner) -> float:
    began = time.perf_counter()
    run(STEPS)
    return (time.perf_counter() - began) / STEPS


def rows(dim: int, spline: bool, compile: bool) -> list[str]:
    family = "spline-coupling" if spline else "realnvp"
    label, out = f"{'spline' if spline else 'affine'} d={dim}", []
    contests: list[tuple[str, Runner]] = [("ours, path gradient", ours(dim, family, path=True))]
    for name, make in PEERS.items():
        try:
            contests.append((name, make(dim, spline)))
        except ImportError:
            out.append(f"| {label} | {name} | not installed | | |")
    if compile:
        for name, path in (("ours, compiled", False), ("ours, path gradient, compiled", True)):
            contests.append((name, compiled := ours(dim, family, compile=True, path=path)))
            began = time.perf_counter()
            compiled(1)
            out.append(f"| {label} | {name}: compiling | | {1e3 * (time.perf_counter() - began):.0f} | |")
    for name, other in contests:
        mine, theirs, ratio = paired(ours(dim, family), other)
        out.append(f"| {label} | {name} | {1e3 * mine:.2f} | {1e3 * theirs:.2f} | {ratio:.2f} |")
    return out


# ---- to an ESS ----

LONG = {"batch": 64, "steps": 7_000, "enough": -1.0}  # whose second round is long enough for compile="auto"


def trained(name: str, compile: bool | str, seed: int, more: dict[str, Any]) -> tuple[float, float, float]:
    """Seconds of training until the first look with 90% of ESS and of all of it, and the last ESS: couplings on a problem of the zoo."""
    from boltzsample.backend import Backend
    from boltzsample.flows.families import make_flow
    from boltzsample.flows.train import Training, train
    from boltzsample.locate import locate
    from boltzsample.progress import Interrupt, Progress
    from boltzsample.samplers.sampler import Budget, Ledger, Run
    from boltzsample.streams import Stream
    from targets import problem

    target, backend, stream, ledger = problem(name).target, Backend(compile=compile), Stream(seed), Ledger()  # type: ignore[arg-type]
    with torch.no_grad():
        starts = locate(target, None, None, backend, stream, ledger, Budget(), False)
        run = Run(backend, stream, starts, ledger, Budget(), Progress(False), Interrupt())
        flow = make_flow("realnvp", target.dim, stream.child("flow").rng(), whitening=starts.first_map(backend, target.dim))
        found = train(flow, target, run, Training(**more))
    good = [t for t, look in zip(found.seconds, found.looks, strict=True) if look.ess >= 0.9]
    return good[0] if good else math.inf, found.seconds[-1], found.looks[-1].ess


def to_an_ess(args: argparse.Namespace) -> int:
    """compile="auto" beside eager, in turns."""
    print("| problem | training | s to 90% ESS: eager, auto | ratio | s in all: eager, auto | ratio | last ESS, % |")
    print("|---|---|---|---|---|---|---|")
    worst = 0.0
    for name in args.to_ess:
        for label, more in (("default", {}), *((("long", LONG),) if args.compile else ())):
            found: dict[Any, list[tuple[float, float, float]]] = {False: [], "auto": []}
            for seed in range(args.repeats):
                for compile in (False, "auto") if seed % 2 else ("auto", False):
                    found[compile].append(trained(name, compile, seed, more))
            pairs = list(zip(found[False], found["auto"], strict=True))
            cells = []
            for k in (0, 1):
                ratio, eager, auto = (statistics.median(v) for v in zip(*((b[k] / a[k], a[k], b[k]) for a, b in pairs), strict=True))
                worst = max(worst, ratio)
                cells.append(f"{eager:.1f}, {auto:.1f} | {ratio:.2f}")
            print(f"| {name} | {label} | {' | '.join(cells)} | {100 * statistics.median(b[2] for _, b in pairs):.1f} |", flush=True)
    return int(worst > 1.05)


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    if args.to_ess:
        return to_an_ess(args)
    print(f"threads {args.threads}, torch {torch.__version__}, float32, {COUPLINGS} couplings, hidden {HIDDEN}, batch {BATCH}\n")
    print("| flow | beside | ours, plain gradient, eager (ms) | theirs (ms) | ours / theirs |\n|---|---|---|---|---|")
    for dim in args.dim:
        for spline in (False, True):
            if args.family in (None, "spline" if spline else "affine"):
                print("\n".join(rows(dim, spline, args.compile)), flush=True)
    return 0


def add_command(commands: Any) -> None:
    parser = commands.add_parser("flows", help="training steps of flows beside zuko, normflows and pyro where installed")
    parser.add_argument("--dim", nargs="*", type=int, default=[10, 32])
    parser.add_argument("--family", choices=["affine", "spline"], help="one of them (default: both)")
    parser.add_argument("--compile", action="store_true", help="compiled steps too (a minute or two of compiling)")
    parser.add_argument("--to-ess", nargs="+", metavar="PROBLEM", help='instead: seconds to 90%% of ESS, compile="auto" beside eager')
    parser.add_argument("--repeats", type=int, default=3, help="of --to-ess")
    parser.add_argument("--threads", type=int, default=1)
    parser.set_defaults(run=run)
