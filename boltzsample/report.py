"""The summary of a Result as a JSON-ready dict: the verdict, the numbers, what was checked and what was not.

`screen.render` makes the text of it, so the two never say different things.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from boltzsample.estimates import diagnostics
from boltzsample.flags import Flag, finite, worst
from boltzsample.functionals import flat
from boltzsample.screen import known, render

if TYPE_CHECKING:
    from boltzsample.draws import Estimate
    from boltzsample.results import Result


def summary_text(result: Result) -> str:
    """The summary as text of one screen; its first line is the status."""
    return render(summary_dict(result))


def summary_dict(result: Result) -> dict[str, Any]:
    """Everything the summary says, ready for json.dumps: no tensors, null for what is not a number."""
    units, draws, _ = result.draws.x.shape
    numbers = diagnostics.numbers(flat(result.values, 2), result.draws)
    rows = _coordinates(result, numbers)
    return {
        "status": str(result.status),
        "flags": [_flag_entry(f, result.labels) for f in result.flags],
        "method": result.config.get("method", "draws made elsewhere"),
        "seed": result.config.get("seed"),
        "chains": units,
        "draws_per_chain": draws,
        "replicates": len(result.replicates),
        "scope": result.draws.scope,
        "weighted": result.draws.log_weight is not None,
        "independent": _independent(result),
        "coordinates": rows,
        "rhat_note": "" if _independent(result) else numbers.rhat_note,
        "error_bars": result.means.method,
        "acceptance": result.draws.acceptance,
        "log_z": _log_z(result.log_z()),
        "evaluations": {"total": result.evaluations, "phases": {k: list(v) for k, v in result.ledger.items()}},
        "seconds": round(result.seconds, 3),
        "witnesses": list(result.draws.witnesses),
        "checks": _checks(result, rows),
    }


def _independent(result: Result) -> bool:
    """Whether the draws are independent ones with weights: then nothing is asked that only chains can answer."""
    return result.draws.log_weight is not None and result.draws.x.shape[1] == 1


def _flag_entry(f: Flag, labels: tuple[str, ...]) -> dict[str, Any]:
    where = None if f.index is None else [labels[i] if i < len(labels) else str(i) for i in f.index]
    return {
        "code": f.code,
        "severity": f.severity,
        "meaning": f.meaning,
        "detail": f.detail,
        "value": _json(f.value),
        "threshold": _json(f.threshold),
        "coordinates": where,
        "remedy": f.remedy,
    }


def _coordinates(result: Result, numbers: diagnostics.Numbers) -> list[dict[str, Any]]:
    means, sds = result.means, result.sd()
    columns = {
        "mean": means.value,
        "stderr": means.stderr,
        "low": means.interval[0],
        "high": means.interval[1],
        "sd": sds.value,
        "ess": means.ess,
        "ess_bulk": numbers.bulk_ess,
        "ess_tail": numbers.tail_ess,
        "rhat": numbers.rhat,
        "nested_rhat": numbers.nested_rhat,
    }
    listed = {key: [finite(v) for v in column.tolist()] for key, column in columns.items()}
    rows = (dict(zip(listed, row, strict=True)) for row in zip(*listed.values(), strict=True))
    return [{"name": name, **_own(means, i), **row} for i, (name, row) in enumerate(zip(result.labels, rows, strict=True))]


def _own(means: Estimate, i: int) -> dict[str, Any]:
    """What was found at coordinate i in particular: what concerns the run stands above the table."""
    own = [f for f in means.flags if f.index is not None and i in f.index]
    return {"status": str(worst(own)), "codes": [f.code for f in own if f.severity != "info"]}


def _log_z(estimate: Estimate) -> dict[str, Any]:
    value, stderr = finite(float(estimate.value)), finite(float(estimate.stderr))
    reason = next((f.remedy for f in estimate.flags if f.code == "NO_LOG_Z"), None)
    return {"value": value, "stderr": stderr, "text": repr(estimate), "status": str(estimate.status), "not_estimated": reason}


def _json(value: float | None) -> float | None:
    return None if value is None else finite(value)


# ---- what was checked ----


class Check(NamedTuple):
    """A kind of trouble, the codes that report it, and why it could not be looked for ("" where it could). `of`: the draws that can
    have it, "chains" or "weights"; "" for all."""

    name: str
    codes: tuple[str, ...]
    not_checked: Callable[[Result, list[dict[str, Any]]], str]
    of: str = ""

    def concerns(self, result: Result) -> bool:
        return {"chains": not _independent(result), "weights": result.draws.log_weight is not None}.get(self.of, True)


def _no_rhat(result: Result, rows: list[dict[str, Any]]) -> str:
    return "" if known(rows, "rhat") else "chains too short"


def _no_nested(result: Result, rows: list[dict[str, Any]]) -> str:
    return "" if known(rows, "nested_rhat") else "no groups of chains with different starts"


def _one_draw(result: Result, rows: list[dict[str, Any]]) -> str:
    return "" if result.draws.x.shape[1] > 1 else "one draw per chain"


def _no_starts(result: Result, rows: list[dict[str, Any]]) -> str:
    return "" if result.start_values is not None else "starts unknown"


def _no_witness(result: Result, rows: list[dict[str, Any]]) -> str:
    silent = any(f.code == "SINGLE_WITNESS" for f in result.flags)
    return "no second, independent look" if silent or not result.draws.witnesses else ""


def _not_our_run(result: Result, rows: list[dict[str, Any]]) -> str:
    return "" if result.ledger else "draws made elsewhere"


def _never(result: Result, rows: list[dict[str, Any]]) -> str:
    return ""


CHECKS = (
    Check("R-hat", ("RHAT",), _no_rhat, "chains"),
    Check("nested R-hat", ("NESTED_RHAT",), _no_nested, "chains"),
    Check("drift between halves", ("DRIFT",), _one_draw, "chains"),
    Check("memory of the starts", ("START_MEMORY",), _no_starts, "chains"),
    Check("stuck chains", ("STUCK_CHAIN",), _one_draw, "chains"),
    Check("effective sample size", ("ESS_LOW", "TAIL_ESS_LOW", "TAU_UNRESOLVED", "FEW_UNITS", "ONE_UNIT"), _never),
    Check("tails of the weights", ("KHAT_W", "CONCENTRATION", "FEW_ANCESTORS"), _never, "weights"),
    Check("heavy tails", ("HEAVY_F", "KHAT_F", "NO_THIRD_MOMENT"), _never),
    Check("NaN in log_prob", ("NAN_EVAL",), _not_our_run),
    Check("missing modes", ("WITNESS_CONFLICT", "SAME_STARTS"), _no_witness),
)


def _checks(result: Result, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """{"passed": names, "found": names, "not_checked": {name: why}}."""
    codes = {f.code for f in result.flags}
    asked = [c for c in CHECKS if c.concerns(result)]
    found = [c.name for c in asked if codes & set(c.codes)]
    blind = {c.name: why for c in asked if c.name not in found and (why := c.not_checked(result, rows))}
    return {"passed": [c.name for c in asked if c.name not in found and c.name not in blind], "found": found, "not_checked": blind}
