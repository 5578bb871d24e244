"""Exact truths, one function per family: means, second moments, sds, P(x_0 > c) near .02, mode weights, log Z.

Everything here is a formula or a quadrature in float64; `tests/test_targets_*.py` check it against exact draws and other quadratures.
"""

from __future__ import annotations

import math
from functools import singledispatch

import torch
from scipy import stats

from targets.curved import CurvedMixture
from targets.funnel import Funnel
from targets.gaussian import CorrelatedGaussian, IllConditionedGaussian
from targets.mixture import ExpandedMixture, GaussianMixture
from targets.mixture_forms import mixture_form
from targets.phi4 import Phi4
from targets.problem import Quantity
from targets.quantities import exact, log_z, moments, normal_tail, tail, tail_near, upper_normal
from targets.rings import NearestRing, RingMixture
from targets.rosenbrock import Banana, HybridRosenbrock
from targets.student_t import StudentT
from targets.transfer_matrix import transfer_matrix_form
from targets.truncated import TruncatedGaussian
from targets.wells import QuarticProduct


@singledispatch
def closed_form(target: object) -> list[Quantity]:
    """The exactly known quantities of a target."""
    raise TypeError(f"no closed form is known for {type(target).__name__}")


@closed_form.register
def _(target: CorrelatedGaussian) -> list[Quantity]:
    how = "closed form: Gaussian"
    m, s = target.mean, target.scale
    return [*moments(m, s.square(), how), *normal_tail(m[0], s[0]), log_z()]


@closed_form.register
def _(target: IllConditionedGaussian) -> list[Quantity]:
    how = "closed form: mean and diagonal of Q diag(v) Q"
    q = target.reflect(torch.eye(target.dim, dtype=torch.float64))  # (dim, dim)
    variance = q.square() @ target.variances
    return [*moments(target.mean, variance, how), *normal_tail(target.mean[0], variance[0].sqrt()), log_z()]


@closed_form.register
def _(target: StudentT) -> list[Quantity]:
    nu, m, s = target.nu, target.mean, target.scale
    c = round(float(m[0] + 2.7 * s[0]), 2)
    beyond = tail(c, float(stats.t.sf((c - float(m[0])) / float(s[0]), nu)), "closed form: Student-t survival function (scipy)")
    if nu <= 2:  # the variance is infinite and, for nu <= 1, there is no mean
        return [beyond, log_z()]
    return [*moments(m, s.square() * nu / (nu - 2), "closed form: variance = scale^2 nu/(nu - 2)"), beyond, log_z()]


@closed_form.register
def _(target: GaussianMixture | ExpandedMixture | CurvedMixture) -> list[Quantity]:
    return mixture_form(target)


@closed_form.register
def _(target: Funnel) -> list[Quantity]:
    variance = torch.full((target.dim,), math.exp(target.sd**2 / 2), dtype=torch.float64)
    variance[0] = target.sd**2
    zero = torch.zeros_like(variance)
    how = "closed form: Var x_i = E e^{x_0} = e^{sd^2/2}"
    return [*moments(zero, variance, how), *normal_tail(zero[0], variance[0].sqrt()), log_z()]


@closed_form.register
def _(target: Banana) -> list[Quantity]:
    variance = torch.tensor([target.s**2, 1 + 2 * target.b**2 * target.s**4], dtype=torch.float64)
    zero = torch.zeros_like(variance)
    how = "closed form: Var x_1 = 1 + b^2 Var x_0^2 = 1 + 2 b^2 s^4"
    return [*moments(zero, variance, how), *normal_tail(zero[0], variance[0].sqrt()), log_z()]


@closed_form.register
def _(target: HybridRosenbrock) -> list[Quantity]:
    first = [_chain_moment(target, 1, p) for p in (1, 2)]
    chain = [[_chain_moment(target, i, p) for p in (1, 2)] for i in range(2, target.n1 + 1)]
    mean, square = torch.tensor([first, *chain * target.n2], dtype=torch.float64).unbind(-1)
    how = "closed form: recursion over moments of x_{j,i} = x_{j,i-1}^2 + N(0, 1/(2b))"
    return [*moments(mean, square - mean.square(), how), *normal_tail(mean[0], (square - mean.square())[0].sqrt()), log_z()]


@closed_form.register
def _(target: QuarticProduct) -> list[Quantity]:
    laws, columns = target.laws(), target.columns()
    each = [[law.expect(f) for f in (lambda u: u, torch.square)] + [law.above(0.0)] for law in laws.values()]
    mean, square, positive = torch.tensor([each[list(laws).index(abc)] for abc in columns], dtype=torch.float64).unbind(-1)
    how = "one-dimensional quadrature of each coordinate"
    total = sum(laws[abc].log_z for abc in columns) - target.constant
    first = laws[columns[0]]
    beyond = tail_near(first.above, first.low, first.high, how)
    return [*moments(mean, square - mean.square(), how), beyond, exact("positive", positive, how), log_z(total, how)]


@closed_form.register
def _(target: RingMixture | NearestRing) -> list[Quantity]:
    law, how = target.radial(), "quadrature over the radius"
    half_square = law.expect(torch.square) / 2

    def upper(c: float) -> float:
        return law.expect(lambda r: (c / r).acos() / math.pi, low=c)  # the share of a circle with x_0 > c

    variance = torch.full((2,), half_square, dtype=torch.float64)
    beyond = tail_near(upper, 0.1, law.high - 0.01, how)
    return [*moments(torch.zeros_like(variance), variance, how), beyond, log_z(law.log_z, how)]


@closed_form.register
def _(target: TruncatedGaussian) -> list[Quantity]:
    a, s = -target.mean / target.scale, target.scale
    z = torch.special.ndtr(-a)
    rate = (-a.square() / 2).exp() / (math.sqrt(2 * math.pi) * z)
    mean, variance = target.mean + s * rate, s.square() * (1 + a * rate - rate.square())
    how = "closed form: truncated normal"

    def upper(c: float) -> float:
        return upper_normal((c - float(target.mean[0])) / float(s[0])) / float(z[0])

    return [*moments(mean, variance, how), tail_near(upper, 0.0, 20.0, how), log_z(float(z.log().sum()), how)]


@closed_form.register
def _(target: Phi4) -> list[Quantity]:
    return transfer_matrix_form(target)


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
