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
from boltzsample.flags import Flag, flag
from boltzsample.kernels import HMC, RandomWalk
from boltzsample.kernels.chains import Chains, Path
from boltzsample.kernels.langevin import ULA
from boltzsample.maps import Dense, Diagonal
from boltzsample.progress import Progress
from boltzsample.samplers.sampler import Run, Sampler
from boltzsample.samplers.warm_up import PILOT_L, account, best_leapfrogs, spent, until_stopped, warm_up, why_stop
from boltzsample.target import Target

PILOT_CHAINS = 64
STRIDE = 4  # transitions a compiled graph makes while sampling
MIN_DRAWS = 16  # per chain: enough for the tests of stationarity


@dataclass(frozen=True, eq=False)
class MCMC(Sampler):
    """Many chains of one kernel.

    kernel: a kernel of the house, its step size a first guess; None: HMC (a random walk where there is no gradient), with the
    number of leapfrogs chosen in `fit`. chains: per replicate. warmup: adaptation steps per chain. thin: steps per draw kept.
    dense: preconditioner dense or diagonal; None: dense up to 128 dimensions. `fit` fills `map` (the preconditioner) and
    `positions` (where the warm-up ended).

    >>> import boltzsample as bz
    >>> from boltzsample.kernels import HMC
    >>> import torch
    >>> bz.MCMC(kernel=HMC(h=torch.tensor(0.1), L=8), chains=512).chains
    512
    """

    kernel: Any = None
    chains: int = 256
    warmup: int = 200
    thin: int = 1
    dense: bool | None = None
    map: Diagonal | Dense | None = field(default=None, repr=False)
    positions: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("chains", 1), ("warmup", 0), ("thin", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; wanted an integer >= {least}")

    def fit(self, target: Target, run: Run, data: Draws | None = None) -> Self:
        """Adapt to the target; the copy returned is fitted and knows where its chains stand."""
        kernel = self.kernel if self.kernel is not None else self._default_kernel(target, run)
        x = self._starts(target, run, "starts", run.replicates, self.chains)
        first = run.starts.first_map(run.backend, target.dim)
        with run.progress.phase("warm-up", self.warmup) as bar:
            chains = _chains(target, kernel, first, x, run, "warm-up", self.warmup)
            warm_up(chains, self.warmup, self.dense, run, bar)
        account(run, "warm-up", chains)
        return replace(self, kernel=chains.kernel, map=chains.map, positions=chains.x)

    def sample(self, target: Target, n: int, run: Run) -> Draws:
        """At least n draws a replicate, at least 16 a chain; units are the chains, replicate after replicate."""
        kernel, map = self._fitted(target, run)
        starts = self._starts(target, run, "starts", run.replicates, self.chains)
        keep = max(-(-n // self.chains), MIN_DRAWS)
        going_on = self.positions is not None and self.positions.shape[:2] == starts.shape[:2]
        settle = 0 if going_on else self.warmup
        x = self.positions if going_on and self.positions is not None else starts
        with run.progress.phase("sampling", settle + keep * self.thin) as bar:
            chains = _chains(target, kernel, map, x, run, "sampling", settle + keep * self.thin)
            for path in until_stopped(chains, settle, "settle", run):
                bar.update(acceptance=path.accept_prob.mean)
            chains.forget()
            trace = _Trace.empty(chains, keep)
            try:
                self._record(chains, trace, run, bar)
            except Exception as error:
                error.partial = self._draws(chains, trace, starts, run)  # type: ignore[attr-defined]
                error.add_note(f"boltzsample: stopped after {trace.kept} of {keep} draws a chain; they are in this exception's .partial")
                raise
        account(run, "sampling", chains)
        return self._draws(chains, trace, starts, run)

    def _record(self, chains: Chains, trace: _Trace, run: Run, bar: Progress) -> None:
        group = run.starts.groups(self.chains)
        for path in until_stopped(chains, len(trace.x) * self.thin, "draw", run, stride=STRIDE):
            trace.add(path, chains.map, self.thin)
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
        if self.warmup == 0:
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
        kernel = self.kernel if self.kernel is not None else self._default_kernel(target, run)
        return kernel, self.map if self.map is not None else run.starts.first_map(run.backend, target.dim)

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

    def add(self, path: Path, map: Diagonal | Dense, thin: int) -> None:
        """Keep every thin-th point of the path, in x."""
        first = (thin - 1 - self.made) % thin
        self.made += len(path.x)
        z, log_p = path.x[first::thin], path.log_p[first::thin]
        new = slice(self.kept, self.kept + len(z))
        self.x[new], log_det = map.push(z)
        self.log_p[new] = log_p - log_det
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
    flags = []
    made = max(trace.made * chains.state.log_p.numel(), 1)
    nan, diverged = int(chains.meter.nan.sum()), int(chains.meter.divergent.sum())
    if nan:
        share = nan / made
        severity: Any = "untrusted" if share > 0.01 else "caution" if share > 0.001 else "info"
        flags.append(flag("NAN_EVAL", value=share, threshold=0.001, severity=severity, detail=f"{nan} of {made} proposals"))
    if diverged > 0.001 * made:
        flags.append(flag("DIVERGENCES", value=diverged / made, threshold=0.001, detail=f"{diverged} of {made} trajectories"))
    if isinstance(chains.kernel, ULA):
        flags.append(flag("UNADJUSTED"))
    if chains.split:
        flags.append(flag("OOM_SPLIT", detail=f"{chains.backend.chunk} lanes at a time"))
    if trace.kept < len(trace.x) and (why := why_stop(chains, run, stride=STRIDE)):
        flags.append(flag(why, detail=f"{trace.kept} of {len(trace.x)} draws a chain"))
    return tuple(flags)
