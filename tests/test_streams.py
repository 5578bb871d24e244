"""Streams: numbers depend on (seed, path) and on nothing else; nothing global is touched."""

from __future__ import annotations

import random
import signal
from typing import Any

import numpy as np
import pytest
import torch

import boltzsample as bz
from boltzsample.streams import LANE, Stream, block_steps, root
from tests.small import SMALL, normal

A = Stream(7, ("mcmc", "lane", 0, "block", 3))
OTHERS = [
    Stream(8, A.path),
    Stream(7, ("mcmc", "lane", 0, "block", 4)),
    Stream(7, ("mcmc", "lane", 1, "block", 3)),
    Stream(7, ("mcmc", "lane", "0", "block", 3)),
    Stream(7, ("mcmc", "block", 3, "lane", 0)),
    Stream(7, ("mcmclane", 0, "block", 3)),
    A.child(0),
    Stream(7),
]


def test_same_path_same_numbers() -> None:
    by_child = Stream(7).child("mcmc").child("lane", 0).child("block", 3)
    assert by_child == A
    assert torch.equal(by_child.rng().normal(5, 3), A.rng().normal(5, 3))
    assert torch.equal(by_child.rng().uniform(9), A.rng().uniform(9))


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_other_path_or_seed_other_numbers(other: Stream) -> None:
    assert not bool((A.rng().normal(50) == other.rng().normal(50)).any())


def test_order_and_interleaving_do_not_matter() -> None:
    other = OTHERS[1]
    a, b = A.rng(), other.rng()
    b0, a0, a1, b1 = b.normal(3), a.normal(3), a.normal(3), b.normal(3)
    again_b, again_a = other.rng(), A.rng()
    assert [again_a.normal(3).tolist() for _ in range(2)] == [a0.tolist(), a1.tolist()]
    assert [again_b.normal(3).tolist() for _ in range(2)] == [b0.tolist(), b1.tolist()]


def test_the_hash_is_stable() -> None:
    """A saved seed must give the same streams in later versions: the key is part of the format."""
    assert Stream(0, ("starts", "replicate", 3)).rng().generator.initial_seed() == 3138259849198173024


def test_rng_has_the_dtype_asked_for() -> None:
    for dtype in (torch.float32, torch.float64):
        rng = A.rng(dtype)
        assert rng.normal(2, 3).dtype == dtype and rng.normal(2, 3).shape == (2, 3)
        u = rng.uniform(10_000)
        assert u.dtype == dtype and float(u.min()) >= 0 and float(u.max()) < 1


def test_streams_are_independent() -> None:
    """4,000 streams of 64 numbers: their means are N(0, 1/64), the pairwise products of neighbours too. z > 5: 1e-6 a line."""
    x = torch.stack([Stream(0).child("lane", i).rng().normal(64) for i in range(4000)])
    means = x.mean(-1) * 8
    assert abs(float(means.mean())) * 4000**0.5 < 5
    assert abs(float(means.var()) - 1) / (2 / 4000) ** 0.5 < 5
    assert abs(float((x[1:] * x[:-1]).mean())) * (3999 * 64) ** 0.5 < 5


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, True, False, 1.0, "1", np.float64(3)])
def test_bad_seeds(seed: Any) -> None:
    with pytest.raises(ValueError, match="wanted an integer with 0 <= seed < 2\\^63"):
        root(seed)


def test_seeds_at_the_ends_and_none() -> None:
    assert root(0) == Stream(0) and root(2**63 - 1).rng().normal(1).isfinite()
    drawn = {root(None).seed for _ in range(20)}
    assert len(drawn) == 20 and all(0 <= s < 2**63 for s in drawn)


def test_a_drawn_seed_is_recorded_and_repeats_the_run() -> None:
    first = bz.sample(normal(), SMALL, 640)
    again = bz.sample(normal(), SMALL, 640, seed=first.config["seed"])
    assert torch.equal(first.draws.x, again.draws.x)


@pytest.mark.parametrize("dim", [1, 2, 31, 300, 10**5])
def test_a_block_of_noise_is_about_2_to_18(dim: int) -> None:
    assert block_steps(dim) >= 1
    assert block_steps(dim) * LANE * dim <= max(2**18, LANE * dim)


def _global_state() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    return [
        torch.get_rng_state().tolist(),
        (name, keys.tolist(), rest),
        random.getstate(),
        (torch.get_default_dtype(), torch.get_num_threads()),
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled()),
        (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
    ]


@pytest.mark.parametrize("seed", [0, None])
def test_a_whole_run_leaves_global_state_alone(seed: int | None) -> None:
    before = _global_state()
    result = bz.sample(normal(), SMALL, 640, seed=seed, replicates=2)
    result.summary()
    assert _global_state() == before


def test_global_seeds_do_not_matter() -> None:
    runs = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            random.seed(seed)
            runs.append(bz.sample(normal(), SMALL, 640, seed=0).draws.x)
    assert torch.equal(*runs)
