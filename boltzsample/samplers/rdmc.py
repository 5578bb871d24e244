"""rdmc: reverse diffusion Monte Carlo, the Ornstein-Uhlenbeck process walked backwards by scores that posterior chains estimate.

    x_t = e^-t x_0 + sqrt(1 - e^-2t) xi,        score = (e^-t E[x_0 | x_t] - x_t) / (1 - e^-2t),
    x <- e^d x + 2 (e^d - 1) score + sqrt(e^(2d) - 1) xi

from t = .22, where the process is still far from Gaussian: paths start at tempered draws, the particles of a small SMC, noised, and so do
their posterior chains, after which a few Langevin steps on x_t forget them where they can. At small t chains begin by importance. The
last score's noise would grow as 1 / sqrt(t): the walk ends at a small t with a draw of the posterior there. Approximate: unweighted.py.
Huang, Dong, Hao, Ma & Zhang (2023), arXiv:2307.02037.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from boltzsample.draws import Draws
from boltzsample.errors import NoGradient
from boltzsample.maps import Diagonal
from boltzsample.samplers.explore import Explorer
from boltzsample.samplers.noised import drawn
from boltzsample.samplers.posterior import Inner
from boltzsample.samplers.sampler import Run, Sampler
from boltzsample.samplers.unweighted import reverse_ou
from boltzsample.samplers.walks import Fitted, Walk, affordable_walk, plan_walks, sample_walks
from boltzsample.schedules import OU, Levels
from boltzsample.streams import Rng
from boltzsample.target import Target

NOISE, DATA = 0.75, 0.1  # sigma / alpha at the first level (e^-t = .8) and at the last, in the spread of the exploration
CLIMB = 100  # evaluations of a particle, to share out a budget by
CHEAPER = ((24, 4, 1), (12, 2, 2), (8, 2, 1), (4, 2, 1))  # levels, chains, transitions where the budget is small


@dataclass(frozen=True, eq=False)
class RDMC(Sampler):
    """Unweighted walks. levels: steps of the walk. start: Langevin steps at the first level. corrector: the same at each level.
    `fit` fills `fitted`, one a replicate.

    >>> import boltzsample as bz
    >>> target = bz.from_log_prob(lambda x: -0.5 * (x**2).sum(-1), dim=1)
    >>> result = bz.sample(target, bz.RDMC(), n=1_000, seed=0)
    >>> variance = result.expectation(lambda x: x[..., 0] ** 2)
    >>> bool((variance.value - 1).abs() < 4 * variance.stderr), str(variance.status)
    (True, 'caution')
    """

    levels: int = 32
    inner: Inner = field(default_factory=Inner)
    start: int = 8
    corrector: int = 0
    explorer: Explorer = field(default_factory=lambda: Explorer(particles=4096, cess=0.8))
    fitted: tuple[Fitted, ...] = field(default=(), repr=False)

    def fit(self, target: Target, run: Run, data: Draws | None = None) -> Self:
        """Tempered draws and the steps of the chains, for each replicate one after another. Raises NoGradient."""
        if not run.starts.has_gradient:
            raise NoGradient("rdmc walks by the gradient, and this density has none; use smc or mcmc")
        parts = (replace(run.part(r), stream=run.stream.child("rdmc", r)) for r in range(run.replicates))
        return replace(self, fitted=tuple(self._fitted(target, part) for part in parts))

    def _fitted(self, target: Target, run: Run) -> Fitted:
        x = self._explorer(run)(target, run).x.double()
        units = Diagonal(x.mean(0), x.std(0).clamp(min=1e-12))
        tried = [(self.levels, self.inner, self.start), *((k, Inner(c, t, self.inner.kernel), 1) for k, c, t in CHEAPER)]
        K, inner, start = affordable_walk(tried, target.dim, self.corrector, run)
        levels = Levels.even(OU(), NOISE, DATA, K)
        walk = Walk(Tempered(units.pull(x)), reverse_ou, start, self.corrector, importance=True)
        return plan_walks(target, units, levels, inner, walk, run)

    def _explorer(self, run: Run) -> Explorer:
        """With fewer particles where the budget is small."""
        if run.budget.evaluations is None:
            return self.explorer
        left = run.budget.evaluations - run.reserve - run.ledger.total
        return replace(self.explorer, particles=max(64, min(self.explorer.particles, left // (10 * CLIMB))))

    def sample(self, target: Target, n: int, run: Run) -> Draws:
        """n walks a replicate, or as many as the budget leaves. Raises ValueError, PositiveInfinityError."""
        return sample_walks(target, self.fitted, reverse_ou, n, run)


@dataclass(frozen=True, eq=False)
class Tempered:
    """A start at tempered draws (P, dim): y noised from one of them, chains at draws of the posterior that they make."""

    x: Tensor

    def __call__(self, levels: Levels, n: int, chains: int, rng: Rng) -> tuple[Tensor, Tensor]:
        a, s = levels.alpha[0], levels.sigma[0]
        at = (rng.uniform(n) * len(self.x)).long().clamp(max=len(self.x) - 1)
        y = a * self.x[at] + s * rng.normal(n, self.x.shape[1])
        log_w = -0.5 * (torch.cdist(y, a * self.x) / s).square()
        chosen = drawn(log_w[:, None].expand(-1, chains, -1), rng.uniform(n, chains).double())
        return y, self.x[chosen]


