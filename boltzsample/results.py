"""Result: what `bz.sample` hands back: draws, and everything a user may ask of them.

Questions are asked in the space the user thinks in (`values`): x itself, or the target's `readout` of it. Every number is
an `Estimate`. A Result with `replicates` answers by combining the answers of its replicates (TRUST.md, 2(i)).
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from boltzsample.draws import Draws, Estimate
from boltzsample.errors import ShapeError
from boltzsample.estimates import evidence
from boltzsample.estimates.diagnostics import doubtful_tails
from boltzsample.estimates.expectation import covariance, expectation, probability, sd
from boltzsample.estimates.quantiles import quantile
from boltzsample.estimates.replicates import combine
from boltzsample.flags import Flag, Severity, Status, flag, worst
from boltzsample.functionals import Functional, Values, component_names, evaluate, flat, indicator, to_cpu
from boltzsample.target import Target, readout

if TYPE_CHECKING:
    from matplotlib.figure import Figure


log = logging.getLogger("boltzsample")

MIXING = {"NESTED_RHAT", "START_MEMORY", "DRIFT", "RHAT", "FEW_SWITCHES"}  # chains that are not (yet) draws of one law


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """The draws of a run and the questions they answer.

    `draws` are in the sampler's space; `target`, where known, maps them to the user's (`values`). A loaded result has no
    target: it carries `user`, `user_starts` and `user_far`, the values as stored. `config` says how the run was made
    (method, seed, ...); `config["log_z"]` is True where the method promises log Z. `sampler` is the fitted sampler.

    >>> import torch
    >>> x = torch.randn(64, 50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> r = result(Draws.from_arrays(x))
    >>> r.expectation(lambda x: x[..., 0]).interval.shape
    torch.Size([2])
    >>> r.status  # no second witness looked at draws made elsewhere
    <Status.CAUTION: 'caution'>
    """

    draws: Draws
    target: Target | None = None
    sampler: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    replicates: tuple[Result, ...] = ()
    user: Values | None = None
    user_starts: Values | None = None
    names: tuple[str, ...] | None = None
    user_far: Values | None = None

    # ---- questions ----

    def expectation(self, f: Functional | None = None) -> Estimate:
        """E f. `f` maps points (..., dim) to (...) or (..., k), in the user's space (a dict of them where the readout is one).

        Without `f`: all coordinates as one vector, in the order of `labels`. `f` is handed a flat batch, a copy, so it may
        index `x[:, 0]` or `x[..., 0]`; where the mass falls slowly far out it is asked there, too, for the moments it has.
        Raises ShapeError, DtypeError, BatchCrosstalkError (f of one point depends on others).

        >>> import torch
        >>> result(Draws.from_arrays(torch.ones(8, 4, 3))).expectation(lambda x: x.sum())
        Traceback (most recent call last):
        boltzsample.errors.ShapeError: f returned shape () for 3 points; wanted (3,) or (3, k), one value (or k values) \
a point; index and sum over the last axis: x[..., 0], x.sum(-1)
        """
        if self.replicates:
            return combine([r.expectation(f) for r in self.replicates])
        y = self._y(f)
        own = expectation(y, self.draws, self._y_start(f), self._y_far(f))
        own = self._in_company(own, own if f is None else self.means, y)
        return own if f is None else self._of_this_run(own)

    def sd(self, f: Functional | None = None) -> Estimate:
        """The standard deviation of f; without `f`, of every coordinate. Shapes and errors as `expectation`."""
        if self.replicates:
            return combine([r.sd(f) for r in self.replicates])
        return self._of_this_run(sd(self._y(f), self.draws, self._y_start(f), self._y_far(f)))

    def quantile(self, f: Functional | None = None, p: float = 0.5) -> Estimate:
        """The p-quantile of f, 0 < p < 1; without `f`, of every coordinate. Shapes and errors as `expectation`."""
        if not 0 < p < 1:
            raise ValueError(f"p is {p}; wanted a number strictly between 0 and 1 (0.05 for the lower end of a 90% interval)")
        if self.replicates:
            return combine([r.quantile(f, p) for r in self.replicates])
        return self._of_this_run(quantile(self._y(f), p, self.draws, self._y_start(f)))

    def probability(self, event: Functional) -> Estimate:
        """P(event). `event` maps points (..., dim) to booleans (...) or (..., k). Errors as `expectation`."""
        if self.replicates:
            return combine([r.probability(event) for r in self.replicates])
        return self._of_this_run(probability(indicator(self._y(event)), self.draws, self._y_start(event)))

    def covariance(self, f: Functional | None = None) -> Estimate:
        """The covariance matrix (k, k) of f (..., k); without `f`, of the coordinates. Errors as `expectation`."""
        if self.replicates:
            return combine([r.covariance(f) for r in self.replicates])
        return self._of_this_run(covariance(self._y(f), self.draws, self._y_far(f)))

    def log_z(self) -> Estimate:
        """log of the integral of exp log_prob; nan and untrusted, with the reason in its flags, where the method has none."""
        if self.replicates:
            return evidence.combine_log_z([r.log_z() for r in self.replicates])
        own = evidence.log_z(self.draws)
        return self._of_this_run(own, "untrusted") if self.draws.evidence else own

    # ---- the verdict ----

    @property
    def status(self) -> Status:
        """ok, caution or untrusted: the worst over the run and its coordinates (over log Z where the method promises one)."""
        return worst(self.flags)

    @cached_property
    def flags(self) -> tuple[Flag, ...]:
        """Everything found, the worst first; `index` of a flag counts coordinates in the order of `labels`."""
        log_z = self.log_z().flags if self.config.get("log_z") is True else ()
        found = dict.fromkeys([*self.draws.flags, *self.means.flags, *log_z, *self._height_flags()])
        return tuple(sorted(found, key=lambda f: -f.status.rank))

    def _height_flags(self) -> list[Flag]:
        """What is to be said of log_prob as one more functional: regions of unlike height can share all their means."""
        if self.replicates or bool(self.draws.log_prob.isnan().any()):
            return []
        flags = expectation(self.draws.log_prob, self.draws).flags
        known = {f.code for f in (*self.draws.flags, *self.means.flags)}
        return [replace(f, index=None, detail="of log_prob; " + f.detail) for f in flags if f.code not in known and f.severity != "info"]

    @cached_property
    def means(self) -> Estimate:
        """`expectation()` of all coordinates, kept: the summary and the status read it."""
        return self.expectation()

    def _of_this_run(self, own: Estimate, severity: Severity = "caution") -> Estimate:
        """An estimate, with a caution where the chains disagree about the means: a test of f alone may lack the power to see it.

        log Z of chains rests on all they visited, so there the flag keeps its severity.
        """
        known = {f.code for f in own.flags if f.severity == "untrusted"}
        if known & MIXING:
            return own
        worse = {f.code: f for f in self.means.flags if f.code in MIXING and f.severity == "untrusted"}
        heirs = tuple(replace(f, severity=severity, index=None, detail="of the means of this run; " + f.detail) for f in worse.values())
        return replace(own, flags=own.flags + heirs)

    def _in_company(self, own: Estimate, means: Estimate, y: Tensor) -> Estimate:
        """E f with what is to be said of the tails of f where a coordinate of these chains has heavy ones (squares, and so sd
        and covariances, have a k-hat twice that of f, and speak for themselves)."""
        heavy = self.draws.log_weight is None and any(g.code == "HEAVY_F" and g.severity == "untrusted" for g in means.flags)
        return replace(own, flags=own.flags + doubtful_tails(y, self.draws, own.ess)) if heavy else own

    # ---- what the run was ----

    @property
    def ledger(self) -> dict[str, tuple[int, int]]:
        """phase -> calls of (log_prob, log_prob_and_grad), counted in points."""
        return dict(self.draws.ledger)

    @property
    def evaluations(self) -> int:
        """All evaluations of the density, with and without gradient, in all phases."""
        return sum(a + b for a, b in self.draws.ledger.values())

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all phases; `draws.seconds` has them by phase."""
        return sum(self.draws.seconds.values())

    @cached_property
    def values(self) -> Values:
        """The draws in the user's space, (units, draws, *shape), or a dict of such."""
        return self.user if self.user is not None else self._read(self.draws.x)

    @cached_property
    def start_values(self) -> Values | None:
        """The starts in the user's space, (units, *shape), or a dict of such; None where they are not known."""
        return self._stored_or_read(self.user_starts, self.draws.starts)

    @cached_property
    def far_values(self) -> Values | None:
        """The points of `draws.far` in the user's space, (3, rays, *shape), or a dict of such; None where there are none, or none that
        the readout can go to."""
        try:
            return self._stored_or_read(self.user_far, self.draws.far)
        except Exception as error:
            log.info("there is no readout far out (%s), so nothing is known of moments", error)
            return None

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """One name a coordinate: as given, or x[0], x[1], ..., or after the keys of a dict: w[0, 1]."""
        values, names = self.values, self.names or getattr(self.target, "names", None)
        if isinstance(values, dict):
            return tuple(label for key, v in values.items() for label in component_names(key, v.shape[2:]))
        count = values.shape[2:].numel()
        if names is None:
            return component_names("x", values.shape[2:])
        if len(names) != count:
            raise ShapeError(f"there are {len(names)} names for {count} coordinates; give one name a coordinate")
        return tuple(names)

    def __repr__(self) -> str:
        units, draws, _ = self.draws.x.shape
        method = self.config.get("method", "draws made elsewhere")
        shape = f"{units * draws:,} draws of {len(self.labels)} coordinates in {units:,} chains"
        return f"Result(status: {self.status}, {method}: {shape}, {self.evaluations:,} evaluations, {self.seconds:.1f} s)"

    # ---- where it goes ----

    def summary(self) -> str:
        """One screen of text: status, reasons, a table of the coordinates, log Z, cost, what was checked and what was not."""
        from boltzsample.report import summary_text

        return summary_text(self)

    def to_arviz(self) -> Any:
        """The draws as ArviZ has them: InferenceData (0.2x) or DataTree (1.x). A dict readout gives one variable a key."""
        from boltzsample.arviz_bridge import result_to_arviz

        return result_to_arviz(self)

    def plot(self, kind: str = "marginals", **kw: Any) -> Figure:
        """A matplotlib Figure: "trace", "marginals", "pair", "autocorrelation", "forest"; "path", "trajectories", "training"."""
        from boltzsample.plots import plot

        return plot(self, kind, **kw)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a directory that `bz.load` reads: draws.nc, config.json, model.safetensors, manifest.json. No pickle."""
        from boltzsample.storage import save

        return save(self, path, overwrite=overwrite)

    # ---- f at the draws ----

    def _read(self, x: Tensor) -> Values:
        return x if self.target is None else readout(self.target, x)

    def _stored_or_read(self, stored: Values | None, x: Tensor | None) -> Values | None:
        if stored is not None or x is None:
            return stored
        return self._read(x) if self.user is None or self.target is not None else None

    def _y(self, f: Functional | None) -> Tensor:
        return flat(self.values, 2) if f is None else evaluate(f, self.values, self.draws.x.shape[:2])

    def _y_start(self, f: Functional | None) -> Tensor | None:
        if self.start_values is None:
            return None
        return flat(self.start_values, 1) if f is None else evaluate(f, self.start_values, self.draws.x.shape[:1])

    def _y_far(self, f: Functional | None) -> Tensor | None:
        """f far out, where nobody promised that it could be evaluated: on the CPU, for an index out of range would be the end of CUDA."""
        if self.far_values is None or self.draws.far is None:
            return None
        far = to_cpu(self.far_values)
        try:
            with warnings.catch_warnings(action="ignore"):
                return flat(far, 2) if f is None else evaluate(f, far, self.draws.far.shape[:2])
        except Exception as error:
            log.info("f could not be evaluated far out (%s), so nothing is known of its moments", error)
            return None


def result(draws: Draws, target: Target | None = None, *, names: tuple[str, ...] | None = None) -> Result:
    """A Result of draws made elsewhere: `bz.result(bz.Draws.from_arrays(x)).summary()`.

    With a target, log_prob is filled in where it is missing and values are read in the target's user space. Nobody but
    these draws looked for modes, so SINGLE_WITNESS is added unless `draws.witnesses` names somebody who did.

    Raises ShapeError where the draws and the target differ in dimension.
    """
    if target is not None and target.dim != draws.x.shape[-1]:
        came = f"the draws have {draws.x.shape[-1]} coordinates and the target {target.dim}"
        raise ShapeError(f"{came}; wanted the same number: pass the target they were drawn from")
    if target is not None and draws.log_prob.isnan().all():
        draws = replace(draws, log_prob=target.log_prob(draws.x).detach())
    if not draws.witnesses:
        draws = replace(draws, flags=(*draws.flags, flag("SINGLE_WITNESS")))
    return Result(draws, target, names=names)
