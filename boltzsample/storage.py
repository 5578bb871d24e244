"""Save and load results: a directory of plain files, without pickle.

    draws.nc            the draws, readable by az.from_netcdf (see netcdf.py)
    config.json         how the run was made, what it cost, what was found
    model.safetensors   the tensors of the fitted sampler, by dotted path
    replicates/000/...  the same three files for each replicate
    manifest.json       schema, sizes and SHA-256 of all of them, written last

Everything is written to a directory beside the goal, flushed to disk, and moved into place by one rename: a killed save
leaves nothing behind that could be taken for a result.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import torch

from boltzsample import netcdf
from boltzsample.draws import Draws, Estimate
from boltzsample.errors import BoltzsampleError
from boltzsample.flags import KINDS, Flag
from boltzsample.results import Result
from boltzsample.settings import describe, tensors

SCHEMA = 2
NUMBERS = ("value", "stderr", "df", "interval", "ess")  # of an Estimate
FILE = re.compile(r"(replicates/\d{3,6}/)*(draws\.nc|config\.json|model\.safetensors)")
KEYS = {"status", "config", "sampler", "keys", "names", "flags", "witnesses", "scope", "acceptance", "ledger", "seconds"}
KEYS |= {"replicates", "versions", "evidence"}
LARGEST_JSON = 2**26  # bytes; a larger one was not written by us


class StorageError(BoltzsampleError, ValueError):
    """A result could not be saved there, or what is there is not a whole, readable result."""

    code = "STORAGE"


# ---- save ----


def save(result: Result, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write `result` to the directory `path` and return it. `overwrite=True` replaces a saved result, and nothing else.

    The density is code and is not saved. Raises StorageError (something is there already), OSError (disk full, read-only).
    """
    path = Path(path)
    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        _write(result, draft)
        _write_manifest(draft)
        _move(draft, path, overwrite)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return path


def check_free(path: str | Path, overwrite: bool = False) -> None:
    """Raises StorageError unless a result may be saved at `path`."""
    path = Path(path)
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise StorageError(f"{path} exists already; choose another path, or pass overwrite=True to replace a saved result")
    if path.is_symlink() or not (path / "manifest.json").is_file():
        raise StorageError(f"{path} is not a saved result, so overwrite=True leaves it alone; choose another path")


def _write(result: Result, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    netcdf.write(result, folder / "draws.nc")
    _write_json(folder / "config.json", _config(result))
    model = {name: t.cpu().contiguous().clone() for name, t in tensors(result.sampler)}  # clones: fields may share memory
    save_file(model, folder / "model.safetensors")
    for i, replicate in enumerate(result.replicates):
        _write(replicate, folder / "replicates" / f"{i:03d}")


def _config(result: Result) -> dict[str, Any]:
    draws, values = result.draws, result.values
    return {
        "status": str(result.status),
        "config": describe(result.config),
        "sampler": describe(result.sampler),
        "keys": list(values) if isinstance(values, dict) else None,
        "names": None if isinstance(values, dict) else list(result.labels),
        "flags": [describe(asdict(f)) for f in draws.flags],
        "witnesses": list(draws.witnesses),
        "scope": draws.scope,
        "acceptance": describe(draws.acceptance),
        "evidence": [_evidence(estimate) for estimate in draws.evidence],
        "ledger": {phase: list(rows) for phase, rows in draws.ledger.items()},
        "seconds": describe(draws.seconds),
        "replicates": len(result.replicates),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of Python, of this library and of those it computes with."""
    found = {"python": python_version()}
    for name in ("boltzsample", "torch", "numpy", "scipy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout
            found[name] = "unknown"
    return found


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listed = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    for p in files:
        _flush(p)
    _write_json(folder / "manifest.json", {"format": "boltzsample result", "schema": SCHEMA, "versions": versions(), "files": listed})
    for p in (folder / "manifest.json", *(d for d in folder.rglob("*") if d.is_dir()), folder):
        _flush(p)


def _move(draft: Path, path: Path, overwrite: bool) -> None:
    old = path.with_name(f"{draft.name}.old")
    if overwrite and path.exists():
        os.rename(path, old)
    try:
        os.rename(draft, path)  # refuses a directory that another process filled meanwhile
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    _flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows flushes no directories
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- load ----


def load(path: str | Path) -> Result:
    """The Result saved at `path`, on the CPU, with the same numbers; its target and sampler are None, for code is not saved.

    Raises StorageError where something is missing, altered or of another schema.
    """
    path = Path(path)
    if not (path / "manifest.json").is_file():
        what = "no such directory" if not path.exists() else "it has no manifest.json, so it is not a saved result"
        raise StorageError(f"cannot load {path}: {what}; pass the directory that result.save made")
    manifest = _read_json(path / "manifest.json")
    schema = manifest.get("schema")
    if schema != SCHEMA:
        raise StorageError(f"cannot load {path}: its schema is {schema!r} and this version reads {SCHEMA}; use the version that saved it")
    listed = manifest.get("files")
    if not isinstance(listed, dict):
        raise StorageError(f"cannot load {path}: its manifest lists no files; copy the whole directory again")
    for name, facts in listed.items():
        _verify(path, name, facts)
    return _read(path, listed)


def _verify(folder: Path, name: str, facts: Any) -> None:
    if not FILE.fullmatch(name):
        raise StorageError(f"cannot load {folder}: its manifest names {name!r}, which no result has")
    path = folder / name
    if not path.is_file():
        raise StorageError(f"cannot load {folder}: {name} is missing; copy the whole directory again")
    if facts != {"bytes": path.stat().st_size, "sha256": _sha256(path)}:
        raise StorageError(f"cannot load {folder}: {name} was altered after it was saved (its SHA-256 differs); copy it again")


def _read(folder: Path, listed: dict[str, Any], prefix: str = "") -> Result:
    for name in ("draws.nc", "config.json"):
        if prefix + name not in listed:
            raise StorageError(f"cannot load {folder}: {prefix}{name} is missing from its manifest; copy the whole directory again")
    config = _read_json(folder / prefix / "config.json")
    if config.keys() != KEYS:
        raise StorageError(f"cannot load {folder}: config.json has unknown or missing keys: {sorted(config.keys() ^ KEYS)}")
    arrays, values, starts, far = netcdf.read(folder / prefix / "draws.nc", config["keys"])
    replicates = tuple(_read(folder, listed, f"{prefix}replicates/{i:03d}/") for i in range(config["replicates"]))
    names = None if config["names"] is None else tuple(config["names"])
    return Result(_draws(arrays, config), None, None, config["config"], replicates, values, starts, names, far)


def _draws(arrays: dict[str, Any], config: dict[str, Any]) -> Draws:
    return Draws(
        **arrays,
        flags=tuple(_flag(entry) for entry in config["flags"]),
        witnesses=tuple(config["witnesses"]),
        scope=config["scope"],
        ledger={phase: (int(a), int(b)) for phase, (a, b) in config["ledger"].items()},
        seconds={phase: float(s) for phase, s in config["seconds"].items()},
        acceptance=_number(config["acceptance"]),
        evidence=tuple(_estimate(entry) for entry in config["evidence"]),
    )


def _evidence(estimate: Estimate) -> dict[str, Any]:
    numbers = {name: describe(getattr(estimate, name).tolist()) for name in NUMBERS}
    return {**numbers, "method": estimate.method, "flags": [describe(asdict(f)) for f in estimate.flags]}


def _estimate(entry: dict[str, Any]) -> Estimate:
    value, stderr, df, interval, ess = (torch.tensor(_floats(entry[name]), dtype=torch.float64) for name in NUMBERS)
    return Estimate(value, stderr, df, interval, ess, entry["method"], flags=tuple(_flag(f) for f in entry["flags"]))


def _floats(value: Any) -> Any:
    return [_number(v) for v in value] if isinstance(value, list) else _number(value)


def _flag(entry: dict[str, Any]) -> Flag:
    if entry["code"] not in KINDS:
        raise StorageError(f"the saved result carries a flag {entry['code']!r}, unknown to this version; use the version that saved it")
    index = None if entry["index"] is None else tuple(entry["index"])
    return Flag(entry["code"], entry["severity"], entry["detail"], _number(entry["value"]), _number(entry["threshold"]), index)


def _number(value: float | str | None) -> float | None:
    return None if value is None else float(value)


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > LARGEST_JSON:
        raise StorageError(f"{path} is larger than {LARGEST_JSON:,} bytes; no saved result is")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StorageError(f"{path} is not readable JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise StorageError(f"{path} does not hold a JSON object; copy it again")
    return value
