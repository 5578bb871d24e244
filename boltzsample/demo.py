"""`boltzsample demo`: Bayesian logistic regression on the breast cancer data (569 x 30, intercept, N(0, 1) prior).

Posterior means with their error bars, beside means from long runs of two independent samplers (the truth card), and
z = difference / joint standard error. The problem is handed in, so that nothing here depends on `targets`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from boltzsample.screen import clip, plus_minus

if TYPE_CHECKING:
    from torch import Tensor

    from boltzsample.results import Result

DRAWS = 4_000
SEED = 0


def demo(problem: Any, folder: Path) -> int:
    """Sample `problem` (with .target, .truth, .description), print the comparison, write demo.png; 3 if untrusted, else 0."""
    from boltzsample.run import sample

    print(f"{problem.description}\n{problem.target.dim} coefficients, method mcmc, {DRAWS:,} draws, seed {SEED}\n", flush=True)
    result = sample(problem.target, method="mcmc", n=DRAWS, seed=SEED)
    mean = problem.truth["mean"]
    print(comparison(result, mean.value, mean.stderr))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "demo.png"
    result.plot("forest", truth=mean.value).savefig(path, dpi=150)
    print(f"figure: {path.resolve()}")
    return 3 if result.status == "untrusted" else 0


def comparison(result: Result, truth: Tensor, truth_stderr: Tensor) -> str:
    """The status, a line a coordinate (name, mean +- error, truth, z, ESS), the worst z and ESS, and what it cost."""
    means = result.means
    z = (means.value - truth) / (means.stderr.square() + truth_stderr.square()).sqrt()
    worst_z, worst_ess = int(z.abs().nan_to_num(float("inf")).argmax()), int(means.ess.nan_to_num(0.0).argmin())
    reasons = [f"  {f}" for f in result.flags if f.severity != "info"]
    lines = [f"status: {result.status}", *reasons, "", f"{'':26}{'mean +- error (95%)':>24}{'truth card':>14}{'z':>8}{'ESS':>9}"]
    for i, name in enumerate(result.labels):
        bar = plus_minus(float(means.value[i]), *means.interval[:, i].tolist())
        lines.append(f"{clip(name, 26):26}{bar:>24}{float(truth[i]):>14.4f}{float(z[i]):>8.2f}{float(means.ess[i]):>9,.0f}")
    gradients = sum(rows[1] for rows in result.ledger.values())
    return "\n".join(
        [
            *lines,
            "",
            f"worst |z|: {float(z[worst_z].abs()):.2f} ({result.labels[worst_z]}); "
            f"worst ESS: {float(means.ess[worst_ess]):,.0f} ({result.labels[worst_ess]})",
            f"evaluations: {result.evaluations:,}, {gradients:,} of them with gradient; {result.seconds:.1f} s",
            *(f"witness: {w}" for w in result.draws.witnesses),
        ]
    )
