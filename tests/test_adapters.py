"""from_torch_distribution, from_numpy and from_jax: the same density as torch computes, its gradient, its errors, and whole runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributions as D
from torch.distributions import constraints, transforms

import boltzsample as bz
from boltzsample import errors
from boltzsample.constraints import UnsupportedSupport
from boltzsample.preflight import check_gradient, check_interface
from boltzsample.target import readout
from tests import small

F64 = torch.float64


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def points(n: int, dim: int, seed: int = 2) -> Tensor:
    return torch.randn(n, dim, dtype=F64, generator=torch.Generator().manual_seed(seed))


def moments_hold(result: bz.Result, f: Callable[[Any], Tensor], truth: Tensor | float) -> None:
    """E f of the run lies within 4.5 standard errors of the truth, and the error is small enough to mean something."""
    estimate = result.expectation(f)
    assert (estimate.stderr < 0.2).all()
    assert ((estimate.value - truth).abs() < 4.5 * estimate.stderr).all(), (estimate.value, truth, estimate.stderr)


# ---- torch.distributions ------------------------------------------------------------------------------------------------------

MIX = D.Categorical(t(0.3, 0.7))
SHIFTED = D.TransformedDistribution(D.Exponential(torch.ones(2)), [transforms.AffineTransform(1.0, 2.0)])
SCALARS = {
    "normal": D.Normal(t(1.0)[0], 2.0),
    "half-cauchy": D.HalfCauchy(t(2.0)[0]),
    "lognormal": D.LogNormal(t(0.3)[0], 0.5),
    "gamma below 1": D.Gamma(t(0.3)[0], 2.0),
    "beta": D.Beta(t(0.5)[0], 2.0),
    "uniform": D.Uniform(t(-1.0)[0], 3.0),
    "pareto": D.Pareto(t(2.0)[0], 3.0),
    "weibull": D.Weibull(t(2.0)[0], 1.5),
    "mixture of normals": D.MixtureSameFamily(MIX, D.Normal(t(-3.0, 2.0), t(0.5, 1.0))),
    "mixture of betas": D.MixtureSameFamily(MIX, D.Beta(t(2.0, 9.0), t(8.0, 3.0))),
    "mixture of gammas": D.MixtureSameFamily(MIX, D.Gamma(t(2.0, 9.0), t(8.0, 3.0))),
    "1 + 2 y, y exponential": D.TransformedDistribution(D.Exponential(t(1.0)[0]), [transforms.AffineTransform(1.0, 2.0)]),
    "1 + 2 y, y gamma": D.TransformedDistribution(D.Gamma(t(0.3)[0], 1.0), [transforms.AffineTransform(t(1.0)[0], 2.0)]),
    "logit-normal": D.TransformedDistribution(D.Normal(t(0.5)[0], 1.5), [transforms.SigmoidTransform()]),
    "log of a beta": D.TransformedDistribution(D.Beta(t(2.0)[0], 3.0), [transforms.ExpTransform().inv]),
    "two transforms": D.TransformedDistribution(
        D.Normal(t(0.5)[0], 0.5), [transforms.ExpTransform(), transforms.AffineTransform(1.0, -2.0)]
    ),
}
SHAPED = {
    "mvn": D.MultivariateNormal(t(1.0, -1.0), torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=F64)),
    "dirichlet": D.Dirichlet(t(0.5, 2.0, 3.0)),
    "independent": D.Independent(D.Gamma(t(1.0, 3.0), 1.0), 1),
    "mixture of mvns": D.MixtureSameFamily(MIX, D.Independent(D.Normal(torch.zeros(2, 3, dtype=F64), t(1.0, 2.0, 3.0)), 1)),
    "lkj": D.LKJCholesky(3, t(2.0)[0]),
    "wishart": D.Wishart(t(5.0)[0], torch.eye(2, dtype=F64)),
    "logistic-normal": D.LogisticNormal(t(0.5, -0.5), t(1.0, 2.0)),
    "independent, transformed": D.Independent(
        D.TransformedDistribution(D.Exponential(t(1.0, 2.0)), [transforms.AffineTransform(1.0, 2.0)]), 1
    ),
    "softmax": D.TransformedDistribution(D.Normal(t(0.5, 1.0), 1.0), [transforms.StickBreakingTransform()]),
}


@pytest.mark.parametrize("name", SCALARS)
def test_scalar_laws_integrate_to_one_and_have_their_mean_and_gradient(name: str) -> None:
    """By quadrature in z: the integral is 1, P(x < q) that of 20,000 draws of the law itself."""
    law = SCALARS[name]
    target = bz.from_torch_distribution(law)
    assert target.dim == 1
    z = torch.linspace(-120, 120, 480_001, dtype=F64)[:, None]
    p = target.log_prob(z).exp().nan_to_num()
    assert torch.trapezoid(p, z[:, 0]) == pytest.approx(1.0, abs=2e-6)
    x = readout(target, z)
    assert isinstance(x, Tensor) and x.shape == (len(z),)
    torch.manual_seed(1)
    q = law.sample((20_000,)).quantile(t(0.1, 0.5, 0.9))
    below = torch.stack([torch.trapezoid(p * (x <= qi), z[:, 0]) for qi in q])
    torch.testing.assert_close(below, t(0.1, 0.5, 0.9), atol=0.012, rtol=0.0)  # 4.5 sd of 20,000 draws: 0.016 at the median
    check_interface(target, points(4, 1))
    check_gradient(target, points(4, 1))


@pytest.mark.parametrize("name", SHAPED)
def test_shaped_laws_agree_with_torch_plus_jacobian(name: str) -> None:
    law = SHAPED[name]
    target = bz.from_torch_distribution(law)
    z = points(6, target.dim)
    x = readout(target, z)
    assert isinstance(x, Tensor) and x.shape == (6, *law.event_shape) and law.support.check(x).all()
    free = {"lkj": lambda y: y[..., [1, 2, 2], [0, 0, 1]], "wishart": lambda y: y[..., [0, 1, 1], [0, 0, 1]]}.get(
        name, lambda y: y[..., : target.dim]
    )
    steps = 1e-6 * torch.eye(target.dim, dtype=F64)
    columns = [(free(readout(target, z + h)) - free(readout(target, z - h))) / 2e-6 for h in steps]
    log_det = torch.linalg.slogdet(torch.stack(columns, -1))[1]
    torch.testing.assert_close(target.log_prob(z), law.log_prob(x) + log_det, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(target.pull(x), z)  # type: ignore[attr-defined]
    check_interface(target, z)
    check_gradient(target, z)


def test_a_law_follows_dtype_and_is_copied() -> None:
    mean = torch.zeros(2)
    law = D.MultivariateNormal(mean, torch.eye(2), validate_args=True)
    target = bz.from_torch_distribution(law)
    for dtype in (F64, torch.float32):
        assert target.log_prob(torch.ones(3, 2, dtype=dtype)).dtype == dtype
    shift = torch.zeros(())
    image = bz.from_torch_distribution(D.TransformedDistribution(D.Exponential(1.0), [transforms.AffineTransform(shift, 2.0)]))
    mean += 5.0
    shift += 5.0
    assert readout(image, torch.zeros(1, 1)).item() == 2.0  # type: ignore[union-attr]
    assert target.log_prob(torch.zeros(1, 2)).item() == pytest.approx(-1.8379, abs=1e-4)
    assert law._validate_args and target.log_prob(torch.full((1, 2), torch.nan)).isnan().all()  # where the law itself raises


def test_a_mixture_through_sample() -> None:
    law = D.MixtureSameFamily(D.Categorical(torch.tensor([0.3, 0.7])), D.Gamma(torch.tensor([2.0, 6.0]), torch.tensor([2.0, 2.0])))
    result = small.sample(bz.from_torch_distribution(law, names=["rate"]), n=3200)
    moments_hold(result, lambda x: x, 0.3 * 1.0 + 0.7 * 3.0)
    assert result.labels == ("rate",)


def test_a_transformed_law_through_sample_with_starts() -> None:
    target = bz.from_torch_distribution(D.Independent(SHIFTED, 1))
    result = small.sample(target, n=3200, starts=torch.tensor([[2.0, 3.0], [1.5, 9.0]]))
    assert (result.values > 1.0).all()  # type: ignore[operator]
    moments_hold(result, lambda x: x[..., 0], 3.0)
    moments_hold(result, lambda x: (x[..., 0] - 1).log(), np.log(2.0) - 0.5772156649)


@pytest.mark.parametrize(
    ("law", "error", "words"),
    [
        (D.Poisson(3.0), UnsupportedSupport, "Poisson is discrete"),
        (D.MixtureSameFamily(D.Categorical(torch.ones(2)), D.Poisson(torch.ones(2))), UnsupportedSupport, "of Poisson is discrete"),
        (D.VonMises(0.0, 1.0), UnsupportedSupport, "VonMises cannot be sampled: its support is a circle"),
        (D.Independent(D.VonMises(torch.zeros(2), torch.ones(2)), 1), UnsupportedSupport, "VonMises cannot"),
        (D.Normal(torch.zeros(3), 1.0), errors.ShapeError, r"batch_shape \(3,\).*Independent\(dist, 1\)"),
        (
            D.MixtureSameFamily(D.Categorical(torch.ones(2)), D.Uniform(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0]))),
            UnsupportedSupport,
            "components with bounds of their own",
        ),
        (D.MixtureSameFamily(D.Categorical(torch.ones(2)), SHIFTED), UnsupportedSupport, "transformed components"),
        ("Normal", TypeError, "dist is a str"),
    ],
)
def test_laws_that_are_refused(law: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        bz.from_torch_distribution(law)


def test_names_of_a_law() -> None:
    with pytest.raises(errors.ShapeError, match="1 entries for an event of 2"):
        bz.from_torch_distribution(D.Independent(D.Normal(torch.zeros(2), 1.0), 1), names=["a"])


# ---- NumPy --------------------------------------------------------------------------------------------------------------------

SHAPE = np.array([1.0, 2.0, 3.0])


def log_gammas(x: Any) -> Any:
    return (SHAPE.astype(x.dtype) * x - np.exp(x)).sum(-1)


def slope(x: Any) -> Any:
    return SHAPE.astype(x.dtype) - np.exp(x)


def both(x: Any) -> tuple[Any, Any]:
    return log_gammas(x), slope(x)


def in_torch(x: Tensor) -> Tensor:
    return (torch.as_tensor(SHAPE).to(x) * x - x.exp()).sum(-1)


NUMPY = {
    "grad": lambda: bz.from_numpy(log_gammas, 3, grad=slope),
    "value_and_grad": lambda: bz.from_numpy(log_gammas, 3, value_and_grad=both),
    "one point": lambda: bz.from_numpy(lambda x: float(log_gammas(x)), 3, grad=slope, vectorized=False),
    "one point, both": lambda: bz.from_numpy(log_gammas, 3, value_and_grad=both, vectorized=False),
}


@pytest.mark.parametrize("kind", NUMPY)
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_numpy_is_what_torch_computes(kind: str, batch: tuple[int, ...], dtype: torch.dtype) -> None:
    target = NUMPY[kind]()
    x = points(6, 3)[: int(np.prod(batch))].reshape(*batch, 3).to(dtype)
    log_p, grad = bz.log_prob_and_grad(target, x)
    assert log_p.dtype == grad.dtype == dtype and log_p.shape == batch and grad.shape == x.shape
    torch.testing.assert_close(log_p, in_torch(x))
    torch.testing.assert_close(target.log_prob(x), in_torch(x))
    torch.testing.assert_close(grad, torch.as_tensor(SHAPE).to(x) - x.exp())


@pytest.mark.parametrize("kind", NUMPY)
def test_numpy_passes_preflight(kind: str) -> None:
    assert check_interface(NUMPY[kind](), points(4, 3)).has_gradient
    check_gradient(NUMPY[kind](), points(4, 3))


def test_numpy_inside_of_torch_code() -> None:
    """autograd, torch.func and vmap see the density; the sum of two densities is one."""
    target, x = NUMPY["grad"](), points(5, 3)
    truth = torch.as_tensor(SHAPE) - x.exp()
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(target.log_prob))(x), truth)
    twice = torch.func.vmap(torch.func.vmap(target.log_prob), in_dims=1, out_dims=1)
    torch.testing.assert_close(twice(x[:4].reshape(2, 2, 3)), in_torch(x[:4]).reshape(2, 2))
    doubled = bz.from_log_prob(lambda y: 2 * target.log_prob(y), dim=3)
    torch.testing.assert_close(doubled.grad_log_prob(x), 2 * truth)
    with torch.no_grad():
        y = x.clone().requires_grad_()
    assert not target.log_prob(x).requires_grad and target.log_prob(y).requires_grad
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        (g,) = torch.autograd.grad(target.log_prob(y).sum(), y, create_graph=True)
        torch.autograd.grad(g.sum(), y)


def test_numpy_shares_no_memory() -> None:
    kept: list[Any] = []

    def rude(x: Any) -> Any:
        kept.append(x)
        out = -0.5 * (x**2).sum(-1)
        x *= 0.0
        kept.append(out)
        return out

    target, x = bz.from_numpy(rude, 2), points(4, 2)
    before = x.clone()
    log_p = target.log_prob(x)
    kept[1][:] = 7.0
    assert torch.equal(x, before)
    torch.testing.assert_close(log_p, -0.5 * x.square().sum(-1))
    view = bz.from_numpy(lambda x: x[:, 0], 1)  # a view of its argument
    torch.testing.assert_close(view.log_prob(x[:, :1]), x[:, 0])


def test_numpy_without_a_gradient() -> None:
    target = bz.from_numpy(log_gammas, 3)
    with pytest.raises(errors.NoGradient, match="grad= or value_and_grad="):
        target.grad_log_prob(points(2, 3))
    with pytest.raises(errors.NoGradient):
        bz.from_log_prob(lambda x: target.log_prob(x), dim=3).grad_log_prob(points(2, 3))
    with pytest.raises(errors.NoGradient):
        torch.func.grad(target.log_prob)(points(1, 3)[0])
    assert not check_interface(target, points(4, 3)).has_gradient
    result = small.sample(target, n=6400)
    moments_hold(result, lambda x: x.exp().sum(-1), 6.0)
    assert all(rows[1] == 0 for phase, rows in result.ledger.items() if phase != "preflight")  # which asks once and is refused


def test_numpy_with_a_gradient_through_sample() -> None:
    result = small.sample(bz.from_numpy(log_gammas, 3, value_and_grad=both, names=["a", "b", "c"]), n=3200)
    moments_hold(result, lambda x: x.exp(), torch.as_tensor(SHAPE))
    assert result.labels == ("a", "b", "c")


def test_numpy_on_a_support_and_with_a_shape() -> None:
    target = bz.from_numpy(lambda x: (2 * np.log(x) - x).sum(-1), 2, grad=lambda x: 2 / x - 1, support=constraints.positive)
    check_gradient(target, points(4, 2))
    z = points(5, 2)
    torch.testing.assert_close(target.log_prob(z), (3 * z - z.exp()).sum(-1))
    matrix = bz.from_numpy(lambda x: -0.5 * np.einsum("nij,nij->n", x, x), 4, grad=lambda x: -x, event_shape=(2, 2))
    torch.testing.assert_close(matrix.grad_log_prob(points(3, 4)), -points(3, 4))
    assert readout(matrix, points(3, 4)).shape == (3, 2, 2)  # type: ignore[union-attr]


def test_numpy_rejects_points() -> None:
    def fn(x: Any) -> Any:
        if (x[..., 0] < 0).any():
            raise bz.RejectPoint
        return both(x)

    target = bz.from_numpy(lambda x: fn(x)[0], 3, value_and_grad=fn)
    x = t(1.0, 0.5, 0.2, -1.0, 0.1, 0.3).reshape(2, 3)
    log_p, grad = bz.log_prob_and_grad(target, x)
    assert log_p[1] == -torch.inf and target.log_prob(x)[1] == -torch.inf and (grad[1] == 0).all()
    torch.testing.assert_close(log_p[0], in_torch(x[0]))


def test_numpy_is_silent_about_overflow_and_leaves_its_settings() -> None:
    before = np.geterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert NUMPY["grad"]().log_prob(torch.full((1, 3), 1e6, dtype=F64)) == -torch.inf
    assert np.geterr() == before


@pytest.mark.parametrize(
    ("fn", "error", "words"),
    [
        (lambda x: log_gammas(x)[:, None], errors.ShapeError, r"shape \(4, 1\) for 4 points, wanted \(4,\)"),
        (lambda x: log_gammas(x).sum(), errors.ShapeError, r"shape \(\) for 4 points"),
        (lambda x: log_gammas(x).astype(np.float32), errors.DtypeError, "float32 for points of float64"),
        (lambda x: log_gammas(x) + 0j, errors.DtypeError, "complex128"),
        (lambda x: [None] * len(x), errors.DtypeError, "object"),
    ],
)
def test_what_a_numpy_density_may_not_return(fn: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        bz.from_numpy(fn, 3).log_prob(points(4, 3))


def test_numpy_at_the_door() -> None:
    with pytest.raises(TypeError, match="one of them"):
        bz.from_numpy(log_gammas, 3, grad=slope, value_and_grad=both)
    with pytest.raises(errors.ShapeError, match="dim must be"):
        bz.from_numpy(log_gammas, 0)
    with pytest.raises(errors.ShapeError, match=r"grad returned shape \(4, 1\) for 4 points, wanted \(4, 3\)"):
        bz.from_numpy(log_gammas, 3, grad=lambda x: x[:, :1]).grad_log_prob(points(4, 3))
    with pytest.raises(errors.DeviceError, match="got points on meta; sample with device='cpu'"):
        bz.from_numpy(log_gammas, 3).log_prob(torch.empty(2, 3, device="meta"))
    with pytest.raises(ValueError, match="mine"):
        bz.from_numpy(lambda x: _raise(ValueError("mine")), 3).log_prob(points(2, 3))


def _raise(error: Exception) -> None:
    raise error


def test_numpy_is_not_compiled(caplog: pytest.LogCaptureFixture) -> None:
    target = NUMPY["grad"]()
    assert target.compilable is False  # type: ignore[attr-defined]
    with pytest.raises(Exception, match=r"(?s)NotCompilable|Observed exception"):
        torch.compile(target.log_prob, fullgraph=True, backend="eager")(points(2, 3))


# ---- JAX ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def jnp() -> Any:
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield jax.numpy
    jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_jax_is_what_torch_computes(jnp: Any, vectorized: bool, dtype: torch.dtype) -> None:
    target = bz.from_jax(lambda x: (jnp.asarray(SHAPE, x.dtype) * x - jnp.exp(x)).sum(-1), 3, vectorized=vectorized)
    for batch in ((), (1,), (5,), (2, 3), (0,), (13,)):
        x = points(13, 3)[: int(np.prod(batch))].reshape(*batch, 3).to(dtype)
        log_p, grad = bz.log_prob_and_grad(target, x)
        assert log_p.dtype == grad.dtype == dtype
        torch.testing.assert_close(log_p, in_torch(x))
        torch.testing.assert_close(target.log_prob(x), in_torch(x))
        torch.testing.assert_close(grad, torch.as_tensor(SHAPE).to(x) - x.exp())
    check_interface(target, points(4, 3).to(dtype))
    check_gradient(target, points(4, 3).to(dtype))


def test_jax_shares_no_memory(jnp: Any) -> None:
    target, x = bz.from_jax(lambda x: x[0], 1), points(5, 1)  # XLA hands its argument back where it can
    before = x.clone()
    log_p = target.log_prob(x)
    assert log_p.untyped_storage().nbytes() == 5 * 8  # a copy, not a view of JAX's padded 8
    log_p += 5.0
    assert torch.equal(x, before)
    torch.testing.assert_close(target.log_prob(x), before[:, 0])
    x += 1.0
    torch.testing.assert_close(log_p, before[:, 0] + 5.0)


def test_jax_on_a_support_through_sample(jnp: Any) -> None:
    target = bz.from_jax(lambda x: (2 * jnp.log(x) - x).sum(), 2, support=constraints.positive, names=["a", "b"])
    z = points(5, 2)
    torch.testing.assert_close(target.log_prob(z), (3 * z - z.exp()).sum(-1))
    result = small.sample(target, n=3200)
    moments_hold(result, lambda x: x, torch.full((2,), 3.0))
    assert result.labels == ("a", "b")


def test_jax_compiles_few_batch_sizes(jnp: Any) -> None:
    traced: list[Any] = []
    target = bz.from_jax(lambda x: (traced.append(1), -0.5 * (x**2).sum())[1], 2)
    for n in range(1, 65):
        target.log_prob(points(n, 2))
    assert len(traced) == 7  # 8, 12, 16, 24, 32, 48, 64


def test_jax_pads_with_points_of_the_user(jnp: Any) -> None:
    import jax

    with jax.debug_nans(True):  # raises where any value is NaN, in the padding too
        target = bz.from_jax(lambda x: jnp.log(x - 1.0).sum(), 1)
        assert target.log_prob(torch.full((5, 1), 2.0, dtype=F64)).tolist() == [0.0] * 5


def test_jax_errors(jnp: Any) -> None:
    with pytest.raises(errors.ShapeError, match=r"shape \(3,\) for one point, wanted a scalar"):
        bz.from_jax(lambda x: -(x**2), 3).log_prob(points(4, 3))
    with pytest.raises(errors.ShapeError, match=r"shape \(\) for 8 points"):
        bz.from_jax(lambda x: -(x**2).sum(), 3, vectorized=True).log_prob(points(4, 3))
    with pytest.raises(errors.DtypeError, match="float32 for points of float64"):
        bz.from_jax(lambda x: -(x**2).sum().astype("float32"), 3).log_prob(points(4, 3))


def test_jax_in_float32_says_what_to_do_and_changes_nothing() -> None:
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    try:
        target = bz.from_jax(lambda x: -0.5 * (x**2).sum(), 2)
        with pytest.raises(errors.DtypeError, match=r"jax_enable_x64.*dtype=torch\.float32"):
            target.log_prob(points(4, 2))
        assert not jax.config.jax_enable_x64
        assert target.log_prob(points(4, 2).float()).dtype == torch.float32
    finally:
        jax.config.update("jax_enable_x64", before)


def test_jax_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jax", None)
    with pytest.raises(ImportError, match=r"boltzsample\[jax\]"):
        bz.from_jax(lambda x: x, 2)
