"""Exact truths of mixtures of Gaussians, straight or bent: moments, tail, and how much of the mass is nearest to each centre.

Given x_0, a bent component is Gaussian in the other coordinates, with x_1 moved by b (u_0^2 - s_0^2), u_0 = x_0 - m_0. So what is
nearest to a centre is a normal probability of an interval of x_1 (in the plane) or of a half space (two modes), integrated over x_0.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from targets.curved import CurvedMixture
from targets.mixture import Mixture
from targets.problem import Quantity
from targets.quantities import exact, log_z, moments, tail_near, upper_normal


def mixture_form(target: Mixture | CurvedMixture) -> list[Quantity]:
    """All quantities of the card."""
    w, m, s = target.weights, target.means, target.scales
    b = target.bends if isinstance(target, CurvedMixture) else torch.zeros_like(w)
    mean, square = w @ m, s.square()
    bent = torch.zeros_like(square)
    bent[:, 1] = 2 * b.square() * square[:, 0].square()
    variance = w @ (square + bent + (m - mean).square())  # within and between components

    def upper(c: float) -> float:
        return sum(float(w[k]) * upper_normal((c - float(m[k, 0])) / float(s[k, 0])) for k in range(len(w)))

    how = "closed form: mixture of Gaussians" + (", Var x_1 = s^2 + 2 b^2 s^4 in each" if b.any() else "")
    beyond = tail_near(upper, float(m[:, 0].min()), float((m + 9 * s)[:, 0].max()), "closed form: mixture of normal tails")
    return [*moments(mean, variance, how), beyond, _mode_weights(w, m, s, b), log_z()]


def _mode_weights(w: Tensor, m: Tensor, s: Tensor, b: Tensor) -> Quantity:
    if len(w) == 2 and not b.any():
        return exact("mode_weights", half_spaces(w, m, s), "closed form: normal probabilities of the half planes", at=m)
    if len(w) == 2:
        return exact("mode_weights", bent_half_spaces(w, m, s, b), "half spaces: normal given x_0, quadrature over x_0", at=m)
    return exact("mode_weights", cells(w, m, s, b), "Voronoi cells: normal intervals of x_1 given x_0, quadrature over x_0", at=m)


def half_spaces(w: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """P(x is nearer to centre k): the half space n . x > t, n = m_1 - m_0, a normal tail in each component."""
    n = m[1] - m[0]
    t = n @ (m[0] + m[1]) / 2
    z = (t - m @ n) / (s.square() @ n.square()).sqrt()  # (2,)
    p_1 = sum(float(w[k]) * upper_normal(float(z[k])) for k in range(2))
    return torch.tensor([1 - p_1, p_1], dtype=torch.float64)


def bent_half_spaces(w: Tensor, m: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """The same, n . x being normal given z_0 = u_0/s_0; the trapezoidal rule over z_0 converges geometrically."""
    n = m[1] - m[0]
    t = n @ (m[0] + m[1]) / 2
    z_0 = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
    density = (-z_0.square() / 2).exp()
    u_0 = z_0 * s[:, 0]  # (nodes, 2)
    centre = m @ n + n[0] * u_0 + n[1] * b * (u_0.square() - s[:, 0].square())
    beyond = torch.special.ndtr((centre - t) / (s[:, 1:].square() @ n[1:].square()).sqrt())
    p_1 = float(w @ ((density * beyond).sum(0) / density.sum()))
    return torch.tensor([1 - p_1, p_1], dtype=torch.float64)


def cells(w: Tensor, m: Tensor, s: Tensor, b: Tensor, per_sd: int = 80) -> Tensor:
    """P(centre k is the nearest) (k,) in the plane. Cells have corners: the midpoint rule in x_0 errs by about 1e-7."""
    weights, centres, sds, bends = (v.numpy() for v in (w, m, s, b))
    step = sds[:, 0].min() / per_sd
    x = np.arange((centres - 9 * sds)[:, 0].min(), (centres + 9 * sds)[:, 0].max(), step) + step / 2
    u = x[:, None] - centres[:, 0]  # (nodes, components)
    density = weights * np.exp(-0.5 * (u / sds[:, 0]) ** 2) / (sds[:, 0] * np.sqrt(2 * np.pi))
    middle = centres[:, 1] + bends * (u**2 - sds[:, 0] ** 2)
    found = []
    for k in range(len(centres)):
        low, high = (edge[:, None] for edge in _slice(x, centres, k))
        inside = np.maximum(ndtr((high - middle) / sds[:, 1]) - ndtr((low - middle) / sds[:, 1]), 0)
        found.append((density * inside).sum() * step)
    return torch.tensor(found, dtype=torch.float64)


def _slice(x: np.ndarray, centres: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The interval of x_1 in which centre k is nearest, for each x_0 of x; empty where low > high."""
    low, high = np.full_like(x, -np.inf), np.full_like(x, np.inf)
    for j in range(len(centres)):
        dx, dy = centres[j] - centres[k]
        # nearer to k than to j:  dx x_0 + dy x_1 < t
        t = 0.5 * (centres[j] @ centres[j] - centres[k] @ centres[k])
        if dy > 0:
            high = np.minimum(high, (t - dx * x) / dy)
        elif dy < 0:
            low = np.maximum(low, (t - dx * x) / dy)
        elif j != k:
            low = np.where(dx * x < t, low, np.inf)
    return low, high
