"""The truth of `dw4`: long runs of two samplers that share no code. Nothing here is exact but what symmetry gives.

    A   Metropolis in NumPy, particles moved one at a time in R^8 at scales from 0.1 to 4, then all turned together: no gradient,
        no basis, the energy written again from the pairs
    B   HMC on `targets.particles`, gradients by hand, long trajectories, because turning all particles together is slow

Chains start from N(0, 1.5^2 I): starts from far outside the quartic walls throw HMC farther out. The barriers between isomers
are a few units high; R-hat and the agreement of A with B say that both cross them. Relabelling particles, turning and mirroring
the plane act irreducibly on the six coordinates, so E x = 0 and all E x_i^2 are equal: the card holds their average. log Z comes
by bridge sampling from A and from B, and by importance sampling from a Student-t, which uses neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from targets.long_runs import Measured, bridge, combined, compare, hmc_draws, moments
from targets.particles import DoubleWellParticles, helmert
from targets.problem import Problem, Quantity, Truth
from targets.student_t import StudentT, student_t_draws

TAIL_AT = 3.81
METROPOLIS: dict[str, Any] = {"chains": 2048, "warmup": 100, "draws": 1000, "sweeps": 5}
HMC: dict[str, Any] = {"chains": 512, "warmup": 100, "draws": 2000, "h": 0.12, "L": 30}
IMPORTANCE: dict[str, Any] = {"nu": 40.0, "width": 2.1, "draws": 4_000_000}
METHOD = "long runs of Metropolis (NumPy, one particle at a time) and HMC (torch); bridge and importance sampling (targets/dw4_truth.py)"


def derive(p: Problem, seed: int, say: Callable[[str], None]) -> Truth:
    """The truth, its provenance still without versions; the caller judges by `provenance["checks"]["passed"]`."""
    target = p.target
    assert isinstance(target, DoubleWellParticles)
    say("Metropolis (NumPy) ...")
    a, accepted = metropolis_draws(seed, **METROPOLIS)
    say("HMC ...")
    g = torch.Generator().manual_seed(seed + 1)
    chains, settings = HMC["chains"], {key: value for key, value in HMC.items() if key != "chains"}
    b, acceptance = hmc_draws(target.log_prob_and_grad, starts(chains, g), g, **settings)
    say("evidence ...")
    log_z = {"bridge from Metropolis": bridge(target.log_prob, a, g), "bridge from HMC": bridge(target.log_prob, b, g)}
    log_z["importance sampling"] = importance(target, g, **IMPORTANCE)
    of_a, of_b = (moments(x, TAIL_AT) | energy(target, x) for x in (a, b))
    checks = compare(of_a, of_b, log_z, {"Metropolis": a, "HMC": b})
    checks |= {"acceptance": {"Metropolis": round(accepted, 3), "HMC": round(acceptance, 3)}}
    how = ("long runs: inverse-variance average of Metropolis (NumPy) and HMC (torch), stderr from chain averages",) * 2
    quantities = combined(of_a | symmetric(a), of_b | symmetric(b), log_z, TAIL_AT, *how)
    zero = torch.zeros(target.dim, dtype=torch.float64)
    quantities["mean"] = Quantity("mean", zero, zero, "exact: symmetry")
    arguments = {"seed": seed, "Metropolis": METROPOLIS, "HMC": HMC, "importance": IMPORTANCE}
    return Truth(p.name, quantities, {"method": METHOD, "arguments": arguments, "checks": checks})


def starts(chains: int, g: torch.Generator) -> Tensor:
    """(chains, 6)."""
    return 1.5 * torch.randn(chains, 6, generator=g, dtype=torch.float64)


def metropolis_draws(seed: int, chains: int, warmup: int, draws: int, sweeps: int) -> tuple[Tensor, float]:
    """Draws (chains, draws, 6), `sweeps` sweeps apart, and the mean acceptance."""
    rng = np.random.default_rng(seed)
    particles = 1.5 * rng.standard_normal((chains, 4, 2))
    kept, accepted = [], 0.0
    for sweep in range(-warmup * sweeps, draws * sweeps):
        accepted += sum(_move(particles, i, rng) for i in range(4)) / (4 * (warmup + draws) * sweeps)
        turn = np.exp(2j * math.pi * rng.random((chains, 1)))
        turned = (particles[..., 0] + 1j * particles[..., 1]) * turn
        particles = np.stack([turned.real, turned.imag], -1)
        if sweep >= 0 and sweep % sweeps == 0:
            kept.append((helmert(4).numpy().T @ particles).reshape(chains, 6))
    return torch.from_numpy(np.stack(kept, 1)), accepted


def _move(particles: np.ndarray, i: int, rng: np.random.Generator) -> float:
    """Metropolis on particle i of every chain, in place; the share accepted."""
    chains = len(particles)
    others = np.delete(particles, i, 1)
    scale = np.exp(rng.uniform(math.log(0.1), math.log(4.0), (chains, 1)))
    proposed = particles[:, i] + scale * rng.standard_normal((chains, 2))
    rise = _energy(proposed, others) - _energy(particles[:, i], others)
    accept = np.log(rng.random(chains)) < -rise
    particles[accept, i] = proposed[accept]
    return float(accept.mean())


def _energy(particle: np.ndarray, others: np.ndarray) -> np.ndarray:
    u = np.linalg.norm(others - particle[:, None], axis=-1) - 4.0
    return np.asarray((0.9 * u**4 - 4.0 * u**2).sum(1))


def importance(target: DoubleWellParticles, g: torch.Generator, nu: float, width: float, draws: int) -> tuple[float, float]:
    """log Z and its stderr from draws of a Student-t."""
    t = StudentT(torch.zeros(6, dtype=torch.float64), torch.full((6,), width, dtype=torch.float64), nu)
    log_w = []
    for _ in range(20):
        x = student_t_draws(t, draws // 20, g)
        log_w.append(target.log_prob(x) - t.log_prob(x))
    w = torch.cat(log_w)
    log_z = float(torch.logsumexp(w, 0)) - math.log(len(w))
    return log_z, float((w - log_z).exp().std()) / math.sqrt(len(w))


def energy(target: DoubleWellParticles, x: Tensor) -> Measured:
    """E[-log p]."""
    e = torch.stack([-target.log_prob(chain).mean() for chain in x])
    return {"energy": (e.mean(), e.std() / math.sqrt(len(e)))}


def symmetric(x: Tensor) -> Measured:
    """Second moment and sd, the same for every coordinate, from chain averages of |x|^2/6."""
    square = x.square().mean((1, 2))  # (chains,)
    value, stderr = square.mean().expand(6), (square.std() / math.sqrt(len(square))).expand(6)
    return {"second_moment": (value, stderr), "sd": (value.sqrt(), stderr / (2 * value.sqrt()))}
