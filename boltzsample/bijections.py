"""Bijections from R^n onto the supports of `torch.distributions.constraints`, each with its log-det.

    x > a              x = a + e^z                        log|J| = z
    a < x < b          x = a + (b - a) s(z)               log|J| = log(b - a) + log s(z) + log s(-z),   s the logistic function
    simplex            x_k = s(t_k) prod_{j<k} s(-t_j)    log|J| = sum_k log s(t_k) + (n - k) log s(-t_k),   t_k = z_k - log(n - k)
    lower Cholesky     L_ii = e^{z_ii}, L_ij = z_ij       log|J| = sum_i z_ii
    positive definite  X = L L^T                          log|J| = d log 2 + sum_i (d + 1 - i) z_ii
    correlation        L_ij = tanh(z_ij) prod_{k<j} sech(z_ik)    log|J| = sum_{j<i} (1 + (i - 1 - j) / 2) log sech^2(z_ij)

with k, i, j counted from 0 and n sticks for a simplex of n + 1 parts. The coordinates are those of Stan's
reference manual, chapter "Constraint transforms"; the Cholesky Jacobian is Muirhead (1982), Aspects of Multivariate Statistical
Theory, theorem 2.1.9; the correlation factors are Lewandowski, Kurowicka & Joe (2009), J. Multivariate Analysis 100(9). torch has
no log-det for the two Cholesky lines, and its other ones lose the tails; here all are sums of logs of z. Rounding never puts x on
the edge of its support, where a density like x^(a-1) with a < 1 would be infinite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions.transforms import Transform

Bound = float | Tensor


class Bijection(Protocol):
    """z (*batch, size) to x flattened (*batch, prod(event_shape)) and log|det| (*batch); `pull` goes back."""

    @property
    def size(self) -> int: ...

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]: ...

    def pull(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Identity:
    shape: torch.Size

    @property
    def size(self) -> int:
        return self.shape.numel()

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z, torch.zeros_like(z[..., 0])

    def pull(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True, eq=False)
class Half:
    """x = edge + sign e^z."""

    shape: torch.Size
    edge: Bound
    sign: float

    @property
    def size(self) -> int:
        return self.shape.numel()

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        edge = _bound(self.edge, self.shape, z)
        inside = _inside(edge, self.sign)
        x = edge + self.sign * z.exp()
        return (x.maximum(inside) if self.sign > 0 else x.minimum(inside)), z.sum(-1)

    def pull(self, x: Tensor) -> Tensor:
        return (self.sign * (x - _bound(self.edge, self.shape, x))).log()


@dataclass(frozen=True, eq=False)
class Between:
    """x = low + (high - low) s(z)."""

    shape: torch.Size
    low: Bound
    high: Bound

    @property
    def size(self) -> int:
        return self.shape.numel()

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (_bound(b, self.shape, z) for b in (self.low, self.high))
        width = high - low
        x = (low + width * z.sigmoid()).maximum(_inside(low, 1.0)).minimum(_inside(high, -1.0))
        return x, (width.log() + F.logsigmoid(z) + F.logsigmoid(-z)).sum(-1)

    def pull(self, x: Tensor) -> Tensor:
        low, high = (_bound(b, self.shape, x) for b in (self.low, self.high))
        return (x - low).log() - (high - x).log()


@dataclass(frozen=True)
class Simplex:
    """Stick breaking along the last axis: stick k takes the share s(t_k) of what is left."""

    shape: torch.Size

    @property
    def size(self) -> int:
        return self.shape[:-1].numel() * (self.shape[-1] - 1)

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        t = z.unflatten(-1, (*self.shape[:-1], self.shape[-1] - 1))
        left = torch.arange(t.shape[-1], 0, -1, dtype=z.dtype, device=z.device)
        t = t - left.log()
        taken, kept = F.logsigmoid(t), F.logsigmoid(-t)
        log_x = F.pad(taken, (0, 1)) + F.pad(kept.cumsum(-1), (1, 0))
        log_det = (taken + left * kept).flatten(z.dim() - 1).sum(-1)
        return _positive(log_x).flatten(z.dim() - 1), log_det

    def pull(self, x: Tensor) -> Tensor:
        y = x.unflatten(-1, self.shape)
        rest = y.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        left = torch.arange(rest.shape[-1], 0, -1, dtype=x.dtype, device=x.device)
        z: Tensor = y[..., :-1].log() - rest.log() + left.log()
        return z.flatten(x.dim() - 1)


@dataclass(frozen=True)
class Cholesky:
    """Lower-triangular L with a positive diagonal, z row by row; its `square` L L^T for a positive definite matrix."""

    shape: torch.Size
    square: bool

    @property
    def size(self) -> int:
        d = self.shape[-1]
        return self.shape[:-2].numel() * d * (d + 1) // 2

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        d, at = self.shape[-1], z.dim() - 1
        free = _fill(z, self.shape, 0)
        log_diagonal = free.diagonal(dim1=-2, dim2=-1)
        L = free.tril(-1) + _positive(log_diagonal).diag_embed()
        if not self.square:
            return L.flatten(at), log_diagonal.flatten(at).sum(-1)
        powers = torch.arange(d + 1, 1, -1, dtype=z.dtype, device=z.device)
        constant = self.shape[:-2].numel() * d * math.log(2.0)
        return (L @ L.mT).flatten(at), (powers * log_diagonal).flatten(at).sum(-1) + constant

    def pull(self, x: Tensor) -> Tensor:
        matrix = x.unflatten(-1, self.shape)
        L = torch.linalg.cholesky(matrix) if self.square else matrix
        free = L.tril(-1) + L.diagonal(dim1=-2, dim2=-1).log().diag_embed()
        return _free(free, 0).flatten(x.dim() - 1)


@dataclass(frozen=True)
class CorrCholesky:
    """The Cholesky factor of a correlation matrix: each row breaks the stick of its squared length 1."""

    shape: torch.Size

    @property
    def size(self) -> int:
        d = self.shape[-1]
        return self.shape[:-2].numel() * d * (d - 1) // 2

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_sech = _fill(math.log(2.0) - z.abs() - torch.log1p((-2 * z.abs()).exp()), self.shape, -1)
        log_left = F.pad(log_sech.cumsum(-1)[..., :-1], (1, 0))
        L = _fill(z.tanh(), self.shape, -1) * log_left.exp() + _positive(log_left.diagonal(dim1=-2, dim2=-1)).diag_embed()
        log_det = (2 * log_sech + log_left.tril(-1)).flatten(z.dim() - 1).sum(-1)
        return L.flatten(z.dim() - 1), log_det

    def pull(self, x: Tensor) -> Tensor:
        L = x.unflatten(-1, self.shape)
        left = F.pad(L.square().flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))  # sum_{k>j} L_ik^2
        return _free((L / left.sqrt()).asinh(), -1).flatten(x.dim() - 1)


@dataclass(frozen=True, eq=False)
class Joined:
    """Parts of the event put together along one (negative) axis; each part's x has its shape in `shapes`."""

    shapes: tuple[torch.Size, ...]
    axis: int
    parts: tuple[Bijection, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        pushed = [part.push(piece) for part, piece in zip(self.parts, z.split([p.size for p in self.parts], -1), strict=True)]
        x = torch.cat([x.unflatten(-1, shape) for (x, _), shape in zip(pushed, self.shapes, strict=True)], self.axis)
        return x.flatten(z.dim() - 1), torch.stack([log_det for _, log_det in pushed]).sum(0)

    def pull(self, x: Tensor) -> Tensor:
        lengths = [shape[self.axis] for shape in self.shapes]
        whole = torch.Size([*self.shapes[0][: self.axis], sum(lengths), *self.shapes[0][len(self.shapes[0]) + self.axis + 1 :]])
        pieces = x.unflatten(-1, whole).split(lengths, self.axis)
        return torch.cat([part.pull(piece.flatten(x.dim() - 1)) for part, piece in zip(self.parts, pieces, strict=True)], -1)


@dataclass(frozen=True, eq=False)
class Registered:
    """Any other bijection known to `torch.distributions.biject_to`: supports that a user or another library registered."""

    shape: torch.Size
    transform: Transform

    @property
    def size(self) -> int:
        return torch.Size(self.transform.inverse_shape(self.shape)).numel()

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        free = z.unflatten(-1, self.transform.inverse_shape(self.shape))
        x = self.transform(free)
        log_det = self.transform.log_abs_det_jacobian(free, x)
        return x.flatten(z.dim() - 1), log_det.reshape(*z.shape[:-1], -1).sum(-1)

    def pull(self, x: Tensor) -> Tensor:
        z: Tensor = self.transform.inv(x.unflatten(-1, self.shape))
        return z.flatten(x.dim() - 1)


def _bound(bound: Bound, shape: torch.Size, like: Tensor) -> Tensor:
    """A bound, given as a number or a tensor that broadcasts to the event, flattened like z."""
    return torch.as_tensor(bound, dtype=like.dtype, device=like.device).expand(shape).reshape(-1)


def _inside(edge: Tensor, sign: float) -> Tensor:
    """The nearest number inside the support, at least `tiny` away (at 0 the nearest would be denormal)."""
    step = torch.nextafter(edge, torch.full_like(edge, sign * torch.inf))
    tiny = edge + sign * torch.finfo(edge.dtype).tiny
    return step.maximum(tiny) if sign > 0 else step.minimum(tiny)


def _positive(log_x: Tensor) -> Tensor:
    return log_x.exp().clamp(min=torch.finfo(log_x.dtype).tiny)


def _fill(z: Tensor, shape: torch.Size, diagonal: int) -> Tensor:
    """Lower-triangular matrices (*batch, *shape) with the entries of z (*batch, n) row by row, zero elsewhere."""
    i, j = torch.tril_indices(shape[-1], shape[-1], diagonal, device=z.device)
    matrix = z.new_zeros(*z.shape[:-1], *shape)
    matrix[..., i, j] = z.unflatten(-1, (*shape[:-2], i.numel()))
    return matrix


def _free(matrix: Tensor, diagonal: int) -> Tensor:
    """The entries that `_fill` writes, row by row along the last axis."""
    i, j = torch.tril_indices(matrix.shape[-1], matrix.shape[-1], diagonal, device=matrix.device)
    return matrix[..., i, j]
