"""Swaps between the levels of replica exchange.

Level k of T has the density pi_k ~ p_0 exp(b_k s), s(x) = log p(x) - log p_0(x). Neighbours exchange their points with probability

    min(1, r),        log r = (b_(k+1) - b_k) (s(x_k) - s(x_(k+1))),        r = pi_k(x_(k+1)) pi_(k+1)(x_k) / (pi_k(x_k) pi_(k+1)(x_(k+1))),

the pairs (0, 1), (2, 3), ... in even rounds and (1, 2), (3, 4), ... in odd ones: points then travel instead of diffusing, which is why
the order is fixed and not drawn (Okabe, Kawata, Okamoto & Mikami 2001, Chem. Phys. Lett. 335; Syed, Bouchard-Cote, Deligiannidis &
Doucet 2022, JRSS B 84(2)). Every swap leaves the product of all pi_k invariant.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Swaps(NamedTuple):
    """What one round of swaps does."""

    source: Tensor  # (*batch, T, ladders) the level whose point each level has afterwards
    accept_prob: Tensor  # (*batch, T - 1, ladders) of every pair of neighbours, whether it was its turn or not


def exchange(s: Tensor, beta: Tensor, uniform: Tensor, odd: bool) -> Swaps:
    """One round. s: (*batch, T, ladders), the log ratios s(x); beta: (*batch, T); uniform: (*batch, T - 1, ladders).

    A point without density, s = -inf, is never accepted, and neither is NaN.

    >>> s, beta = torch.tensor([[3.0], [1.0], [2.0]]), torch.tensor([0.0, 0.5, 1.0])
    >>> exchange(s, beta, torch.full((2, 1), 0.9), odd=False).source.flatten()     # the better point goes to the colder level
    tensor([1, 0, 2])
    """
    levels = s.shape[-2]
    log_r = (beta[..., 1:] - beta[..., :-1])[..., None] * (s[..., :-1, :] - s[..., 1:, :])
    turn = (torch.arange(levels - 1, device=s.device) % 2 == int(odd))[:, None]
    swapped = ((torch.log(uniform) < log_r) & turn).long()
    none = torch.zeros_like(swapped[..., :1, :])
    up, down = torch.cat([swapped, none], -2), torch.cat([none, swapped], -2)
    source = torch.arange(levels, device=s.device)[:, None] + up - down
    return Swaps(source, torch.nan_to_num(log_r, nan=-torch.inf).clamp(max=0.0).exp())


def take(value: Tensor, source: Tensor) -> Tensor:
    """value (*batch, T, ladders) or (*batch, T, ladders, dim) after the swaps."""
    if value.ndim == source.ndim:
        return value.gather(-2, source)
    return value.gather(-3, source[..., None].expand_as(value))
