"""Weighted draws of proposals: what samplers share whose draws are independent and carry log w = log p(x) - log q(x)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from boltzsample.draws import Draws
from boltzsample.errors import PositiveInfinityError
from boltzsample.flags import Flag, flag
from boltzsample.flows.base import Base, DefensiveBase
from boltzsample.samplers.sampler import Run, nan_flags
from boltzsample.streams import Rng, Stream
from boltzsample.target import Target

AT_ONCE = 60_000  # rows of a pass through a proposal: whole periods of a defensive base


class Proposal(Protocol):
    """What weighted draws come from."""

    def sample_and_log_prob(self, n: int, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """n draws x (n, dim), their log_q (n,), and what they came from."""


def weighted_draws(
    target: Target, proposals: Iterable[Proposal], n: int, name: str, run: Run, flags: Iterable[Flag], at_once: int = AT_ONCE
) -> Draws:
    """n weighted draws of the proposal of each replicate; every draw is a unit. `name`: of their streams; at_once: draws between two looks
    at the budget. Raises PositiveInfinityError."""
    parts, found = [], list(flags)
    with run.progress.phase("sampling", run.replicates) as bar:
        for r, proposal in enumerate(proposals):
            x, log_p, log_w, more = weighted(target, proposal, n, run.stream.child(name, r), run, at_once)
            found += more
            parts.append((x, log_p, log_w))
            bar.update(1, evaluations=run.ledger.total)
    least = min(len(x) for x, _, _ in parts)
    x, log_p, log_w = (torch.cat([t[:least] for t in part]) for part in zip(*parts, strict=True))
    return Draws(x[:, None], log_p[:, None], log_w[:, None], flags=tuple(dict.fromkeys(found)), scope="given this proposal")


def weighted(
    target: Target, proposal: Proposal, n: int, stream: Stream, run: Run, at_once: int = AT_ONCE
) -> tuple[Tensor, Tensor, Tensor, tuple[Flag, ...]]:
    """x (n, dim), log_prob (n,) and log-weight (n,) in float64 of n draws of a proposal, and what is to be said of them; fewer draws
    where the run must stop. Weight 0 where log_prob is NaN or -inf. Evaluations are entered under "sampling". Raises PositiveInfinityError.
    """
    parts, why = [], None
    for i, at in enumerate(range(0, n, at_once)):
        rng = stream.child("draws", i).rng(run.backend.dtype, run.backend.device)
        x, log_q, _ = proposal.sample_and_log_prob(min(at_once, n - at), rng)
        parts.append((x, target.log_prob(x).double(), log_q.double()))
        run.ledger.add("sampling", (len(x), 0))
        if at + len(x) < n and (why := run.must_stop()) is not None:
            break
    x, log_p, log_q = (torch.cat(part) for part in zip(*parts, strict=True))
    if bool((log_p == torch.inf).any()):
        raise PositiveInfinityError.at(x[log_p == torch.inf][0])
    undefined = torch.isnan(log_p)
    log_w = torch.where(undefined | (log_p == -torch.inf), -torch.inf, log_p - log_q)  # NaN where log_q alone is: BAD_WEIGHTS
    flags = nan_flags(int(undefined.sum()), len(x), "draws, given weight 0")
    return x, log_p, log_w, flags if why is None else (*flags, flag(why, detail=f"{len(x)} of {n} draws"))


def affordable(n: int, base: Base | None, run: Run) -> tuple[int, list[Flag]]:
    """n draws a replicate, or as many as the budget leaves, with the flag that says so; ten at least."""
    limit = run.budget.evaluations
    if limit is None:
        return n, []
    left = max((limit - run.reserve - run.ledger.total) // run.replicates, 10)
    if left >= n:
        return n, []
    few = max(round_up(left - 9, base), 10)
    return few, [flag("STOPPED_EARLY", detail=f"{few} of {n} draws")]


def round_up(n: int, base: Base | None) -> int:
    """n, or the next number that holds whole periods of a defensive base."""
    period = base.period if isinstance(base, DefensiveBase) else 1
    return math.ceil(n / period) * period
