"""Many-chain MCMC: hundreds of short chains from dispersed starts, adapted across chains, then frozen.

Chains begin at draws of the wide source, eight to a start (superchains: Margossian et al. 2024, Bayesian Analysis, nested
R-hat). `fit` runs the warm-up: step size by dual averaging, an affine map x = m + L z as preconditioner, and, for the default
kernel, the number of leapfrogs by the ChEES criterion on a separate pilot whose draws are not used. `sample` goes on from
where the warm-up ended with everything frozen; given an already fitted sampler it starts anew and settles first.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from boltzsample.draws import Draws
from boltzsample.estimates.stationarity import nested_rhat
from boltzsample.flags import Flag, Severity, flag
from boltzsample.kernels import HMC, RandomWalk
from boltzsample.kernels.adapt import moved
from boltzsample.kernels.chains import Chains
from boltzsample.kernels.langevin import ULA
from boltzsample.kernels.transitions import Path
from boltzsample.maps import Dense, Diagonal
from boltzsample.progress import Progress
from boltzsample.samplers.sampler import Run, Sampler, nan_flags
from boltzsample.samplers.warm_up import PILOT_L, PILOT_SHARE, account, best_leapfrogs, spent, until_stopped, warm_up, why_stop
from boltzsample.target import Target

PILOT_CHAINS = 64
STRIDE = 4  # transitions a compiled graph makes while sampling
WALK_THIN = 16  # steps of a random walk per draw
MIN_DRAWS = 16  # per chain: enough for the tests of stationarity


@dataclass(frozen=True, eq=False)
class MCMC(Sampler):
    """Many chains of one kernel.

    kernel: a kernel of the house, its step size a first guess; None: HMC (a random walk where there is no gradient), with the
    number of leapfrogs chosen in `fit`. chains: per replicate. warmup: adaptation steps per chain. thin: steps per draw kept;
    None: 1, or 16 for a random walk. dense: preconditioner dense or diagonal; None: dense up to 128 dimensions. `fit` fills `map`, the
    preconditioner.

    >>> import boltzsample as bz
    >>> from boltzsample.kernels import HMC
    >>> import torch
    >>> bz.MCMC(kernel=HMC(h=torch.tensor(0.1), L=8), chains=512).chains
    512
    """

    kernel: Any = None
    chains: int = 256
    warmup: int = 200
    thin: int | None = None
    dense: bool | None = None
    map: Diagonal | Dense | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("chains", 1), ("warmup", 0), ("thin", 1)):
            value = getattr(self, name)
            if name == "thin" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; wanted an integer >= {least}")

    def fit(self, target: Target, run: Run, data: Draws | None = None) -> Self:
        """Adapt to the target, from what is fitted already; the copy returned is fitted; the chains go on in `sample`."""
        kernel, first = self._fitted(target, run)
        x = self._starts(target, run, "starts", run.replicates, self.chains)
        with run.progress.phase("warm-up", self.warmup) as bar:
            chains = _chains(target, kernel, first, x, run, "warm-up", self.warmup)
            warm_up(chains, self.warmup, self.dense, run, bar)
        account(run, "warm-up", chains)
        run.handover["positions"] = chains.x
        return replace(self, kernel=chains.kernel, map=chains.map)

    def sample(self, target: Target, n: int, run: Run) -> Draws:
        """At least n draws a replicate, at least 16 a chain; units are the chains, replicate after replicate."""
        kernel, map = self._fitted(target, run)
        starts = self._starts(target, run, "starts", run.replicates, self.chains)
        x, thin = run.handover.get("positions", starts), self._thin(kernel)
        keep, settle = max(-(-n // self.chains), MIN_DRAWS), self.warmup if x is starts else 0
        with run.progress.phase("sampling", settle + keep * thin) as bar:
            chains = _chains(target, kernel, map, x, run, "sampling", settle + keep * thin)
            for path in until_stopped(chains, settle, "settle", run):
                bar.update(acceptance=path.accept_prob.mean)
            chains.forget()
            trace = _Trace.empty(chains, keep)
            try:
                self._record(chains, trace, thin, run, bar)
            except Exception as error:
                error.partial = self._draws(chains, trace, starts, run)  # type: ignore[attr-defined]
                error.add_note(f"boltzsample: stopped after {trace.kept} of {keep} draws a chain; they are in this exception's .partial")
                raise
        if trace.kept == 0:  # stopped before the first kept step: where the chains stand is better than nothing
            trace.add(Path(chains.x[None], chains.log_prob[None], chains.log_prob[None]), 1)
        account(run, "sampling", chains)
        return self._draws(chains, trace, starts, run)

    def _thin(self, kernel: Any) -> int:
        return self.thin or (1 if kernel.price[1] else WALK_THIN)

    def _record(self, chains: Chains, trace: _Trace, thin: int, run: Run, bar: Progress) -> None:
        group = run.starts.groups(self.chains)
        for path in until_stopped(chains, len(trace.x) * thin, "draw", run, stride=STRIDE):
            trace.add(path, thin)
            bar.update(
                len(path.x),
                acceptance=path.accept_prob.mean,
                evaluations=lambda: run.ledger.total + spent(chains),
                stationarity=lambda: trace.rhat(group),
            )

    def _default_kernel(self, target: Target, run: Run) -> Any:
        h = torch.tensor(target.dim**-0.25, dtype=run.backend.dtype, device=run.backend.device)
        if not run.starts.has_gradient:
            return RandomWalk(h=2.4 * target.dim**-0.25 * h)
        hmc = HMC(h=h, L=PILOT_L)
        if self.warmup == 0 or run.must_stop(PILOT_CHAINS * PILOT_L * self.warmup // 2, PILOT_SHARE):
            return hmc
        x = self._starts(target, run, "pilot starts", 1, min(self.chains, PILOT_CHAINS))
        with run.progress.phase("pilot", self.warmup // 2) as bar:
            quiet = replace(run, backend=replace(run.backend, compile=False))  # another L is another graph
            pilot = _chains(target, hmc, run.starts.first_map(run.backend, target.dim), x, quiet, "pilot", self.warmup)
            return replace(hmc, L=best_leapfrogs(pilot, self.warmup // 2, self.dense, run, bar))

    def _starts(self, target: Target, run: Run, name: str, replicates: int, chains: int) -> Tensor:
        x, rows = run.starts.chains(target, run.backend, run.stream.child(name), replicates, chains)
        run.ledger.add("starts", rows)
        return x

    def _fitted(self, target: Target, run: Run) -> tuple[Any, Diagonal | Dense]:
        """Kernel and map as they are, in the run's dtype and on its device. Raises ValueError where they are of other replicates."""
        kernel = self.kernel if self.kernel is not None else self._default_kernel(target, run)
        map = self.map if self.map is not None else run.starts.first_map(run.backend, target.dim)
        fitted = map.m.shape[0] if map.m.ndim == 3 else 1
        if fitted not in (1, run.replicates):
            raise ValueError(
                f"this sampler was fitted on {fitted} replicates and {run.replicates} were asked for; use replicates={fitted}, "
                "or a sampler fitted on one"
            )
        return moved(kernel, run.backend), moved(map, run.backend)

    def _draws(self, chains: Chains, trace: _Trace, starts: Tensor, run: Run) -> Draws:
        x, log_p = trace.units()
        moves = chains.meter.moves
        return Draws(
            x=x,
            log_prob=log_p,
            starts=starts.flatten(0, 1),
            group=run.starts.groups(self.chains).repeat(run.replicates),
            moves=moves.reshape(-1).cpu(),
            bad_x=chains.bad_points(),
            flags=_flags(chains, trace, run),
            acceptance=float(moves.double().mean()) / max(trace.made, 1),
        )


@dataclass
class _Trace:
    """Draws kept so far: x (draws, replicates, chains, dim) and log_p (draws, replicates, chains), of which `kept` are filled."""

    x: Tensor
    log_p: Tensor
    made: int = 0  # transitions
    kept: int = 0

    @staticmethod
    def empty(chains: Chains, draws: int) -> _Trace:
        replicates, n, dim = chains.state.x.shape
        x = torch.empty(draws, replicates, n, dim, dtype=chains.state.x.dtype, device=chains.state.x.device)
        return _Trace(x, x.new_empty(draws, replicates, n))

    def add(self, path: Path, thin: int) -> None:
        """Keep every thin-th point of the path."""
        first = (thin - 1 - self.made) % thin
        self.made += len(path.x)
        x = path.x[first::thin]
        new = slice(self.kept, self.kept + len(x))
        self.x[new], self.log_p[new] = x, path.log_p[first::thin]
        self.kept = new.stop

    def units(self) -> tuple[Tensor, Tensor]:
        """What was kept as (units, draws, dim) and (units, draws), replicate after replicate."""
        x, log_p = self.x[: self.kept].flatten(1, 2), self.log_p[: self.kept].flatten(1, 2)
        return x.transpose(0, 1).contiguous(), log_p.T.contiguous()

    def rhat(self, group: Tensor) -> float:
        """Nested R-hat of log_prob so far in the first replicate: for the progress bar."""
        return float(nested_rhat(self.log_p[: self.kept, 0].T[..., None].double().cpu(), group)[0])


def _chains(target: Target, kernel: Any, map: Any, x: Tensor, run: Run, name: str, steps: int) -> Chains:
    return Chains.start(target, kernel, map, x, run.backend, run.stream.child("mcmc", name), steps)


def _flags(chains: Chains, trace: _Trace, run: Run) -> tuple[Flag, ...]:
    """What the chains themselves have to say: about the density, the kernel, the memory, the budget."""
    made = max(trace.made * chains.state.log_p.numel(), 1)
    nan, diverged = int(chains.meter.nan.sum()), int(chains.meter.divergent.sum())
    flags = [*nan_flags(nan, made, "proposals")]
    if diverged > 0.001 * made:
        flags.append(flag("DIVERGENCES", value=diverged / made, threshold=0.001, detail=f"{diverged} of {made} trajectories"))
    if trace.made and not bool(chains.meter.moves.any()):
        flags.append(flag("STUCK_CHAIN", detail="no proposal of any chain was accepted"))
    if isinstance(chains.kernel, ULA):
        flags.append(flag("UNADJUSTED"))
    if chains.split:
        flags.append(flag("OOM_SPLIT", detail=f"{chains.backend.chunk} lanes at a time"))
    if trace.kept < len(trace.x) and (why := why_stop(chains, run, stride=STRIDE)):
        worse: Severity | None = "untrusted" if trace.kept < MIN_DRAWS else None  # too few for the tests of stationarity
        flags.append(flag(why, severity=worse, detail=f"{trace.kept} of {len(trace.x)} draws a chain"))
    return tuple(flags)
