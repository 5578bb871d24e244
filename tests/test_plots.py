"""Figures: what they show is what the draws say, and nothing global is touched."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from boltzsample import plots
from boltzsample.draws import Draws
from boltzsample.figures import equal_weight
from boltzsample.flags import flag
from boltzsample.plots import KINDS
from boltzsample.results import Result
from boltzsample.target import FunctionTarget


def log_prob(x: Tensor) -> Tensor:
    return -0.5 * (x[..., 0] ** 2 + (x[..., 1] - 1) ** 2 / 4)


def normal(units: int = 64, n: int = 16) -> Result:
    z = torch.randn(units, n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = z * torch.tensor([1.0, 2.0]) + torch.tensor([0.0, 1.0])
    return Result(Draws(x, log_prob(x), witnesses=("w",)), FunctionTarget(log_prob, 2), config={"method": "mcmc"}, names=("slope", "scale"))


def pixels(figure: Figure, tmp_path: Path) -> Any:
    figure.savefig(tmp_path / "figure.png", dpi=60)
    return matplotlib.image.imread(tmp_path / "figure.png")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_draws_something_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    figure = normal().plot(kind)
    assert isinstance(figure, Figure) and pixels(figure, tmp_path)[..., :3].std() > 0.02
    assert dict(matplotlib.rcParams) == before
    texts = " ".join(t.get_text() for ax in figure.axes for t in [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.get_yticklabels()])
    assert "slope" in texts and "scale" in texts


def test_pyplot_is_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would raise
    for kind in KINDS:
        normal().plot(kind)


def test_unknown_kinds_and_coordinates_name_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no plot of kind 'traec'; choose from trace, marginals, pair, autocorrelation, forest"):
        normal().plot("traec")
    with pytest.raises(ValueError, match="no coordinate 'slop'; choose a number below 2 or a name: slope, scale"):
        normal().plot("trace", coordinates=["slop"])
    with pytest.raises(ValueError, match="no coordinate 2"):
        normal().plot("trace", coordinates=[2])
    with pytest.raises(ValueError, match="2 to 8 coordinates, not 1"):
        normal().plot("pair", coordinates=["scale"])
    with pytest.raises(ValueError, match="chains of 2 draws"):
        normal(8, 2).plot("autocorrelation")


def test_coordinates_are_chosen_by_name_or_number() -> None:
    for chosen in (["scale"], [1], [-1]):
        (ax,) = normal().plot("marginals", coordinates=chosen).axes
        assert ax.get_title().startswith("scale\n")


def test_the_bar_of_a_marginal_is_its_credible_interval() -> None:
    r = normal(256, 64)
    (ax,) = r.plot("marginals", coordinates=["scale"]).axes
    (bar,) = next(c for c in ax.containers if isinstance(c, matplotlib.container.ErrorbarContainer)).lines[2]
    ends = bar.get_segments()[0][:, 0]
    assert np.allclose(sorted(ends), [1 - 1.96 * 2, 1 + 1.96 * 2], atol=0.15)
    assert np.allclose(ends, np.quantile(r.draws.x[..., 1].numpy(), [0.025, 0.975]))
    assert "±" in ax.get_title()


def test_contours_only_where_the_density_has_two_dimensions() -> None:
    def contours(r: Result) -> list[Any]:
        return [c for ax in r.plot("pair").axes for c in ax.collections if isinstance(c, matplotlib.contour.QuadContourSet)]

    r = normal()
    (found,) = contours(r)
    ring = next(path for level, path in zip(found.levels, found.get_paths(), strict=True) if level == -0.5)
    x, y = ring.vertices.T  # log p = top - 1/2 is the one-sigma ellipse; "slope" runs along x
    assert x.max() == pytest.approx(1.0, abs=0.05) and y.max() == pytest.approx(3.0, abs=0.1) and y.min() == pytest.approx(-1.0, abs=0.1)
    assert not contours(replace(r, target=None))


def test_the_forest_has_a_tick_at_each_truth() -> None:
    figure = normal().plot("forest", truth=torch.tensor([0.25, 1.5]))
    ticks = [line for line in figure.axes[0].lines if line.get_label() == "truth card"]
    assert ticks[0].get_xdata().tolist() == [0.25, 1.5] and ticks[0].get_ydata().tolist() == [0, 1]


def test_autocorrelation_of_an_ar1() -> None:
    x = torch.empty(2000, 40, 1)
    x[:, 0] = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2000, 40, 1, generator=torch.Generator().manual_seed(1))
    for i in range(1, 40):
        x[:, i] = 0.7 * x[:, i - 1] + 0.51**0.5 * noise[:, i]
    rho = plots._autocorrelation(x.double().numpy())[:, 0]
    assert np.allclose(rho[:20], 0.7 ** np.arange(20), atol=0.03)


def test_weighted_draws_are_shown_by_weight() -> None:
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r = Result(Draws.from_arrays(x, log_weight=x[:, 0]))  # exp(x) tilts N(0, 1) to N(1, 1)
    assert abs(equal_weight(r).mean() - 1.0) < 0.05


def test_the_status_is_on_the_figure() -> None:
    r = normal()
    assert r.plot("trace").get_suptitle() == "mcmc, status: ok"
    bad = replace(r, draws=replace(r.draws, flags=(flag("INTERRUPTED"), flag("OOM_SPLIT"))))
    assert bad.plot("trace").get_suptitle() == "mcmc, status: untrusted (INTERRUPTED)"


def test_constant_and_infinite_draws_do_not_break_a_figure(tmp_path: Path) -> None:
    constant, infinite = normal(), normal()
    constant.draws.x[..., 0] = 3.0
    infinite.draws.x[:, :4, 0] = torch.inf
    for r in (constant, infinite):
        for kind in KINDS:
            pixels(r.plot(kind), tmp_path)
