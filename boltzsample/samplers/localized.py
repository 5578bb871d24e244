"""Weighted paths from a noised mixture to the target, steered by posterior chains.

y_0 is drawn from the noised mixture q_(s_0) itself, in closed form; then, over levels s_0 > s_1 > ... > s_K > 0, to x,

    f_k(y' | y) = sum_j r_j(y) N(A y + B (m_j(y) + d), C^2 I + B^2 W_kj),        d = T_k (u - E_q[x | y]),     b_k(y | y') = N(y'; y, c^2 I)

with the ancestral A, B, C (schedules.py), the mixture's posterior shares r_j and means m_j(y) (noised.py) and u the mean of posterior
chains at y. Where the mixture is the target f_k is exact at any step; what it lacks, the chains' mean adds. T_k trusts them, coordinate by
coordinate, as far as two halves of a particle's chains say the same: E[d_a d_b] / E[d^2]. Levels where that would gain less than a
hundredth of a nat have no chains. W_kj is the covariance of draws about the mean of the *other* chains of their particle, so it holds the
posterior's width and the noise of u; it is pooled over all particles of a pilot and frozen, as are T, the matrices G of the control
variate and the steps of the chains (localized_fit.py). Each path is one of two widths, a tenth of them c times wider at every step. Up to
sixteen dimensions another tenth comes from the data: it begins as a draw of the mixture d whose components are half Student t_5, and goes
back to the noise by the b_k. A path's weight is that of the mixture of all these laws (Hesterberg 1995),

    log w = log p(x) - log[(1 - b) sum_c share_c e^-r_c + b d(x)],        r_c = sum_k (log b_k - log f_k) - log q_(s_0)  by width c,

so that w <= p / (b d) however far in a tail x lies. Weights are exact with noisy means: given y, the chains are auxiliary variables that
depend on the past alone, and along a path from the data they run in the same order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from boltzsample.kernels.kernel import StepSized
from boltzsample.mixture import DefensiveMixture
from boltzsample.samplers.noised import Kernel, Noised, by_row, drawn, inverted, log_normal
from boltzsample.samplers.path_weights import Gaussian, WeightedPath, along, retrace, walk
from boltzsample.samplers.posterior import Frame, Inner, Seen, Spent, Units, look, posterior
from boltzsample.schedules import Levels
from boltzsample.streams import Rng

WIDE = 0.1  # of the paths from the noise
BACK, DEFENDED_UP_TO = 0.1, 16  # the share of paths from the data; dimensions
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
    def dim(self) -> int:
        return self.mixture.m.shape[1]

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
    back = max(round(BACK * n), 1) if guide.dim <= DEFENDED_UP_TO and n > 1 else 0
    which = (rng.uniform(n - back) < WIDE).long()  # one width for all steps of a path
    block = Paths(guide, Chains(target, guide.mixture, guide.s, inner, n - back, rng), which)
    start = block.start()
    y = start.draw(rng)
    path, spent = walk(y, start.log_prob(y), block.forward, block.backward, guide.steps, rng), block.chains.spent
    if back:
        more, spent_more = paths_back(target, guide, inner, back, rng)
        order = rng.uniform(n).argsort()  # so that what is cut off later is of both kinds
        path = WeightedPath(torch.cat([path.x, more.x])[order], torch.cat([path.log_ratio, more.log_ratio], 1)[:, order])
        spent = spent + spent_more
    log_p, share = target.log_prob(path.x), torch.tensor([1 - WIDE, WIDE], dtype=torch.float64, device=y.device).log()
    log_q, b = (share[:, None] - path.log_ratio).logsumexp(0), back / n
    if back:
        log_q = torch.logaddexp(math.log1p(-b) + log_q, math.log(b) + defensive(guide.mixture).log_prob(path.x))
    return Ends(path.x, log_p, log_p - log_q), spent


def paths_back(target: Units, guide: Guide, inner: Inner, n: int, rng: Rng) -> tuple[WeightedPath, Spent]:
    """n paths from the data: their ends x (n, dim) there, and the log-ratios r (2, n)."""
    block = Paths(guide, Chains(target, guide.mixture, guide.s, inner, n, rng), torch.zeros(n, dtype=torch.long, device=guide.s.device))
    trail = retrace(defensive(guide.mixture).sample(rng, n), block.backward, guide.steps, rng)
    return WeightedPath(trail[-1], along(trail, block.start().log_prob(trail[0]), block.forward, block.backward)), block.chains.spent


def defensive(mixture: Mixture, wide: float = 0.5) -> DefensiveMixture:
    """What paths from the data begin with: a share `wide` of each component is a Student t."""
    return DefensiveMixture(mixture.log_share, mixture.m, torch.linalg.cholesky(mixture.S), wide)


def path_price(guide: Guide, inner: Inner) -> int:
    """Evaluations of a path, the density of its end included."""
    return inner.price(guide.looks, FIRST if guide.looks else 0) + 1


def memberships(mixture: Mixture, x: Tensor) -> Tensor:
    """P(component | x) (n, J) without noise."""
    inverse = inverted(torch.linalg.cholesky(mixture.S))
    return (mixture.log_share + log_normal(x[:, None] - mixture.m, inverse)).softmax(1)


def widths(dim: int) -> Tensor:
    """Of the paths from the noise: 1, and c for a tenth of them."""
    return torch.tensor([1.0, 1 + 0.7 / math.sqrt(dim)], dtype=torch.float64)


def stepped(kernel: StepSized, h: Tensor) -> StepSized:
    return replace(kernel, h=h)  # type: ignore[type-var]
