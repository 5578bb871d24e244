"""From noise to data: the kernels that walk back through the levels of a noising process, given a denoiser.

At level k, x_k = alpha x_0 + sigma xi; in units y = x_k / alpha, s = sigma / alpha the denoiser says D(y, s) = E[x_0 | x_k], the spread
S = Cov[x_0 | x_k], and so the score of the noised density, grad log p_k(x_k) = (D - y) / (alpha s^2). With x_k = a x_(k+1) + c xi,

    Ancestral         x_(k+1) = A x_k + B D + N(0, C^2 I + B^2 S),       A, B, C of x_(k+1) | x_k, x_0            (schedules.py)
    EulerMaruyama     x_(k+1) = (1 + log 1/a) x_k + c^2 score + c N(0, I)
    Exponential       x_(k+1) = x_k / a + 2 c^2 / (a (1 + a)) score + c / a N(0, I)         the linear part of the drift exactly
    Corrected         a step of another rule, then x <- x + h score + sqrt(2h) N(0, I) at level k + 1,      h = r sigma^2

Each of them is a Gaussian of known density, so the weights of the paths (path_weights.py) are exact whatever the denoiser and however
long the steps. `spread` widens or narrows the kernels by level: calibrated on held-out draws it makes up for what S does not know. An
Ancestral kernel without S (that of a Gaussian in its place) and with a calibrated spread is the sampler of DDPM.

Ho, Jain & Abbeel (2020), arXiv:2006.11239; Bao, Li, Zhu & Zhang (2022), arXiv:2201.06503 (variances); Zhang & Chen (2023),
arXiv:2204.13902 (exponential integrators); Song et al. (2021), arXiv:2011.13456, appendix G (predictor and corrector).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from boltzsample.networks import Posterior
from boltzsample.samplers.path_weights import LOG_2_PI, Gaussian, Law, WeightedPath, walk, walk_back
from boltzsample.schedules import Levels
from boltzsample.streams import Rng

Denoising = Callable[[Tensor, Tensor], Posterior]  # (y, s) -> mean and spread of x_0
AT_ONCE = 2**14  # paths


@dataclass(frozen=True, eq=False)
class Correlated:
    """N(mean, L L^T). mean: (*batch, dim); L: (*batch, dim, dim), lower-triangular."""

    mean: Tensor
    L: Tensor

    def draw(self, rng: Rng) -> Tensor:
        return self.mean + (self.L @ rng.normal(*self.mean.shape)[..., None])[..., 0]

    def log_prob(self, x: Tensor) -> Tensor:
        L = self.L.double()
        z: Tensor = torch.linalg.solve_triangular(L, (x.double() - self.mean.double())[..., None], upper=False)[..., 0]
        return -0.5 * (z.square() + LOG_2_PI).sum(-1) - L.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def root(M: Tensor) -> Tensor:
    """L of L L^T = M (*batch, d, d); of its diagonal alone where rounding leaves M no root: any law is right for weighted paths, and far
    from its data a network may see a spread as thin as a needle."""
    L, failed = torch.linalg.cholesky_ex(M)
    plain = M.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(M.dtype).tiny).sqrt()
    return torch.where((failed > 0)[..., None, None], torch.diag_embed(plain), L)


class Rule(Protocol):
    """The forward kernel of step k at x (*batch, dim), and the backward kernel it is weighed against. kernels: how many a level has."""

    @property
    def kernels(self) -> int: ...

    def forward(self, levels: Levels, k: int, x: Tensor, denoiser: Denoising, spread: Tensor) -> Law: ...

    def backward(self, levels: Levels, k: int, x: Tensor, denoiser: Denoising) -> Law: ...


class AgainstNoising:
    """What rules of one kernel a level share: they are weighed against the noising process."""

    kernels = 1

    def backward(self, levels: Levels, k: int, x: Tensor, denoiser: Denoising) -> Law:
        return _noising(levels, k, x)


@dataclass(frozen=True)
class Ancestral(AgainstNoising):
    """shaped: use the denoiser's spread S of x_0; else that of N(0, I), s^2 / (1 + s^2), for a calibrated variance alone."""

    shaped: bool = True

    def forward(self, levels: Levels, k: int, x: Tensor, denoiser: Denoising, spread: Tensor) -> Law:
        A, B, C = (v.to(x) for v in levels.ancestral(k))
        D, S = _seen(levels, k, x, denoiser)
        if not self.shaped:
            s2 = (levels.sigma[k] / levels.alpha[k]).square().to(x)
            S = (s2 / (1 + s2)).sqrt().expand_as(x)
        mean, spread = A * x + B * D, spread.to(x)
        if S.dim() == x.dim():
            return Gaussian(mean, spread * (C.square() + (B * S).square()).sqrt())
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return Correlated(mean, spread[..., None] * root(C.square() * eye + B.square() * (S @ S.mT)))


@dataclass(frozen=True)
class EulerMaruyama(AgainstNoising):
    """The reversed equation, its drift frozen over a step."""

    def forward(self, levels: Levels, k: int, x: Tensor, denoiser: Denoising, spread: Tensor) -> Law:
        a, c = (v.to(x) for v in levels.noising(k))
        return Gaussian((1 - a.log()) * x + c.square() * score_at(levels, k, x, denoiser), spread.to(x) * c)


@dataclass(frozen=True)
class Exponential(AgainstNoising):
    """The reversed equation, its score frozen over a step; for VE it is Euler and Maruyama's."""

    def forward(self, levels: Levels, k: int, x: Tensor, denoiser: Denoising, spread: Tensor) -> Law:
        a, c = (v.to(x) for v in levels.noising(k))
        return Gaussian(x / a + 2 * c.square() / (a * (1 + a)) * score_at(levels, k, x, denoiser), spread.to(x) * c / a)


@dataclass(frozen=True)
class Corrected:
    """A step of `predictor`, then a Langevin step of h = ratio * sigma^2 at the level reached (none at sigma = 0, x_0 itself)."""

    predictor: Ancestral | EulerMaruyama | Exponential = Ancestral()
    ratio: float = 0.1
    kernels = 2

    def forward(self, levels: Levels, k: int, x: Tensor, denoiser: Denoising, spread: Tensor) -> Law:
        if k % 2 == 0:
            return self.predictor.forward(levels, k // 2, x, denoiser, spread)
        return self._langevin(levels, k // 2 + 1, x, denoiser)

    def backward(self, levels: Levels, k: int, x: Tensor, denoiser: Denoising) -> Law:
        return _noising(levels, k // 2, x) if k % 2 == 0 else self._langevin(levels, k // 2 + 1, x, denoiser)

    def _langevin(self, levels: Levels, k: int, x: Tensor, denoiser: Denoising) -> Law:
        """Backwards it is the same kernel: Langevin diffusions are reversible."""
        h = self.ratio * levels.sigma[k].square().to(x)
        return Gaussian(x + h * score_at(levels, k, x, denoiser), (2 * h).sqrt())


def _noising(levels: Levels, k: int, x: Tensor) -> Gaussian:
    a, c = (v.to(x) for v in levels.noising(k))
    return Gaussian(a * x, c)


def _seen(levels: Levels, k: int, x: Tensor, denoiser: Denoising) -> Posterior:
    alpha = levels.alpha[k].to(x)
    return denoiser(x / alpha, levels.sigma[k].to(x) / alpha)


def score_at(levels: Levels, k: int, x: Tensor, denoiser: Denoising) -> Tensor:
    """grad log p_k (*batch, dim) at x (*batch, dim) by Tweedie's formula."""
    alpha, sigma = levels.alpha[k].to(x), levels.sigma[k].to(x)
    return (alpha * denoiser(x / alpha, sigma / alpha).mean - x) / sigma.square()


@dataclass(frozen=True, eq=False)
class Reverse:
    """Paths from N(0, alpha_0^2 + sigma_0^2), in scaled units, through all `levels`. spread: (K, 1), (K, dim): factors of the kernels' sd.

    >>> from boltzsample.schedules import VE
    >>> from boltzsample.streams import Stream
    >>> def exact(y, s): return Posterior(y / (1 + s**2), (s / (1 + s**2).sqrt()).expand_as(y))        # data ~ N(0, I)
    >>> paths = Reverse(exact, Levels.even(VE(), 5.0, 0.1, 8).to_data())
    >>> path = paths.draw(1000, 2, Stream(0).rng())
    >>> log_w = path.log_ratio - 0.5 * path.x.square().sum(-1)
    >>> bool((log_w - math.log(2 * math.pi)).abs().max() < 1e-6)                # exact: every path has the weight log Z
    True
    """

    denoiser: Denoising
    levels: Levels
    rule: Rule = Ancestral()
    spread: Tensor | None = None

    @property
    def kernels(self) -> int:
        """How many kernels a path has: those of the rule at each level, but a corrector has none at x_0 itself."""
        return self.rule.kernels * self.levels.steps - (self.rule.kernels - 1) * int(self.levels.sigma[-1] == 0)

    def start(self, n: int, dim: int, rng: Rng) -> Gaussian:
        """The law of the first point."""
        sd = (self.levels.alpha[0].square() + self.levels.sigma[0].square()).sqrt()
        zeros = torch.zeros(n, dim, dtype=rng.dtype, device=rng.generator.device)
        return Gaussian(zeros, sd.to(zeros.device))

    def draw(self, n: int, dim: int, rng: Rng) -> WeightedPath:
        """n paths: their ends x (n, dim) and log-weights less log gamma."""
        return joined([self._draw(min(AT_ONCE, n - at), dim, rng) for at in range(0, n, AT_ONCE)])

    def back(self, x: Tensor, rng: Rng) -> WeightedPath:
        """Backward paths from x (n, dim): their starts and the same log-ratio."""
        return joined([self._back(part, rng) for part in x.split(AT_ONCE)])

    def trail(self, n: int, dim: int, rng: Rng) -> Tensor:
        """All places (kernels + 1, n, dim) of n paths, in units of x / alpha."""
        x, places, per = self.start(n, dim, rng).draw(rng), [], self.rule.kernels
        for k in range(self.kernels):
            places.append(x / self.levels.alpha[(k + per - 1) // per].to(x))
            x = self.forward(k, x).draw(rng)
        return torch.stack([*places, x / self.levels.alpha[-1].to(x)])

    def _draw(self, n: int, dim: int, rng: Rng) -> WeightedPath:
        start = self.start(n, dim, rng)
        x = start.draw(rng)
        return walk(x, start.log_prob(x), self.forward, self.backward, self.kernels, rng)

    def _back(self, x: Tensor, rng: Rng) -> WeightedPath:
        return walk_back(x, self.start(len(x), x.shape[1], rng).log_prob, self.forward, self.backward, self.kernels, rng)

    def forward(self, k: int, x: Tensor) -> Law:
        spread = torch.ones(1, dtype=x.dtype, device=x.device) if self.spread is None else self.spread[k // self.rule.kernels]
        return self.rule.forward(self.levels, k, x, self.denoiser, spread)

    def backward(self, k: int, x: Tensor) -> Law:
        return self.rule.backward(self.levels, k, x, self.denoiser)

    def calibrated(self, x: Tensor, rng: Rng) -> Reverse:
        """With the spread that draws x (n, dim) of the target, held out from training, ask for: the root mean square of how far the next
        level lies from the kernel's mean, in its standard deviations. One number a level, or one for each dimension where S is not that of
        the denoiser: a factor estimated from n numbers costs 1 / (2n) nats a kernel, which would be a nat with 32 of them in 64 levels."""
        each = isinstance(self.rule, Ancestral) and not self.rule.shaped
        plain, spread = replace(self, spread=None), []
        for k in reversed(range(self.kernels)):
            y = self.backward(k, x).draw(rng)
            if k % self.rule.kernels == 0:
                spread.append(_miss(plain.forward(k, y), x, each))
            x = y
        return replace(self, spread=torch.stack(spread[::-1]).double())


def _miss(law: Law, x: Tensor, each: bool) -> Tensor:
    """Root mean square of L^-1 (x - mean), (dim,) or (1,)."""
    z: Tensor
    if isinstance(law, Correlated):
        z = torch.linalg.solve_triangular(law.L, (x - law.mean)[..., None], upper=False)[..., 0]
    else:
        assert isinstance(law, Gaussian)
        z = (x - law.mean) / law.sd
    return z.square().mean(0).sqrt() if each and isinstance(law, Gaussian) else z.square().mean().sqrt()[None]


def joined(parts: list[WeightedPath]) -> WeightedPath:
    """Several batches of paths as one."""
    return WeightedPath(*(torch.cat(part) for part in zip(*parts, strict=True)))


def ess(log_w: Tensor) -> float:
    """Kish's effective share of weights (n,), between 0 and 1; 0 where all are zero."""
    found = float((2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()) / len(log_w)
    return found if math.isfinite(found) else 0.0
