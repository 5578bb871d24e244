"""Ascent of many points at once: batched L-BFGS with backtracking, and an evolution strategy where there is no gradient.

Each point keeps its own memory of the last pairs s = x' - x, y = -(g' - g); the direction is r = H g by the two-loop recursion
(Nocedal 1980, Math. Comp. 35, 773; Nocedal & Wright 2006, algorithm 7.4). Each round asks the density once at every point that
still moves: at x + t r if the last trial failed (t is shortened), at a new trial otherwise. Where the density curves upwards
(s.y <= 0) the memory is dropped and the step along the gradient doubles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from boltzsample.streams import Rng
from boltzsample.target import Target, log_prob_and_grad

MEMORY = 10
ARMIJO = 1e-4  # fraction of the predicted gain that a step must bring
DECREMENT = 1e-7  # converged when the quadratic model promises less than this many nats
NOTHING = 1e-6  # or when no step is a gain, however short, and the gradient had promised less: begun at the top there is no model
LEAST_STEP = 1e-12  # of the first one tried


class Ascent(NamedTuple):
    """Where the ascents ended: x (n, dim), log_p (n), grad (n, dim), converged (n) bool, `rows` evaluations spent."""

    x: Tensor
    log_p: Tensor
    grad: Tensor
    converged: Tensor
    rows: int


@dataclass
class _Climb:
    """The moving state of n ascents."""

    x: Tensor
    log_p: Tensor
    grad: Tensor
    reach: Tensor  # (n) length of the next step along the bare gradient
    s: Tensor  # (MEMORY, n, dim), oldest first
    y: Tensor
    rho: Tensor  # (MEMORY, n) 1 / s.y, 0 where empty
    t: Tensor  # (n) current backtracking factor
    r: Tensor  # (n, dim) current direction
    converged: Tensor

    def aim(self, who: Tensor) -> None:
        """A fresh direction for the points in `who`."""
        g, rho = self.grad[who], self.rho[:, who]
        r = _two_loop(g, self.s[:, who], self.y[:, who], rho)
        bare = (rho == 0).all(0) | ~((r * g).sum(-1) > 0)  # no memory, or not uphill: the gradient itself
        steepest = g * (self.reach[who] / g.norm(dim=-1).clamp(min=1e-300))[:, None]
        self.r[who] = torch.where(bare[:, None], steepest, r)
        self.t[who] = 1.0
        gain = (self.r[who] * g).sum(-1)
        self.converged[who] = (~bare & (gain < DECREMENT)) | (g.abs() < torch.finfo(g.dtype).tiny ** 0.5).all(-1)


def ascend(target: Target, x: Tensor, *, reach: Tensor | float, rounds: int, ceiling: float = torch.inf) -> Ascent:
    """Ascend log_prob from x (n, dim) for at most `rounds` evaluations a point; `reach` is the length of the first step.

    A point stops where its log_prob exceeds `ceiling`. Points whose log_prob is not finite stay where they are, not converged.

    >>> from boltzsample.adapters import from_log_prob
    >>> bowl = from_log_prob(lambda x: -((x - 3.0) ** 2 * torch.tensor([1.0, 100.0])).sum(-1), dim=2)
    >>> ascend(bowl, torch.zeros(1, 2), reach=0.1, rounds=40).x.round(decimals=3)
    tensor([[3., 3.]])
    """
    n, dim = x.shape
    log_p, grad = log_prob_and_grad(target, x)
    memory = x.new_zeros(MEMORY, n, dim)
    lengths = torch.as_tensor(reach, dtype=x.dtype, device=x.device).expand(n).clone()
    none = torch.zeros(n, dtype=torch.bool, device=x.device)
    state = _Climb(
        x.clone(), log_p, grad, lengths, memory, memory.clone(), x.new_zeros(MEMORY, n), x.new_ones(n), torch.zeros_like(x), none
    )
    able = log_p.isfinite() & grad.isfinite().all(-1)
    state.aim(able.nonzero()[:, 0])
    rows = n
    for _ in range(rounds):
        who = (able & ~state.converged & (state.t > LEAST_STEP) & (state.log_p < ceiling)).nonzero()[:, 0]
        if len(who) == 0:
            break
        rows += len(who)
        _round(target, state, who)
    return Ascent(state.x, state.log_p, state.grad, state.converged, rows)


def evolve(target: Target, x: Tensor, *, reach: Tensor, rng: Rng, rounds: int) -> Tensor:
    """Climb from x (n, dim) without a gradient: each point tries y = x + s xi / sqrt(dim) and moves if log_prob rises, `rounds` times.

    The (1+1) evolution strategy with the one-fifth success rule (Rechenberg 1973; Kern et al. 2004, Natural Computing 3, 77,
    section 2): s grows by 1.5 on success and shrinks by 1.5^(-1/4) on failure, so it stays where a fifth succeed.
    """
    log_p, s = target.log_prob(x), reach.clone()
    for _ in range(rounds):
        y = x + s[:, None] * rng.normal(*x.shape) / x.shape[-1] ** 0.5
        log_p_y = target.log_prob(y)
        up = log_p_y > log_p
        x, log_p = torch.where(up[:, None], y, x), torch.where(up, log_p_y, log_p)
        s = s * torch.where(up, 1.5, 1.5**-0.25)
    return x


def _round(target: Target, c: _Climb, who: Tensor) -> None:
    trial = c.x[who] + c.t[who, None] * c.r[who]
    log_p, grad = log_prob_and_grad(target, trial)
    slope = (c.r[who] * c.grad[who]).sum(-1)
    noise = 4 * torch.finfo(trial.dtype).eps * c.log_p[who].abs()  # a gain that rounding hides is a gain all the same
    good = (log_p >= c.log_p[who] + ARMIJO * c.t[who] * slope - noise) & log_p.isfinite() & grad.isfinite().all(-1)
    c.t[who] = torch.where(good, c.t[who], 0.3 * c.t[who])
    c.converged[who] = (c.t[who] <= LEAST_STEP) & log_p.isfinite() & (slope < NOTHING)
    won, kept = who[good], good.nonzero()[:, 0]
    _remember(c, won, trial[kept] - c.x[won], c.grad[won] - grad[kept])
    c.x[won], c.log_p[won], c.grad[won] = trial[kept], log_p[kept], grad[kept]
    c.aim(won)


def _remember(c: _Climb, who: Tensor, s: Tensor, y: Tensor) -> None:
    sy = (s * y).sum(-1)
    curved = sy > 1e-10 * s.norm(dim=-1) * y.norm(dim=-1)
    up = who[~curved]
    c.rho[:, up] = 0.0
    c.reach[up] = 2 * s[~curved].norm(dim=-1)
    down = who[curved]
    for store, new in ((c.s, s[curved]), (c.y, y[curved]), (c.rho, 1 / sy[curved])):
        store[:, down] = torch.cat([store[1:, down], new[None]])
    c.reach[down] = s[curved].norm(dim=-1)


def _two_loop(g: Tensor, s: Tensor, y: Tensor, rho: Tensor) -> Tensor:
    """H g, with H the inverse of minus the Hessian as far as the memory knows it."""
    q, alphas = g, []
    for i in reversed(range(MEMORY)):
        a = rho[i] * (s[i] * q).sum(-1)
        q = q - a[:, None] * y[i]
        alphas.append(a)
    gamma = (s[-1] * y[-1]).sum(-1) / y[-1].square().sum(-1).clamp(min=1e-300)
    q = torch.where((rho[-1] > 0)[:, None], gamma[:, None] * q, q)
    for i, a in zip(range(MEMORY), reversed(alphas), strict=True):
        b = rho[i] * (y[i] * q).sum(-1)
        q = q + (a - b)[:, None] * s[i]
    return q
