"""How slowly the mass of the density falls far out: what decides which moments there are (estimates/far.py), and what no short run can know
of its own draws.

    cones        log p = -(nu + dim) log r along a random direction, which lies in the midst of a cone: P(|x| > r) ~ r^-nu
    tubes        log p = -(nu + 1) log r along an axis, where it is as wide across further out: independent heavy coordinates
    half-lines   log p = -nu |z| along an axis, likewise, where the user's x is another than the sampler's z: a positive x is e^z to the
                 sampler, and a half-Cauchy an exponential tail of z

Each is three points in steps, and `fall` is how many nats the mass beyond loses in such a step. Of 100 axes at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from boltzsample.backend import Backend
from boltzsample.improper import RANDOM, Rays, log_prob_at, steepest
from boltzsample.samplers.sampler import Ledger
from boltzsample.samplers.starts import Starts
from boltzsample.streams import Stream
from boltzsample.target import Target, readout

LIGHT = 12.0  # nu from which fourth powers, too, have a third moment
POWERS = (1e4, 1e6, 1e8)  # scales: every second of improper.DECADES
LINE = (6.0, 12.0, 18.0)
STRAIGHT = 0.01  # of a step's fall is what the next may differ by
FAINT, BY_DIM = 25.0, 3.0  # nats below the height, at the scale of the source, from which nobody meets a tail
NARROWER = 0.1  # nats that log p beside an axis, less that on it, may lose on the way out


def falls(
    target: Target, source: Starts, rays: Rays | None, backend: Backend, stream: Stream, ledger: Ledger
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """`far` (3, k, dim) and `fall` (k,) of Draws; None where the mass falls faster than any power that matters. Price, under "preflight":
    three log_prob a half-line, and two more of each tube and half-line that is one by its fall.

    >>> from boltzsample.densities import StudentT
    >>> from boltzsample.improper import follow
    >>> from boltzsample.maps import Diagonal
    >>> one = torch.ones(10, dtype=torch.float64)
    >>> t = StudentT(Diagonal(0 * one, one), df=5)
    >>> run = Backend(), Stream(0), Ledger()
    >>> (falls(t, Starts(t), follow(t, Starts(t), *run), *run)[1] / torch.tensor(100.0).log()).min().round(decimals=3)
    tensor(5., dtype=torch.float64)
    """
    if rays is None:
        return None, None
    far = [rays.at(torch.tensor(POWERS).to(rays.r))]
    log_p, fall = [rays.log_p[::2]], [_by_power(rays, source.height)]
    if _reads_otherwise(target, rays.m[None]):
        lines = rays.at(torch.tensor(LINE).to(rays.r))[:, : rays.axes]
        log_p.append(log_prob_at(target, lines))
        ledger.add("preflight", (log_p[1].numel(), 0))
        far, fall = [*far, lines], [*fall, _by_line(rays, log_p[1], source.height)]
    x, p, nats = torch.cat(far, 1), torch.cat(log_p, 1), torch.cat(fall)
    nats = torch.where(_narrows(target, rays, x, p, nats, stream, ledger), torch.inf, nats)
    slow = nats.isfinite()
    return (x[:, slow], nats[slow]) if bool(slow.any()) else (None, None)


def _reads_otherwise(target: Target, x: Tensor) -> bool:
    """Whether the user's space is another than the sampler's."""
    y = readout(target, x)
    return isinstance(y, dict) or y.shape != x.shape or not torch.equal(y, x)


def _by_power(rays: Rays, height: float) -> Tensor:
    """Nats a step (k,) of the tubes about the axes and of the cones; infinite where log_prob falls faster, not at all, or too low."""
    slope, dim = steepest(rays), rays.u.shape[-1]
    nu = -slope - dim
    nu[: rays.axes] += dim - 1
    at_scale = rays.log_p[0] - slope * rays.r[0].double().log() - height
    step = torch.tensor(POWERS, dtype=torch.float64).log().diff()[0].to(nu.device)
    return torch.where(_matters(nu, at_scale, dim), nu * step, torch.inf)


def _by_line(rays: Rays, log_p: Tensor, height: float) -> Tensor:
    """Nats a step (axes,) of half-lines, the same in both steps."""
    first, second = -log_p.diff(dim=0)
    step = (LINE[1] - LINE[0]) * rays.u[: rays.axes].abs().amax(-1).double()
    straight = (first - second).abs() <= STRAIGHT * second
    return torch.where(straight & _matters(second / step, log_p[0] + first - height, rays.u.shape[-1]), second, torch.inf)


def _matters(nu: Tensor, at_scale: Tensor, dim: int) -> Tensor:
    return (nu > 0) & (nu < LIGHT) & (at_scale > -FAINT - BY_DIM * dim)


def _narrows(target: Target, rays: Rays, x: Tensor, log_p: Tensor, fall: Tensor, stream: Stream, ledger: Ledger) -> Tensor:
    """Which of the candidates at x (3, k, dim) are along an axis (k,), and narrower across at the last point than at the first."""
    along = torch.ones_like(fall, dtype=torch.bool)
    along[rays.axes : rays.axes + 2 * RANDOM] = False
    asked = along & fall.isfinite()
    if not bool(asked.any()):
        return torch.zeros_like(asked)
    u = torch.cat([rays.u, rays.u[: rays.axes]])[: len(fall)][asked]
    across = torch.where(u == 0, rays.wide * stream.child("across").rng(x.dtype, x.device).normal(*u.shape), 0)
    beside = log_prob_at(target, x[::2, asked] + across) - log_p[::2, asked]
    ledger.add("preflight", (beside.numel(), 0))
    narrow = torch.zeros_like(asked)
    narrow[asked] = ~(beside[1] >= beside[0] - NARROWER)
    return narrow
