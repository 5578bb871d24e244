"""Schedules against their SDEs, inverses, and the algebra of levels."""

from __future__ import annotations

import math

import pytest
import torch

from boltzsample.schedules import OU, VE, VP, Levels, LinearSDE, Localization, Schedule

SCHEDULES: dict[str, Schedule] = {
    "ou": OU(scale=1.7),
    "vp": VP(scale=0.6),
    "ve": VE(0.02, 30.0),
    "classic": Localization(1.0, 0.0, scale=2.0),
    "log-linear": Localization(2.0, 0.0),
    "geometric": Localization(1.0, 1.0, scale=1.5),
    "geometric(2,1)": Localization(2.0, 1.0),
    "sde": LinearSDE(lambda t: -0.5 - t, lambda t: 1 + t.square(), T=2.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_inverts_log_snr(name: str) -> None:
    s = SCHEDULES[name]
    wanted = torch.linspace(-2.5, 9.0, 24, dtype=torch.float64)
    t = s.time(wanted)
    torch.testing.assert_close(2 * (s.alpha(t).log() - s.sigma(t).log()), wanted, rtol=1e-9, atol=1e-9)


SDES = {  # drift coefficient f(t) and g(t)^2 of dx = f x dt + g dW
    "ou": (OU(1.7), lambda t: -1 + 0 * t, lambda t: 2 * 1.7**2 + 0 * t),
    "vp": (VP(scale=0.6), lambda t: -(0.1 + 19.9 * t) / 2, lambda t: 0.36 * (0.1 + 19.9 * t)),
    "ve": (VE(0.02, 30.0), lambda t: 0 * t, lambda t: 2 * math.log(1500) * (0.02 * 1500**t) ** 2),
    "sde": (LinearSDE(lambda t: t.cos(), lambda t: 1 + t, T=1.0), lambda t: t.cos(), lambda t: (1 + t) ** 2),
}


@pytest.mark.parametrize("name", SDES)
def test_marginals_solve_the_moment_equations_of_the_sde(name: str) -> None:
    """d log alpha / dt = f and d sigma^2 / dt = 2 f sigma^2 + g^2, by central differences."""
    s, f, g2 = SDES[name]
    t, e = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-5
    d_log_alpha = (s.alpha(t + e).log() - s.alpha(t - e).log()) / (2 * e)
    d_variance = (s.sigma(t + e).square() - s.sigma(t - e).square()) / (2 * e)
    torch.testing.assert_close(d_log_alpha, f(t), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(d_variance, 2 * f(t) * s.sigma(t).square() + g2(t), rtol=1e-6, atol=1e-8)


def test_simulated_sde_has_the_marginals() -> None:
    """200,000 Euler paths of the VP equation, 400 steps; |z| < 4.5 of mean and variance (1.4e-5 a comparison), step error < .002."""
    vp, gen = VP(scale=0.6), torch.Generator().manual_seed(0)
    x, h = torch.full((200_000,), 2.0, dtype=torch.float64), 1 / 1600
    for i in range(400):
        b = 0.1 + 19.9 * (i + 0.5) * h
        x = x - b / 2 * x * h + (b * h) ** 0.5 * 0.6 * torch.randn(x.shape, generator=gen, dtype=x.dtype)
    t = torch.tensor(0.25, dtype=torch.float64)
    mean, sd = 2.0 * vp.alpha(t), vp.sigma(t)
    assert abs(x.mean() - mean) < 4.5 * sd / len(x) ** 0.5 + 0.002
    assert abs(x.var() / sd.square() - 1) < 4.5 * (2 / len(x)) ** 0.5 + 0.004


def test_quadrature_agrees_with_the_closed_form() -> None:
    vp = VP()
    same = LinearSDE(lambda t: -(0.1 + 19.9 * t) / 2, lambda t: (0.1 + 19.9 * t).sqrt())
    t = torch.tensor([1e-8, 1e-4, 0.01, 0.3, 1.0], dtype=torch.float64)
    torch.testing.assert_close(same.alpha(t), vp.alpha(t), rtol=1e-11, atol=0)
    torch.testing.assert_close(same.sigma(t), vp.sigma(t), rtol=1e-9, atol=0)


def test_a_vanishing_diffusion_is_refused() -> None:
    with pytest.raises(ValueError, match="g vanishes"):
        LinearSDE(lambda t: 0 * t, lambda t: 0 * t)


@pytest.mark.parametrize("name", SCHEDULES)
def test_kernels_between_levels_keep_the_marginals(name: str) -> None:
    """Adding noise to level k + 1 gives level k; the ancestral step from level k, x_0 known, gives level k + 1."""
    levels = Levels.even(SCHEDULES[name], noise=3.0, data=0.05, K=7).to_data()
    for k in range(levels.steps):
        (a, c), (A, B, C) = levels.noising(k), levels.ancestral(k)
        one, var = levels.alpha, levels.sigma.square()
        torch.testing.assert_close(a * one[k + 1], one[k])
        torch.testing.assert_close(a**2 * var[k + 1] + c**2, var[k])
        torch.testing.assert_close(A * one[k] + B, one[k + 1])
        torch.testing.assert_close(A**2 * var[k] + C**2, var[k + 1])
        torch.testing.assert_close(A * var[k], a * var[k + 1])  # the covariance of neighbours, from either side


def test_levels_that_do_not_fall_are_refused() -> None:
    with pytest.raises(ValueError, match="falling from noise to data"):
        Levels(torch.ones(3, dtype=torch.float64), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
