"""Where a localization may begin: two certificates for a noise level, and the window where both hold.

At noise level s, y = x + s xi, two things have to be easy at once:

    posterior    chains on p(x | y) from far apart agree, or the score is wrong: asks for little noise
    marginal     chains on y by that score from far apart agree, or the start repeats where it began: asks for much

Each certificate is an analysis of variance: chains that share a start against chains that do not. R = between / (between + within) is 0
where starts are forgotten and 1 where nobody leaves his own. Of far modes in many dimensions the window is empty: no level has both, and
the masses of modes cannot come from a localization (WINDOW_EMPTY).

Grenioux et al. (2024), arXiv:2402.10758, section 4 ("duality of log-concavity"), where the level is told by a grid search on the answer.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from boltzsample.samplers.posterior import Inner, Units, tuned
from boltzsample.samplers.unweighted import BEGIN, TRIALS, Walkers
from boltzsample.schedules import Levels
from boltzsample.streams import Rng

GRID = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # noise levels, in the units of the starts
OBSERVED, STARTS, COPIES = 32, 4, 2  # observations y; starts of each; chains from each start
MARGINAL = 48  # starts of chains on y
ROUNDS = 16  # Langevin steps on y
AGREE = 0.3  # R


class Window(NamedTuple):
    """R of both certificates at each noise level, and the level to start from: the least noisy one inside the window, or, where it is
    empty, the one whose worse R is the least."""

    noise: tuple[float, ...]
    posterior: tuple[float, ...]
    marginal: tuple[float, ...]

    @property
    def inside(self) -> tuple[float, ...]:
        """The noise levels at which both hold."""
        return tuple(s for s, p, m in zip(*self, strict=True) if p < AGREE and m < AGREE)

    @property
    def start(self) -> float:
        if self.inside:
            return self.inside[0]
        held = [s for s, m in zip(self.noise, self.marginal, strict=True) if m < AGREE]
        return held[0] if held else self.noise[-1]


def between(x: Tensor) -> float:
    """R of x (groups, starts, copies, dim): the variance between starts over all of it, pooled over groups and coordinates."""
    within = float(x.var(2).mean((0, 1)).sum())
    means = max(float(x.mean(2).var(1).mean(0).sum()) - within / x.shape[2], 0.0)
    return means / max(means + within, 1e-300)


def window(target: Units, points: Tensor, inner: Inner, rng: Rng) -> tuple[Window, list[Walkers]]:
    """Both certificates on the grid, from points (n, dim) of the target in its units; and the walkers, for what they have cost."""
    found, all_walkers = [], []
    for s in GRID:
        levels = Levels(points.new_ones(1), points.new_full((1,), s))
        one, walkers = posterior_certificate(target, levels, points, inner, rng)
        other, more = marginal_certificate(target, levels, points, inner, rng)
        found.append((s, one, other))
        all_walkers += [walkers, more]
    return Window(*zip(*found, strict=True)), all_walkers


def posterior_certificate(target: Units, levels: Levels, points: Tensor, inner: Inner, rng: Rng) -> tuple[float, Walkers]:
    """R of chains on p(x | y), y noised from some of the points, started at others."""
    dim, M = points.shape[1], STARTS * COPIES
    y = some(points, (OBSERVED,), rng) + levels.sigma[0] * rng.normal(OBSERVED, dim)
    x = some(points, (OBSERVED, STARTS, 1), rng).expand(-1, -1, COPIES, -1).reshape(OBSERVED, M, dim)
    walkers = Walkers(target, levels, Inner(M, inner.transitions, inner.kernel), y, x.clone(), rng)
    _settled(walkers)
    return between(walkers.x.reshape(OBSERVED, STARTS, COPIES, dim)), walkers


def marginal_certificate(target: Units, levels: Levels, points: Tensor, inner: Inner, rng: Rng) -> tuple[float, Walkers]:
    """R of chains on y by the posterior chains' score, started at noised points, where their posterior chains start as well."""
    dim, n = points.shape[1], MARGINAL * COPIES
    x = some(points, (MARGINAL, 1), rng).expand(-1, COPIES, -1).reshape(n, dim)
    y = x + levels.sigma[0] * rng.normal(n, dim)
    walkers = Walkers(target, levels, inner, y, x[:, None].expand(-1, inner.chains, -1).clone(), rng)
    h = _settled(walkers)
    for _ in range(ROUNDS):
        walkers.correct(0, walkers.means(0, h).u)
    return between(walkers.y.reshape(1, MARGINAL, COPIES, dim)), walkers


def _settled(walkers: Walkers) -> Tensor:
    """Tune the step, and let the chains settle."""
    kernel = walkers.inner.moves
    for _ in range(TRIALS + BEGIN):
        kernel = tuned(kernel, walkers.seen(0, kernel.h, 1).accept[0], walkers.inner.longest)
    walkers.seen(0, kernel.h, BEGIN)
    return kernel.h


def some(points: Tensor, shape: tuple[int, ...], rng: Rng) -> Tensor:
    """Points drawn with replacement (*shape, dim)."""
    return points[(rng.uniform(*shape) * len(points)).long().clamp(max=len(points) - 1)]
