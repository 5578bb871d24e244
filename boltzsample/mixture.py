"""Defensive mixtures: proposals fitted to what was found of a target, with an exact sampler and a density in closed form.

    q(x) = (1 - b) sum_k a_k [ .9 N(x; m_k, S_k) + .1 t_5(x; m_k, c^2 S_k) ]  +  b t_5(x; m, 1.5^2 S),        c = 1 + 1.4 / sqrt(dim)

The wide part of each component keeps weights bounded where a mode has longer tails than a Gaussian (Hesterberg 1995, Technometrics
37(2); TRUST.md 1.3 for c). The last term, with the mean m and covariance S of the whole mixture, does the same between the
components; it helps in few dimensions only, so b = .05 up to eight and 0 above.

`fit_em` is expectation-maximization on weighted draws (Dempster, Laird & Rubin 1977, JRSS B 39(1)), but with the plain moments of a
component's draws, as if all of it were Gaussian: where there are tails it comes out wider than the likelihood would have it, as a
proposal should (with the exact step k-hat was .3 to .6 where it is 0 to .2). Each component is shrunk towards what it was by dim + 2
draws' worth, so that one that has hardly any draws hardly moves in a round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from boltzsample.densities import StudentT
from boltzsample.maps import Dense, Diagonal
from boltzsample.streams import Rng

LOG_2PI = math.log(2 * math.pi)
DF = 5
AT_ONCE = 2**22  # numbers (draws x components x dim) in a chunk
OVERALL_UP_TO = 8  # dimensions


@dataclass(frozen=True, eq=False)
class DefensiveMixture:
    """log_share (K,), normalized; m (K, dim); L (K, dim, dim) lower-triangular, S_k = L_k L_k^T, all in float64. wide: the share of the
    Student-t in each component.

    >>> from boltzsample.streams import Stream
    >>> one = DefensiveMixture(torch.zeros(1).double(), torch.zeros(1, 2).double(), torch.eye(2)[None].double())
    >>> x = one.sample(Stream(0).rng(torch.float32), 1000)
    >>> x.shape, x.dtype, one.log_prob(x).dtype
    (torch.Size([1000, 2]), torch.float32, torch.float64)
    """

    log_share: Tensor
    m: Tensor
    L: Tensor
    wide: float = 0.1
    inverse: Tensor = field(init=False, repr=False)  # L_k^-1
    log_det: Tensor = field(init=False, repr=False)  # of L_k

    def __post_init__(self) -> None:
        eye = torch.eye(self.dim, dtype=self.L.dtype, device=self.L.device).expand_as(self.L)
        object.__setattr__(self, "inverse", torch.linalg.solve_triangular(self.L, eye, upper=False))
        object.__setattr__(self, "log_det", self.L.diagonal(dim1=-2, dim2=-1).log().sum(-1))

    @property
    def dim(self) -> int:
        return self.m.shape[-1]

    @property
    def components(self) -> int:
        return len(self.m)

    @property
    def overall_share(self) -> float:
        """b."""
        return 0.05 if self.dim <= OVERALL_UP_TO else 0.0

    @property
    def overall(self) -> StudentT:
        """The last term: a Student-t with 1.5 times the spread of the whole mixture."""
        a = self.log_share.exp()[:, None]
        m = (a * self.m).sum(0)
        away = a.sqrt() * (self.m - m)
        S = (a[:, None] * (self.L @ self.L.mT)).sum(0) + away.T @ away
        return StudentT(Dense(m, 1.5 * torch.linalg.cholesky(S)), DF)

    def sample(self, rng: Rng, n: int) -> Tensor:
        """n independent draws (n, dim) in the rng's dtype and on its device."""
        exact = replace(rng, dtype=torch.float64)
        share = self.log_share.exp().cumsum(0)
        k = torch.searchsorted(share / share[-1], exact.uniform(n)).clamp(max=self.components - 1)
        z = exact.normal(n, self.dim)
        c = self._c2**0.5 / exact.normal(n, DF).square().mean(-1, keepdim=True).sqrt()
        z = torch.where((exact.uniform(n) < self.wide)[:, None], c * z, z)
        x = self.m[k] + (self.L[k] @ z[..., None])[..., 0]
        if self.overall_share:
            x = torch.where((exact.uniform(n) < self.overall_share)[:, None], self.overall.sample(exact, n), x)
        return x.to(rng.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """log q (n,) in float64 at x (n, dim)."""
        x = x.double()
        log_q = torch.cat([self._parts(part).logsumexp(1) for part in x.split(self._chunk)])
        return self._with_overall(log_q, x)

    def sample_and_log_prob(self, n: int, rng: Rng) -> tuple[Tensor, Tensor, Any]:
        """n draws, and log q there."""
        x = self.sample(rng, n)
        return x, self.log_prob(x), None

    def responsibilities(self, x: Tensor) -> Tensor:
        """P(component | x) (n, K); what is left to 1 is the overall part's."""
        x = x.double()
        parts = torch.cat([self._parts(part) for part in x.split(self._chunk)])
        log_q = self._with_overall(parts.logsumexp(1), x)
        return (parts + math.log1p(-self.overall_share) - log_q[:, None]).exp()

    def reshared(self, share: Tensor) -> DefensiveMixture:
        """The same components with other shares (K,), normalized here."""
        return DefensiveMixture(share.log().log_softmax(0), self.m, self.L, self.wide)

    def joined(self, m: Tensor, L: Tensor, share: Tensor) -> DefensiveMixture:
        """With more components (k, dim), (k, dim, dim), which take shares (k,) in all from the others."""
        log_share = torch.cat([self.log_share + torch.log1p(-share.sum()), share.log()])
        return DefensiveMixture(log_share.log_softmax(0), torch.cat([self.m, m]), torch.cat([self.L, L]), self.wide)

    def only(self, which: Tensor) -> DefensiveMixture:
        """Some of the components (K,) bool, shares normalized anew."""
        return DefensiveMixture(self.log_share[which].log_softmax(0), self.m[which], self.L[which], self.wide)

    def wider(self, by: float) -> DefensiveMixture:
        """The same with all components this many times as wide."""
        return DefensiveMixture(self.log_share, self.m, by * self.L, self.wide)

    def pushed(self, map: Dense | Diagonal) -> DefensiveMixture:
        """The mixture of x = T(z), T affine, z of this one."""
        factor = map.L.double() if isinstance(map, Dense) else torch.diag(map.s.double())
        return DefensiveMixture(self.log_share, map.m.double() + self.m @ factor.T, factor @ self.L, self.wide)

    @property
    def _chunk(self) -> int:
        return max(1, AT_ONCE // (self.components * self.dim))

    @property
    def _c2(self) -> float:
        return (1 + 1.4 / math.sqrt(self.dim)) ** 2

    def _parts(self, x: Tensor) -> Tensor:
        """log of a_k times the component's density (n, K)."""
        k, d, nu, c2 = self.components, self.dim, DF, self._c2
        z = (x @ self.inverse.reshape(k * d, d).T).reshape(len(x), k, d) - (self.inverse @ self.m[..., None])[..., 0]
        radius2 = z.square().sum(-1)
        narrow = math.log1p(-self.wide) - 0.5 * d * LOG_2PI - 0.5 * radius2
        constant = math.lgamma((nu + d) / 2) - math.lgamma(nu / 2) - 0.5 * d * math.log(nu * math.pi * c2)
        wide = math.log(self.wide) + constant - 0.5 * (nu + d) * torch.log1p(radius2 / (nu * c2))
        return self.log_share - self.log_det + torch.logaddexp(narrow, wide)

    def _with_overall(self, log_q: Tensor, x: Tensor) -> Tensor:
        b = self.overall_share
        return torch.logaddexp(log_q + math.log1p(-b), self.overall.log_prob(x) + math.log(b)) if b else log_q


def fit_em(mixture: DefensiveMixture, x: Tensor, w: Tensor, rounds: int = 5) -> DefensiveMixture:
    """Expectation-maximization from `mixture` on x (n, dim) of weights w (n,), which sum to one."""
    x, w, d = x.double(), w.double(), mixture.dim
    outer = (x[:, :, None] * x[:, None, :]).reshape(len(x), d * d)
    for _ in range(rounds):
        r = mixture.responsibilities(x) * w[:, None]
        share = r.sum(0).clamp(min=1e-300)
        n = torch.minimum(share.square() / r.square().sum(0).clamp(min=1e-300), share / w.square().sum())  # its effective number of draws
        m = (r.T @ x) / share[:, None]
        S = ((r.T @ outer) / share[:, None]).reshape(-1, d, d) - m[:, :, None] * m[:, None, :]
        prior, strength = mixture.L @ mixture.L.mT, d + 2.0
        S = (n[:, None, None] * S + strength * prior) / (n + strength)[:, None, None]
        m = (n[:, None] * m + mixture.m) / (n + 1)[:, None]
        L, bad = torch.linalg.cholesky_ex(S)
        good = (bad == 0) & (n > d) & L.isfinite().all(-1).all(-1)
        m, L = torch.where(good[:, None], m, mixture.m), torch.where(good[:, None, None], L, mixture.L)
        mixture = DefensiveMixture(share.clamp(min=1e-12).log().log_softmax(0), m, L, mixture.wide)
    return mixture
