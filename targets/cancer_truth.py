"""The truth of `cancer`, by two samplers that share no code, and its evidence by three routes.

    A   NUTS of numpyro in x64, on a model written from the raw data, gradients by jax, chains from uniform(-2, 2) starts
    B   HMC in Laplace coordinates w = m + L z, on `targets.logistic`, gradients by hand, chains from N(0, 3^2 I) in z

Chains are the units of every error: stderr = sd of the chain averages / sqrt(chains). A and B must agree within 4 joint
errors in every mean; the card holds their inverse-variance average. log Z comes by bridge sampling (Meng & Wong 1996,
Statistica Sinica 6, 831-860) from A and from B, and by importance sampling from a Student-t, which uses neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from targets.data import breast_cancer
from targets.logistic import LogisticRegression
from targets.problem import Quantity, Truth
from targets.student_t import StudentT, student_t_draws

TAIL_AT = 1.35  # two sd above the mean of w_0
NUTS: dict[str, Any] = {"chains": 64, "warmup": 1000, "draws": 1500}
HMC: dict[str, Any] = {"chains": 512, "warmup": 100, "draws": 900, "h": 0.28, "L": 6}
IMPORTANCE: dict[str, Any] = {"nu": 12.0, "draws": 400_000}
# flow importance sampling with path gradients, each +-.002, of the density without the prior's constant (2 pi)^(-31/2)
PROTOTYPES = (-26.738 - 15.5 * math.log(2 * math.pi), -26.735 - 15.5 * math.log(2 * math.pi))

Measured = dict[str, tuple[Tensor, Tensor]]  # name -> value, stderr


def cancer_truth(target: LogisticRegression, seed: int, say: Callable[[str], None]) -> tuple[Truth, dict[str, Any]]:
    """The truth without its provenance, and the checks, which the caller judges by `checks["passed"]`."""
    say("NUTS (numpyro) ...")
    a, diverging = nuts_draws(seed, **NUTS)
    say("HMC in Laplace coordinates ...")
    m, cholesky = laplace(target)
    b, acceptance = hmc_draws(target, m, cholesky, torch.Generator().manual_seed(seed + 1), **HMC)
    say("evidence ...")
    g = torch.Generator().manual_seed(seed + 2)
    log_z = {"bridge from NUTS": bridge(target, a, g), "bridge from HMC": bridge(target, b, g)}
    log_z["importance sampling"] = importance(target, m, cholesky, g, **IMPORTANCE)
    moments_a, moments_b = moments(a), moments(b)
    checks = compare(moments_a, moments_b, log_z) | {"NUTS divergences": diverging, "HMC acceptance": round(acceptance, 3)}
    checks |= {"worst R-hat": {"NUTS": round(r_hat(a), 4), "HMC": round(r_hat(b), 4)}}
    checks["passed"] = checks["passed"] and max(checks["worst R-hat"].values()) < 1.01
    return Truth("cancer", _quantities(moments_a, moments_b, log_z), {}), checks


# A: numpyro, from the raw data


def nuts_draws(seed: int, chains: int, warmup: int, draws: int) -> tuple[Tensor, int]:
    """Draws (chains, draws, 31) and the number of divergences."""
    try:
        import jax
        import numpyro  # type: ignore[import-untyped]
        from numpyro import distributions
    except ImportError as error:
        raise ImportError("the truth of 'cancer' is made with numpyro; install it with: pip install 'boltzsample[bench]'") from error
    numpyro.enable_x64()
    features, labels, _ = breast_cancer()
    raw = features.numpy()
    design = np.column_stack([(raw - raw.mean(0)) / raw.std(0), np.ones(len(raw))])

    def model() -> None:
        w = numpyro.sample("w", distributions.Normal(0.0, 1.0).expand([design.shape[1]]).to_event(1))
        numpyro.sample("y", distributions.Bernoulli(logits=jax.numpy.asarray(design) @ w), obs=labels.numpy())

    kernel = numpyro.infer.NUTS(model)
    mcmc = numpyro.infer.MCMC(
        kernel, num_warmup=warmup, num_samples=draws, num_chains=chains, chain_method="vectorized", progress_bar=False
    )
    mcmc.run(jax.random.PRNGKey(seed), extra_fields=("diverging",))
    return torch.tensor(np.asarray(mcmc.get_samples(group_by_chain=True)["w"])), int(mcmc.get_extra_fields()["diverging"].sum())


# B: HMC on our own target


def laplace(target: LogisticRegression, newton_steps: int = 30) -> tuple[Tensor, Tensor]:
    """The mode m (dim,) and the Cholesky factor L (dim, dim) of the inverse of minus the Hessian there."""
    rows = target.signed
    m = torch.zeros(target.dim, dtype=torch.float64)
    for _ in range(newton_steps):
        sigma = torch.sigmoid(rows @ m)
        precision = (rows * (sigma * (1 - sigma))[:, None]).mT @ rows + torch.eye(target.dim) / target.prior_sd**2
        m = m + torch.linalg.solve(precision, target.grad_log_prob(m))
    return m, torch.linalg.cholesky(torch.linalg.inv(precision))


def hmc_draws(
    target: LogisticRegression, m: Tensor, cholesky: Tensor, g: torch.Generator, chains: int, warmup: int, draws: int, h: float, L: int
) -> tuple[Tensor, float]:
    """Draws (chains, draws, dim) and the mean acceptance after warm-up. Every step jitters h by up to 25 %."""

    def log_p_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
        log_p, grad = target.log_prob_and_grad(m + z @ cholesky.mT)
        return log_p, grad @ cholesky

    z = 3 * torch.randn(chains, target.dim, generator=g, dtype=torch.float64)
    log_p, grad = log_p_and_grad(z)
    kept, accepted = [], 0.0
    for step in range(warmup + draws):
        v = torch.randn(z.shape, generator=g, dtype=torch.float64)
        eps = h * (0.75 + 0.5 * torch.rand((), generator=g, dtype=torch.float64))
        y, u, log_p_y, grad_y = leapfrog(log_p_and_grad, z, v, grad, eps, L)
        log_r = (log_p_y - u.square().sum(-1) / 2) - (log_p - v.square().sum(-1) / 2)
        accept = torch.rand(chains, generator=g, dtype=torch.float64).log() < log_r
        z, grad = torch.where(accept[:, None], y, z), torch.where(accept[:, None], grad_y, grad)
        log_p = torch.where(accept, log_p_y, log_p)
        if step >= warmup:
            kept.append(m + z @ cholesky.mT)
            accepted += float(accept.double().mean()) / draws
    return torch.stack(kept, 1), accepted


def leapfrog(
    log_p_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]], y: Tensor, u: Tensor, grad: Tensor, eps: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Position, velocity, log_p and gradient after `steps` >= 1 leapfrogs of size eps."""
    for _ in range(steps):
        u = u + eps / 2 * grad
        y = y + eps * u
        log_p, grad = log_p_and_grad(y)
        u = u + eps / 2 * grad
    return y, u, log_p, grad


# the evidence


def bridge(target: LogisticRegression, x: Tensor, g: torch.Generator) -> tuple[float, float]:
    """log Z and its stderr by bridge sampling.

    The proposal q is the Gaussian fitted to the first half of the chains; the other half and as many draws of q are used in

        Z = mean_q[p / (s_1 p + s_2 Z q)] / mean_p[q / (s_1 p + s_2 Z q)],   s_1 = s_2 = 1/2,

    iterated to its fixed point. The error is the jackknife over chains, one block of proposal draws leaving with each chain.
    """
    fit, use = x[: len(x) // 2].flatten(0, 1), x[len(x) // 2 :]  # (n, dim), (chains, draws, dim)
    q = torch.distributions.MultivariateNormal(fit.mean(0), torch.cov(fit.mT))
    y = q.loc + torch.randn(use.shape, generator=g, dtype=torch.float64) @ q.scale_tril.mT
    l_p, l_q = (target.log_prob(points) - q.log_prob(points) for points in (use, y))  # log p/q, (chains, draws)
    log_z = _bridge_fixed_point(l_p, l_q)
    keep = ~torch.eye(len(use), dtype=torch.bool)
    jackknife = torch.tensor([_bridge_fixed_point(l_p[k], l_q[k]) for k in keep])
    return log_z, math.sqrt((len(use) - 1) * float(jackknife.var(correction=0)))


def _bridge_fixed_point(l_p: Tensor, l_q: Tensor, iterations: int = 12) -> float:
    log_z = l_q.median()
    for _ in range(iterations):
        from_q = torch.sigmoid(l_q - log_z).mean()  # p / (p + Z q) at draws of q
        from_p = torch.sigmoid(log_z - l_p).mean()  # Z q / (p + Z q) at draws of p
        log_z = log_z + from_q.log() - from_p.log()
    return float(log_z)


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


# moments, and what the two samplers must agree on


def moments(x: Tensor) -> Measured:
    """Means, second moments, sds and the tail, each with its stderr from chain averages. x: (chains, draws, dim)."""
    mean, chains = x.mean((0, 1)), x.shape[0]
    sd = (x - mean).square().mean((0, 1)).sqrt()
    spread = sd / 2 + (x - mean).square() / (2 * sd)  # linear in the squares: its average is sd, its error is sd's error
    averages = {
        "mean": x.mean(1),
        "second_moment": x.square().mean(1),
        "sd": spread.mean(1),
        "tail": (x[..., 0] > TAIL_AT).double().mean(1),
    }
    return {name: (u.mean(0), u.std(0) / math.sqrt(chains)) for name, u in averages.items()}


def r_hat(x: Tensor) -> float:
    """The worst split R-hat (Gelman et al. 2013, section 11.4) over coordinates. x: (chains, draws, dim)."""
    n = x.shape[1] // 2
    halves = torch.cat([x[:, :n], x[:, n : 2 * n]])
    within, between = halves.var(1).mean(0), halves.mean(1).var(0)
    return float(((n - 1) / n + between / within).sqrt().max())


def compare(a: Measured, b: Measured, log_z: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Joint z-scores of A against B, errors in units of the sd, and the routes to log Z."""
    z = {name: float(((a[name][0] - b[name][0]) / (a[name][1].square() + b[name][1].square()).sqrt()).abs().max()) for name in a}
    mcse = {name: float((x["mean"][1] / x["sd"][0]).max()) for name, x in (("NUTS", a), ("HMC", b))}
    bridges = [log_z["bridge from NUTS"], log_z["bridge from HMC"], log_z["importance sampling"]]
    z_log_z = max(abs(u[0] - v[0]) / math.hypot(u[1], v[1]) for u in bridges for v in bridges)
    near = PROTOTYPES[0] - 0.008 < log_z["bridge from HMC"][0] < PROTOTYPES[1] + 0.008  # 4 of their errors
    return {
        "coordinates": len(a["mean"][0]),
        "worst |z|, NUTS against HMC": {name: round(value, 2) for name, value in z.items()},
        "worst MCSE of a mean, in sd": {name: round(value, 5) for name, value in mcse.items()},
        "log Z": {name: [round(number, 5) for number in pair] for name, pair in log_z.items()},
        "worst |z| between log Z": round(z_log_z, 2),
        "log Z of the design prototypes": f"{PROTOTYPES[0]:.3f} to {PROTOTYPES[1]:.3f}, each +-.002, with the prior's constant put back",
        "passed": max(z.values()) < 4 and max(mcse.values()) <= 0.005 and z_log_z < 4 and near,
    }


def _quantities(a: Measured, b: Measured, log_z: dict[str, tuple[float, float]]) -> dict[str, Quantity]:
    how = "inverse-variance average of NUTS (numpyro) and HMC (torch), stderr from chain averages"
    at = {"tail": torch.tensor(TAIL_AT, dtype=torch.float64)}
    found = {name: Quantity(name, *_average([a[name], b[name]]), how, at.get(name)) for name in a}
    pairs = [(torch.tensor(v, dtype=torch.float64), torch.tensor(e, dtype=torch.float64)) for v, e in log_z.values()]
    log_z_how = "inverse-variance average of bridge sampling from NUTS, from HMC, and Student-t importance sampling"
    return found | {"log_z": Quantity("log_z", *_average(pairs), log_z_how)}


def _average(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    precision = torch.stack([e.square().reciprocal() for _, e in pairs])
    value = (precision * torch.stack([v for v, _ in pairs])).sum(0) / precision.sum(0)
    return value, precision.sum(0).rsqrt()
