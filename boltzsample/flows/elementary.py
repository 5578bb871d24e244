"""What flows are made of, layers without conditions:

    affine, permute  x = m + e^s z,  x = z[order]
    rotation         x = R z,  R = exp(A - A^T)
    Gaussianization  x_i = Phi^-1(mean_k Phi(e^{a_ik} z_i + b_ik))  Chen & Gopinath (2000), between rotations

The `push_with_score` of a layer carries G = grad_x log q(x) along (layers.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from zuko.transforms import RotationTransform

Pushed = tuple[Tensor, Tensor]  # x (*batch, dim), log_det (*batch)

HALVINGS = 64  # of an interval a few tens wide: float64's last digit


class Scale(nn.Module):
    """x = m + e^s z, coordinate by coordinate."""

    has_pull = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.m, self.s = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def push(self, z: Tensor) -> Pushed:
        return self.m + self.s.exp() * z, self.s.sum().expand(z.shape[:-1])

    def pull(self, x: Tensor) -> Pushed:
        return (x - self.m) * (-self.s).exp(), -self.s.sum().expand(x.shape[:-1])

    def push_with_score(self, z: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self.push(z), G * (-self.s.detach()).exp()


class Permute(nn.Module):
    """x = z[order]."""

    has_pull = True
    order: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)

    def push(self, z: Tensor) -> Pushed:
        return z.index_select(-1, self.order), z.new_zeros(z.shape[:-1])

    def pull(self, x: Tensor) -> Pushed:
        return x.index_select(-1, self.order.argsort()), x.new_zeros(x.shape[:-1])

    def push_with_score(self, z: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self.push(z), G.index_select(-1, self.order)


class Rotate(nn.Module):
    """x = R z, R = exp(A - A^T)."""

    has_pull = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(dim, dim))

    def push(self, z: Tensor) -> Pushed:
        return z @ RotationTransform(self.A).R.mT, z.new_zeros(z.shape[:-1])

    def pull(self, x: Tensor) -> Pushed:
        return x @ RotationTransform(self.A).R, x.new_zeros(x.shape[:-1])


class Gaussianize(nn.Module):
    """x_i = Phi^-1(mean_k Phi(e^{a_ik} z_i + b_ik)), from whichever tail is the smaller: exact out to |x| = 12 in float32, 37 in float64.

    Its inverse has no closed form: one of the components is at x or below, another at x or above, and between their z bisection finds it.
    """

    has_pull, inverts = False, True

    def __init__(self, dim: int, components: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(dim, components)), nn.Parameter(torch.zeros(dim, components))

    def push(self, z: Tensor) -> Pushed:
        u = self._u(z)
        below, above = (torch.special.log_ndtr(v).logsumexp(-1) - math.log(u.shape[-1]) for v in (u, -u))
        tail = torch.special.ndtri(torch.minimum(below, above).exp())
        x = torch.where(below < above, tail, -tail)
        log_f = (self.a - 0.5 * u.square()).logsumexp(-1) - math.log(u.shape[-1]) + 0.5 * x.square()
        return x, log_f.sum(-1)

    def pull(self, x: Tensor) -> Pushed:
        left, target = x < 0, torch.special.log_ndtr(-x.abs())
        with torch.no_grad():
            z = self._bisected(x, left, target)
        log_tail, log_density = self._tail(z, left)
        slope = (log_density - log_tail).exp() * torch.where(left, 1.0, -1.0)
        z = z - (log_tail - target) / slope.detach()  # Newton's step: gradients by the implicit function
        u = self._u(z)
        log_f = (self.a - 0.5 * u.square()).logsumexp(-1) - math.log(u.shape[-1]) + 0.5 * x.square()
        return z, -log_f.sum(-1)

    def _u(self, z: Tensor) -> Tensor:
        return self.a.exp() * z[..., None] + self.b  # (*batch, dim, components)

    def _tail(self, z: Tensor, left: Tensor) -> Pushed:
        """log of the mass below z, where `left`, or above it, and the log-density at z."""
        u = self._u(z)
        log_tail = torch.special.log_ndtr(torch.where(left[..., None], u, -u)).logsumexp(-1) - math.log(u.shape[-1])
        return log_tail, (self.a - 0.5 * u.square()).logsumexp(-1) - math.log(u.shape[-1] * math.sqrt(2 * math.pi))

    def _bisected(self, x: Tensor, left: Tensor, target: Tensor) -> Tensor:
        ends = (x[..., None] - self.b) * (-self.a).exp()
        low, high = ends.amin(-1), ends.amax(-1)
        for _ in range(HALVINGS):
            z = 0.5 * (low + high)
            below = (self._tail(z, left)[0] < target) == left
            low, high = torch.where(below, z, low), torch.where(below, high, z)
        return z
