"""Flow annealed importance sampling bootstrap (FAB): train on alpha = 2, whose optimum minimizes the variance of the weights.

The best proposal for learning about p with q is g = p^2 / q. AIS goes there from q along

    log g_b = (1 - 2 b) log q + 2 b log p,       b = 0 .. 1,

here in the latent space, where q is the base and no inverse is needed: with z ~ base, and log p~(z) = log p(T(z)) + log|det J_T(z)|,

    log w = sum_k 2 (b_(k+1) - b_k) (log p~ - log base)(z_k),      z_k -> z_(k+1) by HMC that leaves g_(b_(k+1)) invariant.

Points x = T(z), their log w and log q go into a buffer. Minibatches are drawn from it without replacement in proportion to w
(Gumbel top-k), and with r = log q_new(x) - log q_old(x), the loss and what is then added to the stored log w are

    - mean( min(e^-r, 10) log q_new(x) ),        -r.

Midgley, Stimper, Simm, Schoelkopf & Hernandez-Lobato (2023), ICLR, section 3 and appendix B. The flow needs a cheap inverse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from boltzsample.flows.base import Base, narrow
from boltzsample.flows.flow import Flow, NoInverse
from boltzsample.flows.look import look
from boltzsample.flows.objectives import InDtype
from boltzsample.flows.optimizer import Optimizer
from boltzsample.flows.train import Trained
from boltzsample.kernels import HMC
from boltzsample.samplers.sampler import Run
from boltzsample.streams import Rng
from boltzsample.target import Target, log_prob_and_grad
from boltzsample.views import Pullback

MOST = math.log(10.0)  # the correction for an aged log q is no larger than tenfold
ACCEPT, GAIN = 0.65, 1.05


@dataclass(frozen=True)
class FAB:
    """passes: of AIS, `batch` points each, with `levels` HMC steps of L leapfrogs on the way. updates: gradient steps after a pass. keep:
    passes that the buffer holds."""

    passes: int = 100
    batch: int = 256
    levels: int = 4
    L: int = 5
    updates: int = 4
    keep: int = 50
    lr: float = 2e-3
    look: int = 4096

    @property
    def price(self) -> tuple[int, int]:
        """(log_prob, log_prob_and_grad) rows of a pass."""
        return self.batch * (self.levels + 1), self.batch * self.levels * (1 + self.L)


@dataclass(frozen=True, eq=False)
class Toward:
    """The density (1 - 2 b) log base + 2 b log target: from the base at b = 0 to target^2 / base at b = 1. b: a tensor ()."""

    target: Target
    base: Base
    b: Tensor

    @property
    def dim(self) -> int:
        return self.base.dim

    def log_prob(self, z: Tensor) -> Tensor:
        return (1 - 2 * self.b) * self.base.log_prob(z) + 2 * self.b * self.target.log_prob(z)

    def grad_log_prob(self, z: Tensor) -> Tensor:
        return self.log_prob_and_grad(z)[1]

    def log_prob_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_p, grad = log_prob_and_grad(self.target, z)
        keep, take = 1 - 2 * self.b, 2 * self.b
        return keep * self.base.log_prob(z) + take * log_p, keep * self.base.grad_log_prob(z) + take * grad


@torch.no_grad()
def anneal(flow: Flow, target: Target, n: int, levels: int, kernel: HMC, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
    """AIS from q to p^2 / q: points z (n, dim), log w (n,) with E w = int p^2 / q, and the acceptance ().

    Price: n (levels + 1) `log_prob` and n levels (1 + L) `log_prob_and_grad`.
    """
    latent = Pullback(target, flow)
    z = flow.base.sample(rng, n)
    log_w = z.new_zeros(n)
    accepted = []
    for k in range(levels + 1):
        log_w = log_w + 2 / (levels + 1) * (latent.log_prob(z) - flow.base.log_prob(z))
        if k == levels:
            break
        here = Toward(latent, flow.base, z.new_tensor((k + 1) / (levels + 1)))
        state, info = kernel.step(here, kernel.init(here, z), kernel.draw(rng, (n,), flow.dim))
        z = state.x
        accepted.append(info.accept_prob.mean())
    return z, torch.where(log_w.isfinite(), log_w, -torch.inf), torch.stack(accepted).mean() if accepted else z.new_ones(())


def train_fab(flow: Flow, target: Target, run: Run, settings: FAB | None = None) -> Trained:
    """A copy of `flow` trained on alpha = 2 with a prioritized buffer, its evaluations entered under "training".

    Raises NoInverse, NoGradient.
    """
    s, backend = settings or FAB(), run.backend
    if not flow.has_pull:
        raise NoInverse(f"FAB needs log q at the points of its buffer, and {flow!r} has no cheap inverse; use a flow such as 'realnvp'")
    student = flow.to(backend.device, backend.dtype).with_base(narrow(flow.base))
    optimizer = Optimizer(student.layers, s.lr, 10.0, 0.98)
    means = _passes(student, InDtype(target, backend.dtype), optimizer, run, s)
    optimizer.finish()
    seen = look(student, target, s.look, run.stream.child("fab", "look").rng(backend.dtype, backend.device))
    run.ledger.add("training", (s.look, 0))
    rows = len(means) * s.price[0] + s.look, len(means) * s.price[1]
    history = {"log_w": torch.stack(means).cpu() if means else torch.zeros(0)}
    return Trained(student.with_base(flow.base), history, (seen,), rows, optimizer.skipped, optimizer.rolled_back)


def _passes(flow: Flow, target: Target, optimizer: Optimizer, run: Run, s: FAB) -> list[Tensor]:
    """Anneal, fill the buffer, learn from it, again and again; the mean log w of each pass."""
    rng = run.stream.child("fab").rng(run.backend.dtype, run.backend.device)
    kernel, buffer = HMC(h=torch.tensor(0.5, dtype=rng.dtype, device=run.backend.device), L=s.L), _Buffer(s.keep * s.batch)
    means: list[Tensor] = []
    with run.progress.phase("training", s.passes) as bar:
        for i in range(s.passes):
            if run.must_stop(sum(s.price) + s.look):
                break
            z, log_w, accepted = anneal(flow, target, s.batch, s.levels, kernel, rng)
            run.ledger.add("training", s.price)
            kernel = HMC(h=kernel.h * (GAIN if accepted > ACCEPT else 1 / GAIN), L=s.L)
            x, log_det = flow.push(z)
            buffer.add(x.detach(), log_w, (flow.base.log_prob(z) - log_det).detach())
            for _ in range(s.updates):
                _update(flow, optimizer, buffer, s.batch, rng, 0.5 * (1 + math.cos(math.pi * i / s.passes)))
            means.append(log_w[log_w.isfinite()].mean())
            bar.update(acceptance=accepted, evaluations=lambda: run.ledger.total)
    return means


def _update(flow: Flow, optimizer: Optimizer, buffer: _Buffer, n: int, rng: Rng, share: float) -> None:
    chosen = buffer.pick(n, rng)
    with torch.enable_grad():
        z, log_det = flow.pull(buffer.x[chosen])
        log_q = flow.base.log_prob(z) + log_det
        r = log_q.detach() - buffer.log_q[chosen]
        loss = -((-r).clamp(max=MOST).exp() * log_q).mean()
    if optimizer.step(loss, share):
        buffer.age(chosen, r)


class _Buffer:
    """Points x (k, dim), log w (k,) and the log q (k,) at which they were weighed; the oldest leave."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.x, self.log_w, self.log_q = torch.zeros(0, 0), torch.zeros(0), torch.zeros(0)

    def add(self, x: Tensor, log_w: Tensor, log_q: Tensor) -> None:
        fine = log_w.isfinite() & log_q.isfinite() & x.isfinite().all(-1)
        new = x[fine], log_w[fine], log_q[fine]
        old = (self.x, self.log_w, self.log_q) if len(self.x) else tuple(t[:0] for t in new)
        self.x, self.log_w, self.log_q = (torch.cat([a, b])[-self.size :] for a, b in zip(old, new, strict=True))

    def pick(self, n: int, rng: Rng) -> Tensor:
        """min(n, k) points without replacement, with probabilities in proportion to w (Gumbel top-k)."""
        gumbel = -(-rng.uniform(len(self.log_w)).clamp(min=1e-30).log()).log()
        return (self.log_w + gumbel).topk(min(n, len(self.log_w))).indices

    def age(self, chosen: Tensor, r: Tensor) -> None:
        self.log_w[chosen] -= r
        self.log_q[chosen] += r
