"""Truths by long runs: HMC over many chains, NUTS of numpyro, bridge sampling, and what two independent samplers must agree on.

Chains are the units of every error: stderr = sd of the chain averages / sqrt(chains). Draws are (chains, draws, dim).

A difference of two such averages in units of its error is a Student-t of at least min(chains) - 1 degrees of freedom (Welch 1947,
Biometrika 34, 28-35). A card asks hundreds of them, and the worst of m is judged by the quantile that it exceeds with probability
at most `FALSE_FAILURES` = 1e-3, whatever their correlations (Bonferroni): 4.8 for m = 106 and 64 chains, where m = 1 would give 3.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from targets.problem import Quantity

FALSE_FAILURES = 1e-3  # how often a right card may fail all its comparisons together

LogProb = Callable[[Tensor], Tensor]
LogProbAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]
Measured = dict[str, tuple[Tensor, Tensor]]  # name -> value, stderr
Routes = dict[str, tuple[float, float]]  # how log Z was found -> value, stderr


def nuts_draws(seed: int, chains: int, warmup: int, draws: int, start: Tensor | None = None, **kernel: Any) -> tuple[Tensor, int]:
    """Draws (chains, draws, dim) of numpyro's NUTS in x64, and the number of divergences.

    `kernel`: either model=..., with one site "w", or potential_fn=..., with start (chains, dim).
    """
    import jax
    from numpyro import infer  # type: ignore[import-untyped]

    mcmc = infer.MCMC(
        infer.NUTS(**kernel), num_warmup=warmup, num_samples=draws, num_chains=chains, chain_method="vectorized", progress_bar=False
    )
    init = None if start is None else jax.numpy.asarray(start.numpy())
    mcmc.run(jax.random.PRNGKey(seed), extra_fields=("diverging",), init_params=init)
    x = mcmc.get_samples(group_by_chain=True)
    return torch.tensor(np.asarray(x["w"] if start is None else x)), int(mcmc.get_extra_fields()["diverging"].sum())


def need_numpyro(name: str) -> None:
    """Switch numpyro to x64, or say what is missing."""
    try:
        import numpyro
    except ImportError as error:
        raise ImportError(f"the truth of '{name}' is made with numpyro; install it with: pip install 'boltzsample[bench]'") from error
    numpyro.enable_x64()


def hmc_draws(
    log_p_and_grad: LogProbAndGrad, z: Tensor, g: torch.Generator, warmup: int, draws: int, h: float, L: int
) -> tuple[Tensor, float]:
    """Draws (chains, draws, dim) from starts z (chains, dim), and the mean acceptance. Every step jitters h by up to 25 %."""
    chains, (log_p, grad) = len(z), log_p_and_grad(z)
    kept, accepted = torch.empty(chains, draws, z.shape[1], dtype=z.dtype), 0.0
    for step in range(-warmup, draws):
        v = torch.randn(z.shape, generator=g, dtype=torch.float64)
        eps = h * (0.75 + 0.5 * torch.rand((), generator=g, dtype=torch.float64))
        y, u, log_p_y, grad_y = leapfrog(log_p_and_grad, z, v, grad, eps, L)
        log_r = (log_p_y - u.square().sum(-1) / 2) - (log_p - v.square().sum(-1) / 2)
        accept = torch.rand(chains, generator=g, dtype=torch.float64).log() < log_r
        z, grad = torch.where(accept[:, None], y, z), torch.where(accept[:, None], grad_y, grad)
        log_p = torch.where(accept, log_p_y, log_p)
        if step >= 0:
            kept[:, step] = z
            accepted += float(accept.double().mean()) / draws
    return kept, accepted


def leapfrog(
    log_p_and_grad: LogProbAndGrad, y: Tensor, u: Tensor, grad: Tensor, eps: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Position, velocity, log_p and gradient after `steps` >= 1 leapfrogs of size eps."""
    for _ in range(steps):
        u = u + eps / 2 * grad
        y = y + eps * u
        log_p, grad = log_p_and_grad(y)
        u = u + eps / 2 * grad
    return y, u, log_p, grad


def bridge(log_prob: LogProb, x: Tensor, g: torch.Generator) -> tuple[float, float]:
    """log Z and its stderr by bridge sampling (Meng & Wong 1996, Statistica Sinica 6, 831-860).

    The proposal q is the Gaussian fitted to the first half of the chains; the other half and as many draws of q are used in

        Z = mean_q[p / (s_1 p + s_2 Z q)] / mean_p[q / (s_1 p + s_2 Z q)],   s_1 = s_2 = 1/2,

    iterated to its fixed point. The error is the jackknife over chains, one block of proposal draws leaving with each chain.
    """
    fit, use = x[: len(x) // 2].flatten(0, 1), x[len(x) // 2 :]  # (n, dim), (chains, draws, dim)
    q = torch.distributions.MultivariateNormal(fit.mean(0), torch.cov(fit.mT))
    y = q.loc + torch.randn(use.shape, generator=g, dtype=torch.float64) @ q.scale_tril.mT
    l_p, l_q = (torch.stack([log_prob(row) - q.log_prob(row) for row in points]) for points in (use, y))  # log p/q, (chains, draws)
    log_z = _bridge_fixed_point(l_p, l_q)
    keep = ~torch.eye(len(use), dtype=torch.bool)
    jackknife = torch.tensor([_bridge_fixed_point(l_p[k], l_q[k]) for k in keep])
    return log_z, math.sqrt((len(use) - 1) * float(jackknife.var(correction=0)))


def _bridge_fixed_point(l_p: Tensor, l_q: Tensor, tolerance: float = 1e-7) -> float:
    log_z = l_q.median()
    for _ in range(200):
        from_q = torch.sigmoid(l_q - log_z).mean()  # p / (p + Z q) at draws of q
        from_p = torch.sigmoid(log_z - l_p).mean()  # Z q / (p + Z q) at draws of p
        change = from_q.log() - from_p.log()
        log_z = log_z + change
        if abs(float(change)) < tolerance:
            break
    return float(log_z)


def moments(x: Tensor, tail_at: float) -> Measured:
    """Means, second moments, sds and P(x_0 > tail_at), each with its stderr from chain averages. x: (chains, draws, dim)."""
    mean, chains = x.mean((0, 1)), x.shape[0]
    sd = (x - mean).square().mean((0, 1)).sqrt()
    spread = sd / 2 + (x - mean).square() / (2 * sd)  # linear in the squares: its average is sd, its error is sd's error
    averages = {
        "mean": x.mean(1),
        "second_moment": x.square().mean(1),
        "sd": spread.mean(1),
        "tail": (x[..., 0] > tail_at).double().mean(1),
    }
    return {name: (u.mean(0), u.std(0) / math.sqrt(chains)) for name, u in averages.items()}


def r_hat(x: Tensor) -> float:
    """The worst split R-hat (Gelman et al. 2013, section 11.4) over coordinates. x: (chains, draws, dim)."""
    n = x.shape[1] // 2
    halves = torch.cat([x[:, :n], x[:, n : 2 * n]])
    within, between = halves.var(1).mean(0), halves.mean(1).var(0)
    return float(((n - 1) / n + between / within).sqrt().max())


def limit(comparisons: int, df: float) -> float:
    """The |z| that the worst of so many comparisons exceeds with probability FALSE_FAILURES at most, each a Student-t of df."""
    return float(stats.t.isf(FALSE_FAILURES / (2 * comparisons), df))


def compare(a: Measured, b: Measured, log_z: Routes, x: dict[str, Tensor]) -> dict[str, Any]:
    """What the samplers A and B and the routes to log Z must agree on; `x`: the draws of both, by name."""
    z = {name: float(((a[name][0] - b[name][0]) / (a[name][1].square() + b[name][1].square()).sqrt()).abs().max()) for name in a}
    mcse = {name: float((m["mean"][1] / m["sd"][0]).max()) for name, m in zip(x, (a, b), strict=True)}
    hats = {name: round(r_hat(draws), 4) for name, draws in x.items()}
    routes = list(log_z.values())
    z_log_z = max(abs(u[0] - v[0]) / math.hypot(u[1], v[1]) for u in routes for v in routes)
    chains = min(len(draws) for draws in x.values())
    comparisons = sum(m[0].numel() for m in a.values()) + math.comb(len(routes), 2)
    limits = {"moments": limit(comparisons, chains - 1), "log Z": limit(comparisons, chains // 2 - 1)}  # a bridge uses half the chains
    return {
        "coordinates": len(a["mean"][0]),
        f"worst |z|, {' against '.join(x)}": {name: round(value, 2) for name, value in z.items()},
        "worst MCSE of a mean, in sd": {name: round(value, 5) for name, value in mcse.items()},
        "worst R-hat": hats,
        "log Z": {name: [round(number, 5) for number in pair] for name, pair in log_z.items()},
        "worst |z| between log Z": round(z_log_z, 2),
        "comparisons": comparisons,
        "limits of |z|": {name: round(value, 2) for name, value in limits.items()},
        "passed": max(z.values()) < limits["moments"]
        and max(mcse.values()) <= 0.005
        and z_log_z < limits["log Z"]
        and max(hats.values()) < 1.01,
    }


def combined(a: Measured, b: Measured, log_z: Routes, tail_at: float, how: str, log_z_how: str) -> dict[str, Quantity]:
    """Inverse-variance averages of A and B and of the routes to log Z."""
    at = {"tail": torch.tensor(tail_at, dtype=torch.float64)}
    found = {name: Quantity(name, *_average([a[name], b[name]]), how, at.get(name)) for name in a}
    pairs = [(torch.tensor(v, dtype=torch.float64), torch.tensor(e, dtype=torch.float64)) for v, e in log_z.values()]
    return found | {"log_z": Quantity("log_z", *_average(pairs), log_z_how)}


def _average(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    precision = torch.stack([e.square().reciprocal() for _, e in pairs])
    value = (precision * torch.stack([v for v, _ in pairs])).sum(0) / precision.sum(0)
    return value, precision.sum(0).rsqrt()
