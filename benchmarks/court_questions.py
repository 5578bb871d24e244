"""What the court asks of every run, and what is true: questions are functionals of a Result, truths come from the card.

What the card does not have (log p, E x_0 x_1, quantiles of unusual laws) is measured on 400,000 exact draws, with its error; where there
is no exact sampler the question is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from scipy import optimize, stats
from torch import Tensor

import boltzsample as bz
from targets import Problem, problem

NORMAL_X0 = frozenset({"gaussian-corr-d10", "gaussian-ill-d100", "funnel-sd3", "banana", "rosenbrock"})
UNCORRELATED = frozenset({"funnel-sd3"})  # E x_0 x_1 = 0 by symmetry; its draws are lognormal, and their mean has no honest error
CHUNK, CHUNKS = 50_000, 8
QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Question:
    """A functional: how a Result answers it, and the truth with its error."""

    name: str
    ask: Callable[[bz.Result], bz.Estimate]
    truth: float
    truth_se: float = 0.0


def questions(p: Problem, log_z: bool = False) -> list[Question]:
    """Means, sd, tail, quantiles of x_0, E x.x, a random linear form a.x (fixed), E x_0 x_1, log p, the weight of a mode, log Z."""
    asked = [*_of_the_card(p), *_of_draws(p), *_quantiles(p)]
    if log_z and "log_z" in p.truth:
        asked.append(Question("log Z", lambda r: r.log_z(), float(p.truth["log_z"].value), float(p.truth["log_z"].stderr)))
    return asked


def _of_the_card(p: Problem) -> list[Question]:
    mean, second, sd, tail = (p.truth[name] for name in ("mean", "second_moment", "sd", "tail"))
    a = torch.randn(p.target.dim, generator=torch.Generator().manual_seed(2026), dtype=torch.float64)
    a = a / (a.norm() * sd.value)
    return [
        Question("E x_0", lambda r: r.expectation(lambda x: x[..., 0]), *_at(mean, 0)),
        Question("E x_0^2", lambda r: r.expectation(lambda x: x[..., 0] ** 2), *_at(second, 0)),
        Question("E x_1^2", lambda r: r.expectation(lambda x: x[..., 1] ** 2), *_at(second, 1)),
        # the errors of the card may be correlated: their sum bounds that of a sum
        Question("E x.x", lambda r: r.expectation(lambda x: x.square().sum(-1)), float(second.value.sum()), float(second.stderr.sum())),
        Question("E a.x", lambda r: r.expectation(lambda x: x @ a.to(x)), float(a @ mean.value), float(a.abs() @ mean.stderr)),
        Question("sd x_0", lambda r: r.sd(lambda x: x[..., 0]), *_at(sd, 0)),
        Question("P(x_0 > c)", lambda r: r.probability(lambda x: x[..., 0] > tail.at.to(x)), float(tail.value), float(tail.stderr)),
        *_mode(p),
    ]


def _at(q: Any, i: int) -> tuple[float, float]:
    return float(q.value[i]), float(q.stderr[i])


def _mode(p: Problem) -> list[Question]:
    """The weight of the first mode, or of the positive well of the middle coordinate."""
    if "mode_weights" in p.truth:
        q = p.truth["mode_weights"]
        return [Question("mode weight", lambda r: r.probability(lambda x: q.f(x)[..., 0] > 0), *_at(q, 0))]
    if "positive" in p.truth:
        i = p.target.dim // 2 // 2 * 2  # an even coordinate: the odd ones of the many-well are plain Gaussians
        return [Question("mode weight", lambda r: r.probability(lambda x: x[..., i] > 0), *_at(p.truth["positive"], i))]
    return []


@cache
def exact_draws(name: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """x_0, x_0 x_1 and log p at 400,000 exact draws; None where there is no exact sampler."""
    p, rng = problem(name), torch.Generator().manual_seed(2026)
    if p.exact_sampler is None:
        return None
    chunks = (p.exact_sampler(CHUNK, rng) for _ in range(CHUNKS))
    parts = [(x[:, 0], x[:, 0] * x[:, 1], p.target.log_prob(x)) for x in chunks]
    x0, cross, log_p = (torch.cat(part).double() for part in zip(*parts, strict=True))
    return x0, cross, log_p


def _of_draws(p: Problem) -> list[Question]:
    draws = exact_draws(p.name)
    if draws is None:
        return []
    _, cross, log_p = draws
    mean = lambda y: (float(y.mean()), float(y.std()) / math.sqrt(len(y)))  # noqa: E731
    product = (0.0, 0.0) if p.name in UNCORRELATED else mean(cross)
    return [
        Question("E x_0 x_1", lambda r: r.expectation(lambda x: x[..., 0] * x[..., 1]), *product),
        Question("log p", lambda r: r.expectation(lambda x: p.target.log_prob(x)), *mean(log_p)),
    ]


def _quantiles(p: Problem) -> list[Question]:
    law, draws = marginal(p), exact_draws(p.name)
    if law is None and draws is None:
        return []
    truth = (lambda q: (law(q), 0.0)) if law is not None else partial(order_statistic, torch.sort(draws[0])[0])  # type: ignore[index]
    ask = lambda q: lambda r: r.quantile(lambda x: x[..., 0], q)  # noqa: E731
    return [Question(f"q{round(100 * q)} x_0", ask(q), *truth(q)) for q in QUANTILES]


def order_statistic(x: Tensor, q: float) -> tuple[float, float]:
    """The q-quantile of sorted draws x (n,), and its error from the order statistics one binomial sd to each side."""
    n = len(x)
    spread = math.sqrt(n * q * (1 - q))
    low, middle, high = (float(x[round(i)]) for i in (n * q - spread, n * q, n * q + spread))
    return middle, (high - low) / 2


def marginal(p: Problem) -> Callable[[float], float] | None:
    """The quantile function of x_0, where it is known."""
    t: Any = p.target
    if p.name.startswith("two-modes-") and hasattr(t, "scales"):
        weights, means, scales = (v.numpy() for v in (t.weights, t.means[:, 0], t.scales[:, 0]))
        return lambda q: float(optimize.brentq(lambda x: weights @ stats.norm.cdf((x - means) / scales) - q, -50, 50, xtol=1e-12))
    if p.name.startswith("student-t"):
        return partial(_ppf, stats.t(t.nu, float(t.mean[0]), float(t.scale[0])))
    if p.name not in NORMAL_X0:
        return None
    return partial(_ppf, stats.norm(float(p.truth["mean"].value[0]), float(p.truth["sd"].value[0])))


def _ppf(law: Any, q: float) -> float:
    return float(law.ppf(q))
