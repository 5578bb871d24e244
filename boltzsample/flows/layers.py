"""What flows are made of, conditioned layers: `push` (base to target) and `pull`, at the same price where `has_pull`.

    coupling         x_a = z_a,  x_b = f(z_b; theta(z_a))           Dinh, Krueger & Bengio (2015); Dinh et al. (2017), eq. 7-8
    autoregressive   x_i = f(z_i; theta(z_<i))                      Kingma et al. (2016), inverse autoregressive, eq. 10

theta is a network of zuko's, f one of zuko's univariate transforms. Every last layer of a network starts at zero, so that T
starts as the identity.

Couplings also carry the score along: G = grad_x log q(x) from that of z, which path gradients need without an inverse,

    G_b' = (G_b - grad_b log_det) / f',        G_a' = G_a - grad_a (log_det + x_b . G_b')

(Vaitl, Winkler, Richter & Kessel 2024, ICLR, proposition 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from zuko.nn import MLP, MaskedMLP
from zuko.transforms import AdditiveTransform, MonotonicAffineTransform, MonotonicRQSTransform
from zuko.utils import unpack

Pushed = tuple[Tensor, Tensor]  # x (*batch, dim), log_det (*batch)


class Univariate:
    """A family of monotone functions f(z; theta) of zuko's: `make(*theta)` with parameters of these `shapes`."""

    def __init__(self, make: Callable[..., Any], shapes: Sequence[tuple[int, ...]], bound: float = math.inf) -> None:
        self.make, self.shapes, self.bound = make, tuple(shapes), bound
        self.bends = bound < math.inf  # f' depends on z
        self.total = sum(math.prod(s) for s in self.shapes)

    def __call__(self, theta: Tensor) -> Any:
        """The function of parameters theta (*batch, k * total), of which each of k coordinates has its own."""
        return self.make(*unpack(theta.unflatten(-1, (-1, self.total)), self.shapes))


def affine(slope: float = 1e-3) -> Univariate:
    """x = t + e^s z, s softly within +- |log slope|."""
    return Univariate(partial(MonotonicAffineTransform, slope=slope), ((), ()))


def additive() -> Univariate:
    """x = t + z."""
    return Univariate(AdditiveTransform, ((),))


def spline(bins: int, bound: float) -> Univariate:
    """A monotone rational-quadratic spline on [-bound, bound], the identity outside (Durkan et al. 2019, section 3)."""
    return Univariate(partial(MonotonicRQSTransform, bound=bound), ((bins,), (bins,), (bins - 1,)), bound)


class Coupling(nn.Module):
    """One half of the coordinates moves, conditioned on the other; `first` says which."""

    has_pull = True

    def __init__(self, dim: int, first: bool, f: Univariate, hidden: Sequence[int], activation: Any = None) -> None:
        super().__init__()
        self.cut, self.first, self.f = dim // 2, first, f
        moved = self.cut if first else dim - self.cut
        self.net = MLP(dim - moved, moved * f.total, hidden, activation)

    def split(self, z: Tensor) -> Pushed:
        """(kept, moved)."""
        one, two = z[..., : self.cut], z[..., self.cut :]
        return (two, one) if self.first else (one, two)

    def merge(self, kept: Tensor, moved: Tensor) -> Tensor:
        return torch.cat((moved, kept) if self.first else (kept, moved), -1)

    def push(self, z: Tensor) -> Pushed:
        a, b = self.split(z)
        x, log_f = self.f(self.net(a)).call_and_ladj(b)
        return self.merge(a, x), log_f.sum(-1)

    def pull(self, x: Tensor) -> Pushed:
        a, b = self.split(x)
        f = self.f(self.net(a))
        z = f.inv(b)
        return self.merge(a, z), -f.log_abs_det_jacobian(z, b).sum(-1)

    def push_with_score(self, z: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x, log_det, grad_x log q) of z and G = grad_z log q; z has to require a gradient, the score comes out detached."""
        (a, b), (G_a, G_b) = self.split(z), self.split(G)
        x, log_f = self.f(self.net(a)).call_and_ladj(b)
        vjp = self._traced_vjp(a, b) if torch.compiler.is_compiling() else partial(_vjp, (x, log_f), (a, b))
        one = torch.ones_like(log_f)
        if self.f.bends:
            G_b = G_b - vjp((torch.zeros_like(x), one))[1]
        G_b = G_b * (-log_f.detach()).exp()
        G_a = G_a - vjp((G_b, one))[0]
        return self.merge(a, x), log_f.sum(-1), self.merge(G_a, G_b).detach()

    def _traced_vjp(self, a: Tensor, b: Tensor) -> Any:
        """torch.autograd.grad has no place in a full graph; the compiler sees that both passes are one."""
        return torch.func.vjp(lambda a, b: self.f(self.net(a)).call_and_ladj(b), a.detach(), b.detach())[1]


def _vjp(outputs: Pushed, inputs: Pushed, by: Pushed) -> list[Tensor]:
    """The gradients of sum outputs . by with respect to the inputs, through the graph that is there and stays."""
    pairs = [(o, g) for o, g in zip(outputs, by, strict=True) if o.requires_grad]
    return list(torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], retain_graph=True))


class Autoregressive(nn.Module):
    """x_i depends on z_i and on the z_j before it in `order`; with `inverted`, T is the inverse of that (dim passes, one for `pull`)."""

    inverts = True

    def __init__(self, order: Tensor, f: Univariate, hidden: Sequence[int], activation: Any = None, inverted: bool = False) -> None:
        super().__init__()
        self.f, self.dim, self.has_pull = f, len(order), inverted
        self.inverted = inverted
        before = order[:, None] > order  # row i: on what x_i depends
        self.net = MaskedMLP(before.repeat_interleave(f.total, 0), hidden, activation)

    def push(self, z: Tensor) -> Pushed:
        return self._solve(z) if self.inverted else self._once(z)

    def pull(self, x: Tensor) -> Pushed:
        return self._once(x) if self.inverted else self._solve(x)

    def _once(self, z: Tensor) -> Pushed:
        x, log_f = self.f(self.net(z)).call_and_ladj(z)
        return x, log_f.sum(-1)

    def _solve(self, y: Tensor) -> Pushed:
        u = torch.zeros_like(y)
        for _ in range(self.dim):
            f = self.f(self.net(u))
            u = f.inv(y)
        f = self.f(self.net(u))
        return u, -f.log_abs_det_jacobian(u, y).sum(-1)


class Elementwise(nn.Module):
    """x_i = f(z_i; theta_i) with free parameters: what couplings come to in one dimension."""

    has_pull = True

    def __init__(self, dim: int, f: Univariate) -> None:
        super().__init__()
        self.f, self.theta = f, nn.Parameter(torch.zeros(dim * f.total))

    def push(self, z: Tensor) -> Pushed:
        x, log_f = self.f(self.theta.expand(*z.shape[:-1], -1)).call_and_ladj(z)
        return x, log_f.sum(-1)

    def pull(self, x: Tensor) -> Pushed:
        f = self.f(self.theta.expand(*x.shape[:-1], -1))
        z = f.inv(x)
        return z, -f.log_abs_det_jacobian(z, x).sum(-1)


class Stack(nn.Module):
    """Layers one after another."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def has_pull(self) -> bool:
        return all(bool(getattr(layer, "has_pull", False)) for layer in self.layers)

    @property
    def inverts(self) -> bool:
        """Whether every layer has an inverse, cheap or not."""
        return all(bool(getattr(layer, "has_pull", False) or getattr(layer, "inverts", False)) for layer in self.layers)

    @property
    def has_score(self) -> bool:
        """Whether every layer carries the score along."""
        return all(hasattr(layer, "push_with_score") for layer in self.layers)

    def push(self, z: Tensor) -> Pushed:
        log_det = z.new_zeros(z.shape[:-1])
        for layer in self.layers:
            z, more = layer.push(z)  # type: ignore[operator]
            log_det = log_det + more
        return z, log_det

    def pull(self, x: Tensor) -> Pushed:
        log_det = x.new_zeros(x.shape[:-1])
        for layer in reversed(self.layers):
            x, more = layer.pull(x)  # type: ignore[operator]
            log_det = log_det + more
        return x, log_det

    def outside(self, x: Tensor) -> Tensor:
        """Which points x (n, dim) lie beyond the interval of the last splines, (n,) bool."""
        stack: list[Any] = list(self.layers)
        bound = min((layer.f.bound for layer in stack if hasattr(layer, "f")), default=math.inf)
        while bound < math.inf and stack and not hasattr(stack[-1], "f"):  # the affine layers that the splines stand behind
            x = stack.pop().pull(x)[0]
        return (x.abs() > bound).any(-1)

    def push_with_score(self, z: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_det = z.new_zeros(z.shape[:-1])
        for layer in self.layers:
            z, more, G = layer.push_with_score(z, G)  # type: ignore[operator]
            log_det = log_det + more
        return z, log_det, G
