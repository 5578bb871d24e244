"""The zoo: what is special to one family, against published numbers, brute force and symmetry."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from benchmarks.evidence import unlike
from targets.closed_forms import closed_form
from targets.controls import CONTROLS, Cauchy, control, infinite_variance_pair
from targets.curved import two_modes_curved
from targets.dw4_truth import energy, metropolis_draws, symmetric
from targets.long_runs import moments
from targets.mixture import ExpandedMixture, GaussianMixture
from targets.mixture_forms import bent_half_spaces, cells, half_spaces
from targets.modes import eight_gaussians, gmm40_fab, gmm40_means, two_modes, two_modes_near, unequal_widths
from targets.particles import dw4, helmert
from targets.phi4 import Phi4
from targets.problem import Quantity, read_truth
from targets.rings import rings_pis, rings_slips
from targets.transfer_matrix import marginals
from targets.truncated import TruncatedGaussian, truncated_gaussian
from targets.wells import many_well, multi_well
from tests.zoo import generator, skewed


def known(target: object) -> dict[str, Quantity]:
    return {q.name: q for q in closed_form(target)}


# mixtures


def test_the_means_of_fab_are_those_of_its_recipe() -> None:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    means = (torch.rand((40, 2)) - 0.5) * 2 * 40
    torch.set_rng_state(state)
    assert torch.equal(torch.tensor(gmm40_means(), dtype=torch.float32), means)
    assert float(gmm40_fab().target.scales[0, 0]) == pytest.approx(1.3132616875)  # type: ignore[attr-defined]


def test_matrix_products_only_where_float32_allows() -> None:
    assert isinstance(gmm40_fab().target, ExpandedMixture) and isinstance(two_modes(64).target, ExpandedMixture)
    assert isinstance(unequal_widths().target, GaussianMixture)
    for p in (gmm40_fab(), two_modes(32), eight_gaussians()):
        t = p.target
        assert isinstance(t, ExpandedMixture) and p.exact_sampler is not None
        plain, x = GaussianMixture(t.weights, t.means, t.scales), p.exact_sampler(2000, generator())
        torch.testing.assert_close(t.log_prob(x), plain.log_prob(x), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(t.grad_log_prob(x), plain.grad_log_prob(x), rtol=1e-9, atol=1e-9)
        assert float((t.log_prob(x.float()) - plain.log_prob(x.float().double())).abs().max()) < 2e-3


def test_cells_agree_with_half_planes_and_symmetry() -> None:
    t = two_modes_near().target
    w, m, s = t.weights, t.means, t.scales  # type: ignore[attr-defined]
    straight = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(cells(w, m, s, straight), half_spaces(w, m, s), rtol=0, atol=1e-6)
    torch.testing.assert_close(bent_half_spaces(w, m, s, straight), half_spaces(w, m, s), rtol=1e-12, atol=0)
    bent = torch.tensor([0.4, -0.7], dtype=torch.float64)
    torch.testing.assert_close(cells(w, m, s, bent), bent_half_spaces(w, m, s, bent), rtol=0, atol=1e-6)
    torch.testing.assert_close(known(eight_gaussians().target)["mode_weights"].value, torch.full((8,), 0.125, dtype=torch.float64))


def test_unequal_modes_of_any_shape() -> None:
    p = two_modes(3, weights=(0.9, 0.1), offset=0.5, widths=(0.3, 0.8))
    assert p.exact_sampler is not None
    x, truth = p.exact_sampler(50_000, generator(1)), known(p.target)
    for name in ("mean", "second_moment", "mode_weights"):
        f = truth[name].f(x)
        assert float(((f.mean(0) - truth[name].value) / (f.std(0) / len(x) ** 0.5)).abs().max()) < 4.5


def test_a_bend_of_zero_is_no_bend() -> None:
    t = two_modes_curved(4).target
    x = skewed(4)
    straight = GaussianMixture(t.weights, t.means, t.scales)  # type: ignore[attr-defined]
    flat = type(t)(t.weights, t.means, t.scales, torch.zeros(2, dtype=torch.float64))  # type: ignore[call-arg,attr-defined]
    torch.testing.assert_close(flat.log_prob(x), straight.log_prob(x))
    assert float((t.log_prob(x) - straight.log_prob(x)).abs().min()) > 1e-3


# wells, rings, edges


def test_wells_against_published_numbers() -> None:
    for d, log_z in ((6, 30.88044), (16, 82.34784), (32, 164.695675), (64, 329.39135)):
        truth = known(many_well(d).target)
        assert float(truth["log_z"].value) == pytest.approx(log_z, abs=1e-5)
        assert float(truth["positive"].value[0]) == pytest.approx(0.844307, abs=1e-6)
    for d, delta, log_z in ((5, 4, -0.5410555), (50, 2, 42.817243), (50, 4, 40.811178)):
        assert float(known(multi_well(d, 5, delta).target)["log_z"].value) == pytest.approx(log_z, abs=1e-6)
    halved = known(multi_well(10, 5, 3.0, precision=2.0).target)["log_z"].value  # the Gaussians of MultCDiff
    assert float(halved) == pytest.approx(5 * 0.0471199 + 2.5 * math.log(math.pi), abs=1e-6)


def test_rings_against_published_numbers() -> None:
    assert float(known(rings_pis().target)["log_z"].value) == pytest.approx(2.304881, abs=1e-6)
    x = rings_pis().exact_sampler(90_000, generator(2))  # type: ignore[misc]
    counts = torch.stack([(x.norm(dim=-1) - c).abs() < 0.9 for c in (1, 3, 5)]).sum(1)
    assert stats.chisquare(counts.numpy(), [10_000, 30_000, 50_000]).pvalue > 1e-4
    r = rings_slips().exact_sampler(40_000, generator(3)).norm(dim=-1)  # type: ignore[misc]
    counts = torch.stack([(r - c).abs() < 0.5 for c in range(1, 5)]).sum(1)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_truncated_gaussian_against_scipy() -> None:
    t = truncated_gaussian().target
    assert isinstance(t, TruncatedGaussian)
    m, s, truth = t.mean.numpy(), t.scale.numpy(), known(t)
    law = stats.truncnorm(-m / s, math.inf, m, s)
    torch.testing.assert_close(truth["mean"].value, torch.tensor(law.mean()))
    torch.testing.assert_close(truth["sd"].value, torch.tensor(law.std()))
    x = skewed(5).abs() + 0.01
    torch.testing.assert_close(t.log_prob(x) - truth["log_z"].value, torch.tensor(law.logpdf(x.numpy()).sum(-1)))
    for i in range(5):  # one coordinate beyond its edge is enough
        outside = x.index_fill(1, torch.tensor(i), -0.01)
        assert float(t.log_prob(outside).max()) == -math.inf and not t.grad_log_prob(outside).any()


# phi^4


PHI4 = {  # TARGETS.md section 4.5: N, b, log Z, log P(phi_mid > 0)/P(phi_mid < 0)
    (100, 0.0): (-196.91222, 0.0),
    (100, 0.025): (-193.66445, -7.792),
    (100, 0.05): (-189.64103, -15.567),
    (100, 0.075): (-185.53881, -22.1),
    (32, 0.0): (-59.49546, 0.0),
    (32, 0.025): (-56.14336, -8.000),
    (32, 0.05): (-52.01445, -15.981),
}


@pytest.mark.parametrize(("n", "b"), PHI4)
def test_phi4_against_the_prototype(n: int, b: float) -> None:
    truth, (log_z, log_ratio) = known(Phi4(n, b)), PHI4[n, b]
    p = float(truth["positive"].value[n // 2])
    assert float(truth["log_z"].value) == pytest.approx(log_z, abs=1e-5)
    assert math.log(p / (1 - p)) == pytest.approx(log_ratio, abs=0.1 if b == 0.075 else 1e-3)


def test_transfer_matrix_against_brute_force() -> None:
    """The integral of exp log_prob over a cube, three sites, unsymmetric field."""
    target = Phi4(3, 0.4)
    u = torch.linspace(-4, 4, 161, dtype=torch.float64)
    x = torch.cartesian_prod(u, u, u)
    weight = target.log_prob(x).exp()
    grid, p, log_z = marginals(target)
    assert float((weight.sum() * 0.05**3).log()) == pytest.approx(log_z, abs=1e-9)
    means = (weight[:, None] * x).sum(0) / weight.sum()
    torch.testing.assert_close(means, torch.from_numpy((p * grid).sum(1) * (grid[1] - grid[0])), rtol=1e-8, atol=1e-9)


# DW4


def test_dw4_is_the_energy_of_its_pairs() -> None:
    """Half the sum over ordered pairs, as papers write it; readout is an isometry onto mean-free positions."""
    t, x = dw4().target, 3 * skewed(6)
    particles = t.readout(x).unflatten(-1, (4, 2))  # type: ignore[attr-defined]
    u = torch.cdist(particles, particles) - 4
    energy = 0.5 * ((0.9 * u**4 - 4 * u**2) * (1 - torch.eye(4))).sum((-1, -2))
    torch.testing.assert_close(t.log_prob(x), -energy, rtol=1e-10, atol=0)
    torch.testing.assert_close(particles.mean(-2), torch.zeros(40, 2, dtype=torch.float64))
    torch.testing.assert_close(particles.square().sum((-1, -2)), x.square().sum(-1))


def test_dw4_does_not_know_its_particles_apart() -> None:
    t, x, h = dw4().target, skewed(6), helmert(4)
    torch.testing.assert_close(h.mT @ h, torch.eye(3, dtype=torch.float64))
    relabelled = (h.mT @ h[[2, 0, 3, 1]] @ x.unflatten(-1, (3, 2))).flatten(-2)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=generator(), dtype=torch.float64)).Q
    for y in (relabelled, (x.unflatten(-1, (3, 2)) @ turn).flatten(-2)):
        torch.testing.assert_close(t.log_prob(y), t.log_prob(x))


def test_dw4_card_against_a_short_run() -> None:
    x, _ = metropolis_draws(7, chains=512, warmup=20, draws=40, sweeps=5)
    truth = read_truth("dw4")
    measured = symmetric(x) | energy(dw4().target, x) | {"tail": moments(x, float(truth["tail"].at))["tail"]}  # type: ignore[arg-type]
    for name, (value, stderr) in measured.items():
        z = (value - truth[name].value) / (stderr.square() + truth[name].stderr.square()).sqrt()
        assert float(z.abs().max()) < 4.5, (name, z)


# controls


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_are_wrong_in_the_way_they_say_only(name: str) -> None:
    t = control(name).target
    x = (-skewed(t.dim)).requires_grad_()
    (wanted,) = torch.autograd.grad(t.log_prob(x).sum(), x)
    grad, log_p = t.grad_log_prob(x.detach()), t.log_prob(x.detach())
    ok = log_p.isfinite()
    assert grad.dtype == torch.float64 and log_p.shape == (40,) and bool(ok.any())
    torch.testing.assert_close(grad[ok], wanted[ok])
    assert bool(log_p.isnan().any()) == (name == "nan-region")
    with pytest.raises(ValueError, match=r"unknown control 'x'.*cauchy"):
        control("x")


def test_cauchy_draws_are_cauchy() -> None:
    x = control("cauchy").exact_sampler(20_000, generator())  # type: ignore[misc]
    assert stats.kstest(x[:, 1].numpy(), "cauchy").pvalue > 1e-4
    wanted = torch.tensor(stats.cauchy.logpdf(x.numpy()).sum(-1))
    torch.testing.assert_close(Cauchy().log_prob(x), wanted)


def test_the_pair_has_weights_of_infinite_variance() -> None:
    """E_q w^2 grows with the radius up to which it is integrated; E_q w does not."""
    target, proposal = (p.target for p in infinite_variance_pair(1))
    second, first = [], []
    for reach in (6.0, 12.0):
        x = torch.linspace(-reach, reach, 20_001, dtype=torch.float64)[:, None]
        log_q, log_w = proposal.log_prob(x), target.log_prob(x) - proposal.log_prob(x)
        first.append(float((log_q + log_w).exp().mean() * 2 * reach))
        second.append(float((log_q + 2 * log_w).exp().mean() * 2 * reach))
    assert first[1] == pytest.approx(1, abs=1e-3) and second[1] > 1e6 * second[0]


def test_other_settings_do_not_take_the_card_of_the_usual_ones() -> None:
    assert two_modes(32).truth["mode_weights"].at.shape == (2, 32)
    for p in (two_modes(32, weights=(0.5, 0.5)), two_modes(32, offset=2.0), two_modes(32, turned=True)):
        with pytest.raises(FileNotFoundError, match="unlike"):
            p.truth  # noqa: B018


def test_the_evidence_of_unlike_widths_has_its_own_truth() -> None:
    p = unlike(32, turned=True)
    weights = p.truth["mode_weights"]
    x = p.exact_sampler(4000, torch.Generator().manual_seed(0))
    assert weights.value.allclose(torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)) and float(p.truth["log_z"].value) == 0
    assert (weights.f(x).mean(0) - weights.value).abs().max() < 0.03  # 4 standard errors
    assert (x.square().mean(0) - p.truth["second_moment"].value).abs().max() < 0.02
