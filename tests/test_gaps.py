"""What a flow has cut out of a ring is seen by an exploration in x, and by nobody else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import boltzsample as bz
from boltzsample.flows.base import DefensiveBase
from boltzsample.flows.families import make_flow
from boltzsample.flows.flow import Flow
from boltzsample.samplers.gaps import _judge
from boltzsample.streams import Stream
from tests.small import codes

R, WIDTH = 4.0, 0.3


def ring(x: Tensor) -> Tensor:
    return -0.5 * ((x.norm(dim=-1) - R) / WIDTH).square()


class Cut(nn.Module):
    """z to a ring around 0, uniform but for the arc of 2 pi `share` around angle pi, where it puts nothing."""

    def __init__(self, share: float, has_pull: bool = True, inverts: bool = True) -> None:
        super().__init__()
        self.half, self.has_pull, self.inverts = math.pi * (1 - share), has_pull, inverts

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        theta, r = self.half * torch.erf(z[..., 0] / math.sqrt(2)), (R + WIDTH * z[..., 1]).clamp(min=0.1)
        return torch.stack([r * theta.cos(), r * theta.sin()], -1), self._log_det(z, r)

    def pull(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r, theta = x.norm(dim=-1), torch.atan2(x[..., 1], x[..., 0])
        inside = (theta / self.half).abs() < 1
        z = torch.stack([math.sqrt(2) * torch.erfinv(torch.where(inside, theta / self.half, 0.0)), (r - R) / WIDTH], -1)
        return z, torch.where(inside, -self._log_det(z, r), -torch.inf)

    def _log_det(self, z: Tensor, r: Tensor) -> Tensor:
        return math.log(self.half * math.sqrt(2 / math.pi) * WIDTH) - 0.5 * z[..., 0].square() + r.log()


def run(share: float, make: type, has_pull: bool = True, inverts: bool = True) -> bz.Result:
    flow = Flow(DefensiveBase(2), Cut(share, has_pull, inverts))
    return bz.sample(bz.from_log_prob(ring, dim=2), make(flow), n=3_000, seed=0, fit=False)


@pytest.mark.parametrize(("make", "cheap"), [(bz.FlowIS, True), (bz.FlowIS, False), (bz.LatentMCMC, True)])
def test_a_flow_that_cuts_a_ring_is_untrusted(make, cheap):
    """Three percent are cut out, 61 of 2,048 particles. E x_0 is off by .12, two standard errors and more."""
    result = run(0.03, make, cheap)
    assert result.status == "untrusted" and codes(result) >= {"WITNESS_CONFLICT"}
    said = next(f.detail for f in result.flags if f.code == "WITNESS_CONFLICT")
    assert said.startswith("SMC in x: ") and 25 < int(said.split()[3]) < 110
    x = [float(v) for v in said.split("x = [")[1].split("]")[0].split(", ")]
    assert abs(math.hypot(*x) - R) < 3 * WIDTH and abs(math.atan2(x[1], x[0])) > math.pi * 0.97 - 1e-6


def test_a_flow_that_closes_the_ring_has_no_gap():
    result = run(1e-9, bz.FlowIS)
    assert "WITNESS_CONFLICT" not in codes(result) and any("0 of 2048 particles in gaps" in w for w in result.draws.witnesses)


def test_without_an_inverse_nobody_looks():
    """The latent SMC and the audit see no missing three percent: this is what such a flow may still do unseen."""
    result = run(0.03, bz.FlowIS, has_pull=False, inverts=False)
    assert "WITNESS_CONFLICT" not in codes(result) and any("nobody looked for gaps" in w for w in result.draws.witnesses)


@pytest.mark.parametrize("family", ["affine-iaf", "gaussianization"])
def test_inverses_of_many_passes_are_taken_up_to_a_limit(family, monkeypatch):
    flow = make_flow(family, 2, Stream(0).child("init").rng())
    target = bz.from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=2)
    looked = bz.sample(target, bz.FlowIS(flow), n=1_000, seed=0, fit=False)
    assert not flow.has_pull and any("0 of 2048 particles in gaps" in w for w in looked.draws.witnesses)
    monkeypatch.setattr("boltzsample.samplers.gaps.MOST_PASSES", 1)
    blind = bz.sample(target, bz.FlowIS(flow), n=1_000, seed=0, fit=False)
    assert any("nobody looked for gaps" in w for w in blind.draws.witnesses) and blind.evaluations < looked.evaluations


class Forgetful(nn.Module):
    """The identity, that does not know its log-det for one draw in a hundred."""

    has_pull = False

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z, torch.where(z[..., 0] > 2.3, torch.nan, 0.0)


def test_draws_of_unknown_density_are_not_dropped():
    target = bz.from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=2)
    result = bz.sample(target, bz.FlowIS(Flow(DefensiveBase(2), Forgetful())), n=1_000, seed=0, fit=False)
    assert "BAD_WEIGHTS" in codes(result.log_z()) and result.log_z().status == "untrusted"


class Same(nn.Module):
    has_pull = True

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z, torch.zeros_like(z[..., 0])

    pull = push


def test_particles_left_behind_in_a_tail_are_no_gap():
    """log p = -|x|_1 / 6 by draws of a narrower Gaussian: fifty particles at (30, 30) weigh e^10, and their log p, -10, is below that of
    all draws. With a log p that draws have, at the same place, they are in a gap."""
    x = torch.randn(3_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    far, log_z = torch.full((50, 2), 30.0, dtype=torch.float64), math.log(144.0)
    draws, flow = bz.Draws(x[:, None], -x[:, None].abs().sum(-1) / 6), Flow(DefensiveBase(2), Same())
    estimate = bz.Estimate(*[torch.tensor(v, dtype=torch.float64) for v in (log_z, 0.01, 100.0, log_z, 3_000.0)], "", ())
    assert not _judge(flow, far, -far.abs().sum(-1) / 6, flow.log_prob(far), draws, estimate).flags
    assert _judge(flow, far, torch.full((50,), -0.2, dtype=torch.float64), flow.log_prob(far), draws, estimate).flags
