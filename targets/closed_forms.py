"""Exact truths, one function per family: means, second moments, sds, P(x_0 > c) near .02, mode weights, log Z.

Everything here is a formula in float64; `tests/test_targets.py` checks it against quadrature and exact draws.
"""

from __future__ import annotations

import math
from functools import singledispatch

import torch
from scipy import stats
from torch import Tensor

from targets.funnel import Funnel
from targets.gaussian import CorrelatedGaussian, IllConditionedGaussian
from targets.mixture import GaussianMixture
from targets.problem import Quantity
from targets.rosenbrock import Banana, HybridRosenbrock
from targets.student_t import StudentT

NORMALIZED = "exact: the density is normalized"


def upper_normal(z: float) -> float:
    """P(N(0, 1) > z)."""
    return 0.5 * math.erfc(z / math.sqrt(2))


@singledispatch
def closed_form(target: object) -> list[Quantity]:
    """The exactly known quantities of a target."""
    raise TypeError(f"no closed form is known for {type(target).__name__}")


@closed_form.register
def _(target: CorrelatedGaussian) -> list[Quantity]:
    how = "closed form: Gaussian"
    m, s = target.mean, target.scale
    return [*_moments(m, s.square(), how), *_normal_tail(m[0], s[0]), _log_z()]


@closed_form.register
def _(target: IllConditionedGaussian) -> list[Quantity]:
    how = "closed form: mean and diagonal of Q diag(v) Q"
    q = target.reflect(torch.eye(target.dim, dtype=torch.float64))  # (dim, dim)
    variance = q.square() @ target.variances
    return [*_moments(target.mean, variance, how), *_normal_tail(target.mean[0], variance[0].sqrt()), _log_z()]


@closed_form.register
def _(target: StudentT) -> list[Quantity]:
    nu, m, s = target.nu, target.mean, target.scale
    c = round(float(m[0] + 2.7 * s[0]), 2)
    tail = _tail(c, float(stats.t.sf((c - float(m[0])) / float(s[0]), nu)), "closed form: Student-t survival function (scipy)")
    if nu <= 2:  # the variance is infinite and, for nu <= 1, there is no mean
        return [tail, _log_z()]
    return [*_moments(m, s.square() * nu / (nu - 2), "closed form: variance = scale^2 nu/(nu - 2)"), tail, _log_z()]


@closed_form.register
def _(target: GaussianMixture) -> list[Quantity]:
    w, m, s = target.weights, target.means, target.scales
    mean = w @ m
    variance = w @ (s.square() + (m - mean).square())  # within and between components
    c = round(float((m[:, 0] + 1.5 * s[:, 0]).max()), 2)  # 1.5 sd above the rightmost component, of weight 0.3 in both cards
    tail = sum(float(w[k]) * upper_normal((c - float(m[k, 0])) / float(s[k, 0])) for k in range(len(w)))
    how = "closed form: mixture of Gaussians"
    return [*_moments(mean, variance, how), _tail(c, tail, "closed form: mixture of normal tails"), _two_mode_weights(target), _log_z()]


@closed_form.register
def _(target: Funnel) -> list[Quantity]:
    variance = torch.full((target.dim,), math.exp(target.sd**2 / 2), dtype=torch.float64)
    variance[0] = target.sd**2
    zero = torch.zeros_like(variance)
    how = "closed form: Var x_i = E e^{x_0} = e^{sd^2/2}"
    return [*_moments(zero, variance, how), *_normal_tail(zero[0], variance[0].sqrt()), _log_z()]


@closed_form.register
def _(target: Banana) -> list[Quantity]:
    variance = torch.tensor([target.s**2, 1 + 2 * target.b**2 * target.s**4], dtype=torch.float64)
    zero = torch.zeros_like(variance)
    how = "closed form: Var x_1 = 1 + b^2 Var x_0^2 = 1 + 2 b^2 s^4"
    return [*_moments(zero, variance, how), *_normal_tail(zero[0], variance[0].sqrt()), _log_z()]


@closed_form.register
def _(target: HybridRosenbrock) -> list[Quantity]:
    first = [_chain_moment(target, 1, p) for p in (1, 2)]
    chain = [[_chain_moment(target, i, p) for p in (1, 2)] for i in range(2, target.n1 + 1)]
    mean, square = torch.tensor([first, *chain * target.n2], dtype=torch.float64).unbind(-1)
    how = "closed form: recursion over moments of x_{j,i} = x_{j,i-1}^2 + N(0, 1/(2b))"
    return [*_moments(mean, square - mean.square(), how), *_normal_tail(mean[0], (square - mean.square())[0].sqrt()), _log_z()]


def _moments(mean: Tensor, variance: Tensor, how: str) -> list[Quantity]:
    values = {"mean": mean, "second_moment": variance + mean.square(), "sd": variance.sqrt()}
    return [Quantity(name, value, torch.zeros_like(value), how) for name, value in values.items()]


def _tail(c: float, probability: float, how: str) -> Quantity:
    value = torch.tensor(probability, dtype=torch.float64)
    return Quantity("tail", value, torch.zeros_like(value), how, at=torch.tensor(c, dtype=torch.float64))


def _normal_tail(mean: Tensor, sd: Tensor) -> list[Quantity]:
    c = round(float(mean + 2 * sd), 2)
    return [_tail(c, upper_normal((c - float(mean)) / float(sd)), "closed form: normal tail")]


def _log_z() -> Quantity:
    zero = torch.zeros((), dtype=torch.float64)
    return Quantity("log_z", zero, zero, NORMALIZED)


def _two_mode_weights(target: GaussianMixture) -> Quantity:
    """P(x is nearer to centre 1 than to centre 0): the half plane n . x > t, n = m_1 - m_0, a normal tail in each component."""
    w, m, s = target.weights, target.means, target.scales
    n = m[1] - m[0]
    t = n @ (m[0] + m[1]) / 2
    z = (t - m @ n) / (s.square() @ n.square()).sqrt()  # (2,)
    p_1 = sum(float(w[k]) * upper_normal(float(z[k])) for k in range(2))
    value = torch.tensor([1 - p_1, p_1], dtype=torch.float64)
    return Quantity("mode_weights", value, torch.zeros_like(value), "closed form: normal probabilities of the half planes", at=m)


def _chain_moment(target: HybridRosenbrock, i: int, p: int) -> float:
    """E x_{j,i}^p, by binomial expansion down to the normal moments of x_1."""
    if i == 1:
        return _normal_moment(target.mu, 1 / (2 * target.a), p)
    noise = 1 / (2 * target.b)
    return sum(math.comb(p, k) * _chain_moment(target, i - 1, 2 * (p - k)) * _normal_moment(0.0, noise, k) for k in range(p + 1))


def _normal_moment(m: float, variance: float, p: int) -> float:
    """E x^p of N(m, variance): E x^p = m E x^(p-1) + (p-1) variance E x^(p-2)."""
    before, now = 0.0, 1.0
    for k in range(1, p + 1):
        before, now = now, m * now + (k - 1) * variance * before
    return now
