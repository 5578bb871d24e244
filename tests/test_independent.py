"""Independence and scale moves against exact draws, as tests/test_kernels.py does it: every |z| is under 4.5 with probability 1 - 7e-6."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from boltzsample.backend import Backend, compile_whole
from boltzsample.kernels import HMC, Independent, LocalThenIndependent, PointState, Scaling
from boltzsample.kernels.chains import Chains
from boltzsample.kernels.transitions import Meter, advance
from boltzsample.maps import Diagonal
from boltzsample.streams import Stream
from boltzsample.views import Pullback
from tests.counted import Counted
from tests.test_kernels import SHEARED, judge, keeps, tensor

UNITS = Pullback(SHEARED, Diagonal(tensor(0.2, -1.9), tensor(1.4, 1.2)))
MOVES: dict[str, Any] = {
    "Metropolis": Independent(),
    "i-SIR 2": Independent(candidates=2),
    "i-SIR 5": Independent(candidates=5, scale=3.0, share=0.4),
    "HMC and Metropolis": LocalThenIndependent(HMC(h=tensor(0.8), L=2), Independent()),
    "HMC and i-SIR": LocalThenIndependent(HMC(h=tensor(0.8), L=2), Independent(candidates=3)),
    "scale": Scaling(),
}


@pytest.mark.parametrize("name", MOVES)
def test_keeps_the_law(name: str) -> None:
    keeps(MOVES[name], UNITS, UNITS.map.pull(SHEARED.exact(50_000)))


def test_a_pattern_of_wide_proposals_would_not() -> None:
    """What the module says it avoids: proposals all from the wide part, judged by the density of the mixture."""
    kernel, start = Independent(scale=2.0), UNITS.map.pull(SHEARED.exact(50_000))
    state, rng = kernel.init(UNITS, start), Stream(1).rng()
    for _ in range(20):
        noise = kernel.draw(rng, (50_000,), 2)
        state, _ = kernel.step(UNITS, state, noise._replace(uniform=torch.zeros_like(noise.uniform)))
    assert judge(start, state.x, UNITS.log_prob).abs().max() > 4.5


@pytest.mark.parametrize("name", MOVES)
def test_price_is_what_is_asked(name: str) -> None:
    target = Counted(SHEARED)
    kernel = MOVES[name]
    state = kernel.init(target, SHEARED.exact(10))
    before = target.grad_rows
    kernel.step(target, state, kernel.draw(Stream(0).rng(), (10,), 2))
    assert (target.log_prob_rows, target.grad_rows - before) == (0, 10 * kernel.price[1])


def test_scale_moves_need_no_gradient() -> None:
    target, (kernel, other), x = Counted(SHEARED), (Scaling(gradient=False), Scaling()), SHEARED.exact(10)
    noise = kernel.draw(Stream(0).rng(), (10,), 2)
    state, _ = kernel.step(target, kernel.init(target, x), noise)
    assert isinstance(state, PointState) and (target.log_prob_rows, target.grad_rows) == (20, 0)
    torch.testing.assert_close(state.x, other.step(SHEARED, other.init(SHEARED, x), noise)[0].x)


@pytest.mark.parametrize("name", MOVES)
def test_compiled_is_eager(name: str) -> None:
    kernel, x = MOVES[name], SHEARED.exact(64)
    noise = kernel.draw(Stream(0).rng(), (64,), 2)
    eager = kernel.step(SHEARED, kernel.init(SHEARED, x), noise)[0]
    compiled = compile_whole(lambda state, noise: kernel.step(SHEARED, state, noise)[0])(kernel.init(SHEARED, x), noise)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("candidates", [1, 4])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_undefined_density_is_never_entered(candidates: int, bad: float) -> None:
    class Torn:
        dim = 2

        def log_prob(self, x: Tensor) -> Tensor:
            return torch.where(x[..., 0] > 0, bad, -0.5 * x.square().sum(-1))

        def grad_log_prob(self, x: Tensor) -> Tensor:
            return -x

    kernel, x = Independent(candidates=candidates), tensor(-1.0, 0.0).expand(500, 2)
    noise = kernel.draw(Stream(0).rng(), (500,), 2)
    state, meter, _ = advance(kernel, Torn(), kernel.init(Torn(), x), Meter.zeros(x), noise)
    assert bool((state.x[:, 0] <= 0).all()) and bool((state.x != x).any())
    assert int((meter.nan + meter.posinf).sum()) > 100


def test_chains_take_noise_of_any_shape() -> None:
    kernel = LocalThenIndependent(HMC(h=tensor(0.8), L=2), Independent(candidates=3))
    unit = Diagonal(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    x = SHEARED.exact(2, 128)
    moved = {}
    for chunk in (None, 1):
        chains = Chains.start(SHEARED, kernel, unit, x, Backend(chunk=chunk, compile=False), Stream(0), 0)
        moved[chunk] = torch.stack([p.x[-1] for p in chains.strides(3, "draw", 1)])
    torch.testing.assert_close(moved[None], moved[1], rtol=0, atol=0)


