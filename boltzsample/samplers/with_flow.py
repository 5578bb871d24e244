"""What samplers with a flow share: choosing and training one for each replicate, SMC in its latent space, a look for its gaps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from boltzsample.draws import Draws, Estimate
from boltzsample.errors import PositiveInfinityError, ShapeError
from boltzsample.estimates.weighted import even_index
from boltzsample.flags import Flag, flag
from boltzsample.flows.base import DefensiveBase, Normal
from boltzsample.flows.choose import choose
from boltzsample.flows.families import make_flow
from boltzsample.flows.flow import Flow, NoInverse
from boltzsample.flows.train import Training, train
from boltzsample.samplers.frozen_smc import Annealed, FrozenSMC
from boltzsample.samplers.gaps import gaps
from boltzsample.samplers.sampler import Run, Sampler, Verdict
from boltzsample.samplers.second_look import against, both
from boltzsample.streams import Stream
from boltzsample.target import Target
from boltzsample.views import Pullback

TRAINING_SHARE = 0.7  # of the budget
OUT_OF_RANGE = 1e-3


@dataclass(frozen=True, eq=False)
class WithFlow(Sampler):
    """flow: a Flow, the name of a family, or None: chosen by a pilot. training: how it is trained. `fit` fills `flows`, one a replicate."""

    log_z: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    flow: Flow | str | None = None
    training: Training = field(default_factory=lambda: Training(share=TRAINING_SHARE))
    flows: tuple[Flow, ...] = ()

    def trained(self, target: Target, run: Run, data: Draws | None) -> tuple[Flow, ...]:
        """A trained flow for each replicate, one after another, each with a stream of its own."""
        own = (replace(run.part(r), stream=run.stream.child("flow", r)) for r in range(run.replicates))  # a part of what is left then
        return tuple(self._train(target, part, r, data) for r, part in enumerate(own))

    def check(self, target: Target, data: Draws | None) -> None:
        """NoInverse where draws are to be learned from and the flow has no cheap inverse, ShapeError for one of another dimension."""
        named = make_flow(self.flow, target.dim, Stream(0).rng()) if isinstance(self.flow, str) else self.flow
        for flow in self.flows or ((named,) if named is not None else ()):
            of_dim(flow, target)
            if data is not None and not flow.has_pull:
                raise NoInverse(
                    f"data= is learned from by maximum likelihood, which takes the inverse, and that of {flow!r} is not cheap; "
                    "wanted a flow with one, such as 'realnvp' or 'maf'"
                )

    def _train(self, target: Target, run: Run, r: int, data: Draws | None) -> Flow:
        base, init = DefensiveBase(target.dim), run.stream.child("init").rng(run.backend.dtype, run.backend.device)
        start = self.flows[r % len(self.flows)] if self.flows else self.flow
        if start is None and data is None:
            start = choose(target, run, base=base).flow
        elif not isinstance(start, Flow):  # to learn from draws takes an inverse, which the pilot's winner may not have
            start = make_flow(start or "realnvp", target.dim, init, base=base, whitening=run.starts.first_map(run.backend, target.dim))
        done = train(fitting(start, target, run), target, run, self.training, data=data)
        run.notes.extend(note for note in done.notes if note not in run.notes)
        return done.flow

    def ready(self, target: Target, run: Run) -> tuple[Flow, ...]:
        """The flow of each replicate, on the run's device and in its dtype. Raises ValueError where none is trained, ShapeError."""
        flows = self.flows or ((self.flow,) if isinstance(self.flow, Flow) else ())
        if not flows or len(flows) not in (1, run.replicates):
            came = "no trained flow" if not flows else f"{len(flows)} trained flows for {run.replicates} replicates"
            raise ValueError(f"this sampler has {came}; leave fit=True, give flow= a Flow, or ask for replicates={max(len(flows), 1)}")
        here = [fitting(f, target, run) for f in flows]
        return tuple(here[r % len(here)] for r in range(run.replicates))

    def annealed(self, target: Target, run: Run) -> list[Annealed | None]:
        """SMC in the latent space of each distinct flow, from N(0, s^2 I), entered in the ledger under "witness"; None: no gradient.

        s is 2 up to ten dimensions and 1 + 3.2 / sqrt(dim) beyond: the same s would be 21 nats of volume at dim 31.
        """
        found: dict[int, Annealed] = {}
        flows, s = self.ready(target, run), 1 + min(1.0, 3.2 / math.sqrt(target.dim))
        if not run.starts.has_gradient:
            return [None] * len(flows)
        for r, flow in enumerate(flows):
            if id(flow) not in found:
                try:
                    smc = FrozenSMC()(Pullback(target, flow), Normal(target.dim, s), run.stream.child("latent smc", r), run)
                except PositiveInfinityError as error:
                    raise (error if error.x is None else PositiveInfinityError.at(flow.push(error.x[None])[0][0])) from error
                run.ledger.add("witness", (0, smc.rows))
                found[id(flow)] = smc
        return [found[id(flow)] for flow in flows]

    def looked(self, target: Target, replicates: list[Draws], log_z: list[Estimate], run: Run) -> list[Verdict]:
        """A second look at each replicate: its log Z against SMC in the latent space, and its flow against an exploration in x."""
        looks = [against(estimate, smc) for estimate, smc in zip(log_z, self.annealed(target, run), strict=True)]
        return [both(a, b) for a, b in zip(looks, gaps(target, self.ready(target, run), replicates, log_z, run), strict=True)]


def fitting(flow: Flow, target: Target, run: Run) -> Flow:
    """The flow on the run's device and in its dtype. Raises ShapeError for one of another dimension, ValueError for a noisy log-det."""
    of_dim(flow, target)
    if any(getattr(part, "probes", 0) for part in flow.layers.modules()):
        raise ValueError(
            "this flow estimates its log-det with Hutchinson's probes, whose noise of variance s^2 biases weights and log Z by s^2 / 2; "
            "wanted the exact trace: make_flow('ffjord', dim, rng, probes=0)"
        )
    there = {t.device for t in flow.parameters()} or {run.backend.device}
    same = flow.dtype == run.backend.dtype and there == {run.backend.device}
    return flow if same else flow.to(run.backend.device, run.backend.dtype)


def of_dim(flow: Flow, target: Target) -> None:
    """Raises ShapeError for a flow of another dimension than the target's."""
    if flow.dim != target.dim:
        came = f"the flow has {flow.dim} dimensions and the target {target.dim}"
        raise ShapeError(f"{came}; wanted the same: make_flow(family, dim={target.dim}, ...)")


def range_flag(flow: Flow, x: Tensor, log_w: Tensor) -> tuple[Flag, ...]:
    """OUT_OF_RANGE, from points x (n, dim) and their log-weights, resampled to the target's side."""
    if not bool(log_w.max().isfinite()):
        return ()
    outside = float(flow.out_of_range(x[even_index(log_w)]))
    return (flag("OUT_OF_RANGE", value=outside, threshold=OUT_OF_RANGE),) if outside > OUT_OF_RANGE else ()
