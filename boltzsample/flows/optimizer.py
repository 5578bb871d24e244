"""Adam on one flat vector that all parameters are views of: a step is a dozen operations, however many layers there are.

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  theta <- theta - lr m-hat / (sqrt v-hat + eps)

with the norm of g clipped, an exponential average of theta beside it, and a way back: steps without a finite loss or gradient are
skipped, and after PATIENCE of them in a row theta, m, v return to the last snapshot and the rate is halved. Kingma & Ba
(2015), ICLR, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

B1, B2, EPS = 0.9, 0.999, 1e-8
PATIENCE = 5  # steps in a row without a finite gradient
SNAPSHOT = 50  # good steps between snapshots


class Optimizer:
    """Trains the parameters of `module`, which become views of one vector; `average` is the decay of the averaged parameters."""

    def __init__(self, module: nn.Module, lr: float, clip: float, average: float) -> None:
        self.parameters = list(module.parameters())
        self.theta = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        self.grad = torch.zeros_like(self.theta)
        self.m, self.v, self.mean = torch.zeros_like(self.theta), torch.zeros_like(self.theta), self.theta.clone()
        self.lr, self.clip, self.average = lr, clip, average
        self.t = self.bad = self.good = self.skipped = self.rolled_back = 0
        start = 0
        for p in self.parameters:
            part = slice(start, start + p.numel())
            p.requires_grad_(True)
            p.data, p.grad = self.theta[part].view_as(p), self.grad[part].view_as(p)
            start = part.stop
        self._keep()

    def step(self, loss: Tensor, share: float) -> bool:
        """One step down the loss with `share` of the learning rate; False where it was skipped."""
        self.grad.zero_()
        norm = torch.zeros(())
        if loss.requires_grad and bool(loss.isfinite()):
            loss.backward()
            norm = self.grad.norm()
        if not (loss.requires_grad and bool(loss.isfinite()) and bool(norm.isfinite())):
            self._skip()
            return False
        with torch.no_grad():
            self._adam(self.grad * (self.clip / norm.clamp(min=self.clip)), share * self.lr)
        self.bad, self.good = 0, self.good + 1
        if self.good % SNAPSHOT == 0:
            self._keep()
        return True

    def restart(self) -> None:
        """Go on from the averaged parameters, with fresh moments: a new round."""
        with torch.no_grad():
            self.theta.copy_(self.mean)
            self.m.zero_(), self.v.zero_()
        self.t = 0
        self._keep()

    def finish(self) -> None:
        """Give the module the averaged parameters, tensors of its own, frozen."""
        with torch.no_grad():
            self.theta.copy_(self.mean)
        for p in self.parameters:
            p.data, p.grad = p.data.clone(), None
            p.requires_grad_(False)

    def _adam(self, g: Tensor, lr: float) -> None:
        self.t += 1
        self.m.lerp_(g, 1 - B1)
        self.v.mul_(B2).addcmul_(g, g, value=1 - B2)
        scale = lr * (1 - B2**self.t) ** 0.5 / (1 - B1**self.t)
        self.theta.addcdiv_(self.m, self.v.sqrt().add_(EPS), value=-scale)
        self.mean.lerp_(self.theta, max(1 - self.average, 1 / self.t))

    def _keep(self) -> None:
        self._last = [t.clone() for t in (self.theta, self.m, self.v, self.mean)]

    def _skip(self) -> None:
        self.skipped, self.bad = self.skipped + 1, self.bad + 1
        if self.bad % PATIENCE == 0:
            for now, then in zip((self.theta, self.m, self.v, self.mean), self._last, strict=True):
                now.copy_(then)
            self.lr, self.rolled_back = self.lr / 2, self.rolled_back + 1
