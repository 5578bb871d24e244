"""Gaps: where a flow puts next to nothing and the target has mass.

A flow is continuous and its base is one hill: a ring it cuts open somewhere, and what lies in the cut is e^10 to e^200 times too thin.
Draws of the flow never meet it, chains in the latent space never enter it, and SMC there starts from the same hill: they agree on the
rest of the mass. An exploration in x knows nothing of the flow, and where its particles lie the inverse tells the flow's density.

A particle lies in a gap where log w = log p - log q - log Z is above log n, so that n draws of the flow are there less than once by
Markov's inequality, and above that of every draw, while its log p is nothing new to the draws: far in a tail, or at the bottom of a
narrow neck, particles may have been left behind.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from boltzsample.draws import Draws, Estimate
from boltzsample.estimates.weighted import even_index
from boltzsample.flags import flag
from boltzsample.flows.flow import Flow
from boltzsample.gradcheck import show
from boltzsample.samplers.explore import Explorer
from boltzsample.samplers.sampler import Run, Verdict
from boltzsample.target import Target

EXPLORER = Explorer(particles=2048, moves=1)  # sees .3% of the mass; a flow of the rings lacks 1 to 2%
FEW = 3  # particles in a gap
TAIL = 0.005  # of the draws' log_prob on either side
MOST_PASSES = 128  # dimensions up to which an inverse of dim passes is taken
ASKED = 4096  # draws that are taken, evenly


def gaps(target: Target, flows: tuple[Flow, ...], replicates: list[Draws], log_z: list[Estimate], run: Run) -> list[Verdict]:
    """What one exploration says of the flow of each replicate and its draws: WITNESS_CONFLICT where it found mass in gaps, nothing where
    there can be no such look (no gradient, no inverse, no budget). Entered under "witness"."""
    nothing = [Verdict()] * len(replicates)
    if not run.starts.has_gradient or run.starts.base is None or not any(_can_tell(flow) for flow in flows):
        return nothing
    seen = EXPLORER(target, replace(run, stream=run.stream.child("gaps")), "witness")
    if seen.ladder is None or run.must_stop(len(seen.x)) is not None:
        return nothing
    log_p = target.log_prob(seen.x).double()
    run.ledger.add("witness", (len(seen.x), 0))
    return [_judge(flow, seen.x, log_p, draws, z) for flow, draws, z in zip(flows, replicates, log_z, strict=True)]


def _judge(flow: Flow, x: Tensor, log_p: Tensor, draws: Draws, log_z: Estimate) -> Verdict:
    if not _can_tell(flow) or not bool(log_z.value.isfinite()):  # of weights that are none, too
        return Verdict()
    n, some = draws.log_prob.numel(), _some(draws)
    own_p = draws.log_prob.flatten()[some].double()
    own_w = (own_p - flow.log_prob(draws.x.flatten(0, 1)[some], slowly=True)).nan_to_num(-math.inf) - float(log_z.value)
    most = max(float(own_w.max()), math.log(n))
    low, high = own_p.quantile(TAIL), own_p.quantile(1 - TAIL)
    lost = (log_p - flow.log_prob(x, slowly=True) - float(log_z.value) > most) & (log_p > low) & (log_p < high)
    count = int(lost.sum())
    if count < FEW:
        return Verdict((), f"SMC in x: {count} of {len(x)} particles in gaps of the flow")
    best = show(x[torch.where(lost, log_p, -torch.inf).argmax()], digits=4)
    detail = (
        f"SMC in x: {count} of {len(x)} particles lie where {n} draws of the flow are expected less than once, and no draw has been, "
        f"such as x = {best}; method='auto' needs no flow"
    )
    return Verdict((flag("WITNESS_CONFLICT", value=count / len(x), threshold=FEW / len(x), detail=detail),))


def _can_tell(flow: Flow) -> bool:
    """Whether it knows its density at points of others, at a price within reason."""
    return flow.has_pull or (flow.inverts and flow.dim <= MOST_PASSES)


def _some(draws: Draws) -> Tensor:
    """Indices of ASKED draws at most, of equal weight."""
    n = draws.log_prob.numel()
    whole = torch.arange(n, device=draws.x.device) if draws.log_weight is None else even_index(draws.log_weight.flatten())
    return whole[torch.linspace(0, n - 1, min(ASKED, n), device=whole.device).long()]
