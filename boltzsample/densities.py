"""Densities with an exact sampler, for bases and references.

Student-t with nu degrees of freedom, location m and scale matrix L L^T:

    log p(x) = log G((nu + d)/2) - log G(nu/2) - d/2 log(nu pi) - log|det L| - (nu + d)/2 log(1 + |L^-1 (x - m)|^2 / nu),

sampled as x = m + L z / sqrt(g), z ~ N(0, I), g ~ chi^2_nu / nu (Kotz & Nadarajah 2004, Multivariate t Distributions, ch. 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from boltzsample.maps import Dense, Diagonal
from boltzsample.streams import Rng


@dataclass(frozen=True, eq=False)
class StudentT:
    """A multivariate Student-t: `map` x = m + L z carries location and scale, `df` is an integer number of degrees of freedom.

    >>> import torch
    >>> from boltzsample.streams import Stream
    >>> t = StudentT(Diagonal(torch.zeros(3), torch.ones(3)), df=5)
    >>> t.sample(Stream(0).rng(torch.float32), 4).shape, t.log_prob(torch.zeros(4, 3)).shape
    (torch.Size([4, 3]), torch.Size([4]))
    """

    map: Diagonal | Dense
    df: int = 5

    @property
    def dim(self) -> int:
        return self.map.m.shape[-1]

    def sample(self, rng: Rng, n: int) -> Tensor:
        """n draws (n, dim) in the rng's dtype and on its device."""
        g = rng.normal(n, self.df).square().mean(-1, keepdim=True)
        x: Tensor = self.map.push(rng.normal(n, self.dim) / g.sqrt())[0]
        return x

    def log_prob(self, x: Tensor) -> Tensor:
        nu, d = self.df, self.dim
        constant = math.lgamma((nu + d) / 2) - math.lgamma(nu / 2) - 0.5 * d * math.log(nu * math.pi)
        z = self.map.pull(x)
        return constant - self.map.log_det - 0.5 * (nu + d) * torch.log1p(z.square().sum(-1) / nu)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        z = self.map.pull(x)
        return -(self.df + self.dim) * self._whiten(z / (self.df + z.square().sum(-1, keepdim=True)))

    def _whiten(self, r: Tensor) -> Tensor:
        """L^-T r."""
        if isinstance(self.map, Diagonal):
            return r / self.map.s
        whitened: Tensor = torch.linalg.solve_triangular(self.map.L, torch.atleast_2d(r), upper=False, left=False)
        return whitened.reshape(r.shape)
