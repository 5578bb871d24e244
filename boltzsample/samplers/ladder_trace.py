"""What is kept of replica exchange, and what it says: log Z, and the flags of the ladders themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from boltzsample.draws import Draws, Estimate
from boltzsample.estimates.bennett import ladder_log_z
from boltzsample.estimates.expectation import expectation
from boltzsample.flags import Flag, Severity, flag
from boltzsample.samplers.replicas import Replicas
from boltzsample.samplers.sampler import nan_flags

MIN_DRAWS = 16  # per ladder: enough for the tests of stationarity
FEW_TRIPS: tuple[tuple[float, Severity], ...] = ((1.0, "untrusted"), (3.0, "caution"))  # per ladder
LEAST_SWAPS = 0.05


@dataclass
class Trace:
    """What is kept: x (draws, replicates, ladders, dim) and log_p of the coldest level; s (rounds, replicates, levels, ladders) of all
    rounds; the sum of all swap probabilities."""

    x: Tensor
    log_p: Tensor
    s: Tensor
    swap: Tensor
    thin: int
    made: int = 0
    kept: int = 0

    @staticmethod
    def empty(replicas: Replicas, draws: int, thin: int) -> Trace:
        replicates, levels, ladders = replicas.fresh.shape
        x = replicas.chains.state.x.new_empty(draws, replicates, ladders, replicas.target.dim)
        s = x.new_empty(draws * thin, replicates, levels + 1, ladders, dtype=torch.float64)
        return Trace(x, x.new_empty(x.shape[:-1]), s, torch.zeros_like(s[0, :, 1:]), thin)

    def add(self, x: Tensor, log_p: Tensor, s: Tensor, swap: Tensor) -> None:
        """One round."""
        self.s[self.made], self.swap, self.made = s, self.swap + swap, self.made + 1
        if self.made % self.thin == 0:
            self.keep(x, log_p)

    def keep(self, x: Tensor, log_p: Tensor) -> None:
        self.x[self.kept], self.log_p[self.kept], self.kept = x, log_p, self.kept + 1

    def units(self) -> tuple[Tensor, Tensor]:
        """What was kept as (units, draws, dim) and (units, draws), replicate after replicate."""
        x, log_p = self.x[: self.kept].flatten(1, 2), self.log_p[: self.kept].flatten(1, 2)
        return x.transpose(0, 1).contiguous(), log_p.T.contiguous()


def evidence(replicas: Replicas, trace: Trace, group: Tensor) -> tuple[Estimate, ...]:
    """log Z of each replicate: the bridges' sum, its bar from the influence of each ladder on it, its flags those of that influence."""
    s, beta = trace.s[: trace.made].cpu(), replicas.rungs.beta.double().cpu()
    if trace.made == 0:
        return ()
    swap = (trace.swap / trace.made).mean(-1).cpu()  # (replicates, K)
    found = []
    for r in range(len(beta)):
        log_z, psi = ladder_log_z(s[:, r : r + 1], beta[r : r + 1])
        own = expectation(psi[0], Draws(psi[0][..., None], psi[0], group=group))
        flags = own.flags
        if float(swap[r].min()) < LEAST_SWAPS:
            k = int(swap[r].argmin())
            flags += (flag("NO_OVERLAP", value=float(swap[r, k]), threshold=LEAST_SWAPS, detail=f"swap rate of levels {k} and {k + 1}"),)
        method = f"bridges between {beta.shape[1]} temperatures, {own.method.replace('chains', 'ladders')}"
        found.append(replace(own, value=own.value + log_z[0], interval=own.interval + log_z[0], method=method, flags=flags))
    return tuple(found)


def ladder_flags(replicas: Replicas, trace: Trace, sweeps: int) -> tuple[Flag, ...]:
    """What the ladders themselves have to say: about the density, the kernel, their round trips, the memory, the budget."""
    chains, coldest = replicas.chains, replicas.fresh.shape[1] * torch.arange(1, len(replicas.fresh) + 1) - 1
    asked = max(trace.made * (sweeps * chains.state.log_p.numel() + replicas.trips.numel()), 1)
    cold = max(trace.made * sweeps * replicas.trips.numel(), 1)
    diverged = int(chains.meter.divergent[coldest].sum())  # the hot levels are on cliffs all the time
    flags = [*nan_flags(int(chains.meter.nan.sum()) + replicas.nan, asked, "points"), *_trip_flags(replicas, trace)]
    if diverged > 0.001 * cold:
        flags.append(flag("DIVERGENCES", value=diverged / cold, threshold=0.001, detail=f"{diverged} of {cold} trajectories"))
    if trace.made and not bool(chains.meter.moves[coldest].any()):
        flags.append(flag("STUCK_CHAIN", detail="no proposal of any ladder was accepted at the target"))
    if chains.split:
        flags.append(flag("OOM_SPLIT", detail=f"{chains.backend.chunk} lanes at a time"))
    if trace.kept < len(trace.x) and (why := replicas.why_stop(sweeps)):
        worse: Severity | None = "untrusted" if trace.kept < MIN_DRAWS else None  # too few for the tests of stationarity
        flags.append(flag(why, severity=worse, detail=f"{trace.kept} of {len(trace.x)} draws a ladder"))
    return tuple(flags)


def _trip_flags(replicas: Replicas, trace: Trace) -> list[Flag]:
    trips = float(replicas.trips.double().mean())
    for least, severity in FEW_TRIPS:
        if trips < least:
            detail = f"{trips:.2g} a ladder in {trace.made} rounds of {replicas.rungs.levels + 1} temperatures"
            return [flag("FEW_ROUND_TRIPS", value=trips, threshold=least, severity=severity, detail=detail)]
    return []
