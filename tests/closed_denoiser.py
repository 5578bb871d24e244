"""The exact denoiser and spread of a Gaussian mixture: what paths and objectives are tested against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from boltzsample.networks import Posterior


@dataclass(frozen=True)
class MixtureDenoiser:
    """Weights (k,), means (k, dim), standard deviations (k, dim), all float64. full: the spread as a triangular factor."""

    a: Tensor
    m: Tensor
    sd: Tensor
    full: bool = True

    @property
    def dim(self) -> int:
        return self.m.shape[1]

    def log_prob(self, x: Tensor, s: Tensor | float = 0.0) -> Tensor:
        """Of the density noised by s (normalized)."""
        return self._parts(x, torch.as_tensor(s).to(x)).logsumexp(-1)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.a, n, replacement=True, generator=g)
        return self.m[k] + self.sd[k] * torch.randn(n, self.dim, generator=g, dtype=torch.float64)

    def __call__(self, x: Tensor, s: Tensor) -> Posterior:
        own, x, s = x.dtype, x.double(), s.double()
        var, s2 = self.sd.square(), s.square()[..., None, None]
        r = self._parts(x, s).softmax(-1)[..., None]
        each = self.m + var / (var + s2) * (x[..., None, :] - self.m)  # (*batch, k, dim)
        mean = (r * each).sum(-2)
        away = each - mean[..., None, :]
        inside = (r * (var * s2 / (var + s2))).sum(-2)
        cov = (r[..., None] * away[..., :, None] * away[..., None, :]).sum(-3) + torch.diag_embed(inside)
        factor = torch.linalg.cholesky(cov) if self.full else cov.diagonal(dim1=-2, dim2=-1).sqrt()
        return Posterior(mean.to(own), factor.to(own))

    def _parts(self, x: Tensor, s: Tensor) -> Tensor:
        var = self.sd.square() + s[..., None, None].square()
        z2 = (x[..., None, :] - self.m).square() / var
        return self.a.log() - 0.5 * (z2 + var.log() + math.log(2 * math.pi)).sum(-1)


def skew() -> MixtureDenoiser:
    """Three unequal modes of mean near 0 and scales near 1 in two dimensions."""
    a = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    m = torch.tensor([[-0.7, 0.6], [1.2, 0.2], [0.1, -1.6]], dtype=torch.float64)
    sd = torch.tensor([[0.3, 0.5], [0.2, 0.3], [0.4, 0.2]], dtype=torch.float64)
    return MixtureDenoiser(a, m, sd)


def gaussian() -> MixtureDenoiser:
    """One Gaussian that is not N(0, I)."""
    return MixtureDenoiser(*(torch.tensor(v, dtype=torch.float64) for v in ([1.0], [[0.3, -0.2]], [[0.5, 1.1]])))
