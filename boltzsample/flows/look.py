"""A flow judged by fresh draws of its own: ELBO, log Z-hat, ESS."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from boltzsample.estimates.tails import khat
from boltzsample.flows.flow import Flow
from boltzsample.streams import Rng
from boltzsample.target import Target


class Look(NamedTuple):
    """The ELBO and its standard error, log mean w, the ESS as a share of the draws, and k-hat of the weights (-inf: no tail to fit).

    Where a share 1 - a of the draws falls on zero density E_q log w is -inf; the bound is then that of the flow cut to the support,
    E_q[log w | w > 0] + log a <= log Z (Jensen), so that mass beyond a hard edge counts as what it costs.
    """

    elbo: float
    stderr: float
    log_z: float
    ess: float
    khat: float = -math.inf

    @property
    def gap(self) -> float:
        """What is left of KL(q || p), by its estimate log Z-hat - ELBO, plus two standard errors."""
        return self.log_z - self.elbo + 2 * self.stderr


def look(flow: Flow, target: Target, n: int, rng: Rng) -> Look:
    """The flow judged by n draws. Price: n `log_prob`.

    >>> import boltzsample as bz
    >>> from boltzsample.flows.base import Normal
    >>> from boltzsample.flows.families import make_flow
    >>> from boltzsample.streams import Stream
    >>> target = bz.from_log_prob(lambda x: -0.5 * x.square().sum(-1), dim=2)
    >>> seen = look(make_flow("realnvp", 2, Stream(0).rng(), base=Normal(2)), target, 100, Stream(1).rng())
    >>> round(seen.log_z, 6), round(seen.ess, 6)       # exactly log 2 pi, from exact draws
    (1.837877, 1.0)
    """
    x, log_q, _ = flow.sample_and_log_prob(n, rng)
    log_p = target.log_prob(x).double()
    log_w = torch.where(log_p < torch.inf, log_p - log_q, -torch.inf)  # NaN is no density either
    fine = log_w[log_w.isfinite()]
    if len(fine) < 2:
        return Look(-math.inf, math.inf, -math.inf, 0.0, math.inf)
    total = fine.logsumexp(0)
    ess = float((2 * total - (2 * fine).logsumexp(0)).exp())
    a = len(fine) / n
    stderr = math.hypot(float(fine.std()) / math.sqrt(len(fine)), math.sqrt((1 - a) / (a * n)))
    k = float(khat((log_w - fine.max()).exp()[:, None]))
    return Look(float(fine.mean()) + math.log(a), stderr, float(total) - math.log(n), ess / n, -math.inf if math.isnan(k) else k)
