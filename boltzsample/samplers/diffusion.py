"""diffusion: draws of MCMC teach a denoiser, paths from noise to data follow it, and weights make their ends right.

    pool      particles of an SMC up from the wide base (explore.py), or the user's own draws: wrong masses of far modes do no harm
    score     a denoiser D(z, s) of the noised pool, trained in whitened units z on draws and gradients (scores/), in later rounds on
              its own weighted draws, which unlike particles are independent
    flow      where tails are heavy (a funnel) or weights stay poor: a flow trained by reverse KL, and all of it in its latent space
    paths     z_0 ~ N(0, 1 + s_0^2) through K levels by kernels N(A z_k + B D, C^2 + B^2 S), S learned, calibrated on held-out draws
    weights   log w = log p(x) - log q(path),     q = .9 q_0 prod_k f_k + .1 t_5 prod_k b_k

Every kernel is a known Gaussian, so E w = Z exactly, whatever the denoiser says and however few the steps (path_weights.py). The last
term is the defensive one: a wide Student-t at the data, taken back to the noise by the backward kernels; it keeps w <= 10 p / t_5.
From both sides

    E_q log w <= log Z <= E_(pi prod b) log w                                    (`bounds`; the upper side takes draws of the target)

Without a density there are draws, but no weights (`bz.imitate`). Sohl-Dickstein et al. (2015), ICML; Song et al. (2021),
arXiv:2011.13456; He et al. (2025), arXiv:2502.06685 (tempering, then diffusion); De Bortoli et al. (2024), arXiv:2402.08667.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from boltzsample.draws import Draws
from boltzsample.errors import ShapeError
from boltzsample.estimates.evidence import log_z
from boltzsample.flags import flag
from boltzsample.flows.flow import Flow
from boltzsample.maps import Dense, Diagonal
from boltzsample.samplers.annealed_langevin import AnnealedLangevin
from boltzsample.samplers.defended import defended
from boltzsample.samplers.diffusion_guide import Guided
from boltzsample.samplers.diffusion_latent import heavy_tailed, latent_run, poor, short
from boltzsample.samplers.diffusion_pool import NOISE, Climbed, by_dimension, given, whitened_pool
from boltzsample.samplers.explore import Explorer
from boltzsample.samplers.flow_is import FlowIS
from boltzsample.samplers.mixture_is import POWER, compared
from boltzsample.samplers.path_bounds import Bounds, path_bounds
from boltzsample.samplers.probability_flow import Flowing
from boltzsample.samplers.reverse import Ancestral, Reverse
from boltzsample.samplers.sampler import Run, Sampler, Verdict
from boltzsample.samplers.weighing import affordable, weighted_draws
from boltzsample.samplers.with_flow import fitting
from boltzsample.schedules import VE, Levels, Schedule
from boltzsample.scores.model import ScoreModel, Way, kernels_of
from boltzsample.scores.pool import Pool
from boltzsample.scores.training import ScoreTraining, teach
from boltzsample.streams import Rng
from boltzsample.target import Target
from boltzsample.views import Pullback

AT_ONCE = 10_000  # paths between two looks at the budget
POOL_SHARE = 0.5  # of the budget
SCOUTS, GUESS = 64, 20  # particles of a first climb where a budget is to be shared out; its levels, where it does not arrive
DEFENSE = 0.1
DEFENDED_UP_TO, WHERE_IT_HELPS = 8, 16  # dimensions; beyond, a wide law hardly ever meets the target


@dataclass(frozen=True, eq=False)
class Diffusion(Sampler):
    """Weighted ends of diffusion paths. steps K; rule: the kernels (reverse.py); training: of the denoiser; explorer: of the pool (None:
    by dimension); schedule: the noising process; defense: the share of defensive paths (None: .1 up to eight dimensions, up to sixteen
    where it helps); weighted: False for the bare draws, which carry the errors of the network (PATH_WEIGHT_MISSING); flow: whether one
    may be trained where tails are heavy or weights poor, for all to happen in its latent space. For each replicate `fit` fills `models`,
    `ways` (of the explorers), `flows`.

    >>> import boltzsample as bz
    >>> two = bz.from_log_prob(lambda x: torch.logaddexp(-(x - 4).square().sum(-1), 0.7 - (x + 4).square().sum(-1)), dim=2)
    >>> quick = bz.Diffusion(steps=16, training=ScoreTraining(steps=100, rounds=2))
    >>> bz.sample(two, quick, n=2_000, seed=0).probability(lambda x: x[..., 0] > 0)               # 1 / (1 + e^.7) = .332
    0.3... +- 0.0... (95%, ...)
    """

    log_z: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    steps: int = 64
    rule: Way = field(default_factory=Ancestral)
    training: ScoreTraining = field(default_factory=ScoreTraining)
    explorer: Explorer | None = None
    schedule: Schedule = field(default_factory=VE)
    defense: float | None = None
    weighted: bool = True
    flow: bool = True
    models: tuple[ScoreModel, ...] = ()
    ways: tuple[Climbed, ...] = field(default=(), repr=False)
    flows: tuple[Flow | None, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 2 or not 0 <= (self.defense or 0) < 1:
            raise ValueError(f"steps is {self.steps!r}, defense {self.defense!r}; wanted an integer >= 2 and a share in [0, 1)")

    def fit(self, target: Target, run: Run, data: Draws | None = None) -> Self:
        """A denoiser for each replicate, one after another; `data`: draws to learn from, weighted or not, in place of a pool of its own."""
        found = [self._fitted(target, replace(run.part(r), stream=run.stream.child("diffusion", r)), data) for r in range(run.replicates)]
        models, ways, flows = zip(*found, strict=True)
        return replace(self, models=models, ways=tuple(way for way in ways if way is not None), flows=flows)

    def sample(self, target: Target, n: int, run: Run) -> Draws:
        """n weighted draws a replicate, rounded up to whole tens; every draw is a unit. Raises ValueError where nothing is fitted."""
        if len(self.models) not in (1, run.replicates):
            raise ValueError(f"this sampler has {len(self.models)} models for {run.replicates} replicates; leave fit=True")
        n, flags = affordable(-(-n // 10) * 10, None, run)
        bare = not self.weighted or isinstance(self.rule, AnnealedLangevin)
        flags += [flag("PATH_WEIGHT_MISSING")] if bare else []
        paths = [self._paths(target, run, r) for r in range(run.replicates)]
        for r, way in enumerate(path.model.reverse for path in paths):
            if isinstance(way, Flowing):
                flags += way.doubts(target.dim, run.stream.child("doubts", r).rng(run.backend.dtype, run.backend.device))
        draws = weighted_draws(target, paths, n, "paths", run, flags, AT_ONCE)
        return replace(draws, log_weight=None) if bare else draws

    def second_look(self, target: Target, replicates: list[Draws], run: Run) -> list[Verdict]:
        """log Z against another SMC run up the explorer's ladder, as in mixture-is; none where the draws were the user's."""
        verdicts = []
        for r, draws in enumerate(replicates):
            own = replace(run, stream=run.stream.child("second look", r))
            way = self.ways[r % len(self.ways)] if self.ways else None
            view, flow = self._latent(target, run, r)
            own = own if flow is None else latent_run(own, target.dim)
            smc = None if way is None else way.explorer.again(view, way.seen, POWER, own)
            verdicts.append(compared(log_z(draws), smc, run.starts.modes is not None))
        return verdicts

    def bounds(self, target: Target, draws: Tensor, seed: int = 0) -> Bounds:
        """The path ELBO and EUBO of the (first) model, log Z between them, from as many paths as there are independent `draws` (n, dim) of
        the target. Paths of kernels only, without defensive ones. Asks log_prob twice for each draw. Raises ValueError."""
        if not self.models or not isinstance(reverse := self.models[0].reverse, Reverse):
            raise ValueError("bounds take a fitted sampler whose rule is one of kernels, such as Ancestral(): fit one by bz.sample")
        flow = self.flows[0] if self.flows else None
        view = target if flow is None else Pullback(target, flow)
        return path_bounds(view, self.models[0].map, reverse, draws, flow, seed)

    # ---- fitting ----

    def _fitted(self, target: Target, run: Run, data: Draws | None) -> tuple[ScoreModel, Climbed | None, Flow | None]:
        """In x; and where weights are poor or tails heavy, in the latent space of a flow as well: the better lower bound of log Z stays."""
        model, way, heavy = self._taught(target, run, data)
        if not self.flow or data is not None or not run.starts.has_gradient or not (heavy or poor(model)) or short(run):
            return model, way, None
        (flow,) = FlowIS().trained(target, replace(run, replicates=1), None)
        inside = latent_run(replace(run, stream=run.stream.child("latent")), target.dim)
        other, climbed, _ = self._taught(Pullback(target, flow), inside, None)
        better = other.looks[-1].found.get("elbo", -math.inf) > model.looks[-1].found.get("elbo", -math.inf)
        return (other, climbed, flow) if better else (model, way, None)

    def _taught(self, target: Target, run: Run, data: Draws | None) -> tuple[ScoreModel, Climbed | None, bool]:
        """A model, the way of its pool, and whether that has heavy tails."""
        way = None
        if data is None:
            explorer = self._explorer(target, run)
            way = Climbed(explorer, explorer(target, run))
            x, log_w, group = way.seen.x, None, torch.arange(len(way.seen.x), device=way.seen.x.device) % explorer.particles
        else:
            x, log_w, group = given(data, target, run)
        pool, map = whitened_pool(target, x, log_w, group, run)
        done = None if way is None else Climbed(way.explorer, way.seen._replace(x=way.seen.x[:0]))
        return self.learned(target, pool, map, run), done, heavy_tailed(pool)

    def learned(self, target: Target | None, pool: Pool, map: Diagonal | Dense, run: Run) -> ScoreModel:
        """What a pool teaches; without a target nobody looks at weights."""
        pool, held = pool.split(run.stream.child("split").rng(run.backend.dtype, run.backend.device))
        levels = Levels.even(self.schedule, NOISE, pool.low, self.steps - 1).to_data()
        rule, share = kernels_of(self.rule), self.training.share
        guide, defense = None, DEFENSE if pool.z.shape[1] <= DEFENDED_UP_TO else 0.0
        if target is not None:
            guide = Guided(Pullback(target, map), levels, rule, held, run, self._share(defense), share)
        done = teach(pool, held, self.training, run, guide)
        run.notes.extend(note for note in done.notes if note not in run.notes)
        rng = run.stream.child("calibration").rng(run.backend.dtype, run.backend.device)
        reverse = Reverse(done.net, levels, rule).calibrated(held.z, rng)
        assert reverse.spread is not None
        open_to = DEFENDED_UP_TO < done.net.dim <= WHERE_IT_HELPS and self.defense is None and self._share(DEFENSE) > 0
        if guide is not None and open_to and guide.wants_defense(reverse, DEFENSE):
            defense = DEFENSE
        return ScoreModel(map, done.net, levels, reverse.spread, self.rule, done.history, done.looks, defense)

    def _explorer(self, target: Target, run: Run) -> Explorer:
        """The explorer, with no more particles than the budget has room for: a climb of few tells how many levels there are."""
        e, limit = self.explorer or by_dimension(target.dim), run.budget.evaluations
        if limit is None:
            return e
        scout = replace(e, particles=SCOUTS, rounds=0)(target, replace(run, stream=run.stream.child("scouts")))
        levels = GUESS if scout.ladder is None else len(scout.ladder.beta) + 1
        each = (levels + e.rounds) * (1 + e.moves * e.L)
        left = POOL_SHARE * (limit - run.reserve - run.ledger.total)
        return replace(e, particles=max(min(e.particles, int(left) // each), SCOUTS))

    def _share(self, own: float) -> float:
        """Of defensive paths: none where there are no kernels to go back by, nor weights; a model's own where the user gave none."""
        if not self.weighted or kernels_of(self.rule) is not self.rule:
            return 0.0
        return own if self.defense is None else self.defense

    # ---- drawing ----

    def _latent(self, target: Target, run: Run, r: int) -> tuple[Target, Flow | None]:
        """What the paths of replicate r end in: the target, or its pull-back through a flow."""
        flow = self.flows[r % len(self.flows)] if self.flows else None
        if flow is None:
            return target, None
        flow = fitting(flow, target, run)
        return Pullback(target, flow), flow

    def _paths(self, target: Target, run: Run, r: int) -> Paths:
        """What the draws of replicate r come from."""
        model = on(self.models[r % len(self.models)], target, run)
        return Paths(model, self._latent(target, run, r)[1], self._share(model.defense))


class Paths(NamedTuple):
    """The ends of diffusion paths as a proposal: -log_q is all of the log-weight that is not the target's."""

    model: ScoreModel
    flow: Flow | None
    share: float

    def sample_and_log_prob(self, n: int, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """n ends x (n, dim), log_q (n,) along their paths, float64, and the ends in whitened units."""
        way, dim = self.model.reverse, self.model.net.dim
        z, log_ratio = defended(way, n, self.share, rng, dim) if isinstance(way, Reverse) else way.draw(n, dim, rng)
        x, log_det = self.model.map.push(z)
        if self.flow is not None:
            x, more = self.flow.push(x)
            log_det = log_det + more
        return x, -(log_ratio + log_det.double()), z


def on(model: ScoreModel, target: Target, run: Run) -> ScoreModel:
    """The model on the run's device and with its map in the run's dtype. Raises ShapeError."""
    if model.net.dim != target.dim:
        raise ShapeError(f"the model has {model.net.dim} dimensions and the target {target.dim}; wanted the same")
    d, t = run.backend.device, run.backend.dtype
    m = model.map
    map = Diagonal(m.m.to(d, t), m.s.to(d, t)) if isinstance(m, Diagonal) else Dense(m.m.to(d, t), m.L.to(d, t))
    return replace(model, map=map, net=model.net.to(d), spread=model.spread.to(d))
