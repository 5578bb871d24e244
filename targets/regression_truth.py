"""The truths of the logistic regressions, by two samplers that share no code, and their evidence by three routes.

    A   NUTS of numpyro in x64, on a model written from the raw data, gradients by jax, chains from uniform(-2, 2) starts
    B   HMC in Laplace coordinates w = m + L z, on `targets.logistic`, gradients by hand, chains from N(0, 3^2 I) in z

A and B must agree in every number as `targets.long_runs` says; the card holds their inverse-variance average. log Z comes by bridge
sampling from A and from B, and by importance sampling from a Student-t, which uses neither. Numbers that others have found
for the same density stand in `published.json` and must agree as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from targets.data import Dataset, breast_cancer, german_credit, ionosphere, sonar
from targets.logistic import LogisticRegression
from targets.long_runs import bridge, combined, compare, hmc_draws, limit, moments, need_numpyro, nuts_draws
from targets.problem import Problem, Quantity, Truth
from targets.student_t import StudentT, student_t_draws

NUTS: dict[str, Any] = {"chains": 64, "warmup": 1000, "draws": 1500}
HMC: dict[str, Any] = {"chains": 512, "warmup": 100, "draws": 900}
IMPORTANCE: dict[str, Any] = {"nu": 12.0, "draws": 400_000}

METHOD = "NUTS (numpyro, x64) and HMC in Laplace coordinates (torch); bridge and importance sampling (targets/regression_truth.py)"
HOW = (
    "inverse-variance average of NUTS (numpyro) and HMC (torch), stderr from chain averages",
    "inverse-variance average of bridge sampling from NUTS, from HMC, and Student-t importance sampling",
)


@dataclass(frozen=True)
class Setting:
    """What differs between the regressions. `tail_at` lies two sd above the mean of w_0."""

    data: Callable[[], Dataset]
    tail_at: float
    h: float
    L: int


SETTINGS = {
    "cancer": Setting(breast_cancer, 1.35, 0.28, 6),
    "german-credit": Setting(german_credit, -0.55, 0.35, 5),
    "ionosphere": Setting(ionosphere, 4.1, 0.28, 6),
    "sonar": Setting(sonar, 1.9, 0.28, 6),
}


def derive(p: Problem, seed: int, say: Callable[[str], None]) -> Truth:
    """The truth, its provenance still without versions; the caller judges by `provenance["checks"]["passed"]`."""
    target, setting = p.target, SETTINGS[p.name]
    assert isinstance(target, LogisticRegression)
    say("NUTS (numpyro) ...")
    a, diverging = numpyro_draws(p.name, seed, **NUTS)
    say("HMC in Laplace coordinates ...")
    m, cholesky = laplace(target)
    b, acceptance = laplace_hmc(target, m, cholesky, torch.Generator().manual_seed(seed + 1), h=setting.h, L=setting.L, **HMC)
    say("evidence ...")
    g = torch.Generator().manual_seed(seed + 2)
    log_z = {"bridge from NUTS": bridge(target.log_prob, a, g), "bridge from HMC": bridge(target.log_prob, b, g)}
    log_z["importance sampling"] = importance(target, m, cholesky, g, **IMPORTANCE)
    of_a, of_b = moments(a, setting.tail_at), moments(b, setting.tail_at)
    checks = compare(of_a, of_b, log_z, {"NUTS": a, "HMC": b}) | {"NUTS divergences": diverging, "HMC acceptance": round(acceptance, 3)}
    quantities = combined(of_a, of_b, log_z, setting.tail_at, *HOW)
    found = against_published(p.name, quantities)
    checks |= found | {"passed": checks["passed"] and found.get("passed", True)}
    arguments = {"seed": seed, "NUTS": NUTS, "HMC": {**HMC, "h": setting.h, "L": setting.L}, "importance": IMPORTANCE}
    return Truth(p.name, quantities, {"method": METHOD, "arguments": arguments, "checks": checks})


def numpyro_draws(name: str, seed: int, chains: int, warmup: int, draws: int) -> tuple[Tensor, int]:
    """Draws (chains, draws, dim) and the number of divergences."""
    need_numpyro(name)
    from jax import numpy as jnp
    from numpyro import distributions, sample  # type: ignore[import-untyped]

    features, labels, _ = SETTINGS[name].data()
    raw = features.numpy()
    design = np.column_stack([(raw - raw.mean(0)) / raw.std(0), np.ones(len(raw))])

    def model() -> None:
        w = sample("w", distributions.Normal(0.0, 1.0).expand([design.shape[1]]).to_event(1))
        sample("y", distributions.Bernoulli(logits=jnp.asarray(design) @ w), obs=labels.numpy())

    return nuts_draws(seed, chains, warmup, draws, model=model)


def laplace(target: LogisticRegression, newton_steps: int = 30) -> tuple[Tensor, Tensor]:
    """The mode m (dim,) and the Cholesky factor L (dim, dim) of the inverse of minus the Hessian there."""
    rows = target.signed
    m = torch.zeros(target.dim, dtype=torch.float64)
    for _ in range(newton_steps):
        sigma = torch.sigmoid(rows @ m)
        precision = (rows * (sigma * (1 - sigma))[:, None]).mT @ rows + torch.eye(target.dim) / target.prior_sd**2
        m = m + torch.linalg.solve(precision, target.grad_log_prob(m))
    return m, torch.linalg.cholesky(torch.linalg.inv(precision))


def laplace_hmc(
    target: LogisticRegression, m: Tensor, cholesky: Tensor, g: torch.Generator, chains: int, **settings: Any
) -> tuple[Tensor, float]:
    """Draws (chains, draws, dim) and the mean acceptance after warm-up."""

    def log_p_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
        log_p, grad = target.log_prob_and_grad(m + z @ cholesky.mT)
        return log_p, grad @ cholesky

    z, acceptance = hmc_draws(log_p_and_grad, 3 * torch.randn(chains, target.dim, generator=g, dtype=torch.float64), g, **settings)
    return m + z @ cholesky.mT, acceptance


def importance(target: LogisticRegression, m: Tensor, cholesky: Tensor, g: torch.Generator, nu: float, draws: int) -> tuple[float, float]:
    """log Z and its stderr from draws of a Student-t in Laplace coordinates: its tails are heavier, so the weights are bounded."""
    t = StudentT(torch.zeros_like(m), torch.full_like(m, 1.1), nu)
    log_w = []
    for _ in range(20):
        z = student_t_draws(t, draws // 20, g)
        log_w.append(target.log_prob(m + z @ cholesky.mT) + cholesky.diagonal().log().sum() - t.log_prob(z))
    w = torch.cat(log_w)
    log_z = float(torch.logsumexp(w, 0)) - math.log(len(w))
    return log_z, float((w - log_z).exp().std()) / math.sqrt(len(w))


def against_published(name: str, quantities: Mapping[str, Quantity]) -> dict[str, Any]:
    """How far the truth lies from the numbers of `published.json`: joint z for values with an error, a ratio for sds."""
    entry = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8")).get(name)
    if entry is None:
        return {}
    found: dict[str, Any] = {}
    for key, (value, stderr) in entry["numbers"].items():
        q = quantities[key]
        theirs, error = (torch.tensor(number, dtype=torch.float64) for number in (value, stderr))
        z = (q.value - theirs) / (q.stderr.square() + error.square()).sqrt()
        found[f"worst |z| of {key}"] = round(float(z.abs().max()), 2)
    passed = max(found.values()) < limit(sum(quantities[key].value.numel() for key in entry["numbers"]), NUTS["chains"] - 1)
    return {"against published numbers": found | entry, "passed": passed}
