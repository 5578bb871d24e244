"""What happens at the sites of a Pyro model while it runs: values are placed, log-densities and Jacobians summed (pyro_model.py).

Imported when a Pyro model is: everything here needs Pyro.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Distribution, Transform

from boltzsample.bijections import Bijection
from boltzsample.constraints import UnsupportedSupport, bijection
from boltzsample.errors import DtypeError, PyroModelError
from boltzsample.laws import is_discrete, peel, support

SAME_SITES = "wanted the same latent sites with the same shapes in every run"
MIXED = re.compile("same dtype|expected scalar type|same data type")  # torch's words
Place = Callable[[str, Bijection, tuple[Transform, ...]], tuple[Tensor, Tensor]]  # y flattened, and log|det dy/dz|


class Sites(Messenger):
    """Puts a value at each latent site and sums: `log_p`, `sizes` (free coordinates of the latent sites), `values` (latent and
    deterministic sites), `discrete` (names). `place` says where a site is; `like` has the dtype and device that observed values
    follow; `params` has the values of param sites, and is filled in where it has none."""

    def __init__(self, place: Place, like: Tensor, params: dict[str, Tensor], *, check_precision: bool = False) -> None:
        super().__init__()
        self.place, self.like, self.params, self.check_precision = place, like, params, check_precision
        self.log_p = like.new_zeros(())
        self.sizes: dict[str, int] = {}
        self.values: dict[str, Tensor] = {}
        self.discrete: list[str] = []
        self.images: dict[str, tuple[Distribution, Tensor, tuple[Transform, ...]]] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["fn"], _Subsample):
            return
        if msg["is_observed"]:
            msg["value"] = followed(msg["value"], self.like)
        elif not msg["done"] and msg["value"] is None:  # else an inner handler, such as poutine.replay, has fixed it
            self._latent(msg)

    def _latent(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if name in self.values:
            raise PyroModelError(f"two sites are named {name}; give each a name of its own")
        if is_discrete(msg["fn"]):  # Pyro draws it; `discover` refuses them all at once
            self.discrete.append(name)
            return
        base, transforms = peel(msg["fn"])
        shape = torch.Size(base.batch_shape) + torch.Size(base.event_shape)
        try:
            onto = bijection(support(base), shape)
        except UnsupportedSupport as error:
            raise UnsupportedSupport(f"site {name}: {error}") from None
        y, log_det = self.place(name, onto, transforms)
        x = y = y.reshape(shape)
        for t in transforms:
            x = t(x)
        msg["value"], msg["done"] = x, True
        self.values[name], self.sizes[name] = x, onto.size
        self.log_p = self.log_p + log_det
        if transforms:
            self.images[name] = base, y, transforms

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        fn, name, value = msg["fn"], msg["name"], msg["value"]
        if isinstance(fn, _Subsample):
            if len(value) < fn.size:
                raise PyroModelError(f"plate {name} takes {len(value)} of {fn.size} data at random; use the whole plate, without subsample")
        elif msg["is_observed"] and isinstance(fn, MaskedDistribution) and isinstance(fn.base_dist, Delta):
            self.values[name] = value  # pyro.deterministic, or what a reparametrisation leaves of a site
        elif name not in self.discrete:
            log_p = self._log_prob(msg)
            if self.check_precision:
                _check_precision(name, fn, log_p.dtype, self.like.dtype)
            self.log_p = self.log_p + log_p

    def _log_prob(self, msg: dict[str, Any]) -> Tensor:
        """log p of the value; of x = T(y) plus log|det T|, which is log p of y."""
        base, y, transforms = self.images.get(msg["name"], (None, msg["value"], ()))
        if base is not None and msg["mask"] is None and isinstance(msg["scale"], (int, float)) and msg["scale"] == 1:
            return base.log_prob(y).sum()
        log_p: Tensor = scale_and_mask(_log_prob(msg["fn"], msg["value"]), msg["scale"], msg["mask"]).sum()  # type: ignore[no-untyped-call]
        for t in transforms:
            x = t(y)
            log_p, y = log_p + t.log_abs_det_jacobian(y, x).sum(), x
        return log_p

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.params:
            msg["value"], msg["done"] = followed(self.params[msg["name"]], self.like), True

    def _pyro_post_param(self, msg: dict[str, Any]) -> None:
        if msg["name"] not in self.params:
            self.params[msg["name"]] = msg["value"].detach().clone()


def _log_prob(fn: Any, value: Tensor) -> Tensor:
    """fn.log_prob(value), for a Multinomial in words that vmap understands."""
    if not isinstance(fn, torch.distributions.Multinomial):
        log_p: Tensor = fn.log_prob(value)
        return log_p
    n = value.sum(-1)
    return torch.lgamma(n + 1) - torch.lgamma(value + 1).sum(-1) + torch.where(value == 0, 0.0, value * fn.logits).sum(-1)


def discover(model: Callable[..., Any], args: Any, kwargs: Any) -> tuple[dict[str, int], dict[str, Tensor]]:
    """The latent sites of a model, name -> free coordinates, and the values of its params. Raises PyroModelError, UnsupportedSupport."""
    try:
        seen = _first_run(model, args, kwargs, torch.zeros(()))
    except RuntimeError as error:  # the precision of the run is not known yet
        if not MIXED.search(str(error)):
            raise
        seen = _first_run(model, args, kwargs, torch.zeros((), dtype=torch.float64))
    if seen.discrete:
        raise PyroModelError(
            f"discrete latent sites cannot be sampled here: {', '.join(seen.discrete)}; sum them out of the model, as a mixture law "
            "(MixtureSameFamily) or with pyro.factor"
        )
    if not seen.sizes:
        raise PyroModelError("the model has no latent site to sample: all have obs=; leave it out where the value is unknown")
    return seen.sizes, seen.params


def _first_run(model: Callable[..., Any], args: Any, kwargs: Any, like: Tensor) -> Sites:
    seen = Sites(lambda name, onto, transforms: onto.push(like.new_zeros(onto.size)), like, {})
    with pyro_state(like.dtype), torch.random.fork_rng(devices=[]), torch.no_grad(), seen:
        model(*followed(args, like), **followed(kwargs, like))
    return seen


# ---- where the latent sites are ----


def pushing(z: Tensor) -> Place:
    """Sites at z (dim,), one after the other."""
    at = 0

    def place(name: str, onto: Bijection, transforms: tuple[Transform, ...]) -> tuple[Tensor, Tensor]:
        nonlocal at
        at += onto.size
        if at > len(z):
            raise PyroModelError(f"site {name} was not there when the model ran first; {SAME_SITES}")
        return onto.push(z[at - onto.size : at])

    return place


def pulled(run: Callable[[Place], Any], given: dict[str, Tensor]) -> Tensor:
    """z (dim,) of the values `given` to latent sites, which `run` visits."""
    parts: list[Tensor] = []

    def place(name: str, onto: Bijection, transforms: tuple[Transform, ...]) -> tuple[Tensor, Tensor]:
        y = given[name]
        for t in reversed(transforms):
            y = t.inv(y)
        y = y.reshape(-1)
        parts.append(onto.pull(y))
        return y, y.new_zeros(())

    run(place)
    return torch.cat(parts)


# ---- precision, and the state of torch and Pyro ----


def followed(value: Any, like: Tensor) -> Any:
    """Tensors, also in lists, tuples and dicts, on the device of `like`, the floating ones in its dtype."""
    if isinstance(value, Tensor):
        return value.to(like) if value.is_floating_point() else value.to(like.device)
    if type(value) in (list, tuple):
        return type(value)(followed(v, like) for v in value)
    if type(value) is dict:
        return {key: followed(v, like) for key, v in value.items()}
    return value


def _check_precision(name: str, fn: Any, found: torch.dtype, dtype: torch.dtype) -> None:
    """Raises DtypeError where the log-density, or a law's parameters that depend on latent values, are in a lower precision."""
    for value in vars(fn).values():
        if isinstance(value, Distribution):
            _check_precision(name, value, found, dtype)
        elif isinstance(value, Tensor) and value.requires_grad and value.is_floating_point():
            found = min(found, value.dtype, key=lambda d: d.itemsize)
    if found.itemsize < dtype.itemsize:
        raise DtypeError(
            f"site {name} is computed in {found} for points of {dtype}; pass the model's data as arguments, from_pyro(model, data), "
            f"which follow the run, or convert what it closes over, as in data.to({dtype}), or sample with dtype={found}"
        )


@contextmanager
def pyro_state(dtype: torch.dtype, has_params: bool = True) -> Iterator[None]:
    """Validation off (vmap cannot branch on values), constants in this dtype, a param store of one's own; all as before afterwards."""
    before, store = torch.get_default_dtype(), pyro.get_param_store()
    with pyro.validation_enabled(False), store.scope(store.get_state()) if has_params else nullcontext():
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
