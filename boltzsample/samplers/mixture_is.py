"""mixture-is: find the modes, run chains in every one of them, fit a mixture, weigh its draws.

    explore   a small SMC up from the wide base, climbs from its particles, from the wide base, from the user's modes and from cold
              starts: the optima they end at are the modes (modes.py)
    fit       local chains in every mode at once, a Gaussian for each from draws and scores (local.py)
    improve   a few rounds of adaptive importance sampling, in which components are born where the mixture is thin; all of them a little
              wider, where the weights have a tail (refine.py); a tenth of it fitted to the tempered target, where modes bend
              (tempered_part.py)
    weigh     fresh draws of the frozen mixture, log w = log p - log q: self-normalized means, log Z = log mean w

At last the mixture is held against the exploration: where it is thin at many of the points explored, there are more modes than it has
components for (FORGOTTEN_MASS). Masses of modes come from the weights, never from how many chains or particles were where: those are
only starts (RECIPES.md, advice 3 and 10). Every mode keeps a share of the draws, however small it is, so that ratios can be read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from boltzsample.ascent import ascend
from boltzsample.draws import Draws, Estimate
from boltzsample.errors import NoGradient
from boltzsample.estimates.evidence import log_z
from boltzsample.flags import flag
from boltzsample.laplace import Laplace
from boltzsample.maps import Dense, Diagonal
from boltzsample.mixture import DefensiveMixture
from boltzsample.samplers.explore import Explored, Explorer
from boltzsample.samplers.frozen_smc import Annealed
from boltzsample.samplers.local import gaussians, local_chains
from boltzsample.samplers.modes import cold_starts, optima
from boltzsample.samplers.refine import Draw, finished, floored, pilot
from boltzsample.samplers.sampler import Run, Sampler, Verdict
from boltzsample.samplers.second_look import against
from boltzsample.samplers.tempered_part import with_tempered_part
from boltzsample.samplers.weighing import affordable, weighted_draws
from boltzsample.target import Target
from boltzsample.views import Pullback

CLIMBS = 384
ROUNDS = 80
MOST_MODES = 64
PILOT = 1000
MOST_DRAWS = 5  # for one asked for
POWER = 0.05  # standard error of a log Z that sees a fifth of the mass missing, with room for the draws' own
FORGOTTEN = 0.05  # of the explored points: more say that modes are missing
NEGLIGIBLE = 30.0  # nats of Laplace mass below the largest


@dataclass(frozen=True, eq=False)
class MixtureIS(Sampler):
    """Weighted draws of a mixture fitted to the modes that were found. modes: the most that are fitted. For each replicate `fit` fills
    `mixtures`, `pilots` (ESS and k-hat), `found` (how many optima there were), `forgotten` (the share of explored points that the mixture
    is too thin at) and `explored` (the way of the exploration).

    >>> import boltzsample as bz
    >>> two = bz.from_log_prob(lambda x: torch.logaddexp(-(x - 9).square().sum(-1), 0.7 - (x + 9).square().sum(-1)), dim=2)
    >>> result = bz.sample(two, bz.MixtureIS(), seed=0)
    >>> result.probability(lambda x: x[..., 0] > 0)               # 1 / (1 + e^.7) = .332
    0.3... +- 0.0... (95%, ok)
    """

    log_z: ClassVar[bool] = True
    modes: int = MOST_MODES
    mixtures: tuple[DefensiveMixture, ...] = ()
    explorer: Explorer = field(default_factory=Explorer)
    pilots: tuple[tuple[float, float], ...] = ()
    found: tuple[int, ...] = ()
    forgotten: tuple[float, ...] = ()
    explored: tuple[Explored, ...] = field(default=(), repr=False)

    def fit(self, target: Target, run: Run, data: Draws | None = None) -> Self:
        """A mixture for each replicate, one after another. Raises NoGradient."""
        if not run.starts.has_gradient:
            raise NoGradient("mixture-is climbs to the modes by the gradient, and this density has none; use smc or mcmc")
        found = [self._fitted(target, replace(run, stream=run.stream.child("mixture", r))) for r in range(run.replicates)]
        units = run.starts.first_map(run.backend, target.dim)
        done, modes, forgotten, explored = zip(*found, strict=True)
        mixtures, pilots = tuple(d.proposal.pushed(units) for d in done), tuple((d.ess, d.khat) for d in done)
        return replace(self, mixtures=mixtures, pilots=pilots, found=modes, forgotten=forgotten, explored=explored)

    def sample(self, target: Target, n: int, run: Run) -> Draws:
        """Independent weighted draws, so many that n of them are effective by the pilot, up to five times n.

        Raises ValueError where nothing is fitted.
        """
        if len(self.mixtures) not in (1, run.replicates) or not self.mixtures:
            raise ValueError(f"this sampler has {len(self.mixtures)} mixtures for {run.replicates} replicates; leave fit=True")
        n, flags = affordable(self._enough(n), None, run)
        if max(self.forgotten, default=0.0) > FORGOTTEN:
            flags += [flag("FORGOTTEN_MASS", value=max(self.forgotten), threshold=FORGOTTEN)]
        own = [self.mixtures[r % len(self.mixtures)] for r in range(run.replicates)]
        return weighted_draws(target, own, n, "mixture-is", run, flags)

    def second_look(self, target: Target, replicates: list[Draws], run: Run) -> list[Verdict]:
        """log Z against another SMC run up the explorer's ladder, where that can be had precise enough to see a fifth of the mass missing.
        Where it cannot, the optimum audit has the word alone."""
        verdicts = []
        for r, draws in enumerate(replicates):
            own = replace(run, stream=run.stream.child("second look", r))
            seen = self.explored[r % len(self.explored)] if self.explored else None
            smc = None if seen is None else self.explorer.again(target, seen, POWER, own)
            verdicts.append(compared(log_z(draws), smc, run.starts.modes is not None, 0.0 if seen is None else seen.blind))
        return verdicts

    def _enough(self, n: int) -> int:
        least = min((ess for ess, _ in self.pilots), default=1.0)
        return math.ceil(n / max(least, 1 / MOST_DRAWS))

    def _fitted(self, target: Target, run: Run) -> tuple[Draw, int, float, Explored]:
        """A mixture in the units of the starts, by its last pilot; how many optima there were; the share of explored points forgotten; the
        exploration, without its points."""
        units = run.starts.first_map(run.backend, target.dim)
        seen = self.explorer(target, run)
        view, pool = Pullback(target, units), units.pull(seen.x)
        hills, member, blind = _modes(view, units, pool, self.modes, run)
        local = local_chains(view, hills, pool, member, run)
        rng, k = run.stream.child("pilot").rng(run.backend.dtype, run.backend.device), len(local.z)
        equal = torch.full((k,), -math.log(k), dtype=torch.float64, device=pool.device)
        tried = [pilot(view, DefensiveMixture(equal, m, L), max(PILOT, 50 * k), rng, run) for m, L in gaussians(local).values()]
        best = max(tried, key=lambda d: d.score)
        first = pilot(view, _weighed(best), len(best.z), rng, run)
        done = finished(view, max(first, best, key=lambda d: d.score), k, run.stream.child("refine"), run)
        log_p = view.log_prob(pool).double()
        run.ledger.add("pilot", (len(pool), 0))
        if seen.ladder is not None:  # else the pool is what the search for starts reached, not draws of the target
            done = with_tempered_part(view, done, k, pool, log_p, run.stream.child("tempered part"), run)
        return done, len(hills), _forgotten(pool, log_p, done), seen._replace(x=seen.x[:0], blind=blind)


def compared(estimate: Estimate, smc: Annealed | None, told: bool, blind: float = 0.0) -> Verdict:
    """What the second run says. told: the user named modes, which a run from the wide base need not have found: less than the draws have is
    then no conflict. blind: the share of the mass in modes that cold starts alone led to: so much may be missing."""
    if smc is None or not math.isfinite(smc.stderr):
        return Verdict()
    verdict = against(estimate, smc, "from the wide base")
    if not verdict.flags or not smc.log_z < float(estimate.value):
        return verdict
    if told:
        return Verdict((), f"SMC from the wide base: log Z {smc.log_z:.3f}, less than the draws have with the modes given")
    lacks = -math.log1p(-min(blind, 1 - 1e-12))
    if against(replace(estimate, value=estimate.value - lacks), smc).flags:
        return verdict
    said = f"without the {blind:.0%} that climbs from cold starts found"
    return Verdict((), f"SMC from the wide base: log Z {smc.log_z:.3f}, as it has to be {said}")


def _weighed(first: Draw) -> Any:
    """The same components with the shares that the weights say."""
    if not bool(first.log_w.max().isfinite()):
        return first.proposal
    mass = (first.proposal.responsibilities(first.z) * torch.softmax(first.log_w, 0)[:, None]).sum(0)
    return floored(first.proposal.reshared(mass.clamp(min=1e-12)), first.proposal.components)


def _modes(view: Pullback, units: Diagonal | Dense, pool: Tensor, most: int, run: Run) -> tuple[list[Laplace], Tensor, float]:
    """The optima, up to `most`, that climbs from the pool (n, dim), the wide base, the user's modes and cold starts end at; the one that
    each point of the pool belongs to (n,), -1 for those that did not climb; the share of the mass in those that only cold starts found."""
    base, rng = run.starts.base, run.stream.child("climbs").rng(run.backend.dtype, run.backend.device)
    chosen = torch.linspace(0, len(pool) - 1, min(len(pool), CLIMBS // 2), device=pool.device).long()
    parts = [pool[chosen]] + ([] if base is None else [units.pull(base.sample(rng, CLIMBS - len(chosen)))])
    if run.starts.modes is not None:
        parts.append(units.pull(run.starts.modes))
    cold, asked = cold_starts(view.target, pool)
    cold = units.pull(cold)
    z = torch.cat([*parts, cold])
    with run.progress.phase("climbs", 1):
        climbs = ascend(view, z, reach=(0.1 * z.norm(dim=-1)).clamp(min=1.0), rounds=ROUNDS)
        seen = optima(view, climbs, most)
    run.ledger.add("climbs", (asked, climbs.rows + seen.rows))
    top = max((hill.log_mass for hill in seen.hills), default=0.0)
    kept = [k for k, hill in enumerate(seen.hills) if hill.log_mass > top - NEGLIGIBLE]
    number = torch.full((len(seen.hills) + 1,), -1, device=pool.device)
    number[kept] = torch.arange(len(kept), device=pool.device)
    member = torch.full((len(pool),), -1, device=pool.device)
    member[chosen] = number[seen.reached[: len(chosen)]]
    hills = [seen.hills[k] for k in kept]
    return hills, _near(hills, pool, member), _unknown(hills, pool, number[seen.reached[: len(z) - len(cold)]])


def _unknown(hills: list[Laplace], pool: Tensor, warm: Tensor) -> float:
    """The share of Laplace's masses in hills that hold no point of the pool (n, dim), and that none of the `warm` climbs ended at."""
    far = [not bool((warm == k).any() | (hill.radius2(pool) < 4 * pool.shape[-1]).any()) for k, hill in enumerate(hills)]
    share = torch.softmax(torch.tensor([hill.log_mass for hill in hills], dtype=torch.float64), 0)
    return float(share[torch.tensor(far, dtype=torch.bool)].sum())


def _near(hills: list[Laplace], pool: Tensor, member: Tensor) -> Tensor:
    """member (n,), and -1 where a climb leapt: where a point of the pool (n, dim) is more than twice as far from the optimum that it
    reached as from another, by their curvatures. Chains started there would say of the other mode what they should say of this one."""
    if len(hills) < 2:
        return member
    far = torch.stack([hill.radius2(pool).double() for hill in hills], 1)  # (n, modes)
    own = far.gather(1, member.clamp(min=0)[:, None])[:, 0]
    return torch.where(own > 4 * far.amin(1), -1, member)


def _forgotten(pool: Tensor, log_p: Tensor, done: Draw) -> float:
    """The share of the pool (n, dim), log p (n,) there, at which the mixture has less than a twentieth of the density, by its own log Z."""
    log_z = done.log_w.logsumexp(0) - math.log(len(done.z))
    return float((log_p - done.proposal.log_prob(pool) - log_z > math.log(20)).double().mean())
