"""Path weights are exact at any step size: reference = target, no control, few steps."""

from __future__ import annotations

import torch
from torch import Tensor

from boltzsample.samplers.path_weights import Gaussian, WeightedPath, walk, walk_back
from boltzsample.schedules import VP
from boltzsample.streams import Stream

W, M, S = torch.tensor([1 / 3, 2 / 3]).double(), torch.tensor([1.5, -1.0]).double(), torch.tensor([0.3, 0.5]).double()
LOG_Z = 1.7
N = 40_000


def log_gamma(x: Tensor) -> Tensor:
    z = (x - M) / S
    return LOG_Z + (W.log() - S.log() - 0.5 * z.square() - 0.9189385332046727).logsumexp(-1)


def score(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Of the mixture noised to alpha x_0 + sigma xi: closed form."""
    var = (alpha * S).square() + sigma.square()
    log_r = W.log() - 0.5 * var.log() - 0.5 * (x - alpha * M).square() / var
    return (log_r.softmax(-1) * (alpha * M - x) / var).sum(-1, keepdim=True)


class Exponential:
    """The exponential integrator of the reversed VP equation with the exact score (stationary law N(0, 1)), K steps from t = 1 to 0."""

    def __init__(self, K: int) -> None:
        self.K, vp = K, VP(last=10.0)
        t = torch.linspace(1, 0, K + 1, dtype=torch.float64)
        self.alpha, self.sigma = vp.alpha(t), vp.sigma(t)
        self.growth = self.alpha[1:] / self.alpha[:-1]  # sqrt(1 + lambda)
        self.noise = (self.growth.square() - 1).sqrt()

    def forward(self, k: int, x: Tensor) -> Gaussian:
        r = self.growth[k]
        return Gaussian(r * x + 2 * (r - 1) * score(x, self.alpha[k], self.sigma[k]), self.noise[k])

    def backward(self, k: int, x: Tensor) -> Gaussian:
        return Gaussian(x / self.growth[k], self.noise[k] / self.growth[k])

    def run(self, seed: int = 0) -> WeightedPath:
        rng = Stream(seed).rng()
        start = Gaussian(torch.zeros(N, 1).double(), torch.ones(()))
        x = start.draw(rng)
        return walk(x, start.log_prob(x), self.forward, self.backward, self.K, rng)


def weighted(path: WeightedPath) -> tuple[Tensor, Tensor, Tensor]:
    """log Z, P(x > .25) weighted, and its delta-method standard error."""
    log_w = log_gamma(path.x) + path.log_ratio
    w = log_w.softmax(0)
    right = (path.x[:, 0] > 0.25).double()
    p = (w * right).sum()
    return log_w.logsumexp(0) - torch.tensor(float(N)).log(), p, (w * (right - p)).square().sum().sqrt()


TRUTH = 1 / 3 * (1 - torch.distributions.Normal(1.5, 0.3).cdf(torch.tensor(0.25))) + 2 / 3 * (
    1 - torch.distributions.Normal(-1.0, 0.5).cdf(torch.tensor(0.25))
)


def test_few_steps_are_wrong_unweighted_and_right_weighted() -> None:
    """K = 8. |z| < 4.5 (7e-6); the unweighted share must miss by ten times its error, or the test shows nothing."""
    path = Exponential(8).run()
    plain = float((path.x[:, 0] > 0.25).double().mean())
    log_z, p, se = weighted(path)
    assert abs(plain - TRUTH) > 10 * (0.25 / N) ** 0.5
    assert abs(p - TRUTH) < 4.5 * se and se < 0.02
    assert abs(log_z - LOG_Z) < 0.05


def test_more_steps_are_better_not_righter() -> None:
    """The share of effective paths grows with K; log Z is right at each K (within .03)."""
    shares = []
    for K in (16, 64):
        path = Exponential(K).run(seed=K)
        log_w = log_gamma(path.x) + path.log_ratio
        shares.append(float((2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp() / N))
        assert abs(log_w.logsumexp(0) - torch.tensor(float(N)).log() - LOG_Z) < 0.03
    assert shares[1] > 1.2 * shares[0] > 0


def test_bounds_from_both_sides() -> None:
    """E_forward log w <= log Z <= E_backward log w, and the mean of 1/w backwards is 1/Z."""
    path = Exponential(32)
    rng = Stream(3).rng()
    k = torch.multinomial(W, N, replacement=True, generator=rng.generator)
    x = (M[k] + S[k] * rng.normal(N))[:, None]
    start = Gaussian(torch.zeros(N, 1).double(), torch.ones(()))
    back = walk_back(x, start.log_prob, path.forward, path.backward, path.K, rng)
    log_w = log_gamma(x) + back.log_ratio
    forth = path.run()
    elbo, eubo = float((log_gamma(forth.x) + forth.log_ratio).mean()), float(log_w.mean())
    assert elbo < LOG_Z < eubo
    assert abs(torch.tensor(float(N)).log() - (-log_w).logsumexp(0) - LOG_Z) < 0.05


def test_the_density_of_a_gaussian_kernel() -> None:
    mean, sd = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 2.0, 30.0])
    x = torch.ones(5, 3, dtype=torch.float64)
    wanted = torch.distributions.Normal(mean, sd.double()).log_prob(x).sum(-1)
    torch.testing.assert_close(Gaussian(mean, sd).log_prob(x), wanted)
