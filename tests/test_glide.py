"""The quick way of compiled HMC: no masks of NaN, and where NaN was met the same noise again, the careful way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import boltzsample as bz
from boltzsample.backend import Backend, Doubt
from boltzsample.kernels import HMC, MALA
from boltzsample.kernels.chains import Chains
from boltzsample.kernels.kernel import Noise
from boltzsample.kernels.transitions import Path, glide, travel
from boltzsample.maps import Dense, Diagonal
from boltzsample.samplers.warm_up import spent
from boltzsample.streams import Stream
from boltzsample.target import Bare, LogProb, log_prob_and_grad
from boltzsample.views import Pullback
from tests.small import normal, normal_log_prob

SHEAR = Dense(torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([[2.0, 0.0], [-0.7, 0.5]], dtype=torch.float64))
UNIT = Diagonal(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
KERNEL = HMC(h=torch.tensor(0.4, dtype=torch.float64), L=4)


def nan_beyond(x: Tensor) -> Tensor:
    """N(0, I), NaN with its gradient where x_0 > 2."""
    return normal_log_prob(x) + 0.0 * (2.0 - x[..., 0]).sqrt()


def hard_edge(x: Tensor) -> Tensor:
    """N(0, I) cut at x_0 < 2; autograd's gradient is NaN beyond."""
    return torch.where(x[..., 0] < 2.0, normal_log_prob(x) + 0.0 * (2.0 - x[..., 0]).sqrt(), -torch.inf)


def nan_slope(x: Tensor) -> Tensor:
    """N(0, I), whose gradient (SLOPES) is NaN where x_0 > 1."""
    return normal_log_prob(x)


SLOPES = {nan_slope: lambda x: torch.where(x[..., :1] > 1.0, torch.nan, -x)}


def moving(
    log_prob: LogProb, map: Diagonal | Dense = UNIT, quick: bool = True, n: int = 64, eager: bool = True, kernel: Any = KERNEL
) -> Chains:
    """Chains that take themselves for compiled; with `eager` both ways are run as they are written."""
    x = Stream(0, ("points",)).rng().normal(1, n, 2).clamp(max=0.9)
    target = bz.from_log_prob(log_prob, dim=2, grad=SLOPES.get(log_prob))
    chains = Chains.start(target, kernel, map, x, Backend(compile=True), Stream(0), 0)
    if eager:
        chains.stepper._call, chains.glider._call = travel, glide
    if not quick:
        chains.doubts = {0: Doubt(left=10**9)}
    return chains


def run(chains: Chains, steps: int = 40) -> Path:
    paths = list(chains.strides(steps, "walk", 4))
    return Path(*(torch.cat(part) for part in zip(*paths, strict=True)))


@pytest.mark.parametrize("map", [UNIT, SHEAR], ids=["unit", "shear"])
@pytest.mark.parametrize("log_prob", [nan_beyond, hard_edge, nan_slope, normal_log_prob])
def test_what_counts_is_what_the_careful_way_gives(log_prob: LogProb, map: Diagonal | Dense) -> None:
    quick, careful = moving(log_prob, map), moving(log_prob, map, quick=False)
    a, b = run(quick), run(careful)
    assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))
    assert all(torch.equal(u.nan_to_num(9e9), v.nan_to_num(9e9)) for u, v in zip(quick.meter, careful.meter, strict=True))
    assert all(torch.equal(u, v) for u, v in zip(quick.state, careful.state, strict=True))
    assert quick.rows == careful.rows == 40 * 64 and careful.again == 0
    assert (quick.again > 0) == (log_prob is not normal_log_prob)
    assert (int(quick.meter.nan.sum()) > 0) == (log_prob is nan_beyond)


def test_the_quick_way_alone_would_lose_trajectories() -> None:
    """The teeth of the test above: where only the slope is NaN, throwing away what it touched is another chain."""

    def blind(kernel: Any, view: Any, state: Any, meter: Any, noise: Any) -> Any:
        state, (moves, divergent), path, _ = glide(kernel, view, state, meter, noise)
        return state, meter._replace(moves=moves, divergent=divergent), path

    quick, careful = moving(nan_slope), moving(nan_slope, quick=False)
    quick.stepper._call = blind
    assert not torch.equal(run(quick).x, run(careful).x)


def test_what_was_made_in_vain_is_paid_for() -> None:
    chains = moving(nan_beyond)
    run(chains)
    assert chains.again > 0 and chains.again % (4 * 64) == 0
    assert spent(chains) == (chains.rows + chains.again) * 4 + chains.inits


def test_doubt_grows_with_each_failure() -> None:
    doubt = Doubt()
    tried = []
    for t in range(16):
        if doubt.tries():
            tried.append(t)
            doubt.failed()
    assert tried == [0, 2, 6, 14]
    sure = Doubt()
    assert all(sure.tries() for _ in range(9))


def test_each_chunk_decides_for_itself() -> None:
    """A lane that meets NaN does not change how its neighbour moves."""

    def bad(x: Tensor) -> Tensor:
        return normal_log_prob(x) + 0.0 * (40.0 - x[..., 0]).sqrt()

    chains = moving(bad, n=128)
    chains.state = chains.state._replace(x=chains.state.x + torch.tensor([39.9, 0.0]) * (torch.arange(128) >= 64)[:, None])
    chains.backend = replace(chains.backend, chunk=1)
    run(chains, 8)
    assert chains.doubts[0].failures == 0 < chains.doubts[64].failures


def test_a_bare_target_keeps_its_nan() -> None:
    target, x = bz.from_log_prob(nan_beyond, dim=2), torch.tensor([[3.0, 1.0]])
    assert bool(log_prob_and_grad(Bare(Pullback(Bare(target), UNIT)), x.double())[1][0, 0].isnan())
    assert not bool(log_prob_and_grad(Pullback(target, UNIT), x.double())[1].isnan().any())


def test_kernels_that_would_keep_a_nan_never_glide() -> None:
    assert moving(normal_log_prob).glides and not moving(normal_log_prob, kernel=MALA()).glides
    eager = Chains.start(normal(), KERNEL, UNIT, torch.zeros(1, 64, 2, dtype=torch.float64), Backend(compile=False), Stream(0), 0)
    assert not eager.glides


def test_compiled_the_two_ways_agree() -> None:
    """Up to rounding: multiply-adds are one instruction in the quick graph."""
    quick, careful = (moving(nan_beyond, SHEAR, quick=q, eager=False) for q in (True, False))
    noise = quick._noise("walk", 0)
    for chains in (quick, careful):
        assert isinstance(noise, Noise)
        path = chains.move(Noise(*(part[:2] for part in noise)))
        assert chains.stepper.compiled and chains.glider.compiled
        assert bool(path.x.isfinite().all())
    assert torch.allclose(quick.state.x, careful.state.x, rtol=0, atol=1e-10)
    assert torch.equal(quick.meter.nan, careful.meter.nan) and torch.equal(quick.meter.moves, careful.meter.moves)
