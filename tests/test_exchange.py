"""Swaps between temperatures, and log Z over a ladder of them.

Exact draws at every level: with p_0 = Exp(1) on a line and p = e^(-3x) x, the levels p_0^(1-b) p^b are Gamma(1 + b, 1 + 2b).
Every |z| below is under 4.5 with probability 1 - 7e-6; there are about 60.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from boltzsample.estimates.bennett import ladder_log_z
from boltzsample.kernels.exchange import Swaps, exchange, take
from boltzsample.streams import Stream

BETA = torch.tensor([0.0, 0.15, 0.5, 1.0], dtype=torch.float64)
LADDERS = 200_000


def log_ratio(x: Tensor) -> Tensor:
    """s = log p - log p_0."""
    return x.log() - 2 * x


def exact(ladders: int, seed: int = 0) -> Tensor:
    """Independent draws of all levels (levels, ladders)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        law = torch.distributions.Gamma((1 + BETA)[:, None].expand(-1, ladders), (1 + 2 * BETA)[:, None])
        return law.sample()


def rounds(x: Tensor, n: int, wrong: float = 1.0) -> Tensor:
    """x after n rounds; `wrong`: a factor on s, which plants an error."""
    rng = Stream(1, ("swaps",)).rng()
    for t in range(n):
        swaps = exchange(wrong * log_ratio(x), BETA, rng.uniform(len(BETA) - 1, x.shape[-1]), odd=bool(t % 2))
        x = take(x, swaps.source)
    return x


def scores(start: Tensor, end: Tensor) -> Tensor:
    """z of the change of x, x^2 and log x at each level over the ladders, paired."""
    change = torch.stack([f(end) - f(start) for f in (lambda x: x, torch.square, torch.log)])
    return change.mean(-1) / (change.std(-1) / math.sqrt(change.shape[-1]))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_swaps_keep_every_level(n: int) -> None:
    start = exact(LADDERS)
    end = rounds(start, n)
    assert float((end != start).double().mean()) > 0.3
    z = scores(start, end)
    assert float(z[z.isfinite()].abs().max()) < 4.5, z


def test_a_wrong_ratio_is_seen() -> None:
    start = exact(LADDERS)
    z = scores(start, rounds(start, 5, wrong=0.8))
    assert float(z.abs().max()) > 10


def test_neighbours_take_turns() -> None:
    s, sure = torch.zeros(5, 3), torch.full((4, 3), 0.5)
    beta = torch.linspace(0, 1, 5)
    assert exchange(s, beta, sure, odd=False).source[:, 0].tolist() == [1, 0, 3, 2, 4]
    assert exchange(s, beta, sure, odd=True).source[:, 0].tolist() == [0, 2, 1, 4, 3]


def test_a_swap_is_made_if_and_only_if_log_u_is_below_log_r() -> None:
    beta, u = torch.tensor([0.2, 0.7], dtype=torch.float64), torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    s = torch.stack([torch.full_like(u, 1.0), torch.full_like(u, 1.8)])
    swaps = exchange(s, beta, u[None], odd=False)
    assert torch.equal(swaps.source[0] == 1, u.log() < 0.5 * (1.0 - 1.8))
    torch.testing.assert_close(swaps.accept_prob, torch.full((1, 99), math.exp(-0.4), dtype=torch.float64))


@pytest.mark.parametrize("lost", [-math.inf, math.nan])
def test_points_without_density_stay_at_the_base(lost: float) -> None:
    swaps = exchange(torch.tensor([[lost], [0.0]]), torch.tensor([0.0, 1.0]), torch.full((1, 1), 1e-30), odd=False)
    assert swaps.source.flatten().tolist() == [0, 1] and float(swaps.accept_prob) == 0


def test_replicates_have_ladders_of_their_own() -> None:
    beta = torch.stack([BETA, BETA**2])
    x, u = exact(2000).expand(2, -1, -1), Stream(2).rng().uniform(2, 3, 2000)
    both = exchange(log_ratio(x), beta, u, odd=False)
    for r in range(2):
        alone: Swaps = exchange(log_ratio(x[r]), beta[r], u[r], odd=False)
        assert torch.equal(both.source[r], alone.source) and torch.equal(both.accept_prob[r], alone.accept_prob)
    points = torch.stack([x, -x], -1)
    assert torch.equal(take(points, both.source)[..., 0], take(x, both.source))


# ---- log Z over the ladder ----

LOG_Z = -2 * math.log(3)  # of e^(-3x) x


def test_log_z_and_its_error_from_exact_draws() -> None:
    """400 replicates of 16 ladders x 10 rounds: the mean error within 4.5 of its standard errors, the bars within 15% of the spread."""
    R, ladders, n = 400, 16, 10
    s = log_ratio(exact(R * ladders * n)).reshape(4, n, R, ladders).permute(1, 2, 0, 3)
    log_z, psi = ladder_log_z(s, BETA.expand(R, -1))
    error = log_z - LOG_Z
    bars = psi.mean(2).std(1) / math.sqrt(ladders)
    assert psi.shape == (R, ladders, n) and float(psi.mean((1, 2)).abs().max()) < 1e-6
    assert abs(float(error.mean())) < 4.5 * float(error.std()) / math.sqrt(R) < 0.02
    assert 0.85 < float(bars.square().mean().sqrt() / error.std()) < 1.15


def test_the_error_of_the_sum_sees_draws_that_levels_share() -> None:
    """The same noise at all levels, and at all rounds of a ladder: errors add up instead of averaging out."""
    R, ladders, n = 400, 16, 10
    g = exact(R * ladders, seed=3)[0].reshape(R, ladders)  # Exp(1) by its rank: the quantiles of all levels at one u
    from scipy.stats import gamma

    u = -torch.expm1(-g)
    x = torch.stack([torch.as_tensor(gamma.ppf(u.numpy(), 1 + float(b), scale=1 / (1 + 2 * float(b)))) for b in BETA], 1)
    s = log_ratio(x).expand(n, -1, -1, -1)
    log_z, psi = ladder_log_z(s, BETA.expand(R, -1))
    bars = psi.mean(2).std(1) / math.sqrt(ladders)
    assert 0.8 < float(bars.square().mean().sqrt() / log_z.std()) < 1.2
    naive = psi.flatten(1).std(1) / math.sqrt(ladders * n)  # as if rounds were independent
    assert float(naive.mean() / log_z.std()) < 0.5


def test_log_z_with_a_base_that_is_wider_than_the_support() -> None:
    """p = 1 on (0, 1), p_0 = U(0, 4): three quarters of the base have no density."""
    x = torch.rand(50, 1, 2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, :, 0] *= 4
    s = torch.where(x < 1, math.log(4), -torch.inf)
    log_z, psi = ladder_log_z(s, torch.tensor([[0.0, 1.0]]))
    assert abs(float(log_z)) < 4.5 * float(psi.mean(2).std(1)) / 8 < 0.2


def test_log_z_bears_a_few_huge_ratios() -> None:
    s = log_ratio(exact(6400)).reshape(4, 100, 1, 64).permute(1, 2, 0, 3).clone()
    plain, _ = ladder_log_z(s, BETA[None])
    s[0, 0, 0, :3] = torch.tensor([-1e300, -1e200, -torch.inf], dtype=torch.float64)
    huge, psi = ladder_log_z(s, BETA[None])
    assert abs(float(huge - plain)) < 0.02 and bool(psi.isfinite().all())


def test_no_density_at_all_is_nan() -> None:
    s = torch.zeros(10, 1, 2, 8, dtype=torch.float64)
    s[:, :, 0] = -torch.inf
    assert bool(ladder_log_z(s, torch.tensor([[0.0, 1.0]]))[0].isnan().all())
