"""The zoo: named problems with known answers.

>>> import torch
>>> p = problem("two-modes-far")
>>> p.target.dim                                  # what a sampler is given: dim, log_prob, grad_log_prob
2
>>> p.truth["mode_weights"].value.tolist()        # what is known, with .stderr (0 = exact) and .how
[0.7, 0.3]
>>> p.exact_sampler(5, torch.Generator()).shape   # independent draws, where that is possible, else None
torch.Size([5, 2])

`PROBLEMS` lists the names. Definitions stand at the top of each family's file; cards in `targets/truth/`. Densities that must
not get a confident answer stand in `targets/controls.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from targets.curved import gmm40_curved, two_modes_curved
from targets.funnel import funnel
from targets.gaussian import correlated, ill_conditioned
from targets.logistic import cancer, credit, mines, radar
from targets.modes import eight_gaussians, gmm40_fab, narrow_spike, two_modes, two_modes_far, two_modes_near, unequal_widths
from targets.particles import dw4
from targets.phi4 import phi4
from targets.problem import Problem, Quantity, Truth, read_truth
from targets.rings import rings_pis, rings_slips
from targets.rosenbrock import banana, rosenbrock
from targets.student_t import student_t
from targets.truncated import truncated_gaussian
from targets.wells import double_well, many_well, multi_well

__all__ = ["PROBLEMS", "Problem", "Quantity", "Truth", "problem", "read_truth"]

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "gaussian-corr-d10": correlated,
    "gaussian-ill-d100": ill_conditioned,
    "student-t5-d10": student_t,
    "two-modes-near": two_modes_near,
    "two-modes-far": two_modes_far,
    "two-modes-d32": two_modes,
    "two-modes-d64": partial(two_modes, 64),
    "two-modes-curved": two_modes_curved,
    "unequal-widths": unequal_widths,
    "narrow-spike": narrow_spike,
    "eight-gaussians": eight_gaussians,
    "gmm40-fab": gmm40_fab,
    "gmm40-curved": gmm40_curved,
    "funnel-sd3": funnel,
    "banana": banana,
    "rosenbrock": rosenbrock,
    "rings-slips": rings_slips,
    "rings-pis": rings_pis,
    "truncated-gaussian": truncated_gaussian,
    "double-well": double_well,
    "multi-well-d5-m5-delta4": multi_well,
    "multi-well-d50-m5-delta2": partial(multi_well, 50, 5, 2.0),
    "many-well-d6": partial(many_well, 6),
    "many-well-d32": many_well,
    "many-well-d64": partial(many_well, 64),
    "phi4-b0": phi4,
    "phi4-b0.025": partial(phi4, b=0.025),
    "phi4-b0.05": partial(phi4, b=0.05),
    "phi4-d32-b0.025": partial(phi4, 32, 0.025),
    "dw4": dw4,
    "cancer": cancer,
    "german-credit": credit,
    "ionosphere": radar,
    "sonar": mines,
}


def problem(name: str) -> Problem:
    """The problem called `name`; ValueError names the known ones."""
    if name not in PROBLEMS:
        raise ValueError(f"unknown problem {name!r}; known: {', '.join(PROBLEMS)}")
    return PROBLEMS[name]()
