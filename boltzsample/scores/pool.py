"""Draws to learn from, in scaled units, and the batches that are made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from boltzsample.scores.objectives import Batch
from boltzsample.streams import Rng

DTYPE = torch.float32
HELD = 10  # one group in so many is held out
MOST_HELD = 2000


@dataclass(frozen=True, eq=False)
class Pool:
    """Draws z (n, dim) in scaled units; gradients (n, dim) and values (n,) of log pi there, or None; log-weights (n,) or None; group (n,):
    the number of the particle or chain that each was a place of; `low`, `high`: the noise."""

    z: Tensor
    grad: Tensor | None
    log_p: Tensor | None
    log_w: Tensor | None
    group: Tensor
    low: float
    high: float

    def split(self, rng: Rng) -> tuple[Pool, Pool]:
        """(for training, held out): whole groups, at random, for draws of one are alike."""
        groups, member = self.group.unique(return_inverse=True)
        held = rng.uniform(len(groups)).argsort()[member] < max(len(groups) // HELD, 1)
        some = held.nonzero()[:, 0]
        some = some[rng.uniform(len(some)).argsort()[:MOST_HELD]]
        return self[(~held).nonzero()[:, 0]], self[some]

    def __getitem__(self, which: Tensor) -> Pool:
        grad, log_p, log_w = (None if t is None else t[which] for t in (self.grad, self.log_p, self.log_w))
        return Pool(self.z[which], grad, log_p, log_w, self.group[which], self.low, self.high)

    def batch(self, n: int, rng: Rng) -> Batch:
        """n draws by their weights, each with a noise level: one in each n-th of the range of log s."""
        z, u = self.z, rng.uniform(n)
        j = (u * len(z)).long() if self.log_w is None else torch.searchsorted(self._share, u.double())
        return self._noised(j.clamp(max=len(z) - 1), rng)

    @cached_property
    def _share(self) -> Tensor:
        assert self.log_w is not None
        return torch.softmax(self.log_w.double(), 0).cumsum(0)

    def whole(self, rng: Rng) -> Batch:
        """Every draw once (of weighted ones as many, by their weights)."""
        if self.log_w is not None:
            return self.batch(len(self.z), rng)
        return self._noised(torch.arange(len(self.z), device=self.z.device), rng)

    def _noised(self, j: Tensor, rng: Rng) -> Batch:
        z, n = self.z[j].to(DTYPE), len(j)
        u = (torch.arange(n, device=z.device) + rng.uniform(n)) / n
        s = (math.log(self.low) + math.log(self.high / self.low) * u).exp()
        grad = None if self.grad is None else self.grad[j].to(DTYPE)
        sign = torch.where(rng.uniform(*z.shape) < 0.5, -1.0, 1.0)
        return Batch(z, grad, s, rng.normal(*z.shape), sign)
