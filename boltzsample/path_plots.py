"""Figures of a diffusion: its paths from noise to data, the marginals along them, and how it was trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from boltzsample.figures import BLUE, DARK, GREY, RED, panels
from boltzsample.screen import clip
from boltzsample.streams import Stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from boltzsample.results import Result

PATHS, CLOUD = 60, 4000
SHOWN = 6  # levels


def trajectories(result: Result, which: list[int]) -> Figure:
    """Some paths of each coordinate from noise (left) to data (right), in units of x / alpha."""
    x = _trail(result, PATHS)[..., which]
    figure, axes = panels(len(which), columns=min(4, len(which)), size=(3.4, 2.6))
    for j, ax in enumerate(axes):
        ax.plot(np.arange(len(x)), x[:, :, j], lw=0.6, alpha=0.5, color=BLUE)
        ax.set_title(_label(result, which[j]))
        ax.set_xlabel("kernel")
    return figure


def path(result: Result, which: list[int]) -> Figure:
    """The marginals p_t of each coordinate at a few levels, noise at the top, the data at the bottom; unweighted."""
    x = _trail(result, CLOUD)[..., which]
    levels = np.linspace(0, len(x) - 1, SHOWN).round().astype(int)
    figure, axes = panels(len(which), columns=min(4, len(which)), size=(3.4, 3.2))
    for j, ax in enumerate(axes):
        low, high = np.quantile(x[levels[1], :, j], [0.002, 0.998])
        for i, k in enumerate(levels):
            density, edges = np.histogram(x[k, :, j], bins=80, range=(low, high), density=True)
            top = density.max() or 1.0
            middle, base = (edges[1:] + edges[:-1]) / 2, float(SHOWN - 1 - i)
            ax.fill_between(middle, base, base + 0.9 * density / top, color=BLUE, alpha=0.35 + 0.5 * i / SHOWN, lw=0)
            ax.text(high, base + 0.1, f"{k}", fontsize=7, color=GREY, ha="right")
        ax.set_yticks([])
        ax.set_title(_label(result, which[j]))
    figure.supxlabel("marginals along the kernels (number at the right), noise at the top", fontsize=8, color=GREY)
    return figure


def training(result: Result, which: list[int]) -> Figure:
    """The loss of the batches (grey) and of the draws held out (points); ESS of the weights and the gap EUBO - ELBO after each round."""
    model = _model(result)
    figure, (left, middle, right) = panels(3, columns=3, size=(3.4, 2.6))
    loss, looks = model.history.numpy(), model.looks
    if len(loss):
        width = max(1, len(loss) // 100)
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        left.plot(np.arange(len(smooth)) + width, smooth, color=GREY, lw=0.8)
    steps = [look.steps for look in looks]
    left.plot(steps[1:], [look.loss for look in looks[1:]], "o", color=DARK, ms=4)
    left.set_title("loss; held out: points")
    for ax, title, values, colour in (
        (middle, "ESS of the weights", [look.found.get("ess", np.nan) for look in looks], BLUE),
        (right, "EUBO - ELBO", [look.found.get("eubo", np.nan) - look.found.get("elbo", np.nan) for look in looks], RED),
    ):
        ax.plot(steps, values, "o-", color=colour, ms=4, lw=1)
        ax.set_title(title)
    if np.nanmin([*values, np.inf]) > 0:
        right.set_yscale("log")
    for ax in (left, middle, right):
        ax.set_xlabel("steps")
    return figure


def _model(result: Result) -> Any:
    models = getattr(result.sampler, "models", ())
    if not models or not hasattr(models[0], "levels"):
        raise ValueError("this plot shows how a diffusion draws, and this result has none: bz.sample(target, 'diffusion').plot(...)")
    return models[0]


def _trail(result: Result, n: int) -> Any:
    """(places, n, dim) in the space of x, of the first model; the same at every call."""
    model = _model(result)
    if not hasattr(model.reverse, "trail"):
        raise ValueError(f"a {type(model.rule).__name__} has no paths of kernels to show; choose rule=Ancestral()")
    with torch.no_grad():
        z = model.reverse.trail(n, model.net.dim, Stream(0).child("plot").rng(model.map.m.dtype, model.map.m.device))
        return model.map.push(z)[0].cpu().numpy()


def _label(result: Result, i: int) -> str:
    """The name where the values are the coordinates of x themselves."""
    return clip(result.labels[i]) if len(result.labels) == result.draws.x.shape[-1] else f"x[{i}]"


PATH_KINDS: dict[str, Callable[..., Figure]] = {"path": path, "trajectories": trajectories, "training": training}
