"""The probability flow: its order, the exact log-det of its steps, and what Hutchinson's probes cost."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from boltzsample.networks import Posterior
from boltzsample.samplers.probability_flow import Flowing, ProbabilityFlow
from boltzsample.samplers.reverse import ess
from boltzsample.schedules import VE, VP, Levels, Schedule
from boltzsample.streams import Stream
from tests.closed_denoiser import MixtureDenoiser, gaussian, skew
from tests.small import codes

LOG_Z, N = 1.3, 4000


def flowing(of: MixtureDenoiser, K: int, order: int = 2, schedule: Schedule = VE(1e-3, 1e3), **more: bool) -> Flowing:  # noqa: B008
    return Flowing(of, Levels.even(schedule, 5.0, 0.1, K - 1).to_data(), order, **more)


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("K", [16, 64, 256])
def test_weights_are_exact_at_any_step(K: int, order: int) -> None:
    """Within 4.5 bars, and bars of at most .1, at 16 steps as at 256."""
    n = N if K < 256 else 1000
    path = flowing(skew(), K, order).draw(n, 2, Stream(2).rng())
    log_w = path.log_ratio + skew().log_prob(path.x) + LOG_Z
    bar = math.sqrt((1 / ess(log_w) - 1) / n)
    assert abs(float(log_w.logsumexp(0)) - math.log(n) - LOG_Z) < 4.5 * bar and bar < 0.1


def test_any_schedule() -> None:
    """In units of x / alpha it is the same equation: the same start gives the same weights."""
    one, other = (flowing(skew(), 24, 2, s).draw(500, 2, Stream(0).rng()) for s in (VE(1e-3, 1e3), VP(scale=2.0)))
    torch.testing.assert_close(one.log_ratio, other.log_ratio, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [2, 4])
def test_the_order_of_the_solver(order: int) -> None:
    """Twice the steps, an error 2^order times smaller, against 512 steps of Runge and Kutta, for ends and log-det."""
    y = 5 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best, log_det, _ = flowing(gaussian(), 512, 4)._solved(y, None)
    errors = []
    for K in (17, 33):
        end, volume, _ = flowing(gaussian(), K, order)._solved(y, None)
        errors.append((float((end - best).abs().mean()), float((volume - log_det).abs().mean())))
    for coarse, fine in zip(*errors, strict=True):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("order", [2, 4])
def test_the_log_det_is_that_of_the_discrete_map(order: int) -> None:
    flow = flowing(skew(), 6, order)
    y = 3 * torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, log_det, noise = flow._solved(y, None)
    for i in range(5):
        J = torch.autograd.functional.jacobian(lambda v: flow._solved(v[None], None)[0][0], y[i])
        assert float(torch.linalg.slogdet(J)[1]) == pytest.approx(float(log_det[i]), abs=1e-9)
    assert float(noise.max()) == 0


def test_probes_estimate_the_trace_and_say_how_noisy_they_are() -> None:
    """Correlated Jacobians in 40 dimensions: their noise is in the weights, and HUTCH_NOISE says so; quiet for diagonal ones."""
    d = 40
    a = torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    C = a @ a.T / d + 0.2 * torch.eye(d, dtype=torch.float64)
    C = C / C.diagonal().mean()

    def exact(y: torch.Tensor, s: torch.Tensor) -> Posterior:
        s2 = s.square()
        G = torch.linalg.solve(C + s2 * torch.eye(d, dtype=y.dtype), C)
        return Posterior(y @ G.T, torch.linalg.cholesky(s2 * (G + G.T) / 2).expand(*y.shape, d))

    def log_gamma(x: torch.Tensor) -> torch.Tensor:
        return LOG_Z + torch.distributions.MultivariateNormal(torch.zeros(d).double(), C).log_prob(x)

    levels = Levels.even(VE(1e-3, 1e3), 5.0, 0.1, 40).to_data()
    rough = Flowing(exact, levels, 4)
    path = rough.draw(2000, d, Stream(0).rng())
    log_w = path.log_ratio + log_gamma(path.x)
    y = rough._start(2000, d, Stream(0).rng()).draw(Stream(1).rng())
    s2 = float(rough._solved(y, rough._probes(2000, d, Stream(2).rng()))[2].mean())
    assert s2 > 0.1 and "HUTCH_NOISE" in codes_of(rough, d)
    true = replace(rough, exact=True).draw(300, d, Stream(0).rng())
    exact_w = true.log_ratio + log_gamma(true.x)
    assert abs(float(exact_w.logsumexp(0)) - math.log(300) - LOG_Z) < 0.2
    assert float(log_w.var()) - float(exact_w.var()) == pytest.approx(s2, rel=0.35)

    def plain(y: torch.Tensor, s: torch.Tensor) -> Posterior:
        return Posterior(y / (1 + s.square()), (s / (1 + s.square()).sqrt()).expand_as(y))

    assert not codes_of(Flowing(plain, levels, 4), d)


def test_few_steps_are_doubted() -> None:
    """SOLVER_BIAS where half as long steps change the log-det; quiet where they do not, and where the log-det is the discrete map's.
    Of two steps it is off by .071, of 80 by 1e-10."""
    few, many = flowing(gaussian(), 2, 2, exact=False), flowing(gaussian(), 80, 4, exact=False)
    assert "SOLVER_BIAS" in codes_of(few, 2) and not codes_of(many, 2)
    assert not codes_of(flowing(gaussian(), 2, 2), 2)


def codes_of(flow: Flowing, dim: int) -> set[str]:
    class Said:
        flags = flow.doubts(dim, Stream(5).rng())

    return codes(Said)


def test_orders_are_checked() -> None:
    with pytest.raises(ValueError, match="wanted 2"):
        ProbabilityFlow(3)
