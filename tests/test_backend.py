"""The backend: devices and dtypes at the door, the compile rule, the eager fallback, memory that runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import boltzsample as bz
from boltzsample import backend
from boltzsample.backend import Backend, Stepper, halved, is_out_of_memory, make_backend
from boltzsample.errors import DeviceError, DtypeError
from boltzsample.kernels import HMC, chains, transitions
from boltzsample.maps import Diagonal
from boltzsample.streams import LANE, Stream
from boltzsample.views import Pullback
from tests.small import SMALL, codes, normal, normal_log_prob, sample

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# ---- at the door ----


def test_defaults() -> None:
    made = make_backend(None, None, "auto")
    assert (made.device, made.dtype, made.compile, made.chunk) == (torch.device("cpu"), torch.float64, "auto", None)
    assert make_backend("cpu", torch.float32, False, 3) == Backend(torch.device("cpu"), torch.float32, False, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64, "float32"])
def test_bad_dtypes(dtype: Any) -> None:
    with pytest.raises(DtypeError, match=r"wanted torch\.float32 or torch\.float64"):
        make_backend(None, dtype, "auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu() -> None:
    with pytest.raises(DeviceError, match="torch sees no CUDA device"):
        bz.sample(normal(), SMALL, device="cuda")


@pytest.mark.parametrize(("name", "value"), [("chunk", 0), ("chunk", -1), ("chunk", 1.5), ("compile", "always")])
def test_bad_settings(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        make_backend(**{"device": None, "dtype": None, "compile": "auto", "chunk": None, name: value})


# ---- compiling ----


def test_the_compile_rule_is_a_function_of_the_plan() -> None:
    auto = Backend()
    assert [auto.compiles(n) for n in (0, backend.COMPILE_FROM - 1, backend.COMPILE_FROM, 10**9)] == [False, False, True, True]
    for n in (0, 10**9):
        assert Backend(compile=True).compiles(n) and not Backend(compile=False).compiles(n)


def _no_compiler(message: str) -> Callable[..., Any]:
    def compile_whole(fn: Any, *options: Any) -> Any:
        def call(*args: Any) -> Any:
            raise NotImplementedError(message)

        return call

    return compile_whole


def test_eager_fallback_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "compile_whole", _no_compiler("no compiler here\nand a long story"))
    step = Stepper(lambda x: x + 1, compile=True)
    with caplog.at_level(logging.DEBUG, logger="boltzsample"):
        assert [step(1), step(2), step(3)] == [2, 3, 4]
    assert [r.getMessage() for r in caplog.records] == ["torch.compile failed (no compiler here); running eagerly"]
    assert not step.compiled


def test_eager_fallback_from_an_error_without_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "compile_whole", _no_compiler(""))
    assert Stepper(lambda x: x + 1, compile=True)(1) == 2


def test_a_run_without_a_compiler_is_the_eager_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    eager = sample(normal(), compile=False)
    monkeypatch.setattr(backend, "compile_whole", _no_compiler("no compiler here"))
    fallen = sample(normal(), compile=True)
    assert torch.equal(eager.draws.x, fallen.draws.x)
    assert {r.getMessage() for r in caplog.records} == {"torch.compile failed (no compiler here); running eagerly"}


def test_the_users_error_is_not_blamed_on_the_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "compile_whole", lambda fn, *options: fn)

    def broken(x: int) -> int:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Stepper(broken, compile=True)(1)
    assert caplog.records == []


def test_running_out_of_memory_is_no_reason_to_go_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def hungry(x: int) -> int:
        calls.append(x)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backend, "compile_whole", lambda fn, *options: fn)
    step = Stepper(hungry, compile=True)
    with pytest.raises(torch.OutOfMemoryError):
        step(1)
    assert calls == [1] and step.compiled


@pytest.mark.parametrize("thin", [1, 3])
@pytest.mark.parametrize("n", [640, 32 * 17])
def test_transitions_made_several_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch, thin: int, n: int) -> None:
    """A compiled graph makes several transitions; here the compiler is the identity."""
    method = replace(SMALL, kernel=bz.MALA(), thin=thin)
    eager = sample(normal(), method, n, compile=False, witness=False)
    monkeypatch.setattr(backend, "compile_whole", lambda fn, *options: fn)
    strides = sample(normal(), method, n, compile=True, witness=False)
    assert torch.equal(eager.draws.x, strides.draws.x) and torch.equal(eager.draws.log_prob, strides.draws.log_prob)
    assert eager.ledger == strides.ledger and torch.equal(eager.draws.moves, strides.draws.moves)
    stopped = sample(normal(), method, 32 * 1000, compile=True, witness=False, starts=[0.0, 0.0], budget=10_000)
    assert stopped.evaluations <= 10_000 and "STOPPED_EARLY" in codes(stopped)


# ---- memory ----


@pytest.mark.parametrize(("lanes", "wanted"), [(16, [8, 4, 2, 1]), (5, [3, 2, 1]), (1, [])])
def test_halving_ends_at_one_lane(lanes: int, wanted: list[int]) -> None:
    now: Backend | None = Backend()
    seen = []
    while now is not None and (now := halved(now, lanes)) is not None:
        seen.append(now.chunk)
    assert seen == wanted
    assert halved(Backend(chunk=100), 4) == Backend(chunk=2)  # a chunk larger than there are lanes


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert not is_out_of_memory(RuntimeError("shape '[2]' is invalid"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def _small_machine(lanes: int, error: Exception) -> Callable[..., Any]:
    def advance(kernel: Any, target: Any, state: Any, *rest: Any) -> Any:
        if state.x.shape[1] > lanes * LANE:
            raise error
        return _advance(kernel, target, state, *rest)

    return advance


_advance = transitions.advance
# diagonal: a matrix product of all lanes need not round as the products of one lane each (TRUST.md, RNG contract), and the chunk is
# halved only after the chains are initialized
MANY = replace(SMALL, chains=5 * LANE, warmup=20, kernel=bz.MALA(), dense=False)
ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
def test_out_of_memory_gives_the_draws_of_a_smaller_chunk(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    by_lane = sample(normal(), MANY, chunk=1, starts=[0.0, 0.0], witness=False)
    monkeypatch.setattr(transitions, "advance", _small_machine(1, error))
    split = sample(normal(), MANY, starts=[0.0, 0.0], witness=False)
    assert torch.equal(split.draws.x, by_lane.draws.x)
    assert "OOM_SPLIT" in codes(split) and "OOM_SPLIT" not in codes(by_lane)


def test_out_of_memory_below_one_lane_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transitions, "advance", _small_machine(0, torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        sample(normal(), MANY, witness=False)


def test_other_errors_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transitions, "advance", _small_machine(1, RuntimeError("shape '[2]' is invalid")))
    with pytest.raises(RuntimeError, match="shape"):
        sample(normal(), MANY, witness=False)


def test_out_of_memory_in_the_first_evaluation() -> None:
    def hungry(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 4 * LANE:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return normal_log_prob(x)

    starts = torch.zeros(4, 2, dtype=torch.float64)
    assert "OOM_SPLIT" in codes(sample(bz.from_log_prob(hungry, dim=2), MANY, starts=starts, witness=False))


# ---- the same code on a GPU ----


@CUDA
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_cuda(dtype: torch.dtype | None) -> None:
    """|z| < 5 for ten means, twice: false failure 1e-5."""
    shift = torch.arange(10.0)
    target = bz.from_log_prob(lambda x: -0.5 * (x - shift.to(x)).square().sum(-1), dim=10)
    result = bz.sample(target, "mcmc", 4_000, seed=0, device="cuda", dtype=dtype)
    assert result.status == "ok" and result.draws.x.device.type == "cuda"
    assert result.draws.x.dtype == (dtype or torch.float32)
    assert bool(((result.means.value - shift) / result.means.stderr).abs().max() < 5)
    assert torch.equal(result.draws.x, bz.sample(target, "mcmc", 4_000, seed=0, device="cuda", dtype=dtype).draws.x)


@CUDA
def test_cuda_compiled_replicates_and_starts() -> None:
    result = bz.sample(normal(), SMALL, 640, seed=0, device="cuda", compile=True, replicates=2, starts=[[0.0, 1.0], [1.0, 0.0]])
    assert len(result.replicates) == 2 and bool(result.draws.x.isfinite().all())


@CUDA
def test_cuda_is_not_a_default_that_leaks() -> None:
    torch.set_default_device("cuda")
    try:
        assert sample(normal()).draws.x.device.type == "cpu"
    finally:
        torch.set_default_device(None)


def test_a_density_outside_of_torch_is_never_traced(caplog: pytest.LogCaptureFixture) -> None:
    outside = bz.from_numpy(lambda x: -0.5 * (x**2).sum(-1), dim=2, grad=lambda x: -x)
    view = Pullback(outside, Diagonal(torch.zeros(2), torch.ones(2)))
    x = torch.zeros(1, 64, 2, dtype=torch.float64)
    for compile, said in ((True, 1), ("auto", 0)):
        caplog.clear()
        moving = chains.Chains.start(view, HMC(), Diagonal(torch.zeros(2), torch.ones(2)), x, Backend(compile=compile), Stream(0), 10**6)
        assert not moving.stepper.compiled and len(caplog.records) == said
