"""The coverage court: do 95% intervals hold the truth in 95 of 100 runs, and does the library say so where they do not?

Every problem is run R times by every method, independently and *deliberately small*, through the public API alone. Every replicate answers
the same questions; each answer is one line of JSON (append-only), each (problem, method, functional) one cell. A cell that fails is heard
once more with 4R fresh replicates, and that counts. Exit code 1: an interval was silently wrong outside the list of what nobody can
detect, an easy problem was flagged too often, a functional without an error bar was not flagged, or a negative control got a confident
answer.

    python -m benchmarks court                                              # untrained methods, R = 100
    python -m benchmarks court --shard 1/2 --out one.jsonl                  # half of it; the same line goes on where a kill stopped it
    python -m benchmarks court --table one.jsonl two.jsonl                  # the table of both halves; nothing is run
    python -m benchmarks court --method flow-is                             # 10 trainings, 10 runs of each: given the trained proposal
    python -m benchmarks court --method flow-is --end-to-end --replicates 20    # 20 whole runs on three problems
    python -m benchmarks court --method mcmc auto --controls                # the negative controls alone
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.court_cases import COSTS, END_TO_END, GIVEN, TRIALS, UNTRAINED, Trial, cases, costs, measured_costs, shard, trains
from benchmarks.court_controls import REPEATS, hearings, outcomes
from benchmarks.court_runs import Adjourned, Docket, append, here, read
from benchmarks.court_table import Ruling, court, rulings, tables
from benchmarks.ledger import Interrupted, Record
from benchmarks.mutants import part
from boltzsample.registry import METHODS

AGAIN = 4


def hear(trial: Trial, replicates: int, seed: int, docket: Docket, say: Any = None) -> tuple[list[Ruling], list[Record]]:
    """The rulings of a case and its lines; where a cell fails, the case is heard again, once, with 4R fresh replicates."""
    found: list[Record] = []
    for hearing, count in ((1, replicates), (2, AGAIN * replicates)):
        for batch in docket.hear(trial, count, seed, hearing):
            found += batch
            if say:
                say(trial, sum(r["hearing"] == hearing for r in found), hearing)
        decided = rulings(trial, [r for r in found if r["status"] != "error"])
        if not any(r.faults for r in decided):
            break
    return decided, found


def say_progress(began: float, number: int, of: int, trial: Trial, text: str) -> None:
    """One line on stderr: which case of how many, how long it has taken."""
    elapsed = time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - began))
    print(f"[{number}/{of} {elapsed}] {trial.name}: {text}", file=sys.stderr, flush=True)


def told(decided: Sequence[Ruling]) -> str:
    """The verdicts of a case in a line."""
    words = [r.cell.verdict for r in decided]
    counts = ", ".join(f"{word} {words.count(word)}" for word in dict.fromkeys(words))
    return counts + "".join(f"; {r.functional} {', '.join(r.faults)}" for r in decided if r.faults)


def chosen(args: argparse.Namespace) -> list[Trial]:
    """The cases of a command, before they are shared out."""
    scopes = (END_TO_END,) if args.end_to_end else (UNTRAINED, GIVEN)
    names = args.method or [m for m in (*METHODS, "importance") if not trains(m) or args.trained or args.end_to_end]
    own = {k: v for k in ("chains", "n", "warmup", "thin") if (v := getattr(args, k)) is not None}
    return [replace(t, **own) for t in cases(names, args.problem, scopes)]


def run(args: argparse.Namespace) -> int:
    """Hear the cases that the file lacks, then print the tables; 1 where a promise is broken."""
    if args.costs:
        COSTS.write_text(json.dumps({**costs(), **measured_costs(read(args.costs))}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    if args.table:
        found = court(read(args.table))
        print(tables(found, args.all))
        return int(found.broken > 0)
    torch.set_num_threads(1)
    began = time.monotonic()
    try:
        heard = court(sitting(args, Docket(args.out, args.seconds), began))
    except Adjourned:
        print(f"adjourned after {time.monotonic() - began:.0f} s; the same line goes on from here", file=sys.stderr)
        return 75
    except Interrupted:
        print("interrupted: that batch is not kept, the others are; the same line goes on from here", file=sys.stderr)
        return 130
    print(tables(heard, args.all))
    print(f"\n{time.monotonic() - began:.0f} s")
    return int(heard.broken > 0)


def sitting(args: argparse.Namespace, docket: Docket, began: float) -> list[Record]:
    """The lines of all cases asked for, and of the controls. Raises Adjourned."""
    lines: list[Record] = []
    mine = [] if args.controls else shard(chosen(args), *args.shard)
    for number, trial in enumerate(mine, 1):
        say_progress(began, number, len(mine), trial, f"about {trial.cost * args.replicates:.0f} s")
        decided, found = hear(trial, args.replicates, args.seed, docket)
        say_progress(began, number, len(mine), trial, told(decided))
        lines += found
    return lines + controls(args, docket)


def controls(args: argparse.Namespace, docket: Docket) -> list[Record]:
    """The negative controls: with the first shard, for the methods asked."""
    if args.shard[0] > 1 or args.problem or args.end_to_end:
        return []
    names = args.method or [m for m in (*METHODS, "importance") if not trains(m) or args.trained]
    found = []
    for h in hearings(names):
        kept = [{**here(), **r} for r in outcomes(h, REPEATS, args.seed)]
        append(docket.path, kept)
        found += kept
    return found


def add_command(commands: Any) -> None:
    about = "do the error bars hold? R small runs of every problem by every method, against the truth"
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("court", help=about, description=__doc__, formatter_class=plain)
    parser.add_argument("--replicates", type=int, default=100, metavar="R", help="independent runs of each case (default %(default)s)")
    parser.add_argument("--shard", type=part, default=(1, 1), metavar="i/n", help="the i-th of n parts of equal cost")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the lines there, and run only what it lacks")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print the tables of these files; run nothing")
    parser.add_argument("--all", action="store_true", help="print the numbers of every cell, not only of those that did not pass")
    parser.add_argument("--problem", nargs="+", choices=[t.problem for t in TRIALS], metavar="NAME", help="only these")
    parser.add_argument(
        "--method", nargs="+", choices=[*METHODS, "importance"], metavar="NAME", help="only these (default: untrained ones)"
    )
    parser.add_argument("--trained", action="store_true", help="the methods that train, too: given the trained proposal")
    parser.add_argument(
        "--end-to-end", action="store_true", help="whole runs of the methods that train, on three problems; use --replicates 20"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no batch after so many; exit code 75 where some are left")
    for name in ("chains", "n", "warmup", "thin"):
        parser.add_argument(f"--{name}", type=int, help="instead of the case's own")
    parser.add_argument("--controls", action="store_true", help="only the negative controls")
    parser.add_argument("--costs", type=Path, nargs="+", metavar="FILE", help=f"bring {COSTS.name} up to date from these lines")
    parser.set_defaults(run=run)
