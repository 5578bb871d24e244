"""Is there a mass to normalize by? Rays out to where a normalizable density must have fallen faster than 1/r.

Along a ray x = m + r u the integral of p r^(k-1) over a tube or cone of any k >= 1 dimensions is finite only if log p falls faster than
-log r in the end. From r = 1e4 to 1e8 times the scale of the wide source, a slope d log p / d log r above -1.05 in every decade says that
it does not, whatever the draws of a short run look like. Rays run both ways along the coordinates and along random directions; a
density that is improper along none of them is not found out, nor one that is improper at a finite point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from boltzsample.backend import Backend
from boltzsample.flags import Flag, flag
from boltzsample.samplers.sampler import Ledger
from boltzsample.samplers.starts import Starts
from boltzsample.streams import Stream
from boltzsample.target import Target

AXES = 100  # coordinates whose rays are followed, at most
RANDOM = 32
DECADES = (4, 5, 6, 7, 8)
SLOPE = -1.05


def improper_flags(target: Target, source: Starts, backend: Backend, stream: Stream, ledger: Ledger) -> tuple[Flag, ...]:
    """IMPROPER_SUSPECTED, with the ray that says so. Price: five log_prob a ray, entered under "preflight".

    >>> from boltzsample.adapters import from_log_prob
    >>> from boltzsample.densities import StudentT
    >>> from boltzsample.maps import Diagonal
    >>> one = torch.ones(2, dtype=torch.float64)
    >>> source = Starts(StudentT(Diagonal(0 * one, one)))
    >>> half_flat = from_log_prob(lambda x: -0.5 * x[..., 0] ** 2, dim=2)
    >>> [f.detail for f in improper_flags(half_flat, source, Backend(), Stream(0), Ledger())]
    ['log_prob falls like 0 log r along x[1]']
    """
    if source.base is None:
        return ()
    u, names = _directions(target.dim, stream, backend)
    map = source.first_map(backend, target.dim)
    scale = (map.log_det / target.dim).exp()
    r = torch.tensor([10.0**k for k in DECADES], dtype=backend.dtype, device=backend.device)
    x = map.m + scale * r[:, None, None] * u
    log_p = target.log_prob(x.reshape(-1, target.dim)).reshape(len(r), len(u)).double()
    ledger.add("preflight", (log_p.numel(), 0))
    slope = _slowest(log_p, r)
    if not bool((slope > SLOPE).any()):
        return ()
    worst = int(torch.where(slope > SLOPE, slope, -torch.inf).argmax())
    detail = f"log_prob falls like {float(slope[worst]):.2g} log r along {names[worst]}"
    return (flag("IMPROPER_SUSPECTED", value=float(slope[worst]), threshold=SLOPE, detail=detail),)


def _directions(dim: int, stream: Stream, backend: Backend) -> tuple[Tensor, list[str]]:
    """Unit vectors (k, dim) and their names."""
    rng = stream.child("rays").rng(backend.dtype, backend.device)
    axes = torch.eye(dim, dtype=backend.dtype, device=backend.device)[:AXES]
    some = rng.normal(RANDOM, dim)
    some = some / some.norm(dim=-1, keepdim=True)
    names = [f"{sign}x[{i}]" for sign in ("", "-") for i in range(len(axes))] + ["a random direction"] * (2 * RANDOM)
    return torch.cat([axes, -axes, some, -some]), names


def _slowest(log_p: Tensor, r: Tensor) -> Tensor:
    """The steepest slope d log p / d log r of each ray's decades (k,); -inf where log p is not finite all along."""
    slopes = log_p.diff(dim=0) / r.double().log().diff()[:, None]
    fine = log_p.isfinite().all(0)
    return torch.where(fine, slopes.nan_to_num(nan=-torch.inf).amin(0), -torch.inf)
