"""A Target that counts what is asked of it: rows of log_prob, and rows of log_prob_and_grad (or of grad_log_prob). For tests only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from boltzsample.target import Target, log_prob_and_grad, readout


@dataclass
class Counted:
    """Counts calls in rows (points); eager only, as a compiled graph would not see the counters move."""

    target: Target
    log_prob_rows: int = 0
    grad_rows: int = 0

    @property
    def dim(self) -> int:
        return self.target.dim

    @property
    def total(self) -> int:
        return self.log_prob_rows + self.grad_rows

    def log_prob(self, x: Tensor) -> Tensor:
        self.log_prob_rows += x[..., 0].numel()
        return self.target.log_prob(x)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        self.grad_rows += x[..., 0].numel()
        return self.target.grad_log_prob(x)

    def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.grad_rows += x[..., 0].numel()
        return log_prob_and_grad(self.target, x)

    def readout(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        return readout(self.target, x)
