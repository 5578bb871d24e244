"""Verdicts and tables from the lines of any number of shards.

The lines of a case are those of its newest commit; of a replicate that stands twice the last line counts. A cell that failed its first
hearing is judged by the second, with 4R fresh replicates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.court_cases import ALL, TRIALS, UNDETECTABLE, Blind, Trial
from benchmarks.ledger import Record
from benchmarks.verdicts import HEADER, RULE, Cell, judge, row


@dataclass(frozen=True)
class Ruling:
    """A cell, and what is wrong with it: nothing where the library keeps its promise. `blind`: why nobody could have known."""

    trial: Trial
    functional: str
    cell: Cell
    faults: tuple[str, ...] = ()
    blind: Blind | None = None

    @property
    def short(self) -> str:
        """The entry of the small table: hits of the unflagged where they are worth counting, else the verdict."""
        c, verdict = self.cell, self.cell.verdict
        counted = "" if verdict in ("LOUD", "WOLF") else f"{c.hits}/{c.unflagged}"
        named = "" if verdict == "PASS" else "silent (named)" if verdict == "SILENT" and self.blind else verdict
        text = " ".join(part for part in (named, counted) if part)
        return f"**{text}: {', '.join(self.faults)}**" if self.faults else text


def rule(trial: Trial, functional: str, cell: Cell) -> Ruling:
    """What is wrong with a cell."""
    blind = next((b for b in UNDETECTABLE if b.covers(trial, functional)), None)
    if functional in trial.loud or ALL in trial.loud:
        return Ruling(trial, functional, cell, () if cell.verdict in ("LOUD", "WOLF") else ("must be flagged",), blind)
    wrong = ["silent"] if cell.verdict == "SILENT" and blind is None else []
    noisy = trial.is_quiet(functional) and cell.is_noisy
    return Ruling(trial, functional, cell, (*wrong, *(["flagged too often"] if noisy else [])), blind)


def rulings(trial: Trial, found: Iterable[Record]) -> list[Ruling]:
    """The rulings of one case, from its lines of both hearings."""
    by_f: dict[str, dict[int, list[Record]]] = {}
    for r in found:
        by_f.setdefault(r["f"], {}).setdefault(r["hearing"], []).append(r)
    decided = []
    for f, hearings in by_f.items():
        first = rule(trial, f, judge(hearings[1])) if 1 in hearings else None
        whole = len(hearings.get(2, ())) > len(hearings.get(1, ()))  # a second hearing that was cut short does not count
        again = first is None or (first.faults and whole)
        decided.append(rule(trial, f, judge(hearings[2])) if again else first)
    return [r for r in decided if r is not None]


def trial_of(r: Record) -> Trial:
    """The case that a line is of."""
    known = next((t for t in TRIALS if t.problem == r["target"]), Trial(r["target"]))
    loud = known.loud if r["witness"] else (ALL,)
    return replace(known, method=r["method"], scope=r["scope"], witness=r["witness"], loud=loud)


def by_case(lines: Iterable[Record]) -> dict[str, list[Record]]:
    """The lines of each case, of its newest commit only, each replicate once."""
    groups: dict[str, list[Record]] = {}
    for r in lines:
        groups.setdefault(r["case"], []).append(r)
    found = {}
    for name, group in groups.items():
        newest = (group[-1]["commit"], group[-1]["court_version"], group[-1].get("settings"))
        same = [r for r in group if (r["commit"], r["court_version"], r.get("settings")) == newest]
        found[name] = list({(r.get("hearing"), r["seed"], r["f"]): r for r in same}.values())
    return found


@dataclass(frozen=True)
class Court:
    """Everything that was heard."""

    rulings: tuple[Ruling, ...]
    errors: tuple[str, ...]
    controls: dict[str, list[Record]]
    commits: tuple[str, ...]

    @property
    def broken(self) -> int:
        """Promises that were broken."""
        lost = sum(not r["held"] for found in self.controls.values() for r in found)
        return sum(bool(r.faults) for r in self.rulings) + len(self.errors) + lost


def court(lines: Iterable[Record]) -> Court:
    """The court of these lines."""
    decided: list[Ruling] = []
    errors, controls, commits = [], {}, {}
    for name, found in by_case(lines).items():
        commits[found[-1]["commit"]] = None
        if "control" in found[0]:
            controls[name] = found
            continue
        errors += [f"{name}: {r['error']}" for r in found if r["status"] == "error"]
        heard = [r for r in found if r["status"] != "error"]
        decided += rulings(trial_of(found[0]), heard) if heard else []
    return Court(tuple(decided), tuple(errors), controls, tuple(commits))


def tables(c: Court, every: bool = False) -> str:
    """One small table a method, the numbers of the cells at fault (or of all), the controls, the undetectable list."""
    parts = [matrix(title, group) for title, group in _by_method(c.rulings).items()]
    parts.append(details([r for r in c.rulings if every or r.faults or r.cell.verdict == "WIDE"]))
    if c.controls:
        parts.append(control_table(c.controls))
    parts += [f"ERROR {e}" for e in c.errors]
    named = [f"- {b.problem}, {_word(b.method)} method, {_word(b.functional)} functional: {b.why}" for b in UNDETECTABLE]
    parts.append("Undetectable, by name:\n\n" + "\n".join(named))
    parts.append(f"{len(c.rulings)} cells, {c.broken} broken promises; commit {', '.join(c.commits)}")
    return "\n\n".join(part for part in parts if part)


def _word(name: str) -> str:
    return "every" if name == ALL else name


def _by_method(decided: Sequence[Ruling]) -> dict[str, list[Ruling]]:
    groups: dict[str, list[Ruling]] = {}
    for r in decided:
        groups.setdefault(f"{r.trial.method}, {r.trial.scope}", []).append(r)
    return groups


def matrix(title: str, group: Sequence[Ruling]) -> str:
    """Problems down, functionals across: hits/unflagged, or the verdict."""
    columns = list(dict.fromkeys(r.functional for r in group))
    rows: dict[str, dict[str, str]] = {}
    for r in group:
        name = r.trial.problem + ("" if r.trial.witness else ", witness=False")
        rows.setdefault(name, {})[r.functional] = r.short
    head = f"| {title} | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1)
    lines = [f"| {name} | " + " | ".join(entries.get(c, "") for c in columns) + " |" for name, entries in rows.items()]
    return "\n".join([head, *lines])


def details(group: Sequence[Ruling]) -> str:
    """All numbers of these cells."""
    if not group:
        return ""
    note = lambda r: f" **{', '.join(r.faults)}**" if r.faults else ""  # noqa: E731
    return "\n".join([HEADER, RULE, *(row(r.trial.name, r.functional, r.cell, note(r)) for r in group)])


def control_table(controls: dict[str, list[Record]]) -> str:
    """What each control was answered."""
    lines = ["| control | runs | said its word | status | flags or errors, in how many runs |", "|---|---|---|---|---|"]
    for name, found in controls.items():
        held = sum(r["held"] for r in found)
        statuses = ", ".join(f"{s} {n}" for s, n in _counted(r["status"] for r in found))
        flags = ", ".join(f"{s} {n}" for s, n in _counted(f for r in found for f in r["flags"])[:5])
        share = str(held) if held == len(found) else f"**{held}**"
        lines.append(f"| {name.removeprefix('control ')} | {len(found)} | {share} | {statuses} | {flags} |")
    return "\n".join(lines)


def _counted(words: Iterable[str]) -> list[tuple[str, int]]:
    every = list(words)
    return sorted(((w, every.count(w)) for w in set(every)), key=lambda pair: (-pair[1], pair[0]))
