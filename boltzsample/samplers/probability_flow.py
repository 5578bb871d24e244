"""The probability-flow equation: noise becomes data along an ordinary differential equation, and draws keep a density.

In units y = x / alpha, u = log(sigma / alpha) falls from noise to data and

    dy/du = y - D(y, e^u)                    Song et al. (2021), arXiv:2011.13456, section 4.3; Karras et al. (2022), equation 1

by Heun's rule (order 2) or the classic Runge-Kutta one (order 4), a step a level; then one Gaussian step N(D, S) from the last level to
x_0 itself. Up to EXACT_UP_TO dimensions the log-det is that of the discrete map, the slogdet of each step's Jacobian: weights are exact
at any step size, and the solver has no bias to speak of. Beyond, the integral of the divergence d - tr J_D takes its place, its trace by
Hutchinson's probes, which stay the same along a trajectory. Then two things can be wrong, and `doubts` measures them on a few draws: noise
of variance s^2 moves log Z by + s^2 / 2 (HUTCH_NOISE), and the solver has a bias (SOLVER_BIAS, from half as long steps; TRUST.md 2(g)).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from boltzsample.flags import Flag, flag
from boltzsample.samplers.path_weights import Gaussian, WeightedPath
from boltzsample.samplers.reverse import AT_ONCE, Ancestral, Denoising, joined
from boltzsample.schedules import Levels
from boltzsample.streams import Rng

EXACT_UP_TO = 32  # dimensions
PROBES = 2
DOUBTED = 256  # draws


@dataclass(frozen=True)
class ProbabilityFlow:
    """order: 2 (Heun) or 4 (Runge-Kutta). Raises ValueError."""

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (2, 4):
            raise ValueError(f"order is {self.order!r}; wanted 2 (Heun) or 4 (Runge-Kutta)")


@dataclass(frozen=True, eq=False)
class Flowing:
    """Draws of the flow from N(0, 1 + s_0^2), in scaled units, through all `levels`. exact: the log-det of the discrete map.

    >>> from boltzsample.networks import Posterior
    >>> from boltzsample.schedules import VE
    >>> from boltzsample.streams import Stream
    >>> def denoiser(y, s): return Posterior(y / (1 + s**2), (s / (1 + s**2).sqrt()).expand_as(y))          # data ~ N(0, I)
    >>> path = Flowing(denoiser, Levels.even(VE(), 5.0, 0.1, 20).to_data(), order=4).draw(1000, 2, Stream(0).rng())
    >>> log_w = path.log_ratio - 0.5 * path.x.square().sum(-1)
    >>> bool((log_w - 1.8379).abs().max() < 1e-3)                    # log 2 pi
    True
    """

    denoiser: Denoising
    levels: Levels
    order: int = 2
    spread: Tensor | None = None
    exact: bool | None = None

    def draw(self, n: int, dim: int, rng: Rng) -> WeightedPath:
        """n draws x (n, dim) and their log-weights less log gamma."""
        return joined([self._draw(min(AT_ONCE, n - at), dim, rng)[0] for at in range(0, n, AT_ONCE)])

    def doubts(self, dim: int, rng: Rng) -> tuple[Flag, ...]:
        """HUTCH_NOISE and SOLVER_BIAS, from DOUBTED draws; nothing where the log-det is that of the discrete map."""
        if self._is_exact(dim):
            return ()
        start, probes = self._start(DOUBTED, dim, rng), self._probes(DOUBTED, dim, rng)
        y = start.draw(rng)
        _, coarse, noise = self._solved(y, probes)
        _, fine, _ = replace(self, levels=_halved(self.levels))._solved(y, probes)
        s2, bias = float(noise.mean()), float((coarse - fine).mean().abs())
        flags: tuple[Flag, ...] = ()
        if s2 > 0.1:
            flags += (flag("HUTCH_NOISE", value=s2, threshold=1.0 if s2 > 1 else 0.1, severity="untrusted" if s2 > 1 else "caution"),)
        if bias > 0.01:
            flags += (flag("SOLVER_BIAS", value=bias, threshold=0.01, severity="untrusted" if bias > 0.1 else "caution"),)
        return flags

    def _draw(self, n: int, dim: int, rng: Rng) -> tuple[WeightedPath, Tensor]:
        start = self._start(n, dim, rng)
        y = start.draw(rng)
        end, log_det, noise = self._solved(y, self._probes(n, dim, rng))
        total = log_det - start.log_prob(y)
        K = self.levels.steps - 1
        spread = torch.ones(1, dtype=y.dtype) if self.spread is None else self.spread[-1]
        alpha, last = self.levels.alpha[K].to(end), Ancestral()
        f = last.forward(self.levels, K, alpha * end, self.denoiser, spread)
        x = f.draw(rng)
        b = last.backward(self.levels, K, x, self.denoiser).log_prob(alpha * end) + dim * alpha.double().log()  # of y = x_K / alpha
        return WeightedPath(x, total + b - f.log_prob(x)), noise

    def _start(self, n: int, dim: int, rng: Rng) -> Gaussian:
        s = self.levels.sigma[0] / self.levels.alpha[0]
        zeros = torch.zeros(n, dim, dtype=rng.dtype, device=rng.generator.device)
        return Gaussian(zeros, (1 + s.square()).sqrt().to(zeros.device))

    def _is_exact(self, dim: int) -> bool:
        return dim <= EXACT_UP_TO if self.exact is None else self.exact

    def _probes(self, n: int, dim: int, rng: Rng) -> Tensor | None:
        """(PROBES, n, dim) of +-1; None where none are needed."""
        return None if self._is_exact(dim) else torch.where(rng.uniform(PROBES, n, dim) < 0.5, -1.0, 1.0)

    def _solved(self, y: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """y at the last level, the log-det of the map there (n,), and the variance of its noise (n,); both float64."""
        u = (self.levels.sigma[:-1] / self.levels.alpha[:-1]).log()
        log_det = torch.zeros(PROBES, len(y), dtype=torch.float64, device=y.device)
        for k in range(len(u) - 1):
            ends = u[k].to(y), u[k + 1].to(y)
            if probes is None:
                y, more = self._exactly(y, *ends)
            else:
                y, more = self._roughly(y, *ends, probes)
            log_det = log_det + more
        noise = (log_det[0] - log_det[1]).square() / 4  # the variance of the mean of two
        return y, log_det.mean(0), noise

    def _exactly(self, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        made: Any = torch.func.vjp(lambda y: self._step(y, a, b)[0], y)
        new, pull = made
        d = y.shape[-1]
        basis = torch.eye(d, dtype=y.dtype, device=y.device)[:, None].expand(d, *y.shape)
        J = torch.func.vmap(lambda e: pull(e)[0])(basis)  # (d, n, d): rows of each Jacobian
        return new, torch.linalg.slogdet(J.transpose(0, 1).double())[1]

    def _roughly(self, y: Tensor, a: Tensor, b: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        new, stages = self._step(y, a, b)
        total = torch.zeros(PROBES, len(y), dtype=torch.float64, device=y.device)
        for weight, u, at in stages:
            made: Any = torch.func.vjp(lambda y, u=u: y - self.denoiser(y, u.exp()).mean, at)
            bent = torch.func.vmap(lambda v, pull=made[1]: pull(v)[0])(probes)
            total = total + weight.double() * (probes * bent).sum(-1).double()
        return new, total

    def _step(self, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """A step from u = a to b, and (weight, u, y) of its stages."""
        h = b - a

        def slope(y: Tensor, u: Tensor) -> Tensor:
            return y - self.denoiser(y, u.exp()).mean

        one = slope(y, a)
        if self.order == 2:
            there = y + h * one
            return y + h / 2 * (one + slope(there, b)), [(h / 2, a, y), (h / 2, b, there)]
        middle = a + h / 2
        y2 = y + h / 2 * one
        two = slope(y2, middle)
        y3 = y + h / 2 * two
        three = slope(y3, middle)
        y4 = y + h * three
        new = y + h / 6 * (one + 2 * two + 2 * three + slope(y4, b))
        return new, [(h / 6, a, y), (h / 3, middle, y2), (h / 3, middle, y3), (h / 6, b, y4)]


def _halved(levels: Levels) -> Levels:
    """With one more level, of the geometric mean, between any two but the last."""

    def filled(v: Tensor) -> Tensor:
        between = (v[:-2] * v[1:-1]).sqrt()
        return torch.cat([torch.stack([v[:-2], between], 1).flatten(), v[-2:]])

    return Levels(filled(levels.alpha), filled(levels.sigma))
