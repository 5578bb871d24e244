"""The Markdown table of the suite: one row a problem, method and settings; medians over seeds.

The column "worst ok" is a maximum, not a median: one estimate that was wrong without a flag is one too many.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.ledger import Record, key, number

GROUP = ("problem", "method", "n", "budget", "dtype", "suite")


def table(records: Sequence[Record]) -> str:
    """The table; a sentence where there are no records."""
    if not records:
        return "no runs yet"
    columns = COLUMNS | ({"errors": _errors} if any(r["error"] for r in records) else {})
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    groups: dict[Any, list[Record]] = {}
    for r in records:
        groups.setdefault(key(r, GROUP), []).append(r)
    ordered = sorted(groups.values(), key=lambda found: (found[0]["problem"], found[0]["method"], found[0]["n"]))
    return "\n".join([*lines, *("| " + " | ".join(cell(found) for cell in columns.values()) + " |" for found in ordered)])


def scores(found: Sequence[Record], name: str) -> list[float]:
    """The score of every run that has it."""
    values = (number(r["scores"].get(name)) for r in found)
    return [v for v in values if v is not None]


def _median(name: str, form: str = "{:.2f}") -> Callable[[Sequence[Record]], str]:
    return lambda found: form.format(statistics.median(values)) if (values := scores(found, name)) else ""


def _worst(name: str) -> Callable[[Sequence[Record]], str]:
    return lambda found: f"{max(values):.2f}" if (values := scores(found, name)) else ""


def _worst_z(found: Sequence[Record]) -> str:
    """The median, and how many of the card's numbers were left without an answer."""
    silent = scores(found, "unanswered")
    left = statistics.median(silent) if silent else 0
    return _median("worst_z")(found) + (f" ({left:g} unanswered)" if left else "")


def _statuses(found: Sequence[Record]) -> str:
    counts = [sum(r["status"] == status for r in found) for status in ("ok", "caution", "untrusted")]
    return "/".join(map(str, counts))


def _settings(found: Sequence[Record]) -> str:
    first = found[0]
    parts = [f"n {first['n']}", *([f"budget {first['budget']:.0e}"] if first["budget"] else ()), *_unusual(first)]
    return ", ".join(parts)


def _unusual(r: Record) -> list[str]:
    return [] if r["dtype"] == "float64" else [str(r["dtype"])]


def _log_z(found: Sequence[Record]) -> str:
    errors, bars = scores(found, "log_z_error"), scores(found, "log_z_stderr")
    return f"{statistics.median(map(abs, errors)):.3f} ({statistics.median(bars):.3f})" if errors else ""


def _weights(found: Sequence[Record]) -> str:
    shares = scores(found, "weights_ess")
    return f"{100 * statistics.median(shares):.1f}" if shares else ""


def _modes(found: Sequence[Record]) -> str:
    seen = scores(found, "modes_found")
    return f"{statistics.median(seen):g}/{scores(found, 'modes')[0]:g}" if seen else ""


def _beside_floor(name: str, form: str) -> Callable[[Sequence[Record]], str]:
    value, floor = _median(name, form), _median(f"{name}_floor", form)
    return lambda found: f"{value(found)} ({floor(found)})" if value(found) else ""


def _errors(found: Sequence[Record]) -> str:
    return "; ".join(dict.fromkeys(r["error"].replace("|", "/") for r in found if r["error"]))


COLUMNS: dict[str, Callable[[Sequence[Record]], str]] = {
    "problem": lambda found: str(found[0]["problem"]),
    "method": lambda found: str(found[0]["method"]),
    "settings": _settings,
    "runs": lambda found: str(len(found)),
    "ok/caution/untrusted": _statuses,
    "worst z": _worst_z,
    "worst ok": _worst("worst_z_ok"),
    "error of a mean (sd)": _median("mean_error_sd", "{:.3f}"),
    "log Z error (bar)": _log_z,
    "ESS": _median("ess", "{:.0f}"),
    "of the weights, %": _weights,
    "evaluations": _median("evaluations", "{:.2e}"),
    "ESS per 1e6": _median("ess_per_million", "{:.0f}"),
    "seconds": _median("seconds", "{:.1f}"),
    "modes": _modes,
    "weights TV (floor)": _beside_floor("mode_tv", "{:.3f}"),
    "sliced KS (floor)": _beside_floor("sliced_ks", "{:.3f}"),
    "energy (floor)": _beside_floor("energy", "{:.4f}"),
}
