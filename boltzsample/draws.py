"""Draws, Estimate: what samplers return and what users read.

One convention serves all methods: `log_weight` is such that mean_i exp(log_weight[u, i]) estimates Z in every unit u.
Self-normalized sums over all draws are then sum_u Z_u mu_u / sum_u Z_u, and errors come from the units (HOUSE.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from boltzsample.errors import DtypeError, ShapeError
from boltzsample.flags import Flag, Status, for_component, worst


@dataclass(frozen=True)
class Draws:
    """Draws of one run: `x` (units, draws, dim), a unit being one independent chain, ensemble or replicate.

    `log_prob` (units, draws) belongs to x in the space of x. `log_weight` (units, draws) or None: equal weights, no Z.
    `starts` (units, dim) is where each unit began, `group` (units,) numbers the distinct starts (superchains).
    `moves` (units,) counts accepted moves; `bad_x` (k, dim) keeps points where log_prob was NaN. `evidence`: log Z of each
    replicate, where it comes from elsewhere than the weights (bridge sampling). Of ensembles, `variance` (units,) is each one's own
    estimate of the relative variance of its Zhat, and `shift` (units, k) how far the means of a few functionals moved under moves
    that leave the target invariant. Where the mass falls slowly far out, `far` (3, rays, dim) are points there in steps in which the mass
    beyond loses `fall` (rays,) nats.
    """

    x: Tensor
    log_prob: Tensor
    log_weight: Tensor | None = None
    ancestor: Tensor | None = None
    log_z: Tensor | None = None
    starts: Tensor | None = None
    group: Tensor | None = None
    moves: Tensor | None = None
    bad_x: Tensor | None = None
    flags: tuple[Flag, ...] = ()
    witnesses: tuple[str, ...] = ()
    scope: str = "given this kernel"
    ledger: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    acceptance: float | None = None
    evidence: tuple[Estimate, ...] = ()
    variance: Tensor | None = None
    shift: Tensor | None = None
    far: Tensor | None = None
    fall: Tensor | None = None

    @staticmethod
    def from_arrays(x: Any, log_prob: Any = None, log_weight: Any = None) -> Draws:
        """Draws made elsewhere. `x` is (chains, draws, dim), or (n, dim) for n independent draws.

        `log_prob` and `log_weight` have the shape of x without its last axis. Tensors or NumPy arrays; nothing is copied back.

        Raises ShapeError, DtypeError.

        >>> import torch
        >>> Draws.from_arrays(torch.zeros(100, 3)).x.shape
        torch.Size([100, 1, 3])
        """
        x = _floating("x", x)
        if x.ndim not in (2, 3) or 0 in x.shape:
            raise ShapeError(f"x has shape {tuple(x.shape)}; wanted (chains, draws, dim), or (n, dim) for independent draws")
        batch = x.shape[:-1]
        units = (batch[0], 1) if x.ndim == 2 else tuple(batch)
        log_p = torch.full(batch, torch.nan) if log_prob is None else _shaped("log_prob", log_prob, batch)
        log_w = None if log_weight is None else _shaped("log_weight", log_weight, batch).double().reshape(units)
        return Draws(x.reshape(*units, x.shape[-1]), log_p.reshape(units), log_w)


def _floating(name: str, value: Any) -> Tensor:
    tensor = torch.as_tensor(value).detach()
    if not tensor.is_floating_point():
        raise DtypeError(f"{name} has dtype {tensor.dtype}; wanted floating point numbers: convert with .double()")
    return tensor


def _shaped(name: str, value: Any, shape: torch.Size) -> Tensor:
    tensor = _floating(name, value)
    if tensor.shape != shape:
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; wanted {tuple(shape)}, the shape of x without its last axis")
    return tensor


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number with its error bar and the library's word on it.

    `value`, `stderr`, `ess` and `df` have the shape of f (float64, on CPU); `interval` (2, *shape) is the 95% interval.
    `est[i]` selects a component of a vector-valued f. `status` is the worst over components and flags.
    `float(est)` raises on untrusted; `.value` never does.
    """

    value: Tensor
    stderr: Tensor
    df: Tensor
    interval: Tensor
    ess: Tensor
    method: str
    witnesses: tuple[str, ...] = ()
    flags: tuple[Flag, ...] = ()

    @property
    def status(self) -> Status:
        return worst(self.flags)

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, i: int) -> Estimate:
        if self.value.ndim != 1:
            raise IndexError(f"this estimate has shape {tuple(self.value.shape)}; est[i] selects a component of a one-dimensional one")
        i = range(len(self.value))[i]
        flags = for_component(self.flags, i)
        return Estimate(
            self.value[i], self.stderr[i], self.df[i], self.interval[:, i], self.ess[i], self.method, self.witnesses, flags
        )

    def __float__(self) -> float:
        if self.status is Status.UNTRUSTED:
            reasons = "; ".join(str(f) for f in self.flags if f.severity == "untrusted")
            raise UntrustedError(f"this estimate is untrusted ({reasons}); read .value to use it all the same")
        return float(self.value)

    def __repr__(self) -> str:
        if self.value.ndim == 0:
            return self._line(float(self.value), float((self.interval[1] - self.interval[0]) / 2))
        return f"Estimate(shape={tuple(self.value.shape)}, status={self.status}): read .value, .stderr, or est[i]"

    def _line(self, value: float, half: float) -> str:
        untrusted = [f.code for f in self.flags if f.severity == "untrusted"]
        word = f"UNTRUSTED({', '.join(dict.fromkeys(untrusted))})" if untrusted else str(self.status)
        places = min(max(0, 2 - _magnitude(half)), 12)
        return f"{value:.{places}f} +- {half:.{places}f} (95%, {word})"

    def to_dict(self) -> dict[str, Any]:
        """The estimate as JSON-ready lists."""
        return {
            "value": self.value.tolist(),
            "stderr": self.stderr.tolist(),
            "interval": self.interval.tolist(),
            "ess": self.ess.tolist(),
            "df": self.df.tolist(),
            "method": self.method,
            "status": str(self.status),
            "flags": [str(f) for f in self.flags],
            "witnesses": list(self.witnesses),
        }


class UntrustedError(ValueError):
    """float() was asked of an untrusted estimate."""


def _magnitude(half: float) -> int:
    """Digits before the decimal point of a half-width: 1 for 1.5, 0 for .15, -1 for .015."""
    import math

    return 0 if not math.isfinite(half) or half <= 0 else math.floor(math.log10(half)) + 1
