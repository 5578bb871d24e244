"""Verdicts of the coverage court (TRUST.md, section 3): pure functions of records, one record a replicate and functional.

A cell is one problem, method and functional over R independent replicates. Flagged = status is not ok. Among the unflagged,
a hit is an interval that holds the truth, widened by the truth's own error; coverage is judged by Clopper & Pearson (1934).

    LOUD        flagged in 95% or more             WOLF   the same, though 85% of all were flagged and right within 2 errors
    SILENT      unflagged coverage below .92 (upper end of its 95% interval), or |z| > 5 unflagged in more than 1% (lower end)
    NOEVIDENCE  fewer than 20 unflagged            WIDE   bars twice as long as the errors          PASS   the rest

Error rates: a right bar (.95) fails at R = 100 with probability 1.4e-4, at R = 200 (175 hits or fewer) with 2.6e-5; one that covers
.80 is found with power .92 and .998, one that covers .85 with .54 and .86. A failing cell is re-run once at 4R before it counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

Record = dict[str, Any]  # est, se, lo, hi, truth, truth_se, status, flags and where they come from (court.py)

COVERS = 0.92
SILENT5 = 0.01
QUIET = 0.02
FEW = 20


@dataclass(frozen=True)
class Cell:
    """What R replicates of one cell say."""

    replicates: int
    unflagged: int
    hits: int  # among the unflagged
    silent5: int  # unflagged with |z| > 5
    false_alarms: int  # flagged with |z| < 2
    mean_z: float  # mean |z|: .80 when right
    rms_z: float
    ratio: float  # sqrt(mean se^2 / mean error^2)
    codes: tuple[tuple[str, int], ...] = ()  # flags of severity above info, and in how many replicates

    @property
    def flagged_share(self) -> float:
        return 1 - self.unflagged / self.replicates

    @property
    def coverage(self) -> tuple[float, float]:
        """The 95% interval of the coverage given not flagged."""
        return clopper_pearson(self.hits, self.unflagged)

    @property
    def is_noisy(self) -> bool:
        """Whether more than 2% are flagged, beyond chance: on an easy problem a fault (first at 9 of 200)."""
        return clopper_pearson(self.replicates - self.unflagged, self.replicates)[0] > QUIET

    @property
    def verdict(self) -> str:
        if self.flagged_share >= 0.95:
            return "WOLF" if self.false_alarms >= 0.85 * self.replicates else "LOUD"
        if self.coverage[1] < COVERS or clopper_pearson(self.silent5, self.replicates)[0] > SILENT5:
            return "SILENT"
        if self.unflagged < FEW:
            return "NOEVIDENCE"
        return "WIDE" if self.ratio > 2 else "PASS"


def clopper_pearson(hits: int, n: int) -> tuple[float, float]:
    """The 95% interval of a probability from hits in n trials."""
    low = float(stats.beta.ppf(0.025, hits, n - hits + 1)) if hits else 0.0
    return low, float(stats.beta.ppf(0.975, hits + 1, n - hits)) if hits < n else 1.0


def z_score(r: Record) -> float:
    """(est - truth) / sqrt(se^2 + truth_se^2); infinite where an answer has no finite bar."""
    error = math.hypot(r["se"], r["truth_se"])
    return (r["est"] - r["truth"]) / error if math.isfinite(error) and error > 0 and math.isfinite(r["est"]) else math.inf


def is_hit(r: Record) -> bool:
    """Whether the interval, each side widened by 1.96 errors of the truth in quadrature, holds the truth. NaN never does."""
    slack = 1.96 * r["truth_se"]
    low = r["est"] - math.hypot(r["est"] - r["lo"], slack)
    high = r["est"] + math.hypot(r["hi"] - r["est"], slack)
    return bool(low <= r["truth"] <= high) and bool(r["se"] > 0)


def judge(records: Sequence[Record]) -> Cell:
    """The cell of these records. An answer without a flag and without a finite bar is a miss."""
    z = [z_score(r) for r in records]
    ok = [r["status"] == "ok" for r in records]
    finite = [(r, v) for r, v in zip(records, z, strict=True) if math.isfinite(v)]
    codes = [code for r in records for code in set(r["flags"])]
    counts = sorted(((c, codes.count(c)) for c in set(codes)), key=lambda pair: -pair[1])
    return Cell(
        len(records),
        sum(ok),
        sum(fine and is_hit(r) for r, fine in zip(records, ok, strict=True)),
        sum(fine and abs(v) > 5 for v, fine in zip(z, ok, strict=True)),
        sum(not fine and abs(v) < 2 for v, fine in zip(z, ok, strict=True)),
        _mean([abs(v) for _, v in finite]),
        _mean([v * v for _, v in finite]) ** 0.5,
        _ratio([r for r, _ in finite]),
        tuple(counts),
    )


def _ratio(records: Sequence[Record]) -> float:
    squares = _mean([(r["est"] - r["truth"]) ** 2 for r in records])
    return (_mean([r["se"] ** 2 + r["truth_se"] ** 2 for r in records]) / squares) ** 0.5 if squares > 0 else math.nan


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


HEADER = "| problem | functional | hits / unflagged | coverage 95% | mean z | rms z | se/rmse | flagged | silent5 | verdict | flags |"
RULE = "|" + "---|" * HEADER.count(" |")


def row(problem: str, functional: str, cell: Cell, note: str = "") -> str:
    """One line of the Markdown table."""
    low, high = cell.coverage
    codes = ", ".join(f"{code} {n}" for code, n in cell.codes[:4])
    numbers = f"{cell.hits}/{cell.unflagged} | [{low:.3f}, {high:.3f}] | {cell.mean_z:.2f} | {cell.rms_z:.2f} | {cell.ratio:.2f}"
    share = f"{cell.flagged_share:.3f} | {cell.silent5}/{cell.replicates}"
    return f"| {problem} | {functional} | {numbers} | {share} | {cell.verdict}{note} | {codes} |"
