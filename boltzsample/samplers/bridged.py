"""Chains, with log Z by bridge sampling between them and a mixture that was fitted to other draws (estimates/bridge.py)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from boltzsample.draws import Draws, Estimate
from boltzsample.estimates.bridge import bridge
from boltzsample.mixture import DefensiveMixture
from boltzsample.samplers.mcmc import MCMC
from boltzsample.samplers.sampler import Run, Sampler
from boltzsample.target import Target

BRIDGE_DRAWS = 4000


@dataclass(frozen=True, eq=False)
class BridgedMCMC(Sampler):
    """mcmc: the chains; mixture: the other end of the bridge, fitted before and to other draws than these chains'."""

    mixture: DefensiveMixture
    mcmc: MCMC = field(default_factory=MCMC)
    log_z: ClassVar[bool] = True

    @property
    def map(self) -> Any:
        """The chains' preconditioner."""
        return self.mcmc.map

    def fit(self, target: Target, run: Run, data: Draws | None = None) -> Self:
        """The chains adapted; the mixture stays as it is."""
        return replace(self, mcmc=self.mcmc.fit(target, run, data))

    def sample(self, target: Target, n: int, run: Run) -> Draws:
        """The chains' draws, with an estimate of log Z for each replicate."""
        draws = self.mcmc.sample(target, n, run)
        units = len(draws.x) // run.replicates
        return replace(draws, evidence=tuple(self._bridge(target, draws, r, units, run) for r in range(run.replicates)))

    def _bridge(self, target: Target, draws: Draws, r: int, units: int, run: Run) -> Estimate:
        own = slice(r * units, (r + 1) * units)
        rng = run.stream.child("bridge", r).rng(run.backend.dtype, run.backend.device)
        x, log_q, _ = self.mixture.sample_and_log_prob(BRIDGE_DRAWS, rng)
        run.ledger.add("log Z", (len(x), 0))
        fresh = target.log_prob(x).double() - log_q
        at_draws = self.mixture.log_prob(draws.x[own].flatten(0, 1)).reshape(units, -1)
        group = None if draws.group is None else draws.group[own]
        return bridge(draws.log_prob[own].double() - at_draws, fresh, group)
