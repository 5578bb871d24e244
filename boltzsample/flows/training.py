"""What a training is asked for, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from boltzsample.flags import Flag
from boltzsample.flows.flow import Flow
from boltzsample.flows.look import Look

PATH, PLAIN = (256, 5e-3, 1), (128, 1e-2, 3)  # draws a step, learning rate, times as many steps


@dataclass(frozen=True)
class Training:
    """How a flow is trained. steps: of the first round, three times as many in each of the other `rounds`. batch: draws a step; None:
    256 for a path gradient, and for a plain one three times as many steps of 128 draws. lr: of Adam, at the start of a round; None:
    5e-3, plain 1e-2. path: path gradients; None: where they are to be had. anneal: the share of the first round
    over which the target is flattened, log p times beta from .05 to 1, against mode seeking. enough: nats of KL that may be left.
    look: draws on which a round is judged. share: of the run's budget, as it stands when the training ends. clip: of the gradient's
    norm. average: decay of the averaged parameters. dtype: of the network while it is trained.

    Raises ValueError.
    """

    steps: int = 700
    rounds: int = 2
    batch: int | None = None
    lr: float | None = None
    path: bool | None = None
    anneal: float = 0.0
    enough: float = 0.01
    look: int = 4096
    share: float = 1.0
    clip: float = 10.0
    average: float = 0.98
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("steps", "rounds", "batch", "look"):
            value = getattr(self, name)
            if (not isinstance(value, int) or isinstance(value, bool) or value < 1) and (name, value) != ("batch", None):
                raise ValueError(f"{name} is {value!r}; wanted an integer >= 1")
        if (self.lr is not None and not self.lr > 0) or not 0 <= self.anneal <= 1 or not 0 < self.share <= 1:
            raise ValueError(f"lr is {self.lr}, anneal {self.anneal}, share {self.share}; wanted lr > 0, anneal in [0, 1], share in (0, 1]")

    def filled(self, path: bool) -> Training:
        """With batch and lr in place of None, for path gradients or plain ones."""
        batch, lr, times = PATH if path else PLAIN
        steps = self.steps * times if self.batch is None else self.steps
        return replace(self, steps=steps, batch=self.batch or batch, lr=self.lr or lr, path=path)

    @property
    def planned(self) -> int:
        """Steps of all rounds."""
        return sum(self.of_round(r) for r in range(self.rounds))

    def of_round(self, r: int) -> int:
        """Steps of round r = 0, 1, ..."""
        return self.steps if r == 0 else 3 * self.steps


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained flow. history: `elbo` and `sd` (steps,) of the log-weights of each batch; looks: one after each round, `seconds` after
    the start; rows: (log_prob, log_prob_and_grad) spent; skipped: steps without a finite gradient, rolled_back: returns to the last
    good parameters; notes: flags. Looks and history are those of draws of the narrow base N(0, I), on which flows are trained."""

    flow: Flow
    history: dict[str, Tensor]
    looks: tuple[Look, ...]
    rows: tuple[int, int]
    skipped: int = 0
    rolled_back: int = 0
    notes: tuple[Flag, ...] = ()
    seconds: tuple[float, ...] = ()
