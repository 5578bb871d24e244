"""A tempered part for a mixture: against weights at the ends of a mode that bends, too rare to be seen in a run and large enough to matter.

    q(x) = .9 q_1(x) + .1 q_2(x),        q_2 refined against p^(1/2)

Where tails are Gaussian, draws of p^(1/2) reach sqrt(2) times as far into them as those of p, along them however they bend, and p / q_2
falls there; a Student-t about the whole mixture does not follow a bend. (Owen & Zhou 2000, JASA 95(449), for a defensive part; that it is
the tempered target is ours.) Where p^(1/2) has no integral, as for a Student-t of no more degrees of freedom than dimensions, its rounds
come to nothing, and draws of the target refuse the part.

It is tried where q_1 made sqrt(2) times as wide fails as a proposal for p^(1/2). Of one component a mode it has to fail with tempered
shares, too: modes of unequal width change their masses, and that alone is no reason. The Student-t about the whole, up to eight
dimensions, is that of the whole with the part.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from boltzsample.mixture import DefensiveMixture
from boltzsample.samplers.refine import LAST, LAST_SHARE, REFINED_UP_TO, WELL, Draw, log_worth, pilot, refine
from boltzsample.samplers.sampler import Run
from boltzsample.streams import Stream
from boltzsample.target import Target
from boltzsample.views import Tempered

SHARE = 0.1
LOOK = 2000
COST = 0.05  # of the worth of its weights that a mixture may lose by it


def with_tempered_part(target: Target, done: Draw, modes: int, x: Tensor, log_p: Tensor, stream: Stream, run: Run) -> Draw:
    """The mixture with a tempered part, where a look at its tails fails and a budget allows; as it is, where its weights at draws x
    (n, dim) of the target, log p (n,) there, are worth more by a twentieth without. Entered under "pilot"."""
    fine = log_p.isfinite()
    if target.dim > REFINED_UP_TO or not bool(fine.any()) or run.must_stop(2 * LOOK + LAST, LAST_SHARE):
        return done
    half = Tempered(target, torch.tensor(0.5, dtype=x.dtype, device=x.device))
    rng, wide = stream.child("look").rng(run.backend.dtype, run.backend.device), done.proposal.wider(math.sqrt(2))
    first = pilot(half, wide, LOOK, rng, run)
    if not 0 < first.ess < WELL:
        return done
    if wide.components == modes and pilot(half, tempered(wide), LOOK, rng, run).ess >= WELL:
        return done
    part = refine(half, first, modes, stream, run, LAST_SHARE).proposal
    other = done.proposal.joined(part.m, part.L, SHARE * part.log_share.exp())
    old, new = (log_worth((log_p - q.log_prob(x))[fine].cpu()) for q in (done.proposal, other))
    if new < old - COST or run.must_stop(LAST, LAST_SHARE):
        return done
    return pilot(target, other, LAST, rng, run)


def tempered(mixture: DefensiveMixture) -> DefensiveMixture:
    """With the shares that its components have in the square root of the density: (a N(m, S))^(1/2) weighs a^(1/2) |S|^(1/4)."""
    return mixture.reshared((0.5 * (mixture.log_share + mixture.log_det)).softmax(0))
