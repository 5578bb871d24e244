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

REACHED = 64  # points of N(0, I), where a climb does not arrive
POOR, ROOM = 0.1, 3_000_000  # effective share below which a flow is tried; evaluations that it takes


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


def short(run: Run) -> bool:
    """Whether the budget has no room for a flow and a second pool."""
    limit, seconds = run.budget.evaluations, run.budget.seconds
    return (limit is not None and limit - run.reserve - run.ledger.total < ROOM) or seconds is not None
