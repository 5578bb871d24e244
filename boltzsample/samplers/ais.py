"""ais: annealed importance sampling along a frozen ladder, forwards for weighted draws of the target, backwards for an upper side of log Z.

A path starts at a draw of the base, x_0 ~ p_0, and moves up, x_k ~ T_k(x_(k-1)), T_k leaving pi_k = p_0^(1-b_k) p^(b_k) invariant:

    log w = sum_k (b_k - b_(k-1)) log (p / p_0)(x_(k-1)),        E w = Z,      (Neal 2001, Stat. Comput. 11, equation 11)

so that (x_K, w) is a weighted draw, and every path a unit. From a draw of the target, x_K ~ p, the same moves (which are reversible)
backwards give E 1/w = 1/Z: a stochastic upper bound, as good as those draws are (Grosse, Ghahramani & Adams 2015, arXiv:1511.02543).
The ladder is made as for SMC; without resampling it has to be much finer, so `cess` is closer to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from boltzsample.backend import Backend, make_backend
from boltzsample.draws import Draws
from boltzsample.errors import ShapeError
from boltzsample.flags import Flag, flag
from boltzsample.kernels.adapt import moved
from boltzsample.samplers.annealing import climb, descend
from boltzsample.samplers.cloud import Cloud, Shape
from boltzsample.samplers.sampler import Run, nan_flags
from boltzsample.samplers.smc import Annealing, bad_points, groups, stranded
from boltzsample.samplers.warm_up import account, spent
from boltzsample.streams import root
from boltzsample.target import Target


@dataclass(frozen=True, eq=False)
class AIS(Annealing):
    """Annealed importance sampling: n independent paths a replicate. ensembles, particles: of the pass that makes the ladder.

    >>> import boltzsample as bz
    >>> target = bz.from_log_prob(lambda x: -0.5 * (x**2).sum(-1), dim=2)
    >>> bz.sample(target, AIS(), n=1_000, seed=0).log_z()         # log 2 pi = 1.8379
    1.8... +- 0.0... (95%, ...)
    """

    guess: ClassVar[int] = 120
    moves: int = 1
    cess: float = 0.99

    def sample(self, target: Target, n: int, run: Run) -> Draws:
        """At least n paths a replicate; every path is a unit, replicate after replicate."""
        if self.ladder is None and "unfinished" in run.handover:
            return stranded(run.handover["unfinished"], target, run)
        base, ladder = self._ready(run)
        each = self._affordable(-(-n // self.ensembles), target, run, ladder, 0)
        flags: list[Flag] = []
        if each * self.ensembles < n:
            flags.append(flag("STOPPED_EARLY", detail=f"{each * self.ensembles} of {n} draws"))
        clouds = []
        with run.progress.phase("sampling", len(ladder.beta)) as bar:
            for first, size in groups(run.replicates, self.ensembles * each * target.dim):
                cloud = self._cloud(target, base, Shape(size, self.ensembles, each), run, "draws", first)
                why = climb(cloud, ladder.of_replicates(slice(first, first + size)), run.must_stop, resample=False, bar=bar)
                if why is not None:
                    flags.append(flag(why, severity="untrusted", detail=f"level {cloud.level} of {len(ladder.beta)}"))
                account(run, "sampling", cloud.chains)
                clouds.append(cloud)
        return _paths(clouds, flags)


def _paths(clouds: list[Cloud], flags: list[Flag]) -> Draws:
    reached = torch.cat([(c.beta >= 1).expand(-1, c.chains.log_prob.shape[1]).flatten() for c in clouds])
    log_w = torch.cat([c.log_w.flatten() for c in clouds])
    asked = sum(c.chains.rows + c.chains.inits for c in clouds)
    return Draws(
        torch.cat([c.chains.x.flatten(0, 1) for c in clouds])[:, None],
        torch.where(reached, torch.cat([c.chains.log_prob.flatten() for c in clouds]), torch.nan)[:, None],
        torch.where(reached, log_w, torch.nan)[:, None],
        bad_x=bad_points(clouds),
        flags=tuple(dict.fromkeys((*flags, *nan_flags(sum(c.nan for c in clouds), asked, "points")))),
        scope="given this ladder",
        acceptance=sum(c.accepted for c in clouds) / len(clouds),
    )


def reverse_ais(
    target: Target, sampler: AIS, x: Any, *, seed: int | None = None, gradient: bool = True, device: Any = None, dtype: Any = None
) -> Draws:
    """Paths from draws of the target x (units, draws, dim), or (n, dim) for independent ones, down the ladder of a fitted sampler to its
    base: weighted by 1 / w, so `bz.result(draws).log_z()` estimates -log Z, conditional on the draws that were handed in.

    Units stay units: chains in, chains out. gradient: False for a density that has none.

    Raises ShapeError, ValueError (no ladder, or that of several replicates).

    >>> import boltzsample as bz
    >>> target = bz.from_log_prob(lambda x: -0.5 * (x**2).sum(-1), dim=1)
    >>> forward = bz.sample(target, AIS(), n=1_000, seed=0)
    >>> exact = torch.randn(1_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> down = reverse_ais(target, forward.sampler, exact, seed=1)
    >>> round(float(down.log_weight.logsumexp(0) - torch.tensor(1000.0).log()), 1)        # -log sqrt(2 pi) = -.9189
    -0.9
    """
    backend: Backend = make_backend(device, dtype, False)
    if sampler.ladder is None or sampler.base is None or sampler.ladder.replicates != 1:
        raise ValueError("reverse_ais needs a sampler fitted on one replicate: result.sampler of bz.sample(target, AIS())")
    x = torch.as_tensor(x).detach().to(backend.device, backend.dtype)
    if x.ndim not in (2, 3) or x.shape[-1] != target.dim or 0 in x.shape:
        raise ShapeError(f"x has shape {tuple(x.shape)}; wanted (units, draws, {target.dim}), or (n, {target.dim}) for independent draws")
    units, kernel_and_moves = x if x.ndim == 3 else x[:, None], sampler.kernel(target.dim, gradient)
    with torch.no_grad():
        base, ladder = moved(sampler.base, backend), moved(sampler.ladder, backend)
        shape = Shape(1, 1, units.shape[0] * units.shape[1])
        start = units.reshape(1, -1, target.dim)
        cloud = Cloud.at(start, target, base, *kernel_and_moves, shape, backend, root(seed).child("reverse"))
        descend(cloud, ladder)
    log_p = base.log_prob(cloud.chains.x)
    return Draws(
        cloud.chains.x.reshape(units.shape),
        log_p.reshape(units.shape[:2]),
        cloud.log_w.reshape(units.shape[:2]),
        flags=nan_flags(cloud.nan, cloud.chains.rows + cloud.chains.inits, "points"),
        ledger={"reverse": (0, spent(cloud.chains)) if gradient else (spent(cloud.chains), 0)},
        scope="conditional on the draws",
    )
