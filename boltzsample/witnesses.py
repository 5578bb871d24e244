"""Second witnesses: independent looks for mass that the draws may have missed (TRUST.md, the witness rule).

The optimum audit climbs from 256 points that owe nothing to the draws it judges, a scale search of its own and the wide source; and from
cold starts, where all coordinates are equal (as lattice simulations do: in many dimensions no random point is near that line).
An optimum is *required* if the climb converged, its Hessian is negative definite, its Laplace share m of all the masses found (and of
the Z that the draws estimate, where they do) is at least 1e-3 and m n_eff >= 20. It is *visited* if a tenth of m or more of the draws
lie in the .999 ball of its Laplace Gaussian (one stray chain is no visit), or if as many climbs from 256 of the draws end there and it
is no more than the top of their own region; weighted draws must pass twice, as weighted, and with a hundredth of m before they are (one
heavy draw is none either). For the second way its Laplace mass must be small against the Gaussian mass of the draws,
median log p + d/2 + 1/2 log det 2 pi S, or it is a spike that they walk past. A required optimum not visited is WITNESS_CONFLICT. The
audit counts as a witness if at least 64 of the 256 climbs converged, or all that did not fail reached one optimum; otherwise SINGLE_WITNESS
says so. What no climb reaches it cannot see: a narrow mode away from the origin and from that line, with most of the space flat around
it, stays hidden from everybody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from scipy import stats
from torch import Tensor

from boltzsample.ascent import Ascent, ascend
from boltzsample.draws import Draws
from boltzsample.estimates import evidence
from boltzsample.estimates.weighted import even_index
from boltzsample.flags import Flag, flag
from boltzsample.gradcheck import show
from boltzsample.laplace import Laplace
from boltzsample.maps import Dense, Diagonal
from boltzsample.samplers.modes import at, cold_starts, optima
from boltzsample.samplers.sampler import ENOUGH_POWER, Run, Verdict, no_look
from boltzsample.samplers.second_look import both
from boltzsample.samplers.wide_source import search
from boltzsample.target import Target
from boltzsample.views import Pullback

CLIMBS = 256
ROUNDS = 80
MOST_OPTIMA = 64
ENOUGH = 64  # converged climbs that make an audit
SHARE = 1e-3
EXPECTED_DRAWS = 20.0
BALL = 0.999
ENOUGH_VISITS = 0.1  # of an optimum's share
ENOUGH_PROPOSALS = 0.01  # the same for weighted draws before they are weighted
SMALL = 0.1  # Laplace mass against that of the draws
HESSIAN_UP_TO = 500  # dimensions


@dataclass(frozen=True)
class Optimum:
    """An optimum found by the audit, in whitened coordinates z, with its share of the Laplace masses."""

    hill: Laplace
    share: float


def no_audit(why: str, looked: bool = False) -> Verdict:
    """The verdict when nobody looked, or nobody could tell from the look."""
    return replace(no_look(why), looked=looked)


def together(audit: Verdict, own: Verdict) -> Verdict:
    """The audit and a method's own second look. SINGLE_WITNESS of an audit that looked and could not tell is lifted by a look that would
    have seen a fifth of the mass missing (TRUST.md, the witness rule): the two have different blind spots, and neither saw anything."""
    lifted = audit.looked and own.sees is not None and own.sees <= ENOUGH_POWER
    flags = tuple(f for f in audit.flags if not (lifted and f.code == "SINGLE_WITNESS"))
    return both(replace(audit, flags=flags), own)


def optimum_audit(target: Target, replicates: list[Draws], map: Diagonal | Dense | None, run: Run) -> list[Verdict]:
    """Audit the draws of each replicate against the optima that 256 wide climbs reach; one verdict a replicate.

    `map` x = m + L z sets the units of the climb. One set of climbs serves all replicates.
    """
    if (why := _why_not(target, run)) is not None:
        return [no_audit(why)] * len(replicates)
    units = _units(map if map is not None else run.starts.first_map(run.backend, target.dim))
    view = Pullback(target, units)
    with run.progress.phase("optimum audit", 1) as bar:
        points, cold = _points(target, run, units)
        climbs = _climb(view, torch.cat([points, cold]), run)
        optima, group = _optima(view, climbs, run)
        n = len(points)  # cold starts, the same ones in every run, are no witnesses
        own = Ascent(climbs.x[:n], climbs.log_p[:n], climbs.grad[:n], climbs.converged[:n], climbs.rows)
        verdicts = [_judge(view, own, optima, group[:n], draws, units, run) for draws in replicates]
        bar.update(1, evaluations=run.ledger.total)
    return verdicts


def _units(map: Diagonal | Dense) -> Diagonal | Dense:
    """The map of the first replicate, without its axis of replicates."""
    if isinstance(map, Diagonal):
        return map if map.m.ndim == 1 else Diagonal(map.m[0, 0], map.s[0, 0])
    return map if map.m.ndim == 1 else Dense(map.m[0, 0], map.L[0])


def _why_not(target: Target, run: Run) -> str | None:
    """Why there can be no audit, in words."""
    if not run.starts.has_gradient:
        return "the optimum audit needs a gradient"
    if target.dim > HESSIAN_UP_TO:
        return f"the optimum audit ends at {HESSIAN_UP_TO} dimensions"
    if run.starts.base is None:
        return "no wide source to climb from: the budget was too small for the search, or it found nothing"
    if (why := replace(run, reserve=0).must_stop(CLIMBS * ROUNDS // 2)) is None:
        return None
    return "the run was interrupted before the optimum audit" if why == "INTERRUPTED" else "no budget was left for the optimum audit"


def _points(target: Target, run: Run, units: Diagonal | Dense) -> tuple[Tensor, Tensor]:
    """CLIMBS points in z: a scale search with a stream of its own, then draws of the wide base; and the user's modes. Cold starts."""
    assert run.starts.base is not None
    found, rows = search(target, run.backend, run.stream.child("audit"))
    cold, more = cold_starts(target, found)
    run.ledger.add("witness", (rows + more, 0))
    x = run.starts.base.sample(run.stream.child("audit").rng(run.backend.dtype, run.backend.device), CLIMBS - len(found))
    points = [found, x] if run.starts.modes is None else [run.starts.modes, found, x]
    return units.pull(torch.cat(points)), units.pull(cold)


def _climb(view: Pullback, z: Tensor, run: Run) -> Ascent:
    climbs = ascend(view, z, reach=(0.1 * z.norm(dim=-1)).clamp(min=1.0), rounds=ROUNDS)
    run.ledger.add("witness", (0, climbs.rows))
    return climbs


def _optima(view: Pullback, climbs: Ascent, run: Run) -> tuple[list[Optimum], Tensor]:
    """The distinct optima reached and each climb's optimum (n,), -1 for none: a climb that tired reached none."""
    seen = optima(view, climbs, MOST_OPTIMA)
    run.ledger.add("witness", (0, seen.rows))
    share = torch.softmax(torch.tensor([h.log_mass for h in seen.hills], dtype=torch.float64), 0)
    return [Optimum(h, float(s)) for h, s in zip(seen.hills, share, strict=True)], seen.reached


def _judge(
    view: Pullback, climbs: Ascent, optima: list[Optimum], group: Tensor, draws: Draws, units: Diagonal | Dense, run: Run
) -> Verdict:
    converged = int((group >= 0).sum())
    required = [o for o in _shared(optima, draws) if o.share >= SHARE and o.share * draws.log_prob.numel() >= EXPECTED_DRAWS]
    missed = _missed(view, required, evenly_weighted(draws), ENOUGH_VISITS, units, run)
    if draws.log_weight is not None and not missed:  # a few heavy draws in a mode are not enough to weigh it
        missed = _missed(view, required, draws, ENOUGH_PROPOSALS, units, run)
    if missed:
        return Verdict(tuple(_conflict(o, units, len(optima)) for o in missed[:3]))
    one = len(optima) == 1 and bool((group[climbs.log_p.isfinite()] == 0).all())
    if converged < ENOUGH and not one:
        return no_audit(f"only {converged} of {len(climbs.x)} wide climbs converged", looked=True)
    if len(optima) == MOST_OPTIMA:
        return no_audit(f"the optimum audit found {MOST_OPTIMA} optima and stopped counting", looked=True)
    plural = "optimum" if len(optima) == 1 else "optima"
    return Verdict((), f"optimum audit: {len(optima)} {plural} from {len(climbs.x)} wide starts, none missed")


def _shared(optima: list[Optimum], draws: Draws) -> list[Optimum]:
    """The optima with no larger shares than what they hold of the Z that the draws estimate: the climbs may have found a few of
    very many. Draws that miss mass estimate Z too low, and these shares come out too large, never too small."""
    log_z = float(evidence.log_z(draws).value)
    if not math.isfinite(log_z):
        return optima
    return [replace(o, share=min(o.share, math.exp(min(o.hill.log_mass - log_z, 0.0)))) for o in optima]


def _missed(view: Pullback, required: list[Optimum], draws: Draws, enough: float, units: Diagonal | Dense, run: Run) -> list[Optimum]:
    """Those of the optima that these draws, taken evenly, have not visited: `enough` times the optimum's share is a visit."""
    z = units.pull(draws.x.reshape(-1, draws.x.shape[-1]))
    missed = [o for o in required if _in_ball(o.hill, z) < enough * o.share]
    if not missed:
        return []
    own = _climb(view, z[torch.linspace(0, len(z) - 1, min(CLIMBS, len(z))).long()], run)
    mass = _gaussian_log_mass(z, draws.log_prob.reshape(-1) + units.log_det)
    return [o for o in missed if _ends_at(own, o) < enough * o.share or o.hill.log_mass > mass + math.log(SMALL)]


def evenly_weighted(draws: Draws) -> Draws:
    """Weighted draws as draws of equal weight; others as they are."""
    if draws.log_weight is None or not bool(draws.log_weight.max().isfinite()):
        return draws
    index = even_index(draws.log_weight.flatten())
    return replace(draws, x=draws.x.flatten(0, 1)[index][:, None], log_prob=draws.log_prob.flatten()[index][:, None], log_weight=None)


def _in_ball(hill: Laplace, z: Tensor) -> float:
    """The share of the draws in the hill's ball."""
    return float((hill.radius2(z) <= float(stats.chi2.ppf(BALL, z.shape[-1]))).double().mean())


def _ends_at(own: Ascent, optimum: Optimum) -> float:
    """The share of the climbs that end at the optimum."""
    return float((at(own.x, optimum.hill) & own.converged).double().mean())


def _gaussian_log_mass(z: Tensor, log_p: Tensor) -> float:
    """log of the mass of a Gaussian with the covariance of the draws z (n, dim) whose typical log_prob is theirs."""
    dim = z.shape[-1]
    cov = torch.cov(z.double().T).reshape(dim, dim) * 2 * math.pi
    return float(log_p.double().median()) + 0.5 * dim + 0.5 * float(torch.linalg.slogdet(cov)[1])


def _conflict(optimum: Optimum, units: Diagonal | Dense, found: int) -> Flag:
    where = show(units.push(optimum.hill.x)[0], digits=4)
    detail = f"optimum audit: no draw near the optimum x = {where}, one of {found}, Laplace share {optimum.share:.3g}"
    return flag("WITNESS_CONFLICT", value=optimum.share, threshold=SHARE, detail=detail)
