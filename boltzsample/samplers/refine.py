"""Adaptive importance sampling: a mixture improved by what its own weighted draws show.

Each round draws from the present mixture, keeps the draws of the last rounds weighted by the mixture of the proposals that made them
(Cornuet, Marin, Mira & Robert 2012, Scand. J. Stat. 39(4), AMIS), and refits shares, means and covariances by weighted EM. Where
p / q says that the proposal is too thin, components are born on the way from the component that made a draw to the draw itself, narrower
than their parent. The best round by ESS and k-hat wins; none of these draws is reported. Above sixteen dimensions a component takes more
draws to fit than a round has, and rounds bring nothing (measured on regressions of 31 to 61 dimensions and on a chain of 100).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from boltzsample.estimates.tails import is_calm, khat
from boltzsample.mixture import DefensiveMixture, fit_em
from boltzsample.samplers.sampler import Run
from boltzsample.streams import Rng, Stream
from boltzsample.target import Target

ROUNDS = 12
REFINED_UP_TO = 16  # dimensions
MEMORY = 3  # rounds
ENOUGH = 0.9  # ESS per draw that leaves nothing to gain
THIN = 2.0  # p / (Z q) from which the proposal is too thin
MOST_COMPONENTS = 160
FLOOR = 0.1  # the share that all modes have equal parts of, however small they are
PATIENCE = 4  # rounds without a better one
WIDTHS = (0.25, 0.5, 0.75)  # of components made wider, by 1 + WIDTH / sqrt(dim)
CALM, TORN = 0.25, 0.5  # k-hat: of weights that want nothing, and of those that are worth little to an error bar
WELL = 0.8  # ESS per draw of a mixture that may stay as it is
LAST = 8000  # draws that widths are compared by, twice as many where no rounds refine
NOISE = 0.08  # by which k-hat of so many draws differs from look to look
LAST_SHARE = 0.7  # of a budget
AGAIN = 2  # times that refining begins anew where those draws found the mixture torn


class Draw(NamedTuple):
    """A round: the proposal, its draws z (n, dim), log p and log q there (n,), and how good the weights were."""

    proposal: Any
    z: Tensor
    log_p: Tensor
    log_q: Tensor
    ess: float
    khat: float

    @property
    def log_w(self) -> Tensor:
        return self.log_p - self.log_q

    @property
    def score(self) -> float:
        """ESS per draw, less what a heavy tail makes of it."""
        return self.ess - 0.3 * max(0.0, self.khat - 0.4)


def pilot(target: Target, proposal: Any, n: int, rng: Rng, run: Run) -> Draw:
    """n draws of a proposal and how good their weights are. Price: n log_prob, entered under "pilot"."""
    z, log_q, _ = proposal.sample_and_log_prob(n, rng)
    log_p, log_q = target.log_prob(z).double(), log_q.double()
    run.ledger.add("pilot", (n, 0))
    log_p = torch.where(log_p < torch.inf, log_p, -torch.inf)  # NaN is no density, and +inf is for those who draw in earnest to report
    log_w = torch.where(torch.isnan(log_q), -torch.inf, log_p - log_q)
    if not bool(log_w.max().isfinite()):
        return Draw(proposal, z, log_p, log_q, 0.0, math.inf)
    w = (log_w - log_w.max()).exp()
    return Draw(proposal, z, log_p, log_q, float(w.sum().square() / w.square().sum()) / n, _tail(w))


def refine(target: Target, first: Draw, modes: int, stream: Stream, run: Run, share: float = 1.0) -> Draw:
    """The best of the rounds that begin with `first`, within a share of the budget; the first `modes` components stay."""
    rounds, best, stale = [first], first, 0
    with run.progress.phase("refining", ROUNDS) as bar:
        for r in range(ROUNDS):
            n = max(2000, 50 * rounds[-1].proposal.components)
            if target.dim > REFINED_UP_TO or best.ess > ENOUGH or stale >= PATIENCE or run.must_stop(n, share):
                break
            rng = stream.child("round", r).rng(run.backend.dtype, run.backend.device)
            proposal = _improved(rounds[-MEMORY:], modes, rng)
            rounds.append(pilot(target, proposal, n, rng, run))
            stale = 0 if rounds[-1].score > best.score else stale + 1
            best = max(best, rounds[-1], key=lambda d: d.score)
            bar.update(1, ESS=best.ess, evaluations=run.ledger.total)
    return best


def finished(target: Target, first: Draw, modes: int, stream: Stream, run: Run) -> Draw:
    """Refined and widened; again from there where the last draws, which no round was chosen by, found the mixture torn."""
    found: list[Draw] = []
    while len(found) <= AGAIN and (not found or (found[-1].khat > TORN and target.dim <= REFINED_UP_TO)):
        here = stream.child(f"pass {len(found)}") if found else stream
        best = refine(target, found[-1] if found else first, modes, here, run)
        found.append(widened(target, best, here.child("widths").rng(run.backend.dtype, run.backend.device), run))
    return min(found, key=lambda d: max(d.khat, CALM))


def widened(target: Target, best: Draw, rng: Rng, run: Run) -> Draw:
    """The mixture with all its components a little wider, where its weights say that it is too thin: 4% in 31 dimensions cost a twentieth
    of the ESS and took k-hat from .43 to .26 (a regression), from .55 to .28 (two wells leaning towards each other).

    Where no rounds refine, width is all there is against a tail, and a lucky look is no reason to do without.
    """
    n, doubt = (LAST, 0.0) if target.dim <= REFINED_UP_TO else (2 * LAST, NOISE)
    if run.must_stop(n, LAST_SHARE):
        n = LAST
    if run.must_stop(n, LAST_SHARE):
        return best
    tried = [pilot(target, best.proposal, n, rng, run)]
    for width in WIDTHS if tried[0].khat + doubt > CALM or tried[0].ess < WELL else ():
        if run.must_stop(n, LAST_SHARE):
            break
        tried.append(pilot(target, best.proposal.wider(1 + width / math.sqrt(best.proposal.dim)), n, rng, run))
    return max(tried, key=lambda d: worth(d.ess, d.khat + doubt))


def worth(ess: float, khat: float) -> float:
    """ESS per draw, an e^2-th of it where the weights are torn."""
    return ess * math.exp(min(CALM - khat, 0.0) / (TORN - CALM) * 2)


def log_worth(log_w: Tensor) -> float:
    """log of worth, of log-weights (n,) up to a constant at draws of the target: there E w = Z / ESS, and a tail of index k is one of
    k / (1 + k) at the proposal's own draws. Of fewer than 100 draws the tail is not judged."""
    w = (log_w - log_w.max()).exp()
    k = max(_tail(w), 0.0)
    return math.log(worth(1.0, k / (1 + k))) - float(log_w.logsumexp(0))


def _tail(w: Tensor) -> float:
    """k-hat of weights w (n,); 0 where they are calm or too few to say."""
    k = 0.0 if is_calm(w) else float(khat(w[:, None].cpu())[0])
    return 0.0 if math.isnan(k) else k


def _improved(rounds: list[Draw], modes: int, rng: Rng) -> Any:
    """The last mixture, with components where it is thin, refitted to the draws of these rounds."""
    z, log_p = torch.cat([d.z for d in rounds]), torch.cat([d.log_p for d in rounds])
    made = torch.stack([d.proposal.log_prob(z) + math.log(len(d.z) / len(z)) for d in rounds]).logsumexp(0)
    log_w = log_p - made
    if not bool(log_w.max().isfinite()):
        return rounds[-1].proposal
    w = torch.softmax(log_w, 0)
    excess = log_p - rounds[-1].proposal.log_prob(z) - (log_w.logsumexp(0) - math.log(len(z)))
    old = _with_births(rounds[-1].proposal, z, w * (excess > math.log(THIN)), modes, rng)
    return floored(fit_em(old, z, w), modes)


def _with_births(mixture: DefensiveMixture, z: Tensor, w: Tensor, modes: int, rng: Rng) -> DefensiveMixture:
    """New components at some of the draws z, picked by their weights w (n,), which are 0 where the mixture is thick enough."""
    thin = float(w.sum())
    born = min(max(4, modes // 2), MOST_COMPONENTS - mixture.components, int((w > 0).sum()))
    if thin < 0.02 or born < 1:
        return mixture
    gumbel = -(-rng.uniform(len(w)).double().log()).log()
    at = (w.log() + gumbel).topk(born).indices  # without replacement: Efraimidis & Spirakis (2006)
    parent, root = mixture.responsibilities(z[at]).argmax(1), mixture.dim**0.5
    there = (torch.arange(born, device=z.device) % 2 == 0)[:, None]  # every other one at the draw itself, half as wide
    away = torch.where(there, 1.0, 1 / (1 + 0.3 * root)).double() * (z[at].double() - mixture.m[parent])
    width = torch.where(there, 0.5, math.exp(-0.7 / root)).double()
    share = torch.full((born,), min(thin, 0.5) / born, dtype=torch.float64, device=z.device)
    return mixture.joined(mixture.m[parent] + away, width[:, None] * mixture.L[parent], share)


def floored(mixture: DefensiveMixture, modes: int) -> DefensiveMixture:
    """A tenth of the share for the modes in equal parts, whatever their mass: a ratio of masses needs draws on both sides. Later components
    of hardly any share are left out."""
    share = mixture.log_share.exp()
    equal = torch.zeros_like(share)
    equal[:modes] = 1 / modes
    keep = (share > 1e-4) | (equal > 0)
    return mixture.reshared((1 - FLOOR) * share + FLOOR * equal).only(keep)
