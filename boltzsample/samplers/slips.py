"""slips: localization by posterior chains, with the weights of its paths.

Observe x ~ pi through ever less noise, y_k = alpha_k x + sigma_k xi, and walk along: the drift needs E[x | y] alone, and the posterior
p(x | y), y given, is again a target for chains (posterior.py; Grenioux, Noble, Gabrie & Durmus 2024, arXiv:2402.10758).

Weighted, the default: paths start at the noised mixture of a pool (pool.py), are steered by posterior chains with Stein's control
variate and weighted exactly (localized.py), so that mode masses, log Z and every mean come with error bars, whatever the pool got wrong.

Unweighted (`weights=False`) as published: nothing is explored, the start is a chain on y by Tweedie's score at a level that two
certificates choose (window.py), and nothing corrects what came out of it (unweighted.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from boltzsample.draws import Draws
from boltzsample.errors import NoGradient, PositiveInfinityError, ShapeError
from boltzsample.flags import Flag, flag
from boltzsample.kernels.adapt import moved
from boltzsample.maps import Dense, Diagonal
from boltzsample.samplers.explore import Explored, Explorer
from boltzsample.samplers.localization import localized, window_flags
from boltzsample.samplers.localized import FIRST, Ends, Guide, memberships, path_price, paths
from boltzsample.samplers.localized_fit import TRIALS, calibrate
from boltzsample.samplers.mixture_is import FORGOTTEN, MixtureIS
from boltzsample.samplers.pool import NOISE, pool, reshared
from boltzsample.samplers.posterior import Inner, Spent, Units
from boltzsample.samplers.sampler import Run, Sampler, Verdict, nan_flags
from boltzsample.samplers.unweighted import localization
from boltzsample.samplers.walks import Fitted, sample_walks
from boltzsample.samplers.window import Window
from boltzsample.schedules import Localization, Schedule
from boltzsample.target import Target

BLOCK = 256  # paths of one batch
PILOTS = (256, 512)  # paths that calibrate, paths that weigh the modes
PILOT_SHARE = 0.1  # of what the budget has left, for each pilot
GUESS = 1000  # draws, to share out a budget by
SHARE = 0.7  # of what the budget has left, for so many draws
LEVELS = 8
DATA = 0.3  # the last noise level, in widths of a mode
CHEAPER = ((4, 2, 1), (2, 2, 1), (1, 2, 1))  # levels, chains, transitions where the budget is small


@dataclass(frozen=True, eq=False)
class SLIPS(Sampler):
    """Paths from noise to the target. levels: noise levels, by default 8 between 3 and .3 widths of a mode (64 steps where weights=False).
    inner: the posterior chains. explorer: of the pool. reshare: a pilot's weights replace the pool's shares of the modes. schedule,
    corrector (Langevin steps on y at each level): where weights=False.

    `fit` fills, for each replicate, `guides` (all that the paths need, frozen), `units`, `pilots` (ESS of the last pilot), and as
    MixtureIS does `found`, `forgotten` and `explored`; where weights=False `fitted` and `windows`. Its `data`: draws to make the pool of,
    weighted or not.

    >>> import boltzsample as bz
    >>> two = bz.from_log_prob(lambda x: torch.logaddexp(-(x - 9).square().sum(-1), 0.7 - (x + 9).square().sum(-1)), dim=2)
    >>> result = bz.sample(two, bz.SLIPS(), n=2_000, seed=0)
    >>> result.probability(lambda x: x[..., 0] > 0)               # 1 / (1 + e^.7) = .332
    0.3... +- 0.0... (95%, ok)
    """

    log_z: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    weights: bool = True
    levels: int | None = None
    inner: Inner = field(default_factory=Inner)
    explorer: Explorer = field(default_factory=Explorer)
    schedule: Schedule = field(default_factory=Localization)
    corrector: int = 0
    reshare: bool = True
    guides: tuple[Guide, ...] = field(default=(), repr=False)
    units: tuple[Diagonal | Dense, ...] = field(default=(), repr=False)
    inners: tuple[Inner, ...] = field(default=(), repr=False)
    pilots: tuple[float, ...] = ()
    found: tuple[int, ...] = ()
    forgotten: tuple[float, ...] = ()
    explored: tuple[Explored, ...] = field(default=(), repr=False)
    fitted: tuple[Fitted, ...] = field(default=(), repr=False)
    windows: tuple[Window, ...] = ()

    def __post_init__(self) -> None:
        if self.levels is not None and (not isinstance(self.levels, int) or isinstance(self.levels, bool) or self.levels < 1):
            raise ValueError(f"levels is {self.levels!r}; wanted an integer >= 1, or None")
        if self.corrector and self.weights:
            raise ValueError("corrector= belongs to weights=False: weighted paths are corrected by their weights; wanted corrector=0")
        if not self.weights:
            object.__setattr__(self, "log_z", False)

    def check(self, target: Target, data: Draws | None) -> None:
        """ShapeError for draws of another dimension."""
        if data is not None and data.x.shape[-1] != target.dim:
            raise ShapeError(f"data= has {data.x.shape[-1]} dimensions and the target {target.dim}; wanted the same")

    def fit(self, target: Target, run: Run, data: Draws | None = None) -> Self:
        """A guide for each replicate, one after another. Raises NoGradient."""
        if not run.starts.has_gradient:
            raise NoGradient("slips walks by the gradient, and this density has none; use smc or mcmc")
        parts = [replace(run.part(r), stream=run.stream.child("slips", r)) for r in range(run.replicates)]
        if not self.weights:
            ready = [localized(target, self.schedule, self.levels, self.inner, self.corrector, part) for part in parts]
            return replace(self, fitted=tuple(f for f, _ in ready), windows=tuple(w for _, w in ready))
        found = [self._fitted(target, part, data) for part in parts]
        guides, units, inners, pilots, modes, forgotten, explored = zip(*found, strict=True)
        return replace(
            self, guides=guides, units=units, inners=inners, pilots=pilots, found=modes, forgotten=forgotten, explored=explored
        )

    def _fitted(self, target: Target, run: Run, data: Draws | None) -> tuple[object, ...]:
        own = pool(target, self.explorer, data, run)
        view = Units(target, moved(own.units, replace(run.backend, dtype=torch.float64)), run.backend.dtype)
        levels, inner = self._affordable(target.dim, run)
        s = torch.logspace(_log10(NOISE), _log10(DATA), levels, dtype=torch.float64, device=run.backend.device)
        one = inner.price(levels, FIRST) + 1
        calibrating = _room(PILOTS[0], inner.price(levels * (1 + TRIALS), TRIALS * levels) // 2, run)
        weighing = _room(PILOTS[1], one, run)
        with run.progress.phase("pilot paths", 2) as bar:
            rng = run.stream.child("calibrate").rng(torch.float64, run.backend.device)
            guide, spent = calibrate(view, own.mixture, s, inner, calibrating, rng)
            _account(run, "pilot", spent, inner)
            bar.update(1, evaluations=run.ledger.total)
            ends, spent = paths(view, guide, inner, weighing, run.stream.child("pilot").rng(torch.float64, run.backend.device))
            _account(run, "pilot", spent, inner, weighing)
            bar.update(1, evaluations=run.ledger.total)
        w = torch.softmax(ends.log_w.nan_to_num(-torch.inf), 0)
        ess = float(1 / w.square().sum()) / len(w)
        if self.reshare and bool(w.isfinite().all()):
            mass = (memberships(guide.mixture, ends.x) * w[:, None]).sum(0)
            guide = replace(guide, mixture=reshared(guide.mixture, mass))
        return guide, view.map, inner, ess, own.found, own.forgotten, own.explored

    def _affordable(self, dim: int, run: Run) -> tuple[int, Inner]:
        """Levels and chains, fewer where the budget is small."""
        inner = self.inner.ready(dim)
        tried = [(self.levels or LEVELS, inner), *((k, replace(inner, chains=c, transitions=t)) for k, c, t in CHEAPER)]
        if run.budget.evaluations is None:
            return tried[0]
        left = run.budget.evaluations - run.reserve - run.ledger.total
        return next((found for found in tried if (found[1].price(found[0], FIRST) + 1) * GUESS <= SHARE * left), tried[-1])

    def sample(self, target: Target, n: int, run: Run) -> Draws:
        """n weighted draws a replicate, or as many as the budget leaves; every path is a unit. Raises ValueError, PositiveInfinityError."""
        if not self.weights:
            return sample_walks(target, self.fitted, localization, n, run, window_flags(self.windows))
        if len(self.guides) not in (1, run.replicates) or not self.guides:
            raise ValueError(f"this sampler has {len(self.guides)} guides for {run.replicates} replicates; leave fit=True")
        flags: list[Flag] = []
        if max(self.forgotten, default=0.0) > FORGOTTEN:
            flags.append(flag("FORGOTTEN_MASS", value=max(self.forgotten), threshold=FORGOTTEN))
        parts = []
        with run.progress.phase("sampling", run.replicates) as bar:
            for r in range(run.replicates):
                x, ends, more = self._paths(target, n, r, run)
                flags += more
                parts.append((x, ends.log_p, ends.log_w))
                bar.update(1, evaluations=run.ledger.total)
        least = min(len(x) for x, _, _ in parts)
        x, log_p, log_w = (torch.cat([t[:least] for t in part]) for part in zip(*parts, strict=True))
        return Draws(x[:, None], log_p[:, None], log_w[:, None], flags=tuple(dict.fromkeys(flags)), scope="given this guide")

    def _paths(self, target: Target, n: int, r: int, run: Run) -> tuple[Tensor, Ends, list[Flag]]:
        """The paths of replicate r, a block at a time."""
        r_own = r % len(self.guides)
        to = replace(run.backend, dtype=torch.float64)
        guide, inner = moved(self.guides[r_own], to), moved(self.inners[r_own], to)
        view = Units(target, moved(self.units[r_own], to), run.backend.dtype)
        price = path_price(guide, inner)
        n, flags = _within_budget(n, price * (run.replicates - r), run)
        parts: list[Ends] = []
        moves = [0.0, 0]
        for b, first in enumerate(range(0, n, BLOCK)):
            size = min(BLOCK, n - first)
            if parts and (why := run.must_stop(size * price)) is not None:
                flags.append(flag(why, detail=f"{first} of {n} draws"))
                break
            rng = run.stream.child("slips paths", r, b).rng(torch.float64, run.backend.device)
            ends, spent = paths(view, guide, inner, size, rng)
            _account(run, "sampling", spent, inner, size)
            parts.append(ends)
            moves = [moves[0] + spent.accepted, moves[1] + spent.transitions]
        said = f"acceptance {moves[0] / moves[1]:.2f}, " if moves[1] else ""
        flags.append(flag("INNER_CHAINS", detail=f"{said}at {guide.looks} of {guide.steps} levels, {price} evaluations per path"))
        ends = Ends(*(torch.cat(part) for part in zip(*parts, strict=True)))
        x = view.x(ends.x)
        if bool((ends.log_p == torch.inf).any()):
            raise PositiveInfinityError.at(x[ends.log_p == torch.inf][0])
        lost = ends.log_w.isnan()
        flags += nan_flags(int(ends.log_p.isnan().sum()), n, "draws, given weight 0")
        return x, Ends(ends.x, ends.log_p - view.map.log_det, torch.where(lost, -torch.inf, ends.log_w)), flags

    def second_look(self, target: Target, replicates: list[Draws], run: Run) -> list[Verdict]:
        """log Z against another SMC run up the explorer's ladder, as mixture-is does."""
        if not self.weights:
            return super().second_look(target, replicates, run)
        return MixtureIS(explorer=self.explorer, explored=self.explored).second_look(target, replicates, run)


def _log10(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log10())


def _room(n: int, price: int, run: Run) -> int:
    """n pilot paths, or as many as a share of the budget has room for; 64 at least."""
    if run.budget.evaluations is None:
        return n
    return max(64, min(n, int(PILOT_SHARE * (run.budget.evaluations - run.reserve - run.ledger.total) / price)))


def _within_budget(n: int, price: int, run: Run) -> tuple[int, list[Flag]]:
    """n draws, or as many as the budget has room for at this price; 10 at least."""
    limit = run.budget.evaluations
    if limit is None:
        return n, []
    left = max((limit - run.reserve - run.ledger.total) // price, 10)
    return (n, []) if left >= n else (left, [flag("STOPPED_EARLY", detail=f"{left} of {n} draws")])


def _account(run: Run, phase: str, spent: Spent, inner: Inner, ends: int = 0) -> None:
    a, b = inner.moves.price
    run.ledger.add(phase, (a, b), spent.transitions)
    run.ledger.add(phase, (0, 1), spent.inits)
    run.ledger.add(phase, (1, 0), ends)
