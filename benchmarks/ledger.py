"""The ledger: a file of JSON lines that is only ever appended to, one line a run, flushed to disk before the next run begins.

A killed run loses nothing that was finished. What a kill in the middle of a line leaves behind is passed over by `read`, and
`append` begins on a new line after it. Of several lines with one key the last counts.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import boltzsample as bz

Record = dict[str, Any]
Key = tuple[Any, ...]

PACKAGES = ("boltzsample", "torch", "numpy", "scipy")


@dataclass(frozen=True)
class Job:
    """One run of one way on one problem; its fields are the key of its line."""

    problem: str
    way: str
    seed: int
    n: int
    version: int = 1


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: what bz.sample handed back is not a whole run, and is not kept."""


def whole(result: bz.Result) -> bz.Result:
    """The result, where nothing cut it short. Raises Interrupted."""
    if any(flag.code == "INTERRUPTED" for flag in result.flags):
        raise Interrupted
    return result


def append(path: Path, record: Record) -> None:
    """Write one line, and return when it is on disk."""
    line = json.dumps(plain(record), allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() and not _ends_a_line(file):
            line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    last = file.read(1)
    return bool(last == b"\n")


def read(path: Path) -> tuple[list[Record], int]:
    """The records of the file, oldest first, and how many lines were no records. A missing file is an empty one."""
    if not path.exists():
        return [], 0
    found = [_parsed(line) for line in path.read_bytes().splitlines() if line.strip()]
    records = [r for r in found if r is not None]
    return records, len(found) - len(records)


def _parsed(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except ValueError:  # half a line, or bytes that are no text
        return None
    return value if isinstance(value, dict) else None


def latest(records: Sequence[Record], names: Sequence[str]) -> dict[Key, Record]:
    """The last record of each key; the key is made of the values under `names`."""
    return {key(r, names): r for r in records}


def key(record: Record, names: Sequence[str]) -> Key:
    return tuple(record.get(name) for name in names)


def here() -> Record:
    """Where and with what a line is made."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {"cores": os.cpu_count(), "processor": processor(), "system": platform.system()},
    }


def commit() -> str:
    """The commit of the checkout, with a + where its files differ from it; empty outside of git."""
    folder = Path(__file__).parent
    done = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=folder, capture_output=True, text=True)
    return done.stdout.strip()


def processor() -> str:
    """The name of the processor, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def plain(value: Any) -> Any:
    """Values as JSON has them; numbers that are not finite become "nan", "inf", "-inf"."""
    if isinstance(value, dict):
        return {str(name): plain(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def number(value: Any) -> float | None:
    """The number that `plain` made plain; None stays None."""
    return None if value is None else float(value)
