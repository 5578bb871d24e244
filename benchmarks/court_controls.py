"""Negative controls: densities on which no method may print a confident number, each with the word it has to say.

A control is asked REPEATS times with each method; it holds where every run says its word, or refuses with an error. What an error may be
is named too. Two more: the narrow spike given by `modes=` is right or says WITNESS_CONFLICT, and a flow fallen into one of two far modes
raises WITNESS_CONFLICT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import boltzsample as bz
from benchmarks.collapse import collapsed, fell
from benchmarks.court_cases import SMALL, Trial
from benchmarks.ledger import Record
from targets import Problem, problem
from targets.controls import control, infinite_variance_pair

REPEATS = 10


@dataclass(frozen=True)
class Control:
    """`run(method, seed)` is asked `numbers`, none of which may be ok; one of `codes` must be among the flags (or be the error's name).
    `untrusted`: caution is not enough. `methods`: the only ones it is for."""

    name: str
    wrong: str
    run: Callable[[str, int], bz.Result]
    codes: frozenset[str]
    numbers: tuple[Callable[[bz.Result], bz.Estimate], ...] = ()
    untrusted: bool = True
    methods: tuple[str, ...] = ()
    right: Callable[[bz.Result], bool] = lambda r: False  # being right excuses the missing word

    def outcome(self, method: str, seed: int) -> Record:
        """What one run said, and whether that was the word wanted."""
        try:
            result = self.run(method, seed)
        except Exception as error:
            name = type(error).__name__
            return {"status": "error", "flags": [name], "held": name in self.codes, "said": str(error)[:200]}
        flags = sorted({f.code for f in result.flags if f.severity != "info"})
        loud = all(ask(result).status != "ok" for ask in self.numbers)
        enough = result.status == "untrusted" if self.untrusted else result.status != "ok"
        held = (enough and loud and bool(self.codes & set(flags))) or self.right(result)
        return {"status": str(result.status), "flags": flags, "held": held, "said": str(result.expectation(_x0))}


def _x0(x: Tensor) -> Tensor:
    return x[..., 0]


def _mean(r: bz.Result) -> bz.Estimate:
    return r.expectation(_x0)


def _log_z(r: bz.Result) -> bz.Estimate:
    return r.log_z()


def _small(name: str) -> Any:
    trial = Trial("", method=name)
    return SMALL[name](trial) if name in SMALL else name


def _on(name: str) -> Callable[[str, int], bz.Result]:
    return lambda method, seed: bz.sample(control(name).target, _small(method), 3_200, seed=seed, progress=False)


@dataclass(frozen=True, eq=False)
class _Exact:
    """A problem's exact draws as a proposal."""

    of: Problem

    def sample(self, n: int) -> Tensor:
        seed = int(torch.randint(2**62, ()))
        assert self.of.exact_sampler is not None
        return self.of.exact_sampler(n, torch.Generator().manual_seed(seed))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.of.target.log_prob(x)


def _too_narrow(method: str, seed: int) -> bz.Result:
    target, narrow = infinite_variance_pair()
    return bz.importance(target.target, _Exact(narrow), 4_000, seed=seed, progress=False)


def _spike(method: str, seed: int) -> bz.Result:
    p = problem("narrow-spike")
    modes = p.truth["mode_weights"].at
    return bz.sample(p.target, _small(method), 3_200, seed=seed, modes=modes, progress=False)


def _spike_is_right(result: bz.Result) -> bool:
    weight = problem("narrow-spike").truth["mode_weights"]
    e = result.probability(lambda x: weight.f(x)[..., 0] > 0)
    return math.isfinite(float(e.stderr)) and abs(float(e.value) - float(weight.value[0])) < 4 * float(e.stderr)


TAIL = frozenset({"HEAVY_F", "ESS_LOW", "KHAT_F", "KHAT_W", "CONCENTRATION"})
CONTROLS: tuple[Control, ...] = (
    Control("flat", "improper, no gradient anywhere", _on("flat"), frozenset({"IMPROPER_SUSPECTED"}), (_mean, _log_z)),
    Control("reciprocal", "improper at 0 and at infinity", _on("reciprocal"), frozenset({"ImproperSuspected"}), (_mean, _log_z)),
    Control("cauchy", "no mean", _on("cauchy"), TAIL, (_mean,), untrusted=False),
    Control("nan-region", "NaN on 6.7% of the mass", _on("nan-region"), frozenset({"NAN_EVAL"}), (_mean, _log_z)),
    Control(
        "infinite-variance weights",
        "E w^2 does not exist",
        _too_narrow,
        frozenset({"KHAT_W", "KHAT_F", "CONCENTRATION"}),
        (_mean, _log_z),
        untrusted=False,
        methods=("importance",),
    ),
    Control("spike by modes=", "half the mass in a given spike", _spike, frozenset({"WITNESS_CONFLICT"}), right=_spike_is_right),
    Control(
        "collapsed flow",
        "one of two far modes is lost, the weights are perfect",
        lambda method, seed: collapsed(seed),
        frozenset({"WITNESS_CONFLICT"}),
        methods=("flow-is",),
        right=lambda r: not fell(r),  # then it did not collapse, and is no case of this
    ),
)


@dataclass(frozen=True)
class Hearing:
    """A control with a method."""

    control: Control
    method: str

    @property
    def name(self) -> str:
        return f"control {self.control.name} / {self.method}"


def hearings(names: Iterable[str]) -> list[Hearing]:
    """Every control by every method of these names that it is for."""
    wanted = list(names)
    return [Hearing(c, m) for c in CONTROLS for m in wanted if (m in c.methods if c.methods else m != "importance")]


def outcomes(hearing: Hearing, repeats: int, seed: int) -> Iterator[Record]:
    """One line a run."""
    for r in range(repeats):
        own = 1_000 * seed + r
        yield {
            "case": hearing.name,
            "control": hearing.control.name,
            "method": hearing.method,
            "f": "*",
            "seed": f"{own}/0",
            **hearing.control.outcome(hearing.method, own),
        }
