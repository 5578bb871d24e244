"""auto: explore, fit, and let pilots choose what estimates.

    1. A mixture is fitted to the modes that a tempered exploration, wide climbs and cold starts found (samplers/mixture_is.py). If fresh
       draws say that its weights are fit for error bars, it is the method: independent draws, log Z, masses of modes whatever their
       distance.
    2. Otherwise, or in many dimensions, and where there is one mode only, chains are tried. If those from dispersed starts
       agree, they are the method, and the mixture becomes the far end of a bridge to log Z. If they do not agree, weights that bear a
       look are taken after all.
    3. Otherwise a flow is trained: by reverse KL where there is one mode, by forward KL on the particles of an SMC run where there are
       many. Its weighted draws if their weights bear it, chains in its latent space if not.

Without a gradient: SMC by random walks. Of a density that seems improper: chains, and no log Z. Whatever was chosen is told in the
run's notes, and `result.sampler.chosen` is it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch

from boltzsample.draws import Draws
from boltzsample.estimates.expectation import expectation
from boltzsample.flags import Status, flag
from boltzsample.flows.base import DefensiveBase
from boltzsample.flows.families import make_flow
from boltzsample.flows.flow import Flow
from boltzsample.flows.train import Training, train
from boltzsample.maps import Diagonal
from boltzsample.samplers.bridged import BridgedMCMC
from boltzsample.samplers.explore import Explorer
from boltzsample.samplers.flow_is import FlowIS
from boltzsample.samplers.latent import LatentMCMC
from boltzsample.samplers.mcmc import MCMC
from boltzsample.samplers.mixture_is import FORGOTTEN, MixtureIS
from boltzsample.samplers.refine import Draw, pilot
from boltzsample.samplers.sampler import Run, Sampler, Verdict
from boltzsample.samplers.smc import SMC
from boltzsample.target import Target

JUDGED = 4000  # draws of the last pilot; a quarter where the budget has no more


class Grade(NamedTuple):
    """What the weights of a proposal must show: ESS per draw at least, k-hat at most."""

    ess: float
    khat: float

    def fits(self, judged: Draw) -> bool:
        return judged.ess >= self.ess and judged.khat <= self.khat


QUIET = Grade(0.75, 0.2)  # better than chains even where there is one mode
COVERED_UP_TO, LIGHT = 16, 0.9  # dimensions; beyond, the wide part hardly ever meets the target, and no pilot sees how large weights are
GOOD = Grade(0.25, 0.3)  # fit for error bars
FAIR, POOR = Grade(0.1, 0.45), Grade(0.1, 0.7)  # where chains are no way out: with one mode, among several
CLOSE = Grade(0.5, 1.0)  # among several modes: a flow would take millions of evaluations to do better
TRIAL = 16  # draws a chain
TRIAL_COST = 2_000_000  # evaluations, warm-up included: chains that need more are no bargain beside a flow


class Choice(NamedTuple):
    """What auto chose: the fitted sampler, how to make it anew for replicates, and why."""

    sampler: Sampler
    anew: Sampler
    why: str


@dataclass(frozen=True, eq=False)
class Auto(Sampler):
    """The default method: see the module. `fit` fills `chosen`.

    >>> import torch, boltzsample as bz
    >>> two = bz.from_log_prob(lambda x: torch.logaddexp(-(x - 9).square().sum(-1), 0.7 - (x + 9).square().sum(-1)), dim=2)
    >>> type(bz.sample(two, seed=0).sampler.chosen).__name__
    'MixtureIS'
    """

    log_z: ClassVar[bool] = True
    chosen: Sampler | None = None

    @property
    def map(self) -> Any:
        """The units of what was chosen, where it has any: the optimum audit climbs in them."""
        return getattr(self.chosen, "map", None)

    def fit(self, target: Target, run: Run, data: Draws | None = None) -> Self:
        """Choose, on one replicate; several are then fitted anew, each for itself."""
        alone = run if run.replicates == 1 else replace(run, replicates=1, stream=run.stream.child("auto"), handover={})
        choice = _choose(target, alone)
        run.notes.append(flag("AUTO", detail=choice.why))
        return replace(self, chosen=choice.sampler if run.replicates == 1 else choice.anew.fit(target, run))

    def sample(self, target: Target, n: int, run: Run) -> Draws:
        """What the chosen method draws. Raises ValueError where nothing is fitted."""
        return self._fitted.sample(target, n, run)

    def second_look(self, target: Target, replicates: list[Draws], run: Run) -> list[Verdict]:
        """The chosen method's own."""
        return self._fitted.second_look(target, replicates, run)

    @property
    def _fitted(self) -> Sampler:
        if self.chosen is None:
            raise ValueError("auto has chosen nothing yet; leave fit=True")
        return self.chosen


def _choose(target: Target, run: Run) -> Choice:
    if not run.starts.has_gradient:
        walks = SMC()
        return Choice(walks.fit(target, run), walks, "smc by random walks: the density has no gradient")
    if any(f.code == "IMPROPER_SUSPECTED" for f in run.notes):
        brief = MCMC(warmup=40)
        return Choice(brief.fit(target, run), brief, "mcmc: the density seems to have no finite integral, so there is no log Z")
    mixture = MixtureIS().fit(target, run)
    rng = run.stream.child("judge").rng(run.backend.dtype, run.backend.device)
    judged = pilot(target, mixture.mixtures[0], _judges(run), rng, run)
    weighted = Choice(mixture, MixtureIS(), f"mixture-is: {_said(judged)} of {judged.proposal.components} components")
    one, whole = mixture.found[0] <= 1, mixture.forgotten[0] <= FORGOTTEN
    fit = whole and (QUIET if one else GOOD).fits(judged)
    if fit and (not one or target.dim <= COVERED_UP_TO or judged.ess >= LIGHT):
        return weighted
    if one and (chains := _agreeing(target, run, clean=fit)) is not None:
        bridged = BridgedMCMC(mixture.mixtures[0], chains)
        return Choice(bridged, replace(bridged, mcmc=MCMC()), f"mcmc: one mode, chains agree; the mixture's {_said(judged)}")
    if fit or (whole and (FAIR.fits(_worse(judged, *mixture.pilots[0])) if one else POOR.fits(judged) or CLOSE.fits(judged))):
        return weighted
    return _with_flow(target, run, mixture, judged)


def _judges(run: Run) -> int:
    return JUDGED if run.must_stop(JUDGED) is None else JUDGED // 4


def _agreeing(target: Target, run: Run, clean: bool) -> MCMC | None:
    """Fitted chains, if a few draws of them from dispersed starts give no reason not to trust them, or, `clean`, nothing to say at all, and
    they were made at the price."""
    limit = run.ledger.total + TRIAL_COST
    capped = replace(run.budget, evaluations=min(limit, run.budget.evaluations or limit))
    own = replace(run, budget=capped, notes=[])
    fitted = MCMC().fit(target, own)
    trial = fitted.sample(target, TRIAL * fitted.chains, own)
    found = (*own.notes, *trial.flags, *expectation(trial.x, trial).flags)
    worst = Status.CAUTION if clean else Status.UNTRUSTED
    bad = [f for f in found if f.status.rank >= worst.rank or f.code in ("DIVERGENCES", "STOPPED_EARLY")]
    return None if bad else fitted


def _with_flow(target: Target, run: Run, mixture: MixtureIS, judged: Draw) -> Choice:
    """The better of a flow and the mixture by their weights, or chains in the flow's latent space where neither's bear it."""
    one = mixture.found[0] <= 1
    plain = FlowIS() if one else FlowOnDraws()
    trained = plain.fit(target, run)
    rng = run.stream.child("judge flow").rng(run.backend.dtype, run.backend.device)
    seen = pilot(target, trained.flows[0], _judges(run), rng, run)
    why = f"the flow's {_said(seen)}; the mixture's {_said(judged)}"
    whole = mixture.forgotten[0] <= FORGOTTEN
    if GOOD.fits(seen) or (not one and (seen.score >= judged.score or not whole)):
        return Choice(trained, plain, f"flow-is: {why}")
    if not one:
        return Choice(mixture, MixtureIS(), f"mixture-is: {why}")
    latent: Sampler = LatentMCMC(flow=trained.flows[0])
    return Choice(latent.fit(target, run), LatentMCMC(), f"latent-mcmc: {why}")


@dataclass(frozen=True, eq=False)
class FlowOnDraws(FlowIS):
    """flow-is, its flow trained by forward KL on particles of an SMC run: reverse KL would lose modes."""

    flow: Flow | str | None = "spline-coupling"
    training: Training = field(default_factory=lambda: Training(steps=600, rounds=1))
    explorer: Explorer = field(default_factory=lambda: Explorer(particles=16_384, L=5, rounds=4))

    def fit(self, target: Target, run: Run, data: Draws | None = None) -> Self:
        """Explored and trained once a replicate."""
        flows = []
        for r in range(run.replicates):
            own = replace(run.part(r), replicates=1, stream=run.stream.child("on draws", r))
            x = self.explorer(target, own).x
            scale = Diagonal(x.mean(0), x.std(0).clamp(min=1e-12))
            rng = own.stream.child("init").rng(run.backend.dtype, run.backend.device)
            flow = make_flow(str(self.flow), target.dim, rng, base=DefensiveBase(target.dim), whitening=scale)
            known = Draws.from_arrays(x, torch.zeros(len(x), dtype=x.dtype, device=x.device))
            flows.append(train(flow, target, own, self.training, data=known).flow)
        return replace(self, flows=tuple(flows))


def _worse(judged: Draw, ess: float, khat: float) -> Draw:
    """By the worse of two pilots: of a funnel's mixture the second said ESS 33%, k-hat .42, the fit's own 3% and .50."""
    return judged._replace(ess=min(judged.ess, ess), khat=max(judged.khat, khat))


def _said(judged: Draw) -> str:
    return f"pilot ESS {judged.ess:.0%}, k-hat {judged.khat:.2f}"
