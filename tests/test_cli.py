"""The command line: exit codes, one sentence for our errors, a traceback for the user's own, and a demo that holds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from boltzsample import run
from boltzsample.cli import load_object, main
from boltzsample.demo import comparison
from boltzsample.draws import Draws
from boltzsample.flags import flag
from boltzsample.registry import METHODS
from boltzsample.results import Result
from boltzsample.storage import load

DENSITY = """
import neighbour

def log_prob(x):
    return -0.5 * (x**2).sum(-1) * neighbour.scale

def wrong_shape(x):
    return x

def broken(x):
    raise RuntimeError("a bug of the user's")

class Target:
    dim = 2

    def log_prob(self, x):
        return log_prob(x)

    def grad_log_prob(self, x):
        return -x

target = Target()
number = 3
"""


@pytest.fixture
def density(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "density.py").write_text(DENSITY)
    (tmp_path / "neighbour.py").write_text("scale = 1.0")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    return str(tmp_path / "density.py")


def fake_result(*codes: str) -> Result:
    x = torch.randn(64, 16, 2, generator=torch.Generator().manual_seed(0))
    return Result(Draws(x, x.sum(-1), witnesses=("w",), flags=tuple(flag(c) for c in codes)), config={"method": "mcmc"})


@pytest.fixture
def fake_sample(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """bz.sample replaced: calls are recorded, the result is ok unless a method's name says otherwise."""
    calls: list[Any] = []

    def sample(target: Any, method: str, **options: Any) -> Result:
        calls.append((target, method, options))
        return fake_result()

    monkeypatch.setattr(run, "sample", sample)
    return calls


def test_a_run_from_the_shell(density: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run1"
    code = main(["sample", f"{density}:log_prob", "--dim", "2", "--method", "mcmc", "--n", "512", "--seed", "3", "--out", str(out)])
    shown = capsys.readouterr()
    assert code == 0 and shown.out.startswith("status: ") and "x[1]" in shown.out and f"saved to {out}" in shown.err
    q = load(out)
    assert q.config["seed"] == 3 and q.summary() == shown.out.rstrip("\n")


def test_arguments_reach_the_sampler(density: str, fake_sample: list[Any]) -> None:
    main(["sample", f"{density}:target", "--n", "99", "--budget", "30s", "--dtype", "float32", "--device", "cpu"])
    main(["sample", f"{density}:log_prob", "--dim", "7", "--budget", "200_000"])
    (first, second) = fake_sample
    assert first[0].dim == 2 and first[1] == "auto" and first[2]["n"] == 99 and first[2]["budget"].seconds == 30.0
    assert first[2]["dtype"] is torch.float32 and first[2]["device"] == "cpu"
    assert second[0].dim == 7 and second[2]["budget"].evaluations == 200_000 and second[2]["seed"] is None and second[2]["dtype"] is None


@pytest.mark.parametrize(("codes", "exit_code"), [((), 0), (("STOPPED_EARLY",), 0), (("INTERRUPTED",), 3)])
def test_exit_code_is_the_status(codes: tuple[str, ...], exit_code: int, density: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "sample", lambda *a, **k: fake_result(*codes))
    assert main(["sample", f"{density}:target"]) == exit_code


def test_json(density: str, fake_sample: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", f"{density}:target", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{file}"], "is not FILE:FUNCTION; write for example density.py:log_prob"),
        (["{file}:"], "is not FILE:FUNCTION"),
        (["{file}:os.system('x')"], "is not FILE:FUNCTION"),
        (["nowhere.py:f"], "there is no file nowhere.py"),
        (["{folder}:f"], "there is no file"),
        (["{file}:nope"], "defines no 'nope'; it defines log_prob, wrong_shape, broken, Target"),
        (["{file}:log_prob"], "Add --dim D"),
        (["{file}:log_prob", "--dim", "0"], "--dim is 0; wanted 1 or more"),
        (["{file}:target", "--dim", "3"], "has dim 2 and --dim says 3"),
        (["{file}:number"], "is of type int; name a function or a Target object"),
        (["{file}:target", "--method", "mcm"], "there is no method 'mcm'; choose from auto, mcmc"),
        (["{file}:target", "--out", "{folder}"], "STORAGE: {folder} exists already"),
        (["{file}:target", "--n", "-5"], "n is -5; wanted"),
        (["{file}:wrong_shape", "--dim", "2"], "SHAPE: log_prob of points"),
    ],
)
def test_mistakes_get_one_sentence(arguments: list[str], says: str, density: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"{file}": density, "{folder}": str(Path(density).parent)}
    filled = [a.replace("{file}", names["{file}"]).replace("{folder}", names["{folder}"]) for a in arguments]
    assert main(["sample", *filled]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and says.replace("{folder}", names["{folder}"]) in shown.err
    assert shown.err.startswith("boltzsample: ") and shown.err.count("\n") == 1


def test_a_file_that_is_no_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "density.txt").write_text("hello")
    assert main(["sample", f"{tmp_path}/density.txt:f"]) == 1
    assert "its name should end in .py" in capsys.readouterr().err


def test_the_users_own_exceptions_come_through(density: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug of the user's"):
        main(["sample", f"{density}:broken", "--dim", "2"])
    (tmp_path / "torn.py").write_text("def log_prob(x:")
    with pytest.raises(SyntaxError):
        load_object(f"{tmp_path}/torn.py:log_prob")
    (tmp_path / "loud.py").write_text("raise ValueError('of the user')")
    with pytest.raises(ValueError, match="of the user"):
        main(["sample", f"{tmp_path}/loud.py:log_prob", "--dim", "2"])


def test_a_value_error_inside_the_density_is_the_users(density: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(density).write_text("def log_prob(x):\n    raise ValueError('mine')")
    with pytest.raises(ValueError, match="mine"):
        main(["sample", f"{density}:log_prob", "--dim", "2"])


@pytest.mark.parametrize("text", ["5x", "s", "1e5", ""])
def test_budgets_that_are_none(text: str, density: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sample", f"{density}:target", f"--budget={text}"])
    assert stop.value.code == 2 and "write evaluations, as in 200000, or seconds, as in 30s" in capsys.readouterr().err


def test_interrupts_exit_with_130(density: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*a: Any, **k: Any) -> Result:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "sample", stopped)
    assert main(["sample", f"{density}:target"]) == 130
    assert capsys.readouterr().err == "boltzsample: stopped\n"


def test_methods_lists_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(METHODS)
    assert all(METHODS[line.split()[0]].summary in line for line in lines[1:])


def test_a_closed_pipe_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def close(self) -> None: ...

    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "stderr", Closed())
    assert main(["methods"]) == 1


@pytest.mark.parametrize("arguments", [["--help"], ["sample", "--help"], ["--version"]])
def test_help_imports_nothing_slow(arguments: list[str]) -> None:
    code = f"""
import sys
from boltzsample.cli import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert stop.code == 0
slow = {{"torch", "numpy", "arviz", "matplotlib", "scipy", "tqdm"}} & set(sys.modules)
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


# ---- demo ----


def test_the_demo_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert main(["demo", "--out", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "status: ok" in lines
    table = [line for line in lines if line.count("+-") == 1 and "(95%)" not in line]
    assert len(table) == 31 and any(line.startswith("intercept") for line in table)
    assert all(abs(float(line.split()[-2])) < 4.5 for line in table)
    assert f"figure: {tmp_path / 'new' / 'demo.png'}" in out and (tmp_path / "new" / "demo.png").stat().st_size > 10_000


def test_the_demo_shows_a_wrong_mean() -> None:
    r = fake_result()
    r.draws.x[..., 1] += 1.0
    text = comparison(r, torch.zeros(2).double(), torch.full((2,), 0.01).double())
    est = r.expectation()
    z = float(est.value[1] / (est.stderr[1] ** 2 + 1e-4).sqrt())
    assert f"worst |z|: {z:.2f} (x[1])" in text and z > 20
    loud = replace(r, draws=replace(r.draws, flags=(flag("INTERRUPTED"),)))
    assert comparison(loud, torch.zeros(2), torch.zeros(2)).startswith("status: untrusted\n  INTERRUPTED: the run was interrupted")


def test_targets_of_the_shell_are_targets(density: str) -> None:
    found = load_object(f"{density}:log_prob")
    value: Tensor = found(torch.ones(3, 2))
    assert value.tolist() == [-1.0, -1.0, -1.0]
