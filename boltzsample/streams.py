"""Streams: every random number comes from (seed, path), so nothing depends on the order in which work is done.

One root seed; a stream is the seed and a path of names, such as ("mcmc", "replicate", 3, "lane", 0, "block", 7). Its
generator is seeded by a hash of both. Resuming needs only integers, replicates are independent, the global RNG is never
touched. Seeding costs about a microsecond, so chains draw their noise in lanes of LANE units and blocks of steps.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

LANE = 64  # units that share a generator


def block_steps(dim: int) -> int:
    """Steps in a block of noise, a function of dim alone: about 2^18 normals a lane, and no more than a short window needs."""
    return max(1, min(60, 2**18 // (LANE * dim)))


@dataclass(frozen=True)
class Rng:
    """Normal and uniform numbers of one generator, on its device and in the run's dtype."""

    generator: torch.Generator
    dtype: torch.dtype = torch.float64

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=self.dtype, device=self.generator.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=self.dtype, device=self.generator.device)


@dataclass(frozen=True)
class Stream:
    """A reproducible source of randomness, named by its path.

    >>> a, b = Stream(0).child("starts").rng(), Stream(0).child("starts").rng()
    >>> bool((a.normal(3) == b.normal(3)).all())
    True
    """

    seed: int
    path: tuple[str | int, ...] = ()

    def child(self, *names: str | int) -> Stream:
        return Stream(self.seed, (*self.path, *names))

    def rng(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Rng:
        key = hashlib.blake2b(repr((self.seed, self.path)).encode(), digest_size=8).digest()
        generator = torch.Generator(device=device)
        generator.manual_seed(int.from_bytes(key, "little") >> 1)  # seeds are signed 64-bit integers
        return Rng(generator, dtype)


def root(seed: int | None) -> Stream:
    """The root stream of a run. seed None draws one from the operating system; it is recorded in the run's config.

    Raises ValueError for a seed outside 0 <= seed < 2^63.
    """
    if seed is None:
        return Stream(secrets.randbits(63))
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; wanted an integer with 0 <= seed < 2^63, or None to draw one")
    return Stream(seed)
