"""The runs of the court, through the public API alone, and their lines: one of JSON for each replicate and functional.

Lines are appended a batch at a time, so a killed shard loses one batch. What a file holds already (same case, settings, hearing and seed,
same commit and version of the court) is read, not run again.
"""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import boltzsample as bz
from benchmarks import ledger
from benchmarks.court_cases import END_TO_END, Trial
from benchmarks.court_questions import Question, questions
from benchmarks.ledger import Record
from targets import problem

VERSION = 2
SECOND = 500_000  # seeds of the second hearing


def batches(trial: Trial, replicates: int, seed: int) -> list[tuple[int, int]]:
    """(seed, replicates) of each call of bz.sample."""
    per = trial.per_call
    return [(1_000 * seed + i, min(per, replicates - done)) for i, done in enumerate(range(0, replicates, per))]


def results(trial: Trial, own: int, size: int) -> tuple[bz.Result, ...]:
    """Independent runs made in one call; of a method that trains, runs of one trained proposal, or the whole run with its training.

    Raises ledger.Interrupted where one of them was cut short, which is no evidence of anything.
    """
    target, sampler = trial.target, trial.sampler
    settings: dict[str, Any] = {"seed": own, "starts": trial.starts, "progress": False}
    if trial.is_trained and trial.scope != END_TO_END:
        sampler = ledger.whole(bz.sample(target, sampler, n=trial.chains, witness=False, **settings)).sampler
        settings["fit"] = False
    whole = ledger.whole(bz.sample(target, sampler, n=trial.n, replicates=size, witness=trial.witness, **settings))
    return whole.replicates or (whole,)


def records(trial: Trial, own: int, size: int) -> list[Record]:
    """One record a replicate and functional; one that holds the error, where a run raised one."""
    asked = questions(problem(trial.problem), trial.sampler.log_z)
    try:
        found = results(trial, own, size)
    except Exception as error:
        traceback.print_exc()
        return [{**_of(trial), "f": "*", "seed": f"{own}/*", "status": "error", "error": f"{type(error).__name__}: {error}"[:500]}]
    return [
        {**_of(trial), **facts(q, q.ask(result)), **_run(result), "seed": f"{own}/{r}"}
        for r, result in enumerate(found)
        for q in asked
    ]


def _of(trial: Trial) -> Record:
    return {
        "case": trial.name,
        "target": trial.problem,
        "method": trial.method,
        "settings": trial.settings,
        "scope": trial.scope,
        "witness": trial.witness,
    }


def _run(result: bz.Result) -> Record:
    """What a run cost, and the largest of its weights over their mean: it tells a proposal that is too thin from a heavy functional."""
    w = result.draws.log_weight
    heaviest = None if w is None else round(float((w.max() - w.logsumexp(tuple(range(w.ndim))) + math.log(w.numel())).exp()), 3)
    return {"n_logp": result.evaluations, "seconds": round(result.seconds, 4), "heaviest": heaviest}


def facts(q: Question, e: bz.Estimate) -> Record:
    """A question, its truth, and an answer to it."""
    numbers = {"est": e.value, "se": e.stderr, "df": e.df, "lo": e.interval[0], "hi": e.interval[1]}
    return {
        "f": q.name,
        **{name: float(v) for name, v in numbers.items()},
        "truth": q.truth,
        "truth_se": q.truth_se,
        "flags": [f.code for f in e.flags if f.severity != "info"],
        "values": {f.code: f.value for f in e.flags if f.severity != "info" and f.value is not None},
        "status": str(e.status),
    }


@cache
def here() -> Record:
    """With what the lines of this process are made."""
    now = ledger.here()
    return {"court_version": VERSION, "commit": now["commit"], "versions": now["versions"]}


NUMBERS = ("est", "se", "df", "lo", "hi", "truth", "truth_se")


class Adjourned(Exception):
    """The time is up; the file has what was heard until then."""


class Docket:
    """The lines of a court: kept in memory, and in a file where one is given. No batch is begun after `seconds`."""

    def __init__(self, path: Path | None = None, seconds: float = math.inf) -> None:
        self.path, self.until = path, time.monotonic() + seconds
        self.known: dict[tuple[Any, ...], list[Record]] = {}
        for r in read([path] if path else []):
            if r.get("court_version") == VERSION and r.get("commit") == here()["commit"] and r["status"] != "error":
                self.known.setdefault(_key(r), []).append(r)

    def hear(self, trial: Trial, replicates: int, seed: int, hearing: int) -> Iterator[list[Record]]:
        """The records of each batch of a case, run where the file lacks them. Raises Adjourned."""
        for own, size in batches(trial, replicates, seed + (hearing > 1) * SECOND):
            key = (trial.name, trial.settings, hearing, own)
            kept = self.known.get(key, [])
            if not _whole(kept, size):
                if time.monotonic() > self.until:
                    raise Adjourned
                kept = [{**here(), **r, "hearing": hearing} for r in records(trial, own, size)]
                append(self.path, kept)
                self.known[key] = kept
            yield kept


def _whole(kept: Sequence[Record], size: int) -> bool:
    """Whether a batch lost none of its lines: as many functionals in each replicate."""
    per = Counter(seed for seed, _ in {(r["seed"], r["f"]) for r in kept})
    return len(per) == size and len(set(per.values())) == 1


def _key(r: Record) -> tuple[Any, ...]:
    return (r["case"], r["settings"], r["hearing"], int(r["seed"].split("/")[0]))


def append(path: Path | None, lines: Sequence[Record]) -> None:
    """Write the lines of a batch, all at once, and return when they are on disk."""
    if path is None:
        return
    text = "".join(json.dumps(ledger.plain(r), allow_nan=False) + "\n" for r in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() and not ledger._ends_a_line(file):
            text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read(paths: Iterable[Path]) -> list[Record]:
    """The lines of the files, numbers as numbers; what a kill left half-written is passed over."""
    found = [r for path in paths for r in ledger.read(path)[0]]
    return [r | {name: float(r[name]) for name in NUMBERS if name in r} for r in found]
