"""Graphs called without Dynamo give what Dynamo's calls give, and know when a call is of another kind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import boltzsample as bz
import boltzsample.direct as module
from boltzsample.backend import Backend, compile_whole
from boltzsample.direct import Direct
from boltzsample.kernels import HMC
from boltzsample.kernels.chains import Chains
from boltzsample.maps import Diagonal
from boltzsample.streams import Stream
from boltzsample.views import Tempered
from tests.small import normal

SCALE = torch.tensor([1.0, 10.0])


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Settings:
    factor: Tensor
    times: int = 1


def step(settings: Settings, pair: Pair) -> tuple[Pair, Tensor]:
    a = SCALE * pair.a * settings.factor + settings.times
    return Pair(a, a - pair.b), a.sum()


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def direct(fn: Callable[..., Any]) -> Direct[Any]:
    return Direct(lambda backend: compile_whole(fn, {}, backend))


def pair(*shape: int) -> Pair:
    return Pair(torch.randn(*shape), torch.randn(*shape))


def moving(target: Any, map: Diagonal | None = None) -> Chains:
    """Eight compiled chains in three dimensions."""
    unit = Diagonal(torch.zeros(1, 1, 3), torch.ones(1, 1, 3)) if map is None else map
    kernel, backend = HMC(h=torch.full((1, 1), 0.8), L=2), Backend(dtype=torch.float32, compile=True)
    return Chains.start(target, kernel, unit, torch.zeros(1, 8, 3), backend, Stream(0), 10**6)


def same(one: Any, other: Any) -> bool:
    return torch.allclose(one[0].a, other[0].a) and torch.allclose(one[0].b, other[0].b) and torch.allclose(one[1], other[1])


def test_calls_of_one_kind_go_straight_to_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    quick = direct(step)
    quick(Settings(torch.tensor(2.0)), pair(3, 2))
    assert len(quick.plans) == 1 and None not in quick.plans.values()
    monkeypatch.setattr(quick, "_dynamo", None)  # it would be called in vain
    for factor in (0.5, -3.0):
        args = Settings(torch.tensor(factor)), pair(3, 2)
        result = quick(*args)
        assert same(result, step(*args)) and type(result[0]) is Pair


@pytest.mark.parametrize(
    "args",
    [
        (Settings(torch.tensor(2.0)), pair(4, 2)),
        (Settings(torch.tensor(2.0), times=7), pair(3, 2)),
        (Settings(torch.tensor(2), times=1.5), Pair(torch.ones(3, 2, dtype=torch.int64), torch.ones(3, 2))),  # type: ignore[arg-type]
        (Settings(torch.tensor(2.0)), Pair(torch.randn(2, 3).T, torch.randn(3, 2))),
        (Settings(torch.tensor([2.0, 3.0])), pair(3, 2)),
    ],
    ids=["shape", "number", "dtype", "strides", "shape of a setting"],
)
def test_another_kind_is_traced_anew(args: tuple[Settings, Pair]) -> None:
    quick = direct(step)
    for _ in range(2):
        first = Settings(torch.tensor(2.0)), pair(3, 2)
        assert same(quick(*first), step(*first)) and same(quick(*args), step(*args))


def test_nothing_is_learned_from_a_tensor_given_twice() -> None:
    quick, settings = direct(step), Settings(torch.tensor(2.0))
    for args in ((settings, Pair(*[torch.randn(3, 2)] * 2)), (settings, pair(3, 2)), (settings, pair(3, 2))):
        assert same(quick(*args), step(*args))


def test_equal_numbers_of_other_types_are_other_kinds() -> None:
    quick = direct(lambda s, x: (x * s.times,))
    x = torch.ones(2, dtype=torch.int64)
    assert [quick(Settings(SCALE, times), x)[0].dtype for times in (1, 1.0, True, 1)] == [  # type: ignore[arg-type]
        torch.int64, torch.float32, torch.int64, torch.int64,
    ]


def test_results_that_no_graph_has_computed_stay_with_dynamo() -> None:
    quick = direct(lambda x: (x, x + 1))
    for x in (torch.zeros(2), torch.ones(2)):
        given, more = quick(x)
        assert given is x and more.equal(x + 1)
    assert list(quick.plans.values()) == [None]


def test_gradients_are_left_to_dynamo() -> None:
    quick, x = direct(lambda x: ((3 * x).sum(),)), torch.ones(2, requires_grad=True)
    with torch.enable_grad():
        for _ in range(2):
            (grad,) = torch.autograd.grad(quick(x)[0], x)
            assert grad.tolist() == [3, 3]


def test_gradients_are_left_to_dynamo_where_a_plan_is_known() -> None:
    quick, x = direct(lambda x: ((3 * x).sum(),)), torch.ones(2)
    quick(x)
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(quick(x.requires_grad_())[0], x)
    assert grad.tolist() == [3, 3]


def test_nothing_outlives_its_run() -> None:
    class Density:
        dim = 3

        def log_prob(self, x: Tensor) -> Tensor:
            return -0.5 * x.square().sum(-1)

        def grad_log_prob(self, x: Tensor) -> Tensor:
            return -x

    density = Density()
    chains = moving(density)
    list(chains.strides(8, "some", 4))
    assert chains.glider.compiled and any(chains.glider._call.plans.values())  # type: ignore[attr-defined]
    gone = weakref.ref(density), weakref.ref(chains.buffer.normal)
    del chains, density
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_another_target_by_the_same_map_is_another_view() -> None:
    chains = moving(normal(3))
    list(chains.strides(4, "cold", 4))
    chains.target = Tempered(normal(3), torch.tensor(0.0))
    chains.retune(chains.kernel, chains.map)
    assert sum(float(path.accept_prob.min()) for path in chains.strides(8, "flat", 4)) == 2.0  # beta = 0: every proposal is accepted


def test_a_map_that_the_density_knows_may_change() -> None:
    """Dynamo takes a tensor given and the same one captured for one input."""
    m, s = torch.full((1, 1, 3), 3.0), torch.ones(1, 1, 3)
    target = bz.from_log_prob(lambda x: -0.5 * ((x - m[0, 0]) / s[0, 0]).square().sum(-1), dim=3)
    chains = moving(target, Diagonal(m, s))
    list(chains.strides(40, "first", 4))
    chains.retune(chains.kernel, Diagonal(torch.zeros(1, 1, 3), 2 * torch.ones(1, 1, 3)))
    x = torch.cat([path.x for path in chains.strides(2000, "second", 4)])
    assert (x.mean((0, 1, 2)) - 3).abs().max() < 0.1 and (x.std((0, 1, 2)) - 1).abs().max() < 0.1


def test_a_meter_begun_anew_is_no_new_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counters had been one tensor, and everything was compiled twice: for one, and for two."""
    compiled: list[int] = []
    backend = module.noting

    def counted(*args: Any, **options: Any) -> Any:
        compiled.append(1)
        return backend(*args, **options)

    monkeypatch.setattr(module, "noting", counted)
    chains = moving(normal(3))
    for name in ("first", "second"):
        list(chains.strides(8, name, 4))
        chains.forget()
    assert len(compiled) == 1 and chains.again == 0
