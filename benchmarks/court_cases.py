"""The cases of the court: problems, methods with the settings of deliberately small runs, and what is known to be undetectable.

A case is a problem by a method. The methods are those of the registry, and `importance` with a proposal given; a method that is new
there appears here by itself, with its default settings, until SMALL says how to make its runs small.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import boltzsample as bz
from benchmarks.court_targets import IN_BLOCKS, InBlocks, proposal
from benchmarks.ledger import Record
from boltzsample.registry import METHODS, method
from boltzsample.samplers.importance import Importance
from boltzsample.samplers.sampler import Sampler
from boltzsample.scores.training import ScoreTraining
from targets import problem

ALL = "*"
GIVEN, END_TO_END, UNTRAINED = "given the trained proposal", "end to end", "untrained"
BATCH = 50  # replicates in one call of bz.sample: these share a wide source and the number of leapfrogs
PER_TRAINING = 10  # replicates of each trained flow
COSTS = Path(__file__).parent / "court_costs.json"  # seconds a replicate, measured; `court --costs FILE...` writes it
UNKNOWN_COST = 0.5
ASKING = 0.1  # seconds that the questions of a replicate take, beside its run


@dataclass(frozen=True)
class Trial:
    """How a problem is run. `easy`: it may not be flagged, except for the functionals in `heavy`, whose bars are hard to know.
    `loud`: functionals that must be flagged, for they have no error bar ("*": every one)."""

    problem: str
    n: int = 3_200
    chains: int = 32
    warmup: int = 100
    thin: int = 1
    easy: bool = False
    heavy: tuple[str, ...] = ()
    loud: tuple[str, ...] = ()
    starts: Any = None
    witness: bool = True
    method: str = "mcmc"
    scope: str = UNTRAINED

    @property
    def sampler(self) -> Sampler:
        make = SMALL.get(self.method)
        return make(self) if make else method(self.method).make()

    @property
    def target(self) -> bz.Target:
        target = problem(self.problem).target
        return InBlocks(target) if self.problem in IN_BLOCKS else target

    @property
    def is_trained(self) -> bool:
        return self.scope != UNTRAINED

    @property
    def per_call(self) -> int:
        """Replicates of one call of bz.sample."""
        return {UNTRAINED: BATCH, GIVEN: PER_TRAINING, END_TO_END: 1}[self.scope]

    def is_quiet(self, functional: str) -> bool:
        """Whether flags of a functional are counted as faults. Not where a flow with Gaussian tails is asked for heavy ones, nor those of a
        method that says itself that it is approximate, nor where weights are honestly uneven in so small a run."""
        if (self.method in METHODS and METHODS[self.method].promise == "approximate") or (self.method, self.problem) in UNEVEN:
            return False
        if functional != "log Z" and (self.method, self.problem) in UNEVEN_MEANS:
            return False
        return self.easy and functional not in self.heavy and not (self.is_trained and self.heavy)

    @property
    def name(self) -> str:
        notes = [*([] if self.scope != END_TO_END else [END_TO_END]), *([] if self.witness else ["no witness"])]
        return f"{self.problem} / {self.method}" + (f" ({', '.join(notes)})" if notes else "")

    @property
    def settings(self) -> str:
        return f"{self.method} chains={self.chains} warmup={self.warmup} n={self.n} thin={self.thin}"

    @property
    def cost(self) -> float:
        """Seconds a replicate, as measured once."""
        return float(costs().get(self.name, UNKNOWN_COST))


REGRESSIONS = ("cancer", "german-credit")

# Without resampling a path is worth .04 draws on a regression of 31 weights, by its default ladder; a fitted mixture's draw is worth .6
# there, but one in a thousand, from its wide part, weighs a hundred means and carries a twentieth of a mean's bar, and so does a path of
# slips, which starts from such a mixture: CONCENTRATION is true. auto takes chains instead.
UNEVEN = {("ais", "student-t5-d10"), ("ais", "cancer"), ("ais", "german-credit")}
UNEVEN_MEANS = {(name, regression) for name in ("mixture-is", "slips") for regression in REGRESSIONS}
HEAVY_T = ("E x_0^2", "E x_1^2", "E x.x", "E x_0 x_1", "sd x_0")  # x^2 of a t_5 has no third moment

TRIALS: tuple[Trial, ...] = (
    Trial("gaussian-corr-d10", easy=True),
    Trial("gaussian-ill-d100"),
    Trial("student-t5-d10", n=6_400, warmup=200, thin=4, easy=True, heavy=HEAVY_T),
    Trial("two-modes-near", n=6_400, easy=True),
    Trial("two-modes-far"),
    Trial("gmm40-fab"),
    Trial("unequal-widths"),
    Trial("narrow-spike"),
    Trial("funnel-sd3", n=1_600, loud=("E x_1^2",)),
    Trial("banana"),
    Trial("many-well-d6"),
    Trial("many-well-d32"),
    Trial("rings-slips"),
    Trial("truncated-gaussian"),
    Trial("phi4-d32-b0.025"),
    Trial("cancer", n=6_400, easy=True),
    Trial("german-credit", n=6_400, easy=True),
)
WITNESSLESS = ("two-modes-far",)  # asked again with witness=False: everything must be flagged
ENDS = ("gaussian-corr-d10", "two-modes-far", "cancer")  # where whole runs of methods that train are repeated


@dataclass(frozen=True)
class Blind:
    """A cell that may be silently wrong, because nobody could know: "*" stands for every method or functional."""

    problem: str
    method: str
    functional: str
    why: str

    def covers(self, trial: Trial, functional: str) -> bool:
        return all(
            mine in (ALL, its) for mine, its in ((self.problem, trial.problem), (self.method, trial.method), (self.functional, functional))
        )


UNDETECTABLE: tuple[Blind, ...] = (
    Blind("narrow-spike", ALL, ALL, "half of the mass in a millionth of the volume: without a start in it (modes=) nobody can know of it"),
    Blind(
        "unequal-widths",
        ALL,
        ALL,
        "a mode of width .01 whose basin (radius .1) holds 4e-5 of the wide source: 256 climbs meet it in one run of a hundred, and a "
        "proposal of 30,000 draws may not hit it; give it by modes=",
    ),
)


# ---- small runs ----

def _chains(t: Trial) -> bz.MCMC:
    return bz.MCMC(chains=t.chains, warmup=t.warmup, thin=t.thin)


def _with(name: str, **settings: Any) -> Sampler:
    """A method of the registry with other settings."""
    sampler: Any = method(name).make()
    return cast(Sampler, replace(sampler, **settings))


SMALL: dict[str, Callable[[Trial], Sampler]] = {
    "mcmc": _chains,
    "latent-mcmc": lambda t: bz.LatentMCMC(mcmc=_chains(t)),
    "importance": lambda t: Importance(proposal(t.problem)),
    "smc": lambda t: _with("smc", particles=64, moves=3 if t.heavy else 1),  # of the first pass: the second has as many as n asks for
    "ais": lambda t: _with("ais", ensembles=8, particles=32, cess=0.9994 if t.easy and (t.method, t.problem) not in UNEVEN else 0.99),
    "tempering": lambda t: _with("tempering", ladders=32 if t.heavy else 16, warmup=t.warmup),  # 16 have 100 effective draws of log Z there
    "slips": lambda t: bz.SLIPS(levels=3, inner=bz.Inner(2, 1)),
    "rdmc": lambda t: bz.RDMC(levels=6, inner=bz.Inner(2, 1), start=1),
    # of two rounds, ten trainings on cancer had weights of 4 to 13 means, and one mean was flagged in 8 of 100 runs
    "diffusion": lambda t: bz.Diffusion(steps=32, training=ScoreTraining(steps=300, rounds=3 if t.problem in REGRESSIONS else 2)),
}
DRAWS = {"importance": 10}  # times the trial's n: draws of a proposal cost little
MOST = {"smc": 2_400, "ais": 3_200, "tempering": 3_200, "slips": 6_400, "rdmc": 400}  # these cost much
NO_PROPOSAL = frozenset({"gaussian-ill-d100", "many-well-d32"})  # a t is no proposal there


# ---- cases and shards ----


FITS_ONE_BY_ONE = frozenset({"auto", "mixture-is", "rdmc"})  # they learn from no draws of others, but fit each replicate on its own


def trains(name: str) -> bool:
    """Whether a method trains a proposal: then many runs are made of each."""
    return name != "importance" and (name in FITS_ONE_BY_ONE or method(name).make.learns)


def cases(
    names: Iterable[str] | None = None, problems: Iterable[str] | None = None, scopes: Sequence[str] = (UNTRAINED, GIVEN)
) -> list[Trial]:
    """Every problem by every method, the witnessless ones after them; of `names`, `problems` and `scopes` only."""
    found: list[Trial] = []
    for name in names or [*METHODS, "importance"]:
        for trial in TRIALS:
            found += [t for t in variants(replace(trial, method=name)) if t.scope in scopes]
    return [t for t in found if problems is None or t.problem in problems]


def variants(t: Trial) -> list[Trial]:
    """The cases of a problem and a method."""
    if t.method == "importance" and (t.problem in NO_PROPOSAL or problem(t.problem).exact_sampler is None):
        return []
    own = replace(t, scope=GIVEN if trains(t.method) else UNTRAINED)
    own = replace(own, n=min(DRAWS.get(t.method, 1) * own.n, MOST.get(t.method, 10**9)))
    found = [own]
    if t.problem in WITNESSLESS:
        found.append(replace(own, witness=False, loud=(ALL,)))
    if trains(t.method) and t.problem in ENDS:
        found.append(replace(t, scope=END_TO_END))
    return found


def shard(found: Sequence[Trial], which: int, of: int) -> list[Trial]:
    """The which-th (from 1) of `of` parts of equal cost: the dearest case first, each to the part that has least to do."""
    loads, parts = [0.0] * of, [[] for _ in range(of)]  # type: list[float], list[list[Trial]]
    for trial in sorted(found, key=lambda t: (-t.cost, t.name)):
        least = loads.index(min(loads))
        loads[least] += trial.cost
        parts[least].append(trial)
    return [t for t in found if t in parts[which - 1]]


@cache
def costs() -> dict[str, float]:
    found: dict[str, float] = json.loads(COSTS.read_text(encoding="utf-8")) if COSTS.exists() else {}
    return found


def measured_costs(records: Iterable[Record]) -> dict[str, float]:
    """Seconds a replicate of each case, from the lines of any run."""
    runs: dict[str, dict[str, float]] = {}
    for r in (r for r in records if "seconds" in r):
        runs.setdefault(r["case"], {})[r["seed"]] = r["seconds"]
    return {name: round(ASKING + sum(s.values()) / len(s), 3) for name, s in sorted(runs.items())}
