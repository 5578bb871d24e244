"""Flags: what the library found to say about a number, with stable codes (TRUST.md, warning taxonomy).

A flag has a severity: "info" changes nothing, "caution" lowers a status to caution, "untrusted" to untrusted.
A code exists only if one test fires it and another shows that it stays quiet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, NamedTuple

Severity = Literal["info", "caution", "untrusted"]


class Status(StrEnum):
    """The one-word verdict on a number or a run: ok, caution or untrusted."""

    OK = "ok"
    CAUTION = "caution"
    UNTRUSTED = "untrusted"

    @property
    def rank(self) -> int:
        return list(Status).index(self)


class Kind(NamedTuple):
    """A line of the taxonomy: default severity, what the finding means, what to try."""

    severity: Severity
    meaning: str
    remedy: str


KINDS: dict[str, Kind] = {
    # density
    "NAN_EVAL": Kind("info", "log_prob returned NaN; those proposals were rejected and counted", "evaluate log_prob at the point kept in result.draws.bad_x"),
    "NO_GRADIENT": Kind("info", "the density has no gradient, so a random walk was used", "give a gradient for far faster mixing"),
    "IMPROPER_SUSPECTED": Kind("untrusted", "the density seems to have no finite integral, so there is nothing to normalize", "add the prior or the bound that makes it a density"),
    # chains
    "RHAT": Kind("caution", "split R-hat says that the chains disagree", "run longer (n=) or use a method that crosses between modes"),
    "NESTED_RHAT": Kind("untrusted", "chains from different starts have different means", "run longer; between far modes no run of local moves is long enough"),
    "ESS_LOW": Kind("caution", "few effectively independent draws", "increase n"),
    "TAU_UNRESOLVED": Kind("caution", "chains too short to measure their own autocorrelation", "raise n= or thin= so that each chain is worth more draws"),
    "TAU_FLOORED": Kind("info", "chains look antithetic; the autocorrelation time was floored", "nothing: the error bar is conservative"),
    "FEW_UNITS": Kind("caution", "fewer than four independent chains", "use 16 chains or more"),
    "ONE_UNIT": Kind("untrusted", "a single chain cannot reveal a second mode", "use 16 chains or more with dispersed starts"),
    "BARS_DISAGREE": Kind("caution", "the error bars within and between chains differ by more than chance; the larger is used", "run longer, and use 16 chains or more"),
    "DUPLICATE_STREAM": Kind("untrusted", "some chains are exact copies of others", "give every chain its own random numbers"),
    "STUCK_CHAIN": Kind("untrusted", "some chains never moved", "look at the density near result.draws.x of the stuck chains; try a smaller step or other starts"),
    "SAME_STARTS": Kind("caution", "all chains started from the same point, so no start could disagree", "leave starts=None (wide source) or pass dispersed starts"),
    "FEW_SWITCHES": Kind("untrusted", "chains hardly ever switch between the event and its complement, so this weight repeats the starts", "read probabilities inside one mode only; local moves cannot weigh far modes"),
    "FEW_ROUND_TRIPS": Kind("untrusted", "hardly any point travelled from the base to the target, so the weights of far modes may repeat the starts", "increase n or thin, or use more temperatures"),
    "DIVERGENCES": Kind("caution", "trajectories diverged: a region of high curvature is under-visited", "reparametrize (for a funnel, x = exp(v / 2) z), or read quantiles away from it only"),
    "DRIFT": Kind("untrusted", "the first and second half of the chains differ: not stationary", "increase warmup or n"),
    "START_MEMORY": Kind("untrusted", "chain means still depend on where the chains started", "increase warmup or n"),
    "UNADJUSTED": Kind("caution", "the kernel has a discretization bias that no error bar covers", "use its Metropolis-adjusted relative"),
    "TAIL_ESS_LOW": Kind("caution", "the tails mix much more slowly than the bulk", "run longer, or reparametrize"),
    # functionals
    "HEAVY_F": Kind("untrusted", "the variance of f seems infinite, so its error bar means nothing", "estimate a quantile or a bounded function instead"),
    "NO_THIRD_MOMENT": Kind("caution", "far out the density falls so slowly that f has no third moment, and few draws give intervals that are too short", "increase n: from 10,000 effective draws on intervals hold; or estimate a quantile or a bounded function"),
    "RARE_EVENT": Kind("caution", "the event was hit too rarely for a symmetric error bar", "increase n, or use weighted draws aimed at the event"),
    "NONFINITE_F": Kind("untrusted", "f returned NaN or inf at some draws", "check f at result.draws.x"),
    "CONSTANT_F": Kind("caution", "f had the same value at every draw, so no error bar can be estimated", "expect this only of a constant f"),
    "COARSE_F": Kind("caution", "the spread of f is hardly above the rounding of its floating point numbers", "compute f in float64, or subtract a constant inside f"),
    "EXTREME_QUANTILE": Kind("caution", "fewer than 20 effective draws lie beyond the quantile", "increase n, or ask for a less extreme quantile"),
    "NO_ERROR_BAR": Kind("untrusted", "too few independent units for any error bar", "use more chains"),
    # weights
    "KHAT_W": Kind("caution", "the weights have a heavy tail: a few unseen draws could change the result", "use a wider proposal (defensive mixture), or more draws"),
    "KHAT_F": Kind("caution", "weight times f has a heavy tail", "use a proposal wider where f is large, or ask for a bounded function"),
    "CONCENTRATION": Kind("caution", "a single draw carries much of the error bar", "increase n, or use a wider proposal"),
    "FEW_ANCESTORS": Kind("untrusted", "nearly all particles descend from a few of the first ones", "use more particles, or a base closer to the target"),
    "UNSETTLED": Kind("untrusted", "more moves at the last level change averages that they should leave alone: the particles lag behind the ladder", "raise moves= and cess=, or use a method with a flow (flow-is, latent-mcmc)"),
    "BAD_WEIGHTS": Kind("untrusted", "all weights are zero, or some are NaN or infinite", "check log_weight and the overlap of proposal and target"),
    "NO_OVERLAP": Kind("untrusted", "target and proposal hardly overlap, so the bridge between them bears nothing", "train the flow longer, or use more temperatures"),
    "OUT_OF_RANGE": Kind("caution", "draws lie outside the interval on which the flow's splines act, where it cannot shape a tail", "put a scale layer before the splines, or use an affine flow"),
    "PATH_WEIGHT_MISSING": Kind("caution", "the draws carry no weights, so nothing corrects their steps, their scores and the masses of far modes", "weights=True of slips, weighted=True of diffusion; without a density, none"),
    "WINDOW_EMPTY": Kind("untrusted", "at no noise level do both certificates hold, so the masses of modes repeat the start", "slips with weights=True, or smc or tempering"),
    "INNER_CHAINS": Kind("info", "what the posterior chains were like", "nothing"),
    "INNER_ACCEPTANCE": Kind("caution", "the posterior chains hardly move", "raise transitions= of Inner, or give another kernel"),
    "INNER_DISAGREE": Kind("caution", "posterior chains of the same observation sit in different places, so scores repeat their starts", "raise chains= or transitions= of Inner, or use slips with weights=True"),
    "INNER_DRAWS": Kind("caution", "the scores rest on few effective draws", "raise chains= or transitions= of Inner"),
    "HUTCH_NOISE": Kind("caution", "the log-det of the probability flow is estimated with noise, which raises log Z by half its variance", "use a diffusion by kernels (rule=Ancestral()), whose weights are exact"),
    "SOLVER_BIAS": Kind("caution", "the log-det of the probability flow changes with the step size", "more steps, or a diffusion by kernels (rule=Ancestral()), whose weights are exact"),
    "LOG_Z_SPREAD": Kind("caution", "the weights vary too much for the interval of log Z", "increase n, or use a closer proposal"),
    "NO_LOG_Z": Kind("untrusted", "this method does not estimate log Z", "give weighted draws of a proposal you know: bz.Draws.from_arrays(x, log_prob, log_weight)"),
    # global
    "SINGLE_WITNESS": Kind("caution", "no second, independent look confirmed that no mode is missing", "leave witness=True, or pass modes="),
    "WITNESS_CONFLICT": Kind("untrusted", "a second, independent look found mass that the draws miss", "add the reported points to starts=; weights of far modes stay unknown to local moves"),
    "SE_MISCALIBRATED": Kind("caution", "replicates disagree by more than their own error bars; the spread of the replicates is used", "run longer"),
    "FORGOTTEN_MASS": Kind("untrusted", "the fitted mixture is too thin where an exploration found mass: there are more modes than it has components for", "a method that needs no list of modes: smc, or a flow trained on its draws"),
    # run
    "INTERRUPTED": Kind("untrusted", "the run was interrupted; what was drawn until then is returned", "run it again"),
    "STOPPED_EARLY": Kind("caution", "the budget ended before n draws were made", "raise budget="),
    "OOM_SPLIT": Kind("info", "memory ran out, so chains were run in smaller groups (same noise, same law)", "nothing"),
    "REPLICATE_FAILED": Kind("untrusted", "a replicate failed", "see result.replicates"),
    "AUTO": Kind("info", "the method that auto chose", "name a method to choose it yourself"),
}


@dataclass(frozen=True)
class Flag:
    """One finding: a stable `code`, its `severity`, the measured `value` against its `threshold`, and for a tensor-valued
    f the flattened components `index` it concerns (None: all of them).

    >>> print(flag("ESS_LOW", value=310, threshold=400))
    ESS_LOW: few effectively independent draws (310, threshold 400); increase n
    """

    code: str
    severity: Severity
    detail: str = ""
    value: float | None = None
    threshold: float | None = None
    index: tuple[int, ...] | None = None

    @property
    def meaning(self) -> str:
        return KINDS[self.code].meaning

    @property
    def remedy(self) -> str:
        return KINDS[self.code].remedy

    @property
    def status(self) -> Status:
        return Status.OK if self.severity == "info" else Status(self.severity)

    def __str__(self) -> str:
        facts = [self.detail] if self.detail else []
        if self.value is not None:
            facts.append(f"{self.value:.3g}" + ("" if self.threshold is None else f", threshold {self.threshold:.3g}"))
        return f"{self.code}: {self.meaning}" + (f" ({'; '.join(facts)})" if facts else "") + f"; {self.remedy}"


def flag(
    code: str,
    *,
    value: float | None = None,
    threshold: float | None = None,
    severity: Severity | None = None,
    detail: str = "",
    index: tuple[int, ...] | None = None,
) -> Flag:
    """A Flag of a known code, with its default severity unless another is given."""
    return Flag(code, severity or KINDS[code].severity, detail, value, threshold, index)


def worst(flags: Iterable[Flag]) -> Status:
    """The worst status any of the flags calls for."""
    return max((f.status for f in flags), key=lambda s: s.rank, default=Status.OK)


def for_component(flags: Iterable[Flag], i: int) -> tuple[Flag, ...]:
    """The flags that concern component i of a tensor-valued f."""
    return tuple(replace(f, index=None) for f in flags if f.index is None or i in f.index)


def finite(value: float) -> float | None:
    """value, or None where JSON could not hold it."""
    return value if math.isfinite(value) else None
