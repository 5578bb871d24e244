"""latent-mcmc: chains in the latent space of a flow trained on the target, pushed forward: x = T(z).

The density of z is q(z) = pi(T(z)) |det J_T(z)|, close to N(0, I) where the flow is good (Parno & Marzouk 2018, SIAM/ASA J. Uncertain.
Quantif. 6(2); Hoffman et al. 2019, arXiv:1903.03704). A transition is one of the local kernel, adapted across chains, and one
independence move z' ~ .9 N(0, I) + .1 N(0, 1.5^2 I): local moves alone get stuck where the flow is poor, independence moves alone
where it is too thin (Gabrie, Rotskoff & Vanden-Eijnden 2022, PNAS 119(10); Samsonov et al. 2022).

Chains start at sampling-importance-resampling draws of the defensive base, eight to a draw: starts dispersed in x and pulled back
lie sixty standard deviations out in z and shrink the common step to nothing (RECIPES.md, rows B). Training and adaptation end before
the first draw is kept. log Z is by bridge sampling between the chains and fresh draws of the base, both in z: no inverse is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from boltzsample.backend import Backend
from boltzsample.draws import Draws, Estimate
from boltzsample.errors import InitFailed, PositiveInfinityError
from boltzsample.estimates.bridge import bridge
from boltzsample.flags import flag
from boltzsample.flows.base import DefensiveBase
from boltzsample.flows.flow import Flow
from boltzsample.kernels import HMC, Independent, LocalThenIndependent
from boltzsample.maps import Diagonal
from boltzsample.samplers.mcmc import MCMC
from boltzsample.samplers.sampler import Run, Verdict
from boltzsample.samplers.starts import Starts
from boltzsample.samplers.with_flow import WithFlow, range_flag
from boltzsample.streams import Stream
from boltzsample.target import Target
from boltzsample.views import Pullback

T = TypeVar("T")
POOL = 4096  # draws of the base that starts are resampled from
POOL_SHARE, LEAST_POOL = 20, 256  # at most one in twenty of what a budget leaves: pools are drawn up to three times
BRIDGE_DRAWS = 4000
LEAST_BRIDGE = 200


@dataclass(frozen=True, eq=False)
class LatentMCMC(WithFlow):
    """Chains in a flow's latent space. mcmc: the chains (how many, warm-up, kernel); independent: the move after each local one, or
    None for local moves alone. `fit` fills `flows` and `fitted`, the adapted chains of each replicate.

    >>> import boltzsample as bz
    >>> from boltzsample.flows.train import Training
    >>> target = bz.from_log_prob(lambda x: -0.5 * (x**2).sum(-1), dim=2)
    >>> quick = bz.LatentMCMC("realnvp", Training(steps=20, rounds=1), mcmc=bz.MCMC(chains=64, warmup=40))
    >>> bz.sample(target, quick, n=1_000, seed=0).expectation(lambda x: x[..., 0] ** 2)
    0.9... +- 0.0... (95%, ...)
    """

    mcmc: MCMC = field(default_factory=lambda: MCMC(warmup=100))
    independent: Independent | None = field(default_factory=Independent)
    fitted: tuple[MCMC, ...] = ()

    def fit(self, target: Target, run: Run, data: Draws | None = None) -> Self:
        """Flows trained, then chains adapted in the latent space of each."""
        flows = self.trained(target, run, data)
        fitted = []
        for r, flow in enumerate(flows):
            own = _latent_run(run.part(r), r)
            fitted.append(_in_x(flow, partial(self.mcmc.fit, Pullback(target, flow), own)))
            run.handover[f"positions {r}"] = own.handover["positions"]
        return replace(self, flows=flows, fitted=tuple(fitted))

    def sample(self, target: Target, n: int, run: Run) -> Draws:
        """At least n draws a replicate; units are the chains, replicate after replicate."""
        flows = self.ready(target, run)
        parts, evidence = [], []
        for r, flow in enumerate(flows):
            own = _latent_run(run.part(r), r)
            kept = _for_bridge(own)
            if f"positions {r}" in run.handover:
                own.handover["positions"] = run.handover[f"positions {r}"]
            latent = Pullback(target, flow)
            chains = _in_x(flow, partial(self._production(r, target.dim, own).sample, latent, n, replace(own, reserve=own.reserve + kept)))
            evidence.append(self._bridge(latent, flow, chains, own))
            parts.append(_in_range(flow, _pushed(flow, chains)))
        return replace(_together(parts), evidence=tuple(evidence))

    def second_look(self, target: Target, replicates: list[Draws], run: Run) -> list[Verdict]:
        """log Z by bridge sampling against SMC in the latent space, and the flow itself against an exploration in x."""
        return self.looked(target, replicates, [draws.evidence[0] for draws in replicates], run)

    def _production(self, r: int, dim: int, run: Run) -> MCMC:
        """The adapted chains of replicate r, with independence moves where they are wanted and the kernel has a gradient."""
        fitted = self.fitted[r % len(self.fitted)] if self.fitted else self.mcmc
        local = fitted.kernel
        if local is None and run.starts.has_gradient:
            local = _unadapted(dim, run)
        if self.independent is None or local is None or local.price[1] == 0:
            return fitted
        return replace(fitted, kernel=LocalThenIndependent(local, self.independent))

    def _bridge(self, latent: Target, flow: Flow, chains: Draws, run: Run) -> Estimate:
        base = DefensiveBase(latent.dim) if not isinstance(flow.base, DefensiveBase) else flow.base
        n, rng = _for_bridge(run, 1), run.stream.child("bridge").rng(run.backend.dtype, run.backend.device)
        if n < LEAST_BRIDGE:
            return _no_bridge()
        z = base.sample(rng, n)
        run.ledger.add("log Z", (len(z), 0))
        fresh = latent.log_prob(z).double() - base.log_prob(z).double()
        return bridge(chains.log_prob.double() - base.log_prob(chains.x).double(), fresh, chains.group)


@dataclass(frozen=True, eq=False)
class LatentStarts(Starts):
    """Starts in the latent space: sampling-importance-resampling from `pool` draws of the defensive base; unit scale as the first map."""

    pool: int = POOL

    def first_map(self, backend: Backend, dim: int) -> Diagonal:
        zero = torch.zeros(dim, dtype=backend.dtype, device=backend.device)
        return Diagonal(zero, torch.ones_like(zero))

    def chains(self, target: Target, backend: Backend, stream: Stream, replicates: int, chains: int) -> tuple[Tensor, tuple[int, int]]:
        """Starting points (replicates, chains, dim), eight chains to a point; `pool` log_prob each replicate."""
        group, base = self.groups(chains).to(backend.device), DefensiveBase(target.dim)
        x = []
        for r in range(replicates):
            rng = stream.child("sir", r).rng(backend.dtype, backend.device)
            z = base.sample(rng, max(self.pool, int(group.max()) + 1))
            log_w = target.log_prob(z).double() - base.log_prob(z).double()
            log_w = torch.where(log_w < torch.inf, log_w, -torch.inf)  # NaN and +inf are no places to start
            if not bool(log_w.max() > -torch.inf):
                found = f"log_prob was -inf or NaN at all {len(z)} draws of the flow's base"
                raise InitFailed(f"{found}; train it longer, or give starts= inside the support", len(z))
            noise = -(-rng.uniform(len(z)).double().log()).log()  # the Gumbel trick, without replacement: the k largest
            x.append(z[(log_w + noise).topk(int(group.max()) + 1).indices][group])
        return torch.stack(x), (len(z) * replicates, 0)


def _latent_run(run: Run, r: int) -> Run:
    """The run of one replicate in the latent space: one replicate, a stream and starts of its own."""
    pool = max(min(POOL, _left(run) // POOL_SHARE), LEAST_POOL)
    starts = LatentStarts(None, has_gradient=run.starts.has_gradient, pool=pool)
    return replace(run, starts=starts, stream=run.stream.child("latent", r), replicates=1, handover={})


def _left(run: Run) -> int:
    """Evaluations that the budget leaves for this run, before its witness."""
    limit = run.budget.evaluations
    return 10**12 if limit is None else max(limit - run.reserve - run.ledger.total, 0)


def _for_bridge(run: Run, share: int = 10) -> int:
    """How many draws of the base to bridge with: one in `share` of what is left at most."""
    return min(BRIDGE_DRAWS, _left(run) // share)


def _no_bridge() -> Estimate:
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    why = flag("NO_ERROR_BAR", detail="the budget left no evaluations for bridge sampling")
    return Estimate(nan, nan, nan, torch.stack([nan, nan]), nan, "bridge sampling", (), (why,))


def _unadapted(dim: int, run: Run) -> HMC:
    """HMC for chains that were never adapted: the step of N(0, I), which a good flow's latent space resembles, a quarter turn a move."""
    h = dim**-0.25
    return HMC(h=torch.tensor(h, dtype=run.backend.dtype, device=run.backend.device), L=max(1, round(0.5 * torch.pi / h)))


def _in_x(flow: Flow, work: Callable[[], T]) -> T:
    """work() in the latent space; what its errors carry, partial draws and bad points, brought to x."""
    try:
        return work()
    except PositiveInfinityError as error:
        told = error if error.x is None else PositiveInfinityError.at(_push(flow, error.x)[0])
        drawn = getattr(error, "partial", None)
        told.partial = None if drawn is None else _pushed(flow, drawn)  # type: ignore[attr-defined]
        raise told from error
    except Exception as error:
        if isinstance(drawn := getattr(error, "partial", None), Draws):
            error.partial = _pushed(flow, drawn)  # type: ignore[attr-defined]
        raise


def _pushed(flow: Flow, chains: Draws) -> Draws:
    """Draws in z as draws in x."""
    x, log_det = _push(flow, chains.x)
    starts = None if chains.starts is None else _push(flow, chains.starts)[0]
    bad_x = None if chains.bad_x is None or not len(chains.bad_x) else _push(flow, chains.bad_x)[0]
    return replace(chains, x=x, log_prob=chains.log_prob - log_det, starts=starts, bad_x=bad_x, scope="given this proposal")


def _in_range(flow: Flow, chains: Draws) -> Draws:
    """The draws, with OUT_OF_RANGE where a flow of splines does not reach as far as they do."""
    x = chains.x.reshape(-1, chains.x.shape[-1])
    x = x[:: max(1, len(x) // POOL)]
    return replace(chains, flags=(*chains.flags, *range_flag(flow, x, x.new_zeros(len(x)))))


def _push(flow: Flow, z: Tensor) -> tuple[Tensor, Tensor]:
    x, log_det = flow.push(z.reshape(-1, z.shape[-1]))
    return x.reshape(z.shape), log_det.reshape(z.shape[:-1])


def _together(parts: list[Draws]) -> Draws:
    """The draws of all replicates, one after another; as many a chain as the shortest has, where a budget ended early."""
    if len(parts) == 1:
        return parts[0]
    least = min(p.x.shape[1] for p in parts)
    parts = [replace(p, x=p.x[:, :least], log_prob=p.log_prob[:, :least]) for p in parts]

    def cat(name: str) -> Any:
        own = [getattr(p, name) for p in parts if getattr(p, name) is not None]
        return torch.cat(own) if own else None

    fields = {name: cat(name) for name in ("x", "log_prob", "starts", "group", "moves", "bad_x")}
    acceptance = sum(p.acceptance or 0.0 for p in parts) / len(parts)
    return replace(parts[0], **fields, flags=tuple(dict.fromkeys(f for p in parts for f in p.flags)), acceptance=acceptance)
