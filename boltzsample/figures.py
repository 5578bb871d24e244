"""What all figures share: colours and style, the values they show, panels, and the status in the corner."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from boltzsample.estimates.weighted import even_index
from boltzsample.flags import Status
from boltzsample.functionals import flat
from boltzsample.screen import clip, plus_minus

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from boltzsample.results import Result

BLUE, DARK, RED, GREY = "#3b75af", "#1f3b57", "#c0392b", "#8a8f98"
MOST = 8  # coordinates drawn unless others are named
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555b66",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}

Which = Sequence[int | str] | None


def index_of(result: Result, coordinate: int | str) -> int:
    """The number of a coordinate given by name or number. Raises ValueError."""
    names = list(result.labels)
    if isinstance(coordinate, str) and coordinate in names:
        return names.index(coordinate)
    if isinstance(coordinate, int) and -len(names) <= coordinate < len(names):
        return coordinate % len(names)
    shown = ", ".join(names[:MOST]) + (", ..." if len(names) > MOST else "")
    raise ValueError(f"there is no coordinate {coordinate!r}; choose a number below {len(names)} or a name: {shown}")


def chains(result: Result) -> Any:
    """(units, draws, k) in float64, NaN where a value is not finite."""
    x = flat(result.values, 2).detach().cpu().double()
    return torch.where(x.isfinite(), x, torch.nan).numpy()


def equal_weight(result: Result) -> Any:
    """(n, k) draws of equal weight, NaN where a value is not finite."""
    x = torch.as_tensor(chains(result)).flatten(0, 1)
    if result.draws.log_weight is not None:
        x = x[even_index(result.draws.log_weight.detach().cpu().flatten())]
    return x.numpy()


def credible(x: Any) -> Any:
    """(3, k): the ends of the 95% credible interval around the median, from draws (n, k)."""
    return quantiles(x, [0.025, 0.5, 0.975])


def quantiles(x: Any, p: list[float]) -> Any:
    """(len(p), ...) over the first axis, NaN where nothing is finite."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
        return np.nanquantile(x, p, axis=0)


def titled(result: Result, i: int) -> str:
    """The name of a coordinate, and below it its mean with the error bar."""
    low, high = result.means.interval[:, i].tolist()
    return f"{clip(result.labels[i])}\n{plus_minus(float(result.means.value[i]), low, high).replace('+-', '±')}"


def panels(count: int, columns: int, size: tuple[float, float], sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A Figure of `count` panels, each of `size` inches."""
    from matplotlib.figure import Figure

    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(4.5, size[0] * columns), size[1] * rows + 0.7), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=columns == 1, sharey=sharey, squeeze=False).flat)
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, axes[:count]


def sign(figure: Figure, result: Result) -> None:
    """The status in the corner: a figure travels without its summary."""
    codes = dict.fromkeys(f.code for f in result.flags if f.severity != "info")
    word = f"status: {result.status}" + (f" ({', '.join(codes)})" if codes else "")
    colour = {Status.OK: GREY, Status.CAUTION: "#b9770e", Status.UNTRUSTED: RED}[result.status]
    figure.suptitle(f"{result.config.get('method', 'draws made elsewhere')}, {word}", fontsize=8, color=colour, x=0.99, ha="right")
