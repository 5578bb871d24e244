"""Paths from noise to data with an exact denoiser: weights right at any step size, kernels as they should be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from boltzsample.densities import StudentT
from boltzsample.draws import Draws
from boltzsample.estimates.evidence import log_z
from boltzsample.maps import Diagonal
from boltzsample.networks import Posterior
from boltzsample.samplers.defended import defended, helps, mixed_ratio
from boltzsample.samplers.path_weights import Gaussian
from boltzsample.samplers.reverse import Ancestral, Corrected, Correlated, EulerMaruyama, Exponential, Reverse, Rule, ess, root
from boltzsample.schedules import OU, VE, VP, Levels, Localization, Schedule
from boltzsample.streams import Stream
from tests.closed_denoiser import MixtureDenoiser, gaussian, skew

RULES: list[Rule] = [Ancestral(), Ancestral(shaped=False), EulerMaruyama(), Exponential(), Corrected(), Corrected(Exponential(), 0.3)]
SCHEDULES: list[Schedule] = [VE(1e-3, 1e3), VP(scale=2.0), OU(), Localization()]
LOG_Z = 1.3
N = 4000


def reverse(exact: MixtureDenoiser, K: int, rule: Rule, schedule: Schedule = SCHEDULES[0]) -> Reverse:
    """Calibrated on draws of its own."""
    plain = Reverse(exact, Levels.even(schedule, 5.0, 0.1, K - 1).to_data(), rule)
    return plain.calibrated(exact.sample(2000, seed=1), Stream(1).rng())


def weights(exact: MixtureDenoiser, paths: Reverse, n: int = N) -> tuple[Tensor, Tensor]:
    path = paths.draw(n, exact.dim, Stream(2).rng())
    return path.x, path.log_ratio + exact.log_prob(path.x) + LOG_Z


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("exact", [gaussian(), skew()], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("K", [16, 64, 256])
def test_log_z_and_means_are_right_at_any_step(K: int, exact: MixtureDenoiser, rule: Rule) -> None:
    """Within 4.5 bars (7e-6) and bars of at most .1, where Euler's first steps are still very wrong."""
    x, log_w = weights(exact, reverse(exact, K, rule))
    found = log_z(Draws.from_arrays(x, log_w, log_w))
    assert abs(float(found.value) - LOG_Z) < 4.5 * float(found.stderr) and float(found.stderr) < 0.1
    w, truth = log_w.softmax(0), (exact.a[:, None] * exact.m).sum(0)
    mean = (w[:, None] * x).sum(0)
    assert ((mean - truth) / (w[:, None] * (x - mean)).square().sum(0).sqrt()).abs().max() < 4.5


def test_a_spread_as_thin_as_a_needle_is_a_law_all_the_same() -> None:
    """As a network gave it far from its data: rounding leaves the second of these matrices without a root."""
    M = torch.tensor([[[1.0, 0.5], [0.5, 0.34]], [[1.7987e-26, 2.8956e-13], [2.8956e-13, 4.6607]]], dtype=torch.float64)
    L = root(M)
    torch.testing.assert_close(L[0], torch.tensor([[1.0, 0.0], [0.5, 0.3]], dtype=torch.float64))
    torch.testing.assert_close(L[1], torch.diag(M[1].diagonal().sqrt()))
    assert bool(Correlated(torch.zeros(2, 2, dtype=torch.float64), L).log_prob(torch.ones(2, 2)).isfinite().all())


@pytest.mark.parametrize("rule", [*RULES[:4], Corrected(Exponential(), 0.02)], ids=str)
def test_fine_steps_leave_nearly_equal_weights(rule: Rule) -> None:
    """600 levels of a VP process, where alpha matters: without S a rule loses d/4 (range of log SNR)^2 / K = .18 nats."""
    levels = Levels.even(VP(scale=2.0), 30.0, 0.02, 600).to_data()
    assert ess(weights(skew(), Reverse(skew(), levels, rule), 1000)[1]) > 0.8


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_schedule(schedule: Schedule) -> None:
    _, log_w = weights(skew(), reverse(skew(), 32, Ancestral(), schedule))
    assert abs(float(log_w.logsumexp(0)) - math.log(N) - LOG_Z) < 4.5 * math.sqrt((1 / ess(log_w) - 1) / N)
    assert ess(log_w) > 0.8


def test_ancestral_paths_are_the_same_for_all_schedules() -> None:
    """In units of x / alpha every process is the variance-exploding one."""
    one, other = (weights(skew(), reverse(skew(), 16, Ancestral(), s))[1].mean() for s in (VE(1e-3, 1e3), VP(scale=2.0)))
    torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


def test_bounds_from_both_sides_and_their_order() -> None:
    """ELBO <= log Z <= EUBO, and the gap falls with more steps; S of the denoiser makes it smaller than a variance by level."""
    gaps = {}
    for K in (8, 32):
        for rule in (Ancestral(), Ancestral(shaped=False)):
            paths = reverse(skew(), K, rule)
            x = skew().sample(N, seed=5)
            upper = float((paths.back(x, Stream(6).rng()).log_ratio + skew().log_prob(x)).mean()) + LOG_Z
            lower = float(weights(skew(), paths)[1].mean())
            assert lower < LOG_Z < upper
            gaps[K, rule.shaped] = upper - lower
    assert gaps[32, True] < gaps[8, True] and gaps[8, True] < gaps[8, False] / 2 and gaps[32, True] < gaps[32, False] / 2


def test_a_wrong_density_of_a_kernel_is_seen() -> None:
    """Planted: the weight takes the kernel's standard deviation a tenth too large."""

    class Wrong(Ancestral):
        def forward(self, *args: object) -> object:  # type: ignore[override]
            law = super().forward(*args)  # type: ignore[arg-type]

            class Law:
                def draw(self, rng: object) -> Tensor:
                    return law.draw(rng)  # type: ignore[arg-type]

                def log_prob(self, x: Tensor) -> Tensor:
                    return Correlated(law.mean, 1.1 * law.L).log_prob(x)

            return Law()

    exact = skew()
    _, log_w = weights(exact, replace(reverse(exact, 16, Ancestral()), rule=Wrong()))
    assert abs(float(log_w.logsumexp(0)) - math.log(N) - LOG_Z) > 0.2


def test_calibration_mends_a_spread_that_is_wrong() -> None:
    """A denoiser that claims a third of the spread: k-hat and ESS of its paths are mended by the level factors from held-out draws."""
    exact = skew()

    def narrow(y: Tensor, s: Tensor) -> Posterior:
        D, S = exact(y, s)
        return Posterior(D, S / 3)

    levels = Levels.even(VE(1e-3, 1e3), 5.0, 0.1, 15).to_data()
    plain = Reverse(narrow, levels)
    mended = plain.calibrated(exact.sample(2000, seed=3), Stream(1).rng())
    assert mended.spread is not None and mended.spread.shape == (16, 1) and float(mended.spread[-1]) == pytest.approx(3, rel=0.05)
    assert ess(weights(exact, mended)[1]) > 3 * ess(weights(exact, plain)[1])


def test_the_density_of_a_correlated_kernel() -> None:
    g = torch.Generator().manual_seed(0)
    mean, B = torch.randn(5, 3, generator=g, dtype=torch.float64), torch.randn(5, 3, 3, generator=g, dtype=torch.float64)
    L = torch.linalg.cholesky(B @ B.mT + 0.1 * torch.eye(3).double())
    x = torch.ones(5, 3, dtype=torch.float64)
    wanted = torch.distributions.MultivariateNormal(mean, scale_tril=L).log_prob(x)
    torch.testing.assert_close(Correlated(mean, L).log_prob(x), wanted)
    draws = Correlated(mean[:1].expand(100_000, 3), L[:1].expand(100_000, 3, 3)).draw(Stream(0).rng())
    torch.testing.assert_close(draws.T.cov(), L[0] @ L[0].T, rtol=0.03, atol=0.03)
    diagonal = Correlated(mean, torch.diag_embed(L.diagonal(dim1=-2, dim2=-1))).log_prob(x)
    torch.testing.assert_close(diagonal, Gaussian(mean, L.diagonal(dim1=-2, dim2=-1)).log_prob(x))


def test_defensive_paths_bound_the_weights() -> None:
    """A denoiser of half the width loses the tails; with a share of wide paths no weight exceeds p / (.1 t_5), and log Z is right."""
    exact = gaussian()
    narrow = MixtureDenoiser(exact.a, exact.m, 0.5 * exact.sd)
    paths = Reverse(narrow, Levels.even(VE(1e-3, 1e3), 5.0, 0.1, 15).to_data())
    alone = weights(exact, paths, 20_000)[1]
    path = defended(paths, 20_000, 0.1, Stream(2).rng(), 2)
    log_w = path.log_ratio + exact.log_prob(path.z) + LOG_Z
    assert float(log_w.max()) < LOG_Z + math.log(10 * 12) < float(alone.max())  # p / t_5 is at most 12 on a grid
    assert abs(float(log_w.logsumexp(0)) - math.log(20_000) - LOG_Z) < 4.5 * math.sqrt((1 / ess(log_w) - 1) / 20_000)
    assert ess(log_w) > 3 * ess(alone)
    rng = Stream(0).rng()
    torch.testing.assert_close(mixed_ratio(path.z, path.log_ratio, 0.0, rng), path.log_ratio)


def test_defensive_paths_are_taken_where_they_help() -> None:
    """Paths of a normal law in ten dimensions: for a Student t they lack the tail, for the normal law itself they lack nothing."""
    normal, t = StudentT(Diagonal(torch.zeros(10), torch.ones(10)), df=1000), StudentT(Diagonal(torch.zeros(10), torch.ones(10)), df=5)
    for target, wanted in ((t, True), (normal, False)):
        rng = Stream(3).rng()
        z = target.sample(rng, 1000).double()
        log_ratio, log_p = -normal.log_prob(z).double(), target.log_prob(z).double()
        assert helps(0.1, z, log_ratio, log_p, rng) is wanted
        log_ratio[5] += 1500.0  # a path that kernels would hardly ever make
        assert helps(0.1, z, log_ratio, log_p, rng)


def test_paths_do_not_depend_on_how_many_go_together() -> None:
    paths = reverse(skew(), 8, Ancestral())
    x = paths.draw(2**14 + 3, 2, Stream(0).rng()).x
    torch.testing.assert_close(x[: 2**14], paths.draw(2**14, 2, Stream(0).rng()).x)
