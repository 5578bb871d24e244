"""The default flow: affine, chosen by a short counted pilot on the ELBO and its error bar.

    couplings   8 affine couplings (RealNVP), path gradient, whitened by Laplace's approximation, by the points that the search for
                starts reached, or not at all: three pilots
    iaf         one affine autoregressive layer, plain gradient, in units of those points, each coordinate for itself: a rotation
                would undo what an order of cause and effect is worth to it

Laplace's units are the best there are for a posterior near a Gaussian, and useless on a funnel, whose only optimum lies forty
standard deviations down its neck: so each may lose. A pilot is a short training; the autoregressive one has nine times the steps, which
takes as long on a density that costs nothing. The highest ELBO wins. Where bars overlap it is the autoregressive
layer, a tenth of the price, and else the lightest tail of the weights (k-hat), on which the error bars will rest. Training goes on
from the winner's parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from boltzsample.ascent import ascend
from boltzsample.flows.base import Base
from boltzsample.flows.families import make_flow
from boltzsample.flows.flow import Flow
from boltzsample.flows.look import Look
from boltzsample.flows.train import Training, train
from boltzsample.laplace import laplace
from boltzsample.maps import Dense, Diagonal
from boltzsample.samplers.sampler import Run
from boltzsample.target import Target

PILOT = Training(steps=150, rounds=1, look=2048, share=0.25)
LONGER = 3  # the pilot of the autoregressive layer
CLIMBERS, CLIMB = 32, 200
LAPLACE_UP_TO = 200  # dimensions: a Hessian costs 2 dim gradients
Whitening = Diagonal | Dense | None


class Pilot(NamedTuple):
    """A candidate after its pilot."""

    name: str
    flow: Flow
    look: Look


@dataclass(frozen=True, eq=False)
class Chosen:
    """The winner and all pilots, in the order in which they ran."""

    flow: Flow
    name: str
    pilots: tuple[Pilot, ...]


def choose(target: Target, run: Run, *, base: Base | None = None, pilot: Training = PILOT) -> Chosen:
    """The default flow for this target, as its pilot left it; evaluations are entered under "pilot".

    Raises NoGradient.
    """
    pilots: list[Pilot] = []
    for name, whitening in _whitenings(target, run):
        pilots.append(_pilot("realnvp", name, whitening, target, run, base, pilot))
        if run.must_stop(share=pilot.share):
            break
    if not run.must_stop(share=pilot.share):
        units, longer = _diagonal(run.starts.first_map(run.backend, target.dim)), replace(pilot, steps=LONGER * pilot.steps)
        pilots.append(_pilot("affine-iaf", "scaled by points", units, target, run, base, longer))
    best = _best(pilots)
    return Chosen(best.flow, best.name, tuple(pilots))


def _pilot(family: str, units: str, whitening: Whitening, target: Target, run: Run, base: Base | None, pilot: Training) -> Pilot:
    backend, name = run.backend, f"{family}, {units}"
    rng = run.stream.child("flow", family, units).rng(backend.dtype, backend.device)
    flow = make_flow(family, target.dim, rng, base=base, whitening=whitening)
    trained = train(flow, target, replace(run, stream=run.stream.child(name)), pilot, name="pilot")
    return Pilot(name, trained.flow, trained.looks[-1])


def _best(pilots: list[Pilot]) -> Pilot:
    """Of those whose ELBO is not below the highest by more than their error bars: the cheaper family, then the lightest tail."""
    top = max(pilots, key=lambda p: p.look.elbo).look
    close = [p for p in pilots if not p.look.elbo < top.elbo - 2 * math.hypot(p.look.stderr, top.stderr)]
    return min(close, key=lambda p: (p.name.startswith("realnvp"), p.look.khat))


def _whitenings(target: Target, run: Run) -> Iterator[tuple[str, Whitening]]:
    hill = laplace_map(target, run)
    if hill is not None:
        yield "whitened by Laplace", hill
    yield "whitened by points", run.starts.first_map(run.backend, target.dim)
    yield "not whitened", None


def _diagonal(units: Diagonal | Dense) -> Diagonal:
    """The same location and the same scale of each coordinate, without the rotation."""
    return units if isinstance(units, Diagonal) else Diagonal(units.m, units.L.square().sum(-1).sqrt())


def laplace_map(target: Target, run: Run) -> Dense | None:
    """x = x* + L z, L L^T the covariance of Laplace's approximation at the best optimum; None where there is none to be had.

    The climb and the Hessian are entered in the ledger under "pilot".
    """
    points = run.starts.reached if run.starts.reached is not None else run.starts.given
    if points is None or target.dim > LAPLACE_UP_TO or not run.starts.has_gradient:
        return None
    some = points[torch.linspace(0, len(points) - 1, min(CLIMBERS, len(points))).long().to(points.device)]
    climb = ascend(target, some, reach=0.1 * some.norm(dim=-1).clamp(min=1e-6), rounds=CLIMB)
    top = climb.log_p.argmax()
    scale = points.std(0).clamp(min=1e-12) if len(points) > 1 else climb.x[top].abs() + 1
    hill, rows = laplace(target, climb.x[top], climb.log_p[top], scale)
    run.ledger.add("pilot", (0, climb.rows + rows))
    if not hill.proper:
        return None
    L, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(hill.C.double()))
    return None if bool(bad) else Dense(hill.x, L.to(hill.x))
