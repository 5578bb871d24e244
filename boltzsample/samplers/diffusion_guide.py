"""What the sampler tells the training of its denoiser: how good the weights are, and better draws to go on with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from boltzsample.networks import Denoiser
from boltzsample.samplers.defended import defended
from boltzsample.samplers.diffusion_pool import asked
from boltzsample.samplers.reverse import Reverse, Rule, ess
from boltzsample.samplers.sampler import Run
from boltzsample.schedules import Levels
from boltzsample.scores.pool import Pool
from boltzsample.streams import Rng
from boltzsample.views import Pullback

LOOK = 500  # paths of a look at the weights
FRESH, EFFECTIVE = 32_768, 1000  # paths that renew the pool; of which so many must be effective


@dataclass(frozen=True, eq=False)
class Guided:
    """view: the target in scaled units; defense: the share of defensive paths; share: of the budget that training may take."""

    view: Pullback
    levels: Levels
    rule: Rule
    held: Pool
    run: Run
    defense: float
    share: float

    def enough(self, net: Denoiser, r: int) -> tuple[bool, dict[str, float]]:
        """Whether weights are nearly equal. Price: LOOK log_prob, entered under "looks"."""
        if self.run.must_stop(LOOK, self.share) is not None:
            return True, {}
        rng = self.run.stream.child("look", r).rng(self.run.backend.dtype, self.run.backend.device)
        path = defended(self._reverse(net, rng), LOOK, self.defense, rng, self.view.dim)
        log_w = _proper(self.view.log_prob(path.z).double()) + path.log_ratio
        self.run.ledger.add("looks", (LOOK, 0))
        found, forth = ess(log_w), log_w[: LOOK - round(self.defense * LOOK)]
        return found > 0.98 * (1 - self.defense), {"ess": found, "elbo": float(forth.mean())}

    def renewed(self, net: Denoiser, r: int, found: dict[str, float]) -> tuple[Pool, Pool] | None:
        """Independent paths with their weights in place of particles that are relatives: from round 2 on, where enough are effective.
        Weights are cut at sqrt(n) times their mean, which costs a little bias of what is learned, none of what is reported (Ionides 2008).
        Price: FRESH gradients, entered under "training"."""
        if r < 2 or found.get("ess", 0.0) * FRESH < EFFECTIVE or self.run.must_stop(FRESH, self.share) is not None:
            return None
        rng = self.run.stream.child("renewed", r).rng(self.run.backend.dtype, self.run.backend.device)
        path = self._reverse(net, rng).draw(FRESH, self.view.dim, rng)
        log_p, grad = asked(self.view, path.x, self.run)
        log_w = _proper(log_p.double()) + path.log_ratio
        log_w = log_w.clamp(max=log_w.logsumexp(0) - 0.5 * math.log(FRESH))
        fine = log_w.isfinite() & (True if grad is None else grad.isfinite().all(-1))
        pool = Pool(path.x, grad, log_w, torch.arange(FRESH, device=log_w.device), self.held.low, self.held.high)
        return pool[fine.nonzero()[:, 0]].split(rng)

    def _reverse(self, net: Denoiser, rng: Rng) -> Reverse:
        return Reverse(net, self.levels, self.rule).calibrated(self.held.z, rng, not net.full)


def _proper(log_p: Tensor) -> Tensor:
    """NaN is no density, and +inf is for those who draw in earnest to report."""
    return torch.where(log_p < torch.inf, log_p, -torch.inf)
