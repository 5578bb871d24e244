"""One screen of text from a summary: the status word first, at most three reasons, the numbers, what was checked and what was not.

Everything shown is taken from the dict of `report.summary_dict` (TRUST.md, presentation).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from typing import Any

WIDTH = 110
ROWS = 16  # coordinates shown in full; of more, the first five, the last three and the worst eight


def render(s: dict[str, Any]) -> str:
    """The text of a `summary_dict`."""
    parts = [f"status: {s['status']}", *_reasons(s["flags"]), _heading(s), *_table(s["coordinates"], s["rhat_note"]), *_tail(s)]
    return "\n".join(parts)


def _reasons(flags: list[dict[str, Any]]) -> list[str]:
    """At most three, the worst first; the codes of the others in one line."""
    reasons = [f for f in flags if f["severity"] != "info"]
    lines = [line for f in reasons[:3] for line in _wrap(f"{f['severity']}: {_flag_text(f)}", "  ", "      ")]
    rest = dict.fromkeys(f["code"] for f in reasons[3:])
    return lines + ([f"  and {len(reasons) - 3} more in result.flags: {', '.join(rest)}"] if rest else [])


def _flag_text(f: dict[str, Any]) -> str:
    facts = [f["detail"]] if f["detail"] else []
    if f["coordinates"]:
        facts.append("at " + _shortened(f["coordinates"]))
    if f["value"] is not None:
        facts.append(f"{f['value']:.3g}" + ("" if f["threshold"] is None else f", threshold {f['threshold']:.3g}"))
    return f"{f['code']}: {f['meaning']}" + (f" ({'; '.join(facts)})" if facts else "") + f"; {f['remedy']}"


def _heading(s: dict[str, Any]) -> str:
    units, each = s["chains"], s["draws_per_chain"]
    shape = "independent" if s["independent"] else f"{units:,} chains x {each:,}"
    shape += ", weighted" if s["weighted"] else ""
    replicates = f", {s['replicates']} replicates" if s["replicates"] else ""
    return f"\n{s['method']}: {units * each:,} draws ({shape}{replicates}); error bars {s['error_bars']}, {s['scope']}\n"


def _table(rows: list[dict[str, Any]], rhat_note: str) -> list[str]:
    rhat = known(rows, "rhat")
    shown = _shown(rows)
    width = max(10, *(len(clip(rows[i]["name"])) for i in shown))
    lines = [f"{'':{width}}{'mean +- error (95%)':>28}{'sd':>11}{'ESS':>9}{'R-hat' if rhat else '':>9}".rstrip()]
    for previous, i in zip([-1, *shown], shown, strict=False):
        if i != previous + 1:
            lines.append(f"... {i - previous - 1} more")
        lines.append(_row(rows[i], width, rhat))
    return [*lines, f"R-hat {rhat_note}"] if rhat_note else lines


def _row(row: dict[str, Any], width: int, rhat: bool) -> str:
    mark = "" if row["status"] == "ok" else f"  {row['status']}: {', '.join(row['codes'])}"
    r = (f"{row['rhat']:.3f}" if row["rhat"] is not None else "-") if rhat else ""
    mean = plus_minus(row["mean"], row["low"], row["high"])
    return f"{clip(row['name']):{width}}{mean:>28}{_short(row['sd']):>11}{_count(row['ess']):>9}{r:>9}".rstrip() + mark


def _shown(rows: list[dict[str, Any]]) -> list[int]:
    """Which rows: all of them, or the two ends and the worst (status first, then the smallest ESS)."""
    k = len(rows)
    if k <= ROWS:
        return list(range(k))
    rank = {"untrusted": 0, "caution": 1, "ok": 2}
    worst = sorted(range(k), key=lambda i: (rank[rows[i]["status"]], rows[i]["ess"] or 0.0))
    shown = {*range(5), *range(k - 3, k), *worst[: ROWS - 8]}
    return [i for i in range(k) if i in shown or {i - 1, i + 1} <= shown]  # "... 1 more" would take the line it saves


def _tail(s: dict[str, Any]) -> list[str]:
    lines = ["", *_stationarity(s), _log_z_line(s["log_z"]), *_wrap(_cost(s), "", "    ")]
    for witness in s["witnesses"]:
        lines += _wrap(f"witness: {witness}", "", "    ")
    for f in s["flags"]:
        lines += _wrap(f"note: {_flag_text(f)}", "", "    ") if f["severity"] == "info" else []
    return lines + _checked(s["checks"])


def _stationarity(s: dict[str, Any]) -> list[str]:
    nested = [row["nested_rhat"] for row in s["coordinates"] if row["nested_rhat"] is not None]
    facts = [f"nested R-hat {max(nested):.3f} at worst"] if nested else []
    facts += [f"acceptance {s['acceptance']:.2f}"] if s["acceptance"] is not None else []
    return ["; ".join(facts)] if facts else []


def _log_z_line(log_z: dict[str, Any]) -> str:
    if log_z["not_estimated"] is not None:
        return f"log Z: not estimated by this method; {log_z['not_estimated']}"
    return f"log Z: {log_z['text']}"


def _cost(s: dict[str, Any]) -> str:
    phases = s["evaluations"]["phases"]
    if not phases:
        return "evaluations: unknown (draws made elsewhere)"
    split = ", ".join(f"{name} {sum(counts):,}" for name, counts in phases.items())
    total, with_gradient = s["evaluations"]["total"], sum(counts[1] for counts in phases.values())
    return f"evaluations: {total:,}, {with_gradient:,} of them with gradient ({split}); {s['seconds']:.1f} s"


def _checked(found: dict[str, Any]) -> list[str]:
    blind = ", ".join(f"{name} ({why})" for name, why in found["not_checked"].items())
    passed = ", ".join(found["passed"]) or "nothing"
    return [*_wrap(f"No problems detected by: {passed}", "", "    "), *(_wrap(f"Not checked: {blind}", "", "    ") if blind else [])]


# ---- numbers and words ----


def known(rows: list[dict[str, Any]], key: str) -> bool:
    """Whether any coordinate has this number."""
    return any(row[key] is not None for row in rows)


def plus_minus(value: float | None, low: float | None, high: float | None) -> str:
    """value +- half the interval, with two digits of the error.

    >>> plus_minus(1.00312, 0.99212, 1.01412), plus_minus(3.1e-9, 2.9e-9, 3.3e-9), plus_minus(2.0, None, None)
    ('1.003 +- 0.011', '3.10e-09 +- 2.0e-10', '2 +- unknown')
    """
    if value is None:
        return "not a number"
    if low is None or high is None or not high > low:
        return f"{value:.4g} +- unknown"
    half = (high - low) / 2
    places = 1 - math.floor(math.log10(half))
    if places > 6 or abs(value) >= 1e7 or half >= 1e7:
        digits = max(1, min(15, math.floor(math.log10(max(abs(value), half))) + places))
        return f"{value:.{digits}e} +- {half:.1e}"
    return f"{value:.{max(0, places)}f} +- {half:.{max(0, places)}f}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def clip(name: str, width: int = 28) -> str:
    """A name, shortened in the middle where it is long."""
    return name if len(name) <= width else f"{name[: width - 13]}...{name[-10:]}"


def _shortened(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _wrap(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False)
