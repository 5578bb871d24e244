"""Do 95% intervals of means hold where f has few moments, and what do flags make of it?

    python -m benchmarks moments                        # a table; 1,000 runs a row, about ten minutes
    python -m benchmarks moments --runs 200 --n 1000

Independent draws of a Student t_nu, and of a normal for comparison. All: how many of all intervals hold the truth. By the draws alone: of
those that k-hat and ESS leave unflagged, how many hold, and how many these are. With log_prob far out: the same where the fall of the
density is known, too (boltzsample/estimates/far.py). Exit code 1: of 100 unflagged intervals or more, with it, too few hold, as the court
counts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.verdicts import COVERS, clopper_pearson
from boltzsample.draws import Draws, Estimate
from boltzsample.estimates.expectation import expectation

HEAD = "law | f | tail index | draws | all | by the draws alone | with log_prob far out"


class Case(NamedTuple):
    """A law by its degrees of freedom (infinite: the normal), f and its mean."""

    nu: float
    name: str
    f: Callable[[Tensor], Tensor]
    mean: float
    power: int


def squares(nu: float) -> Case:
    return Case(nu, "x^2", torch.square, 1.0 if math.isinf(nu) else nu / (nu - 2), 2)


CASES = (squares(4.2), squares(5), squares(6), squares(8), squares(math.inf), Case(2.5, "x", lambda x: x, 0.0, 1))


def draw(nu: float, n: int, rng: np.random.Generator) -> Tensor:
    """(n, 1, 1) independent draws."""
    x = rng.standard_normal(n) if math.isinf(nu) else rng.standard_t(nu, n)
    return torch.from_numpy(x)[:, None, None]


def asked(case: Case, x: Tensor) -> tuple[Estimate, Estimate]:
    """E f without and with what is known of the density far out."""
    y, blind = case.f(x[..., 0]), Draws(x, torch.zeros(x.shape[:2], dtype=torch.float64))
    if math.isinf(case.nu):
        return (e := expectation(y, blind)), e
    ray = torch.tensor([[1e4], [1e6], [1e8]], dtype=torch.float64) * torch.tensor([1.0, -1.0], dtype=torch.float64)
    seeing = Draws(x, blind.log_prob, far=ray[..., None], fall=torch.full((2,), case.nu * math.log(100), dtype=torch.float64))
    return expectation(y, blind), expectation(y, seeing, None, case.f(ray))


def row(case: Case, n: int, runs: int) -> tuple[str, bool]:
    """A line of the table, and whether it is right."""
    rng = np.random.default_rng(0)
    every, alone, seen = [], [], []
    for _ in range(runs):
        blind, seeing = asked(case, draw(case.nu, n, rng))
        holds = bool(blind.interval[0] <= case.mean <= blind.interval[1])
        every.append(holds)
        alone += [holds] * (blind.status == "ok")
        seen += [holds] * (seeing.status == "ok")
    law = "normal" if math.isinf(case.nu) else f"t_{case.nu:g}"
    shown = " | ".join(f"{sum(h)}/{len(h)}" for h in (every, alone, seen))
    right = len(seen) < 100 or clopper_pearson(sum(seen), len(seen))[1] >= COVERS
    return f"| {law} | {case.name} | {case.nu / case.power:g} | {n:,} | {shown} |", right


def run(args: argparse.Namespace) -> int:
    print(f"| {HEAD} |\n{'|---' * (HEAD.count('|') + 1)}|")
    rows = []
    for case in CASES:
        for n in args.n:
            line, right = row(case, n, args.runs)
            rows.append(right)
            print(line, flush=True)
    return 0 if all(rows) else 1


def add_command(commands: Any) -> None:
    parser = commands.add_parser("moments", help="intervals of means where f has few moments, unflagged and flagged")
    parser.add_argument("--runs", type=int, default=1_000)
    parser.add_argument("--n", type=int, nargs="+", default=[1_000, 3_200, 12_000])
    parser.set_defaults(run=run)
