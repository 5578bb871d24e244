"""log Z from a ladder of neighbouring densities: the bridge between each pair, and the error of the whole sum.

With pi_k ~ p_0 exp(b_k s), p_0 normalized, w = (b_(k+1) - b_k) s, and as many draws of level k as of level k + 1, the optimal bridge
between the two (Bennett 1976, J. Comput. Phys. 22, 245; Meng & Wong 1996, Statistica Sinica 6, equation 4.1) solves for c

    sum_(x of level k) sigma(w(x) - c)  =  sum_(x of level k+1) sigma(c - w(x)),       sigma(t) = 1 / (1 + e^-t),

and log Z = sum_k c_k. Neighbouring c_k share draws and points wander between levels, so their errors are not added up: the influence
of each round of each ladder on the whole sum,

    psi_(u,t) = N sum_k f_k(u,t) / D_k,     f_k = sigma(w_k - c) - sigma(c - w_(k+1)),     D_k = -d/dc sum f_k,      mean psi = 0,

is handed to whoever makes bars of means over ladders: the infinitesimal jackknife (Jaeckel 1972; Efron 1982, ch. 6) of the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEWTON = 100
DOUBLINGS = 60


def ladder_log_z(s: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """log Z (replicates,) and influences psi (replicates, ladders, rounds), from s = log p - log p_0 at the draws of all levels
    (rounds, replicates, levels, ladders) and beta (replicates, levels), from 0 to 1; float64.

    >>> rng = torch.Generator().manual_seed(0)                     # p_0 = N(0, 2^2), p = exp(-x^2 / 2), and the level between them
    >>> beta = torch.tensor([[0.0, 0.3, 1.0]], dtype=torch.float64)
    >>> sd = (beta + (1 - beta) / 4).rsqrt()[..., None]
    >>> x = sd * torch.randn(100, 1, 3, 64, generator=rng, dtype=torch.float64)
    >>> log_z, psi = ladder_log_z(-0.5 * x**2 + 0.125 * x**2 + 0.5 * torch.tensor(8 * torch.pi).log(), beta)
    >>> abs(float(log_z) - 0.919) < 0.02, psi.shape                # log sqrt(2 pi)
    (True, torch.Size([1, 64, 100]))
    """
    rise = (beta[:, 1:] - beta[:, :-1]).double()[..., None]
    low, high = rise * s[:, :, :-1].double(), rise * s[:, :, 1:].double()  # (rounds, replicates, levels - 1, ladders)
    c = _root(low, high)
    up, down = torch.sigmoid(low - c[..., None]), torch.sigmoid(c[..., None] - high)
    slope = (up * (1 - up) + down * (1 - down)).sum((0, 3))  # (replicates, levels - 1)
    n = low.shape[0] * low.shape[3]
    psi = n * ((up - down) / slope[..., None]).sum(2)  # (rounds, replicates, ladders)
    return c.sum(-1), psi.permute(1, 2, 0)


def _root(low: Tensor, high: Tensor) -> Tensor:
    """c (replicates, pairs): Newton's method, kept inside a bracket by bisection. A few huge w must not set the bracket: it grows from the
    median. NaN where no point of the lower level has any density."""

    def f(c: Tensor) -> tuple[Tensor, Tensor]:
        up, down = torch.sigmoid(low - c[..., None]), torch.sigmoid(c[..., None] - high)
        return (up - down).sum((0, 3)), (up * (1 - up) + down * (1 - down)).sum((0, 3))

    c = high.transpose(0, 2).flatten(2).median(-1).values.T
    a, b = c - 1, c + 1
    for _ in range(DOUBLINGS):
        below, above = f(a)[0] > 0, f(b)[0] < 0
        if bool((below & above).all()):
            break
        a, b = torch.where(below, a, c - 2 * (c - a)), torch.where(above, b, c + 2 * (b - c))
    c = torch.where(below, c, torch.nan)
    for _ in range(NEWTON):
        value, slope = f(c)
        a, b = torch.where(value > 0, c, a), torch.where(value > 0, b, c)
        newton = c + value / slope
        new = torch.where((newton > a) & (newton < b), newton, (a + b) / 2)
        new, done = torch.where(c.isnan(), c, new), (new - c).abs() < 1e-11 * (1 + c.abs())
        c = new
        if bool((done | c.isnan()).all()):
            break
    return c
