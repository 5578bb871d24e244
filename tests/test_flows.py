"""Every flow family: its log-det against autodiff, its inverse, its tails, its files, its randomness. And the bases."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
import zuko
from safetensors.torch import load_file, save_file
from torch import Tensor

import boltzsample as bz
from boltzsample.backend import compile_whole
from boltzsample.flows.base import DefensiveBase, Normal
from boltzsample.flows.elementary import Gaussianize
from boltzsample.flows.families import FAMILIES, make_flow
from boltzsample.flows.flow import Flow, NoInverse
from boltzsample.maps import Dense, Diagonal
from boltzsample.streams import Rng, Stream
from boltzsample.target import log_prob_and_grad
from boltzsample.views import Pullback

NAMES = list(FAMILIES)
CHEAP = ["realnvp", "nice", "spline-coupling", "maf", "ffjord"]
ROUNDING = {name: 1e-9 for name in NAMES} | {"ffjord": 2e-4}  # of log-dets and round trips; the solver's tolerance is 1e-6 a step


def rng(name: str = "test", dtype: torch.dtype = torch.float64) -> Rng:
    return Stream(0).child(name).rng(dtype)


def bent(flow: Flow, size: float = 0.5) -> Flow:
    """A copy whose parameters are moved by `size` of what networks start with: no family is the identity any more."""
    flow, noise = flow.copy(), rng("bend", flow.dtype)
    for p in flow.parameters():
        p.add_(size / math.sqrt(p.shape[-1]) * noise.normal(*p.shape))
    return flow


def shear(dim: int, dtype: torch.dtype = torch.float64) -> Dense:
    L = torch.eye(dim, dtype=dtype) + 0.3 * torch.ones(dim, dim, dtype=dtype).tril(-1)
    return Dense(torch.arange(dim, dtype=dtype), L * torch.linspace(0.5, 2.0, dim, dtype=dtype)[:, None])


def made(name: str, dim: int = 5, dtype: torch.dtype = torch.float64, whitening: Any = "shear", **options: Any) -> Flow:
    white = shear(dim, dtype) if whitening == "shear" else whitening
    return bent(make_flow(name, dim, rng("init", dtype), whitening=white, **options))


def autodiff_log_det(flow: Flow, z: Tensor) -> Tensor:
    jacobians = [torch.autograd.functional.jacobian(lambda u: flow.push(u[None])[0][0], row) for row in z]
    return torch.linalg.slogdet(torch.stack(jacobians))[1]


# ---- every family ----


@pytest.mark.parametrize("name", NAMES)
def test_log_det_is_that_of_the_autodiff_jacobian(name: str) -> None:
    flow, z = made(name), 1.5 * rng().normal(6, 5)
    x, log_det = flow.push(z)
    assert (log_det - autodiff_log_det(flow, z)).abs().max() < ROUNDING[name]
    assert (x - flow.whitening.push(z)[0]).abs().max() > 0.05  # type: ignore[union-attr]  # it does bend


@pytest.mark.parametrize("name", NAMES)
def test_starts_near_the_identity(name: str) -> None:
    flow, z = make_flow(name, 5, rng()), rng().normal(200, 5)
    x, log_det = flow.push(z)
    close = 0.6 if name == "gaussianization" else 1e-9  # rotated, and its components start apart: near the identity in law
    assert log_det.abs().max() < close * 5
    assert (x.norm(dim=-1) - z.norm(dim=-1)).abs().max() < close


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_or_a_clear_refusal(name: str) -> None:
    flow, z = made(name), 1.5 * rng().normal(50, 5)
    x, log_det = flow.push(z)
    assert flow.has_pull == (name in CHEAP)
    if not flow.has_pull:
        with pytest.raises(NoInverse, match="realnvp"):
            flow.pull(x)
    back, log_det_back = flow.pull(x, slowly=not flow.has_pull)
    assert (back - z).abs().max() < ROUNDING[name] and (log_det + log_det_back).abs().max() < ROUNDING[name]


@pytest.mark.parametrize("name", NAMES)
def test_float32_holds_in_the_tails(name: str) -> None:
    """Ten standard deviations out: finite, with log-dets and round trips as in float64 up to float32's rounding."""
    dim = 4
    wide, narrow = made(name, dim, whitening=None), made(name, dim, whitening=None).to(dtype=torch.float32)
    z = torch.cat([-10 * torch.eye(dim), 10 * torch.eye(dim), 5 * torch.ones(1, dim)]).double()
    (x, log_det), (x32, log_det32) = wide.push(z), narrow.push(z.float())
    assert x32.dtype == torch.float32 and bool(x32.isfinite().all())
    assert (x - x32).abs().max() < 1e-3 * x.abs().max() and (log_det - log_det32).abs().max() < 2e-3
    assert (narrow.pull(x32, slowly=True)[0] - z.float()).abs().max() < 2e-2


@pytest.mark.parametrize("name", NAMES)
def test_saved_in_plain_files_and_back(name: str, tmp_path: Path) -> None:
    flow = made(name, layers=3) if name in ("realnvp", "iaf") else made(name)
    tensors, config = flow.state()
    save_file({key: t.contiguous() for key, t in tensors.items()}, tmp_path / "flow.safetensors")
    again = Flow.from_state(load_file(tmp_path / "flow.safetensors"), json.loads(json.dumps(config)))
    z = rng().normal(9, 5)
    for a, b in zip(flow.push(z), again.push(z), strict=True):
        assert torch.equal(a, b)
    assert repr(again) == repr(flow) and again.base == flow.base


@pytest.mark.parametrize("name", NAMES)
def test_one_pass_gives_draws_and_their_density(name: str) -> None:
    flow = made(name)
    x, log_q, z = flow.sample_and_log_prob(10, rng("draws"))
    assert log_q.dtype == torch.float64 and torch.equal(x, flow.push(z)[0])
    assert (log_q - (flow.base.log_prob(z) - autodiff_log_det(flow, z))).abs().max() < ROUNDING[name]
    if flow.has_pull:
        assert (flow.log_prob(x) - log_q).abs().max() < 5 * ROUNDING[name]


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bits_and_the_global_generator_untouched(name: str) -> None:
    before = torch.random.get_rng_state()
    one, two, other = (make_flow(name, 4, Stream(seed).rng()) for seed in (0, 0, 1))
    pairs = list(zip(one.state()[0].values(), two.state()[0].values(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.equal(one.sample(Stream(5).rng(), 8), two.sample(Stream(5).rng(), 8))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
def test_repr_says_what_it_is(name: str) -> None:
    text = repr(make_flow(name, 3, rng(), hidden=(32,)) if name != "gaussianization" else make_flow(name, 3, rng(), components=4))
    for word in (name, "dim=3", "DefensiveBase(dim=3, share=0.1", "parameters=", "float64"):
        assert word in text
    assert "hidden=(32,)" in text or "components=4" in text


@pytest.mark.parametrize("name", NAMES)
def test_one_and_two_dimensions(name: str) -> None:
    for dim in (1, 2):
        flow, z = made(name, dim), rng().normal(5, dim)
        assert (flow.push(z)[1] - autodiff_log_det(flow, z)).abs().max() < ROUNDING[name]


# ---- as a map ----


def skewed(x: Tensor) -> Tensor:
    return -0.5 * x.square().sum(-1) - 0.1 * x[..., 0].exp() - 0.05 * x.pow(4).sum(-1)


@pytest.mark.parametrize("name", NAMES)
def test_the_pullback_has_the_right_gradient(name: str) -> None:
    flow = made(name, tolerance=1e-10) if name == "ffjord" else made(name)
    target, z = Pullback(bz.from_log_prob(skewed, dim=5), flow), rng().normal(4, 5)
    log_p, grad = log_prob_and_grad(target, z)
    e = 1e-5 * torch.eye(5, dtype=torch.float64)
    numeric = torch.stack([(target.log_prob(z + d) - target.log_prob(z - d)) / 2e-5 for d in e], -1)
    assert (grad - numeric).abs().max() < 1e-5
    assert (log_p - target.log_prob(z)).abs().max() < 1e-12
    assert not any(p.requires_grad for p in flow.parameters())


def test_affine_flows_compile_as_one_graph() -> None:
    flow = made("affine-iaf", 3)
    target, z = Pullback(bz.from_log_prob(skewed, dim=3), flow), rng().normal(16, 3)
    with torch.no_grad():
        compiled = compile_whole(lambda z: log_prob_and_grad(target, z))(z)
    for a, b in zip(compiled, log_prob_and_grad(target, z), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_batches_of_any_shape() -> None:
    flow, z = made("realnvp"), rng().normal(24, 5)
    flat, folded = flow.push(z), flow.push(z.reshape(2, 3, 4, 5))
    assert (folded[0].reshape(24, 5) - flat[0]).abs().max() < 1e-12 and folded[1].shape == (2, 3, 4)


# ---- what only some have ----


def test_splines_say_what_lies_beyond_their_interval() -> None:
    flow = make_flow("spline-coupling", 2, rng(), whitening=Diagonal(torch.tensor([1.0, 0.0]).double(), torch.tensor([1.0, 2.0]).double()))
    scale = list(flow.layers.layers)[-1]  # type: ignore[arg-type]
    scale.s.fill_(math.log(3.0))
    x = torch.tensor([[30.9, 0.0], [31.1, 0.0], [0.0, 59.9], [0.0, -60.1]], dtype=torch.float64)  # 1 + 3 * 10 and 2 * 3 * 10
    assert float(flow.out_of_range(x)) == 0.5
    assert float(make_flow("realnvp", 2, rng()).out_of_range(1e6 * x)) == 0.0


def test_hutchinson_is_unbiased_and_says_its_noise() -> None:
    """128 points; z-test of the mean error at 4.5 standard errors (false failures: 7e-6), with the noise that it states itself."""
    exact, noisy = made("ffjord", 4, whitening=None), made("ffjord", 4, whitening=None, probes=2)
    noisy.layers.load_state_dict(exact.layers.state_dict())
    z = rng().normal(128, 4)
    error = noisy.push(z)[1] - exact.push(z)[1]
    variance = noisy.layers.layers[0].log_det_variance(z)  # type: ignore[index, union-attr, operator]
    assert error.abs().max() > 1e-3 and error.mean().abs() < 4.5 * error.std() / math.sqrt(128)
    assert 0.5 < variance.mean() / error.square().mean() < 2.0
    assert torch.equal(noisy.push(z)[1], noisy.push(z)[1])  # a function of z


def test_unknown_names_say_what_is_known() -> None:
    with pytest.raises(ValueError, match="known ones: affine-iaf, realnvp"):
        make_flow("glow", 3, rng())
    with pytest.raises(ValueError, match="has no option 'depth'; it has layers, hidden"):
        make_flow("realnvp", 3, rng(), depth=3)
    with pytest.raises(TypeError, match="from_zuko"):
        Flow(Normal(2), torch.nn.Linear(2, 2))


# ---- flows made elsewhere ----


@pytest.mark.parametrize("family", [zuko.flows.MAF, zuko.flows.NSF, zuko.flows.NICE, zuko.flows.SOSPF])
def test_zuko_flows_in_both_directions(family: Any) -> None:
    torch.manual_seed(0)
    theirs = family(3, transforms=2, hidden_features=(16,)).double()
    x = rng().normal(7, 3)
    as_trained = Flow.from_zuko(theirs, base=Normal(3))
    if family is not zuko.flows.SOSPF:  # its inverse is a bisection to 1e-6
        assert (as_trained.log_prob(x) - theirs().log_prob(x)).abs().max() < 1e-6
    forward = Flow.from_zuko(theirs, one_pass=True)
    assert (forward.push(x)[1] - autodiff_log_det(forward, x)).abs().max() < 1e-6
    tensors, config = forward.state()
    with pytest.raises(ValueError, match="pass layers="):
        Flow.from_state(tensors, config)
    again = Flow.from_state(tensors, config, layers=forward.layers)
    assert torch.equal(again.push(x)[0], forward.push(x)[0])


@pytest.mark.parametrize("make", ["affine_autoregressive", "affine_coupling", "planar", "permute"])
def test_pyro_transforms(make: str) -> None:
    torch.manual_seed(0)
    theirs = [getattr(pyro_transforms, make)(3), pyro_transforms.affine_coupling(3)]
    flow = bent(Flow.from_pyro(theirs, dim=3).to(dtype=torch.float64), 0.2)
    z = rng().normal(6, 3)
    x, log_det = flow.push(z)
    assert (log_det - autodiff_log_det(flow, z)).abs().max() < 1e-9
    if make in ("affine_coupling", "permute"):
        assert flow.has_pull and (flow.pull(x)[0] - z).abs().max() < 1e-9


def test_pyro_transforms_that_are_wrong_are_refused() -> None:
    with pytest.raises(ValueError, match="Sylvester"):
        Flow.from_pyro([pyro_transforms.sylvester(3)], dim=3)
    with pytest.raises(ValueError, match="quadratic"):
        Flow.from_pyro([pyro_transforms.spline(3, order="quadratic")], dim=3)


# ---- bases ----

BASES = [DefensiveBase(3), DefensiveBase(3, df=None), DefensiveBase(3, share=0.2, scale=2.0, df=7), Normal(3, 1.5)]


@pytest.mark.parametrize("base", BASES, ids=repr)
def test_bases_integrate_to_one_from_both_sides(base: Any) -> None:
    """E_q[p/q] = 1 both ways for p = N(0, 1.1^2 I) and q the base: |z| < 4.5 (false failures: 7e-6)."""
    other, n = Normal(3, 1.1), 100_000
    for drawn, against in ((base, other), (other, base)):
        x = drawn.sample(rng(), n)
        ratio = (against.log_prob(x) - drawn.log_prob(x)).exp()
        assert abs(float(ratio.mean()) - 1) < 4.5 * float(ratio.std()) / math.sqrt(n)


@pytest.mark.parametrize("base", BASES, ids=repr)
def test_gradients_of_bases(base: Any) -> None:
    z = (2 * rng().normal(20, 3)).requires_grad_()
    (grad,) = torch.autograd.grad(base.log_prob(z).sum(), z)
    assert (grad - base.grad_log_prob(z.detach())).abs().max() < 1e-12


@pytest.mark.parametrize("df", [None, 5])
def test_every_tenth_draw_is_wide(df: int | None) -> None:
    base = DefensiveBase(2, scale=1e3, df=df)
    z = base.sample(rng(), 1_000)
    assert torch.equal(z.norm(dim=-1) > 8, base.is_wide(1_000)) and int(base.is_wide(1_000).sum()) == 100
    assert torch.equal(base.is_wide(25).nonzero().flatten(), torch.tensor([9, 19]))


def test_shares_that_cannot_be_dealt_are_refused() -> None:
    with pytest.raises(ValueError, match="wanted 1/k"):
        DefensiveBase(2, share=0.15)


def test_importing_flows_leaves_torch_as_it_was() -> None:
    """zuko switches the argument checks of torch.distributions off for everybody; we switch them back."""
    code = "from torch.distributions import Distribution as D; a = D._validate_args; import boltzsample.flows; assert D._validate_args is a"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_file(tmp_path: Path) -> None:
    one = torch.ones(3).double()
    flow = make_flow("realnvp", 3, Stream(0).rng(), base=DefensiveBase(3), whitening=Diagonal(one, 2 * one))
    back = Flow.load(flow.save(tmp_path / "flow.safetensors"))
    z = Stream(1).rng().normal(5, 3)
    assert repr(back) == repr(flow) and torch.equal(back.push(z)[0], flow.push(z)[0])
    (tmp_path / "not").write_text("a flow")
    with pytest.raises(ValueError, match=r"wanted one that flow\.save wrote"):
        Flow.load(tmp_path / "not")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="no flow"):
        Flow.load(tmp_path / "other")


def test_gaussianization_is_inverted_in_the_far_tails() -> None:
    """One component is the identity, thirty standard deviations out too, where cdfs are 0 or 1; gradients are those of the inverse."""
    one, x = Gaussianize(2, 1), torch.tensor([[-30.0, 30.0], [0.3, 60.0]])
    z, log_det = one.pull(x)
    assert (z - x).abs().max() < 1e-4 and log_det.abs().max() < 1e-3
    g = torch.Generator().manual_seed(0)
    bent = Gaussianize(2, 4).double().requires_grad_(False)
    bent.a.copy_(0.5 * torch.randn(2, 4, generator=g))
    bent.b.copy_(torch.randn(2, 4, generator=g))
    assert torch.autograd.gradcheck(bent.pull, (torch.randn(3, 2, generator=g, dtype=torch.float64).requires_grad_(),))


def test_zuko_inverses_are_asked_only_where_they_are_exact() -> None:
    maf, sos = zuko.flows.MAF(3, transforms=2), zuko.flows.SOSPF(3, transforms=1)
    slow, none = Flow.from_zuko(maf, one_pass=True), Flow.from_zuko(sos, one_pass=True)
    assert not slow.has_pull and slow.inverts and not none.inverts
    z = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    assert (slow.pull(slow.push(z)[0], slowly=True)[0] - z).abs().max() < 1e-4
    with pytest.raises(NoInverse):
        none.pull(z, slowly=True)
