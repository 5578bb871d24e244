"""FAB: the weights of its annealing are unbiased, its buffer deals by weight, and it keeps the modes that reverse KL drops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import boltzsample as bz
from boltzsample.backend import Backend
from boltzsample.flows.base import Normal
from boltzsample.flows.fab import FAB, _Buffer, anneal, train_fab
from boltzsample.flows.families import make_flow
from boltzsample.flows.flow import NoInverse
from boltzsample.kernels import HMC
from boltzsample.progress import Interrupt, Progress
from boltzsample.samplers.sampler import Budget, Ledger, Run
from boltzsample.samplers.starts import Starts
from boltzsample.streams import Rng, Stream
from tests.counted import Counted

LOG_2PI = math.log(2 * math.pi)


def rng(name: str = "test") -> Rng:
    return Stream(0).child(name).rng()


def run() -> Run:
    return Run(Backend(), Stream(0), Starts(None), Ledger(), Budget(), Progress(False), Interrupt())


def test_annealing_weighs_without_bias() -> None:
    """p = N(0, I), q = N(0, s^2 I): E w = int p^2 / q = (s / sqrt(2 - 1/s^2))^d; |z| < 4.5 (false failures: 7e-6). HMC brings w closer."""
    s, dim, n = 1.5, 3, 10_000
    target = bz.from_log_prob(lambda x: -0.5 * x.square().sum(-1) - 0.5 * dim * LOG_2PI, dim=dim)
    flow = make_flow("realnvp", dim, rng("init"), base=Normal(dim, s))
    truth = (s / math.sqrt(2 - 1 / s**2)) ** dim
    spread = []
    for levels in (0, 4):
        _, log_w, accepted = anneal(flow, target, n, levels, HMC(h=torch.tensor(0.4).double(), L=4), rng())
        w = log_w.exp()
        assert abs(float(w.mean()) - truth) < 4.5 * float(w.std()) / math.sqrt(n) and 0.5 < accepted <= 1.0
        spread.append(float(w.std() / w.mean()))
    assert spread[1] < 0.7 * spread[0]


def test_the_buffer_deals_by_weight_and_forgets_the_oldest() -> None:
    buffer = _Buffer(4)
    for i in range(3):
        buffer.add(torch.full((2, 1), float(i)), torch.tensor([0.0, math.log(3.0)]), torch.zeros(2))
    assert buffer.x.flatten().tolist() == [1.0, 1.0, 2.0, 2.0]
    first = torch.stack([buffer.pick(1, Stream(i).rng())[0] for i in range(4_000)])
    share = float((first % 2 == 1).double().mean())  # 3/4, standard error .0068; 4.5 of them: false failures 7e-6
    assert abs(share - 0.75) < 4.5 * 0.0068 and len(set(buffer.pick(4, rng()).tolist())) == 4


def two_modes(x: Tensor) -> Tensor:
    """Weights 1:2 at x_0 = -4 and 4, sd 1."""
    far = torch.tensor([4.0, 0.0], dtype=x.dtype)
    parts = [math.log(w) - 0.5 * (x - c).square().sum(-1) for w, c in ((1 / 3, -far), (2 / 3, far))]
    return torch.logaddexp(*parts) - LOG_2PI


def test_it_keeps_both_modes_and_counts_what_it_asked() -> None:
    """log Z = 0 within 4.5 standard errors of the look, and the lighter mode has its third of the mass."""
    target, there = Counted(bz.from_log_prob(two_modes, dim=2)), run()
    flow = make_flow("realnvp", 2, rng("init"), hidden=(32, 32))
    trained = train_fab(flow, target, there, FAB(passes=120, batch=128, L=3))
    assert there.ledger.phases["training"] == trained.rows == (target.log_prob_rows, target.grad_rows)
    x, log_q, _ = trained.flow.sample_and_log_prob(8_000, rng("draws"))
    W = (two_modes(x) - log_q).softmax(0)
    assert trained.looks[0].ess > 0.3 and abs(trained.looks[0].log_z) < 4.5 * math.sqrt((1 / trained.looks[0].ess - 1) / 4096)
    assert abs(float(W[x[:, 0] < 0].sum()) - 1 / 3) < 0.05
    with pytest.raises(NoInverse, match="realnvp"):
        train_fab(make_flow("affine-iaf", 2, rng()), target, there)
