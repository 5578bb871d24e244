"""Draws like yours, where there is no density: a diffusion learned from draws alone. No weights, no log Z, and never ok by itself."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from boltzsample.backend import make_backend
from boltzsample.draws import Draws
from boltzsample.flags import flag
from boltzsample.progress import Interrupt, Progress
from boltzsample.results import Result
from boltzsample.samplers.diffusion import Diffusion
from boltzsample.samplers.diffusion_pool import bare_pool, drawn
from boltzsample.samplers.sampler import Budget, Ledger, Run
from boltzsample.samplers.starts import Starts
from boltzsample.settings import describe
from boltzsample.streams import root


def imitate(
    data: Draws,
    n: int = 4_000,
    sampler: Diffusion | None = None,
    *,
    seed: int | None = None,
    budget: Budget | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    compile: Any = "auto",
    progress: bool | None = None,
) -> Result:
    """n draws of a diffusion taught by `data` alone (weighted or not), for densities that nobody can evaluate.

    Nothing can weigh these draws: they carry the errors of the network and of the data, flagged PATH_WEIGHT_MISSING. The Result's
    sampler holds the model: give it to `bz.sample(target, result.sampler, fit=False)` where there is a density after all.

    Raises ValueError, ShapeError.

    >>> import boltzsample as bz
    >>> from boltzsample.scores.training import ScoreTraining
    >>> x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> quick = bz.Diffusion(steps=8, training=ScoreTraining(steps=50, rounds=1))
    >>> bz.imitate(bz.Draws.from_arrays(x), 1000, quick, seed=0).status
    <Status.CAUTION: 'caution'>
    """
    backend, stream, sampler = make_backend(device, dtype, compile), root(seed), sampler or Diffusion()
    with torch.inference_mode(False), torch.no_grad(), Interrupt() as interrupt:
        starts = Starts(None, has_gradient=False)
        run = Run(backend, stream, starts, Ledger(), budget or Budget(), Progress(progress), interrupt, began=time.monotonic())
        pool, map = bare_pool(*drawn(data, run))
        model = sampler.learned(None, pool, map, run)
        x = model.map.push(model.reverse.draw(n, model.net.dim, stream.child("paths").rng(backend.dtype, backend.device)).x)[0]
    nan = torch.full((n, 1), torch.nan, dtype=torch.float64, device=x.device)
    flags = (flag("PATH_WEIGHT_MISSING"), flag("SINGLE_WITNESS"), *run.notes)
    config = {"method": "imitate", "log_z": False, "n": n, "seed": stream.seed, "sampler": describe(sampler)}
    return Result(Draws(x[:, None], nan, flags=flags, scope="given this network"), None, replace(sampler, models=(model,)), config)
