"""Independence moves, and a local kernel followed by one: for targets close to N(0, I), such as those pulled back through a flow.

Proposals owe nothing to the chain's point: z' ~ q = .9 N(0, I) + .1 N(0, s^2 I), s = 1.5. With w = pi / q,

    Metropolis-Hastings   accept z' with probability min(1, w(z') / w(z))                  (Tierney 1994, Annals of Statistics 22(4))
    i-SIR                 of N - 1 proposals and z take one with probability w_i / sum w   (Andrieu, Lee & Vihola 2018, Bernoulli 24(2))

The wide part is picked by a random number, proposal by proposal: a fixed pattern would not leave pi invariant. Local moves between
them make i-SIR the Ex2MCMC of Samsonov et al. (2022), NeurIPS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from boltzsample.kernels.kernel import ChainState, Kernel, Noise, StepInfo
from boltzsample.streams import Rng
from boltzsample.target import Target, log_prob_and_grad


class Proposals(NamedTuple):
    """Noise of one move: k standard normal points (*batch, k, dim), k uniforms that pick the wide part, and k + 1 for the choice."""

    normal: Tensor
    uniform: Tensor
    coin: Tensor


@dataclass(frozen=True)
class Independent:
    """One independence move: Metropolis-Hastings, or i-SIR among `candidates` > 1 proposals. Price: one `log_prob_and_grad` each.

    share, scale: of the wide part of the proposal.

    >>> Independent(candidates=4).price
    (0, 4)
    """

    share: float = 0.1
    scale: float = 1.5
    candidates: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or not self.scale > 1 or self.candidates < 1:
            raise ValueError(
                f"share is {self.share}, scale {self.scale}, candidates {self.candidates}; wanted 0 < share < 1, scale > 1, candidates >= 1"
            )

    @property
    def price(self) -> tuple[int, int]:
        return 0, self.candidates

    def log_q(self, z: Tensor) -> Tensor:
        """The proposal's log-density (*batch), up to a constant."""
        r2 = z.square().sum(-1)
        wide = math.log(self.share) - z.shape[-1] * math.log(self.scale) - 0.5 * r2 / self.scale**2
        return torch.logaddexp(math.log1p(-self.share) - 0.5 * r2, wide)

    def init(self, target: Target, x: Tensor) -> ChainState:
        return ChainState(x, *log_prob_and_grad(target, x))

    def draw(self, rng: Rng, batch: tuple[int, ...], dim: int) -> Proposals:
        k = self.candidates
        return Proposals(rng.normal(*batch, k, dim), rng.uniform(*batch, k), rng.uniform(*batch, k + 1))

    def step(self, target: Target, state: ChainState, noise: Proposals) -> tuple[ChainState, StepInfo]:
        z = noise.normal * torch.where(noise.uniform < self.share, self.scale, 1.0)[..., None]  # (*batch, k, dim)
        log_p, grad = log_prob_and_grad(target, z)
        fine = log_p < torch.inf  # False for NaN too
        log_w = torch.where(fine, log_p - self.log_q(z), -torch.inf)
        now = state.log_p - self.log_q(state.x)
        all_w = torch.cat([now[..., None], log_w], -1)
        if self.candidates == 1:
            r = log_w[..., 0] - now
            taken = (torch.log(noise.coin[..., 0]) < r).long()
            accept_prob = torch.where(fine[..., 0], r.clamp(max=0.0).exp(), 0.0)
        else:  # the Gumbel trick: the largest of log w - log(-log u) is a draw from the normalized weights
            taken = (all_w - (-noise.coin.log()).log()).argmax(-1)
            accept_prob = 1 - torch.softmax(all_w, -1)[..., 0]
        points = torch.cat([state.x.unsqueeze(-2), z], -2), torch.cat([state.log_p[..., None], log_p], -1)
        new = ChainState(*(_choose(many, taken) for many in (*points, torch.cat([state.grad.unsqueeze(-2), grad], -2))))
        odd = (2 * torch.isposinf(log_p) + 1 * torch.isnan(log_p)).argmax(-1)  # the meter sees the worst candidate
        still = torch.zeros_like(taken, dtype=torch.bool)
        info = StepInfo(accept_prob, taken > 0, still, _choose(z, odd), _choose(log_p, odd), still)
        return new, info


def _choose(many: Tensor, index: Tensor) -> Tensor:
    """many[..., index, :] of (*batch, k, dim), or many[..., index] of (*batch, k), with index (*batch)."""
    if many.ndim == index.ndim + 1:
        return many.gather(-1, index[..., None])[..., 0]
    return many.gather(-2, index[..., None, None].expand(*index.shape, 1, many.shape[-1]))[..., 0, :]


class BothNoise(NamedTuple):
    """Noise of a local move and of an independence move, side by side."""

    normal: Tensor
    uniform: Tensor
    jitter: Tensor
    fresh: Tensor
    pick: Tensor
    coin: Tensor


@dataclass(frozen=True)
class LocalThenIndependent:
    """A transition of `local` (a gradient kernel), then an independence move. Price: the sum of both.

    >>> from boltzsample.kernels import HMC
    >>> LocalThenIndependent(HMC(h=0.1, L=8), Independent()).price
    (0, 9)
    """

    local: Any
    independent: Independent

    @property
    def price(self) -> tuple[int, int]:
        a, b = self.local.price
        return a, b + self.independent.price[1]

    def init(self, target: Target, x: Tensor) -> ChainState:
        return self.independent.init(target, x)

    def draw(self, rng: Rng, batch: tuple[int, ...], dim: int) -> BothNoise:
        here, fresh = self.local.draw(rng, batch, dim), self.independent.draw(rng, batch, dim)
        return BothNoise(here.normal, here.uniform, here.jitter, fresh.normal, fresh.uniform, fresh.coin)

    def step(self, target: Target, state: ChainState, noise: BothNoise) -> tuple[ChainState, StepInfo]:
        local: Kernel = self.local
        state, first = local.step(target, state, Noise(noise.normal, noise.uniform, noise.jitter))
        state, second = self.independent.step(target, state, Proposals(noise.fresh, noise.pick, noise.coin))
        odd = torch.isposinf(first.log_p) | (torch.isnan(first.log_p) & first.x.isfinite().all(-1))
        x, log_p = torch.where(odd[..., None], first.x, second.x), torch.where(odd, first.log_p, second.log_p)
        return state, StepInfo(first.accept_prob, first.accepted | second.accepted, first.divergent, x, log_p, first.lost)
