"""Planted errors: would the tests notice? `python -m benchmarks mutants` plants each one in a copy of the tree and runs the tests it names.

    python -m benchmarks mutants --only MALA
    python -m benchmarks mutants --shard 1/2

The test that turned red in the last run (docs/mutants.md) is tried first; where it stays green, all that the mutant names are run.

A mutant is one error of the kind people make in a sampler: an inverted ratio, a dropped Jacobian, 2h for 4h. Its `old` text must occur
exactly once in its file (tests/test_mutants.py watches that). The tests must be green without it and red with it. Changes that keep the
law (another symmetric jitter, 1 - u for u) are no errors and have no place here.
"""

# ruff: noqa: E501  (one mutant a line)

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.mutants_diffusion import PLANTED

ROOT = Path(__file__).parent.parent
KNOWN = ROOT / "docs" / "mutants.md"
COPIED = ("boltzsample", "targets", "tests", "benchmarks", "pyproject.toml", "README.md")
INDEPENDENT, ANNEALING, FLOWS = "tests/test_independent.py", "tests/test_annealing.py", "tests/test_flow_samplers.py"
DIRECT = "tests/test_direct.py"
KERNELS, VIEWS, COURT, BARS = "tests/test_kernels.py", "tests/test_views.py", "tests/test_court.py", "tests/test_expectation.py"
PATHS = "tests/test_posterior.py"
REPLICATES, WEIGHTED, METHODS = "tests/test_replicates.py", "tests/test_estimates_weighted.py", "tests/test_methods.py"


@dataclass(frozen=True)
class Mutant:
    """An error called `name`: in boltzsample/`file`, `old` becomes `new`, and one of `tests` turns red."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = (KERNELS,)

    @property
    def path(self) -> Path:
        return Path("boltzsample") / self.file

    def applied(self, text: str) -> str:
        """The text with the error in it. Raises ValueError where `old` does not occur exactly once."""
        found = text.count(self.old)
        if found != 1:
            raise ValueError(f"mutant {self.name!r}: its text occurs {found} times in {self.path}, wanted once: {self.old!r}")
        return text.replace(self.old, self.new)


RW, LMC, HAM = "kernels/random_walk.py", "kernels/langevin.py", "kernels/hamiltonian.py"
COIN, MOVES, LOOP, ADJUSTED = "kernels/kernel.py", "kernels/transitions.py", "kernels/chains.py", "samplers/mcmc.py"
BOTH = "(log_p_y + log_q_x_given_y) - (log_p_x + log_q_y_given_x)"
ENERGY = "(log_p - kinetic) - (state.log_p - kinetic0)"
RATIO = f"log_r = {BOTH}\n\n        return metropolis("
FORWARD = "log_q_y_given_x = -(y - x - hd * grad_x).square().sum(-1) / (4 * self.h)\n"
BACKWARD = "        log_q_x_given_y = -(x - y - hd * grad_y).square().sum(-1) / (4 * self.h)\n        "
PROPOSE = "y = x + hd * grad_x + (2 * hd).sqrt() * noise.normal\n        log_p_y, grad_y = log_prob_and_grad(target, y)\n\n        "
MALA = PROPOSE + FORWARD + BACKWARD + RATIO
ALWAYS = "always = torch.where(log_p_y > -torch.inf, torch.inf, -torch.inf)"
ULA = PROPOSE + ALWAYS


def mala(name: str, *changes: tuple[str, str]) -> Mutant:
    """A mutant of MALA's step, by changes to its own copy of the lines that ULA has too."""
    return Mutant(f"MALA: {name}", LMC, MALA, _changed(MALA, changes))


def ula(name: str, *changes: tuple[str, str]) -> Mutant:
    return Mutant(f"ULA: {name}", LMC, ULA, _changed(ULA, changes))


def _changed(text: str, changes: Iterable[tuple[str, str]]) -> str:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


MUTANTS: tuple[Mutant, ...] = (
    Mutant("random walk: inverted ratio", RW, "log_r = log_p_y - log_p_x", "log_r = log_p_x - log_p_y"),
    Mutant("random walk: min(1, r^.9)", RW, "log_r = log_p_y - log_p_x", "log_r = 0.9 * (log_p_y - log_p_x)"),
    Mutant("random walk: asymmetric proposal", RW, "* noise.normal", "* (noise.normal + 0.1)"),
    Mutant("random walk: h squared", RW, "self.h[..., None] *", "self.h[..., None] ** 2 *"),
    mala("swapped proposal densities", (BOTH, "(log_p_y + log_q_y_given_x) - (log_p_x + log_q_x_given_y)")),
    mala("dropped proposal densities", (BOTH, "log_p_y - log_p_x")),
    mala("inverted ratio", (BOTH, "(log_p_x + log_q_y_given_x) - (log_p_y + log_q_x_given_y)")),
    mala("2h for 4h", ("4 * self.h", "2 * self.h")),
    mala("min(1, r^.9)", (BOTH, f"0.9 * ({BOTH})")),
    mala("noise sqrt(h)", ("(2 * hd).sqrt()", "hd.sqrt()")),
    mala("old gradient on the way back", ("x - y - hd * grad_y", "x - y - hd * grad_x")),
    mala("drift away from the mode, everywhere", ("+ hd * grad_x", "- hd * grad_x"), ("- hd * grad_x).", "+ hd * grad_x)."), ("- hd * grad_y", "+ hd * grad_y")),
    Mutant("MALA: old gradient kept", LMC, "metropolis(state, ChainState(y, log_p_y, grad_y), log_r,", "metropolis(state, ChainState(y, log_p_y, grad_x), log_r,"),
    ula("noise sqrt(h)", ("(2 * hd).sqrt()", "hd.sqrt()")),
    ula("half the drift", ("+ hd * grad_x", "+ 0.5 * hd * grad_x")),
    ula("drift away from the mode", ("+ hd * grad_x", "- hd * grad_x")),
    ula("enters zero density", ("torch.where(log_p_y > -torch.inf, torch.inf, -torch.inf)", "torch.full_like(log_p_y, torch.inf)")),
    Mutant("ULA: acceptance without q", LMC, "log_r = (log_p_y + log_q_x_given_y) - (log_p_x + log_q_y_given_x)\n        return moved", "log_r = log_p_y - log_p_x\n        return moved"),
    Mutant("HMC: sign of the kinetic energy", HAM, ENERGY, "(log_p + kinetic) - (state.log_p + kinetic0)"),
    Mutant("HMC: dropped kinetic energy", HAM, ENERGY, "log_p - state.log_p"),
    Mutant("HMC: inverted ratio", HAM, ENERGY, "(state.log_p - kinetic0) - (log_p - kinetic)"),
    Mutant("HMC: min(1, r^.9)", HAM, ENERGY, f"0.9 * ({ENERGY})"),
    Mutant("HMC: full first kick", HAM, "p = p0 + 0.5 * e * grad", "p = p0 + e * grad"),
    Mutant("HMC: full last kick", HAM, "(e if i < self.L - 1 else 0.5 * e)", "e"),
    Mutant("HMC: half kicks inside", HAM, "(e if i < self.L - 1 else 0.5 * e)", "0.5 * e"),
    Mutant("HMC: momentum of variance 1.44", HAM, "p0 = noise.normal", "p0 = 1.2 * noise.normal"),
    Mutant("HMC: kinetic energy p^2", HAM, "0.5 * p0.square().sum(-1), 0.5 * p.square()", "p0.square().sum(-1), p.square()"),
    Mutant("HMC: uphill", HAM, "x = x + e * p", "x = x - e * p"),
    Mutant("HMC: step size from the position", HAM, "[..., None]  # (*batch, 1)", "[..., None] * (1 + 0.2 * state.x[..., :1].tanh())"),
    Mutant("HMC: old gradient kept", HAM, "ChainState(x, log_p, grad), log_r", "ChainState(x, log_p, state.grad), log_r"),
    Mutant("HMC: one step too many", HAM, "for i in range(self.L):", "for i in range(self.L + 1):"),
    Mutant("coin: NaN accepted", COIN, "(torch.log(uniform) < log_r)", "~(torch.log(uniform) >= log_r)"),
    Mutant("coin: infinite density accepted", COIN, "(torch.log(uniform) < log_r) & legal", "torch.log(uniform) < log_r"),
    Mutant("coin: u for log u", COIN, "(torch.log(uniform) < log_r)", "(uniform < log_r)"),
    Mutant("coin: min(1, r^.9)", COIN, "(torch.log(uniform) < log_r)", "(torch.log(uniform) < 0.9 * log_r)"),
    Mutant("loop: NaN not counted", MOVES, "meter.nan + nan", "meter.nan"),
    Mutant("Pullback: no Jacobian in log_prob", "views.py", "return self.target.log_prob(x) + log_det", "return self.target.log_prob(x)"),
    Mutant("Pullback: no Jacobian in one pass", "views.py", "return log_p + log_det, vjp(grad)", "return log_p, vjp(grad)"),
    Mutant("Pullback: gradient not pulled back", "views.py", "return log_p + log_det, vjp(grad)", "return log_p + log_det, grad"),
    Mutant("Diagonal: no Jacobian", "maps.py", "self.s.abs().log().sum(-1)", "0 * self.s.sum(-1)", (VIEWS,)),
    Mutant("Dense: no Jacobian", "maps.py", "log_det = self.L.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)", "log_det = 0 * self.L.sum((-2, -1))", (VIEWS,)),
    Mutant("Dense: transposed gradient", "maps.py", "lambda g: g @ self.L", "lambda g: g @ self.L.mT", (VIEWS,)),
    Mutant("support x > a: no Jacobian", "bijections.py", "x.minimum(inside)), z.sum(-1)", "x.minimum(inside)), 0 * z.sum(-1)"),
    Mutant("support a < x < b: half a Jacobian", "bijections.py", "+ F.logsigmoid(z) + F.logsigmoid(-z)", "+ F.logsigmoid(z)", (VIEWS,)),
    Mutant("Tempered: 0 * -inf", "views.py", "torch.where(b > 0, b * value, 0.0)", "b * value", (VIEWS,)),
    Mutant("Tempered: gradient not tempered", "views.py", "_times(b, log_p), _times(b[..., None], grad)", "_times(b, log_p), grad", (VIEWS,)),
    Mutant("Observed: sign of the gradient", "views.py", "grad + (self.alpha / self.sigma)", "grad - (self.alpha / self.sigma)", (VIEWS,)),
    Mutant("streams: lanes share their noise", LOOP, '"replicate", replicate, "lane", lane, "block"', '"replicate", replicate, "block"', (COURT,)),
    Mutant("streams: replicates share their noise", LOOP, '"replicate", replicate, "lane"', '"lane"', (COURT,)),
    Mutant("streams: blocks repeat", LOOP, '"lane", lane, "block", block', '"lane", lane', (COURT,)),
    Mutant("starts: replicates share theirs", "samplers/starts.py", 'stream.child("start", r, lane, attempt)', 'stream.child("start", lane, attempt)', (COURT,)),
    Mutant("mcmc: goes on adapting while sampling", ADJUSTED, "            trace.add(path, thin)\n", "            trace.add(path, thin)\n            chains.retune(replace(chains.kernel, h=chains.kernel.h * (0.5 + path.accept_prob.mean())))\n", (COURT,)),
    Mutant("mcmc: log_prob left in z", MOVES, "Path(x, state.log_p - log_det, accept)", "Path(x, state.log_p, accept)", (COURT,)),
    Mutant("bars: se / 1.5 between chains", "estimates/chains.py", "stderr = y.std(0) / math.sqrt(m)", "stderr = y.std(0) / math.sqrt(m) / 1.5", (COURT, BARS)),
    Mutant("bars: within-chain tau halved", "estimates/chains.py", "torch.nan_to_num(2 * total - 1, nan=1.0)", "torch.nan_to_num(total, nan=1.0)", (BARS,)),
    Mutant("bars: normal for t", "estimates/intervals.py", "t = float(special.stdtrit(n - 1, 0.975))", "t = 1.96", (BARS,)),
    Mutant("bars: Hall's correction backwards", "estimates/intervals.py", "a = torch.nan_to_num(skewness / math.sqrt(n))", "a = -torch.nan_to_num(skewness / math.sqrt(n))", (BARS,)),
    Mutant("bars: sd without the root", "estimates/expectation.py", "squares.stderr / (2 * root)", "squares.stderr / root", (BARS, COURT)),
    Mutant("bars: replicates / R for / sqrt R", "estimates/replicates.py", "value.std(0) / math.sqrt(r)", "value.std(0) / r", (REPLICATES,)),
    Mutant("bars: quantile intervals halved", "estimates/quantiles.py", "stats.binom.ppf(t, e.numpy(), p)) for t in (0.025, 0.975)", "stats.binom.ppf(t, e.numpy(), p)) for t in (0.25, 0.75)", (BARS, COURT)),
    Mutant("independence: the proposal's density forgotten", "kernels/independent.py", "log_w = torch.where(fine, log_p - self.log_q(z), -torch.inf)", "log_w = torch.where(fine, log_p, -torch.inf)", (INDEPENDENT,)),
    Mutant("independence: the wide part's volume forgotten", "kernels/independent.py", " - z.shape[-1] * math.log(self.scale)", "", (INDEPENDENT,)),
    Mutant("i-SIR: the current point left out", "kernels/independent.py", "all_w = torch.cat([now[..., None], log_w], -1)", "all_w = torch.cat([now[..., None] - 50, log_w], -1)", (INDEPENDENT,)),
    Mutant("scale move: no Jacobian", "kernels/scaling.py", "log_r = new.log_p - state.log_p + state.x.shape[-1] * s[..., 0]", "log_r = new.log_p - state.log_p", (INDEPENDENT,)),
    Mutant("scale move: a factor that -s does not undo", "kernels/scaling.py", "s.exp() * state.x", "(1 + s) * state.x", (INDEPENDENT,)),
    Mutant("SMC: particles moved at the last temperature", "samplers/cloud.py", "= Tempered(self.target, rung.beta, self.base), rung.map", "= Tempered(self.target, 0.8 * rung.beta, self.base), rung.map", (ANNEALING,)),
    Mutant("SMC: reports the adapted run's log Z", "samplers/frozen_smc.py", "return annealed(cloud, spent(first.chains))", "return annealed(first, spent(cloud.chains))", (ANNEALING,)),
    Mutant("mixture-is: regression without its symmetric part", "samplers/local.py", "(C + C.mT)", "(2 * C.triu())", ("tests/test_mixture.py",)),
    Mutant("mixture-is: the overall part is drawn and not counted", "mixture.py", "return torch.logaddexp(log_q + math.log1p(-b), self.overall.log_prob(x) + math.log(b)) if b else log_q", "return log_q", ("tests/test_mixture.py",)),
    Mutant("mixture-is: Student's scale forgotten in the density", "mixture.py", "math.log(nu * math.pi * c2)", "math.log(nu * math.pi)", ("tests/test_mixture.py",)),
    Mutant("mixture-is: log-det with the wrong sign", "mixture.py", "self.log_share - self.log_det +", "self.log_share + self.log_det +", ("tests/test_mixture.py",)),
    Mutant("mixture-is: what was forgotten is not told", "samplers/mixture_is.py", "if max(self.forgotten, default=0.0) > FORGOTTEN:", "if False:", ("tests/test_mixture.py",)),
    Mutant("mixture-is: no cold starts", "samplers/mixture_is.py", "torch.cat([*parts, cold])", "torch.cat([*parts, cold[:0]])", ("tests/test_mixture.py",)),
    Mutant("mixture-is: any lack is excused by a mode found", "samplers/mixture_is.py", "if against(replace(estimate, value=estimate.value - lacks), smc).flags:", "if blind == 0:", ("tests/test_mixture.py",)),
    Mutant("mixture-is: a second look with more is no conflict", "samplers/mixture_is.py", "or not smc.log_z < float(estimate.value):", "or False:", ("tests/test_mixture.py",)),
    Mutant("mixture-is: a climb that leapt makes a member", "samplers/mixture_is.py", "own > 4 * far", "own > 1e9 * far", ("tests/test_mixture.py",)),
    Mutant("auto: one lucky pilot is enough", "auto.py", "khat=max(judged.khat, khat)", "khat=judged.khat", ("tests/test_auto.py",)),
    Mutant("mixture-is: tails of a bend left as they are", "samplers/tempered_part.py", "if not 0 < first.ess < WELL:", "if True:", ("tests/test_mixture.py",)),
    Mutant("mixture-is: a tempered part always", "samplers/tempered_part.py", "if not 0 < first.ess < WELL:", "if False:", ("tests/test_mixture.py",)),
    Mutant("mixture-is: a tempered part whatever it costs", "samplers/tempered_part.py", "new < old - COST", "False", ("tests/test_mixture.py",)),
    Mutant("mixture-is: tempered with the shares of the target", "samplers/tempered_part.py", "0.5 * (mixture.log_share + mixture.log_det)", "mixture.log_share", ("tests/test_mixture.py",)),
    Mutant("direct: shapes, strides and dtypes are all one", "direct.py", "return value.shape, value.stride(), value.dtype, value.device", "return None", (DIRECT,)),
    Mutant("direct: a tensor given twice is two", "direct.py", "if kind not in self.plans and len(set(map(id, given))) == len(given):", "if kind not in self.plans:", (DIRECT,)),
    Mutant("direct: arguments of the first call for ever", "direct.py", "if value is not last:", "if last is None:", (DIRECT,)),
    Mutant("direct: numbers of all types are alike", "direct.py", "return type(value), value  #", "return value  #", (DIRECT,)),
    Mutant("direct: gradients asked for are not given", "direct.py", "if plan is not None and not torch.is_grad_enabled():", "if plan is not None:", (DIRECT,)),
    Mutant("chains: another target by the same map is the old one", LOOP, "now = self.kernel, self.target, self.map", "now = self.kernel, self.map", (DIRECT,)),
    Mutant("chains: graphs are given the user's own tensors", LOOP, "unshared((self.kernel, self.map)) if self.stepper.compiled else (self.kernel, self.map)", "(self.kernel, self.map)", (DIRECT,)),
    Mutant("mixture-is: a lucky look will do above sixteen dimensions", "samplers/refine.py", "(2 * LAST, NOISE)", "(LAST, -NOISE)", ("tests/test_mixture.py",)),
    Mutant("mixture-is: never made wider", "samplers/refine.py", "for width in WIDTHS if", "for width in () if", ("tests/test_mixture.py",)),
    Mutant("adapt: leaving the support counts as an error of the integrator", "kernels/adapt.py", "a = torch.where(outside, EDGE, a)", "a = torch.where(outside, FLOOR, a)", ("tests/test_adapt.py",)),
    Mutant("mixture-is: improper densities pass", "improper.py", "SLOPE = -1.05", "SLOPE = 1e9", ("tests/test_improper.py",)),
    Mutant("ensembles: their own variances taken for exact", "estimates/ensembles.py", "df = 2 * m / max(float(v.var() / v.mean().square()), 1e-9)", "df = 1e9", ("tests/test_smc.py::test_bars_that_are_estimates_are_no_fault",)),
    Mutant("CONCENTRATION: no weight is large", "estimates/weighted.py", "COVERED = 6.0", "COVERED = 1e9", (WEIGHTED,)),
    Mutant("CONCENTRATION: calm weights excuse half of the bar", "estimates/weighted.py", "(share > 0.25) | ~", "(share > 0.5) | ~", (WEIGHTED,)),
    Mutant("CONCENTRATION: calm weights excuse a tail of f", "estimates/weighted.py", " | ~(k <= CALM)", "", (WEIGHTED,)),
    Mutant("CONCENTRATION: plain weight excuses any draw", "estimates/weighted.py", " | (k > STEEP)", "", (WEIGHTED,)),
    Mutant("defense: taken where it harms", "samplers/defended.py", "log_worth(mixed[fine].cpu()) > ", "log_worth(mixed[fine].cpu()) < ", ("tests/test_reverse.py::test_defensive_paths_are_taken_where_they_help",)),
    Mutant("pool: components of the wrong moments", "samplers/pool.py", "fit_em(q, seen.z, torch.softmax(seen.log_w, 0), ROUNDS)", "fit_em(q, seen.z, torch.softmax(0 * seen.log_w, 0), ROUNDS)", ("tests/test_slips.py::test_components_settle_at_the_moments_of_the_target",)),
    Mutant("SMC: one resampling too few in the variance", "samplers/cloud.py", "(self.resampled[:, None] + 1.0)", "self.resampled[:, None]", ("tests/test_smc.py::test_each_variance_is_what_it_says",)),
    Mutant("weights: the base is N(0, I) when it is not", "flows/base.py", "return torch.logaddexp(narrow, wide)", "return narrow", ("tests/test_flows.py",)),
    Mutant("weights: no Jacobian of the flow", "flows/flow.py", "return x, self.base.log_prob(z.double()) - log_det.double(), z", "return x, self.base.log_prob(z.double()), z", ("tests/test_flows.py",)),
    Mutant("weights: no Jacobian of the whitening", "flows/flow.py", "return x, log_det + more", "return x, log_det", ("tests/test_flows.py",)),
    Mutant("latent-mcmc: log_prob left in z", "samplers/latent.py", "log_prob=chains.log_prob - log_det", "log_prob=chains.log_prob", (f"{METHODS}::test_right_counted_and_repeatable[latent-mcmc]",)),
    Mutant("bridge: chains counted as independent draws", "estimates/bridge.py", "of_p, units = f2.mean(1).var() / (chains * f2.mean().square()), chains", "of_p, units = f2.var() / (f2.numel() * f2.mean().square()), chains", ("tests/test_bridge.py",)),
    Mutant("gaps: nobody looks in x", "samplers/gaps.py", "count < FEW", "True", ("tests/test_gaps.py",)),
    Mutant("gaps: every particle is one", "samplers/gaps.py", "- z > most)", "- z > -1e9)", ("tests/test_gaps.py",)),
    Mutant("gaps: no inverse of many passes", "samplers/gaps.py", "return flow.has_pull or (flow.inverts", "return flow.has_pull or (False", ("tests/test_gaps.py",)),
    Mutant("weights: draws of unknown density dropped", "samplers/weighing.py", "undefined | (log_p == -torch.inf)", "undefined | torch.isnan(log_q) | (log_p == -torch.inf)", ("tests/test_gaps.py", FLOWS)),
    Mutant("gaps: what was left behind in a tail", "samplers/gaps.py", " & (log_p > low)", "", ("tests/test_gaps.py",)),
    Mutant("witness: the method's own look not heard", "run.py", "return [together(audit, own) for audit, own in zip(audits, looks, strict=True)]", "return audits", (FLOWS,)),
    Mutant("weights: the sign of the log-determinant", "flows/flow.py", "return x, self.base.log_prob(z.double()) - log_det.double(), z", "return x, self.base.log_prob(z.double()) + log_det.double(), z", ("tests/test_flows.py",)),
    Mutant("weights: a noisy log-determinant let in", "samplers/with_flow.py", 'if any(getattr(part, "probes", 0) for part', 'if any(False for part', (FLOWS,)),
    Mutant("bars: sd from the ESS of x", "estimates/expectation.py", "squares.stderr / (2 * root)", "root / (2 * expectation(f.z, draws).ess).sqrt()", (BARS, COURT)),
    Mutant("bars: n for n_eff in exact intervals", "estimates/assembly.py", "korn_graubard(ess, bar.df, m * n)", "torch.full_like(ess, m * n)", (BARS,)),
    Mutant("bars: replicates by z for t", "estimates/replicates.py", "t_interval(error, degrees)", "t_interval(error, 1e9 * degrees)", (REPLICATES,)),
    Mutant("log Z: replicates by z for t", "estimates/evidence.py", "t_quantile(0.975, degrees) * stderr", "1.96 * stderr", (REPLICATES, WEIGHTED)),
    Mutant("log Z: bars of replicates not held against their spread", "estimates/evidence.py", " + unlocated(bar_test(each[:, None], own, df), each.shape[1:])", "", (REPLICATES,)),
    Mutant("bars: copies of a unit counted as draws", "estimates/weighted.py", "(unit / (1 - w.unit[:, None])).square().sum(0)).sqrt()", "g.square().sum((0, 1))).sqrt()", ("tests/test_smc.py", WEIGHTED)),
    Mutant("SMC: draws of an adapted climb", "samplers/smc.py", "why = climb(cloud, own, run.must_stop, bar=bar)", 'why = None if adapt(cloud, self.cess, run.must_stop, bar) else "STOPPED_EARLY"', ("tests/test_smc.py",)),
    Mutant("AIS: paths resampled on their way", "samplers/ais.py", "run.must_stop, resample=False, bar=bar)", "run.must_stop, resample=True, bar=bar)", ("tests/test_ais.py",)),
    Mutant("exchange: swaps by the inverse ratio", "kernels/exchange.py", "torch.log(uniform) < log_r", "torch.log(uniform) < -log_r", ("tests/test_exchange.py",)),
    Mutant("witness: no distance is a conflict", "samplers/second_look.py", "if distance > CONFLICT:", "if False:", (FLOWS + "::test_against",)),
    Mutant("witness: no cold starts", "witnesses.py", "torch.cat([points, cold])", "torch.cat([points, cold[:0]])", ("tests/test_witnesses.py",)),
    Mutant("ascent: a climb begun at the top has not converged", "ascent.py", "& (slope < NOTHING)", "& (slope < 0)", ("tests/test_ascent.py",)),
    Mutant("witness: a look of any power", "witnesses.py", "own.sees <= ENOUGH_POWER", "own.sees <= 1", (FLOWS + "::test_only_a_strong_look_lifts_single_witness",)),
    Mutant("log Z: mean of logs", "estimates/evidence.py", "value = r * whole - (r - 1) * leave.mean()", "value = each.mean()", (REPLICATES, WEIGHTED)),
    Mutant("log Z: of the last replicate", "estimates/evidence.py", "value = r * whole - (r - 1) * leave.mean()", "value = each[-1]", (REPLICATES, WEIGHTED)),
    Mutant("log Z: draws of weight 0 left out of n", "estimates/evidence.py", "    m = len(each)\n    whole", "    each = each[each.isfinite()]\n    m = len(each)\n    whole", (WEIGHTED,)),
    Mutant("noised: posterior covariance without the noise", "samplers/noised.py", "V = self.s.square() * 0.5 * (gain", "V = 0.5 * (gain", (PATHS,)),
    Mutant("noised: means drawn to the wrong side", "samplers/noised.py", "y[:, None] - self.m, self.gain)", "self.m - y[:, None], self.gain)", (PATHS,)),
    Mutant("slips: widths drawn and not counted", "samplers/noised.py", "- 0.5 * square / c**2)", "- 0.5 * square)", (PATHS,)),
    Mutant("slips: widths counted and not drawn", "samplers/noised.py", "self.widths[self.which, None] * away", "away", (PATHS,)),
    Mutant("slips: each path weighed by the narrow law alone", "samplers/localized.py", "(share[:, None] - path.log_ratio).logsumexp(0)", "(share[:, None] - path.log_ratio)[0]", (PATHS,)),
    Mutant("slips: paths from the data weighed by one", "samplers/localized.py", "math.log(b) + defensive", "defensive", (PATHS,)),
    Mutant("slips: paths from the noise weighed by one", "samplers/localized.py", "math.log1p(-b) + log_q", "log_q", (PATHS,)),
    Mutant("slips: paths from the data end elsewhere", "samplers/localized.py", "return WeightedPath(trail[-1],", "return WeightedPath(1.1 * trail[-1],", (PATHS,)),
    Mutant("slips: a backward kernel that is too wide", "samplers/localized.py", "return Gaussian(a * x, c)", "return Gaussian(a * x, 1.2 * c)", (PATHS,)),
    Mutant("slips: labels stay where their component is gone", "samplers/localized.py", "keep = u[0].log() < share", "keep = u[0].log() > -1e9 * share", (PATHS,)),
    Mutant("slips: the noise of the start left out", "samplers/path_weights.py", "total = -log_q.double()\n    for k in range(K)", "total = 0 * log_q.double()\n    for k in range(K)", ("tests/test_path_weights.py", PATHS)),
    Mutant("slips: Stein's control variate added, not taken off", "samplers/unweighted.py", "each = z.mean(0) + c * g.mean(0)", "each = z.mean(0) - c * g.mean(0)", (PATHS,)),
    Mutant("rdmc: the factor 2", "samplers/unweighted.py", "2 * (growth - 1) * score", "(growth - 1) * score", ("tests/test_slips.py",)),
    Mutant("localization: the noise of a step", "samplers/unweighted.py", "(t.square() - s.square()).sqrt() * normal", "(t - s) * normal", ("tests/test_slips.py",)),
    Mutant("unweighted: nobody says that weights are missing", "samplers/unweighted.py", 'flags = [flag("PATH_WEIGHT_MISSING"), flag(', "flags = [flag(", ("tests/test_slips.py",)),
    Mutant("window: starts for copies", "samplers/window.py", "within = float(x.var(2)", "within = float(x.var(1)", ("tests/test_slips.py",)),
    Mutant("slips: what was forgotten is not told", "samplers/pool.py", "< least - SLACK", "< least - 1e9", ("tests/test_slips.py",)),
    Mutant("HEAVY_F: tails beside heavy ones taken for light", "results.py", "own.ess)) if heavy else own", "own.ess)) if False else own", ("tests/test_result.py",)),
    Mutant("far out: cones taken for tubes", "falls.py", "nu[: rays.axes] += dim - 1", "nu += dim - 1", ("tests/test_improper.py",)),
    Mutant("far out: ridges that narrow taken for tubes", "falls.py", "beside[0] - NARROWER", "beside[0] - 1e99", ("tests/test_improper.py",)),
    Mutant("far out: the lightest ray counts", "estimates/far.py", "a = by_ray.amin(0)", "a = by_ray.amax(0)", ("tests/test_far.py",)),
    Mutant("far out: sd asked as if it were a mean", "estimates/expectation.py", "f.standard(y_far).square()", "f.standard(y_far)", ("tests/test_far.py",)),
    Mutant("far out: zeros of a bounded f taken for growth", "estimates/far.py", "BEYOND = 10.0", "BEYOND = 0.0", ("tests/test_far.py",)),
    Mutant("far out: weighted draws asked as if they were draws", "estimates/weighted.py", "mean_alone=not one_weight_each(w.share)", "mean_alone=False", ("tests/test_far.py",)),
    Mutant("far out: a tail that nobody meets counts", "falls.py", "at_scale > -FAINT - BY_DIM * dim", "at_scale > -1e99", ("tests/test_improper.py",)),
    Mutant("far out: powers of z taken for powers of x", "estimates/far.py", "STEADY = 0.1", "STEADY = 9.0", ("tests/test_far.py",)),
    Mutant("far out: bent lines taken for straight ones", "falls.py", "STRAIGHT = 0.01", "STRAIGHT = 9.0", ("tests/test_improper.py",)),
    Mutant("far out: no draws are too few", "estimates/far.py", "few = ess < enough(a)", "few = ess < 0 * enough(a)", ("tests/test_far.py",)),
    Mutant("starts: all chains share one", "samplers/starts.py", "return index // SUPERCHAIN if chains >= 4 * SUPERCHAIN else index", "return 0 * index", ("tests/test_starts.py",)),
    Mutant("weighted mean about an unweighted centre", "estimates/columns.py", "return torch.softmax(draws.log_weight.detach()", "return torch.softmax(0 * draws.log_weight.detach()", (WEIGHTED,)),
    *(Mutant(*planted) for planted in PLANTED),
)


def apply(mutant: Mutant, root: Path = ROOT) -> str:
    """The mutant's file with the error in it."""
    return mutant.applied((root / mutant.path).read_text(encoding="utf-8"))


def copy_tree(to: Path) -> None:
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=skip)
        else:
            shutil.copy(ROOT / name, to / name)


def first_red(tests: Iterable[str], tree: Path) -> str | None:
    """The first of the tests that fails in a tree, or None. Raises LookupError where pytest finds nothing to run."""
    env = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}  # two edits in a second would share a .pyc
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    if done.returncode in (4, 5):  # no such test
        raise LookupError(f"pytest ran nothing of {', '.join(tests)}: {done.stdout[-300:]}{done.stderr[-300:]}")
    red = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return red[1].removeprefix("tests/") if red else f"pytest ended with {done.returncode}: {done.stdout[-300:]}{done.stderr[-300:]}"


def known_reds(*tables: Path) -> dict[str, str]:
    """The test that turned red by mutant, from tables that were printed before."""
    rows = [row.split(" | ") for table in tables if table.exists() for row in table.read_text(encoding="utf-8").splitlines() if "::" in row]
    return {row[0].removeprefix("| "): f"tests/{row[1]}" for row in rows if len(row) == 3}


def trials(mutants: Iterable[Mutant], tree: Path, known: dict[str, str]) -> Iterator[tuple[Mutant, str | None, float]]:
    """(mutant, first red test or None, seconds), each planted alone."""
    for mutant in mutants:
        sound = (tree / mutant.path).read_text(encoding="utf-8")
        began = time.monotonic()
        (tree / mutant.path).write_text(mutant.applied(sound), encoding="utf-8")
        hint = known.get(mutant.name, "")
        hinted = hint.split("::")[0] in {test.split("::")[0] for test in mutant.tests}
        try:
            red = first_red((hint,), tree) if hinted else None
        except LookupError:  # it is gone
            red = None
        red = red or first_red(mutant.tests, tree)
        (tree / mutant.path).write_text(sound, encoding="utf-8")
        yield mutant, red, time.monotonic() - began


def part(text: str) -> tuple[int, int]:
    """ "2/3" as (2, 3)."""
    try:
        i, n = (int(number) for number in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no part; wanted i/n, as in 1/2") from None
    if not 1 <= i <= n:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted 1 <= i <= n")
    return i, n


def add_command(commands: Any) -> None:
    parser = commands.add_parser("mutants", help="plant known errors and see which test turns red")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="only mutants whose name contains one of these")
    parser.add_argument("--shard", type=part, default=(1, 1), metavar="i/n", help="every n-th mutant, from the i-th on")
    parser.add_argument("--sound", action="store_true", help="take it that the tests are green without a mutant, as CI may just have said")
    parser.add_argument("--known", type=Path, nargs="+", default=[KNOWN], metavar="FILE", help=f"tables of earlier runs (default: {KNOWN.name})")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 where a mutant survived, 2 where there is nothing to judge."""
    i, n = args.shard
    chosen = [m for m in MUTANTS if any(text.lower() in m.name.lower() for text in args.only)][i - 1 :: n]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        red = first_red(sorted({t for m in chosen for t in m.tests}), tree) if chosen and not args.sound else None
        if not chosen or red:
            print(f"{red} is red without any mutant" if chosen else f"no mutant is called {' or '.join(args.only)}")
            return 2
        print("| mutant | test that went red | s |\n|---|---|---|", flush=True)
        survivors = 0
        for mutant, red, seconds in trials(chosen, tree, known_reds(*args.known)):
            survivors += red is None
            print(f"| {mutant.name} | {red or '**none: it survived**'} | {seconds:.0f} |", flush=True)
    print(f"\n{len(chosen) - survivors} of {len(chosen)} mutants turned a test red, in {time.monotonic() - began:.0f} s")
    return 1 if survivors else 0
