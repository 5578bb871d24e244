"""Scores of one run against a truth card: pure functions of a Problem and a Result, through the public API alone.

    worst |z|      max over the card's numbers of |estimate - truth| / sqrt(stderr^2 + the truth's own^2)
    ok: worst |z|  the same over the estimates whose status is ok: where this is large, an error bar was silently wrong
    sliced KS      mean over 128 random directions of the largest difference of two distribution functions
    energy         (2 E|X-Y| - E|X-X'| - E|Y-Y'|) / 2 E|X-Y|, from 0 (the same law) to 1; Szekely & Rizzo (2013),
                   J. Stat. Plan. Inference 143, 1249-1272, section 8

The last two compare at most 2000 draws, taken evenly or by weight, with as many exact draws. Exact draws among themselves do not
score 0, so their score at the same n stands beside it: the floor. Draws that depend on each other lie above it by right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor

import boltzsample as bz
from boltzsample.streams import Stream
from targets import Problem, Quantity

SIZE = 2_000  # draws compared
DIRECTIONS = 128
SETS = 4  # of exact draws
FOUND = 0.1  # a mode is found where its estimated weight is at least this share of the true one

Scores = dict[str, Any]


class Gap(NamedTuple):
    """One number of the card and how far the run is from it, in joint errors."""

    name: str
    z: float
    ok: bool


def score(p: Problem, result: bz.Result) -> Scores:
    """All scores of the run; None where a score does not apply."""
    return {**accuracy(p, result), **evidence(p, result), **cost(result), **modes(p, result), **quality(p, result)}


def accuracy(p: Problem, result: bz.Result) -> Scores:
    """The worst |z| over the card's numbers and over those whose estimate is ok, and the worst error of a mean in sd.

    `unanswered` counts what the run gave no number or no bar for (HEAVY_F); among the ok estimates that is an error without end.
    """
    found = list(gaps(p, result))
    answered = [g for g in found if not math.isnan(g.z)]
    worst = max(answered, key=lambda g: abs(g.z), default=None)
    ok = [math.inf if math.isnan(g.z) else abs(g.z) for g in found if g.ok]
    scores: Scores = {"worst_z": abs(worst.z) if worst else None, "worst_z_at": worst.name if worst else None}
    scores |= {"numbers": len(found), "unanswered": len(found) - len(answered), "numbers_ok": len(ok), "worst_z_ok": max(ok, default=None)}
    error = (result.means.value - p.truth["mean"].value).abs() / p.truth["sd"].value if "mean" in p.truth else torch.empty(0)
    error = error[error.isfinite()]
    return scores | {"mean_error_sd": float(error.max()) if len(error) else None}


def gaps(p: Problem, result: bz.Result) -> Iterator[Gap]:
    """A Gap for every component of every quantity but log Z."""
    for q in p.truth:
        est = estimate(p, q, result)
        if est is None:
            continue
        parts = [est] if est.value.ndim == 0 else [est[i] for i in range(len(est))]
        for i, (part, value, stderr) in enumerate(zip(parts, q.value.reshape(-1), q.stderr.reshape(-1), strict=True)):
            label = q.name if est.value.ndim == 0 else f"{q.name}[{i}]"
            yield Gap(label, z_score(float(part.value - value), math.hypot(float(part.stderr), float(stderr))), part.status == "ok")


def z_score(error: float, bar: float) -> float:
    """error / bar; a bar of 0 is right only where the error is 0 to rounding."""
    return error / bar if bar > 0 else (0.0 if abs(error) < 1e-12 else math.inf) if bar == 0 else math.nan


def estimate(p: Problem, q: Quantity, result: bz.Result) -> bz.Estimate | None:
    """What the run says of a quantity; None for log Z, which has scores of its own."""
    if q.name == "log_z":
        return None
    if q.name == "sd":
        return result.sd()
    return result.expectation(q.f if q.is_expectation else lambda x: -p.target.log_prob(x))  # the other: energy


def evidence(p: Problem, result: bz.Result) -> Scores:
    """log Z with its error bar, its error and z, where the method and the card have one."""
    est = result.log_z()
    nothing = {"log_z": None, "log_z_stderr": None, "log_z_error": None, "log_z_z": None, "log_z_status": None}
    if not bool(est.value.isfinite()) or "log_z" not in p.truth:
        return nothing
    error, truth_se = float(est.value - p.truth["log_z"].value), float(p.truth["log_z"].stderr)
    z = z_score(error, math.hypot(float(est.stderr), truth_se))
    return dict(zip(nothing, (float(est.value), float(est.stderr), error, z, str(est.status)), strict=True))


def cost(result: bz.Result) -> Scores:
    """What the run took and what it gave for it; `ess` is that of the worst coordinate's mean."""
    ess = float(result.means.ess.nan_to_num(nan=0.0).min())
    rates = {"ess_per_million": 1e6 * ess / max(result.evaluations, 1), "ess_per_second": ess / max(result.seconds, 1e-9)}
    spent = {"evaluations": result.evaluations, "seconds": result.seconds, "seconds_by_phase": dict(result.draws.seconds)}
    return {"draws": result.draws.log_prob.numel(), "ess": ess, "weights_ess": kish(result), **spent, **rates}


def kish(result: bz.Result) -> float | None:
    """The ESS of the weights as a share of the draws, (sum w)^2 / (n sum w^2); None for draws without weights, 0 where all are 0."""
    if result.draws.log_weight is None:
        return None
    log_w = result.draws.log_weight.double().flatten()
    if not bool(log_w.max().isfinite()):
        return 0.0
    return float((2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()) / len(log_w)


def modes(p: Problem, result: bz.Result) -> Scores:
    """Modes found, the total variation between their weights and the true ones, and that of as many independent draws."""
    if "mode_weights" not in p.truth:
        return {"modes": None, "modes_found": None, "mode_tv": None, "mode_tv_floor": None}
    w = p.truth["mode_weights"].value
    seen = result.expectation(p.truth["mode_weights"].f).value
    # E|k/n - w| of a binomial is sqrt(2 w (1 - w) / (pi n)), up to 1/n
    floor = float((2 * w * (1 - w) / (math.pi * result.draws.log_prob.numel())).sqrt().sum() / 2)
    found, tv = int((seen >= FOUND * w).sum()), float((seen - w).abs().sum() / 2)
    return {"modes": len(w), "modes_found": found, "mode_tv": tv, "mode_tv_floor": floor}


# ---- draws against exact draws ----


def quality(p: Problem, result: bz.Result) -> Scores:
    """Sliced KS and energy of the draws and of exact draws, all sets of one size."""
    names = ("sliced_ks", "sliced_ks_floor", "energy", "energy_floor")
    size = min(SIZE, result.draws.log_prob.numel())
    stream = Stream(int(result.config["seed"])).child("benchmark", p.name)
    x = picked(result.draws, size, stream)
    if p.exact_sampler is None or x is None:
        return {"compared": None, **dict.fromkeys(names)}
    exact = [p.exact_sampler(size, stream.child("exact", k).rng().generator) for k in range(SETS + 1)]
    slopes = stream.child("directions").rng().normal(p.target.dim, DIRECTIONS)
    slopes = slopes / slopes.norm(dim=0)
    distances: tuple[Callable[[Tensor, Tensor], float], ...] = (lambda a, b: sliced_ks(a @ slopes, b @ slopes), energy)
    found = [[_mean(d(x, y) for y in exact[1:]), _mean(d(*pair) for pair in pairwise(exact))] for d in distances]
    return {"compared": size, **dict(zip(names, (*found[0], *found[1]), strict=True))}


def _mean(values: Iterator[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def picked(draws: bz.Draws, size: int, stream: Stream) -> Tensor | None:
    """`size` points (size, dim) by systematic resampling: equal weights are thinned evenly. None where points are not finite."""
    x = draws.x.detach().flatten(0, 1).double().cpu()  # (n, dim)
    log_w = torch.zeros(len(x)) if draws.log_weight is None else draws.log_weight.detach().flatten().double().cpu()
    share = (log_w.double() - log_w.double().logsumexp(0)).exp()
    if not bool(share.isfinite().all()) or not bool(x[share > 0].isfinite().all()):
        return None
    u = (torch.arange(size) + stream.child("thinning").rng().uniform(1)) / size
    return x[torch.searchsorted(share.cumsum(0), u).clamp(max=len(x) - 1)]


def sliced_ks(a: Tensor, b: Tensor) -> float:
    """The mean over columns of the two-sample Kolmogorov-Smirnov distance. a, b: (n, directions)."""
    columns = zip(a.T.numpy(), b.T.numpy(), strict=True)
    return _mean(float(stats.ks_2samp(u, v, method="asymp").statistic) for u, v in columns)


def energy(x: Tensor, y: Tensor) -> float:
    """The energy coefficient of two sets (n, dim): within-set averages leave out a point's distance to itself, so it may be below 0."""
    across = float(torch.cdist(x, y).mean())
    within = [float(torch.cdist(v, v).sum()) / (len(v) * (len(v) - 1)) for v in (x, y)]
    return (2 * across - sum(within)) / (2 * across)
