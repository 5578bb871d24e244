"""The batch backend: where chains live (device, dtype), how many move at once (lanes, chunks), and whether steps are compiled.

The same code runs on CPU and CUDA. Chains move in chunks of whole lanes; when memory runs out the chunk is halved and the same
noise is used again, so the law and, per chunk size, the bits stay. `compile="auto"` follows a deterministic rule (SPEED.md): a
timed trial would break same-seed bits.
"""

from __future__ import annotations

import logging
import os
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from boltzsample.direct import Direct
from boltzsample.errors import DeviceError, DtypeError

log = logging.getLogger("boltzsample")
S = TypeVar("S")
T = TypeVar("T")

COMPILE_FROM = 10_000  # planned transitions from which 2-19 s of compiling are paid back
INDUCTOR: dict[str, Any] = {"realize_opcount_threshold": 1, "realize_reads_threshold": 1}  # else unrolled leapfrogs inline into themselves
ONE_LOOP: dict[str, Any] = {  # small expressions inline, so that gradient and leapfrog have the same loops and become one
    "realize_opcount_threshold": 24,
    "realize_reads_threshold": 2,
    "cpp.enable_floating_point_contract_flag": "fast",  # multiply-adds: a leapfrog is a chain of them
}


@dataclass(frozen=True)
class Backend:
    """Device, dtype, the compile rule and the chunk (lanes moved at once; None: all)."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float64
    compile: bool | Literal["auto"] = "auto"
    chunk: int | None = None

    def compiles(self, transitions: int) -> bool:
        return transitions >= COMPILE_FROM if self.compile == "auto" else self.compile

    def eager(self) -> Backend:
        """This backend without compiling, for a density computed outside of torch; says so where compiling was asked for by name."""
        if self.compile is True:
            log.warning("compile=True, but this density is computed outside of what torch.compile can see; running eagerly")
        return replace(self, compile=False)

    def stepper(self, fn: Callable[..., T], transitions: int, options: dict[str, Any] | None = None) -> Stepper[T]:
        """A step of chains, which is called with the same objects again and again."""
        return Stepper(fn, self.compiles(transitions), options, direct=True)


def make_backend(
    device: torch.device | str | None, dtype: torch.dtype | None, compile: bool | Literal["auto"], chunk: int | None = None
) -> Backend:
    """A Backend from what the user said. Defaults: CPU; float64 on CPU, float32 on CUDA.

    Raises DeviceError, DtypeError, ValueError.
    """
    where = torch.device("cpu" if device is None else device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device is 'cuda', but torch sees no CUDA device; use device='cpu' or install a CUDA build of torch")
    what = dtype or (torch.float64 if where.type == "cpu" else torch.float32)
    if what not in (torch.float32, torch.float64):
        raise DtypeError(f"dtype is {what}; wanted torch.float32 or torch.float64")
    if compile not in (True, False, "auto"):
        raise ValueError(f'compile is {compile!r}; wanted True, False or "auto"')
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise ValueError(f"chunk is {chunk!r}; wanted a number of lanes of 64 chains, 1 or more, or None for all at once")
    return Backend(where, what, compile, chunk)


class Stepper(Generic[T]):
    """A function that is compiled as one graph where asked, with an eager fallback that says so once. direct: called without Dynamo once
    it is known (direct.py)."""

    def __init__(self, fn: Callable[..., T], compile: bool, options: dict[str, Any] | None = None, direct: bool = False) -> None:
        self.eager = fn
        self.compiled = compile
        whole = partial(compile_whole, fn, INDUCTOR if options is None else options)
        self._call = fn if not compile else Direct(whole) if direct else whole()

    def __call__(self, *args: Any) -> T:
        if not self.compiled:
            return self._call(*args)
        try:
            return self._call(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the compiler could not do, eager can; the user's own error comes again from there
            result = self.eager(*args)
            log.warning("torch.compile failed (%s); running eagerly", _first_line(error))
            self.compiled, self._call = False, self.eager
            return result


@dataclass
class Doubt:
    """When a quick way that may fail is worth another try: after k failures, 2^k - 1 times not."""

    failures: int = 0
    left: int = 0

    def tries(self) -> bool:
        self.left = max(0, self.left - 1)
        return self.left == 0

    def failed(self) -> None:
        self.failures += 1
        self.left = 2**self.failures


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def compile_whole(fn: Callable[..., T], options: dict[str, Any] = INDUCTOR, backend: Any = "inductor") -> Callable[..., T]:
    """fn compiled as one static graph. Dynamo's cache and its limit belong to a code object, so each run compiles a copy."""
    own = types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend, options=options)


def parallel(work: Callable[[S], None], items: Sequence[S], backend: Backend, size: int) -> None:
    """work(item) of all items, in threads where it is on the CPU and `size` numbers pay for them (torch's own count).

    work must be serial inside: the OpenMP threads that a helper would start spin on, and stall everybody else's.
    """
    threads = min(torch.get_num_threads() if backend.device.type == "cpu" and size >= 2**17 else 1, len(items))
    waiting = [_helpers(threads - 1).submit(_each, work, items[i::threads]) for i in range(1, threads)]
    _each(work, items[::threads])
    for helper in waiting:
        helper.result()


def _each(work: Callable[[S], None], items: Sequence[S]) -> None:
    for item in items:
        work(item)


def copy_serially(to: Tensor, source: Tensor) -> None:
    """to <- source of the same dtype, without OpenMP threads on the CPU."""
    if to.device.type == "cpu":
        to.numpy()[...] = source.numpy()
    else:
        to.copy_(source)


@cache
def _helpers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="boltzsample")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)  # a fork has no threads


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def halved(backend: Backend, lanes: int) -> Backend | None:
    """The backend with half as many lanes in a chunk; None when a chunk is one lane already."""
    now = min(backend.chunk or lanes, lanes)
    return None if now <= 1 else replace(backend, chunk=(now + 1) // 2)
