"""A Pyro model as a Target: its unobserved sites, laid side by side in R^n.

One run of the model at z in R^n: at each latent site, in the order of the model,

    x_k = T_k(z_k),      T_k the bijection onto the support of the site's law, given the sites before it,

and log pi(z) = sum over all sites of log p(value | sites before) + sum_k log|det T_k|. The Jacobian is triangular in the sites, so
supports may depend on them (Uniform(0, sigma) with a latent sigma). Many points are one run under torch.func.vmap. Pyro's own
scales and masks are applied to log p, as its Trace does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from boltzsample.adapters import VectorizeError
from boltzsample.errors import DtypeError, PyroModelError, ShapeError
from boltzsample.target import FunctionTarget

if TYPE_CHECKING:
    from boltzsample.pyro_sites import Place, Sites

AT_ONCE = 4096  # points in one run of the model for readout


def from_pyro(model: Callable[..., Any], *args: Any, **kwargs: Any) -> PyroTarget:
    """A Target from a Pyro model: the posterior of its unobserved sites, called as `model(*args, **kwargs)`.

    Latent sites may have any continuous law with a bijection onto its support, which may depend on other sites; plates, shaped
    sites, `pyro.factor`, `poutine.scale`, `mask` and `condition` count as in Pyro. Results come back as a dict, one tensor a
    site and one for each `pyro.deterministic`, by name, in the model's space; starts=, where given, is such a dict too.

    Tensors among the arguments and observed values follow the dtype and device of the run; what the model closes over does not.
    `pyro.param` sites are constants, with the values they have now. The model is run with Pyro's validation off and torch's
    default dtype set to that of the run, both restored, as are the param store and the random state.

    Raises PyroModelError for discrete latent sites, atoms, subsampling plates, no latent site; UnsupportedSupport, with the site's
    name; and, when called, VectorizeError where torch.func.vmap cannot run the model (`if` on a latent value, .item(), random
    numbers) and DtypeError where it computes in a lower precision than the run.

    >>> import pyro, pyro.distributions as dist
    >>> def model(y):
    ...     scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    ...     pyro.sample("y", dist.Normal(0.0, scale).expand([3]).to_event(1), obs=y)
    >>> target = from_pyro(model, torch.tensor([1.0, -2.0, 0.5]))
    >>> target.dim, target.readout(torch.zeros(2, 1))
    (1, {'scale': tensor([1., 1.])})
    """
    if not callable(model):
        raise TypeError(f"model is a {type(model).__name__}; wanted a function with pyro.sample statements, or a PyroModule")
    from boltzsample.pyro_sites import discover

    sizes, params = discover(model, args, kwargs)
    return PyroTarget(model, args, kwargs, sizes, params)


@dataclass(frozen=True, eq=False)
class PyroTarget:
    """The posterior of a Pyro model on R^dim; made by `from_pyro`. `sites`: name -> free coordinates, in the order of the model."""

    model: Callable[..., Any] = field(repr=False)
    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
    sites: dict[str, int]
    params: dict[str, Any] = field(repr=False)
    looped: bool = False
    _made: dict[Any, tuple[Any, Any]] = field(default_factory=dict, repr=False)  # arguments by (dtype, device)
    _target: FunctionTarget = field(init=False, repr=False)
    compilable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "_target", FunctionTarget(self._many_log_probs, self.dim))

    @property
    def dim(self) -> int:
        return sum(self.sites.values())

    def log_prob(self, z: Tensor) -> Tensor:
        return self._target.log_prob(z)

    def grad_log_prob(self, z: Tensor) -> Tensor:
        return self._target.grad_log_prob(z)

    def log_prob_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._target.log_prob_and_grad(z)

    def readout(self, z: Tensor) -> dict[str, Tensor]:
        """name -> (*batch, *shape), latent and deterministic sites in the model's space, of z (*batch, dim)."""
        flat = z.detach().reshape(-1, self.dim)
        with torch.no_grad():
            some = flat if len(flat) else flat.new_zeros(1, self.dim)  # vmap wants one point at least
            read = self._vmapped(lambda row: self._at(row).values, some, AT_ONCE)
        return {name: v[: len(flat)].reshape(z.shape[:-1] + v.shape[1:]).to(z) for name, v in read.items()}

    def pull(self, values: Any) -> Tensor:
        """z (*batch, dim) of a dict of latent sites, name -> (*batch, *shape), such as starts; NaN outside of the support.

        Deterministic sites in it are ignored. Raises ShapeError where a site is missing or shapes disagree.
        """
        from boltzsample.pyro_sites import pulled

        if not isinstance(values, dict) or any(name not in values for name in self.sites):
            got = f"a dict of {', '.join(values)}" if isinstance(values, dict) else f"a {type(values).__name__}"
            raise ShapeError(f"got {got}; wanted points of the model as a dict with all latent sites: {', '.join(self.sites)}")
        given = {name: _floating(values[name]) for name in self.sites}
        batch, flat = self._split(given)
        like = next(iter(flat.values()))
        parts: Callable[[Any], Tensor] = lambda row: pulled(lambda place: self._run(place, like), row)  # noqa: E731
        with torch.no_grad():
            z: Tensor = self._vmapped(parts, flat, AT_ONCE)
        return z.reshape((*batch, self.dim))

    def _split(self, given: dict[str, Tensor]) -> tuple[torch.Size, dict[str, Tensor]]:
        """The batch shape that all sites share, and the sites with it flattened."""
        first = next(iter(given.values()))
        with torch.no_grad():
            wanted = {name: v.shape for name, v in self._at(first.new_zeros(self.dim)).values.items()}
        batch = first.shape[: first.dim() - len(wanted[next(iter(given))])]
        for name, v in given.items():
            if v.shape != batch + wanted[name]:
                raise ShapeError(
                    f"site {name} came with shape {tuple(v.shape)}; wanted {tuple(wanted[name])} with the same leading axes for all sites, "
                    f"here {tuple(batch)}"
                )
        return batch, {name: v.reshape(-1, *wanted[name]) for name, v in given.items()}

    def one_by_one(self) -> PyroTarget:
        """The same target, which runs the model once for each point: tens of times slower, for models that vmap cannot run."""
        return PyroTarget(self.model, self.args, self.kwargs, self.sites, self.params, looped=True)

    # ---- running the model ----

    def _many_log_probs(self, z: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            raise PyroModelError("a Pyro model cannot be compiled as it is; sample with compile=False")
        if len(z) == 0:  # vmap wants one point at least
            return z.sum(-1)
        log_p: Tensor = self._vmapped(lambda row: self._at(row).log_p, z, None)
        return log_p

    def _vmapped(self, one: Callable[[Any], Any], batch: Any, chunk: int | None) -> Any:
        """one(point) for all points of the batch, a tensor or a dict of tensors, stacked."""
        if self.looped:
            return _stacked([one(row) for row in _rows(batch)])
        try:
            return torch.func.vmap(one, chunk_size=chunk)(batch)
        except (RuntimeError, ValueError) as error:
            if "vmap" in str(error):
                raise VectorizeError(
                    "torch.func.vmap could not run the model on many points at once (its words are above); use torch.where in place of "
                    "`if` on latent values, no .item(), no random numbers outside of pyro.sample; or take "
                    "from_pyro(...).one_by_one(), which runs the model once for each point (slow)"
                ) from error
            raise

    def _at(self, z: Tensor) -> Sites:
        """One run of the model at z (dim,)."""
        from boltzsample.pyro_sites import pushing

        return self._run(pushing(z), z)

    def _run(self, place: Place, like: Tensor, precision: bool = False) -> Sites:
        """One run of the model, with `place` choosing the latent values, in the dtype and on the device of `like`."""
        from boltzsample.pyro_sites import MIXED, SAME_SITES, Sites, pyro_state

        args, kwargs = self._arguments(like)
        seen = Sites(place, like, self.params, check_precision=precision)
        try:
            with pyro_state(like.dtype, bool(self.params)), seen:
                self.model(*args, **kwargs)
        except RuntimeError as error:
            if MIXED.search(str(error)):
                raise DtypeError(_mixed(like.dtype)) from error
            raise
        if seen.sizes != self.sites:
            raise PyroModelError(f"the model's latent sites were {', '.join(self.sites)} and are now {', '.join(seen.sizes)}; {SAME_SITES}")
        return seen

    def _arguments(self, like: Tensor) -> tuple[Any, Any]:
        """args and kwargs in the dtype and on the device of `like`, made once for each; then precision is checked too."""
        from boltzsample.pyro_sites import followed, pushing

        key = (like.dtype, like.device)
        if key not in self._made:
            self._made[key] = followed((self.args, self.kwargs), like)
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                leaf = torch.zeros(self.dim, dtype=like.dtype, device=like.device, requires_grad=True)
                self._run(pushing(leaf), leaf, precision=True)
        return self._made[key]


def _rows(batch: Any) -> list[Any]:
    if isinstance(batch, dict):
        return [dict(zip(batch, row, strict=True)) for row in zip(*(v.unbind() for v in batch.values()), strict=True)]
    return list(batch.unbind())


def _stacked(rows: list[Any]) -> Any:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if isinstance(rows[0], dict) else torch.stack(rows)


def _floating(value: Any) -> Tensor:
    v = torch.as_tensor(value).detach()
    return v if v.is_floating_point() else v.to(torch.get_default_dtype())


def _mixed(dtype: torch.dtype) -> str:
    return (
        f"the model mixes dtypes at points of {dtype}; pass its data as arguments, from_pyro(model, data), which follow the run, "
        f"or convert them, as in data.to({dtype}), or sample with dtype=torch.float32"
    )
