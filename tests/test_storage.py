"""Save and load: the same bits, files others can read, and a clear word where a file is missing, altered or strange (faults 36-42)."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from boltzsample import netcdf, storage
from boltzsample.draws import Draws
from boltzsample.flags import flag
from boltzsample.netcdf import DIMS
from boltzsample.results import Result, result
from boltzsample.settings import describe, tensors
from boltzsample.storage import StorageError, load, save


@dataclass(frozen=True)
class Kernel:
    h: Tensor
    steps: int = 4


@dataclass(frozen=True)
class FittedSampler:
    kernel: Kernel = field(default_factory=lambda: Kernel(torch.tensor([0.1, 0.2])))
    parts: tuple[Any, ...] = (torch.ones(2, 2), "word", float("inf"))
    f: Callable[..., Any] = len


class Named:
    dim = 3

    def log_prob(self, x: Tensor) -> Tensor:
        return -0.5 * x.square().sum(-1)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return -x

    def readout(self, x: Tensor) -> Any:
        return {"z/scale": x[..., 0].exp(), "chain": x[..., 1:, None], "a": x[..., 0]}


def draws(units: int = 32, n: int = 12, dim: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0, **kw: Any) -> Draws:
    x = torch.randn(units, n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return Draws(x, x.sum(-1), starts=2 * x[:, 0], group=torch.arange(units) // 4, moves=torch.full((units,), n), **kw)


def full() -> Draws:
    """Every field of Draws filled with something of its own."""
    d = draws(
        dtype=torch.float32,
        flags=(flag("RHAT", value=float("inf"), threshold=1.05, index=(1, 2), detail="d"), flag("INTERRUPTED", severity="caution")),
        witnesses=("somebody",), scope="end to end", ledger={"a": (1, 2), "b": (3, 4)}, seconds={"a": 0.1}, acceptance=0.75,
    )  # fmt: skip
    more = {"ancestor": torch.arange(32 * 12).reshape(32, 12), "log_z": torch.rand(32).double(), "bad_x": torch.full((2, 3), torch.nan)}
    more |= {"far": torch.rand(3, 5, 3), "fall": torch.rand(5).double()}
    more |= {"variance": torch.rand(32).double(), "shift": torch.rand(32, 4).double()}
    return replace(d, **more)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a.nan_to_num(7), b.nan_to_num(7)))
    return bool(a == b)


def test_every_field_of_the_draws_comes_back(tmp_path: Path) -> None:
    d = full()
    loaded = load(save(Result(d), tmp_path / "run")).draws
    for f in fields(Draws):
        assert getattr(d, f.name) is not None or f.name == "log_weight", f"give {f.name} a value in this test"
        assert same(getattr(d, f.name), getattr(loaded, f.name)), f.name
    assert {f.name for f in fields(Draws) if "Tensor" in str(f.type)} == DIMS.keys()


def test_the_same_numbers_come_back(tmp_path: Path) -> None:
    r = Result(draws(ledger={"s": (0, 9)}, acceptance=0.5), config={"method": "mcmc", "seed": 7, "log_z": False}, names=("a", "b", "c"))
    q = load(r.save(tmp_path / "run"))
    for ask in (lambda r: r.expectation(lambda x: x[..., 0] ** 2), lambda r: r.quantile(p=0.9), lambda r: r.sd(), lambda r: r.covariance()):
        a, b = ask(r), ask(q)
        assert torch.equal(a.value, b.value) and torch.equal(a.interval, b.interval) and a.flags == b.flags
    assert q.summary() == r.summary() and q.labels == r.labels and q.config == r.config and repr(q) == repr(r)


def test_the_users_space_comes_back(tmp_path: Path) -> None:
    r = Result(draws(far=torch.rand(3, 5, 3), fall=torch.ones(5)), Named())
    q = load(r.save(tmp_path / "run"))
    assert q.target is None and q.labels == r.labels and same(r.values, q.values) and same(r.start_values, q.start_values)
    assert r.far_values is not None and same(r.far_values, q.far_values)
    assert torch.equal(q.expectation(lambda d: d["z/scale"]).value, r.expectation(lambda d: d["z/scale"]).value)
    assert q.flags == r.flags


def test_weights_come_back(tmp_path: Path) -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    r = result(Draws.from_arrays(x, x.sum(-1), x.sum(-1)))
    q = load(r.save(tmp_path / "run"))
    assert same(q.draws.log_weight, r.draws.log_weight) and torch.equal(q.log_z().value, r.log_z().value)


def test_replicates_come_back(tmp_path: Path) -> None:
    parts = tuple(Result(draws(seed=s), Named()) for s in range(4))
    fields_of_units = ("x", "log_prob", "starts", "group", "moves")
    whole = replace(parts[0].draws, **{n: torch.cat([getattr(p.draws, n) for p in parts]) for n in fields_of_units})
    r = Result(whole, Named(), replicates=parts)
    q = load(r.save(tmp_path / "run"))
    assert len(q.replicates) == 4 and torch.equal(q.expectation().stderr, r.expectation().stderr)
    assert (tmp_path / "run/replicates/003/draws.nc").is_file()


def test_tensors_of_the_sampler_are_stored_by_path(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = save(Result(draws(), sampler=FittedSampler()), tmp_path / "run")
    stored = load_file(path / "model.safetensors")
    assert stored.keys() == {"kernel.h", "parts.0"} and torch.equal(stored["kernel.h"], torch.tensor([0.1, 0.2]))
    told = json.loads((path / "config.json").read_text())["sampler"]
    assert told["kernel"] == {"class": "Kernel", "h": "tensor [2] torch.float32", "steps": 4} and told["parts"][1:] == ["word", "inf"]


def test_tensors_of_modules_and_shared_memory(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 2)
    shared = {"net": net, "twice": [net.weight, net.weight.T]}
    assert [name for name, _ in tensors(shared)] == ["net.weight", "net.bias", "twice.0", "twice.1"]
    assert describe(shared)["net"] == "Linear"
    save(Result(draws(), sampler=shared), tmp_path / "run")


def test_arviz_reads_the_file(tmp_path: Path) -> None:
    from boltzsample.arviz_bridge import import_arviz

    az = import_arviz()
    r = Result(draws(dtype=torch.float32), names=("a", "b", "ü"), config={"method": "mcmc"})
    tree = az.from_netcdf(save(r, tmp_path / "run") / "draws.nc")
    assert list(tree["posterior"].coordinate.values) == ["a", "b", "ü"] and tree["posterior"].x.dims == ("chain", "draw", "coordinate")
    assert (tree["posterior"].x.values == r.draws.x.numpy()).all() and (tree["sample_stats"].lp.values == r.draws.log_prob.numpy()).all()
    assert tree["unconstrained"].starts.shape == (32, 3) and tree.attrs["status"] == str(r.status)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_draws_on_a_gpu(tmp_path: Path) -> None:
    on_cpu = full()
    on_gpu = replace(on_cpu, **{n: getattr(on_cpu, n).cuda() for n in DIMS if getattr(on_cpu, n) is not None})
    r = Result(on_gpu, Named())
    assert torch.allclose(r.expectation(lambda d: d["a"]).value, Result(on_cpu, Named()).expectation(lambda d: d["a"]).value, rtol=1e-5)
    r.plot("pair"), r.to_arviz(), r.summary()
    assert same(load(r.save(tmp_path / "run")).draws.x, on_cpu.x)


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    a, b = Result(draws(seed=0)), Result(draws(seed=1))
    path = a.save(tmp_path / "deep" / "run")
    with pytest.raises(StorageError, match="exists already"):
        b.save(path)
    assert torch.equal(load(path).draws.x, a.draws.x)
    b.save(path, overwrite=True)
    assert torch.equal(load(path).draws.x, b.draws.x)
    assert os.listdir(tmp_path / "deep") == ["run"]


def test_overwrite_replaces_results_only(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("ten years")
    (tmp_path / "file").write_text("x")
    os.symlink(Result(draws()).save(tmp_path / "run"), tmp_path / "link")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    for name in ("home", "file", "link", "dangling"):
        with pytest.raises(StorageError, match="not a saved result"):
            save(Result(draws()), tmp_path / name, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "ten years"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r = Result(draws())
    old = r.save(tmp_path / "old")

    def full_disk(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "_flush", full_disk)
    with pytest.raises(OSError, match="No space left"):
        r.save(tmp_path / "new")
    with pytest.raises(OSError, match="No space left"):
        r.save(old, overwrite=True)
    assert os.listdir(tmp_path) == ["old"] and same(load(old).draws.x, r.draws.x)
    assert r.expectation().value.shape == (3,)  # the result itself is still there


def test_a_lost_race_puts_the_old_result_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Result(draws(seed=0)).save(tmp_path / "run")
    rename = os.rename

    def lose(a: Path, b: Path) -> None:
        if str(a).endswith(".part"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        rename(a, b)

    monkeypatch.setattr(os, "rename", lose)
    with pytest.raises(OSError, match="not empty"):
        Result(draws(seed=1)).save(path, overwrite=True)
    assert torch.equal(load(path).draws.x, draws(seed=0).x) and os.listdir(tmp_path) == ["run"]


# ---- what is not a whole, readable result ----


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return Result(draws(), config={"method": "mcmc"}).save(tmp_path / "run")


@pytest.mark.parametrize("name", ["draws.nc", "config.json", "model.safetensors"])
def test_missing_and_altered_files(saved: Path, name: str) -> None:
    data = bytearray((saved / name).read_bytes())
    data[len(data) // 2] ^= 1
    (saved / name).write_bytes(data)
    with pytest.raises(StorageError, match=rf"{name} was altered after it was saved"):
        load(saved)
    (saved / name).unlink()
    with pytest.raises(StorageError, match=f"{name} is missing"):
        load(saved)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def rehash(folder: Path) -> None:
    """The manifest a forger would write."""
    def change(manifest: Any) -> None:
        for name in manifest["files"]:
            manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": storage._sha256(folder / name)}

    edit(folder / "manifest.json", change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(schema=99), "its schema is 99 and this version reads 2"),
        (lambda m: m.pop("schema"), "its schema is None"),
        (lambda m: m.pop("files"), "lists no files"),
        (lambda m: m.update(files=[]), "lists no files"),
        (lambda m: m["files"].update({"../../etc/passwd": {}}), r"names '../../etc/passwd', which no result has"),
        (lambda m: m["files"].update({"draws.nc": "x"}), "draws.nc was altered"),
        (lambda m: m["files"].pop("draws.nc"), "draws.nc is missing from its manifest"),
        (lambda m: [m], "does not hold a JSON object"),
    ],
)  # fmt: skip
def test_strange_manifests(saved: Path, change: Callable[[Any], Any], says: str) -> None:
    edit(saved / "manifest.json", lambda m: change(m) if isinstance(change(json.loads(json.dumps(m))), list) else (change(m), m)[1])
    with pytest.raises(StorageError, match=says):
        load(saved)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(callback="os.system"), r"unknown or missing keys: \['callback'\]"),
        (lambda c: c.pop("flags"), r"unknown or missing keys: \['flags'\]"),
        (lambda c: c.update(flags=[{"code": "FROM_THE_FUTURE"}]), "a flag 'FROM_THE_FUTURE', unknown to this version"),
        (lambda c: c.update(replicates=3), "replicates/000/draws.nc is missing from its manifest"),
    ],
)
def test_strange_configs(saved: Path, change: Callable[[Any], Any], says: str) -> None:
    edit(saved / "config.json", lambda c: (change(c), c)[1])
    rehash(saved)
    with pytest.raises(StorageError, match=says):
        load(saved)


def test_what_is_no_result_at_all(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="no such directory"):
        load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match=r"it has no manifest.json"):
        load(tmp_path / "empty")
    (saved / "manifest.json").write_text('{"schema": 1, "files"')  # torn
    with pytest.raises(StorageError, match="not readable JSON"):
        load(saved)
    monkeypatch.setattr(storage, "LARGEST_JSON", 10)
    with pytest.raises(StorageError, match="larger than 10 bytes"):
        load(saved)


def test_one_draw_and_no_starts(tmp_path: Path) -> None:
    r = result(Draws.from_arrays(torch.randn(50, 1)))
    q = load(r.save(tmp_path / "run"))
    assert q.start_values is None and same(q.draws.x, r.draws.x) and q.flags == r.flags
    assert netcdf.draws_arrays(replace(r.draws, bad_x=torch.empty(0, 1))).keys() == {"x", "log_prob"}
