"""What the density is like far out: is there a mass to normalize by, and which means are there?

Along a ray x = m + r u the integral of p r^(k-1) over a tube or cone of any k >= 1 dimensions is finite only if log p falls faster than
-log r in the end. From r = 1e4 to 1e8 times the scale of the wide source, a slope d log p / d log r above -1.05 in every decade says that
it does not, whatever the draws of a short run look like. Rays run both ways along the coordinates and along random directions; a
density that is improper along none of them is not found out, nor one that is improper at a finite point.

Where log p = -(nu + dim) log r on a cone of directions, P(|x| > r) ~ r^-nu there, and an f that grows like r^m has moments below nu / m
alone: what no short run can know of its own draws (estimates/far.py). A random direction lies in the midst of a cone. Independent heavy
coordinates have tubes instead: log p = -(nu + 1) log r along an axis, where it is as wide across further out. All this is in the sampler's
coordinates, and of the first 100 axes: the heavy tail of a positive x is an exponential one of log x, and is left to k-hat.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from boltzsample.backend import Backend
from boltzsample.flags import Flag, flag
from boltzsample.maps import Diagonal
from boltzsample.samplers.sampler import Ledger
from boltzsample.samplers.starts import Starts
from boltzsample.streams import Stream
from boltzsample.target import Target

AXES = 100  # coordinates whose rays are followed, at most
RANDOM = 32
DECADES = (4, 5, 6, 7, 8)
SLOPE = -1.05
LIGHT = 12.0  # nu from which fourth powers, too, have a third moment
SECOND = 2  # every second decade is FAR times as far as the one before
ROUNDED = -1e15
NARROWER = 0.1  # nats that log p beside an axis, less that on it, may lose on the way there


class Rays(NamedTuple):
    """log_prob far out on k rays: points `x` (5, k, dim) at `r` (5,) scales, `log_p` (5, k) there, and what the rays are called. `fall`
    (k,) is nu such that P(|x| > r) ~ r^-nu about a ray, at the least; infinite where nothing says so."""

    x: Tensor
    r: Tensor
    log_p: Tensor
    names: list[str]
    fall: Tensor


def follow(target: Target, source: Starts, backend: Backend, stream: Stream, ledger: Ledger) -> Rays | None:
    """The rays from a wide source; None without one. Price: five log_prob a ray, entered under "preflight"."""
    if source.base is None:
        return None
    u, names = _directions(target.dim, stream, backend)
    map = source.first_map(backend, target.dim)
    wide = map.s.abs() if isinstance(map, Diagonal) else map.L.norm(dim=-1)  # each axis in its own scale
    u = torch.cat([wide * u[: -2 * RANDOM], map.push(u[-2 * RANDOM :])[0] - map.m])
    r = torch.tensor([10.0**k for k in DECADES], dtype=backend.dtype, device=backend.device)
    x = map.m + r[:, None, None] * u
    log_p = target.log_prob(x.reshape(-1, target.dim)).reshape(len(r), len(u)).double()
    ledger.add("preflight", (log_p.numel(), 0))
    fall, axes = _fall(log_p, r, target.dim, source.height), len(u) - 2 * RANDOM
    if bool(fall[:axes].isfinite().any()):
        across = wide * stream.child("across").rng(backend.dtype, backend.device).normal(axes, target.dim)
        beside = x[(0, SECOND), :axes] + torch.where(u[:axes] == 0, across, 0)
        near, far = target.log_prob(beside.reshape(-1, target.dim)).reshape(2, -1).double() - log_p[(0, SECOND), :axes]
        ledger.add("preflight", (2 * axes, 0))
        fall[:axes] = torch.where(far >= near - NARROWER, fall[:axes], torch.inf)
    return Rays(x, r, log_p, names, fall)


def _fall(log_p: Tensor, r: Tensor, dim: int, height: float) -> Tensor:
    """nu (k,) of tubes about axes and, the last ones, of cones; infinite where log_prob falls faster, not at all, or too low for anybody to
    meet that tail: below e^-25 of the height, and e^-3 for each dimension, at the scale of the source."""
    slope = _slowest(log_p, r)
    nu = -slope - dim
    nu[: -2 * RANDOM] += dim - 1
    at_scale = log_p[0] - slope * r[0].double().log() - height
    return torch.where((nu > 0) & (nu < LIGHT) & (at_scale > -25 - 3 * dim), nu, torch.inf)


def improper_flags(rays: Rays | None) -> tuple[Flag, ...]:
    """IMPROPER_SUSPECTED, with the ray that says so.

    >>> from boltzsample.adapters import from_log_prob
    >>> from boltzsample.densities import StudentT
    >>> from boltzsample.maps import Diagonal
    >>> one = torch.ones(2, dtype=torch.float64)
    >>> source = Starts(StudentT(Diagonal(0 * one, one)))
    >>> half_flat = from_log_prob(lambda x: -0.5 * x[..., 0] ** 2, dim=2)
    >>> [f.detail for f in improper_flags(follow(half_flat, source, Backend(), Stream(0), Ledger()))]
    ['log_prob falls like 0 log r along x[1]']
    """
    if rays is None:
        return ()
    slope = _slowest(rays.log_p, rays.r)
    if not bool((slope > SLOPE).any()):
        return ()
    worst = int(torch.where(slope > SLOPE, slope, -torch.inf).argmax())
    detail = f"log_prob falls like {float(slope[worst]):.2g} log r along {rays.names[worst]}"
    return (flag("IMPROPER_SUSPECTED", value=float(slope[worst]), threshold=SLOPE, detail=detail),)


def power_tail(rays: Rays | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """`far` and `fall` of Draws: three points on each of the rays where log_prob falls like a power, and nu; None where it falls faster
    than any power that matters.

    >>> from boltzsample.densities import StudentT
    >>> from boltzsample.maps import Diagonal
    >>> one = torch.ones(3, dtype=torch.float64)
    >>> t = StudentT(Diagonal(0 * one, one), df=5)
    >>> power_tail(follow(t, Starts(t), Backend(), Stream(0), Ledger()))[1].min().round(decimals=3)
    tensor(5., dtype=torch.float64)
    """
    if rays is None:
        return None, None
    heavy = rays.fall.isfinite()
    return (rays.x[:: SECOND][:, heavy], rays.fall[heavy]) if bool(heavy.any()) else (None, None)


def _directions(dim: int, stream: Stream, backend: Backend) -> tuple[Tensor, list[str]]:
    """Unit vectors (k, dim) and their names."""
    rng = stream.child("rays").rng(backend.dtype, backend.device)
    axes = torch.eye(dim, dtype=backend.dtype, device=backend.device)[:AXES]
    some = rng.normal(RANDOM, dim)
    some = some / some.norm(dim=-1, keepdim=True)
    names = [f"{sign}x[{i}]" for sign in ("", "-") for i in range(len(axes))] + ["a random direction"] * (2 * RANDOM)
    return torch.cat([axes, -axes, some, -some]), names


def _slowest(log_p: Tensor, r: Tensor) -> Tensor:
    """The steepest slope d log p / d log r of each ray's decades (k,); -inf where log p is not finite all along, or
    so low that its digits are lost (1/x of an x that can be no smaller)."""
    slopes = log_p.diff(dim=0) / r.double().log().diff()[:, None]
    fine = log_p.isfinite().all(0) & (log_p > ROUNDED).all(0)
    return torch.where(fine, slopes.nan_to_num(nan=-torch.inf).amin(0), -torch.inf)
