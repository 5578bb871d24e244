"""Exploration: the particles of an SMC up from the wide base, where the target has mass. They are starts and training data, never draws:
the ladder that carried them was adapted to them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from boltzsample.samplers.annealing import Cloud, Shape, adapt, annealing_kernel
from boltzsample.samplers.sampler import Run
from boltzsample.samplers.warm_up import account
from boltzsample.target import Target

SOME = 128  # of the points that the search for starts reached join the particles


@dataclass(frozen=True)
class Explorer:
    """particles: of one ensemble. moves: transitions a level, of L leapfrogs each. cess: conditional ESS of a step up the ladder.
    rounds: of moves more at the top, after each of which the particles are taken again: within a mode that is new data."""

    particles: int = 1024
    moves: int = 2
    L: int = 4
    cess: float = 0.7
    rounds: int = 0

    def __call__(self, target: Target, run: Run) -> Tensor:
        """Points (n, dim); those that the search for starts had reached where the target is not. Entered under "exploration".

        Raises PositiveInfinityError.
        """
        reached = run.starts.given if run.starts.reached is None else run.starts.reached
        assert reached is not None
        some = reached[torch.linspace(0, len(reached) - 1, min(len(reached), SOME), device=reached.device).long()]
        if run.starts.base is None:
            return some
        backend, stream = replace(run.backend, compile=False), run.stream.child("exploration")
        shape, kernel = Shape(1, 1, self.particles), annealing_kernel(self.L, run.starts.has_gradient)
        cloud = Cloud.start(target, run.starts.base, kernel, self.moves, shape, backend, stream)
        with run.progress.phase("exploration", 1) as bar:
            ladder = adapt(cloud, self.cess, run.must_stop)
            found = [some] if ladder is None else [cloud.chains.x[0]]
            for rung in [] if ladder is None else [*ladder.rungs()][-1:] * self.rounds:
                cloud.settle(rung, 1)
                found.append(cloud.chains.x[0])
            account(run, "exploration", cloud.chains)
            bar.update(1, evaluations=run.ledger.total)
        return torch.cat(found)
