"""Importance weights for a proposal of the user's own: anything with `sample` and `log_prob`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from boltzsample.draws import Draws
from boltzsample.errors import ShapeError
from boltzsample.flows.flow import Flow
from boltzsample.samplers.sampler import Run, Sampler
from boltzsample.samplers.weighing import affordable, round_up, weighted
from boltzsample.samplers.with_flow import fitting
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
        """n draws a replicate, or as many as the budget leaves; every draw is a unit."""
        stream, proposal = run.stream.child("importance"), self._proposal(target, run)
        n, flags = affordable(round_up(n, getattr(self.proposal, "base", None)), getattr(self.proposal, "base", None), run)
        with run.progress.phase("sampling", 1) as bar:
            x, log_p, log_w, more = weighted(target, proposal, n * run.replicates, stream, run)
            bar.update(1, evaluations=run.ledger.total)
        x, log_p, log_w = (t[: len(t) // run.replicates * run.replicates] for t in (x, log_p, log_w))
        return Draws(x[:, None], log_p[:, None], log_w[:, None], flags=(*flags, *more), scope="given this proposal")

    def _proposal(self, target: Target, run: Run) -> Any:
        """The proposal with `sample_and_log_prob` in the sampler's space."""
        if isinstance(self.proposal, Flow):
            return fitting(self.proposal, target, run)
        if hasattr(target, "readout") and not hasattr(target, "log_det"):
            raise TypeError(
                "this target reads its points out in another space, whose Jacobian it does not give; "
                "wanted a density made with from_log_prob (with support= where it is constrained)"
            )
        return _Seeded(self.proposal, target)


@dataclass(frozen=True)
class _Seeded:
    """The user's proposal, drawing from a seeded copy of the global generator, which is left as it was."""

    proposal: Any
    target: Target

    def sample_and_log_prob(self, n: int, rng: Rng) -> tuple[Tensor, Tensor, None]:
        """n draws in the sampler's space, and their log q there."""
        x = self._drawn(n, rng)
        log_q = torch.as_tensor(self.proposal.log_prob(x)).detach()
        event = getattr(self.target, "_event_shape", (self.target.dim,))
        if tuple(x.shape) != (n, *event) or tuple(log_q.shape) != (n,):
            raise ShapeError(
                f"the proposal's sample has shape {tuple(x.shape)} and its log_prob {tuple(log_q.shape)}; wanted {(n, *event)} and "
                f"({n},): torch.distributions.Independent(d, 1) makes one event of the last axis"
            )
        here, log_q = x.to(rng.generator.device, rng.dtype), log_q.to(rng.generator.device).double()
        to_z: Any = self.target
        if not hasattr(to_z, "log_det"):
            return here, log_q, None
        z = to_z.pull(here)  # the user's space is constrained: the density of z is that of x times |dx/dz|
        return z, log_q + to_z.log_det(z).double(), None

    def _drawn(self, n: int, rng: Rng) -> Tensor:
        device, seed = rng.generator.device, int(rng.generator.initial_seed())
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.default_generators[device.index or 0].manual_seed(seed)
            shape: Any = (n,) if isinstance(self.proposal, torch.distributions.Distribution) else n
            return torch.as_tensor(self.proposal.sample(shape)).detach()
