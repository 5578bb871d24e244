"""The fit of replica exchange: a first ladder by annealing, points for all its levels, and its adaptation to equal swap rates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from boltzsample.densities import StudentT
from boltzsample.flags import Severity, flag
from boltzsample.kernels import HMC, MALA, RandomWalk
from boltzsample.kernels.adapt import DualAveraging, with_step
from boltzsample.kernels.chains import Chains
from boltzsample.maps import Dense, Diagonal, push_vjp
from boltzsample.progress import Progress
from boltzsample.samplers.annealing import adapt
from boltzsample.samplers.cloud import Cloud, Shape, annealing_kernel
from boltzsample.samplers.ladder import Ladder, whitening
from boltzsample.samplers.replicas import Replicas, Round, Rungs, at
from boltzsample.samplers.sampler import Run
from boltzsample.samplers.starts import narrowed
from boltzsample.samplers.warm_up import PILOT_SHARE, WARMUP_SHARE, account, spent
from boltzsample.target import Target, log_prob_and_grad
from boltzsample.views import Pullback, Tempered

PILOT = 256  # particles
PILOT_MOVES = 3
CESS = 0.8
REJECTED = 0.27  # of swaps between neighbours of that conditional ESS: with v lognormal of variance q^2 = -log CESS, erf(q / 2)
MOST_LEVELS = 40
BLIND = 12  # levels where the pilot reached nothing, down to this inverse temperature:
BLIND_BETA = 1e-4
MOVES = 20  # of every point at every level on its way down; with 4, log Z of many wells began -.08 +- .03 too low, with 20 -.03 +- .03
WINDOWS = [(0.2, True), (0.3, True), (0.5, False)]  # shares of the warm-up; are the temperatures and maps set anew at the end?
TURN = math.pi / 2  # a quarter of a turn in whitened coordinates: trajectories get no longer


def first_rungs(target: Target, base: StudentT, kernel: Any, sweeps: int, temperatures: int | None, run: Run) -> Rungs:
    """A ladder for one replicate from an annealing pilot whose particles are then forgotten."""
    units, hmc = coordinates(target, base, run), kernel if isinstance(kernel, HMC) else HMC(L=2)
    moves, shape = annealing_kernel(hmc.L, run.starts.has_gradient), Shape(1, 1, max(PILOT, min(10 * base.dim, 2 * PILOT)))
    stream, inside = run.stream.child("tempering pilot"), StudentT(relative(base.map, units), base.df)
    cloud = Cloud.start(Pullback(target, units), inside, moves, PILOT_MOVES * sweeps, shape, run.backend, stream)
    ladder = adapt(cloud, CESS, lambda price: run.must_stop(price, PILOT_SHARE))
    account(run, "pilot", cloud.chains)
    if ladder is None:
        return _blind(base, kernel, temperatures or BLIND, run)
    fine = torch.cat([torch.zeros_like(ladder.beta[:1, 0, 0]), ladder.beta[:, 0, 0]])  # (levels + 1,)
    wanted = temperatures or min(max(math.ceil(2 * REJECTED * (len(fine) - 1)), 2), MOST_LEVELS)
    where = torch.linspace(0, len(fine) - 1, wanted + 1, dtype=fine.dtype, device=fine.device)
    index = where[1:].ceil().long() - 1
    beta = torch.lerp(fine[where.floor().long()], fine[where.ceil().long()], where.frac())
    return Rungs(base, beta[None], _steps(kernel, ladder.h[index, 0]), composed(units, _stacked(ladder, index)))


def coordinates(target: Target, base: StudentT, run: Run) -> Diagonal | Dense:
    """Those of the base, or those of the user: where the scores at the points the base was fitted to are less correlated. Of an
    ill-conditioned density the base knows the shape; of far modes it knows the distance, which is no scale of theirs."""
    own, reached = narrowed(base.map), run.starts.reached
    if reached is None or not run.starts.has_gradient:
        return own
    x = reached[torch.linspace(0, len(reached) - 1, min(len(reached), 5 * base.dim + 50)).long()]
    grad = log_prob_and_grad(target, x)[1]
    run.ledger.add("pilot", (0, len(x)))
    unit = Diagonal(torch.zeros_like(x[0]), torch.ones_like(x[0]))
    return own if _independence(push_vjp(own, own.pull(x))[2](grad)) > _independence(grad) else unit


def _independence(score: Tensor) -> float:
    """log det of the correlations of scores (n, dim), 0 where there are none."""
    g = torch.nn.functional.normalize(score.double().nan_to_num(posinf=0.0, neginf=0.0), dim=-1)
    g = g / g.square().mean(0).sqrt().clamp(min=1e-12)
    eye = torch.eye(g.shape[1], dtype=g.dtype, device=g.device)
    return float(torch.linalg.slogdet(g.T @ g / len(g) + 0.1 * eye)[1])


def relative(map: Diagonal | Dense, units: Diagonal | Dense) -> Diagonal | Dense:
    """The map in other units: units after it is the map."""
    m = units.pull(map.m)
    if isinstance(map, Diagonal) and isinstance(units, Diagonal):
        return Diagonal(m, map.s / units.s)
    L = map.L if isinstance(map, Dense) else torch.diag(map.s)
    if isinstance(units, Diagonal):
        return Dense(m, L / units.s[:, None])
    return Dense(m, torch.linalg.solve_triangular(units.L, L, upper=False))


def composed(outer: Diagonal | Dense, inner: Diagonal | Dense) -> Diagonal | Dense:
    """x = outer(inner(z)) for stacked maps; the outer may be a single one."""
    m = outer.push(inner.m.to(outer.m))[0]
    if isinstance(outer, Diagonal):
        s = outer.s if outer.s.ndim == 3 else outer.s[None, None]
        return Diagonal(m, s * inner.s.to(s)) if isinstance(inner, Diagonal) else Dense(m, s.mT * inner.L.to(s))
    return Dense(m, outer.L * inner.s.to(m) if isinstance(inner, Diagonal) else outer.L @ inner.L.to(m))


def _stacked(ladder: Ladder, index: Tensor) -> Diagonal | Dense:
    """The maps of some levels of the pilot's ladder."""
    map = ladder.map
    return Diagonal(map.m[index, 0], map.s[index, 0]) if isinstance(map, Diagonal) else Dense(map.m[index, 0], map.L[index, 0])


def _steps(kernel: Any, h: Tensor) -> Tensor:
    """First step sizes of the kernel from those of HMC (or of a random walk) in the same coordinates."""
    if isinstance(kernel, MALA):
        return h.square() / 2
    return h if isinstance(kernel, HMC | RandomWalk) else kernel.h.to(h).expand_as(h).clone()


def _blind(base: StudentT, kernel: Any, levels: int, run: Run) -> Rungs:
    """A ladder by rule of thumb, where the pilot did not arrive."""
    backend = run.backend
    beta = torch.logspace(math.log10(BLIND_BETA), 0, levels, dtype=backend.dtype, device=backend.device)
    map, rows = narrowed(base.map), torch.zeros(levels, dtype=torch.long, device=backend.device)
    h = torch.full((levels, 1), 0.5 * base.dim**-0.25, dtype=backend.dtype, device=backend.device)
    stacked = Diagonal(map.m[None, None], map.s[None, None]) if isinstance(map, Diagonal) else Dense(map.m[None, None], map.L[None])
    return Rungs(base, torch.cat([torch.zeros_like(beta[:1]), beta])[None], _steps(kernel, h), at(stacked, rows))


def annealed(target: Target, rungs: Rungs, kernel: Any, x: Tensor, run: Run, phase: str) -> Tensor:
    """Points for all levels (replicates * K, ladders, dim), from starts x (replicates, ladders, dim): every ladder takes its own start
    from the hottest level down, a few moves at each; where the budget ends they stay where they are."""
    replicates, levels, points = rungs.replicates, rungs.levels, []
    for k in range(levels):
        points.append(x)
        if run.must_stop((1 + MOVES * sum(kernel.price)) * x.shape[:-1].numel(), WARMUP_SHARE):
            continue
        rows = levels * torch.arange(replicates, device=x.device) + k
        view, own = Tempered(target, rungs.beta[:, k + 1, None], rungs.base), with_step(kernel, rungs.h[rows])
        chains = Chains.start(view, own, at(rungs.map, rows), x, run.backend.eager(), run.stream.child("tempering", phase, "down", k), 0)
        for _ in chains.steps(MOVES, "down"):
            pass
        account(run, phase, chains)
        x = points[k] = chains.x
    return torch.stack(points, 1).flatten(0, 1)


def warm_up(replicas: Replicas, warmup: int, sweeps: int, bar: Progress) -> None:
    """Adapt step sizes all the time, temperatures and maps at the end of each window, and leave the ladders with all of it frozen."""
    run, made = replicas.run, 0
    windows = WINDOWS if warmup >= 20 else [(1.0, False)]
    for i, (share, move) in enumerate(windows if warmup else ()):
        if i and replicas.why_stop(sweeps, WARMUP_SHARE):
            break
        window = _Window(replicas, max(1, round(share * warmup)))
        for seen in replicas.rounds(window.rounds, sweeps, f"window {i}", WARMUP_SHARE):
            window.learn(seen)
            bar.update(acceptance=seen.accept.mean, evaluations=lambda: run.ledger.total + spent(replicas.chains))
        made += window.made
        replicas.retune(window.rungs(move))
    if made < warmup - len(windows) and (why := replicas.why_stop(sweeps, WARMUP_SHARE)):
        severity: Severity | None = "untrusted" if made < warmup // 2 else None
        run.notes.append(flag(why, severity=severity, detail=f"{made} of {warmup} warm-up rounds"))


class _Window:
    """What one window of the warm-up learns: step sizes all the time; swap rates and scores over its second half."""

    def __init__(self, replicas: Replicas, rounds: int) -> None:
        self.replicas, self.rounds, self.made = replicas, rounds, 0
        self.tuner = DualAveraging.start(replicas.rungs.h)
        self.swap: list[Tensor] = []
        self.scores: list[Tensor] = []

    def learn(self, seen: Round) -> None:
        chains, self.made = self.replicas.chains, self.made + 1
        kernel: Any = chains.kernel
        self.tuner = self.tuner.update(seen.accept, kernel.target_accept, harmonic=kernel.price[1] > 0)
        chains.kernel = with_step(kernel, _bounded(kernel, self.tuner.h))
        if self.made > self.rounds // 2:
            self.swap.append(seen.swap.mean(-1))
            self.scores.append(getattr(chains.state, "grad", chains.state.x))

    def rungs(self, move: bool) -> Rungs:
        """The rungs as they are to be from here on."""
        old, kernel = self.replicas.rungs, self.replicas.chains.kernel
        tuned = replace(old, h=_bounded(kernel, self.tuner.frozen))
        if not move or not self.swap:
            return tuned
        if hasattr(self.replicas.chains.state, "grad"):
            tuned = replace(tuned, map=refined(old.map, torch.cat(self.scores, 1)))
        beta, index = equal_swaps(old.beta, 1 - torch.stack(self.swap).mean(0))
        return tuned.pick(index, beta)


def _bounded(kernel: Any, h: Tensor) -> Tensor:
    return h.clamp(max=TURN / kernel.L) if isinstance(kernel, HMC) else h


def refined(map: Diagonal | Dense, score: Tensor) -> Diagonal | Dense:
    """The maps after those that whiten z by the scores there (replicates * K, n, dim)."""
    own = whitening(torch.zeros_like(score), score)
    return map if own is None else composed(map, own)


def equal_swaps(beta: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse temperatures (replicates, K + 1) between which the barrier rises by equal parts, from those and the rejection rates
    (replicates, K) there; and for each above the base the old level (replicates, K) it is next to. Between two levels the barrier is
    taken to be linear in b above the base and in log b further up."""
    rise = rejected.double().clamp(min=1e-3)
    barrier = torch.cat([torch.zeros_like(rise[:, :1]), rise.cumsum(1)], 1)
    levels = rise.shape[1]
    goal = barrier[:, -1:] * torch.linspace(0, 1, levels + 1, dtype=barrier.dtype, device=beta.device)
    k = torch.searchsorted(barrier, goal[:, 1:-1].contiguous(), right=True).clamp(1, levels) - 1  # the segment
    part = (goal[:, 1:-1] - barrier.gather(1, k)) / rise.gather(1, k)
    low, high = beta.double().gather(1, k), beta.double().gather(1, k + 1)
    between = torch.where(low > 0, low * (high / low.clamp(min=1e-300)) ** part, part * high)
    new = torch.cat([beta[:, :1], between.to(beta), beta[:, -1:]], 1)
    near = torch.where(part < 0.5, k - 1, k).clamp(min=0)
    return new, torch.cat([near, torch.full_like(near[:, :1], levels - 1)], 1)
