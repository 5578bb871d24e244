"""flow-is: a flow trained on the target by reverse KL, and importance weights that make its draws right.

    x = T(z),  z ~ .9 N(0, I) + .1 t_5,      log w = log p(x) - log base(z) + log|det J_T(z)|

Draws and weights come from one pass, self-normalized estimates and log Z = log mean w with their bars from estimates/weighted.py
and evidence.py. A flow that collapsed onto one of two far modes has perfect weights: the optimum audit, an SMC run in the latent
space, from a widened N(0, s^2 I), and one in x (gaps.py) look for what the weights cannot see. Noe, Olsson, Kohler & Wu (2019),
Science 365(6457), equations 5 and 12; Muller et al. (2019), ACM TOG 38(5).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from boltzsample.draws import Draws
from boltzsample.estimates.evidence import log_z
from boltzsample.samplers.sampler import Run, Verdict
from boltzsample.samplers.weighing import affordable, round_up, weighted_draws
from boltzsample.samplers.with_flow import WithFlow, range_flag
from boltzsample.target import Target


@dataclass(frozen=True, eq=False)
class FlowIS(WithFlow):
    """Weighted draws of a flow trained on the target. Settings: see WithFlow.

    >>> import boltzsample as bz
    >>> from boltzsample.flows.train import Training
    >>> target = bz.from_log_prob(lambda x: -0.5 * (x**2).sum(-1), dim=2)
    >>> quick = bz.FlowIS("realnvp", Training(steps=20, rounds=1))
    >>> bz.sample(target, quick, n=1_000, seed=0).log_z()         # log 2 pi = 1.8379
    1.83... +- 0.0... (95%, ...)
    """

    def fit(self, target: Target, run: Run, data: Draws | None = None) -> Self:
        """The copy returned holds a trained flow for each replicate; `data`: draws to begin by maximum likelihood on."""
        return replace(self, flows=self.trained(target, run, data))

    def sample(self, target: Target, n: int, run: Run) -> Draws:
        """n draws a replicate, rounded up to whole tens; every draw is a unit."""
        flows = self.ready(target, run)
        n, flags = affordable(round_up(n, flows[0].base), flows[0].base, run)
        draws = weighted_draws(target, flows, n, "flow-is", run, flags)
        assert draws.log_weight is not None
        each = zip(flows, draws.x[:, 0].chunk(len(flows)), draws.log_weight[:, 0].chunk(len(flows)), strict=True)
        more = [f for flow, x, log_w in each for f in range_flag(flow, x, log_w)]
        return replace(draws, flags=tuple(dict.fromkeys((*draws.flags, *more))))

    def second_look(self, target: Target, replicates: list[Draws], run: Run) -> list[Verdict]:
        """log Z against SMC in the latent space of the flow, and the flow itself against an exploration in x."""
        return self.looked(target, replicates, [log_z(draws) for draws in replicates], run)
