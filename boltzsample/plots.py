"""Figures of a Result. matplotlib is imported inside functions and pyplot never: nothing global changes, nothing has to be closed.

Every figure carries the status; weighted draws are shown after resampling by their weights (without noise: systematic, offset 1/2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from boltzsample.figures import (
    BLUE,
    DARK,
    GREY,
    MOST,
    RED,
    STYLE,
    Which,
    chains,
    credible,
    equal_weight,
    index_of,
    panels,
    quantiles,
    sign,
    titled,
)
from boltzsample.path_plots import PATH_KINDS
from boltzsample.screen import clip

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from boltzsample.results import Result

POINTS = 4_000  # drawn in a scatter plot


def plot(result: Result, kind: str = "marginals", coordinates: Which = None, **kw: Any) -> Figure:
    """The Figure of one of `KINDS`; `coordinates` are names or numbers (default: the first eight, or two for "pair").

    "trace" and "autocorrelation" show chains, "marginals" histograms with 95% credible intervals, "pair" scatter plots
    (with the density's contours where it has two dimensions), "forest" means and 95% credible intervals side by side
    (`truth=` (k,) adds ticks). Of a diffusion there are "path", "trajectories" and "training" as well. Raises ValueError on an unknown kind
    or coordinate.
    """
    import matplotlib

    kinds = KINDS | PATH_KINDS
    if kind not in kinds:
        raise ValueError(f"there is no plot of kind {kind!r}; choose from {', '.join(kinds)}")
    everything = list(range(len(result.labels)))
    default = everything if kind == "forest" else everything[: 2 if kind in ("pair", *PATH_KINDS) else MOST]
    chosen = default if coordinates is None else [index_of(result, c) for c in coordinates]
    with matplotlib.rc_context(STYLE):
        figure = kinds[kind](result, chosen, **kw)
        sign(figure, result)
    return figure


def trace(result: Result, which: list[int]) -> Figure:
    """Draws along the chains: up to twenty chains as lines; of more, the median and the 50% and 90% bands over chains too."""
    x = chains(result)[..., which]
    figure, axes = panels(len(which), columns=1, size=(7.5, 1.5))
    steps = np.arange(1, x.shape[1] + 1)
    many = x.shape[0] > 20
    for j, ax in enumerate(axes):
        ax.plot(steps, x[:20, :, j].T, lw=0.5, alpha=0.35 if many else 0.8, color=GREY if many else None)
        if many:
            _bands(ax, steps, x[:, :, j])
        ax.set_ylabel(clip(result.labels[which[j]], 20))
        ax.margins(x=0.01)
    axes[-1].set_xlabel("draw")
    if many:
        axes[0].set_title(f"20 of {x.shape[0]} chains; median, 50% and 90% of all chains", loc="left", color=DARK)
    return figure


def _bands(ax: Axes, steps: Any, x: Any) -> None:
    q = quantiles(x, [0.05, 0.25, 0.5, 0.75, 0.95])
    ax.fill_between(steps, q[0], q[4], color=BLUE, alpha=0.15, lw=0)
    ax.fill_between(steps, q[1], q[3], color=BLUE, alpha=0.30, lw=0)
    ax.plot(steps, q[2], color=DARK, lw=1.2)


def marginals(result: Result, which: list[int], bins: int | None = None) -> Figure:
    """Histograms with the mean (line) and the 95% credible interval (bar with ticks)."""
    x = equal_weight(result)[:, which]
    figure, axes = panels(len(which), columns=min(4, len(which)), size=(2.9, 2.3))
    for j, ax in enumerate(axes):
        _histogram(ax, x[:, j], bins)
        low, middle, high = credible(x[:, j])
        ax.errorbar(middle, -0.05, xerr=[[middle - low], [high - middle]], transform=ax.get_xaxis_transform(), clip_on=False, **BAR)
        ax.tick_params(axis="x", pad=9)
        ax.axvline(float(result.means.value[which[j]]), color=DARK, lw=1.2)
        ax.set_title(titled(result, which[j]))
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    figure.supxlabel("line: mean; bar: median and 95% credible interval", fontsize=8, color=GREY)
    return figure


BAR: dict[str, Any] = {"fmt": "o", "ms": 3.5, "color": DARK, "lw": 1.4, "capsize": 3.0, "capthick": 1.4}


def _histogram(ax: Axes, x: Any, bins: int | None = None) -> None:
    """Over the central 99.8% of what is finite, so that one far draw does not squeeze everything into one bar."""
    x = x[np.isfinite(x)]
    low, high = np.quantile(x, [0.001, 0.999]) if len(x) else (0.0, 1.0)
    pad = 0.05 * (high - low) or 0.5
    ax.hist(x, bins=bins or min(60, max(12, round(len(x) ** 0.4))), range=(low - pad, high + pad), color=BLUE, alpha=0.55, density=True)


def pair(result: Result, which: list[int]) -> Figure:
    """Scatter plots of all pairs, histograms on the diagonal; contours of the density 0.5, 2, 4.5 and 8 below its top (1-4 sigma)."""
    k = len(which)
    if not 2 <= k <= MOST:
        raise ValueError(f"a pair plot shows 2 to {MOST} coordinates, not {k}; choose them by coordinates=")
    from matplotlib.figure import Figure

    x = equal_weight(result)[:, which]
    few = x[:: max(1, math.ceil(len(x) / POINTS))]
    figure = Figure(figsize=(2.1 * k + 1.2, 2.1 * k + 0.8), layout="constrained")
    grid = figure.subplots(k, k, sharex="col", squeeze=False)
    for i in range(k):
        for j in range(k):
            _pair_panel(result, grid[i, j], few, x, which, i, j)
    return figure


def _pair_panel(result: Result, ax: Axes, few: Any, x: Any, which: list[int], i: int, j: int) -> None:
    if j > i:
        ax.set_axis_off()
        return
    if i == j:
        _histogram(ax, x[:, i])
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    else:
        ax.scatter(few[:, j], few[:, i], s=5, color=BLUE, alpha=max(0.08, min(0.5, 600 / len(few))), lw=0)
        if result.target is not None and not hasattr(result.target, "readout") and result.target.dim == 2 and len(result.labels) == 2:
            _contours(result, ax, which[j], which[i])
        if j == 0:
            ax.set_ylabel(clip(result.labels[which[i]]))
        else:
            ax.set_yticklabels([])
    if i == len(which) - 1:
        ax.set_xlabel(clip(result.labels[which[j]]))


def _contours(result: Result, ax: Axes, h: int, v: int) -> None:
    (a, b), (c, d) = ax.get_xlim(), ax.get_ylim()
    along, up = np.linspace(a, b, 120), np.linspace(c, d, 120)
    like = result.draws.x
    points = torch.empty(120, 120, 2, dtype=like.dtype, device=like.device)
    points[..., h] = torch.as_tensor(along, dtype=like.dtype, device=like.device)
    points[..., v] = torch.as_tensor(up, dtype=like.dtype, device=like.device)[:, None]
    assert result.target is not None
    log_p = result.target.log_prob(points).detach().double().cpu().numpy()
    log_p = np.where(np.isfinite(log_p), log_p, -np.inf)
    top = max(float(np.max(log_p)), float(result.draws.log_prob.nan_to_num(-math.inf, posinf=-math.inf).max()))
    if math.isfinite(top):
        levels = [-8.0, -4.5, -2.0, -0.5]
        ax.contour(along, up, np.maximum(log_p - top, -1e6), levels=levels, colors=DARK, linewidths=0.9, linestyles="solid")


def autocorrelation(result: Result, which: list[int], lags: int | None = None) -> Figure:
    """Autocorrelation by lag, chains pooled around the common mean, with the 95% band of independent draws."""
    x = chains(result)[..., which]
    m, n, _ = x.shape
    if n < 3:
        raise ValueError(f"chains of {n} draws have no autocorrelation to show; run longer chains")
    lags = min(lags or 100, n - 1 if m >= 16 else n // 2)
    rho = _autocorrelation(x)[: lags + 1]
    figure, axes = panels(len(which), columns=min(4, len(which)), size=(2.9, 2.0), sharey=True)
    for j, ax in enumerate(axes):
        band = 2 / math.sqrt(m * n)
        ax.axhspan(-band, band, color=GREY, alpha=0.25, lw=0)
        ax.vlines(np.arange(lags + 1), 0, rho[:, j], color=BLUE, lw=max(0.8, min(4.0, 120 / (lags + 1))))
        ax.axhline(0, color=DARK, lw=0.8)
        ax.set_title(clip(result.labels[which[j]]))
        ax.set_ylim(min(-0.2, float(np.nan_to_num(rho).min()) - 0.05), 1.05)
    figure.supxlabel("lag (draws)", fontsize=9)
    return figure


def _autocorrelation(x: Any) -> Any:
    """(lags, k): mean over chains and pairs of c_i c_(i+t), c around the common mean, over the variance. By FFT, zero-padded."""
    n = x.shape[1]
    c = x - x.mean((0, 1))
    spectrum = np.abs(np.fft.rfft(c, 2 * n, axis=1)) ** 2
    acov = np.fft.irfft(spectrum.mean(0), 2 * n, axis=0)[:n] / np.arange(n, 0, -1)[:, None]
    with np.errstate(invalid="ignore"):  # a constant coordinate has none
        return acov / acov[0]


def forest(result: Result, which: list[int], truth: Any = None) -> Figure:
    """Means (points) and 95% credible intervals (bars with ticks), one line a coordinate; `truth` (k,) as upright ticks."""
    from matplotlib.figure import Figure

    x = equal_weight(result)[:, which]
    low, _, high = credible(x)
    mean = result.means.value.numpy()[which]
    y = np.arange(len(which))
    figure = Figure(figsize=(6.5, 1.2 + 0.22 * len(which)), layout="constrained")
    ax = figure.subplots()
    ax.axvline(0, color=GREY, lw=0.8, ls=":")
    look = BAR | {"color": BLUE, "label": "mean, 95% interval"}
    shown: list[Any] = [ax.errorbar(mean, y, xerr=np.abs(np.stack([low, high]) - mean), **look)]
    if truth is not None:
        shown += ax.plot(np.asarray(truth)[which], y, "|", ms=11, mew=1.6, color=RED, label="truth card")
    ax.set_yticks(y, [result.labels[i] for i in which])
    ax.set_ylim(len(which) - 0.5, -0.5)
    ax.grid(axis="x", color="#e6e8eb", lw=0.6)
    ax.set_axisbelow(True)
    ax.legend(handles=shown, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8, borderaxespad=0.2)
    return figure


KINDS: dict[str, Callable[..., Figure]] = {
    "trace": trace,
    "marginals": marginals,
    "pair": pair,
    "autocorrelation": autocorrelation,
    "forest": forest,
}
