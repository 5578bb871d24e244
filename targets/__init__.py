"""The zoo: named problems with known answers.

>>> import torch
>>> p = problem("two-modes-far")
>>> p.target.dim                                  # what a sampler is given: dim, log_prob, grad_log_prob
2
>>> p.truth["mode_weights"].value.tolist()        # what is known, with .stderr (0 = exact) and .how
[0.7, 0.3]
>>> p.exact_sampler(5, torch.Generator()).shape   # independent draws, where that is possible, else None
torch.Size([5, 2])

`PROBLEMS` lists the names. Definitions stand at the top of each family's file; cards in `targets/truth/`.
"""

from __future__ import annotations

from collections.abc import Callable

from targets.funnel import funnel
from targets.gaussian import correlated, ill_conditioned
from targets.logistic import cancer, credit, mines, radar
from targets.mixture import two_modes_far, two_modes_near
from targets.problem import Problem, Quantity, Truth, read_truth
from targets.rosenbrock import banana, rosenbrock
from targets.student_t import student_t

__all__ = ["PROBLEMS", "Problem", "Quantity", "Truth", "problem", "read_truth"]

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "gaussian-corr-d10": correlated,
    "gaussian-ill-d100": ill_conditioned,
    "student-t5-d10": student_t,
    "two-modes-near": two_modes_near,
    "two-modes-far": two_modes_far,
    "funnel-sd3": funnel,
    "banana": banana,
    "rosenbrock": rosenbrock,
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
