"""Is there a mass to normalize by? Rays out to where a normalizable density must have fallen faster than 1/r.

Along a ray x = m + r u the integral of p r^(k-1) over a tube or cone of any k >= 1 dimensions is finite only if log p falls faster than
-log r in the end. From r = 1e4 to 1e8 times the scale of the wide source, a slope d log p / d log r above -1.05 in every decade says that
it does not, whatever the draws of a short run look like. Rays run both ways along the coordinates and along random directions; a
density that is improper along none of them is not found out, nor one that is improper at a finite point.
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
ROUNDED = -1e15


class Rays(NamedTuple):
    """log_prob far out on k rays m + r u: first those along the axes, `axes` of them, each in its own scale `wide` (dim,), then random
    ones. `log_p` (5, k) at `r` (5,), and what the rays are called."""

    m: Tensor
    u: Tensor
    wide: Tensor
    r: Tensor
    log_p: Tensor
    names: list[str]
    axes: int

    def at(self, r: Tensor) -> Tensor:
        """The points (len(r), k, dim)."""
        return self.m + r[:, None, None] * self.u


def follow(target: Target, source: Starts, backend: Backend, stream: Stream, ledger: Ledger) -> Rays | None:
    """The rays from a wide source; None without one. Price: five log_prob a ray, entered under "preflight"."""
    if source.base is None:
        return None
    u, names = _directions(target.dim, stream, backend)
    map, axes = source.first_map(backend, target.dim), len(u) - 2 * RANDOM
    wide = map.s.abs() if isinstance(map, Diagonal) else map.L.norm(dim=-1)
    u = torch.cat([wide * u[:axes], map.push(u[axes:])[0] - map.m])
    r = torch.tensor([10.0**k for k in DECADES], dtype=backend.dtype, device=backend.device)
    rays = Rays(map.m, u, wide, r, r, names, axes)
    log_p = log_prob_at(target, rays.at(r))
    ledger.add("preflight", (log_p.numel(), 0))
    return rays._replace(log_p=log_p)


def log_prob_at(target: Target, x: Tensor) -> Tensor:
    """log_prob (...) of points x (..., dim) in one flat batch, float64."""
    return target.log_prob(x.reshape(-1, target.dim)).reshape(x.shape[:-1]).double()


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
    slope = steepest(rays)
    if not bool((slope > SLOPE).any()):
        return ()
    worst = int(torch.where(slope > SLOPE, slope, -torch.inf).argmax())
    detail = f"log_prob falls like {float(slope[worst]):.2g} log r along {rays.names[worst]}"
    return (flag("IMPROPER_SUSPECTED", value=float(slope[worst]), threshold=SLOPE, detail=detail),)


def _directions(dim: int, stream: Stream, backend: Backend) -> tuple[Tensor, list[str]]:
    """Unit vectors (k, dim) and their names."""
    rng = stream.child("rays").rng(backend.dtype, backend.device)
    axes = torch.eye(dim, dtype=backend.dtype, device=backend.device)[:AXES]
    some = rng.normal(RANDOM, dim)
    some = some / some.norm(dim=-1, keepdim=True)
    names = [f"{sign}x[{i}]" for sign in ("", "-") for i in range(len(axes))] + ["a random direction"] * (2 * RANDOM)
    return torch.cat([axes, -axes, some, -some]), names


def steepest(rays: Rays) -> Tensor:
    """The steepest slope d log p / d log r of each ray's decades (k,); -inf where log p is not finite all along, or
    so low that its digits are lost (1/x of an x that can be no smaller)."""
    slopes = rays.log_p.diff(dim=0) / rays.r.double().log().diff()[:, None]
    fine = rays.log_p.isfinite().all(0) & (rays.log_p > ROUNDED).all(0)
    return torch.where(fine, slopes.nan_to_num(nan=-torch.inf).amin(0), -torch.inf)
