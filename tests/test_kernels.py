"""Kernels against exact draws. Paired: each chain is compared with its own start, so 200,000 chains see a shift of 1% of a deviation.

Every |z| below is under 4.5 with probability 1 - 7e-6, and there are about 200 of them: with another seed (or another torch) this
file fails falsely in 14 runs of 10,000. `python -m benchmarks mutants` shows what it catches.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from boltzsample.adapters import from_log_prob
from boltzsample.backend import compile_whole
from boltzsample.kernels import HMC, MALA, ULA, ChainState, Noise, PointState, RandomWalk, StepInfo, metropolis
from boltzsample.kernels.transitions import Meter, advance
from boltzsample.maps import Dense, Diagonal
from boltzsample.streams import Stream
from boltzsample.target import Target
from boltzsample.views import Constrained, Observed, Pullback, Tempered
from tests.counted import Counted

CHAINS = 200_000
STEPS = 5


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


@dataclass(frozen=True)
class Sheared:
    """x = m + A y with y_i the logarithm of a Gamma(i) variable: skewed, correlated, with two different tails."""

    m: Tensor = field(default_factory=lambda: tensor(0.5, -2.0))
    A: Tensor = field(default_factory=lambda: tensor([[1.1, 0.0], [-0.6, 0.9]]))
    A_inv: Tensor = field(default_factory=lambda: tensor([[1 / 1.1, 0.0], [0.6 / 0.99, 1 / 0.9]]))

    @property
    def dim(self) -> int:
        return 2

    def y(self, x: Tensor) -> Tensor:
        return (x - self.m.to(x)) @ self.A_inv.to(x).mT

    def log_prob(self, x: Tensor) -> Tensor:
        y = self.y(x)
        return (tensor(1.0, 2.0).to(x) * y - y.exp()).sum(-1)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return (tensor(1.0, 2.0).to(x) - self.y(x).exp()) @ self.A_inv.to(x)

    def exact(self, *batch: int, seed: int = 0) -> Tensor:
        u = Stream(seed, ("exact",)).rng().uniform(*batch, 3).clamp(min=1e-300)
        e = -u.log()  # Gamma(1) and Gamma(2) as sums of exponentials
        return self.m + torch.stack([e[..., 0], e[..., 1] + e[..., 2]], -1).log() @ self.A.mT


SHEARED = Sheared()
KERNELS: dict[str, Any] = {
    "random walk": RandomWalk(h=tensor(2.0)),
    "MALA": MALA(h=tensor(0.8)),
    "HMC 1": HMC(h=tensor(1.3), L=1),
    "HMC 8": HMC(h=tensor(0.8), L=8),
}
EXACT = pytest.mark.parametrize("name", KERNELS)
M, S = tensor(3.0, -1.0), tensor(1.5, -0.4)
L = tensor([[1.5, 0.0], [-0.9, 0.4]])


def run(kernel: Any, target: Target, x: Tensor, steps: int = STEPS, seed: int = 1) -> Any:
    """The state after some steps from x (*batch, dim)."""
    state, rng = kernel.init(target, x), Stream(seed, ("noise",)).rng(x.dtype)
    for _ in range(steps):
        state, _ = kernel.step(target, state, kernel.draw(rng, x.shape[:-1], x.shape[-1]))
    return state


def judge(start: Tensor, end: Tensor, log_p: Callable[[Tensor], Tensor]) -> Tensor:
    """z scores of the change of x_i, x_i^2, x_0 x_1, exp(x_i / 2) and log p over the chains: standard normal if the law was kept."""

    def f(x: Tensor) -> Tensor:
        columns = [x, x.square(), x[..., :1] * x[..., 1:2], (0.5 * x.clamp(max=50)).exp(), log_p(x)[..., None]]
        return torch.cat(columns, -1).double().reshape(-1, 3 * x.shape[-1] + 2)

    change = f(end) - f(start)
    return change.mean(0) / (change.std(0) / math.sqrt(len(change)))


def keeps(kernel: Any, target: Any, start: Tensor) -> None:
    """Assert that the kernel moves exact draws and keeps their law, and that its state is what it says."""
    state = run(kernel, target, start)
    torch.testing.assert_close(state.log_p, target.log_prob(state.x), rtol=1e-4, atol=1e-4)
    assert moved(start, state.x)
    z = judge(start, state.x, target.log_prob)
    assert z.abs().max() < 4.5, z.tolist()


def moved(start: Tensor, end: Tensor) -> bool:
    """Whether the mean squared jump of every coordinate is a tenth of that to an independent draw, or more."""
    jump = (end - start).square().reshape(-1, start.shape[-1]).mean(0) / (2 * start.reshape(-1, start.shape[-1]).var(0))
    return bool((jump > 0.1).all())


# ---- the law is kept ----


@EXACT
def test_keeps_the_law(name: str) -> None:
    keeps(KERNELS[name], SHEARED, SHEARED.exact(CHAINS))


@EXACT
@pytest.mark.parametrize("onto", [Diagonal(M, S), Dense(M, L)], ids=["diagonal", "dense"])
def test_keeps_the_law_through_a_map(name: str, onto: Any) -> None:
    keeps(KERNELS[name], Pullback(SHEARED, onto), onto.pull(SHEARED.exact(CHAINS // 2)))


@EXACT
def test_keeps_the_law_on_a_support(name: str) -> None:
    gamma = from_log_prob(lambda x: (tensor(0.0, 1.0).to(x) * x.log() - x).sum(-1), dim=2)
    target = Constrained(gamma, constraints.positive)
    e = -Stream(2).rng().uniform(CHAINS // 2, 3).clamp(min=1e-300).log()
    keeps(KERNELS[name], target, target.pull(torch.stack([e[:, 0], e[:, 1] + e[:, 2]], -1)))


@EXACT
def test_keeps_the_law_with_a_step_for_each_replicate(name: str) -> None:
    x, h = SHEARED.exact(3, CHAINS // 4), KERNELS[name].h * tensor([[0.6], [1.0], [1.3]])
    kernel = replace(KERNELS[name], h=h)
    keeps(kernel, SHEARED, x)
    noise = kernel.draw(Stream(3).rng(), (3, 100), 2)
    together = kernel.step(SHEARED, kernel.init(SHEARED, x[:, :100]), noise)[0].x
    for r in range(3):
        one = replace(kernel, h=h[r])
        alone = one.step(SHEARED, one.init(SHEARED, x[r, :100]), Noise(*(part[r] for part in noise)))[0].x
        torch.testing.assert_close(together[r], alone)


@EXACT
def test_keeps_the_law_in_float32(name: str) -> None:
    kernel = replace(KERNELS[name], h=KERNELS[name].h.float())
    start = SHEARED.exact(CHAINS // 4, seed=4).float()
    keeps(kernel, SHEARED, start)
    assert run(kernel, SHEARED, start[:4]).x.dtype == torch.float32


@dataclass(frozen=True)
class Still:
    """Stays where it is, which keeps every law."""

    def step(self, target: Target, state: Any, noise: Noise) -> tuple[Any, StepInfo]:
        return metropolis(state, state, torch.full_like(state.log_p, -torch.inf), noise.uniform)


def test_staying_put_is_no_sampling() -> None:
    x = SHEARED.exact(100)
    state = ChainState(x, SHEARED.log_prob(x), SHEARED.grad_log_prob(x))
    noise = MALA(tensor(0.1)).draw(Stream(0).rng(), (100,), 2)
    assert not moved(x, Still().step(SHEARED, state, noise)[0].x)


# ---- the coin ----


def test_the_coin() -> None:
    r, u, p = tensor([-math.inf, -3.0, -0.5, 0.0, 0.5, math.inf, math.nan]), tensor([0.0, 0.04, 0.06, 0.6, 0.7, 0.9999]), tensor([-1.0])
    log_r, uniform, log_p = (t.flatten() for t in torch.meshgrid(r, u, p, indexing="ij"))
    old, new = PointState(torch.zeros(42, 1), torch.zeros(42)), PointState(torch.ones(42, 1), log_p)
    state, info = metropolis(old, new, log_r, uniform)
    expected = [v > -math.inf and not math.isnan(v) and (w == 0 or math.log(w) < v) for v in r.tolist() for w in u.tolist()]
    assert info.accepted.tolist() == expected == (state.x[:, 0] == 1).tolist()
    torch.testing.assert_close(state.log_p, torch.where(info.accepted, log_p, 0.0))
    torch.testing.assert_close(info.accept_prob, log_r.nan_to_num(nan=-math.inf, posinf=9.0).exp().clamp(max=1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@EXACT
def test_a_proposal_without_a_density_is_rejected_and_counted(name: str, bad: float) -> None:
    torn = from_log_prob(lambda x: torch.where(x[:, 0] > 0, x[:, 0] * 0 + bad, -0.5 * x.square().sum(-1)), dim=2)
    kernel, x = KERNELS[name], -tensor([[1.0, 1.0]]).expand(64, 2)
    noise = kernel.draw(Stream(5).rng(), (64,), 2)._replace(uniform=torch.zeros(64))
    state, meter, accept = advance(kernel, torn, kernel.init(torn, x), Meter.zeros(x), noise)
    hit = (meter.nan if math.isnan(bad) else meter.posinf) > 0
    assert hit.any() and bool(state.log_p.isfinite().all())
    assert bool((state.x[hit] == x[hit]).all()) and bool((accept[hit] == 0).all())


def test_zero_density_is_never_entered() -> None:
    half = from_log_prob(lambda x: torch.where(x[:, 0] > 0, -torch.inf, -0.5 * x.square().sum(-1)), dim=2)
    for kernel in [*KERNELS.values(), ULA(tensor(0.5))]:
        x = run(kernel, half, -tensor([[1.0, 1.0]]).expand(1000, 2)).x
        assert bool((x[:, 0] <= 0).all()) and moved(x.new_zeros(1000, 2) - 1 + 1e-3 * x, x)


# ---- formulae, point by point ----


@dataclass
class Seen:
    """Remembers where its target was asked."""

    target: Target
    points: list[Tensor] = field(default_factory=list)
    dim: int = 2

    def log_prob(self, x: Tensor) -> Tensor:
        return self.target.log_prob(x)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        self.points.append(x)
        return self.target.grad_log_prob(x)


@pytest.mark.parametrize("steps", [1, 8])
def test_hmc_there_and_back(steps: int) -> None:
    """Flip the momentum at the end: the way back ends at the start, and r is exp of the energy lost."""
    kernel, x = HMC(h=tensor(0.3), L=steps), SHEARED.exact(200)
    target, noise = Seen(SHEARED), MALA(tensor(0.1)).draw(Stream(6).rng(), (200,), 2)._replace(uniform=torch.zeros(200))
    there, info = kernel.step(target, kernel.init(target, x), noise)
    e = (0.3 * (1 + 0.3 * (2 * noise.jitter - 1)))[:, None]
    p = (target.points[-1] - target.points[-2]) / e + 0.5 * e * SHEARED.grad_log_prob(there.x)
    back, info_back = kernel.step(SHEARED, there, noise._replace(normal=-p))
    torch.testing.assert_close(back.x, x, rtol=0, atol=1e-10)
    energy = [0.5 * q.square().sum(-1) - SHEARED.log_prob(at) for at, q in ((x, noise.normal), (there.x, p))]
    torch.testing.assert_close((info.accept_prob / info_back.accept_prob).log(), energy[0] - energy[1])


@pytest.mark.parametrize("kind", [MALA, ULA])
def test_langevin_acceptance(kind: Any) -> None:
    h, x = tensor(0.4), SHEARED.exact(200)
    kernel = kind(h)
    noise = kernel.draw(Stream(7).rng(), (200,), 2)
    info = kernel.step(SHEARED, kernel.init(SHEARED, x), noise)[1]

    def log_q(to: Tensor, start: Tensor) -> Tensor:
        return torch.distributions.Normal(start + h * SHEARED.grad_log_prob(start), math.sqrt(0.8)).log_prob(to).sum(-1)

    r = (SHEARED.log_prob(info.x) + log_q(x, info.x) - SHEARED.log_prob(x) - log_q(info.x, x)).exp()
    torch.testing.assert_close(info.accept_prob, r.clamp(max=1))


@pytest.mark.parametrize(("name", "order"), [("random walk", 1.0), ("MALA", 1.5), ("HMC 1", 3.0), ("HMC 8", 3.0)])
def test_acceptance_tends_to_one_at_the_right_rate(name: str, order: float) -> None:
    """1 - E min(1, r) = O(h^order). A wrong gradient or drift, which the coin would repair, costs one order at least."""
    x, miss = SHEARED.exact(20_000), []
    noise = KERNELS[name].draw(Stream(8).rng(), (20_000,), 2)
    for h in (0.02, 0.01):
        kernel = replace(KERNELS[name], h=tensor(h if name != "HMC 8" else h / 2))
        miss.append(1 - kernel.step(SHEARED, kernel.init(SHEARED, x), noise)[1].accept_prob.mean())
    assert miss[1] < 0.05
    assert abs(math.log2(miss[0] / miss[1]) - order) < 0.15, math.log2(miss[0] / miss[1])


def test_ula_has_the_bias_it_must_have() -> None:
    """For N(0, s^2) the law of ULA is N(0, s^2 / (1 - h / (2 s^2)))."""
    s, h = tensor(1.0, 2.0), 0.6
    target = from_log_prob(lambda x: -0.5 * (x / s).square().sum(-1), dim=2, grad=lambda x: -x / s.square())
    var = run(ULA(tensor(h)), target, s * Stream(9).rng().normal(CHAINS, 2), steps=25).x.var(0)
    stationary = s.square() / (1 - h / (2 * s.square()))
    se = stationary * math.sqrt(2 / CHAINS)
    assert bool(((var - stationary).abs() < 4.5 * se).all()) and bool((var - s.square() > 15 * se).all())


@pytest.mark.parametrize("kernel", [*KERNELS.values(), ULA(tensor(0.1))], ids=lambda k: f"{type(k).__name__}{getattr(k, 'L', '')}")
def test_price(kernel: Any) -> None:
    target = Counted(SHEARED)
    state = run(kernel, target, SHEARED.exact(7), steps=0)
    init = (target.log_prob_rows, target.grad_rows)
    assert init == ((7, 0) if kernel.price[1] == 0 else (0, 7)) and state.log_p.shape == (7,)
    run(kernel, target, SHEARED.exact(7), steps=3)
    assert (target.log_prob_rows, target.grad_rows) == tuple(2 * i + 21 * p for i, p in zip(init, kernel.price, strict=True))


# ---- compiled ----


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler for torch.compile")
def test_fifty_values_of_h_beta_and_y_in_one_graph() -> None:
    rng, x = Stream(10).rng(), SHEARED.exact(2, 8)
    step, kernel = compile_whole(advance), MALA(h=tensor(1.0))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(50):
            own = replace(kernel, h=rng.uniform(2, 1))
            posterior = Observed(Tempered(SHEARED, rng.uniform(2, 8)), rng.normal(2, 8, 2), rng.uniform(2, 1), rng.uniform(2, 1) + 0.1)
            target = Pullback(posterior, Dense(rng.normal(2, 1, 2), L + 0.1 * rng.uniform(2, 1, 1)))
            args = own, target, own.init(target, x), Meter.zeros(x), own.draw(rng, (2, 8), 2)
            torch.testing.assert_close(step(*args), advance(*args), rtol=1e-10, atol=1e-10, equal_nan=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
