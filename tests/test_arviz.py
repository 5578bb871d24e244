"""The bridge to ArviZ, both lines of it: 0.2x (InferenceData) and 1.x (DataTree)."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from boltzsample import arviz_bridge
from boltzsample.arviz_bridge import import_arviz, is_1x, safe_names, to_arviz
from boltzsample.draws import Draws
from boltzsample.results import Result


class Named:
    dim = 3

    def log_prob(self, x: Tensor) -> Tensor:
        return -0.5 * x.square().sum(-1)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return -x

    def readout(self, x: Tensor) -> Any:
        return {"layer/w": x[..., :2, None], "scale": x[..., 2].exp()}


def draws() -> Draws:
    x = torch.randn(64, 16, 3, generator=torch.Generator().manual_seed(0))
    return Draws(x, x.sum(-1))


def test_coordinates_carry_their_names() -> None:
    tree = Result(draws(), names=("a", "b", "c"), config={"method": "mcmc"}).to_arviz()
    x = tree["posterior"]["x"]
    assert x.dims == ("chain", "draw", "coordinate") and list(x.coordinate.values) == ["a", "b", "c"]
    assert (x.sel(coordinate="b").values == draws().x[..., 1].numpy()).all()
    assert (tree["sample_stats"]["lp"].values == draws().log_prob.numpy()).all()
    assert tree.attrs["status"] == "ok" and tree.attrs["inference_library"] == "boltzsample" and tree.attrs["method"] == "mcmc"


def test_a_dict_gives_one_variable_a_key() -> None:
    posterior = Result(draws(), Named()).to_arviz()["posterior"]
    assert set(posterior.data_vars) == {"layer.w", "scale"}
    assert posterior["layer.w"].shape == (64, 16, 2, 1) and posterior["scale"].shape == (64, 16)


def test_arviz_summarizes_what_we_estimate() -> None:
    az, r = import_arviz(), Result(draws())
    assert np.allclose(az.summary(r.to_arviz(), round_to="none")["mean"].to_numpy(dtype=float), r.expectation().value.numpy(), atol=1e-6)


def test_weighted_draws_warn() -> None:
    d = draws()
    weighted = Result(Draws(d.x, d.log_prob, log_weight=d.log_prob.double()))
    with pytest.warns(UserWarning, match="ArviZ's own summaries and plots ignore"):
        tree = weighted.to_arviz()
    assert tree["sample_stats"]["log_weight"].shape == (64, 16)


@pytest.mark.parametrize(("version", "nested"), [("0.20.0", False), ("0.23.4", False), ("1.0.0", True), ("1.3.0", True)])
def test_each_line_is_called_its_own_way(version: str, nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, Any]] = []
    fake = SimpleNamespace(__version__=version, from_dict=lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(arviz_bridge, "import_arviz", lambda: fake)
    groups = {"posterior": {"x": np.zeros((4, 5))}, "sample_stats": {}}
    to_arviz(groups, attrs={"status": "ok"})
    ((positional, keywords),) = calls
    assert is_1x(version) is nested
    if nested:
        assert list(positional[0]) == ["posterior"] and keywords["attrs"] == {"/": {"status": "ok"}}
    else:
        assert positional == () and "sample_stats" not in keywords and "x" in keywords["posterior"]
        assert keywords["attrs"] == {"status": "ok"}


def test_names_that_netcdf_cannot_hold() -> None:
    assert safe_names(["a/b", "a.b", "draw", ""]) == {"a/b": "a.b", "a.b": "a.b_", "draw": "draw_", "": "_"}


def test_the_bridge_needs_no_torch() -> None:
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("bridge", {arviz_bridge.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import numpy as np
groups = {{"posterior": {{"x": np.zeros((40, 5, 2))}}}}
tree = module.to_arviz(groups, coords={{"c": ["a", "b"]}}, dims={{"x": ["c"]}}, attrs={{"status": "ok"}})
assert tree.attrs["status"] == "ok" and tree["posterior"]["x"].dims == ("chain", "draw", "c")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
