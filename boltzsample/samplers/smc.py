"""smc: sequential Monte Carlo along a frozen ladder, in independent ensembles.

`fit` climbs from the wide base to the target once, with fewer particles, and makes the ladder: temperatures by conditional ESS, metrics
from the covariance of scores, step sizes. `sample` climbs the frozen ladder with fresh noise, and only that is reported. The unit of
error is the ensemble: its particles share one weight, Zhat_u, so that

    log Z = log mean_u Zhat_u,        E f = sum_u Zhat_u mean_u f / sum_u Zhat_u,        E Zhat_u = Z,

with bars between ensembles (the particles of one are relatives, and never counted as independent draws). At the top a few more
rounds of moves part the copies that resampling made; whatever mean they shift was not the target's (estimates/ensembles.py, UNSETTLED).
Del Moral, Doucet & Jasra (2006), JRSS B 68(3); Lee & Whiteley (2018), Biometrika 105(3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from boltzsample.densities import StudentT
from boltzsample.draws import Draws
from boltzsample.flags import Flag, flag
from boltzsample.kernels import HMC, RandomWalk
from boltzsample.kernels.adapt import moved
from boltzsample.maps import Dense, Diagonal
from boltzsample.samplers.annealing import Cloud, Shape, adapt, annealing_kernel, climb
from boltzsample.samplers.cloud import round_price
from boltzsample.samplers.ladder import Ladder
from boltzsample.samplers.sampler import Run, Sampler, nan_flags
from boltzsample.samplers.starts import WIDEN
from boltzsample.samplers.warm_up import account, spent
from boltzsample.target import Target

FIT_SHARE = 0.4  # of what the budget has left
FIT_PARTICLES = 128  # an ensemble: half of what is reported, or less
FEWEST = 8
SETTLE = 8  # rounds of moves at the top
WALK = 10  # a random walk makes as many times the moves
AT_ONCE = 2**17  # numbers in the positions of replicates that climb together: more would leave the cache and take twice as long


@dataclass(frozen=True, eq=False)
class Annealing(Sampler):
    """What SMC and AIS share. moves: transitions a level, of L leapfrogs each (None: by dimension; ten times as many of a random walk,
    where there is no gradient). cess: conditional ESS of a step up the ladder. `fit` fills `base` and `ladder`."""

    log_z: ClassVar[bool] = True
    guess: ClassVar[int] = 20  # levels, to share out a budget by
    ensembles: int = 16
    particles: int = 256
    moves: int = 3
    L: int | None = None
    cess: float = 0.9
    base: StudentT | None = field(default=None, repr=False)
    ladder: Ladder | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("ensembles", 1), ("particles", 2), ("moves", 1), ("L", 1)):
            value = getattr(self, name)
            if not (name == "L" and value is None) and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name} is {value!r}; wanted an integer >= {least}")
        if not 0 < self.cess < 1:
            raise ValueError(f"cess is {self.cess!r}; wanted a number between 0 and 1, such as 0.9")

    def fit(self, target: Target, run: Run, data: Draws | None = None) -> Self:
        """Make the ladder of every replicate; where the budget ends first, the copy returned has none."""
        base, ladders = _base(run, target.dim), []
        n = self._fit_particles(target, run)
        with run.progress.phase("ladder") as bar:
            for first, size in groups(run.replicates, self.ensembles * n * target.dim):
                shape = Shape(size, self.ensembles, n)
                cloud = self._cloud(target, base, shape, run, "ladder", first)
                ladders.append(adapt(cloud, self.cess, lambda price: run.must_stop(price, FIT_SHARE + 0.2), bar))
                account(run, "warm-up", cloud.chains)
                if ladders[-1] is None:
                    run.notes.extend(_unfinished(run, int(cloud.level)))
                    run.handover["unfinished"] = cloud.chains.x
                    return replace(self, base=base, ladder=None)
        return replace(self, base=base, ladder=Ladder.join([ladder for ladder in ladders if ladder is not None]))

    def _cloud(self, target: Target, base: StudentT, shape: Shape, run: Run, name: str, first: int) -> Cloud:
        kernel, moves = self.kernel(target.dim, run.starts.has_gradient)
        return Cloud.start(target, base, kernel, moves, shape, run.backend, run.stream.child("annealing", name), first)

    def kernel(self, dim: int, gradient: bool) -> tuple[HMC | RandomWalk, int]:
        """The kernel, and how many moves of it a level has."""
        return annealing_kernel(self.L or math.ceil(1.2 * dim**0.25), gradient), self.moves if gradient else WALK * self.moves

    def _price(self, target: Target, gradient: bool, levels: int, settle: int) -> int:
        """Evaluations of one particle on its way up."""
        kernel, moves = self.kernel(target.dim, gradient)
        return levels + (levels + settle) * round_price(kernel, moves)

    def _fit_particles(self, target: Target, run: Run) -> int:
        n = min(self.particles, FIT_PARTICLES)
        if run.budget.evaluations is None:
            return n
        left = FIT_SHARE * (run.budget.evaluations - run.reserve - run.ledger.total)
        one = run.replicates * self.ensembles * self._price(target, run.starts.has_gradient, self.guess, 0)
        return max(min(n, int(left // one)), FEWEST)

    def _ready(self, run: Run) -> tuple[StudentT, Ladder]:
        """Base and ladder on the run's device, in its dtype. Raises ValueError where there is none, or one of other replicates."""
        if self.ladder is None or self.base is None:
            raise ValueError("this sampler has no ladder yet; leave fit=True")
        if self.ladder.replicates not in (1, run.replicates):
            came = f"this sampler was fitted on {self.ladder.replicates} replicates and {run.replicates} were asked for"
            raise ValueError(f"{came}; use replicates={self.ladder.replicates}, or a sampler fitted on one")
        return moved(self.base, run.backend), moved(self.ladder, run.backend)

    def _affordable(self, wanted: int, target: Target, run: Run, ladder: Ladder, settle: int) -> int:
        """Particles an ensemble, no more than the budget has left for."""
        if run.budget.evaluations is None:
            return wanted
        left = run.budget.evaluations - run.reserve - run.ledger.total
        one = run.replicates * self.ensembles * self._price(target, run.starts.has_gradient, len(ladder.beta), settle)
        return max(min(wanted, left // one), 2)


@dataclass(frozen=True, eq=False)
class SMC(Annealing):
    """Sequential Monte Carlo in independent ensembles. ensembles, particles: how many, and the particles of each (more where n asks
    for more). Other settings: see Annealing.

    >>> import boltzsample as bz
    >>> target = bz.from_log_prob(lambda x: -0.5 * (x**2).sum(-1), dim=2)
    >>> bz.sample(target, SMC(particles=64), n=1_000, seed=0).log_z()         # log 2 pi = 1.8379
    1.8... +- 0.0... (95%, ...)
    """

    def sample(self, target: Target, n: int, run: Run) -> Draws:
        """At least n draws a replicate; units are the ensembles, replicate after replicate."""
        if self.ladder is None and "unfinished" in run.handover:
            return stranded(run.handover["unfinished"], target, run)
        base, ladder = self._ready(run)
        wanted = max(self.particles, -(-n // self.ensembles))
        each = self._affordable(wanted, target, run, ladder, SETTLE)
        flags: list[Flag] = []
        if each * self.ensembles < n:
            flags.append(flag("STOPPED_EARLY", detail=f"{each * self.ensembles} of {n} draws"))
        parts = []
        with run.progress.phase("sampling", len(ladder.beta)) as bar:
            for first, size in groups(run.replicates, self.ensembles * each * target.dim):
                cloud = self._cloud(target, base, Shape(size, self.ensembles, each), run, "draws", first)
                own = ladder.of_replicates(slice(first, first + size))
                why = climb(cloud, own, run.must_stop, bar=bar)
                shift = None
                if why is None and run.must_stop(spent(cloud.chains) + cloud.settling(SETTLE)) is None:
                    shift = cloud.settle(own, SETTLE)
                elif why is not None:
                    flags.append(flag(why, severity="untrusted", detail=f"level {cloud.level} of {len(ladder.beta)}"))
                account(run, "sampling", cloud.chains)
                parts.append((cloud, shift))
        return _draws(parts, flags)


def _draws(parts: list[tuple[Cloud, Tensor | None]], flags: list[Flag]) -> Draws:
    """The ensembles of all groups of replicates as units."""
    clouds = [cloud for cloud, _ in parts]
    dim = clouds[0].target.dim

    def cat(each: list[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1, *part.shape[2:]) for part in each])

    n = clouds[0].shape.particles
    x = torch.cat([c.chains.x.reshape(-1, n, dim) for c in clouds])
    log_p = torch.cat([c.chains.log_prob.reshape(-1, n) for c in clouds])
    log_z = cat([c.log_z for c in clouds])
    shifts = [shift for _, shift in parts if shift is not None]
    asked = sum(c.chains.rows + c.chains.inits for c in clouds)
    return Draws(
        x,
        torch.where(log_z[:, None].isnan().to(log_p.device), math.nan, log_p),
        log_z[:, None].expand(-1, n).contiguous(),
        ancestor=cat([c.eve for c in clouds]),
        variance=cat([c.variance for c in clouds]),
        shift=cat(shifts) if len(shifts) == len(parts) else None,
        bad_x=bad_points(clouds),
        flags=tuple(dict.fromkeys((*flags, *nan_flags(sum(c.nan for c in clouds), asked, "points")))),
        scope="given this ladder",
        acceptance=sum(c.accepted for c in clouds) / len(clouds),
    )


def bad_points(clouds: list[Cloud]) -> Tensor | None:
    """A hundred at most of the points (k, dim) where log_prob was NaN."""
    found = [points for c in clouds for points in c.bad]
    return torch.cat(found)[:100] if found else None


def stranded(x: Tensor, target: Target, run: Run) -> Draws:
    """Particles that never reached the target: no weights, no log Z."""
    replicates = run.replicates
    x = x[:1].expand(replicates, -1, -1) if len(x) < replicates else x
    log_p = target.log_prob(x)
    run.ledger.add("sampling", (log_p.numel(), 0))
    return Draws(x.contiguous(), log_p, torch.full(log_p.shape, math.nan, dtype=torch.float64, device=x.device), scope="given this ladder")


def _unfinished(run: Run, level: int) -> list[Flag]:
    why = run.must_stop(0, FIT_SHARE) or "STOPPED_EARLY"
    return [flag(why, severity="untrusted", detail=f"the ladder had not reached the target after {level} levels")]


def _base(run: Run, dim: int) -> StudentT:
    """The wide source; without one, a Student-t around the user's starts, which cannot find what is far from them."""
    if run.starts.base is not None:
        return run.starts.base
    run.notes.append(flag("SINGLE_WITNESS", detail="the base was made from starts=: a mode far from them stays unseen"))
    map = run.starts.first_map(run.backend, dim)
    return StudentT(Diagonal(map.m, WIDEN * map.s) if isinstance(map, Diagonal) else Dense(map.m, WIDEN * map.L))


def groups(replicates: int, numbers: int) -> Iterator[tuple[int, int]]:
    """(first, how many) of the replicates that climb together."""
    size = max(1, AT_ONCE // numbers)
    for first in range(0, replicates, size):
        yield first, min(size, replicates - first)
