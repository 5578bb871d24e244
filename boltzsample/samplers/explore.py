"""Exploration: the particles of an SMC up from the wide base, where the target has mass. They are starts and training data, never draws:
the ladder that carried them was adapted to them. Climbed again, frozen, it makes a second witness."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from boltzsample.densities import StudentT
from boltzsample.samplers.annealing import Cloud, Shape, adapt, annealing_kernel, climb
from boltzsample.samplers.frozen_smc import Annealed, annealed, joined
from boltzsample.samplers.ladder import Ladder
from boltzsample.samplers.sampler import Run
from boltzsample.samplers.warm_up import account
from boltzsample.target import Target

SOME = 128  # of the points that the search for starts reached
LARGE = 0.5  # a V that says nothing about itself
MOST = 8000  # particles of a climb of a second look
CLIMBS = 4


class Explored(NamedTuple):
    """Points (n, dim): the particles, or those that the search for starts had reached where these did not arrive; the ladder they climbed,
    if they did, and the relative variance V of their Zhat; the share of the mass in modes found since that they do not know."""

    x: Tensor
    ladder: Ladder | None
    variance: float
    blind: float = 0.0


@dataclass(frozen=True)
class Explorer:
    """particles: of one ensemble. moves: transitions a level, of L leapfrogs each. cess: conditional ESS of a step up the ladder.
    rounds: of moves more at the top, after each of which the particles are taken again: within a mode that is new data."""

    particles: int = 1024
    moves: int = 2
    L: int = 4
    cess: float = 0.7
    rounds: int = 0

    def __call__(self, target: Target, run: Run, phase: str = "exploration") -> Explored:
        """Climb, and remember the way. Entered in the ledger under that phase. Raises PositiveInfinityError."""
        reached = run.starts.given if run.starts.reached is None else run.starts.reached
        assert reached is not None
        some = reached[torch.linspace(0, len(reached) - 1, min(len(reached), SOME), device=reached.device).long()]
        if run.starts.base is None:
            return Explored(some, None, math.inf)
        cloud = self._cloud(target, run.starts.base, self.particles, run, "exploration")
        with run.progress.phase(phase, 1) as bar:
            ladder = adapt(cloud, self.cess, run.must_stop)
            variance, found = float(cloud.variance[0, 0]), [some] if ladder is None else [cloud.chains.x[0]]
            for _ in range(self.rounds):
                if ladder is not None:
                    cloud.settle(ladder, 1)
                    found.append(cloud.chains.x[0])
            account(run, phase, cloud.chains)
            bar.update(1, evaluations=run.ledger.total)
        return Explored(torch.cat(found), ladder, variance)

    def again(self, target: Target, seen: Explored, stderr: float, run: Run) -> Annealed | None:
        """The same ladder climbed anew with as many particles as it takes for log Z to have this standard error, by the variance that the
        exploration saw; up to three times more where that was too hopeful; None where it would take too many. Entered under "witness".
        """
        n = math.ceil(self.particles * seen.variance / stderr**2) if 0 < seen.variance < LARGE else MOST + 1
        if seen.ladder is None or run.starts.base is None or n > MOST:
            return None
        found: list[Annealed] = []
        with run.progress.phase("second look", 1) as bar:
            while not found or (len(found) < CLIMBS and stderr < joined(found).stderr < math.inf):
                cloud = self._cloud(target, run.starts.base, max(n, min(self.particles, MOST)), run, f"second look {len(found)}")
                climb(cloud, seen.ladder, run.must_stop)
                account(run, "witness", cloud.chains)
                found.append(annealed(cloud))
            bar.update(1, evaluations=run.ledger.total)
        return joined(found)

    def _cloud(self, target: Target, base: StudentT, n: int, run: Run, name: str) -> Cloud:
        backend, kernel = replace(run.backend, compile=False), annealing_kernel(self.L, run.starts.has_gradient)
        return Cloud.start(target, base, kernel, self.moves, Shape(1, 1, n), backend, run.stream.child(name))
