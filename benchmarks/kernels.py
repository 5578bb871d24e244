"""Gradient evaluations per second of a many-chain HMC transition (L = 10 leapfrogs, float32), and what they are spent on.

A transition costs L F + noise + rest: F is one value-and-gradient inside a compiled graph, its call overhead removed,

    F = (time of a graph with 20 chained ones - time of one with 10) / 10,

noise is the drawing of momenta and coins within the same runs, rest is the library's own share. The graphs of F keep every
intermediate in memory (SPEED.md, 3), which the transitions no longer do; `inlined` is rest / L F where they are compiled as
transitions are. With blackjax installed (extra `bench`) its vmapped, jitted HMC runs beside ours: the same target, step size
and chains, float32, order alternated, medians of the pairs.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from boltzsample.streams import block_steps
from targets import problem

L = 10
H = 0.05
STRIDE = 4  # as in samplers.mcmc; one where the batch is large (Chains.stride)
REPEATS = 25
ROUND = 0.07  # seconds of each part of a round: the machine changes its pace within a second
HEAD = "target | chains | grads/s | L F (us) | noise (us; ns a normal) | rest (us) | rest / L F | inlined | "
HEAD += "compile (s) | accepted | ours / blackjax"
HELD = (16 << 20, 24 << 20)  # bytes


class Case(NamedTuple):
    """A target in torch and, for the peer, in jax."""

    log_prob: Callable[[Tensor], Tensor]
    jax_log_prob: Callable[[Any, Any], Any]  # (jax.numpy, x (dim,)) -> ()
    dim: int


def gauss() -> Case:
    return Case(lambda x: -0.5 * x.square().sum(-1), lambda np, x: -0.5 * (x * x).sum(), 100)


def ill_conditioned() -> Case:
    a = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    P = (a @ a.T / 100 + 0.05 * torch.eye(100)).float()
    Q = P.numpy()
    return Case(lambda x: -0.5 * ((x @ P.to(x)) * x).sum(-1), lambda np, x: -0.5 * (x @ np.asarray(Q) @ x), 100)


def funnel() -> Case:
    def log_prob(x: Tensor) -> Tensor:
        v, y = x[:, 0], x[:, 1:]
        return -v.square() / 18 - 0.5 * y.square().sum(-1) * (-v).exp() - 4.5 * v

    def peer(np: Any, x: Any) -> Any:
        return -x[0] ** 2 / 18 - 0.5 * (x[1:] ** 2).sum() * np.exp(-x[0]) - 4.5 * x[0]

    return Case(log_prob, peer, 10)


def many_well() -> Case:
    def log_prob(x: Tensor) -> Tensor:
        a, b = x[:, :16], x[:, 16:]
        return (-a.pow(4) + 6 * a.square() + 0.5 * a - 0.5 * b.square()).sum(-1)

    def peer(np: Any, x: Any) -> Any:
        a, b = x[:16], x[16:]
        return (-(a**4) + 6 * a**2 + 0.5 * a - 0.5 * b**2).sum()

    return Case(log_prob, peer, 32)


def cancer() -> Case:
    A = problem("cancer").target.signed.float()  # standardized: of raw columns, in the thousands, every trajectory is rejected
    An = A.numpy()

    def log_prob(w: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(w @ A.to(w).T).sum(-1) - 0.5 * w.square().sum(-1)

    def peer(np: Any, w: Any) -> Any:
        return -np.logaddexp(-(np.asarray(An) @ w), 0.0).sum() - 0.5 * (w**2).sum()

    return Case(log_prob, peer, A.shape[1])


CASES: dict[str, Callable[[], Case]] = {
    "gauss d=100": gauss,
    "ill-conditioned gauss d=100": ill_conditioned,
    "funnel d=10": funnel,
    "many-well d=32": many_well,
    "cancer 569x31": cancer,
}


class Spent(NamedTuple):
    """Seconds of a run of ours, those of them that noise took, and the share of trajectories that were accepted."""

    seconds: float
    noise: float
    accepted: float


def ours(case: Case, chains: int) -> tuple[Callable[[int], Spent], float]:
    """A function of transitions, and the seconds that the first strides took (compiling)."""
    from boltzsample import HMC, from_log_prob
    from boltzsample.backend import Backend
    from boltzsample.kernels.chains import Chains
    from boltzsample.maps import Diagonal
    from boltzsample.streams import Stream

    target = from_log_prob(case.log_prob, case.dim)
    backend = Backend(dtype=torch.float32, compile=True)
    unit = Diagonal(torch.zeros(1, 1, case.dim), torch.ones(1, 1, case.dim))
    x = 0.1 * torch.randn(1, chains, case.dim, generator=torch.Generator().manual_seed(1))
    kernel = HMC(h=torch.full((1, 1), H), L=L)
    moving = Chains.start(target, kernel, unit, x, backend, Stream(0), 10**6)
    for size in HELD:  # the allocator keeps what is freed once it has freed larger blocks, as a run's adaptation has by then;
        torch.empty(size, dtype=torch.uint8)  # else 33 page faults a transition of the Gaussian, which runs do not have

    drawing = _clocked(moving)

    def run(transitions: int) -> Spent:
        moving.forget()
        drawing.clear()
        began = time.perf_counter()
        for _ in moving.strides(transitions, "benchmark", STRIDE):
            pass
        seconds = time.perf_counter() - began
        return Spent(seconds, sum(drawing), float(moving.meter.moves.double().mean()) / transitions)

    return run, run(2 * STRIDE).seconds


def _clocked(moving: Any) -> list[float]:
    """The seconds that each block of noise will have taken these Chains, as they draw them."""
    taken: list[float] = []
    draw = moving._noise

    def timed(name: str, block: int) -> Any:
        began = time.perf_counter()
        drawn = draw(name, block)
        taken.append(time.perf_counter() - began)
        return drawn

    moving._noise = timed
    return taken


def floor(case: Case, chains: int, inlined: bool = False) -> Callable[[], float]:
    """A function that says F, seconds of one value-and-gradient of the batch inside a compiled graph, as they are now."""
    from boltzsample import from_log_prob
    from boltzsample.backend import INDUCTOR, ONE_LOOP, compile_whole
    from boltzsample.target import log_prob_and_grad

    target = from_log_prob(case.log_prob, case.dim)

    def chained(n: int) -> Callable[[Tensor], Tensor]:
        def graph(x: Tensor) -> Tensor:
            for _ in range(n):
                log_p, grad = log_prob_and_grad(target, x)
                x = x + 1e-3 * grad + 1e-30 * log_p[:, None]
            return x

        return compile_whole(graph, ONE_LOOP if inlined else INDUCTOR)

    x = 0.1 * torch.randn(chains, case.dim, generator=torch.Generator().manual_seed(1))
    ten, twenty = chained(10), chained(20)
    return lambda: max(_typical(lambda: twenty(x)) - _typical(lambda: ten(x)), 1e-8) / 10


def peer(case: Case, chains: int) -> Callable[[int], float] | None:
    """blackjax's HMC with the same step size and leapfrogs, vmapped over chains, scanned over transitions; None without it."""
    try:
        import blackjax
        import jax
        import jax.numpy as jnp
    except ImportError:
        return None
    algorithm = blackjax.hmc(lambda x: case.jax_log_prob(jnp, x), H, jnp.ones(case.dim), L)

    def scan(key: Any, state: Any, transitions: int) -> Any:
        def one(carry: Any, k: Any) -> Any:
            new, _ = jax.vmap(algorithm.step)(jax.random.split(k, chains), carry)
            return new, new.position

        return jax.lax.scan(one, state, jax.random.split(key, transitions))

    jitted = jax.jit(scan, static_argnums=2)
    x = 0.1 * jax.random.normal(jax.random.key(1), (chains, case.dim), dtype=jnp.float32)
    state = jax.vmap(algorithm.init)(x)

    def run(transitions: int) -> float:
        jax.block_until_ready(jitted(jax.random.key(0), state, transitions))  # compiled here, once a length
        began = time.perf_counter()
        jax.block_until_ready(jitted(jax.random.key(2), state, transitions))
        return time.perf_counter() - began

    return run


def _typical(work: Callable[[], Any]) -> float:
    """Seconds of one call: the mean over a short while, as a run's transitions are counted."""
    work()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < ROUND / 2:
        work()
        calls += 1
    return (time.perf_counter() - began) / calls


def measure(name: str, chains: int) -> str:
    """One row of the table."""
    case = CASES[name]()
    run, compiling = ours(case, chains)
    other, now, inlined = peer(case, chains), floor(case, chains), floor(case, chains, inlined=True)
    block = block_steps(case.dim)  # whole blocks of noise
    transitions = block * max(1, int(ROUND / max(run(block).seconds, 1e-6)))
    rounds = []
    for i in range(REPEATS):
        first = other(transitions) if other and i % 2 else math.nan
        mine, f, g = run(transitions), now(), inlined()
        rounds.append((mine, f, g, other(transitions) if other and not i % 2 else first))
    per, z = (statistics.median(getattr(mine, part) for mine, *_ in rounds) / transitions for part in ("seconds", "noise"))
    ratio = statistics.median(theirs / mine.seconds for mine, *_, theirs in rounds)
    moved = [((mine.seconds - mine.noise) / transitions, L * f, L * g) for mine, f, g, _ in rounds]
    parts = zip(*((f, t - f, t / f - 1, t / g - 1) for t, f, g in moved), strict=True)
    f, rest, share, strict = (statistics.median(part) for part in parts)
    rates = f"{L * chains / per:.1e} | {f * 1e6:.0f} | {z * 1e6:.0f} ({z * 1e9 / (chains * case.dim):.1f}) | {rest * 1e6:.0f}"
    accepted = rounds[0][0].accepted  # a rejected trajectory costs another time: it may have left all scales
    return f"| {name} | {chains} | {rates} | {share:.2f} | {strict:.2f} | {compiling:.0f} | {accepted:.2f} | {ratio:.2f} |"


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    spin = os.environ.get("GOMP_SPINCOUNT", "not set")
    print(f"threads {args.threads}, torch {torch.__version__}, float32, HMC L = {L}, strides of {STRIDE}, GOMP_SPINCOUNT {spin}\n")
    print(f"| {HEAD} |\n{'|---' * (HEAD.count('|') + 1)}|")
    with torch.no_grad():
        for name in args.target or CASES:
            for chains in args.chains:
                print(measure(name, chains), flush=True)
    return 0


def add_command(commands: Any) -> None:
    parser = commands.add_parser("kernels", help="gradients per second of compiled transitions, beside blackjax where installed")
    parser.add_argument("--target", nargs="*", choices=list(CASES), help="targets (default: all)")
    parser.add_argument("--chains", nargs="*", type=int, default=[64, 1024])
    parser.add_argument("--threads", type=int, default=2)
    parser.set_defaults(run=run)
