"""Time-conditioned networks: a denoiser of a noised density, and the spread of what it denoises.

For x = x_0 + s xi, xi ~ N(0, I), and data x_0 of mean zero and covariance I (scaled units),

    D(x, s) = E[x_0 | x]      = x / (1 + s^2) + s / sqrt(1 + s^2) F(x / sqrt(1 + s^2), log s),
    S(x, s) = Cov[x_0 | x]    = s^2 / (1 + s^2) M M^T,        M lower-triangular, or diagonal, with a positive diagonal,

and grad log p_s = (D - x) / s^2. F and log M start at zero, which is exact for N(0, I): the network learns what is not Gaussian. The
preconditioning is that of Karras, Aittala, Aila & Laine (2022), arXiv:2206.00364, table 1, for sigma_data = 1. Sines and cosines of the
coordinates let a small network see details (Tancik et al. 2020, arXiv:2006.10739).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from boltzsample.streams import Rng

FULL_UP_TO = 8  # dimensions: a full M, diagonal above
MOST_WAVES = 512  # features
TIMES = 8  # frequencies of log s


class Posterior(NamedTuple):
    """Gaussian guess of x_0 given x: mean (*batch, dim), factor (*batch, dim, dim) lower-triangular or (*batch, dim) diagonal."""

    mean: Tensor
    factor: Tensor


class Denoiser(nn.Module):
    """D and S of a density in scaled units. width, depth: of the hidden layers. waves: frequencies 1, 2, 4, ... of each coordinate.

    >>> from boltzsample.streams import Stream
    >>> net = Denoiser(2, Stream(0).rng(torch.float32))
    >>> net(torch.tensor([[2.0, 0.0]]), torch.tensor(1.0)).mean.detach().round(decimals=4)        # untrained: that of N(0, I)
    tensor([[1., 0.]])
    """

    def __init__(self, dim: int, rng: Rng, width: int = 128, depth: int = 3, waves: int = 5) -> None:
        super().__init__()
        self.dim, self.full = dim, dim <= FULL_UP_TO
        self.options = {"width": width, "depth": depth, "waves": waves}
        waves = min(waves, MOST_WAVES // (2 * dim))
        self.first = nn.Linear(dim * (1 + 2 * waves), width, device="meta")
        self.times = nn.ModuleList(nn.Linear(1 + 2 * TIMES, 2 * width, device="meta") for _ in range(depth))
        self.hidden = nn.ModuleList(nn.Linear(width, width, device="meta") for _ in range(depth - 1))
        self.last = nn.Linear(width, dim + (dim * (dim + 1) // 2 if self.full else dim), device="meta")
        self.to_empty(device=rng.generator.device).to(rng.dtype)
        self._start(rng)
        where = rng.normal(0)
        self.pitch: Tensor
        self.tempo: Tensor
        # coordinates times pitches, as one product: the compiler would not vectorize the sines of a flattened outer one
        self.register_buffer("pitch", torch.kron(torch.eye(dim), 2.0 ** torch.arange(waves)).to(where), persistent=False)
        self.register_buffer("tempo", torch.arange(1, TIMES + 1).to(where) / 4, persistent=False)

    @torch.no_grad()
    def _start(self, rng: Rng) -> None:
        """Uniform in +- 1 / sqrt(inputs), biases and the last layer zero; the global generator is left alone."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_((2 * rng.uniform(*layer.weight.shape) - 1) / math.sqrt(layer.in_features))
                layer.bias.zero_()
        self.last.weight.zero_()

    def forward(self, x: Tensor, s: Tensor) -> Posterior:
        """x (*batch, dim); s () or (*batch,). Computed in the dtype of the parameters, returned in that of x."""
        given, own = x.dtype, self.last.weight.dtype
        x, s = x.to(own), s.to(own)[..., None]
        c = (1 + s.square()).rsqrt()
        out = self._net(c * x, s.log())
        F, shape = out[..., : self.dim], out[..., self.dim :]
        return Posterior((c.square() * x + s * c * F).to(given), self._factor(shape, s * c).to(given))

    def _net(self, y: Tensor, log_s: Tensor) -> Tensor:
        angle = y @ self.pitch
        h = self.first(torch.cat([y, angle.sin(), angle.cos()], -1))
        beat = log_s * self.tempo
        t = torch.cat([log_s, beat.sin(), beat.cos()], -1)
        for i, time in enumerate(self.times):
            gain, shift = time(t).chunk(2, -1)
            h = nn.functional.silu(h * (1 + gain) + shift)
            if i < len(self.hidden):
                h = h + self.hidden[i](h) if i else self.hidden[i](h)
        out: Tensor = self.last(h)
        return out

    def _factor(self, shape: Tensor, scale: Tensor) -> Tensor:
        if not self.full:
            return scale * shape.exp()
        d = self.dim
        below = torch.zeros(*shape.shape[:-1], d, d, dtype=shape.dtype, device=shape.device)
        row, column = torch.tril_indices(d, d, -1)
        below[..., row, column] = shape[..., d:]
        return scale[..., None] * (below + torch.diag_embed(shape[..., :d].exp()))
