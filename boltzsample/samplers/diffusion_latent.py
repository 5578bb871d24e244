"""When a diffusion moves into the latent space of a flow, and the run it has there."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from boltzsample.densities import StudentT
from boltzsample.maps import Diagonal
from boltzsample.samplers.sampler import Run
from boltzsample.samplers.starts import Starts
from boltzsample.scores.model import ScoreModel
from boltzsample.scores.pool import Pool

REACHED = 64  # points of N(0, I), where a climb does not arrive
POOR, HEAVY = 0.1, 10.0  # effective share below which, kurtosis above which a flow is tried
ROOM = 3_000_000  # evaluations that it takes


def latent_run(run: Run, dim: int) -> Run:
    """The run in the latent space of a flow: its wide base is a Student-t of scale 2, narrower beyond ten dimensions (with_flow.py)."""
    like = run.stream.child("reached").rng(run.backend.dtype, run.backend.device)
    reached = like.normal(REACHED, dim)
    scale = torch.full_like(reached[0], 1 + min(1.0, 3.2 / math.sqrt(dim)))
    base = StudentT(Diagonal(torch.zeros_like(scale), scale))
    return replace(run, starts=Starts(base, reached, has_gradient=True))


def poor(model: ScoreModel) -> bool:
    """Whether weights, the largest cut down, are worth less than one draw in ten."""
    return 0 <= model.looks[-1].found.get("cut", -1.0) < POOR


def heavy_tailed(pool: Pool) -> bool:
    """Whether a coordinate has a kurtosis far above 3: one scale does not fit all of its points, as in a funnel."""
    w = torch.full((len(pool.z),), 1 / len(pool.z), dtype=torch.float64) if pool.log_w is None else torch.softmax(pool.log_w.double(), 0)
    z = pool.z.double() - (w.to(pool.z.device)[:, None] * pool.z.double()).sum(0)
    second, fourth = ((w.to(z.device)[:, None] * z**k).sum(0) for k in (2, 4))
    return bool((fourth / second.square()).max() > HEAVY)


def short(run: Run) -> bool:
    """Whether the budget has no room for a flow and a second pool."""
    limit, seconds = run.budget.evaluations, run.budget.seconds
    return (limit is not None and limit - run.reserve - run.ledger.total < ROOM) or seconds is not None
