"""What the sampler tells the training of its denoiser: how good the weights are, and better draws to go on with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from boltzsample.estimates.weighted import even_index
from boltzsample.networks import Denoiser
from boltzsample.samplers.defended import defended, helps
from boltzsample.samplers.diffusion_pool import asked
from boltzsample.samplers.reverse import Reverse, Rule, ess
from boltzsample.samplers.sampler import Run
from boltzsample.schedules import Levels
from boltzsample.scores.pool import Pool
from boltzsample.streams import Rng
from boltzsample.views import Pullback

LOOK = 500  # paths of a look at the weights
LATE, GOOD = 3, 0.5  # rounds after which such an ESS will do
EFFECTIVE = 1000  # paths that renew the pool: so many of them must be effective


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
        """Whether weights are nearly equal, or after three rounds good enough: what is measured, elbo <= log Z <= eubo as far as the draws
        held out are the target's. Price: LOOK log_prob, entered under "looks"."""
        if self.run.must_stop(LOOK, self.share) is not None:
            return True, {}
        rng = self.run.stream.child("look", r).rng(self.run.backend.dtype, self.run.backend.device)
        path = defended(self._reverse(net, rng), LOOK, self.defense, rng, self.view.dim)
        log_w = _proper(self.view.log_prob(path.z).double()) + path.log_ratio
        self.run.ledger.add("looks", (LOOK, 0))
        found, forth = ess(log_w), log_w[: LOOK - round(self.defense * LOOK)]
        rough = ess(log_w.clamp(max=log_w.logsumexp(0) - 0.5 * math.log(LOOK)))
        good = found > (0.98 if r < LATE else GOOD) * (1 - self.defense)
        return good, {"ess": found, "cut": rough, "elbo": float(forth.mean()), "eubo": self._eubo(self._reverse(net, rng), rng)}

    def renewed(self, net: Denoiser, r: int, found: dict[str, float]) -> tuple[Pool, Pool] | None:
        """Independent paths with their weights in place of particles that are relatives: from round 2 on, where enough are effective.
        Weights are cut at sqrt(n) times their mean, which costs a little bias of what is learned, none of what is reported (Ionides 2008).
        Half as many levels do for that. Price: a gradient a path, entered under "training"."""
        n = min(max(4096 * self.view.dim, 32_768), 131_072)
        if r < 2 or found.get("cut", 0.0) * n < EFFECTIVE or self.run.must_stop(n, self.share) is not None:
            return None
        rng = self.run.stream.child("renewed", r).rng(self.run.backend.dtype, self.run.backend.device)
        path = self._reverse(net, rng, coarse=True).draw(n, self.view.dim, rng)
        log_p, grad = asked(self.view, path.x, self.run)
        log_w = _proper(log_p.double()) + path.log_ratio
        log_w = log_w.clamp(max=log_w.logsumexp(0) - 0.5 * math.log(n))
        fine = log_w.isfinite() & (True if grad is None else grad.isfinite().all(-1))
        pool = Pool(path.x, grad, log_p.double(), log_w, torch.arange(n, device=log_w.device), self.held.low, self.held.high)
        return pool[fine.nonzero()[:, 0]].split(rng)

    def wants_defense(self, reverse: Reverse, share: float) -> bool:
        """Whether a share of defensive paths makes weights better, as seen from paths back from the draws held out, at no price."""
        held = self.held if self.held.log_w is None else self.held[even_index(self.held.log_w)]
        assert held.log_p is not None
        rng = self.run.stream.child("defense").rng(self.run.backend.dtype, self.run.backend.device)
        return helps(share, held.z, reverse.back(held.z, rng).log_ratio, held.log_p, rng)

    def _eubo(self, reverse: Reverse, rng: Rng) -> float:
        held = self.held[torch.arange(min(LOOK, len(self.held.z)), device=self.held.z.device)]
        assert held.log_p is not None
        w = torch.full_like(held.log_p, 1 / len(held.z)) if held.log_w is None else torch.softmax(held.log_w, 0)
        return float((w * (reverse.back(held.z, rng).log_ratio + held.log_p)).sum())

    def _reverse(self, net: Denoiser, rng: Rng, coarse: bool = False) -> Reverse:
        """Calibrated; coarse: every other level, counted from the data."""
        K = self.levels.steps
        kept = sorted({0, *range(K, 0, -2 if coarse and K >= 32 else -1)})
        levels = Levels(self.levels.alpha[kept], self.levels.sigma[kept])
        return Reverse(net, levels, self.rule).calibrated(self.held.z, rng)


def _proper(log_p: Tensor) -> Tensor:
    """NaN is no density, and +inf is for those who draw in earnest to report."""
    return torch.where(log_p < torch.inf, log_p, -torch.inf)
