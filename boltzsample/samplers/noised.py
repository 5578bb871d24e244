"""A Gaussian mixture seen through noise: y = x + s xi with x ~ q = sum_j a_j N(m_j, S_j), everything in closed form.

    marginal     q_s(y) = sum_j a_j N(y; m_j, S_j + s^2 I)
    posterior    q(x | y) = sum_j r_j(y) N(x; m_j + K_j (y - m_j), V_j),        K_j = S_j (S_j + s^2 I)^-1,     V_j = s^2 K_j
    denoiser     E_q[x | y] = sum_j r_j(y) (m_j + K_j (y - m_j))

and r_j(y) is the posterior share of component j. Of a fitted mixture these are a start for chains and for paths, and a control variate;
they are never the answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from boltzsample.samplers.path_weights import LOG_2_PI
from boltzsample.streams import Rng

ALIKE = 4.0
GATHER_UP_TO = 8  # dimensions: beyond, one matrix product for each component


@dataclass(frozen=True, eq=False)
class Noised:
    """The mixture with log-shares (J,), means m (J, dim), covariances S (J, dim, dim) at noise level s > 0.

    >>> one = Noised(torch.zeros(1), torch.zeros(1, 1), torch.ones(1, 1, 1), torch.tensor(1.0))
    >>> one.denoised(torch.tensor([[3.0]]))                                        # the posterior mean is 3 / (1 + 1)
    tensor([[1.5000]])
    """

    log_share: Tensor
    m: Tensor
    S: Tensor
    s: Tensor
    root: Tensor = field(init=False, repr=False)  # of S + s^2
    inverse: Tensor = field(init=False, repr=False)  # of the root
    gain: Tensor = field(init=False, repr=False)  # K
    L: Tensor = field(init=False, repr=False)  # of V
    frame: Tensor = field(init=False, repr=False)  # L again, or one number () where it does for all components

    def __post_init__(self) -> None:
        eye = torch.eye(self.m.shape[-1], dtype=self.S.dtype, device=self.S.device).expand_as(self.S)
        root = torch.linalg.cholesky(self.S + self.s.square() * eye)
        gain = self.S @ torch.cholesky_inverse(root)
        V = self.s.square() * 0.5 * (gain + gain.mT)
        found = {"root": root, "inverse": inverted(root), "gain": gain, "L": torch.linalg.cholesky(V), "frame": framed(V)}
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def log_terms(self, y: Tensor) -> Tensor:
        """log of a_j N(y; m_j, S_j + s^2 I) (n, J) at y (n, dim)."""
        return self.log_share + log_normal(y[:, None] - self.m, self.inverse)

    def means(self, y: Tensor) -> Tensor:
        """Posterior means of the components (n, J, dim)."""
        means: Tensor = self.m + torch.einsum("njd,jed->nje", y[:, None] - self.m, self.gain)
        return means

    def denoised(self, y: Tensor) -> Tensor:
        """E_q[x | y] (n, dim)."""
        mean: Tensor = (self.log_terms(y).softmax(1)[..., None] * self.means(y)).sum(1)
        return mean


def framed(V: Tensor) -> Tensor:
    """Factors of covariances V (J, dim, dim), or one number () where all their eigenvalues are alike: chains need no more."""
    v = torch.linalg.eigvalsh(V)
    alike: Tensor = v.clamp(min=1e-300).log().mean().exp().sqrt()
    return alike if bool(v.max() < ALIKE * v.min()) else rooted(V)


def rooted(S: Tensor) -> Tensor:
    """The lower-triangular roots of covariances (*batch, dim, dim)."""
    L: Tensor = torch.linalg.cholesky(S)
    return L


def inverted(L: Tensor) -> Tensor:
    """The inverses of lower-triangular matrices (*batch, dim, dim)."""
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    inverse: Tensor = torch.linalg.solve_triangular(L, eye, upper=False)
    return inverse


def log_normal(away: Tensor, inverse: Tensor) -> Tensor:
    """log N(away; 0, L_j L_j^T) (n, J) of deviations (n, J, dim), by the inverses of L (J, dim, dim)."""
    z = torch.einsum("njd,jed->nje", away, inverse)
    log_det = -inverse.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * z.square().sum(-1) - log_det - away.shape[-1] * LOG_2_PI / 2


def by_row(L: Tensor, j: Tensor, v: Tensor) -> Tensor:
    """L_j v for every row: L (J, dim, dim), or () where one number does for all; j (*rows), v (*rows, dim)."""
    if L.ndim == 0:
        return L * v
    if len(L) == 1:
        return v @ L[0].mT
    if v.shape[-1] <= GATHER_UP_TO:
        return (L[j] @ v[..., None])[..., 0]
    out = torch.empty_like(v)
    for k in j.unique().tolist():
        mine = j == k
        out[mine] = v[mine] @ L[k].mT
    return out


def drawn(log_share: Tensor, uniform: Tensor) -> Tensor:
    """A component for each row by its log-shares (*rows, J) and a uniform number (*rows)."""
    share = log_share.softmax(-1).cumsum(-1)
    return (uniform[..., None] * share[..., -1:] > share).sum(-1).clamp(max=log_share.shape[-1] - 1)


@dataclass(frozen=True, eq=False)
class Kernel:
    """The law sum_j r_j N(mean_j, c^2 L_j L_j^T) of every row, in several widths c: `which` (n,) says by which one a row is drawn, and
    `log_prob` (widths, n) is that of each width, so that a path knows its density under all of them.

    log_share (n, J); mean (n, J, dim); L (J, dim, dim) and its `inverse`; widths (widths,)."""

    log_share: Tensor
    mean: Tensor
    L: Tensor
    inverse: Tensor
    widths: Tensor
    which: Tensor

    def draw(self, rng: Rng) -> Tensor:
        n, _, dim = self.mean.shape
        j = drawn(self.log_share, rng.uniform(n).to(self.mean))
        away = by_row(self.L, j, rng.normal(n, dim).to(self.mean))
        return self.mean[torch.arange(n, device=j.device), j] + self.widths[self.which, None] * away

    def log_prob(self, x: Tensor) -> Tensor:
        log_r, z = self.log_share.log_softmax(1), torch.einsum("njd,jed->nje", x[:, None] - self.mean, self.inverse)
        square, dim = z.square().sum(-1), x.shape[-1]
        constant = self.inverse.diagonal(dim1=-2, dim2=-1).log().sum(-1) - dim * LOG_2_PI / 2
        return torch.stack([(log_r + constant - dim * math.log(c) - 0.5 * square / c**2).logsumexp(1) for c in self.widths.tolist()])
