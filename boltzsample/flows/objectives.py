"""Training objectives. All return a Step, whose loss has the gradient meant and whose value means nothing.

Nobody differentiates through a target: with g = grad log p(x) taken once, detached, at x = T(z), the surrogates are

    reverse KL       - (x . g + log|det J_T(z)|)                 KL(q || p), reparametrized (Rezende & Mohamed 2015, eq. 15)
    path gradient    - x . (g - grad_x log q(x))                 the same expectation without the score term, whose variance
                                                                 does not vanish at q = p (Roeder, Wu & Duvenaud 2017, eq. 6)
    forward KL       - sum_i W_i log q(x_i)                      given weighted draws of p; W sums to one

so a flow trains on a NumPy or JAX density, for one gradient of p a draw. Draws at which log p or g is infinite or NaN have no say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from boltzsample.draws import Draws
from boltzsample.flows.flow import Flow, NoInverse
from boltzsample.streams import Rng
from boltzsample.target import Target, as_given


class Step(NamedTuple):
    """loss (), and the log-weights log p - log q (n,) of the draws it was made of, nan where they have no say."""

    loss: Tensor
    log_w: Tensor


Objective = Callable[[Flow, Target, Tensor], Step]


def reverse_kl(flow: Flow, target: Target, z: Tensor) -> Step:
    """The plain reparametrized gradient of KL(q || p) at draws z (n, dim) of the base.

    Price: n `log_prob_and_grad`.
    """
    u, log_det = flow.layers.push(z)  # type: ignore[operator]
    log_p, g, more = _target_at(flow, target, u.detach())
    log_w = log_p + log_det.detach() + more - flow.base.log_prob(z)
    valid, g = _valid(log_w, g)
    loss = -((u * g).sum(-1) + torch.where(valid, log_det, 0.0)).mean()
    return _step(loss, log_w, valid)


def reverse_kl_path(flow: Flow, target: Target, z: Tensor) -> Step:
    """The path gradient of KL(q || p) at draws z (n, dim) of the base: no variance where q = p.

    Couplings carry the score of q along; other flows with a cheap inverse find it by that. Price: n `log_prob_and_grad`.

    Raises NoInverse.
    """
    u, log_det, G = _push_with_score(flow, z)
    log_p, g, more = _target_at(flow, target, u.detach())
    log_w = log_p + log_det.detach() + more - flow.base.log_prob(z)
    valid, g = _valid(log_w, g - G)
    return _step(-(u * g).sum(-1).mean(), log_w, valid)


def forward_kl(flow: Flow, x: Tensor, log_p: Tensor, log_weight: Tensor | None = None) -> Step:
    """The gradient of -sum_i W_i log q(x_i) for draws x (n, dim) of log-weights log_weight (n,): KL(p || q) up to a constant.

    log_p (n,) is only there to report log p - log q. No target is asked. Raises NoInverse where log q(x) takes an inverse that is
    not cheap.
    """
    z, log_det = flow.pull(x)
    log_q = flow.base.log_prob(z) + log_det
    log_w = torch.zeros_like(log_p) if log_weight is None else log_weight.to(log_p)
    return Step(-(log_w.softmax(0) * log_q).sum(), log_p - log_q.detach())


def has_path_gradient(flow: Flow) -> bool:
    """Whether `reverse_kl_path` is to be had."""
    return flow.has_pull or bool(getattr(flow.layers, "has_score", False))


# ---- what they are asked with ----


@dataclass(frozen=True, eq=False)
class InDtype:
    """A target asked in a dtype of its own, whatever that of the points. log_prob is NaN where the gradient is, so that no view around it
    that makes such a gradient zero can give the point a say."""

    target: Target
    dtype: torch.dtype

    @property
    def dim(self) -> int:
        return self.target.dim

    def log_prob(self, x: Tensor) -> Tensor:
        return self.target.log_prob(x.to(self.dtype)).to(x.dtype)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return self.log_prob_and_grad(x)[1]

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_p, grad = (t.detach() for t in as_given(self.target, x.to(self.dtype)))
        log_p = torch.where((grad == grad).all(-1), log_p, torch.nan)
        return log_p.to(x.dtype), grad.to(x.dtype)


def some(data: Draws, n: int, rng: Rng) -> tuple[Tensor, Tensor]:
    """n draws (n, dim) of `data`, taken with probabilities in proportion to their weights, and their log_prob (n,)."""
    x, log_p = data.x.reshape(-1, data.x.shape[-1]), data.log_prob.reshape(-1)
    u = rng.uniform(n)
    if data.log_weight is None:
        index = (u * len(x)).long()
    else:
        cumulated = data.log_weight.reshape(-1).double().softmax(0).cumsum(0)
        index = torch.searchsorted(cumulated, u.double() * cumulated[-1])
    index = index.clamp(max=len(x) - 1)
    index, to = index.to(x.device), (rng.generator.device, rng.dtype)
    return x[index].to(*to), log_p[index].to(*to)


# ---- inside ----


def _push_with_score(flow: Flow, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u = layers(z), its log_det, and the score of log q in the units of u, detached."""
    layers: Any = flow.layers
    if getattr(layers, "has_score", False):
        leaf = z.detach()
        if not torch.compiler.is_compiling():
            leaf.requires_grad_(True)
        out: tuple[Tensor, Tensor, Tensor] = layers.push_with_score(leaf, flow.base.grad_log_prob(z))
        return out
    if not flow.has_pull:
        raise NoInverse(f"{flow!r} has no cheap inverse, so no path gradient; train it with reverse_kl")
    u, log_det = layers.push(z)
    leaf = u.detach().requires_grad_(True)
    back, log_det_back = layers.pull(leaf)
    score = flow.base.grad_log_prob(back.detach())
    (G,) = torch.autograd.grad((back, log_det_back), leaf, (score, torch.ones_like(log_det_back)))
    return u, log_det, G


def _target_at(flow: Flow, target: Target, u: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    """log p and its gradient with respect to u at x = whitening(u), and the log-det of the whitening."""
    if flow.whitening is None:
        log_p, g = as_given(target, u)
        return log_p.detach(), g.detach(), 0.0
    x, more, vjp = flow.whitening.push_vjp(u)
    log_p, g = as_given(target, x)
    return log_p.detach(), vjp(g.detach()), more


def _valid(log_w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Which draws may have a say (n,), and g (n, dim) with zeros at the others."""
    valid = log_w.isfinite() & g.isfinite().all(-1)
    return valid, torch.where(valid[:, None], g, 0.0)


def _step(loss: Tensor, log_w: Tensor, valid: Tensor) -> Step:
    """Without any draw that may have a say the loss is nan, so that the step is skipped."""
    return Step(torch.where(valid.any(), loss, torch.nan), torch.where(valid, log_w, torch.nan))
