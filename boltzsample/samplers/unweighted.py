"""Walks from noise to data by Tweedie's score alone: what SLIPS and RDMC share as published.

At each level chains on p(x | y_k) give u = E[x | y_k] and with it the score (alpha_k u - y_k) / sigma_k^2; a step leads to the next level;
and after the last one a draw of the posterior is returned. The start is a chain on y, by unadjusted Langevin steps on that same score,

    y <- y + h s + sqrt(2 h) xi,        h = sigma_0^2 / 2,

and such steps at each level are the corrector. At the very end chains on pi itself move the draws a few times: this makes up for what the
last posterior lacks inside a mode, and leaves the masses of modes as they came. Chains keep their places from level to level; where fresh
draws of N(y / alpha, (sigma / alpha)^2 I), weighed by pi, were good enough in the pilot (low noise), they begin there instead.

The mean is z + c g of each draw (posterior.py), with one coefficient c of each y by least squares. Nothing corrects the errors of the
means, of the steps, and of the start, which decides the masses of far modes: approximate, PATH_WEIGHT_MISSING.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from boltzsample.flags import Flag, flag
from boltzsample.samplers.noised import drawn
from boltzsample.samplers.posterior import Inner, Scaled, Seen, Spent, Units, look, posterior, tuned
from boltzsample.schedules import Levels
from boltzsample.streams import Rng

TRIALS = 6  # transitions that tune a step
BEGIN = 8  # transitions where chains begin
SETTLE = 12  # transitions on pi at the end
PROPOSALS = 4  # of an importance start, for each chain
GOOD = 0.3  # of the proposals effective: enough to begin there
FEW_DRAWS, LOW_ACCEPTANCE, APART = 10.0, 0.2, 0.5

Step = Callable[[Levels, int, Tensor, Tensor, Tensor], Tensor]  # (levels, k, y, u, normal) -> y at level k + 1


def localization(levels: Levels, k: int, y: Tensor, u: Tensor, normal: Tensor) -> Tensor:
    """y + (alpha' - alpha) u + sqrt(sigma'^2 - sigma^2) xi: the observation process with its drift frozen (Grenioux et al. 2024)."""
    (a, b), (s, t) = levels.alpha[k : k + 2], levels.sigma[k : k + 2]
    after: Tensor = y + (b - a) * u + (t.square() - s.square()).sqrt() * normal
    return after


def reverse_ou(levels: Levels, k: int, y: Tensor, u: Tensor, normal: Tensor) -> Tensor:
    """e^d y + 2 (e^d - 1) s + sqrt(e^(2d) - 1) xi, d = log(alpha' / alpha): the reversed OU process with its score s frozen (Huang et al.
    2023, arXiv:2307.02037, algorithm 1; the 2 is missing in a published code, which makes a variance of 1.7 of 1)."""
    a, sigma = levels.alpha[k], levels.sigma[k]
    growth, score = levels.alpha[k + 1] / a, (a * u - y) / sigma.square()
    return growth * y + 2 * (growth - 1) * score + (growth.square() - 1).sqrt() * normal


@dataclass(frozen=True, eq=False)
class Plan:
    """Levels; the chains' step h (K + 2,) at each and on pi itself, and where they begin by importance (K + 1,), both by a pilot; steps of
    the start and of the corrector."""

    levels: Levels
    h: Tensor
    fresh: Tensor
    start: int
    corrector: int

    def price(self, inner: Inner) -> int:
        """Evaluations of a walk, the last density included."""
        K = self.levels.steps
        looks = self.start + K + 1 + self.corrector * K
        return inner.price(looks, BEGIN) + 1 + SETTLE * sum(inner.moves.price) + inner.chains * PROPOSALS * int(self.fresh.sum()) + 1


class Means(NamedTuple):
    """Posterior means u (n, dim), and the chains' diagnostics: the share of the variance about a mean that lies between its chains (1: they
    disagree), effective draws per mean."""

    u: Tensor
    apart: float
    draws: float


def posterior_means(seen: Seen, scale: Tensor, n: int) -> Means:
    """E[x | y] from chains z (steps, n chains, dim) with scores g: mean of z + c g, c by least squares for each y."""
    z, g = (part.reshape(len(part), n, -1, part.shape[-1]) for part in (seen.z, seen.g))  # (steps, n, chains, dim)
    dz, dg = z - z.mean((0, 2), keepdim=True), g - g.mean((0, 2), keepdim=True)
    c = -(dz * dg).sum((0, 2, 3)) / dg.square().sum((0, 2, 3)).clamp(min=1e-300)
    c = c.clamp(min=0.0)[:, None, None]
    steps, _, M, _ = z.shape
    each = z.mean(0) + c * g.mean(0)  # (n, chains, dim)
    total, noise = float(dz.square().mean((0, 2)).sum()), float(each.var(1).sum()) / M if M > 1 else float("nan")
    share = float(dz.mean(0).square().mean(1).sum()) / max(total, 1e-300)
    apart = max(0.0, (share - 1 / steps) / (1 - 1 / steps)) if steps > 1 else M * noise / max(total, 1e-300)
    return Means(scale * each.mean(1), apart, total / max(noise, 1e-12 * total, 1e-300))


class Walkers:
    """n walks of a block and their chains x (n, chains, dim)."""

    def __init__(self, target: Units, levels: Levels, inner: Inner, y: Tensor, x: Tensor, rng: Rng) -> None:
        self.target, self.levels, self.inner, self.y, self.x, self.rng = target, levels, inner, y, x, rng
        self.spent = Spent()
        self.proposals = 0

    def frame(self, k: int) -> Scaled:
        s = self.levels.sigma[k] / self.levels.alpha[k]
        return Scaled(s / (1 + s.square()).sqrt())

    def seen(self, k: int, h: Tensor, transitions: int) -> Seen:
        frame, rows = self.frame(k), self.y[:, None].expand(self.x.shape).flatten(0, 1)
        kernel = replace(self.inner.moves, h=h)  # type: ignore[type-var]
        z = self.x.flatten(0, 1) / frame.scale
        view = posterior(self.target, rows, self.levels.alpha[k], self.levels.sigma[k], frame)
        found = look(view, z, kernel, transitions, self.rng, self.spent)
        self.x = (frame.scale * found.z[-1]).reshape(self.x.shape)
        return found

    def settle(self, h: Tensor, transitions: int) -> Seen:
        """The first chain of each walk, moved on pi itself."""
        none, one = torch.zeros_like(h), torch.ones_like(h)
        kernel, view = replace(self.inner.moves, h=h), posterior(self.target, self.y, none, one, Scaled(one))  # type: ignore[type-var]
        found = look(view, self.x[:, 0], kernel, transitions, self.rng, self.spent)
        self.x = torch.cat([found.z[-1][:, None], self.x[:, 1:]], 1)
        return found

    def means(self, k: int, h: Tensor, more: int = 0) -> Means:
        seen = self.seen(k, h, self.inner.transitions + more)
        return posterior_means(Seen(*(part[more:] for part in seen)), self.frame(k).scale, len(self.y))

    def correct(self, k: int, u: Tensor) -> None:
        """A Langevin step on y at level k, by its score: y <- (y + alpha u) / 2 + sigma xi."""
        a, s = self.levels.alpha[k], self.levels.sigma[k]
        self.y = (self.y + a * u) / 2 + s * self.rng.normal(*self.y.shape)

    def begin_by_importance(self, k: int) -> float:
        """Chains at draws of N(y / alpha, (sigma / alpha)^2 I), resampled by pi; the share of the proposals that is effective."""
        n, M, dim = self.x.shape
        a, s = self.levels.alpha[k], self.levels.sigma[k]
        x = (self.y[:, None] + s * self.rng.normal(n, M * PROPOSALS, dim)) / a
        log_p = self.target.log_prob(x.flatten(0, 1)).reshape(n, -1).nan_to_num(-torch.inf, torch.inf, -torch.inf)
        self.proposals += log_p.numel()
        log_p = torch.where(log_p.isinf().all(1, keepdim=True), 0.0, log_p)
        w = log_p.softmax(1)
        chosen = drawn(log_p[:, None].expand(-1, M, -1), self.rng.uniform(n, M).double())
        self.x = x.gather(1, chosen[..., None].expand(-1, -1, dim))
        return float((1 / w.square().sum(1)).mean()) / w.shape[1]


class Walked(NamedTuple):
    """Ends x (n, dim), in the target's units, of walks; the worst of the levels' diagnostics."""

    x: Tensor
    apart: float
    draws: float


def walked(walkers: Walkers, plan: Plan, step: Step) -> Walked:
    """Walks from their start to the last level, and a draw of the posterior there."""
    worst = [0.0, float("inf")]
    means = walkers.means(0, plan.h[0], BEGIN)
    for _ in range(plan.start):
        walkers.correct(0, means.u)
        means = walkers.means(0, plan.h[0])
    for k in range(walkers.levels.steps):
        worst = [max(worst[0], means.apart), min(worst[1], means.draws)]
        walkers.y = step(walkers.levels, k, walkers.y, means.u, walkers.rng.normal(*walkers.y.shape))
        if plan.fresh[k + 1]:
            walkers.begin_by_importance(k + 1)
        means = walkers.means(k + 1, plan.h[k + 1])
        for _ in range(plan.corrector):
            walkers.correct(k + 1, means.u)
            means = walkers.means(k + 1, plan.h[k + 1])
    walkers.settle(plan.h[-1], SETTLE)
    return Walked(walkers.x[:, 0], *worst)


def planned(walkers: Walkers, start: int, corrector: int, step: Step, importance: bool) -> Plan:
    """The steps of the chains, and where an importance start is good, by walks that are then forgotten."""
    levels = walkers.levels
    h, fresh, kernel = levels.alpha.new_ones(levels.steps + 2), torch.zeros(len(levels.alpha), dtype=torch.bool), walkers.inner.moves
    for k in range(len(levels.alpha)):
        if importance and k:
            x, good = walkers.x, walkers.begin_by_importance(k) > GOOD
            fresh[k], walkers.x = good, walkers.x if good else x
        for _ in range(TRIALS + (BEGIN if k == 0 else 0)):
            kernel = tuned(kernel, walkers.seen(k, kernel.h, 1).accept[0], walkers.inner.longest)
        h[k] = kernel.h
        u = walkers.means(k, kernel.h).u
        for _ in range(start if k == 0 else corrector):
            walkers.correct(k, u)
            u = walkers.means(k, kernel.h).u
        if k < levels.steps:
            walkers.y = step(levels, k, walkers.y, u, walkers.rng.normal(*walkers.y.shape))
    for _ in range(TRIALS):
        kernel = tuned(kernel, walkers.settle(kernel.h, 1).accept[0], walkers.inner.longest)
    h[-1] = kernel.h
    return Plan(levels, h, fresh, start, corrector)


def verdicts(found: list[Walked], spent: list[Spent], gradients: float) -> list[Flag]:
    """What the posterior chains say of themselves, and that there are no path weights."""
    accept = sum(s.accepted for s in spent) / max(sum(s.transitions for s in spent), 1)
    apart, draws = max(w.apart for w in found), min(w.draws for w in found)
    said = f"acceptance {accept:.2f}, {draws:.0f} effective draws per score at the worst level, {gradients:.0f} evaluations per draw"
    flags = [flag("PATH_WEIGHT_MISSING"), flag("INNER_CHAINS", detail=said)]
    if accept < LOW_ACCEPTANCE:
        flags.append(flag("INNER_ACCEPTANCE", value=accept, threshold=LOW_ACCEPTANCE))
    if apart > APART:
        flags.append(flag("INNER_DISAGREE", value=apart, threshold=APART))
    if draws < FEW_DRAWS:
        flags.append(flag("INNER_DRAWS", value=draws, threshold=FEW_DRAWS))
    return flags
