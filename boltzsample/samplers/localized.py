"""Weighted paths from a noised mixture to the target, steered by posterior chains.

y_0 is drawn from the noised mixture q_(s_0) itself, in closed form; then, over levels s_0 > s_1 > ... > s_K > 0, to x,

    f_k(y' | y) = sum_j r_j(y) N(A y + B (m_j(y) + d), C^2 I + B^2 W_kj),        d = T_k (u - E_q[x | y]),     b_k(y | y') = N(y'; y, c^2 I)

with the ancestral A, B, C (schedules.py), the mixture's posterior shares r_j and means m_j(y) (noised.py) and u the mean of posterior
chains at y. Where the mixture is the target f_k is exact at any step; what it lacks, the chains' mean adds. T_k trusts them, coordinate by
coordinate, as far as two halves of a particle's chains say the same: E[d_a d_b] / E[d^2]. Levels where that would gain less than a
hundredth of a nat have no chains. W_kj is the covariance of draws about the mean of the *other* chains of their particle, so it holds the
posterior's width and the noise of u; it is pooled over all particles of a pilot and frozen, as are T, the matrices G of the control variate
and the steps of the chains. Each path is one of two widths,
a tenth of them c times wider at every step, and its weight is that of the mixture of both laws (Hesterberg 1995).

Weights are exact with noisy means: given y, the chains are auxiliary variables that depend on the past alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from boltzsample.kernels.kernel import StepSized
from boltzsample.samplers.noised import Kernel, Noised, by_row, drawn, inverted, log_normal
from boltzsample.samplers.path_weights import Gaussian, walk
from boltzsample.samplers.posterior import Frame, Inner, Seen, Spent, Units, look, posterior, tuned
from boltzsample.schedules import Levels
from boltzsample.streams import Rng

WIDE = 0.1  # of the paths
TRIALS = 6  # transitions that tune a step
WORTH = 0.01  # nats: a level that gains less has no chains
FIRST = 2  # transitions more where chains begin


@dataclass(frozen=True, eq=False)
class Mixture:
    """Shares log a (J,), means (J, dim), covariances (J, dim, dim)."""

    log_share: Tensor
    m: Tensor
    S: Tensor


@dataclass(frozen=True, eq=False)
class Guide:
    """All that paths need, frozen: mixture, noise levels s (K + 1,), and of each level the chains' step h (K + 1,), the matrices G of
    the control variate and the covariances W (K + 1, J, dim, dim), and the trust (K + 1, dim)."""

    mixture: Mixture
    s: Tensor
    h: Tensor
    G: Tensor
    W: Tensor
    trust: Tensor

    @property
    def looks(self) -> int:
        """Levels at which chains run."""
        return int((self.trust > 0).any(1).sum())

    @property
    def steps(self) -> int:
        return len(self.s)

    @property
    def levels(self) -> Levels:
        return Levels(torch.ones_like(self.s), self.s).to_data()


class Chains:
    """The posterior chains of a block of n paths."""

    def __init__(self, target: Units, mixture: Mixture, s: Tensor, inner: Inner, n: int, rng: Rng) -> None:
        self.target, self.mixture, self.inner, self.n, self.rng, self.spent = target, mixture, inner, n, rng, Spent()
        self.noised = [Noised(mixture.log_share, mixture.m, mixture.S, level) for level in s]
        self.label = torch.zeros(n, inner.chains, dtype=torch.long, device=s.device)
        self.z = torch.zeros(n, inner.chains, mixture.m.shape[1], dtype=s.dtype, device=s.device)
        self.share: Tensor | None = None  # log r (n, J) at the last level

    def place(self, k: int, y: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and coordinates for level k: chains keep theirs, but those whose component lost its share at y begin anew as draws of
        the mixture's posterior. Returns log r (n, J) and the components' means (n, J, dim)."""
        q = self.noised[k]
        share, means = q.log_terms(y).log_softmax(1), q.means(y)
        u, fresh = self.rng.uniform(2, self.n, self.inner.chains).double(), self.rng.normal(*self.z.shape).double()
        keep = torch.zeros_like(self.label, dtype=torch.bool)
        if self.share is not None:
            keep = u[0].log() < share.gather(1, self.label) - self.share.gather(1, self.label)
        self.label = torch.where(keep, self.label, drawn(share[:, None].expand(-1, self.inner.chains, -1), u[1]))
        self.z = torch.where(keep[..., None], self.z, fresh)
        self.share = share
        return share, means

    def frame(self, k: int, means: Tensor) -> Frame:
        at = means.gather(1, self.label[..., None].expand(-1, -1, means.shape[-1]))
        return Frame(at.flatten(0, 1), self.noised[k].frame, self.label.flatten())

    def seen(self, k: int, y: Tensor, frame: Frame, kernel: StepSized, transitions: int) -> Seen:
        s = self.noised[k].s
        rows = y[:, None].expand(-1, self.inner.chains, -1).flatten(0, 1)
        view = posterior(self.target, rows, torch.ones_like(s), s, frame)
        found = look(view, self.z.flatten(0, 1), kernel, transitions, self.rng, self.spent)
        self.z = found.z[-1].reshape(self.z.shape)
        return found

    def means(self, frame: Frame, seen: Seen, G: Tensor) -> Tensor:
        """The posterior mean by each chain (n, chains, dim)."""
        z = seen.z.mean(0) + by_row(G, frame.j, seen.g.mean(0))
        return frame.push(z)[0].reshape(self.z.shape)


class Paths:
    """The kernels of a block of paths, as `walk` asks for them."""

    def __init__(self, guide: Guide, chains: Chains, which: Tensor) -> None:
        self.guide, self.chains, self.which = guide, chains, which
        self.widths = widths(guide.mixture.m.shape[1]).to(guide.s)

    def start(self) -> Kernel:
        q, n = self.chains.noised[0], self.chains.n
        share, m = q.log_share.expand(n, -1), q.m.expand(n, -1, -1)
        return Kernel(share, m, q.root, q.inverse, self.widths, self.which)

    def forward(self, k: int, y: Tensor) -> Kernel:
        if not bool((self.guide.trust[k] > 0).any()):
            q = self.chains.noised[k]
            return self.kernel(k, y, q.log_terms(y).log_softmax(1), q.means(y), None)
        begin = self.chains.share is None
        share, means = self.chains.place(k, y)
        frame = self.chains.frame(k, means)
        kernel = stepped(self.chains.inner.moves, self.guide.h[k])
        seen = self.chains.seen(k, y, frame, kernel, self.chains.inner.transitions + FIRST * begin)
        seen = Seen(*(part[-self.chains.inner.transitions :] for part in seen))
        u = self.chains.means(frame, seen, self.guide.G[k]).mean(1)
        return self.kernel(k, y, share, means, u)

    def kernel(self, k: int, y: Tensor, share: Tensor, means: Tensor, u: Tensor | None) -> Kernel:
        """f_k(. | y) with the posterior mean u (n, dim) of chains, if there are any."""
        A, B, C = self.guide.levels.ancestral(k)
        if u is not None:
            means = means + self.guide.trust[k] * (u - (share.exp()[..., None] * means).sum(1))[:, None]
        eye = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
        L = torch.linalg.cholesky(C.square() * eye + B.square() * self.guide.W[k])
        return Kernel(share, A * y[:, None] + B * means, L, inverted(L), self.widths, self.which)

    def backward(self, k: int, x: Tensor) -> Gaussian:
        a, c = self.guide.levels.noising(k)
        return Gaussian(a * x, c)


class Ends(NamedTuple):
    """Ends of paths x (n, dim), in the guide's units, log p there and log-weights (n,)."""

    x: Tensor
    log_p: Tensor
    log_w: Tensor


def paths(target: Units, guide: Guide, inner: Inner, n: int, rng: Rng) -> tuple[Ends, Spent]:
    """n weighted paths: E exp(log_w) = Z. The last log_prob (n rows) is not in `Spent`."""
    which = (rng.uniform(n) < WIDE).long()  # one width for all steps of a path
    block = Paths(guide, Chains(target, guide.mixture, guide.s, inner, n, rng), which)
    start = block.start()
    y = start.draw(rng)
    path = walk(y, start.log_prob(y), block.forward, block.backward, guide.steps, rng)
    share = torch.tensor([1 - WIDE, WIDE], dtype=torch.float64, device=y.device).log()
    log_p = target.log_prob(path.x)
    return Ends(path.x, log_p, log_p - (share[:, None] - path.log_ratio).logsumexp(0)), block.chains.spent


def path_price(guide: Guide, inner: Inner) -> int:
    """Evaluations of a path, the density of its end included."""
    return inner.price(guide.looks, FIRST if guide.looks else 0) + 1


def memberships(mixture: Mixture, x: Tensor) -> Tensor:
    """P(component | x) (n, J) without noise."""
    inverse = inverted(torch.linalg.cholesky(mixture.S))
    return (mixture.log_share + log_normal(x[:, None] - mixture.m, inverse)).softmax(1)


def widths(dim: int) -> Tensor:
    """Of the paths: 1, and c for the defensive ones."""
    return torch.tensor([1.0, 1 + 0.7 / math.sqrt(dim)], dtype=torch.float64)


def stepped(kernel: StepSized, h: Tensor) -> StepSized:
    return replace(kernel, h=h)  # type: ignore[type-var]


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
