"""Laplace's approximation at an optimum x* of log p: N(x*, H^-1), H = -Hessian of log p at x*, mass

    log m = log p(x*) + d/2 log(2 pi) - 1/2 log det H.

The Hessian is made of central differences of the gradient, so nobody differentiates through a target. Approximate: used to
widen starts and to ask whether an optimum deserves a visit, never for a reported number.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from boltzsample.target import Target, log_prob_and_grad

GAIN = 1e-6
NEWTON = 5


class Laplace(NamedTuple):
    """x (dim) and log_p there, precision H = C C^T as its factor C (dim, dim), log_mass; `proper` says that H is positive definite and that
    Newton's step from x would gain less than GAIN nats: x is an optimum, not a point where an ascent tired."""

    x: Tensor
    log_p: Tensor
    C: Tensor
    log_mass: float
    proper: bool

    def draw(self, normal: Tensor) -> Tensor:
        """Draws (n, dim) from standard normals (n, dim): x* + C^-T z."""
        away: Tensor = torch.linalg.solve_triangular(self.C, normal, upper=False, left=False)
        return self.x + away

    def radius2(self, x: Tensor) -> Tensor:
        """(x - x*)^T H (x - x*) of points (*batch, dim): chi-squared with dim degrees of freedom under the approximation."""
        return ((x - self.x) @ self.C).square().sum(-1)


def laplace(target: Target, x: Tensor, log_p: Tensor, scale: Tensor) -> tuple[Laplace, int]:
    """The approximation at the optimum near x (dim), with difference steps eps^(1/3) scale (dim), and the gradient rows it cost.

    Where an ascent tired in a long valley, up to NEWTON steps x + H^-1 grad finish it.
    """
    hill, step = _laplace(target, x, log_p, scale)
    rows = 2 * len(x)
    for _ in range(NEWTON):
        if hill.proper or step is None:
            break
        better, _ = log_prob_and_grad(target, step)
        rows += 1
        if not bool(better > hill.log_p):
            break
        hill, step = _laplace(target, step, better, scale)
        rows += 2 * len(x)
    return hill, rows


def _laplace(target: Target, x: Tensor, log_p: Tensor, scale: Tensor) -> tuple[Laplace, Tensor | None]:
    """The approximation at x, and the end of Newton's step from there where H is positive definite."""
    dim = len(x)
    e = torch.finfo(x.dtype).eps ** (1 / 3) * scale
    steps = torch.diag(e)
    grad = target.grad_log_prob(torch.cat([x + steps, x - steps]))
    H = -(grad[:dim] - grad[dim:]) / (2 * e[:, None])
    C, bad = torch.linalg.cholesky_ex((0.5 * (H + H.mT)).double().nan_to_num())
    if bool(bad) or not bool(H.isfinite().all()):
        return Laplace(x, log_p, C.to(x), -math.inf, False), None
    slope = 0.5 * (grad[:dim] + grad[dim:]).mean(0).double()  # the gradient at x, to second order
    half = torch.linalg.solve_triangular(C, slope[:, None], upper=False)
    step = x + torch.linalg.solve_triangular(C.mT, half, upper=True)[:, 0].to(x)
    log_mass = float(log_p) + 0.5 * dim * math.log(2 * math.pi) - float(C.diagonal().log().sum())
    return Laplace(x, log_p, C.to(x), log_mass, bool(0.5 * half.square().sum() < GAIN)), step


def distinct(x: Tensor, log_p: Tensor, scale: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Group points (n, dim) that are within .05 sqrt(dim) scales of a better one: the best of each group (k <= most) as indices,
    and each point's group (n), -1 where there were too many groups or log_p is -inf."""
    group = torch.full((len(x),), -1, device=x.device)
    leaders: list[Tensor] = []
    near = 0.05 * math.sqrt(x.shape[-1])
    while len(leaders) < most and bool((group < 0).any()):
        best = torch.where(group < 0, log_p, -torch.inf).argmax()
        if not bool(log_p[best] > -torch.inf) or int(group[best]) >= 0:
            break
        close = ((x - x[best]) / scale).norm(dim=-1) < near
        close[best] = True
        group = torch.where((group < 0) & close, len(leaders), group)
        leaders.append(best)
    return (torch.stack(leaders) if leaders else group[:0]), group
