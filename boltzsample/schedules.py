"""Noising processes by their marginals, and grids of their levels.

Every process here leaves x_0 ~ pi at time t as

    x_t = alpha(t) x_0 + sigma(t) xi,        xi ~ N(0, I),        log SNR(t) = 2 log(alpha(t) / sigma(t)).

    OU             dx = -x dt + sqrt(2) s dW:                  alpha = e^-t,         sigma^2 = s^2 (1 - e^-2t)
    VP             dx = -b/2 x dt + sqrt(b) s dW, b linear:    alpha = e^(-B/2),     sigma^2 = s^2 (1 - e^-B),    B = int_0^t b
    VE             dx = g dW:                                  alpha = 1,            sigma = s_min (s_max / s_min)^t
    Localization   y_t = sqrt(t) g(t) x_0 + s W_t:             g = t^(a/2) (1 - t)^(-b/2)
    LinearSDE      dx = f(t) x dt + g(t) dW, any f and g:      by quadrature

In the first three and the last, SNR falls with t; in a localization it grows (a = 1, b = 0 is the classic one, b = 0 the log-linear).
Samplers walk from noise to data over `Levels`, which know only alpha and sigma of each level. At equal steps of log SNR the posterior
of x_0 sharpens by a constant factor a level.

Song et al. (2021), arXiv:2011.13456, section 3.4; Grenioux et al. (2024), arXiv:2402.10758, section 3 and appendix C (localizations).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

BISECTIONS = 60
CELLS, NODES = 64, 12  # of Gauss-Legendre quadrature


class Schedule(Protocol):
    """A noising process. `alpha`, `sigma`: of times t, any shape; `time`: the t of a log SNR."""

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def time(self, log_snr: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class OU:
    """The Ornstein-Uhlenbeck process with the stationary law N(0, scale^2 I).

    >>> OU().alpha(torch.tensor(0.0))
    tensor(1.)
    """

    scale: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return (-t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return self.scale * (-torch.expm1(-2 * t)).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-log_snr - 2 * math.log(self.scale)) / 2


@dataclass(frozen=True)
class VP:
    """The variance-preserving process, its rate b growing from `first` at t = 0 to `last` at t = 1.

    >>> vp = VP()
    >>> vp.alpha(torch.tensor(0.5)).square() + vp.sigma(torch.tensor(0.5)).square()
    tensor(1.)
    """

    first: float = 0.1
    last: float = 20.0
    scale: float = 1.0

    def _integral(self, t: Tensor) -> Tensor:
        return self.first * t + (self.last - self.first) * t.square() / 2

    def alpha(self, t: Tensor) -> Tensor:
        return (-self._integral(t) / 2).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return self.scale * (-torch.expm1(-self._integral(t))).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        B = torch.nn.functional.softplus(-log_snr - 2 * math.log(self.scale))
        return 2 * B / (self.first + (self.first**2 + 2 * (self.last - self.first) * B).sqrt())


@dataclass(frozen=True)
class VE:
    """The variance-exploding process with geometric noise levels, `smallest` at t = 0 and `largest` at t = 1.

    >>> VE(0.01, 100.0).sigma(torch.tensor(0.5))
    tensor(1.)
    """

    smallest: float = 0.01
    largest: float = 100.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.smallest * (self.largest / self.smallest) ** t

    def time(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2 - math.log(self.smallest)) / math.log(self.largest / self.smallest)


@dataclass(frozen=True)
class Localization:
    """The observation process y_t = sqrt(t) g(t) x_0 + scale W_t, g = t^(a/2) (1 - t)^(-b/2); t in (0, 1) where b > 0, else t > 0.

    >>> classic = Localization(a=1.0, b=0.0)
    >>> classic.alpha(torch.tensor(3.0)), classic.sigma(torch.tensor(4.0))
    (tensor(3.), tensor(2.))
    """

    a: float = 1.0
    b: float = 1.0
    scale: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return t ** ((1 + self.a) / 2) * (1 - t) ** (-self.b / 2) if self.b else t ** ((1 + self.a) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return self.scale * t.sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        log_g = log_snr / 2 + math.log(self.scale)
        if not self.b:
            return (2 / self.a * log_g).exp()
        if self.a == self.b:
            return torch.sigmoid(2 / self.a * log_g)

        def g(u: Tensor) -> Tensor:  # log g at t = sigmoid(u)
            return self.a / 2 * torch.nn.functional.logsigmoid(u) - self.b / 2 * torch.nn.functional.logsigmoid(-u)

        far = 2 * log_g.abs() * (1 / self.a + 1 / self.b) + 10
        return torch.sigmoid(bisected(g, log_g, -far, far))


@dataclass(frozen=True, eq=False)
class LinearSDE:
    """dx = f(t) x dt + g(t) dW on [0, T] for any functions f and g of a time tensor, g > 0: log alpha = int f, sigma^2 = alpha^2
    int (g / alpha)^2, both by Gauss-Legendre quadrature from the left edge of t's cell (float64).

    Raises ValueError where g vanishes or f or g is not finite.

    >>> brownian = LinearSDE(lambda t: 0 * t, lambda t: 1 + 0 * t, T=4.0)
    >>> round(float(brownian.sigma(torch.tensor(2.25))), 6)
    1.5
    """

    f: Callable[[Tensor], Tensor]
    g: Callable[[Tensor], Tensor]
    T: float = 1.0
    _cells: tuple[Tensor, Tensor] = field(init=False, repr=False)  # both integrals up to the edges of the cells

    def __post_init__(self) -> None:
        edges = self._edges
        zero = torch.zeros(1, dtype=torch.float64)
        object.__setattr__(self, "_cells", (torch.zeros(CELLS + 1, dtype=torch.float64),) * 2)
        drift = torch.cat([zero, _legendre(self.f, edges[:-1], edges[1:]).cumsum(0)])
        object.__setattr__(self, "_cells", (drift, drift))
        noise = torch.cat([zero, _legendre(self._rate, edges[:-1], edges[1:]).cumsum(0)])
        object.__setattr__(self, "_cells", (drift, noise))
        if not (noise.diff() > 0).all() or not noise.isfinite().all():
            raise ValueError(f"f or g is not finite, or g vanishes, somewhere on [0, {self.T}]; wanted f(t) finite and g(t) > 0")

    @property
    def _edges(self) -> Tensor:
        return torch.linspace(0, self.T, CELLS + 1, dtype=torch.float64)

    def _cell(self, t: Tensor) -> Tensor:
        return (t / self.T * CELLS).long().clamp(0, CELLS - 1)

    def _log_alpha(self, t: Tensor) -> Tensor:
        j = self._cell(t)
        return self._cells[0][j] + _legendre(self.f, self._edges[j], t)

    def _rate(self, t: Tensor) -> Tensor:
        return (self.g(t) * (-self._log_alpha(t)).exp()).square()

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t.double()).exp().to(t)

    def sigma(self, t: Tensor) -> Tensor:
        s, j = t.double(), self._cell(t.double())
        inside = self._cells[1][j] + _legendre(self._rate, self._edges[j], s)
        return (self._log_alpha(s).exp() * inside.sqrt()).to(t)

    def time(self, log_snr: Tensor) -> Tensor:
        def snr(u: Tensor) -> Tensor:  # at t = T e^-u, rising with u
            t = self.T * (-u).exp()
            return 2 * (self.alpha(t).log() - self.sigma(t).log())

        u = bisected(snr, log_snr.double(), torch.zeros(()), torch.full((), 200.0))
        return (self.T * (-u).exp()).to(log_snr)


def _legendre(f: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """int_a^b f, elementwise."""
    nodes, weights = (torch.as_tensor(v) for v in np.polynomial.legendre.leggauss(NODES))
    half = (b - a)[..., None] / 2
    return (f(a[..., None] + half * (1 + nodes)) * weights * half).sum(-1)


def bisected(f: Callable[[Tensor], Tensor], value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Where the rising f has this value, between low and high, elementwise."""
    low, high = low.to(value).expand_as(value), high.to(value).expand_as(value)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = f(middle) < value
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


@dataclass(frozen=True, eq=False)
class Levels:
    """Levels 0 (noise) to K (data) of a process: x_k = alpha_k x_0 + sigma_k xi, SNR rising with k. alpha, sigma: (K + 1,), float64.

    Between neighbours noise is added by x_k = a x_(k+1) + c xi with a = alpha_k / alpha_(k+1): every process with these marginals has
    this Markov version, and its backward kernel knows nothing of x_0.

    Raises ValueError where the SNR does not rise.
    """

    alpha: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        s = self.sigma / self.alpha
        if self.alpha.ndim != 1 or self.alpha.shape != self.sigma.shape or not (s.diff() < 0).all() or not (self.alpha > 0).all():
            raise ValueError("levels need alpha > 0 and sigma of one shape (K + 1,), with sigma / alpha falling from noise to data")

    @staticmethod
    def even(schedule: Schedule, noise: float, data: float, K: int) -> Levels:
        """K + 1 levels evenly spaced in log SNR, from sigma / alpha = `noise` down to sigma / alpha = `data`.

        >>> Levels.even(VE(), noise=10.0, data=0.1, K=2).sigma
        tensor([10.0000,  1.0000,  0.1000], dtype=torch.float64)
        """
        t = schedule.time(torch.linspace(-2 * math.log(noise), -2 * math.log(data), K + 1, dtype=torch.float64))
        return Levels(schedule.alpha(t), schedule.sigma(t))

    def to_data(self) -> Levels:
        """With one more level at the end, x_0 itself: alpha = 1, sigma = 0."""
        one = self.alpha.new_ones(1)
        return Levels(torch.cat([self.alpha, one]), torch.cat([self.sigma, 0 * one]))

    @property
    def steps(self) -> int:
        """K."""
        return len(self.alpha) - 1

    def noising(self, k: int) -> tuple[Tensor, Tensor]:
        """(a, c) of x_k | x_(k+1) ~ N(a x_(k+1), c^2 I)."""
        a = self.alpha[k] / self.alpha[k + 1]
        return a, (self.sigma[k].square() - (a * self.sigma[k + 1]).square()).sqrt()

    def ancestral(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(A, B, C) of x_(k+1) | x_k, x_0 ~ N(A x_k + B x_0, C^2 I). With a posterior variance v of x_0 given x_k the variance of
        x_(k+1) given x_k is C^2 + B^2 v (Ho, Jain & Abbeel 2020, arXiv:2006.11239, equation 7, for any alpha and sigma)."""
        a, c = self.noising(k)
        r = (self.sigma[k + 1] / self.sigma[k]).square()
        return a * r, self.alpha[k + 1] - a * r * self.alpha[k], self.sigma[k + 1] / self.sigma[k] * c
