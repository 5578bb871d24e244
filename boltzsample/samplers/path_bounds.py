"""The two bounds of log Z that paths give, the upper one from draws of the target walked back to noise."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from boltzsample.flows.flow import Flow
from boltzsample.maps import Dense, Diagonal
from boltzsample.samplers.reverse import Reverse
from boltzsample.streams import Stream
from boltzsample.target import Target
from boltzsample.views import Pullback


class Bounds(NamedTuple):
    """E_q log w <= log Z <= E_(pi prod b) log w, and their standard errors."""

    elbo: float
    elbo_stderr: float
    eubo: float
    eubo_stderr: float

    @property
    def gap(self) -> float:
        return self.eubo - self.elbo


def path_bounds(target: Target, map: Diagonal | Dense, reverse: Reverse, draws: Tensor, flow: Flow | None, seed: int) -> Bounds:
    """Of as many paths as there are independent draws (n, dim); flow: what `target`, where it is one in a latent space, was pulled back by.
    Raises NoInverse where the draws cannot be taken into that space."""
    view, rng = Pullback(target, map), Stream(seed).child("bounds").rng(draws.dtype, draws.device)
    with torch.no_grad():
        path = reverse.draw(len(draws), draws.shape[1], rng)
        lower = path.log_ratio + view.log_prob(path.x)
        z = map.pull(draws if flow is None else flow.pull(draws)[0])
        upper = reverse.back(z, rng).log_ratio + view.log_prob(z)
    return Bounds(*(float(v) for log_w in (lower, upper) for v in (log_w.mean(), log_w.std() / math.sqrt(len(log_w)))))
