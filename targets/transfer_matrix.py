"""The phi^4 chain solved exactly: it is a Markov chain along its sites, so all integrals are products of one-dimensional ones.

On a grid of spacing h, with K(u, v) = exp(-beta c (u - v)^2 / 2) and V(u) = exp(-beta/c [(1 - u^2)^2/4 + b u]), what arrives at
site i from its left is

    f_1 = K(0, .),   f_{i+1}(v) = h sum_u K(u, v) V(u) f_i(u),

and with g_i arriving from the right, the marginal of site i is f_i V g_i up to a constant, and Z = f_{N+1}(0). The rule is the
trapezoidal one on a smooth integrand that vanishes at both ends: its error is far below rounding for h a tenth of the width
1/sqrt(beta c) of K.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.interpolate import CubicSpline

from targets.phi4 import Phi4
from targets.problem import Quantity
from targets.quantities import exact, log_z, moments, tail_near

GRID, REACH = 1601, 4.0


def marginals(target: Phi4, points: int = GRID, reach: float = REACH) -> tuple[np.ndarray, np.ndarray, float]:
    """The grid (points,), the densities of the sites on it (dim, points), and log Z."""
    u = np.linspace(-reach, reach, points)
    h, stiffness = u[1] - u[0], target.beta * target.c / 2
    well = np.exp(-target.beta / target.c * ((1 - u**2) ** 2 / 4 + target.b * u))
    kernel = np.exp(-stiffness * (u[:, None] - u) ** 2)
    tied = np.exp(-stiffness * u**2)
    arriving, log_scale = [tied], 0.0
    for _ in range(target.dim):
        f = (kernel @ (arriving[-1] * well)) * h
        log_scale += math.log(f.max())
        arriving.append(f / f.max())
    log_z = log_scale + math.log(arriving[-1][len(u) // 2])  # what arrives at 0, the site behind the last
    f = np.array(arriving[:-1])
    p = f * well * f[::-1]  # the chain is symmetric: what arrives from the other end is f in reverse order
    return u, p / (p.sum(1, keepdims=True) * h), log_z


def transfer_matrix_form(target: Phi4) -> list[Quantity]:
    """All quantities of the card."""
    u, p, total = marginals(target)
    h = u[1] - u[0]
    mean, square = (torch.from_numpy((p * f).sum(1) * h) for f in (u, u**2))
    beyond = [CubicSpline(u, density).antiderivative() for density in p]

    def above(c: float, i: int = 0) -> float:
        return float(beyond[i](u[-1]) - beyond[i](c))

    how = f"transfer matrix on {GRID} points of ({-REACH:g}, {REACH:g}) (targets/transfer_matrix.py)"
    positive = torch.tensor([above(0.0, i) for i in range(target.dim)], dtype=torch.float64)
    return [*moments(mean, square - mean.square(), how), tail_near(above, -3, 3, how), exact("positive", positive, how), log_z(total, how)]
