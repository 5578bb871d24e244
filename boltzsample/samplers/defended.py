"""Defensive paths: with a share of them beginning at the data, in a wide law, weights of diffusion paths stay bounded.

    q(path) = (1 - b) q_0(z_0) prod_k f_k + b t_5(z_K) prod_k b_k,       -log q + log prod b_k = -log[(1 - b) e^-r + b t_5(z_K)]

with r the log-ratio of the path by itself (path_weights.py). Every path has both densities, whichever law drew it, so w <= p / (b t_5): a
stratified mixture in the sense of Owen & Zhou (2000), JASA 95(449), on path space.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from boltzsample.densities import StudentT
from boltzsample.maps import Diagonal
from boltzsample.samplers.refine import log_worth
from boltzsample.samplers.reverse import Reverse
from boltzsample.streams import Rng


class Defended(NamedTuple):
    """Ends z (n, dim) of paths and -log q of these (n,), float64: add log p(z) for log-weights."""

    z: Tensor
    log_ratio: Tensor


def defended(reverse: Reverse, n: int, share: float, rng: Rng, dim: int) -> Defended:
    """n paths, a `share` of which begin at the data with the wide law and go back to noise: a stratified mixture of both path laws."""
    wide = round(share * n)
    ends = wide_law(dim, rng).sample(rng, wide)
    forth = reverse.draw(n - wide, dim, rng)
    if not wide:
        return Defended(*forth)
    back = reverse.back(ends, rng)
    order = rng.uniform(n).argsort()  # so that what is cut off later is of both kinds
    z, log_ratio = torch.cat([forth.x, ends])[order], torch.cat([forth.log_ratio, back.log_ratio])[order]
    return Defended(z, mixed_ratio(z, log_ratio, wide / n, rng))


def mixed_ratio(z: Tensor, log_ratio: Tensor, share: float, rng: Rng) -> Tensor:
    """-log of (1 - share) q_0 prod f / prod b + share t_5(z): the log-ratio against the mixture of path laws."""
    if share == 0:
        return log_ratio
    wide = wide_law(z.shape[-1], rng).log_prob(z).double()
    return -torch.logaddexp(math.log1p(-share) - log_ratio, math.log(share) + wide)


def helps(share: float, z: Tensor, log_ratio: Tensor, log_p: Tensor, rng: Rng) -> bool:
    """Whether weights are worth more with a share of defensive paths, from paths back from draws z (n, dim) of the target p."""
    mixed = mixed_ratio(z, log_ratio, share, rng) + log_p
    fine = mixed.isfinite()
    return bool(fine.any()) and log_worth(mixed[fine].cpu()) > log_worth((log_ratio + log_p)[fine].cpu())


def wide_law(dim: int, rng: Rng) -> StudentT:
    """The defensive law in scaled units: t_5 widened by 1 + 1.4 / sqrt(dim) (TRUST.md 1.3)."""
    scale = torch.full((dim,), 1 + 1.4 / math.sqrt(dim), dtype=rng.dtype, device=rng.generator.device)
    return StudentT(Diagonal(torch.zeros_like(scale), scale))
