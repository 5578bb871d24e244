"""A look by annealed SMC at a density with a base of its own: one ensemble up a frozen ladder, log Z with the error bar of Lee & Whiteley.

It owes nothing to a flow's weights, so it serves as a second look in a flow's latent space. The engine is annealing.py's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from boltzsample.backend import Backend
from boltzsample.flows.base import Base
from boltzsample.samplers.annealing import Cloud, Shape, adapt, annealing_kernel, climb
from boltzsample.samplers.sampler import Run
from boltzsample.samplers.warm_up import spent
from boltzsample.streams import Stream
from boltzsample.target import Target

FEW_EVES = 30


@dataclass(frozen=True)
class Annealed:
    """What a frozen pass returned. x: (particles, dim), equally weighted after the last level. log_z: (). variance: V, the relative
    variance of Zhat. eves: how many of the first particles have descendants. rows: evaluations of both passes, all with gradient."""

    x: Tensor
    log_z: float
    variance: float
    eves: int
    rows: int

    def apart(self, log_z: float, stderr: float) -> float | None:
        """How many joint standard errors another estimate is away; None where either has no error bar."""
        joint = math.hypot(self.stderr, stderr)
        found = abs(log_z - self.log_z) / joint if joint > 0 else math.nan
        return found if math.isfinite(found) and math.isfinite(joint) else None

    @property
    def stderr(self) -> float:
        """Standard error of log_z, inf where the run says that it has none to give."""
        if not 0 < self.variance < 1 or self.eves < FEW_EVES:
            return math.inf
        return math.sqrt(math.log1p(self.variance))


@dataclass(frozen=True)
class FrozenSMC:
    """Settings. particles N; moves: HMC transitions a level, of L leapfrogs each; cess: conditional ESS of a step up the ladder.

    >>> import boltzsample as bz
    >>> from boltzsample.flows.base import Normal
    >>> narrow = bz.from_log_prob(lambda z: -2 * z.square().sum(-1), dim=2)         # Z = pi / 2
    >>> found = FrozenSMC(particles=512)(narrow, Normal(2, 2.0), bz.streams.Stream(0))
    >>> abs(found.log_z - math.log(math.pi / 2)) < 4 * found.stderr < 0.4
    True
    """

    particles: int = 2048
    moves: int = 2
    L: int = 5
    cess: float = 0.8

    def __call__(self, target: Target, base: Base, stream: Stream, run: Run | None = None) -> Annealed:
        """Both passes; `run`, where given, says dtype and device and when to stop (then log_z is nan). Raises PositiveInfinityError."""
        first = self._cloud(target, base, stream.child("adapt"), run)
        ladder = adapt(first, self.cess, lambda price: None if run is None else run.must_stop(price))
        if ladder is None:  # it never reached the target: there is no ladder to freeze
            return annealed(first)
        cloud = self._cloud(target, base, stream.child("frozen"), run)
        climb(cloud, ladder, lambda price: None if run is None else run.must_stop(spent(first.chains) + price))
        return annealed(cloud, spent(first.chains))

    def _cloud(self, target: Target, base: Base, stream: Stream, run: Run | None) -> Cloud:
        backend = replace(Backend() if run is None else run.backend, compile=False)
        return Cloud.start(target, base, annealing_kernel(self.L, True), self.moves, Shape(1, 1, self.particles), backend, stream)


def annealed(cloud: Cloud, rows: int = 0) -> Annealed:
    """What a cloud of one ensemble returned, and the rows spent, some of them before."""
    log_z, variance = float(cloud.log_z[0, 0]), float(cloud.variance[0, 0])
    return Annealed(cloud.chains.x[0], log_z, variance, int(cloud.eves[0]), rows + spent(cloud.chains))


def joined(found: list[Annealed]) -> Annealed:
    """Several runs of equally many particles as one: Zhat is their mean, and V / k its relative variance."""
    log_z, k = torch.tensor([f.log_z for f in found], dtype=torch.float64), len(found)
    variance = sum(f.variance for f in found) / k**2
    x, whole = torch.cat([f.x for f in found]), float(log_z.logsumexp(0)) - math.log(k)
    return Annealed(x, whole, variance, sum(f.eves for f in found), sum(f.rows for f in found))
