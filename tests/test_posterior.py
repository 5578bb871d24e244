"""Posterior chains and what they are compared with: closed forms of a noised mixture, Stein's control variate, paths that are exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import boltzsample as bz
from boltzsample.errors import PositiveInfinityError
from boltzsample.kernels import HMC, MALA
from boltzsample.maps import Diagonal
from boltzsample.samplers.localized import Chains, Guide, Mixture, Paths, defensive, path_price, paths, paths_back
from boltzsample.samplers.localized_fit import calibrate, shrunk
from boltzsample.samplers.noised import Kernel, Noised, by_row, drawn, inverted
from boltzsample.samplers.posterior import Frame, Inner, Scaled, Spent, Units, look, posterior
from boltzsample.samplers.unweighted import posterior_means
from boltzsample.streams import Stream

ONE = torch.tensor(1.0).double()
A = torch.tensor([0.3, 0.7]).double()
M = torch.tensor([[1.5, -0.5], [-1.0, 0.7]]).double()
L = torch.tensor([[[0.4, 0.0], [0.3, 0.5]], [[0.8, 0.0], [-0.2, 0.3]]]).double()
MIX = Mixture(A.log(), M, L @ L.mT)
LOG_Z = 1.3


def log_prob(x: Tensor, m: Tensor = M) -> Tensor:
    """MIX, times e^LOG_Z."""
    z = torch.einsum("...jd,jed->...je", x[..., None, :] - m, torch.linalg.inv(L))
    return LOG_Z + (A.log() - L.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * z.square().sum(-1) - math.log(2 * math.pi)).logsumexp(-1)


TARGET = Units(bz.from_log_prob(log_prob, dim=2), Diagonal(torch.zeros(2).double(), torch.ones(2).double()), torch.float64)


def grid(half: float = 12.0, n: int = 401) -> tuple[Tensor, float]:
    """Points of a square grid and the area of a cell."""
    axis = torch.linspace(-half, half, n, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


def test_noised_closed_forms_against_quadrature() -> None:
    x, cell = grid(6.0, 601)
    s = torch.tensor(0.7).double()
    y = torch.tensor([[0.2, 0.1], [1.4, -0.9]]).double()
    joint = (log_prob(x) - LOG_Z)[None] - 0.5 * torch.cdist(y, x).square() / s**2 - math.log(2 * math.pi) - 2 * s.log()
    marginal = joint.exp().sum(1) * cell
    mean = (joint.exp()[..., None] * x).sum(1) * cell / marginal[:, None]
    q = Noised(MIX.log_share, MIX.m, MIX.S, s)
    torch.testing.assert_close(q.log_terms(y).logsumexp(1), marginal.log(), atol=1e-6, rtol=0)
    torch.testing.assert_close(q.denoised(y), mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_the_kernel_is_the_exact_reverse_of_noising_where_the_mixture_is_the_target(k: int) -> None:
    """q_s(y) f(y' | y) = q_s'(y') b(y | y') for any two points, at the last step down to x too: A, B, C, r_j, m_j, V_j all enter."""
    s = torch.tensor([2.0, 0.9, 0.4]).double()
    q = [Noised(MIX.log_share, MIX.m, MIX.S, v) for v in s]
    none = torch.zeros(3, 2, 2, 2).double()
    guide = Guide(MIX, s, torch.ones(3).double(), none, torch.stack([n.L @ n.L.mT for n in q]), torch.ones(3, 2).double())
    rng = Stream(0).rng()
    y, after = rng.normal(50, 2), 0.8 * rng.normal(50, 2)
    which = torch.zeros(50, dtype=torch.long)
    block = Paths(guide, Chains(TARGET, MIX, s, Inner(1, 1).ready(2), 50, rng), which)
    share, means = q[k].log_terms(y).log_softmax(1), q[k].means(y)
    f = block.kernel(k, y, share, means, q[k].denoised(y)).log_prob(after)[0]
    left = q[k].log_terms(y).logsumexp(1) + f
    end = log_prob(after) - LOG_Z if k == 2 else q[k + 1].log_terms(after).logsumexp(1)
    torch.testing.assert_close(left, end + block.backward(k, after).log_prob(y))


def test_a_kernel_s_density_is_that_of_its_draws() -> None:
    """Each width integrates to one, and E[h / f] = int h over draws of f, of each width (5 standard errors)."""
    x, cell = grid(16.0)
    n, widths = 20_000, torch.tensor([1.0, 1.6]).double()
    one = Kernel(A.log()[None].expand(len(x), 2), M.expand(len(x), 2, 2), L, inverted(L), widths, torch.zeros(len(x), dtype=torch.long))
    torch.testing.assert_close(one.log_prob(x).exp().sum(1) * cell, torch.ones(2).double(), atol=1e-5, rtol=0)
    for which in (0, 1):
        law = Kernel(A.log()[None].expand(n, 2), M.expand(n, 2, 2), L, inverted(L), widths, torch.full((n,), which))
        at = law.draw(Stream(which).rng())
        h = torch.exp(-2 * (at - M[0]).square().sum(-1)) * 2 / math.pi
        ratio = h / law.log_prob(at)[which].exp()
        assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / n**0.5 < 0.2


def test_by_row_and_drawn() -> None:
    rng = Stream(1).rng()
    for d in (3, 11):
        matrices, j, v = rng.normal(4, d, d), torch.arange(20) % 3, rng.normal(20, d)
        torch.testing.assert_close(by_row(matrices, j, v), torch.stack([matrices[i] @ u for i, u in zip(j, v, strict=True)]))
    share = torch.tensor([0.1, 0.6, 0.3]).double().log() + 5.0
    at = drawn(share.expand(30_000, 3), rng.uniform(30_000))
    assert (torch.bincount(at, minlength=3) / 30_000 - share.softmax(0)).abs().max() < 0.013


def test_a_gaussian_posterior_has_an_exact_mean_from_few_draws() -> None:
    """Stein's control variate leaves no noise: from two chains of two steps, for any start."""
    wide = bz.from_log_prob(lambda x: -0.5 * (x / 2.0).square().sum(-1), dim=3)
    view, rng = Units(wide, Diagonal(torch.zeros(3).double(), torch.ones(3).double()), torch.float64), Stream(2).rng()
    y, s = rng.normal(7, 3), torch.tensor(0.8).double()
    rows = y[:, None].expand(-1, 2, -1).flatten(0, 1)
    seen = look(posterior(view, rows, ONE, s, Scaled(s)), 3 * rng.normal(14, 3), HMC(h=torch.tensor(0.4).double(), L=2), 2, rng, Spent())
    torch.testing.assert_close(posterior_means(seen, s, 7).u, y * 4 / (4 + 0.64))
    plain = (s * seen.z.mean(0)).reshape(7, 2, 3).mean(1)
    assert (plain - y * 4 / 4.64).abs().mean() > 0.1


def test_the_error_of_the_score_falls_as_one_over_the_root_of_the_draws() -> None:
    """Unequal skewed mixture, closed-form score: four times the draws, half the error (a band of 25%)."""
    s, n = torch.tensor(0.6).double(), 400
    near = bz.from_log_prob(lambda x: log_prob(x, 0.3 * M), dim=2)
    target = Units(near, Diagonal(torch.zeros(2).double(), torch.ones(2).double()), torch.float64)
    q, rng = Noised(MIX.log_share, 0.3 * M, MIX.S, s), Stream(3).rng()
    y = torch.where((rng.uniform(n) < 0.3)[:, None], M[0], M[1]) * 0.3 + 0.9 * rng.normal(n, 2)
    rows = y[:, None].expand(-1, 4, -1).flatten(0, 1)
    kernel = HMC(h=torch.tensor(0.5).double(), L=4)
    z = look(posterior(target, rows, ONE, s, Scaled(s)), rows / s, kernel, 40, rng, Spent()).z[-1]
    errors = []
    for steps in (8, 32, 128):
        seen = look(posterior(target, rows, ONE, s, Scaled(s)), z, kernel, steps, rng, Spent())
        error = (posterior_means(seen, s, n).u - q.denoised(y)) / s**2
        errors.append(float(error.square().mean().sqrt()))
    assert 1.5 < errors[0] / errors[1] < 2.5 and 1.5 < errors[1] / errors[2] < 2.5


def test_an_infinite_density_stops_the_chains() -> None:
    bad = bz.from_log_prob(lambda x: torch.where(x[..., 0] > 1, torch.inf, -0.5 * x.square().sum(-1)), dim=1)
    view, rng = Units(bad, Diagonal(torch.zeros(1).double(), torch.ones(1).double()), torch.float64), Stream(0).rng()
    kernel = MALA(h=torch.tensor(0.5).double())
    with pytest.raises(PositiveInfinityError):
        look(posterior(view, torch.ones(64, 1).double(), ONE, ONE, Scaled(ONE)), torch.zeros(64, 1).double(), kernel, 20, rng, Spent())


WRONG = Mixture(torch.tensor([0.8, 0.2]).double().log(), M + 0.2, 1.5 * MIX.S)


@pytest.mark.parametrize("inner", [Inner(1, 1), Inner(3, 2, MALA(h=torch.tensor(0.3).double()))], ids=["one HMC chain", "three of MALA"])
def test_weights_are_exact_with_a_wrong_mixture_and_noisy_means(inner: Inner) -> None:
    """|z| < 4.5 for log Z, a mass and a mean; unweighted, the mass is wrong by more than ten bars, or the test shows nothing."""
    s, inner = torch.tensor([2.0, 0.8, 0.4]).double(), inner.ready(2)
    guide, _ = calibrate(TARGET, WRONG, s, inner, 128, Stream(0).rng())
    ends, spent = paths(TARGET, guide, inner, 20_000, Stream(1).rng())
    assert spent.inits + spent.transitions * sum(inner.moves.price) == 20_000 * (path_price(guide, inner) - 1)
    w = ends.log_w.softmax(0)
    ess = 1 / w.square().sum()
    assert abs(ends.log_w.logsumexp(0) - math.log(20_000) - LOG_Z) < 4.5 / ess.sqrt() < 0.1
    x, cell = grid(6.0, 601)
    p = (log_prob(x) - LOG_Z).exp() * cell
    for f in (lambda x: (x[:, 0] > 0.4).double(), lambda x: x[:, 1]):
        truth, value = (p * f(x)).sum(), (w * f(ends.x)).sum()
        assert abs(value - truth) < 4.5 * (w * (f(ends.x) - value)).square().sum().sqrt()
    plain = (ends.x[:, 0] > 0.4).double().mean()
    assert abs(plain - (p * (x[:, 0] > 0.4)).sum()) > 10 * 0.5 / 20_000**0.5


def test_paths_from_the_data_are_weighed_by_the_law_that_they_did_not_come_from() -> None:
    """E of q_c(path) / (d(x) prod b) is one over paths from the data, for both widths c, whatever the guide: |z| < 4.5."""
    s, inner = torch.tensor([2.0, 0.8, 0.4]).double(), Inner(3, 2).ready(2)
    guide, _ = calibrate(TARGET, WRONG, s, inner, 128, Stream(0).rng())
    path, spent = paths_back(TARGET, guide, inner, 20_000, Stream(1).rng())
    assert spent.inits == 20_000 * inner.chains * guide.looks > 0
    for log_ratio in path.log_ratio:
        w = (-log_ratio - defensive(WRONG).log_prob(path.x)).exp()
        assert abs(float(w.mean()) - 1) < 4.5 * float(w.std()) / 20_000**0.5 < 0.2


def test_labels_follow_the_shares() -> None:
    """Chains of a component that lost its share at y are taken over by the other; the rest keep their coordinates."""
    s = torch.tensor([1.0, 0.3]).double()
    chains = Chains(TARGET, MIX, s, Inner(4, 1).ready(2), 500, Stream(5).rng())
    y = M.mean(0).expand(500, 2)
    share, _ = chains.place(0, y)
    assert abs(float((chains.label == 0).double().mean()) - float(share[0, 0].exp())) < 0.06
    before, label = chains.z.clone(), chains.label.clone()
    near, _ = chains.place(1, M[0].expand(500, 2))
    assert abs(float((chains.label == 0).double().mean()) - float(near[0, 0].exp())) < 0.02
    assert torch.equal(chains.z[label == 0], before[label == 0])


def test_shrinking_a_covariance() -> None:
    """Noise beside the diagonal goes, a real correlation stays."""
    rng = Stream(6).rng()
    z = rng.normal(3000, 20)
    beside = (1 - torch.eye(20)) * (z.T @ z) / 3000
    assert ((1 - torch.eye(20)) * shrunk(z.T @ z, 3000.0)).square().sum() < 0.1 * beside.square().sum()
    z[:, 1] = 0.6 * z[:, 0] + 0.8 * z[:, 1]
    assert shrunk(z.T @ z, 3000.0)[0, 1] > 0.45


def test_frames_push_and_pull_gradients() -> None:
    rng = Stream(7).rng()
    frame = Frame(rng.normal(6, 2), L, torch.tensor([0, 1, 0, 1, 1, 0]))
    z = rng.normal(6, 2).requires_grad_()
    x, _, vjp = frame.push_vjp(z)
    g = rng.normal(6, 2)
    torch.testing.assert_close(vjp(g), torch.autograd.grad((x * g).sum(), z)[0])


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="chains is 0"):
        Inner(0)
    with pytest.raises(ValueError, match="no kernel yet"):
        _ = Inner().moves
