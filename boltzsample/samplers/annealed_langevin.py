"""Annealed Langevin dynamics, the sampler of noise-conditional score networks, as a baseline: its draws have no weights.

At each level, from noise to data, a few steps x <- x + h score + sqrt(2h) N(0, I) with h = ratio * sigma^2; at last the denoiser's mean.
Song & Ermon (2019), arXiv:1907.05600, algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from boltzsample.samplers.path_weights import WeightedPath
from boltzsample.samplers.reverse import Denoising, Reverse, score_at
from boltzsample.schedules import Levels
from boltzsample.streams import Rng


@dataclass(frozen=True)
class AnnealedLangevin:
    """moves: Langevin steps at each level, of h = ratio * sigma^2."""

    moves: int = 5
    ratio: float = 0.1


@dataclass(frozen=True, eq=False)
class Cooling:
    """Draws of annealed Langevin dynamics in scaled units, their log-ratio NaN."""

    denoiser: Denoising
    levels: Levels
    rule: AnnealedLangevin = AnnealedLangevin()

    def draw(self, n: int, dim: int, rng: Rng) -> WeightedPath:
        start = Reverse(self.denoiser, self.levels).start(n, dim, rng)
        x, K = start.draw(rng), self.levels.steps
        for k in range(K):
            h = self.rule.ratio * self.levels.sigma[k].square().to(x)
            for _ in range(self.rule.moves):
                x = x + h * score_at(self.levels, k, x, self.denoiser) + (2 * h).sqrt() * rng.normal(n, dim)
        alpha = self.levels.alpha[K - 1].to(x)
        x = self.denoiser(x / alpha, self.levels.sigma[K - 1].to(x) / alpha).mean
        return WeightedPath(x, torch.full((n,), math.nan, dtype=torch.float64, device=x.device))
