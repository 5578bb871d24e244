"""Gaussian mixtures by name, constants and lineages.

    two-modes-near    w = (0.7, 0.3), m = (-1, 0), (1.8, 1.2), s = (1, 0.6), (0.5, 0.9): two bumps that overlap
    two-modes-far     w = (0.7, 0.3), m = (-15, 0), (15, 0), s = 1: local moves never cross the 30 standard deviations
    two-modes-dD      w = (2/3, 1/3), m = -1_d, +1_d, s^2 = 0.05.    Grenioux et al. (2024), SLIPS, arXiv:2402.10758; also LRDS
    unequal-widths    w = (0.6, 0.4), m = (-4, -1), (4, 2), s = 1 and 0.01: the narrow mode has 1e-4 of the volume
    narrow-spike      w = (1/2, 1/2), m = (0, 0), (5, 3), s = 1 and 0.001: 1e-6 of the volume; nobody finds it without a start
    gmm40-fab         40 equal weights, the means of gmm40_means.json, s = softplus(1).  Midgley et al. (2023), FAB, arXiv:2208.01893
    eight-gaussians   8 equal weights on a circle of radius 10, s^2 = 0.7.               SLIPS

Four different densities are called GMM40; those of jax key 0 (scale 1), Generator seed 42 and log-variance 0.1 are not this one.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from targets.mixture import GaussianMixture, Mixture, gaussian_mixture, mixture_draws
from targets.problem import Problem

Pair = tuple[float, float]


def two_modes_near() -> Problem:
    """Two overlapping modes of unequal weight and shape in the plane."""
    means, scales = [[-1.0, 0.0], [1.8, 1.2]], [[1.0, 0.6], [0.5, 0.9]]
    return _two_modes("two-modes-near", means, scales, "two overlapping modes of weights 0.7 and 0.3 in the plane")


def two_modes_far() -> Problem:
    """Two modes 30 standard deviations apart in the plane."""
    means, scales = [[-15.0, 0.0], [15.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]
    return _two_modes("two-modes-far", means, scales, "two modes of weights 0.7 and 0.3, 30 sd apart, in the plane")


def _two_modes(name: str, means: list[list[float]], scales: list[list[float]], about: str) -> Problem:
    target = GaussianMixture(*(torch.tensor(values, dtype=torch.float64) for values in ([0.7, 0.3], means, scales)))
    return Problem(name, target, about, partial(mixture_draws, target))


TWO_TO_ONE: Pair = (2 / 3, 1 / 3)
ALIKE: Pair = (0.05**0.5, 0.05**0.5)


def two_modes(
    d: int = 32, weights: Pair = TWO_TO_ONE, offset: float = 1.0, widths: Pair = ALIKE, turned: bool = False
) -> Problem:
    """Two isotropic modes at -offset 1_d and +offset 1_d; turned: with every other coordinate's sign changed. There are cards for the
    default settings alone."""
    centre = [-offset if turned and i % 2 else offset for i in range(d)]
    target = gaussian_mixture(*isotropic(weights, [[-c for c in centre], centre], widths))
    about = f"two modes of weights {weights[0]:.3g} and {weights[1]:.3g} in {d} dimensions, {2 * offset * d**0.5:.3g} apart"
    usual = (weights, offset, widths, turned) == (TWO_TO_ONE, 1.0, ALIKE, False)
    return _problem(f"two-modes-d{d}" if usual else f"two-modes-d{d}-unlike", target, about)


def unequal_widths() -> Problem:
    """A wide mode and one a hundred times narrower."""
    means, widths = [[-4.0, -1.0], [4.0, 2.0]], (1.0, 0.01)
    about = "modes of widths 1 and 0.01, weights 0.6 and 0.4, in the plane"
    return _problem("unequal-widths", gaussian_mixture(*isotropic((0.6, 0.4), means, widths)), about)


def narrow_spike() -> Problem:
    """Half of the mass in a millionth of the volume."""
    means, widths = [[0.0, 0.0], [5.0, 3.0]], (1.0, 0.001)
    about = "half of the mass in a spike of width 0.001, five widths of the other mode away"
    return _problem("narrow-spike", gaussian_mixture(*isotropic((0.5, 0.5), means, widths)), about)


def gmm40_fab() -> Problem:
    """The forty modes of FAB."""
    means = gmm40_means()
    width = math.log1p(math.e)  # softplus(1)
    target = gaussian_mixture(*isotropic((1 / 40,) * 40, means, (width,) * 40))
    return _problem("gmm40-fab", target, "forty equal modes, strewn over the square of side 80")


def gmm40_means() -> list[list[float]]:
    """The means (40, 2) of FAB."""
    stored = json.loads((Path(__file__).parent / "gmm40_means.json").read_text(encoding="utf-8"))
    means: list[list[float]] = stored["means"]
    return means


def eight_gaussians() -> Problem:
    """Eight modes on a circle."""
    angles = [k * math.pi / 4 for k in range(8)]
    means = [[10 * math.cos(angle), 10 * math.sin(angle)] for angle in angles]
    return _problem("eight-gaussians", gaussian_mixture(*isotropic((1 / 8,) * 8, means, (0.7**0.5,) * 8)), "eight equal modes on a circle")


def isotropic(weights: tuple[float, ...], means: list[list[float]], widths: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """weights (k,), means (k, dim) and scales (k, dim), all scales of a component equal."""
    m = torch.tensor(means, dtype=torch.float64)
    s = torch.tensor(widths, dtype=torch.float64)[:, None].expand_as(m).contiguous()
    return torch.tensor(weights, dtype=torch.float64), m, s


def _problem(name: str, target: Mixture, about: str) -> Problem:
    return Problem(name, target, about, partial(mixture_draws, target))
