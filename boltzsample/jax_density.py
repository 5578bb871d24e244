"""A JAX function as a Target: jit(vmap(value_and_grad)) of it, on torch's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.utils.dlpack import from_dlpack

from boltzsample.errors import DeviceError, DtypeError, ShapeError
from boltzsample.foreign import Both, Value, check_shape, dtype_name, foreign
from boltzsample.target import Target

Array = Any  # jax.Array: JAX is imported where it is used


def from_jax(
    fn: Callable[[Any], Any],
    dim: int,
    *,
    vectorized: bool = False,
    support: constraints.Constraint | None = None,
    names: Sequence[str] | None = None,
    event_shape: Sequence[int] | None = None,
) -> Target:
    """A Target from a log-density `fn` written in JAX, up to a constant; JAX compiles it with its gradient.

    fn maps one point (dim,), or (*event_shape), to a scalar, as JAX users write it; with vectorized=True it maps (n, dim) to (n,).
    `support`, `names` and -inf: as `from_log_prob`. Points are padded to a few batch sizes, each compiled once.

    Raises ImportError without JAX (extra `jax`), ShapeError and UnsupportedSupport as `from_log_prob`; when called, DtypeError where
    float64 points meet a JAX that computes in float32 (`jax.config.update("jax_enable_x64", True)`, not changed for you), DeviceError
    where JAX does not see the device of the points, ShapeError for what fn returns.

    >>> import pytest; jnp = pytest.importorskip("jax.numpy")
    >>> target = from_jax(lambda x: -0.5 * jnp.sum(x**2), dim=2)
    >>> target.grad_log_prob(torch.ones(1, 2))
    tensor([[-1., -1.]])
    """
    try:
        import jax
    except ImportError as error:
        raise ImportError("from_jax needs JAX, which is not installed; pip install 'boltzsample[jax]'") from error

    def make(shape: torch.Size) -> tuple[Value, Both]:
        def one(flat: Array) -> Array:
            out = fn(flat.reshape(shape))
            if jax.numpy.shape(out) != ():
                raise ShapeError(
                    f"fn returned shape {jax.numpy.shape(out)} for one point, wanted a scalar; "
                    "sum over the coordinates, or pass vectorized=True if it takes many points (n, dim)"
                )
            return out

        def many(flat: Array) -> Array:
            out = fn(flat.reshape(-1, *shape))
            check_shape(jax.numpy.shape(out), len(flat), (len(flat),), "fn")
            return out

        def many_and_grad(flat: Array) -> tuple[Array, Array]:
            log_p, vjp = jax.vjp(many, flat)
            return log_p, vjp(jax.numpy.ones_like(log_p))[0]

        value = jax.jit(many if vectorized else jax.vmap(one))
        both = jax.jit(many_and_grad if vectorized else jax.vmap(jax.value_and_grad(one)))
        return (lambda x: _jax_call(value, x)[0]), (lambda x: _pair(_jax_call(both, x)))

    return foreign(make, dim, support, names, event_shape)


def _pair(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return parts[0], parts[1]


def _jax_call(fn: Callable[[Array], Any], x: Tensor) -> tuple[Tensor, ...]:
    """fn at x (n, dim) without a copy on the way in; on the way out a copy, for JAX and torch would share memory."""
    import jax

    if x.dtype == torch.float64 and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise DtypeError(
            "JAX computes in float32 here and the points are float64; call jax.config.update('jax_enable_x64', True) right after "
            "importing jax, or sample with dtype=torch.float32"
        )
    n = len(x)
    padded = x.new_zeros(_bucket(n), x.shape[1])
    padded[:n] = x
    padded[n:] = x[:1] if n else 0.0  # a point where fn is fine if it is fine at x
    try:
        points = jax.dlpack.from_dlpack(padded)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise DeviceError(f"JAX takes no points on {x.device} (it sees {jax.devices()}); sample with device='cpu'") from error
    out = fn(points)
    out = out if isinstance(out, tuple) else (out,)
    return tuple(_tensor(part, x, n) for part in out)


def _tensor(part: Array, x: Tensor, n: int) -> Tensor:
    """The first n of what fn returned, copied, in the dtype of x."""
    if part.dtype.kind != "f" or part.dtype.itemsize < x.element_size():
        raise DtypeError(f"fn returned {part.dtype} for points of {dtype_name(x)}; keep the precision of its argument")
    return from_dlpack(part.block_until_ready())[:n].to(x.dtype, copy=True)


def _bucket(n: int) -> int:
    """The next of 8, 12, 16, 24, 32, 48, ...: every batch size that JAX meets is compiled anew, and few are worth it.

    >>> [_bucket(n) for n in (0, 1, 9, 13, 64, 65, 97)]
    [8, 8, 12, 16, 64, 96, 128]
    """
    power = 8
    while power < n:
        power *= 2
    return power * 3 // 4 if power > 8 and n <= power * 3 // 4 else power
