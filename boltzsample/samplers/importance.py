"""Importance weights for a proposal of the user's own: anything with `sample` and `log_prob`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from boltzsample.draws import Draws
from boltzsample.errors import ShapeError
from boltzsample.samplers.sampler import Run, Sampler
from boltzsample.samplers.with_flow import nan_flag, weighted
from boltzsample.streams import Rng
from boltzsample.target import Target


@dataclass(frozen=True, eq=False)
class Importance(Sampler):
    """Weighted draws of `proposal`: a `torch.distributions.Distribution` over R^dim, a Flow, or an object with `sample(n)` -> (n, dim)
    and normalized `log_prob(x)` -> (n,).

    >>> import boltzsample as bz
    >>> target = bz.from_log_prob(lambda x: -0.5 * (x**2).sum(-1), dim=2)
    >>> wide = torch.distributions.MultivariateNormal(torch.zeros(2), 1.5 * torch.eye(2))
    >>> bz.importance(target, wide, n=4_000, seed=0).log_z()         # log 2 pi = 1.8379
    1.83... +- 0.0... (95%, ok)
    """

    proposal: Any
    log_z: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not all(callable(getattr(self.proposal, name, None)) for name in ("sample", "log_prob")):
            kind = type(self.proposal).__name__
            raise TypeError(f"proposal is a {kind}; wanted an object with sample and log_prob, as in torch.distributions")

    def sample(self, target: Target, n: int, run: Run) -> Draws:
        """n draws a replicate; every draw is a unit."""
        stream, total = run.stream.child("importance"), n * run.replicates
        proposal = self.proposal if hasattr(self.proposal, "sample_and_log_prob") else _Seeded(self.proposal, target.dim)
        with run.progress.phase("sampling", 1) as bar:
            x, log_p, log_w, undefined = weighted(target, proposal, total, stream, run)
            run.ledger.add("sampling", (total, 0))
            bar.update(1, evaluations=run.ledger.total)
        return Draws(x[:, None], log_p[:, None], log_w[:, None], flags=nan_flag(undefined, total), scope="given this proposal")


@dataclass(frozen=True)
class _Seeded:
    """The user's proposal, drawing from a seeded copy of the global generator, which is left as it was."""

    proposal: Any
    dim: int

    def sample_and_log_prob(self, n: int, rng: Rng) -> tuple[Tensor, Tensor, None]:
        device = rng.generator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(rng.generator.initial_seed()))
            shape: Any = (n,) if isinstance(self.proposal, torch.distributions.Distribution) else n
            x = torch.as_tensor(self.proposal.sample(shape)).detach()
        log_q = torch.as_tensor(self.proposal.log_prob(x)).detach()
        if tuple(x.shape) != (n, self.dim) or tuple(log_q.shape) != (n,):
            raise ShapeError(
                f"the proposal's sample has shape {tuple(x.shape)} and its log_prob {tuple(log_q.shape)}; wanted ({n}, {self.dim}) and "
                f"({n},): torch.distributions.Independent(d, 1) makes one event of the last axis"
            )
        return x.to(device, rng.dtype), log_q, None
