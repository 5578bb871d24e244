"""bz.sample: preflight, starts, fit, sample, witness -> Result. Everything that one call fixes is fixed here, once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor

from boltzsample import registry
from boltzsample.backend import Backend, make_backend
from boltzsample.draws import Draws
from boltzsample.errors import InitFailed, ShapeError
from boltzsample.flags import Flag, flag
from boltzsample.preflight import check_gradient, check_interface
from boltzsample.progress import Interrupt, Progress
from boltzsample.results import Result
from boltzsample.samplers.sampler import Budget, Ledger, Run, Sampler
from boltzsample.samplers.starts import Starts, user_starts
from boltzsample.samplers.wide_source import wide_source
from boltzsample.streams import Stream, root
from boltzsample.target import Target
from boltzsample.witnesses import CLIMBS, ROUNDS, no_audit, optimum_audit

SEARCH_PRICE = 20_000  # evaluations the wide source may take


def sample(
    target: Target,
    method: str | Sampler = "auto",
    n: int = 4_000,
    *,
    seed: int | None = None,
    starts: Any = None,
    modes: Any = None,
    budget: int | Budget | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    compile: bool | Literal["auto"] = "auto",
    chunk: int | None = None,
    fit: bool = True,
    replicates: int = 1,
    witness: bool = True,
    progress: bool | None = None,
) -> Result:
    """Sample an unnormalized density; ask the Result for expectations with error bars.

    target: anything with dim, log_prob and grad_log_prob; make one with `bz.from_log_prob`. method: a name
    (`boltzsample methods`) or a Sampler. n: draws wanted in all, at least. seed: an int, or None to draw one (it is recorded).
    starts: points (k, dim) or (dim,) in the user's space to start from; None searches for a wide source. modes: points (k, dim)
    near modes the user knows. budget: evaluations of the density (an int), or a `bz.Budget`. device, dtype: float64 on CPU and
    float32 on CUDA by default. compile: True, False or "auto" (a fixed rule). chunk: lanes of 64 chains moved at once. fit:
    False uses a fitted sampler as it is. replicates: independent runs in one batch. witness: look a second time for missed mode
    mass. progress: bars on or off; None: where stderr is a terminal.

    Ctrl-C returns what is there, flagged INTERRUPTED. If the density raises, the exception carries what was drawn as `.partial`.

    Raises the errors of preflight (ShapeError, DtypeError, GradMismatchError, ...), InitFailed, PositiveInfinityError, ValueError.

    >>> import boltzsample as bz
    >>> target = bz.from_log_prob(lambda x: -0.5 * (x**2).sum(-1), dim=2)
    >>> bz.sample(target, method="mcmc", n=1_000, seed=0).expectation(lambda x: x[..., 0]).status
    <Status.OK: 'ok'>
    """
    _check_arguments(target, n, replicates)
    sampler, name = _sampler(method)
    backend = make_backend(device, dtype, compile, chunk)
    stream, ledger, began = root(seed), Ledger(), time.monotonic()
    limit = _budget(budget)
    with _quiet(backend), Interrupt() as interrupt:
        with _timed(ledger, "starts"):
            source = _starts(target, starts, modes, backend, stream, ledger, limit, witness)
        run = Run(backend, stream, source, ledger, limit, Progress(progress), interrupt, replicates, _reserve(limit, witness), began=began)
        if fit:
            with _timed(ledger, "warm-up"):
                sampler = sampler.fit(target, run)
        draws = _draw(sampler, target, n, run)
        parts = _split(draws, replicates)
        with _timed(ledger, "witness"):
            verdicts = optimum_audit(target, parts, getattr(sampler, "map", None), run) if witness else None
    if verdicts is None:
        verdicts = [no_audit("witness=False")] * replicates
    config = _config(name, sampler, n, stream.seed, backend, replicates, fit, limit)
    notes = (*run.notes, *((flag("AUTO_IS_MCMC"),) if method == "auto" else ()))
    results = tuple(
        _result(part, v.flags + notes, (v.sentence,) if v.sentence else (), target, sampler, config, ledger, replicates)
        for part, v in zip(parts, verdicts, strict=True)
    )
    if replicates == 1:
        return results[0]
    whole = replace(draws, ledger=ledger.phases, seconds=ledger.seconds, witnesses=results[0].draws.witnesses)
    return Result(whole, target, sampler, config, results)


def _check_arguments(target: Any, n: int, replicates: int) -> None:
    if not isinstance(target, Target):
        hint = "wrap the function: bz.from_log_prob(fn, dim=...)" if callable(target) else "it needs dim, log_prob and grad_log_prob"
        raise TypeError(f"target is a {type(target).__name__}; wanted a Target: {hint}")
    for name, value in (("n", n), ("replicates", replicates)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10**12:
            raise ValueError(f"{name} is {value!r}; wanted an integer from 1 to 10^12")


def _budget(budget: Any) -> Budget:
    if budget is None or isinstance(budget, Budget):
        return budget or Budget()
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise ValueError(f"budget is {budget!r}; wanted an integer number of evaluations, or bz.Budget(evaluations=, seconds=)")
    return Budget(evaluations=budget)


def _sampler(method: str | Sampler) -> tuple[Sampler, str]:
    if isinstance(method, Sampler):
        return method, type(method).__name__.lower()
    if not isinstance(method, str):
        raise TypeError(f"method is a {type(method).__name__}; wanted a name ({', '.join(registry.METHODS)}) or a Sampler object")
    name = registry.AUTO if method == "auto" else method
    return registry.method(name).make(), name


@contextmanager
def _quiet(backend: Backend) -> Iterator[None]:
    """No autograd tape, no inference mode, no autocast of the caller's: the run behaves the same wherever it is called."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(backend.device.type, enabled=False):
        yield


@contextmanager
def _timed(ledger: Ledger, phase: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        ledger.seconds[phase] = ledger.seconds.get(phase, 0.0) + time.monotonic() - began


def _starts(
    target: Target, starts: Any, modes: Any, backend: Backend, stream: Stream, ledger: Ledger, budget: Budget, witness: bool
) -> Starts:
    """Preflight, then the user's starts, the wide source, or both (the witness must not depend on the user's starts)."""
    points = stream.child("preflight").rng(backend.dtype, backend.device).normal(8, target.dim)
    seen = check_interface(target, points)
    ledger.add("preflight", (seen.log_prob_rows, seen.grad_rows))
    given = None if starts is None else _located("starts", starts, target, backend, ledger)
    known = None if modes is None else _located("modes", modes, target, backend, ledger)
    affordable = budget.evaluations is None or budget.evaluations >= 2 * SEARCH_PRICE
    if given is None and not affordable:
        raise ValueError(
            f"budget is {budget.evaluations} evaluations, and the search for starts alone may take {SEARCH_PRICE}; "
            f"wanted at least {2 * SEARCH_PRICE}, or starts="
        )
    source = Starts(None, given=given, has_gradient=seen.has_gradient)
    if given is None or (witness and affordable):
        source = _searched(target, source, known, backend, stream, ledger)
    if seen.has_gradient:
        checked = check_gradient(target, _some_starts(source, given))
        ledger.add("preflight", (checked.log_prob_rows, checked.grad_rows))
    return source


def _searched(target: Target, source: Starts, modes: Tensor | None, backend: Backend, stream: Stream, ledger: Ledger) -> Starts:
    """The source with the wide base; without it where only the witness asked for one and there is none to be found."""
    try:
        wide = wide_source(target, backend, stream, gradient=source.has_gradient, modes=modes)
    except InitFailed as error:
        if source.given is None:
            raise
        ledger.add("starts", (error.rows, 0))
        return source
    ledger.add("starts", wide.rows)
    return replace(wide, given=source.given)


def _located(name: str, points: Any, target: Target, backend: Backend, ledger: Ledger) -> Tensor:
    """The user's points in the sampler's space (k, dim). Raises ShapeError, InitFailed."""
    points = _on(points, backend)
    pull = getattr(target, "pull", None)
    x = user_starts(name, points if pull is None else _pulled(name, points, pull), target.dim)
    good = target.log_prob(x).isfinite()
    ledger.add("starts", (len(x), 0))
    if not bool(good.all()):
        raise InitFailed(
            f"{int((~good).sum())} of {len(x)} {name} have log_prob -inf or NaN, the first at {x[~good][0].tolist()}; "
            "wanted points inside the support"
        )
    return x


def _on(points: Any, backend: Backend) -> Any:
    """Points, or a dict of named ones, in the run's dtype and on its device."""
    if isinstance(points, dict):
        return {name: _on(value, backend) for name, value in points.items()}
    return torch.as_tensor(points).detach().to(backend.device, backend.dtype)


def _pulled(name: str, points: Any, pull: Any) -> Tensor:
    try:
        z: Tensor = pull(points)
    except (RuntimeError, ValueError) as error:
        came = f" of shape {tuple(points.shape)}" if isinstance(points, Tensor) else ""
        raise ShapeError(f"{name}{came} are no points of the density's support ({_first(error)})") from error
    return z


def _first(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def _some_starts(source: Starts, given: Tensor | None) -> Tensor:
    """A few points of finite log_prob for the check of the gradient."""
    if given is not None:
        return given[:3]
    assert source.reached is not None
    return source.reached[torch.linspace(0, len(source.reached) - 1, 3).long()]


def _reserve(budget: Budget, witness: bool) -> int:
    price = CLIMBS * ROUNDS // 2
    return price if witness and budget.evaluations is not None and budget.evaluations >= 5 * price else 0


def _draw(sampler: Sampler, target: Target, n: int, run: Run) -> Draws:
    with _timed(run.ledger, "sampling"):
        return sampler.sample(target, n, run)


def _split(draws: Draws, replicates: int) -> list[Draws]:
    """The draws of each replicate: equal parts of everything that counts units."""
    units = len(draws.x) // replicates
    tensors = {f.name: v for f in fields(draws) if f.name != "bad_x" and isinstance(v := getattr(draws, f.name), Tensor)}
    parts: list[dict[str, Any]] = [{name: v[r * units : (r + 1) * units] for name, v in tensors.items()} for r in range(replicates)]
    return [replace(draws, **part) for part in parts]


def _result(
    draws: Draws,
    flags: tuple[Flag, ...],
    witnesses: tuple[str, ...],
    target: Target,
    sampler: Sampler,
    config: dict[str, Any],
    ledger: Ledger,
    replicates: int,
) -> Result:
    share = {phase: (a // replicates, b // replicates) for phase, (a, b) in ledger.phases.items()}
    seconds = {phase: s / replicates for phase, s in ledger.seconds.items()}
    draws = replace(draws, flags=draws.flags + flags, witnesses=witnesses, ledger=share, seconds=seconds)
    return Result(draws, target, sampler, config)


def _config(
    name: str, sampler: Sampler, n: int, seed: int, backend: Backend, replicates: int, fit: bool, budget: Budget
) -> dict[str, Any]:
    line = registry.METHODS.get(name)
    return {
        "method": name,
        "log_z": bool(line and line.log_z),
        "n": n,
        "seed": seed,
        "replicates": replicates,
        "fit": fit,
        "budget": {"evaluations": budget.evaluations, "seconds": budget.seconds},
        "device": str(backend.device),
        "dtype": str(backend.dtype).removeprefix("torch."),
        "compile": backend.compile,
        "chunk": backend.chunk,
        "threads": torch.get_num_threads(),
        "sampler": settings(sampler),
        "versions": {"boltzsample": version("boltzsample"), "torch": torch.__version__},
    }


def settings(obj: Any) -> dict[str, Any]:
    """The plain settings of a sampler or kernel: numbers, names and nested settings; of tensors only the shape."""
    out: dict[str, Any] = {"class": type(obj).__name__}
    for f in fields(obj):
        value = getattr(obj, f.name)
        if isinstance(value, Tensor):
            out[f.name] = f"tensor{tuple(value.shape)}"
        elif hasattr(value, "__dataclass_fields__"):
            out[f.name] = settings(value)
        else:
            out[f.name] = value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
    return out
