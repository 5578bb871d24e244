"""The four posteriors: the peer samples the same density, the seconds add up, and the table says what was measured."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import posteriors
from benchmarks.posteriors import HEADER, PEER, REGRESSIONS, ours, potential, rows, torch_compiles, worst_ess
from boltzsample.streams import Stream
from tests.zoo import get


@pytest.mark.parametrize("name", REGRESSIONS)
def test_the_peer_has_the_same_density(name: str) -> None:
    jax = pytest.importorskip("jax")
    p = get(name)
    w = 0.3 * Stream(1).rng().normal(6, p.target.dim)
    theirs = np.array([float(potential(p)(jax.numpy.asarray(row.numpy(), "float32"))) for row in w])
    both = theirs + p.target.log_prob(w).numpy()
    assert np.ptp(both) < 2e-6 * np.abs(theirs).max()  # one constant for all points, to the rounding of float32


def test_our_seconds_add_up_and_the_draws_are_right() -> None:
    p = get("german-credit")
    torch_compiles()  # imports dynamo, for a second
    began = time.monotonic()
    run = ours(p, torch.float32, "auto", 256, seed=0)
    took = time.monotonic() - began
    assert run.compile == 0 and 0 < run.sampling < took and 0 < run.audit < took
    assert run.warm_up + run.sampling + run.audit == pytest.approx(took, rel=0.1)
    assert run.x.shape == (256, 16, 25)
    off = np.abs(run.x.mean((0, 1)) - p.truth["mean"].value.numpy()) / p.truth["sd"].value.numpy()
    assert off.max() < 0.1  # six standard errors of 4096 independent draws


def test_a_compilation_is_seen_when_it_happens() -> None:
    spans = torch_compiles()
    spans.clear()
    began = time.monotonic()
    torch.compile(lambda x: x.sin() + 1, backend="eager")(torch.ones(3))
    assert spans and began <= spans[0][0] <= spans[0][1] <= time.monotonic()


def test_worst_ess_is_that_of_the_worst_coordinate() -> None:
    z = Stream(2).rng().normal(4, 1_000, 2).numpy()
    slow = np.copy(z[..., 1])
    for t in range(1, 1_000):
        slow[:, t] = 0.9 * slow[:, t - 1] + np.sqrt(0.19) * z[:, t, 1]
    x = np.stack([z[..., 0], slow], -1)
    assert worst_ess(x) == pytest.approx(4_000 * 0.1 / 1.9, rel=0.4)  # AR(1) of .9: one draw in 19
    assert worst_ess(x[..., :1]) > 3_000


def run_of(sampler: str, repeat: int, ess: float, **seconds: float) -> dict[str, Any]:
    clocks = {"compile": 0.0, "warm_up": 1.0, "sampling": 1.0, "audit": 0.0, "error": 0.01}
    return {"problem": "cancer", "sampler": sampler, "repeat": repeat, "ess": ess} | clocks | seconds


def test_rows_are_medians_and_ratios_are_paired() -> None:
    mine = [run_of("mine", r, ess, compile=9.0 - r, audit=0.5) for r, ess in enumerate((200.0, 900.0, 400.0))]
    peer = [run_of(PEER, r, ess) for r, ess in enumerate((100.0, 100.0, 400.0))]
    first, second = rows([*mine, *peer])
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert first.count("|") == second.count("|") == HEADER.count("|")
    # rate 400, ratios 2, 9, 1; compile of the first run; 9 + 1 + 4000/400 + .5
    assert cells == ["cancer", "mine", "400", "2.00", "200", "400", "9.0", "1.00", "1.00", "0.50", "20.5", "0.010"]


def test_without_numpyro_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from benchmarks.__main__ import main

    monkeypatch.setattr(posteriors, "find_spec", lambda name: None)
    assert main(["posteriors"]) == 1
    assert "boltzsample[bench]" in capsys.readouterr().err
