"""Continuous flows: x = z(1) where dz/dt = v(t, z), z(0) = z, and

    log|det J| = int_0^1 tr dv/dz dt.

The trace is exact (dim backward passes), or Hutchinson's estimate mean_k e_k^T (dv/dz) e_k with Rademacher probes e_k. Probes are
a fixed function of the bits of z, one set a trajectory: `push` stays a function, and probes of different points are unrelated.
Estimates are unbiased for log_det but not for weights: with variance s^2 log Z is s^2/2 too high and the ESS e^(-s^2) of
what it was, so `log_det_variance` measures it. Grathwohl, Chen, Bettencourt, Sutskever & Duvenaud (2019), ICLR, equations 5-6.

The solver is zuko's Dormand-Prince 5(4) with the adjoint method; its error is of the order of `tolerance`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from zuko.nn import MLP
from zuko.utils import odeint

FREQUENCIES = 3
TRACE_UNIT = 0.1  # the trace may be ten times less accurate: the error control is over all components at once


class Continuous(nn.Module):
    """The flow of a neural ODE; probes=0 takes the exact trace."""

    has_pull = True
    freqs: Tensor

    def __init__(self, dim: int, hidden: Sequence[int], tolerance: float, probes: int) -> None:
        super().__init__()
        self.net = MLP(dim + 2 * FREQUENCIES, dim, hidden, nn.Tanh)
        self.tolerance, self.probes = tolerance, probes
        self.register_buffer("freqs", torch.pi * torch.arange(1.0, FREQUENCIES + 1))

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_dets = self._solve(z, 0.0, 1.0)
        return x, log_dets.mean(0)

    def pull(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_dets = self._solve(x, 1.0, 0.0)
        return z, log_dets.mean(0)

    def log_det_variance(self, z: Tensor) -> Tensor:
        """The variance (*batch) of log_det over probes; zero with the exact trace, nan with one probe."""
        if self.probes == 0:
            return z.new_zeros(z.shape[:-1])
        return self._solve(z, 0.0, 1.0)[1].var(0) / self.probes

    def velocity(self, t: Tensor, z: Tensor) -> Tensor:
        phase = self.freqs * t
        features = torch.cat([phase.cos(), phase.sin()]).expand(*z.shape[:-1], -1)
        v: Tensor = self.net(torch.cat([z, features], -1))
        return v

    def _solve(self, z: Tensor, t0: float, t1: float) -> tuple[Tensor, Tensor]:
        """The end point (*batch, dim) and the integrals of the trace (k, *batch), k = probes or 1."""
        learning = torch.is_grad_enabled() and (z.requires_grad or any(p.requires_grad for p in self.parameters()))
        e = self._probes(z)

        def both(t: Tensor, y: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                y = y.clone().requires_grad_()  # the clone stays attached where the adjoint differentiates through it
                v = self.velocity(t, y)
                directions = e.expand(-1, *v.shape)
                (vjps,) = torch.autograd.grad(v, y, directions, create_graph=learning, is_grads_batched=True)
            quadratic = (vjps * directions).sum(-1)  # (k, *batch)
            traces = quadratic if self.probes else quadratic.sum(0, keepdim=True)
            return v, TRACE_UNIT * traces

        phi = [p for p in self.parameters() if p.requires_grad]
        start = (z, z.new_zeros(max(self.probes, 1), *z.shape[:-1]))
        x, traces = odeint(both, start, t0, t1, phi, self.tolerance, 10 * self.tolerance)
        return x, traces / TRACE_UNIT

    def _probes(self, z: Tensor) -> Tensor:
        """Directions (k, *batch, dim) of +-1, from the bits of z; the unit vectors (dim, 1, .., dim) for the exact trace."""
        if self.probes == 0:
            return torch.eye(z.shape[-1], dtype=z.dtype, device=z.device).reshape(-1, *[1] * (z.dim() - 1), z.shape[-1])
        bits = z.detach().double().contiguous().view(torch.int64)
        mixed = bits ^ (bits * 0x9E3779B97F4A7C1).sum(-1, keepdim=True)
        rows = [(mixed * (2 * k + 3) * 0x2545F4914F6CDD1D) >> 40 & 1 for k in range(self.probes)]
        return 2 * torch.stack(rows).to(z.dtype) - 1
