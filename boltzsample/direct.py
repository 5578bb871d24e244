"""Graphs called without Dynamo, once it is known what they take.

A compiled function looks at each call anew: guards over all that the traced code had seen, frames, contexts. That takes 80 to 290 us of
the 750 to 930 that four transitions of 1024 chains take (two wells in 32 dimensions), and a third of what they take for 64. A run
calls thousands of times with tensors of the same shapes. So the first call of its kind goes through Dynamo, and a backend notes which of
the tensors given arrived where in the graph, and which of its results came back where; the next ones go straight to the graph.

What counts as the same kind: types, shapes, strides and whatever else is in the tuples and frozen dataclasses given. Of other objects, a
density or a flow, that they are the same ones: they may not change while a run goes on, and what they do besides, counting their calls
say, they do while they are traced alone. Nothing is learned from a call that was given a tensor twice; where a result is none of the
graph's, calls stay with Dynamo. Dynamo takes a tensor given and the same one captured by a density for one input: give it `unshared` ones.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Plan:
    """graph: takes and returns flat tensors. takes: for each input the number of the tensor given, or a tensor of its own. returns: the
    result with the numbers of the graph's outputs in place of its tensors. kept: objects that may not be freed while their ids are keys."""

    graph: Callable[..., Sequence[Any]]
    takes: tuple[int | Tensor, ...]
    returns: Any
    kept: tuple[Any, ...] = field(repr=False)

    def __call__(self, given: list[Tensor]) -> Any:
        out = self.graph(*[given[i] if isinstance(i, int) else i for i in self.takes])
        return put_together(self.returns, out)


class Direct(Generic[T]):
    """A function of nested tuples and dataclasses that returns nested tuples of tensors, compiled as one static graph. compiling: compiles
    it by the backend that it is given. Where gradients are asked for, all calls stay with Dynamo.

    >>> double = Direct(lambda backend: torch.compile(lambda x: (2 * x,), backend=backend))
    >>> with torch.no_grad():
    ...     [float(double(torch.tensor(float(x)))[0]) for x in range(3)]
    [0.0, 2.0, 4.0]
    """

    def __init__(self, compiling: Callable[[Callable[..., Any]], Callable[..., T]]) -> None:
        self.plans: dict[Hashable, Plan | None] = {}
        self._dynamo = compiling(partial(noting, weakref.ref(self)))  # Dynamo keeps its backends for ever
        self._noted: tuple[Any, ...] | None = None
        self._last: dict[int, tuple[Any, Hashable, list[Tensor], list[Any]]] = {}  # by the number of an argument

    def __call__(self, *args: Any) -> T:
        given: list[Tensor] = []
        kind = tuple([self._part(i, value, given) for i, value in enumerate(args)])
        plan = self.plans.get(kind)
        if plan is not None and not torch.is_grad_enabled():
            return plan(given)  # type: ignore[no-any-return]
        self._noted = None
        result: T = self._dynamo(*args)
        if kind not in self.plans and len(set(map(id, given))) == len(given):  # else what was given could not be told apart
            self.plans[kind] = self._plan(given, result)
        self._noted = None
        return result

    def _part(self, i: int, value: Any, given: list[Tensor]) -> Hashable:
        """taken_apart of the i-th argument, remembered where it is the very one of the last call: kernels and views hardly ever change."""
        last, kind, tensors, others = self._last.get(i, (None, None, [], []))
        if value is not last:
            tensors, others = [], []
            kind = taken_apart(value, tensors, others)
            self._last[i] = value, kind, tensors, others
        given.extend(tensors)
        return kind

    def _plan(self, given: list[Tensor], result: Any) -> Plan | None:
        if self._noted is None or torch.is_grad_enabled():
            return None
        graph, inputs, out = self._noted
        number = {id(t): i for i, t in enumerate(given)}
        place = {id(t): i for i, t in enumerate(out)}
        found: list[Tensor] = []
        taken_apart(result, found, [])
        if not all(id(t) in place for t in found):
            return None
        kept = tuple(other for _, _, _, others in self._last.values() for other in others)
        return Plan(graph, tuple(number.get(id(t), t) for t in inputs), numbered(result, place), kept)


def noting(of: weakref.ref[Direct[Any]], graph: torch.fx.GraphModule, examples: list[Tensor], options: Any = None) -> Callable[..., Any]:
    """Inductor, as a backend that notes for a Direct what its graph was called with and what came back."""
    inductor: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")
    compiled = inductor(graph, examples, config_patches=options)

    def noted(*inputs: Any) -> Any:
        out, direct = compiled(*inputs), of()
        if direct is not None:
            direct._noted = compiled, inputs, out
        return out

    return noted


def taken_apart(value: Any, tensors: list[Tensor], others: list[Any]) -> Hashable:
    """Appends the tensors in it to `tensors`, and what is known by its id alone to `others`; returns what else there is to it."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple):
        return type(value), *[taken_apart(part, tensors, others) for part in value]
    if isinstance(value, PLAIN):
        return type(value), value  # 1 and 1.0 and True are equal
    kind: Any = type(value)
    names = field_names(kind)
    if names is None:
        others.append(value)
        return id(value)
    return kind, *[taken_apart(getattr(value, name), tensors, others) for name in names]


@cache
def field_names(kind: Any) -> tuple[str, ...] | None:
    """Those of a frozen dataclass."""
    params = getattr(kind, "__dataclass_params__", None)
    return tuple(f.name for f in fields(kind)) if params is not None and params.frozen else None


def unshared(value: Any) -> Any:
    """The same tuple or frozen dataclass with copies of its tensors, which nobody else can have."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        parts = [unshared(part) for part in value]
        return tuple(parts) if type(value) is tuple else type(value)(*parts)
    kind: Any = type(value)
    names = field_names(kind)
    if names is None:
        return value
    new = copy.copy(value)
    for name in names:
        object.__setattr__(new, name, unshared(getattr(value, name)))
    return new


def numbered(value: Any, place: dict[int, int]) -> Any:
    """A result of nested tuples, with `place` by id in place of tensors: an int, or a type and parts."""
    return place[id(value)] if isinstance(value, Tensor) else (type(value), [numbered(part, place) for part in value])


def put_together(form: Any, out: Sequence[Any]) -> Any:
    """The result of that form with the graph's outputs in it."""
    if isinstance(form, int):
        return out[form]
    made, parts = form
    of = [put_together(part, out) for part in parts]
    return tuple(of) if made is tuple else made(*of)
