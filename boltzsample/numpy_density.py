"""A NumPy function as a Target: points go out as private copies, values and gradients come back as copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from boltzsample.errors import DeviceError, DtypeError
from boltzsample.foreign import Both, Value, check_shape, dtype_name, foreign
from boltzsample.target import Target


def from_numpy(
    fn: Callable[[Any], Any],
    dim: int,
    *,
    grad: Callable[[Any], Any] | None = None,
    value_and_grad: Callable[[Any], tuple[Any, Any]] | None = None,
    vectorized: bool = True,
    support: constraints.Constraint | None = None,
    names: Sequence[str] | None = None,
    event_shape: Sequence[int] | None = None,
) -> Target:
    """A Target from a log-density `fn` of NumPy arrays, up to a constant.

    fn maps (n, dim) to (n,), or (n, *event_shape) to (n,); with vectorized=False one point to a number. `grad` maps the same points
    to gradients of their shape; `value_and_grad` returns both at once and is used in its place. Without either there is no
    gradient, and methods that need one refuse; `mcmc` takes a random walk. `support`, `names`, -inf and `RejectPoint`: as
    `from_log_prob`.

    Arrays are private copies in the dtype of the run (float64 on CPU), so fn may write to them. NumPy's warnings on overflow and
    invalid values are silent inside fn: values that are not finite are counted, and reported by the run. It runs on the CPU and is not
    compiled.

    Raises ShapeError and UnsupportedSupport as `from_log_prob`; when called, ShapeError and DtypeError for what fn returns (float32
    for points in float64 is refused), DeviceError for points on another device, NoGradient.

    >>> import numpy as np
    >>> target = from_numpy(lambda x: -0.5 * np.sum(x**2, axis=-1), dim=2, grad=lambda x: -x)
    >>> target.log_prob(torch.ones(3, 2))
    tensor([-1., -1., -1.])
    """
    if grad is not None and value_and_grad is not None:
        raise TypeError("got grad and value_and_grad; wanted one of them: value_and_grad returns both at once")
    joint, gradient = value_and_grad, grad

    def make(shape: torch.Size) -> tuple[Value, Both | None]:
        def value(x: Tensor) -> Tensor:
            return _tensor(_numpy_call(fn, x, shape, vectorized), x, x.shape[:1], "fn")

        def both(x: Tensor) -> tuple[Tensor, Tensor]:
            if joint is None:
                assert gradient is not None
                return value(x), _tensor(_numpy_call(gradient, x, shape, vectorized), x, (len(x), *shape), "grad").reshape(x.shape)
            log_p, g = _numpy_call(joint, x, shape, vectorized, parts=2)
            pair = _tensor(log_p, x, x.shape[:1], "value_and_grad"), _tensor(g, x, (len(x), *shape), "value_and_grad")
            return pair[0], pair[1].reshape(x.shape)

        return value, None if joint is None and gradient is None else both

    return foreign(make, dim, support, names, event_shape)


def _numpy_call(fn: Callable[[Any], Any], x: Tensor, shape: torch.Size, vectorized: bool, parts: int = 1) -> Any:
    """fn at a copy of x (n, dim), given the event's shape; point by point where it takes one; (values, gradients) where parts=2."""
    if x.device.type != "cpu":
        raise DeviceError(f"a NumPy density runs on the CPU, got points on {x.device}; sample with device='cpu'")
    points = np.array(x.numpy()).reshape(-1, *shape)
    with np.errstate(all="ignore"):
        if vectorized:
            return fn(points)
        rows = [fn(point) for point in points]
    if parts == 1:
        return np.stack([np.asarray(row) for row in rows])
    return tuple(np.stack([np.asarray(row[i]) for row in rows]) for i in range(parts))


def _tensor(out: Any, x: Tensor, wanted: Sequence[int], name: str) -> Tensor:
    """What fn returned, checked and copied, in the dtype of x."""
    value = np.asarray(out)
    if value.dtype.kind not in "fiub":
        raise DtypeError(f"{name} returned {value.dtype} numbers (a {type(out).__name__}), wanted an array of {dtype_name(x)}")
    if value.dtype.kind == "f" and value.dtype.itemsize < x.element_size():
        raise DtypeError(
            f"{name} returned {value.dtype} for points of {dtype_name(x)}; keep the precision of its argument, "
            "or sample in another with dtype=torch.float32"
        )
    check_shape(value.shape, len(x), wanted, name)
    return torch.from_numpy(np.array(value, dtype=dtype_name(x)))
