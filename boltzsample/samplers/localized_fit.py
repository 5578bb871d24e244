"""The guide of weighted paths (localized.py), measured by pilot paths: steps of the chains, control variates, trust, and covariances.

An estimate of a covariance from N draws costs about dim^2 / (4 N) nats in the weights, so all are pooled over particles and shrunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from boltzsample.samplers.localized import Chains, Guide, Mixture, Paths, memberships
from boltzsample.samplers.noised import Noised
from boltzsample.samplers.posterior import Frame, Inner, Seen, Spent, Units, tuned
from boltzsample.schedules import Levels
from boltzsample.streams import Rng

TRIALS = 6  # transitions that tune a step
WORTH = 0.01  # nats: a level that gains less has no chains


def calibrate(target: Units, mixture: Mixture, s: Tensor, inner: Inner, n: int, rng: Rng) -> tuple[Guide, Spent]:
    """A guide from n pilot paths: at each level the step is tuned, then G and W are measured, and the paths go on by them."""
    chains = Chains(target, mixture, s, inner, n, rng)
    J, dim = mixture.m.shape
    G = torch.eye(dim, dtype=s.dtype, device=s.device).expand(len(s), J, dim, dim).clone()
    W = torch.stack([q.L @ q.L.mT for q in chains.noised])
    guide = Guide(mixture, s, torch.full_like(s, float(inner.moves.h)), G, W, torch.ones(len(s), dim, dtype=s.dtype, device=s.device))
    block = Paths(guide, chains, torch.zeros(n, dtype=torch.long, device=s.device))
    y = block.start().draw(rng)
    kernel = inner.moves
    for k in range(len(s)):
        share, means = chains.place(k, y)
        frame = chains.frame(k, means)
        for _ in range(TRIALS):
            kernel = tuned(kernel, chains.seen(k, y, frame, kernel, 1).accept[0], inner.longest)
        guide.h[k] = kernel.h
        seen = chains.seen(k, y, frame, kernel, inner.transitions)
        guide.G[k] = control(seen, frame, J)
        by_chain = chains.means(frame, seen, guide.G[k])
        d = by_chain - (share.exp()[..., None] * means).sum(1)[:, None]  # (n, chains, dim)
        guide.trust[k] = trusted(d, guide.levels, k, chains.noised[k])
        guide.W[k] = spread(chains, frame, k, seen, means, guide.trust[k] * others(d))
        y = block.kernel(k, y, share, means, by_chain.mean(1)).draw(rng)
    return guide, chains.spent


def trusted(d: Tensor, levels: Levels, k: int, q: Noised) -> Tensor:
    """T (dim,) from what each chain would add to the mixture's mean, d (n, chains, dim); zero where it is hardly worth it."""
    if d.shape[1] == 1:
        return torch.ones_like(d[0, 0])
    a, b = d[:, ::2].mean(1), d[:, 1::2].mean(1)
    signal, total = (a * b).mean(0), d.mean(1).square().mean(0).clamp(min=1e-300)
    T = (signal / total - len(d) ** -0.5).clamp(0.0, 1.0)
    _, B, C = levels.ancestral(k)
    V = (q.log_share.exp()[:, None, None] * (q.L @ q.L.mT)).sum(0).diagonal()
    gain = 0.5 * (B.square() * T * signal / (C.square() + B.square() * V)).sum()
    return T if float(gain) > WORTH else torch.zeros_like(T)


def others(d: Tensor) -> Tensor:
    """The mean of the other chains of each particle (n, chains, dim); of one chain, its own."""
    M = d.shape[1]
    return (d.sum(1, keepdim=True) - d) / (M - 1) if M > 1 else d


def control(seen: Seen, frame: Frame, J: int) -> Tensor:
    """G_j = E[g g^T]^-1 of each component (J, dim, dim)."""
    found = []
    for j in range(J):
        g = seen.g[:, frame.j == j].flatten(0, 1)
        found.append(torch.linalg.inv(shrunk(g.mT @ g, float(len(g)))))
    return torch.stack(found)


def spread(chains: Chains, frame: Frame, k: int, seen: Seen, means: Tensor, d: Tensor) -> Tensor:
    """W_j (J, dim, dim): the scatter of draws about m_j(y) + d, d (n, chains, dim) by the other chains."""
    q = chains.noised[k]
    x = frame.push(seen.z)[0]
    of_x = torch.stack([memberships(chains.mixture, part) for part in x])
    found = []
    for j in range(len(q.m)):
        rho, away = of_x[..., j], x - (means[:, j, None] + d).flatten(0, 1)
        z = torch.linalg.solve_triangular(q.L[j], away.flatten(0, 1).mT, upper=False)
        found.append(q.L[j] @ shrunk((rho.flatten() * z) @ z.mT, float(rho.sum())) @ q.L[j].mT)
    return torch.stack(found)


def shrunk(scatter: Tensor, N: float) -> Tensor:
    """A covariance (dim, dim) from the scatter of N draws in coordinates where it should be about the unit matrix: the diagonal shrunk to
    one by dim + 2 draws' worth, and what is beside it by as much as chance explains of it (James & Stein 1961)."""
    dim, eye = len(scatter), torch.eye(len(scatter), dtype=scatter.dtype, device=scatter.device)
    S = (scatter + (dim + 2) * eye) / (N + dim + 2)
    beside = S * (1 - eye)
    chance = (S.diagonal().outer(S.diagonal()) * (1 - eye)).sum() / max(N, 1.0)
    return S * eye + beside * (1 - chance / beside.square().sum().clamp(min=1e-300)).clamp(min=0.0)
