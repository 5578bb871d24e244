"""Maps x = T(z) that a Pullback takes a density through: affine ones here; flows and bijections onto supports elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

VJP = Callable[[Tensor], Tensor]


class Map(Protocol):
    """A smooth one-to-one map x = T(z): `push` takes z (*batch, n) to x (*batch, dim) and log|det J_T(z)|, which broadcasts to (*batch).

    An optional `push_vjp(z)` returns (x, log_det, vjp) with vjp(g) = J_T(z)^T g + grad_z log_det (*batch, n); autograd supplies it
    otherwise.
    """

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]: ...


def push_vjp(map: Map, z: Tensor) -> tuple[Tensor, Tensor, VJP]:
    """(x, log_det, vjp) of a Map at z, analytic where the map offers it, by autograd otherwise; the vjp may be called once."""
    own = getattr(map, "push_vjp", None)
    if own is not None:
        out: tuple[Tensor, Tensor, VJP] = own(z)
        return out
    if torch.compiler.is_compiling():
        pushed: Any = torch.func.vjp(map.push, z)
        (x, log_det), vjp = pushed
        return x, log_det, lambda g: vjp((g, torch.ones_like(log_det)))[0]
    with torch.inference_mode(False), torch.enable_grad():
        leaf = (z.clone() if z.is_inference() else z.detach()).requires_grad_(True)
        x, log_det = map.push(leaf)

    def pull_gradient(g: Tensor) -> Tensor:
        pairs = [(out, by) for out, by in ((x, g), (log_det, torch.ones_like(log_det))) if out.requires_grad]
        with torch.inference_mode(False):
            return torch.autograd.grad([out for out, _ in pairs], leaf, [by for _, by in pairs])[0]

    return x.detach(), log_det.detach(), pull_gradient


@dataclass(frozen=True, eq=False)
class Diagonal:
    """The map x = m + s z with log_det = sum log|s|. m, s: (dim,), or (*lead, 1, dim) for z (*lead, chains, dim).

    >>> x, log_det = Diagonal(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])).push(torch.ones(3, 2))
    >>> x[0], log_det
    (tensor([2., 2.]), tensor(0.6931))
    """

    m: Tensor
    s: Tensor
    log_det: Tensor = field(init=False, repr=False)  # made once: this sits in the hottest loop

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_det", self.s.abs().log().sum(-1))

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.addcmul(self.m, z, self.s), self.log_det

    def pull(self, x: Tensor) -> Tensor:
        return (x - self.m) / self.s

    def push_vjp(self, z: Tensor) -> tuple[Tensor, Tensor, VJP]:
        return torch.addcmul(self.m, z, self.s), self.log_det, self.s.mul


@dataclass(frozen=True, eq=False)
class Dense:
    """The map x = m + L z, L lower-triangular, with log_det = sum log|L_ii|.

    m: (dim,) and L: (dim, dim), or m: (*lead, 1, dim) and L: (*lead, dim, dim) for z (*lead, chains, dim).

    >>> shear = Dense(torch.zeros(2), torch.tensor([[2.0, 0.0], [1.0, 3.0]]))
    >>> shear.push(torch.ones(1, 2))[0], shear.pull(torch.tensor([[2.0, 4.0]]))
    (tensor([[2., 4.]]), tensor([[1., 1.]]))
    """

    m: Tensor
    L: Tensor
    log_det: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        log_det = self.L.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
        object.__setattr__(self, "log_det", log_det if self.L.dim() == 2 else log_det[..., None])

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.m + z @ self.L.mT, self.log_det

    def pull(self, x: Tensor) -> Tensor:
        away = x - self.m  # rows solve z L^T = x - m
        z: Tensor = torch.linalg.solve_triangular(self.L.mT, torch.atleast_2d(away), upper=True, left=False)
        return z.reshape(away.shape)

    def push_vjp(self, z: Tensor) -> tuple[Tensor, Tensor, VJP]:
        return self.m + z @ self.L.mT, self.log_det, lambda g: g @ self.L
