"""Annealing: clouds of particles carried from a base p_0 up a ladder of densities to a target p.

At each level particles are weighted, resampled multinomially inside their own ensemble (SMC) or not at all (AIS), and moved by a kernel
that leaves pi_k = p_0^(1-b_k) p^(b_k) invariant, in the level's whitened coordinates, after a scale move about its mean
(kernels/scaling.py). With v_k = (p / p_0)^(b_k - b_(k-1)),

    SMC: log Zhat = sum_k log mean_i v_k(x_i),        AIS: log w_i = sum_k log v_k(x_i),       E Zhat = E w = Z

(Del Moral, Doucet & Jasra 2006, JRSS B 68(3); Neal 2001, Stat. Comput. 11, equation 11). `adapt` makes the ladder on the way up;
`climb` goes up a frozen one with fresh noise, and only what it returns is reported: the first one's log Zhat is biased, by +12 nats on
a hundred-dimensional chain (RECIPES.md, advice 1). With a frozen ladder Zhat is unbiased, and its relative variance is estimated
from one run of N particles by

    V = 1 - (N / (N - 1))^(t + 1) (1 - sum_k S_k^2)                          (Lee & Whiteley 2018, Biometrika 105(3)),

where t counts the resamplings so far and S_k is the share of the final weight that descends from particle k of the start, an Eve.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from boltzsample.kernels import HMC
from boltzsample.maps import Diagonal
from boltzsample.progress import Progress
from boltzsample.samplers.cloud import Cloud, Known, Shape, annealing_kernel, longest, unit_map
from boltzsample.samplers.ladder import Ladder, Rung, next_beta, whitening
from boltzsample.samplers.warm_up import spent
from boltzsample.views import Tempered

__all__ = ["Cloud", "Shape", "adapt", "annealing_kernel", "climb", "descend"]

MOST_LEVELS = 500

Stop = Callable[[int], str | None]  # why not spend so many more evaluations


def adapt(cloud: Cloud, cess: float, stop: Stop, bar: Progress | None = None) -> Ladder | None:
    """Climb, and make the ladder on the way; None where the target was not reached."""
    rungs: list[Rung] = []
    h = torch.full_like(cloud.beta, (1.0 if isinstance(cloud.kernel, HMC) else 2.4 * cloud.target.dim**-0.25) * cloud.target.dim**-0.25)
    h = h.clamp(max=longest(cloud.kernel))
    map: Any = None
    while len(rungs) < MOST_LEVELS and bool((cloud.beta < 1).any()) and not stop(spent(cloud.chains) + cloud.price):
        ratio = cloud.look()
        if not bool((ratio > -torch.inf).any()):
            return None
        beta = next_beta(ratio, cloud.beta.double(), cess).to(cloud.beta)
        beta = torch.maximum(beta, torch.nextafter(cloud.beta, torch.ones_like(beta)))  # float32 must not stand still
        cloud.weigh(ratio, beta)
        map = _whitened(cloud, beta) or map or unit_map(cloud.chains.state.x, len(beta))
        rungs.append(Rung(beta, h, map))
        h = cloud.move(rungs[-1], tune=True)
        rungs[-1] = rungs[-1]._replace(h=h)
        _show(bar, cloud)
    return None if bool((cloud.beta < 1).any()) else Ladder.of(rungs)


def climb(cloud: Cloud, ladder: Ladder, stop: Stop, resample: bool = True, bar: Progress | None = None) -> str | None:
    """Climb a frozen ladder; why it was left early, if it was."""
    for rung in ladder.rungs():
        why = stop(spent(cloud.chains) + cloud.price)
        if why is not None:
            return why
        cloud.weigh(cloud.look(), rung.beta, resample)
        cloud.move(rung)
        _show(bar, cloud)
    return None


def descend(cloud: Cloud, ladder: Ladder) -> None:
    """Take particles of the target down a frozen ladder to the base: log_w becomes minus that of the way up."""
    rungs = list(ladder.rungs())
    cloud.look()
    cloud.beta = rungs[-1].beta
    for k in range(len(rungs) - 1, -1, -1):
        cloud.move(rungs[k], back=True)
        cloud.weigh(cloud.look(), rungs[k - 1].beta if k else torch.zeros_like(cloud.beta), resample=False)


def _show(bar: Progress | None, cloud: Cloud) -> None:
    if bar is not None:
        bar.update(1, acceptance=cloud.accepted, evaluations=lambda: spent(cloud.chains))


def _whitened(cloud: Cloud, beta: Tensor) -> Any:
    state = cloud.chains.state
    if not hasattr(state, "grad"):
        map = whitening(state.x, None)
    else:
        score = Tempered(Known(state, cloud.target.dim), beta, cloud.base).grad_log_prob(state.x)
        map = whitening(state.x, score)
    if map is None:
        return None
    if isinstance(map, Diagonal):
        return Diagonal(map.m.to(state.x), map.s.to(state.x))
    return type(map)(map.m.to(state.x), map.L.to(state.x))
