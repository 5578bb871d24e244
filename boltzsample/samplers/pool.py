"""What weighted paths begin with: a pool of points of the target, and a Gaussian mixture fitted to it.

The pool is an exploration (a small SMC up from the wide base) or the user's own draws. Chains in every mode it leads to give a Gaussian
for each (mixture_is.py). The shares of the components are those of a pilot's weights, or of the user's draws, right or wrong: path weights
make up for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from boltzsample.draws import Draws
from boltzsample.estimates.weighted import even_index
from boltzsample.maps import Dense, Diagonal
from boltzsample.mixture import DefensiveMixture
from boltzsample.samplers.explore import Explored, Explorer
from boltzsample.samplers.localized import Mixture
from boltzsample.samplers.mixture_is import MixtureIS
from boltzsample.samplers.refine import floored
from boltzsample.samplers.sampler import Run
from boltzsample.target import Target

DENSE_UP_TO = 128  # dimensions
INF = float("inf")


@dataclass(frozen=True)
class Given(Explorer):
    """In place of an exploration: points (n, dim) that the user has."""

    points: Tensor | None = None

    def __call__(self, target: Target, run: Run) -> Explored:
        assert self.points is not None
        return Explored(self.points.to(run.backend.device, run.backend.dtype), None, INF)


class Pool(NamedTuple):
    """The units and the mixture in them; how many optima there were, the share of the pool that the mixture is too thin at, and the way of
    the exploration."""

    units: Diagonal | Dense
    mixture: Mixture
    found: int
    forgotten: float
    explored: Explored


def pool(target: Target, explorer: Explorer, data: Draws | None, run: Run) -> Pool:
    """A pool and its mixture, of one replicate."""
    points = None if data is None else _points(data, target.dim)
    source = explorer if points is None else Given(points=points)
    done = MixtureIS(explorer=source).fit(target, replace(run, replicates=1))
    q = done.mixtures[0]
    if points is not None:
        share = q.responsibilities(points.to(q.m)).mean(0)
        q = q.reshared(share.clamp(min=1e-3 / len(share)))
    units = within(q)
    return Pool(units, in_units(q, units), done.found[0], done.forgotten[0], done.explored[0])


def _points(data: Draws, dim: int) -> Tensor:
    x = data.x.reshape(-1, dim)
    return x if data.log_weight is None else x[even_index(data.log_weight.reshape(-1))]


def within(q: DefensiveMixture) -> Diagonal | Dense:
    """The affine map whose unit is the typical width of a mode: the mean of the covariances, each to the power that its share says."""
    a = q.log_share.exp()
    S, m = (a[:, None, None] * (q.L @ q.L.mT)).sum(0), (a[:, None] * q.m).sum(0)
    return Dense(m, torch.linalg.cholesky(S)) if q.dim <= DENSE_UP_TO else Diagonal(m, S.diagonal().sqrt())


def in_units(q: DefensiveMixture, units: Diagonal | Dense) -> Mixture:
    """The components without their defensive parts, in the coordinates of the units."""
    one = torch.eye(q.dim, dtype=q.m.dtype, device=q.m.device)
    inverse = torch.linalg.inv(units.L) if isinstance(units, Dense) else one / units.s
    L = inverse @ q.L
    return Mixture(q.log_share, (q.m - units.m) @ inverse.mT, L @ L.mT)


def reshared(mixture: Mixture, mass: Tensor) -> Mixture:
    """With shares by these masses (J,), a tenth of them equal."""
    eye = torch.eye(mixture.m.shape[1], dtype=mixture.m.dtype, device=mixture.m.device)
    q = DefensiveMixture(mixture.log_share, mixture.m, eye.expand_as(mixture.S))
    return replace(mixture, log_share=floored(q.reshared(mass.clamp(min=1e-12)), len(mass)).log_share)
