"""Which moments f has, by what the density and f are like far out, and not by draws that may have missed it.

Where the mass beyond falls like r^-nu and f grows like r^m, or like e^(-nu z) and e^(m z), P(|f| > t) ~ t^-a with the tail index
a = nu / m: there is no mean where a <= 1, no variance where a <= 2, and no third moment where a <= 3. The last alone leaves a central
limit theorem, slow to come (Hall 1992, The Bootstrap and Edgeworth Expansion, section 2.4: errors of order skewness / sqrt(n) where
there is a skewness): a run that saw no excursion has a low mean and a short bar. Of 95% intervals for E x^2 of a Student t_5 (a = 2.5)
from n independent draws 90, 93, 94 and 95% hold the truth for n = 300, 1,000, 3,000 and 10,000, and of a t_4.2 (a = 2.1) 90, 92, 93,
94 and 94% for n = 1,000 to 100,000. Where both tails are alike, as those of x, they hold. Flags that look at the draws (k-hat) pick the
runs that did see an excursion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from boltzsample.estimates.columns import Columns, located
from boltzsample.flags import Flag

BALANCED = 0.5  # of the signs of f on the rays: nearer to 0 both tails are alike
ENOUGH = 1e4  # effective draws from which intervals of a >= 2.5 hold; ten times as many at a = 2
SLACK = 0.01  # the slope of log_prob has rounding
STEADY = 0.1  # by so much the growth of both steps may differ: z^k, on a line, grows by 1.7 times as much in the first
BEYOND = 10.0  # times as far from the mean as any draw: else f has bounds, and a zero of it passes for growth


def moment_flags(f: Columns, y_far: Tensor | None, fall: Tensor | None, ess: Tensor, *, mean_alone: bool = False) -> tuple[Flag, ...]:
    """HEAVY_F without a variance or a mean, NO_THIRD_MOMENT without enough of the `ess` (k,), from f at three points far out on each
    ray, (3, rays, *shape), and the nats that the mass beyond loses in a step (rays,). `mean_alone`: ask whether there is a mean, for the
    errors of weighted draws have other tails than f."""
    if y_far is None or fall is None:
        return ()
    by_ray, side = _growth(f, y_far, fall.to("cpu", torch.float64))
    a = by_ray.amin(0)
    flags = located("HEAVY_F", a <= 1 + SLACK, a, 1.0, detail="tail index of f; its mean does not exist", worst=min)
    if mean_alone:
        return flags
    no_variance = (a > 1 + SLACK) & (a <= 2 + SLACK)
    flags += located("HEAVY_F", no_variance, a, 2.0, detail="tail index of f, by log_prob far out", worst=min)
    there = (by_ray <= (1 + SLACK) * a).double()
    lopsided = ((side * there).sum(0) / there.sum(0)).abs() > BALANCED
    few = ess < enough(a)
    return flags + located("NO_THIRD_MOMENT", (a > 2 + SLACK) & (a <= 3 + SLACK) & lopsided & few, a, 3.0, detail="tail index", worst=min)


def _growth(f: Columns, y_far: Tensor, fall: Tensor) -> tuple[Tensor, Tensor]:
    """(nu / m (rays, k), infinite where f does not grow; on which side of its mean f is there)."""
    far = f.standard(y_far)
    first, m = (far[1:] / far[:-1]).abs().log().unbind(0)
    steady = (first / m - 1).abs() < STEADY
    grows = m.isfinite() & (m > 0) & steady & (far[2].abs() > BEYOND * f.z.abs().flatten(0, 1).amax(0))
    return torch.where(grows, fall[:, None] / m, torch.inf), far[2].sign()


def enough(a: Tensor) -> Tensor:
    """Effective draws from which intervals of a mean of tail index a (k,) hold: 1e4 from a = 2.5 on, 1e5 at a = 2."""
    return ENOUGH * 10 ** (2 * (2.5 - a).clamp(min=0))
