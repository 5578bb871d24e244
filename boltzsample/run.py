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
from boltzsample.falls import falls
from boltzsample.flags import Flag, flag
from boltzsample.improper import follow, improper_flags
from boltzsample.locate import locate
from boltzsample.progress import Interrupt, Progress
from boltzsample.results import Result
from boltzsample.samplers.importance import Importance
from boltzsample.samplers.sampler import Budget, Ledger, Run, Sampler, Verdict
from boltzsample.settings import describe
from boltzsample.streams import root
from boltzsample.target import Target
from boltzsample.witnesses import CLIMBS, ROUNDS, no_audit, optimum_audit, together


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
    data: Draws | None = None,
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
    False uses a fitted sampler as it is. data: draws to learn from first (a `bz.Draws`, weighted or not), for methods with a flow.
    replicates: independent runs. witness: look a second time for missed mode mass. progress: bars on or off; None: where stderr
    is a terminal.

    Ctrl-C returns what is there, flagged INTERRUPTED. If the density raises, the exception carries what was drawn as `.partial`.

    Raises the errors of preflight (ShapeError, DtypeError, GradMismatchError, ...), InitFailed, PositiveInfinityError, ValueError.

    >>> import boltzsample as bz
    >>> target = bz.from_log_prob(lambda x: -0.5 * (x**2).sum(-1), dim=2)
    >>> bz.sample(target, method="mcmc", n=1_000, seed=0).expectation(lambda x: x[..., 0]).status
    <Status.OK: 'ok'>
    """
    _check_arguments(target, n, replicates)
    sampler, name = _sampler(method)
    if data is not None and not (sampler.learns and fit):
        how = "" if fit else " with fit=False"
        raise ValueError(f"data= was given, but {name} does not learn from draws{how}; wanted a method with a flow")
    sampler.check(target, data)
    backend = make_backend(device, dtype, compile, chunk)
    stream, ledger, began = root(seed), Ledger(), time.monotonic()
    limit = _budget(budget)
    with _quiet(backend), Interrupt() as interrupt:
        with _timed(ledger, "starts"):
            source = locate(target, starts, modes, backend, stream, ledger, limit, witness)
        run = Run(backend, stream, source, ledger, limit, Progress(progress), interrupt, replicates, _reserve(limit, witness), began=began)
        with _timed(ledger, "starts"):
            rays = follow(target, source, backend, stream, ledger)
            run.notes.extend(improper_flags(rays))
            far, fall = falls(target, source, rays, backend, stream, ledger)
        if fit:
            with _timed(ledger, "warm-up"):
                sampler = sampler.fit(target, run, data)
        draws = _draw(sampler, target, n, run)
        parts = [replace(part, far=far, fall=fall) for part in _split(draws, replicates)]
        with _timed(ledger, "witness"):
            verdicts = _witnesses(sampler, target, parts, run) if witness else [no_audit("witness=False")] * replicates
        if interrupt.requested and all(f.code != "INTERRUPTED" for f in (*draws.flags, *run.notes)):
            run.notes.append(flag("INTERRUPTED", severity="caution", detail="in the witness, after the draws"))
    config = _config(name, sampler, n, stream.seed, backend, replicates, fit, limit)
    results = tuple(
        _result(part, v.flags + tuple(run.notes), (v.sentence,) if v.sentence else (), target, sampler, config, ledger, replicates)
        for part, v in zip(parts, verdicts, strict=True)
    )
    if replicates == 1:
        return results[0]
    scope = "end to end" if fit else draws.scope
    said = results[0].draws.witnesses
    whole = replace(draws, evidence=(), scope=scope, ledger=ledger.phases, seconds=ledger.seconds, witnesses=said)
    return Result(whole, target, sampler, config, results)


def importance(target: Target, proposal: Any, n: int = 10_000, **settings: Any) -> Result:
    """Weighted draws of a proposal of your own: expectations and log Z with error bars, or the word that they cannot be trusted.

    proposal: a `torch.distributions.Distribution` over R^dim, a Flow, or an object with `sample(n)` and normalized `log_prob(x)`.
    settings: those of `bz.sample`. Raises TypeError, ShapeError and what `bz.sample` raises.

    >>> import boltzsample as bz
    >>> target = bz.from_log_prob(lambda x: -0.5 * (x**2).sum(-1), dim=1)
    >>> narrow = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(1), 0.2), 1)
    >>> bz.importance(target, narrow, seed=0).log_z()                # log sqrt(2 pi) = .919
    0... +- 0... (95%, UNTRUSTED(KHAT_W...))
    """
    return sample(target, Importance(proposal), n, **settings)


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
        return method, registry.name_of(method)
    if not isinstance(method, str):
        raise TypeError(f"method is a {type(method).__name__}; wanted a name ({', '.join(registry.METHODS)}) or a Sampler object")
    return registry.method(method).make(), method


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


def _reserve(budget: Budget, witness: bool) -> int:
    price = CLIMBS * ROUNDS // 2
    return price if witness and budget.evaluations is not None and budget.evaluations >= 5 * price else 0


def _draw(sampler: Sampler, target: Target, n: int, run: Run) -> Draws:
    with _timed(run.ledger, "sampling"):
        return sampler.sample(target, n, run)


def _witnesses(sampler: Sampler, target: Target, parts: list[Draws], run: Run) -> list[Verdict]:
    """The optimum audit and the method's own second look, together."""
    audits = optimum_audit(target, parts, getattr(sampler, "map", None), run)
    looks = sampler.second_look(target, parts, run)
    return [together(audit, own) for audit, own in zip(audits, looks, strict=True)]


def _split(draws: Draws, replicates: int) -> list[Draws]:
    """The draws of each replicate: equal parts of everything that counts units."""
    units = len(draws.x) // replicates
    tensors = {f.name: v for f in fields(draws) if f.name != "bad_x" and isinstance(v := getattr(draws, f.name), Tensor)}
    parts: list[dict[str, Any]] = [{name: v[r * units : (r + 1) * units] for name, v in tensors.items()} for r in range(replicates)]
    return [replace(draws, evidence=draws.evidence[r : r + 1], **part) for r, part in enumerate(parts)]


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


def _config(name: str, sampler: Sampler, n: int, seed: int, backend: Backend, replicates: int, fit: bool, budget: Budget) -> dict[str, Any]:
    return {
        "method": name,
        "log_z": sampler.log_z,
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
        "sampler": describe(sampler),
        "versions": {"boltzsample": version("boltzsample"), "torch": torch.__version__},
    }
