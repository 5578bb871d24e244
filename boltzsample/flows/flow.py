"""A Flow is a base density and a map x = T(z), held in the direction in which base to target is one pass:

    z ~ base,    x = T(z),    log q(x) = log base(z) - log|det J_T(z)|.

Weights come from the pass that made the draw, never from an inverse. The last map in x is an optional affine one, the
whitening: x = m + L layers(z). Rezende & Mohamed (2015), ICML, equation 5.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from boltzsample.errors import BoltzsampleError
from boltzsample.flows.base import Base
from boltzsample.maps import Dense, Diagonal
from boltzsample.streams import Rng


class NoInverse(BoltzsampleError, NotImplementedError):
    """The inverse of a flow was asked for and is not cheap."""

    code = "NO_INVERSE"


class Layers(Protocol):
    """What a Flow is made of: an nn.Module with `push`, and `pull` where `has_pull` or `inverts`; both return (point, log|det|)."""

    has_pull: bool  # the inverse costs what `push` does; a module may have `inverts` beside it: there is one at all

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]: ...

    def pull(self, x: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False, repr=False)
class Flow:
    """A base and layers, optionally whitened; make one by name with `make_flow`, or `Flow.from_zuko`, `Flow.from_pyro`.

    layers: an nn.Module with `push` (see `Layers`); it is copied before it is trained, and its parameters are frozen here. whitening:
    an affine map applied last, x = whitening(layers(z)). family, options: how `make_flow` made it, so that `Flow.from_state` can.

    A Flow is a Map: `Pullback(target, flow)` is the target in the latent space.

    >>> from boltzsample.flows.families import make_flow
    >>> from boltzsample.streams import Stream
    >>> flow = make_flow("realnvp", 3, Stream(0).child("init").rng())
    >>> x, log_q, z = flow.sample_and_log_prob(100, Stream(0).child("draws").rng())
    >>> x.shape, log_q.dtype, bool((flow.log_prob(x) - log_q).abs().max() < 1e-9)
    (torch.Size([100, 3]), torch.float64, True)
    """

    base: Base
    layers: nn.Module
    whitening: Diagonal | Dense | None = None
    family: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not hasattr(self.layers, "push"):
            raise TypeError(f"layers is a {type(self.layers).__name__} without push(z); pass a zuko flow or transform to Flow.from_zuko")
        self.layers.requires_grad_(False)

    @property
    def dim(self) -> int:
        return self.base.dim

    @property
    def has_pull(self) -> bool:
        """Whether the inverse costs about as much as `push`."""
        return bool(getattr(self.layers, "has_pull", False))

    @property
    def inverts(self) -> bool:
        """Whether there is an inverse at all, in one pass or in many."""
        return self.has_pull or bool(getattr(self.layers, "inverts", False))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, that of the whitening where there are none, float64 where there is neither."""
        found = [t.dtype for t in self._tensors().values() if t.is_floating_point()]
        return found[0] if found else torch.float64

    def parameters(self) -> list[nn.Parameter]:
        return list(self.layers.parameters())

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x = T(z) (*batch, dim) and log|det J_T(z)| (*batch), of z (*batch, dim)."""
        u, log_det = cast(Layers, self.layers).push(z)
        if self.whitening is None:
            return u, log_det
        x, more = self.whitening.push(u)
        return x, log_det + more

    def pull(self, x: Tensor, slowly: bool = False) -> tuple[Tensor, Tensor]:
        """z = T^-1(x) (*batch, dim) and log|det J_(T^-1)(x)| (*batch), of x (*batch, dim). Raises NoInverse where it is not cheap,
        or, `slowly`, where there is none in dim passes or by bisection either."""
        if not (self.inverts if slowly else self.has_pull):
            raise NoInverse(
                f"the inverse of {self._title()} takes many passes or has no closed form; draws carry their own log_q "
                "(sample_and_log_prob); use a flow of couplings such as 'realnvp', or slowly=True where `inverts`"
            )
        u = x if self.whitening is None else self.whitening.pull(x)
        z, log_det = cast(Layers, self.layers).pull(u)
        return z, log_det if self.whitening is None else log_det - self.whitening.log_det

    def sample_and_log_prob(self, n: int, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """n draws x (n, dim), their log_q (n,) in float64, and the z (n, dim) they came from: one pass."""
        z = self.base.sample(rng, n).to(self.dtype)
        x, log_det = self.push(z)
        return x, self.base.log_prob(z.double()) - log_det.double(), z

    def sample(self, rng: Rng, n: int) -> Tensor:
        """n draws (n, dim)."""
        return self.sample_and_log_prob(n, rng)[0]

    def log_prob(self, x: Tensor, slowly: bool = False) -> Tensor:
        """log q (*batch), float64, at points x (*batch, dim), by the inverse. Raises NoInverse as `pull` does."""
        z, log_det = self.pull(x, slowly)
        return self.base.log_prob(z.double()) + log_det.double()

    def out_of_range(self, x: Tensor) -> Tensor:
        """The share of target-side points x (n, dim) outside the interval on which splines act, () ; 0 for flows without one.

        A spline is the identity outside: more than .001 of draws there means that it cannot shape their tails. zuko's and Pyro's splines
        count as well, if need be by an inverse of many passes.
        """
        outside: Any = getattr(self.layers, "outside", None)
        if outside is None:
            return x.new_zeros(())
        out: Tensor = outside(x if self.whitening is None else self.whitening.pull(x)).to(x.dtype).mean()
        return out

    # ---- copies ----

    def copy(self) -> Flow:
        """A Flow with layers of its own."""
        return replace(self, layers=copy.deepcopy(self.layers))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Flow:
        """A copy on this device, in this dtype."""
        made = self.copy().layers.to(device=device, dtype=dtype)
        w = self.whitening
        if isinstance(w, Diagonal):
            w = Diagonal(w.m.to(device, dtype), w.s.to(device, dtype))
        elif isinstance(w, Dense):
            w = Dense(w.m.to(device, dtype), w.L.to(device, dtype))
        return replace(self, layers=made, whitening=w)

    def whitened(self, whitening: Diagonal | Dense | None) -> Flow:
        """The same layers, in units of `whitening`."""
        return replace(self, whitening=whitening)

    def with_base(self, base: Base) -> Flow:
        """The same map from another base."""
        return replace(self, base=base)

    # ---- plain files ----

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, config): what safetensors and JSON hold, enough for `Flow.from_state`."""
        from boltzsample.flows.state import config

        return self._tensors(), config(self)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, the configuration in its header; `Flow.load` reads it. Raises ValueError for a base of one's own."""
        from boltzsample.flows.state import write

        return write(self, Path(path))

    @staticmethod
    def load(path: str | Path, layers: nn.Module | None = None) -> Flow:
        """The Flow saved at `path`, on the CPU. `layers`: as in `from_state`. Raises ValueError, FileNotFoundError."""
        from boltzsample.flows.state import read

        return read(Path(path), layers)

    @staticmethod
    def from_state(tensors: Mapping[str, Tensor], config: Mapping[str, Any], layers: nn.Module | None = None) -> Flow:
        """The Flow of `state()`. `layers`: the module, for flows that were not made by name (it is copied).

        Raises ValueError for what is unknown, missing or of another shape.
        """
        from boltzsample.flows.state import rebuild

        return rebuild(tensors, config, layers)

    @staticmethod
    def from_zuko(flow: Any, dim: int | None = None, *, base: Base | None = None, one_pass: bool = False) -> Flow:
        """See `boltzsample.flows.foreign_flows.from_zuko`."""
        from boltzsample.flows.foreign_flows import from_zuko

        return from_zuko(flow, dim, base=base, one_pass=one_pass)

    @staticmethod
    def from_pyro(transforms: Any, dim: int, *, base: Base | None = None) -> Flow:
        """See `boltzsample.flows.foreign_flows.from_pyro`."""
        from boltzsample.flows.foreign_flows import from_pyro

        return from_pyro(transforms, dim, base=base)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"layers.{name}": t.detach() for name, t in self.layers.state_dict().items()}
        w = self.whitening
        if w is not None:
            tensors |= {"whitening.m": w.m, "whitening.L": w.L} if isinstance(w, Dense) else {"whitening.m": w.m, "whitening.s": w.s}
        return tensors

    def _title(self) -> str:
        return f"the flow {self.family!r}" if self.family else f"this flow ({type(self.layers).__name__})"

    def __repr__(self) -> str:
        settings = "".join(f", {name}={value!r}" for name, value in self.options.items())
        name = repr(self.family) if self.family else type(self.layers).__name__
        count = sum(p.numel() for p in self.parameters())
        white = type(self.whitening).__name__ if self.whitening is not None else None
        return f"Flow({name}, dim={self.dim}{settings}, base={self.base!r}, whitening={white}, parameters={count}, {self.dtype})"
