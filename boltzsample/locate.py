"""Where a run begins: preflight, the user's starts and modes brought to the sampler's space, the wide source."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from boltzsample.backend import Backend
from boltzsample.errors import GradMismatchError, ImproperSuspected, InitFailed, ShapeError
from boltzsample.improper import follow, improper_flags
from boltzsample.preflight import check_gradient, check_interface
from boltzsample.samplers.sampler import Budget, Ledger
from boltzsample.samplers.starts import Starts, user_starts
from boltzsample.samplers.wide_source import wide_source
from boltzsample.streams import Stream
from boltzsample.target import Target

SEARCH_PRICE = 20_000  # evaluations the wide source may take


def locate(
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
        _check_gradient(target, source, given, backend, stream, ledger)
    return source


def _check_gradient(target: Target, source: Starts, given: Tensor | None, backend: Backend, stream: Stream, ledger: Ledger) -> None:
    """Raises GradMismatchError; ImproperSuspected where the points are ones that a density with no finite integral drew the search to, as
    the pole of 1/x, where nothing agrees with differences."""
    try:
        checked = check_gradient(target, _some_starts(source, given))
    except GradMismatchError as error:
        improper = improper_flags(follow(target, source, backend, stream, ledger))
        if not improper:
            raise
        raise ImproperSuspected(
            f"{improper[0].detail}, and a density with a finite integral falls faster than 1/r (where the search for starts ended, its "
            "gradient does not agree with differences of log_prob, either); add the prior or the bound that makes it a density"
        ) from error
    ledger.add("preflight", (checked.log_prob_rows, checked.grad_rows))


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
