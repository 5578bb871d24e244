"""What weighted paths begin with: a pool of points of the target, and a Gaussian mixture fitted to it.

The pool is an exploration (a small SMC up from the wide base) or the user's own draws. Chains in every mode it leads to give a Gaussian
for each (mixture_is.py); up to sixteen dimensions, and where the pool is an exploration, they are moved to the moments of weighted draws
(`settled`). The shares of the components are those of a pilot's weights, or of the user's draws, right or wrong: path weights make up for
them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from boltzsample.draws import Draws
from boltzsample.estimates.weighted import even_index
from boltzsample.maps import Dense, Diagonal
from boltzsample.mixture import DefensiveMixture, fit_em
from boltzsample.samplers.explore import Explored, Explorer
from boltzsample.samplers.localized import Mixture, defensive
from boltzsample.samplers.mixture_is import MixtureIS
from boltzsample.samplers.noised import ALIKE, Noised, by_row, drawn
from boltzsample.samplers.posterior import Units
from boltzsample.samplers.refine import LAST, LAST_SHARE, REFINED_UP_TO, floored, pilot
from boltzsample.samplers.sampler import Run
from boltzsample.streams import Stream
from boltzsample.target import Target

NOISE = 3.0  # the first level, in widths of a mode
DRAWS = 4000
ROUNDS = 20
EFFECTIVE = 20  # draws for each dimension of each component
SLACK = 2.0  # nats
DENSE_UP_TO = 128  # dimensions
INF = float("inf")


@dataclass(frozen=True)
class Given(Explorer):
    """In place of an exploration: points (n, dim) that are there already."""

    points: Tensor | None = None

    def __call__(self, target: Target, run: Run, phase: str = "") -> Explored:
        assert self.points is not None
        return Explored(self.points.to(run.backend.device, run.backend.dtype), None, INF)


class Pool(NamedTuple):
    """The units and the mixture in them; how many optima there were, the share of the pool that is forgotten, and the way of the
    exploration, without its points."""

    units: Diagonal | Dense
    mixture: Mixture
    found: int
    forgotten: float
    explored: Explored


def pool(target: Target, explorer: Explorer, data: Draws | None, run: Run) -> Pool:
    """A pool and its mixture, of one replicate."""
    seen = explorer(target, run) if data is None else Explored(_points(data, target.dim), None, INF)
    done = MixtureIS(explorer=Given(points=seen.x)).fit(target, replace(run, replicates=1))
    q, points = done.mixtures[0], seen.x.double().to(run.backend.device)
    if data is not None:
        share = q.responsibilities(points).mean(0)
        q = q.reshared(share.clamp(min=1e-3 / len(share)))
    units = within(q)
    mixture = in_units(q, units)
    if data is None:
        view = Units(target, units, run.backend.dtype)
        mixture = settled(view, mixture, max(done.found[0], 1), run)  # where no optimum was found there is one component all the same
    seen = seen._replace(x=seen.x[:0], blind=done.explored[0].blind)
    return Pool(units, mixture, done.found[0], forgotten(mixture, units.pull(points)), seen)


def settled(target: Units, mixture: Mixture, modes: int, run: Run) -> Mixture:
    """The components at the moments of the target's draws, by the weights of their own; above 16 dimensions, or where few are effective, as
    they were. In units, where moments do not cancel.

    As a proposal they are good enough long before, for Student-t parts bear what they miss; here they stand alone.
    """
    if target.dim > REFINED_UP_TO or run.must_stop(LAST, LAST_SHARE):
        return mixture
    q = defensive(mixture, wide=0.1)
    seen = pilot(target, q, LAST, run.stream.child("settled").rng(torch.float64, run.backend.device), run)
    if seen.ess * LAST < EFFECTIVE * target.dim * q.components:
        return mixture
    q = floored(fit_em(q, seen.z, torch.softmax(seen.log_w, 0), ROUNDS), modes)
    return Mixture(q.log_share, q.m, q.L @ q.L.mT)


def forgotten(mixture: Mixture, z: Tensor) -> float:
    """The share of the pool z (n, dim), in units, that not even the noised mixture reaches: its density there is below all but a
    thousandth of what it is at draws of the mixture itself. A bent mode is not forgotten, one without a component is."""
    q = Noised(mixture.log_share, mixture.m, mixture.S, torch.as_tensor(NOISE, dtype=z.dtype, device=z.device))
    rng = Stream(0).child("forgotten").rng(z.dtype, z.device)
    j = drawn(mixture.log_share.expand(DRAWS, -1), rng.uniform(DRAWS))
    own = mixture.m[j] + by_row(torch.linalg.cholesky(mixture.S), j, rng.normal(DRAWS, z.shape[1]))
    least = q.log_terms(own).logsumexp(1).quantile(1e-3)
    return float((q.log_terms(z).logsumexp(1) < least - SLACK).double().mean())


def _points(data: Draws, dim: int) -> Tensor:
    x = data.x.reshape(-1, dim)
    return x if data.log_weight is None else x[even_index(data.log_weight.reshape(-1))]


def within(q: DefensiveMixture) -> Diagonal | Dense:
    """The affine map whose unit is the typical width of a mode: the mean of the covariances, each to the power that its share says."""
    a = q.log_share.exp()
    S, m = (a[:, None, None] * (q.L @ q.L.mT)).sum(0), (a[:, None] * q.m).sum(0)
    s = S.diagonal().sqrt()
    r = torch.linalg.eigvalsh(S / s.outer(s))
    plain = q.dim > DENSE_UP_TO or bool(r.max() < ALIKE * r.min())
    return Diagonal(m, s) if plain else Dense(m, torch.linalg.cholesky(S))


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
