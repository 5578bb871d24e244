"""Errors a user can meet. Each carries the stable code of TRUST's taxonomy; each message says what came, what was wanted, what to try."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class BoltzsampleError(Exception):
    """Base class of every error this library raises on purpose."""

    code = "ERROR"


class ShapeError(BoltzsampleError, ValueError):
    """A tensor of the wrong shape."""

    code = "SHAPE"


class DtypeError(BoltzsampleError, TypeError):
    """A tensor of the wrong dtype."""

    code = "DTYPE"


class DeviceError(BoltzsampleError, ValueError):
    """Tensors on different devices."""

    code = "DEVICE"


class BatchCrosstalkError(BoltzsampleError, ValueError):
    """log_prob of one point depends on the other points of its batch."""

    code = "BATCH_CROSSTALK"


class GradMismatchError(BoltzsampleError, ValueError):
    """grad_log_prob is not the gradient of log_prob."""

    code = "GRAD_MISMATCH"


class NondeterministicError(BoltzsampleError, ValueError):
    """Two calls at the same points gave different values."""

    code = "NONDETERMINISTIC"


class MutatesInputError(BoltzsampleError, ValueError):
    """The density wrote to the tensor it was handed."""

    code = "MUTATES_INPUT"


class InitFailed(BoltzsampleError, ValueError):
    """No point with a finite log-density was found; `rows` evaluations of log_prob were spent on looking."""

    code = "INIT_FAILED"

    def __init__(self, message: str, rows: int = 0) -> None:
        super().__init__(message)
        self.rows = rows


class ImproperSuspected(BoltzsampleError, ValueError):
    """The density seems to have no finite integral, and no check of its gradient can be passed either."""

    code = "IMPROPER_SUSPECTED"


class PyroModelError(BoltzsampleError, ValueError):
    """A Pyro model with sites that cannot be sampled as one continuous density."""

    code = "PYRO_MODEL"


class NoGradient(BoltzsampleError, NotImplementedError):
    """A gradient was asked of a density that has none."""

    code = "NO_GRADIENT"


class PositiveInfinityError(BoltzsampleError, ValueError):
    """log_prob returned +inf: a density spike or a bug. `x` holds the point."""

    code = "POSINF"

    def __init__(self, message: str, x: Tensor | None = None) -> None:
        super().__init__(message)
        self.x = x

    @classmethod
    def at(cls, x: Tensor) -> PositiveInfinityError:
        """Met at x (dim,), while sampling."""
        return cls(
            f"log_prob returned +inf at x = {x.tolist()}; a log-density may be -inf but never +inf: look for a division by zero "
            "or an unbounded spike there (the point is in the exception's .x)",
            x,
        )


class RejectPoint(Exception):
    """Raise this inside your log_prob to say "this point has density zero": it counts as -inf."""
