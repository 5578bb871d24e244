"""Views against definitions and central differences; every bijection against its autodiff Jacobian, its inverse and known constants."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, distributions
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributions import constraints as C

from boltzsample.adapters import from_log_prob
from boltzsample.bijections import Bijection
from boltzsample.constraints import UnsupportedSupport, bijection
from boltzsample.errors import ShapeError
from boltzsample.maps import Dense, Diagonal, Map
from boltzsample.preflight import check_gradient, check_interface
from boltzsample.target import Target, log_prob_and_grad, readout
from boltzsample.views import Constrained, Observed, Pullback, Tempered


def skewed(x: Tensor) -> Tensor:
    shape = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    return (shape * x - x.exp()).sum(-1)


def points(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def slope(target: Target, x: Tensor, h: float = 1e-6) -> Tensor:
    """The gradient by central differences."""
    steps = h * torch.eye(x.shape[-1], dtype=x.dtype)
    return torch.stack([(target.log_prob(x + e) - target.log_prob(x - e)) / (2 * h) for e in steps], -1)


def agrees(target: Target, x: Tensor) -> None:
    log_p, grad = log_prob_and_grad(target, x)
    torch.testing.assert_close(log_p, target.log_prob(x))
    torch.testing.assert_close(grad, slope(target, x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, target.grad_log_prob(x))


BASE = from_log_prob(skewed, dim=3)
WIDE = from_log_prob(lambda x: -0.02 * x.square().sum(-1), dim=3)


# ---- Tempered, Observed -------------------------------------------------------------------------------------------------------


def test_tempered_by_definition() -> None:
    x, beta = points(2, 4, 3), torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    agrees(Tempered(BASE, beta), x)
    path = Tempered(BASE, beta, WIDE)
    agrees(path, x)
    torch.testing.assert_close(path.log_prob(x), beta * BASE.log_prob(x) + (1 - beta) * WIDE.log_prob(x))


def test_tempered_ends_do_not_ask_the_other_side() -> None:
    half = from_log_prob(lambda x: torch.where(x[:, 0] > 0, skewed(x), -torch.inf), dim=2)
    torn = from_log_prob(lambda x: skewed(x) * torch.nan, dim=2)
    below = torch.tensor([[-1.0, 2.0]])
    zero, one, between = torch.tensor(0.0), torch.tensor(1.0), torch.tensor(0.5)
    for target in (half, torn):
        assert log_prob_and_grad(Tempered(target, zero), below)[0].tolist() == [0.0]
        assert log_prob_and_grad(Tempered(target, zero), below)[1].tolist() == [[0.0, 0.0]]
        path = Tempered(from_log_prob(skewed, dim=2), one, target)
        torch.testing.assert_close(log_prob_and_grad(path, below)[1], from_log_prob(skewed, dim=2).grad_log_prob(below))
    assert Tempered(half, between).log_prob(below).tolist() == [-torch.inf]


def test_observed_by_definition() -> None:
    x, y = points(2, 4, 3), points(4, 3) + 1
    alpha = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)
    sigma = torch.tensor([[0.3], [1.7]], dtype=torch.float64)
    view = Observed(BASE, y, alpha, sigma)
    agrees(view, x)
    gauss = distributions.Independent(distributions.Normal(alpha[:, None] * x, sigma[..., None].expand(2, 4, 3)), 1)
    constant = 3 * (sigma.log() + 0.5 * math.log(2 * math.pi))
    torch.testing.assert_close(view.log_prob(x), BASE.log_prob(x) + gauss.log_prob(y) + constant)


# ---- Pullback -----------------------------------------------------------------------------------------------------------------

M = torch.tensor([0.4, -1.0, 2.0], dtype=torch.float64)
L = torch.tensor([[2.0, 0.0, 0.0], [-0.7, 0.1, 0.0], [0.3, 1.5, 0.5]], dtype=torch.float64)


class Sinh:
    """A nonlinear map without a push_vjp, coupled by L."""

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = Dense(M, L).push(z.sinh())
        return x, log_det + z.cosh().log().sum(-1)


MAPS: dict[str, Map] = {
    "diagonal": Diagonal(M, torch.tensor([0.5, -2.0, 0.1], dtype=torch.float64)),
    "dense": Dense(M, L),
    "diagonal per lane": Diagonal(M + points(2, 1, 3), points(2, 1, 3).exp()),
    "dense per lane": Dense(M + points(2, 1, 3), torch.stack([L, L @ L])),
    "sinh": Sinh(),
}


@pytest.mark.parametrize("name", MAPS)
def test_pullback(name: str) -> None:
    onto, z = MAPS[name], points(2, 4, 3) / 2
    view = Pullback(BASE, onto)
    agrees(view, z)
    x, log_det = onto.push(z)
    jacobian = torch.autograd.functional.jacobian(lambda z: onto.push(z)[0], z, vectorize=True)
    for i, j in [(0, 0), (1, 3)]:
        torch.testing.assert_close(log_det.expand(2, 4)[i, j], torch.linalg.slogdet(jacobian[i, j, :, i, j])[1])
    torch.testing.assert_close(readout(view, z), x)


@pytest.mark.parametrize("name", ["diagonal", "dense", "diagonal per lane", "dense per lane"])
def test_affine_round_trip(name: str) -> None:
    onto, z = MAPS[name], points(2, 4, 3)
    assert isinstance(onto, (Diagonal, Dense))
    torch.testing.assert_close(onto.pull(onto.push(z)[0]), z)


@pytest.mark.parametrize("name", ["diagonal", "dense", "sinh"])
def test_pullback_of_a_single_point(name: str) -> None:
    view, z = Pullback(BASE, MAPS[name]), points(3)
    log_p, grad = log_prob_and_grad(view, z)
    assert log_p.shape == () and grad.shape == (3,)
    torch.testing.assert_close(grad, log_prob_and_grad(view, z[None])[1][0])


class Analytic:
    """A base that autograd cannot see through, with a readout."""

    dim = 3

    def log_prob(self, x: Tensor) -> Tensor:
        return skewed(x.detach())

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return torch.arange(1, 4, dtype=x.dtype) - x.detach().exp()

    def readout(self, x: Tensor) -> dict[str, Tensor]:
        return {"rate": x.exp()}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_nobody_differentiates_through_the_base(mode: type[torch.no_grad]) -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    nested = Tempered(Observed(Pullback(Analytic(), Sinh()), points(4, 3), one, one), 0.4 * one)
    with mode():
        z = points(4, 3) / 2
        agrees(nested, z)
        read = readout(nested, z)
    assert isinstance(read, dict)
    torch.testing.assert_close(read["rate"], Sinh().push(z)[0].exp())


def test_readout_is_the_point_itself_by_default() -> None:
    x = points(2, 3)
    assert readout(Tempered(BASE, torch.tensor(0.5)), x) is x


def test_one_graph_serves_every_number() -> None:
    compiles = CompileCounterWithBackend("eager")

    def step(z: Tensor, beta: Tensor, y: Tensor, m: Tensor, s: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        seen = Observed(Tempered(BASE, beta, WIDE), y, beta, beta + 1)
        return log_prob_and_grad(Pullback(Pullback(seen, Diagonal(m, s)), Dense(m, factor)), z)

    compiled = torch.compile(step, backend=compiles, fullgraph=True)
    with torch.no_grad():
        for k in range(1, 6):
            args = points(4, 3) / k, torch.rand(4, dtype=torch.float64), points(4, 3) * k, M * k, M.abs() + k, L / k
            torch.testing.assert_close(compiled(*args), step(*args))
    assert compiles.frame_count == 1


# ---- Constrained --------------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[C.Constraint, tuple[int, ...], int]] = {
    "real": (C.real, (3,), 3),
    "real vector": (C.real_vector, (3,), 3),
    "positive": (C.positive, (2, 2), 4),
    "nonnegative": (C.nonnegative, (2,), 2),
    "greater than": (C.greater_than(torch.tensor([-1.0, 2.0, 5.0])), (3,), 3),
    "greater or equal": (C.greater_than_eq(-3), (2,), 2),
    "less than": (C.less_than(-2.5), (2,), 2),
    "interval": (C.interval(-1, torch.tensor([0.5, 2.0])), (3, 2), 6),
    "half-open": (C.half_open_interval(1.0, 4.5), (2,), 2),
    "unit, a scalar": (C.unit_interval, (), 1),
    "simplex": (C.simplex, (4,), 3),
    "simplices": (C.independent(C.simplex, 1), (2, 3), 4),
    "lower Cholesky": (C.lower_cholesky, (3, 3), 6),
    "lower Choleskys": (C.lower_cholesky, (2, 2, 2), 6),
    "positive definite": (C.positive_definite, (3, 3), 6),
    "positive definites": (C.positive_definite, (2, 2, 2), 6),
    "correlation": (C.corr_cholesky, (4, 4), 6),
    "correlations": (C.corr_cholesky, (2, 3, 3), 6),
    "cat": (C.cat([C.positive, C.real, C.simplex], dim=-1, lengths=[1, 2, 3]), (6,), 5),
    "cat of rows": (C.cat([C.simplex, C.positive], dim=0, lengths=[1, 2]), (3, 3), 8),
    "stack": (C.stack([C.real, C.positive, C.interval(-1, 3)], dim=0), (3,), 3),
    "stack of columns": (C.stack([C.simplex, C.positive], dim=-1), (3, 2), 5),
}


def free(name: str, x: Tensor) -> Tensor:
    """The free coordinates of x (..., *event): what its density is a density of."""
    if "simpl" in name:
        return x[..., :-1]
    if "orrelation" in name or "olesky" in name or "definite" in name:
        i, j = torch.tril_indices(x.shape[-1], x.shape[-1], -1 if "orrelation" in name else 0)
        return x[..., i, j]
    if name == "cat":
        return x[..., :-1]
    if name == "cat of rows":
        return x.flatten(-2)[..., [0, 1, 3, 4, 5, 6, 7, 8]]
    return x.flatten(-2)[..., [0, 1, 2, 3, 5]] if name == "stack of columns" else x


def jacobian(name: str, onto: Bijection, z: Tensor, shape: tuple[int, ...]) -> Tensor:
    """log|det| of the free coordinates by autodiff; z (size,)."""
    matrix = torch.func.jacrev(lambda z: free(name, onto.push(z)[0].reshape(shape)).reshape(-1))(z)
    return torch.linalg.slogdet(matrix)[1]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("width", [1.0, 3.0])
def test_log_det_and_round_trip(name: str, width: float) -> None:
    support, shape, size = CASES[name]
    onto = bijection(support, torch.Size(shape))
    assert onto.size == size
    z = width * points(2, 5, size)
    x, log_det = onto.push(z)
    assert x.shape == (2, 5, math.prod(shape)) and log_det.shape == (2, 5)
    for i, j in [(0, 0), (1, 4)]:
        torch.testing.assert_close(log_det[i, j], jacobian(name, onto, z[i, j], shape), rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(onto.pull(x), z, rtol=1e-6, atol=1e-6)
    x32, log_det32 = onto.push(z.float())
    assert x32.dtype == log_det32.dtype == torch.float32
    torch.testing.assert_close(log_det32.double(), log_det, rtol=1e-5, atol=1e-4)
    if not name.startswith(("cat", "stack")):  # torch checks those along an axis of the batch, or not at all
        assert support.check(x.reshape(2, 5, *shape)).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_tails_stay_inside_and_finite(name: str, dtype: torch.dtype) -> None:
    """At |z| = 40 the log-det is a sum of logs of z that never loses its digits, and x never rounds onto the open edge."""
    support, shape, size = CASES[name]
    onto = bijection(support, torch.Size(shape))
    z = 40.0 * torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, size).clone()
    z[0, ::2] = -40.0
    x, log_det = onto.push(z.to(dtype))
    torch.testing.assert_close(log_det.double(), onto.push(z)[1], rtol=1e-6, atol=1e-4)
    assert x.isfinite().all() and log_det.isfinite().all()
    if name in ("positive", "nonnegative", "simplex", "simplices", "cat"):
        assert (free("", x)[:, 0] > 0).all()
    if name == "unit, a scalar":
        assert (x > 0).all() and (x < 1).all()


def test_underflow_stops_short_of_the_edge() -> None:
    far = torch.tensor([[-900.0, 900.0, -900.0]], dtype=torch.float64)
    for onto in (bijection(C.simplex, torch.Size([4])), bijection(C.positive, torch.Size([3]))):
        assert (onto.push(far)[0] > 0).all()
    assert (bijection(C.lower_cholesky, torch.Size([2, 2])).push(far)[0][:, [0, 3]] > 0).all()
    assert (bijection(C.corr_cholesky, torch.Size([3, 3])).push(far)[0][:, [4, 8]] > 0).all()


def test_torch_agrees_where_it_can() -> None:
    for name in ("positive", "interval", "simplex", "correlation", "half-open"):
        support, shape, size = CASES[name]
        onto, z = bijection(support, torch.Size(shape)), points(4, size)
        theirs = torch.distributions.biject_to(support)
        y = theirs(z if size < math.prod(shape) else z.reshape(4, *shape))
        torch.testing.assert_close(onto.push(z)[0].reshape(y.shape), y)


def test_preflight_passes_on_every_support() -> None:
    for support, shape, size in CASES.values():
        view = from_log_prob(lambda x: -0.1 * x.reshape(len(x), -1).square().sum(-1), math.prod(shape), support=support, event_shape=shape)
        check_interface(view, points(4, size))
        check_gradient(view, points(4, size))
        read = readout(view, points(3, 2, size))
        assert isinstance(view, Constrained) and isinstance(read, Tensor) and read.shape == (3, 2, *shape)
        torch.testing.assert_close(view.pull(read), points(3, 2, size))


def integral(target: Target, z: Tensor) -> float:
    return float(torch.trapezoid(target.log_prob(z[:, None]).exp(), z))


def test_one_dimensional_densities_normalize() -> None:
    z = torch.linspace(-40.0, 40.0, 80_001, dtype=torch.float64)
    laws: list[distributions.Distribution] = [
        distributions.HalfNormal(torch.tensor(2.0, dtype=torch.float64)),
        distributions.Beta(torch.tensor(2.5, dtype=torch.float64), 0.6),
        distributions.Gamma(torch.tensor(0.7, dtype=torch.float64), 3.0),
        distributions.Uniform(torch.tensor(-3.0, dtype=torch.float64), 0.5),
        distributions.Pareto(torch.tensor(1.5, dtype=torch.float64), 4.0),
    ]
    for law in laws:
        support = law.support
        assert isinstance(support, C.Constraint)
        target = from_log_prob(lambda x, law=law: law.log_prob(x[:, 0]), dim=1, support=support)  # type: ignore[misc]
        assert abs(integral(target, z) - 1) < 1e-6, law


def test_dirichlet_constant_and_moments() -> None:
    a = torch.tensor([1.5, 4.0, 2.2], dtype=torch.float64)
    target = from_log_prob(lambda p: ((a - 1) * p.log()).sum(-1), dim=3, support=C.simplex)
    axis = torch.linspace(-16, 16, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    mass = target.log_prob(grid).exp() * (axis[1] - axis[0]) ** 2
    log_z = torch.lgamma(a).sum() - torch.lgamma(a.sum())
    torch.testing.assert_close(mass.sum().log(), log_z, atol=1e-6, rtol=0)
    read = readout(target, grid)
    assert isinstance(read, Tensor)
    torch.testing.assert_close((mass[:, None] * read).sum(0) / mass.sum(), a / a.sum(), atol=1e-6, rtol=0)


def test_wishart_constant() -> None:
    """Z of a 2 x 2 Wishart kernel, |X|^((nu-3)/2) exp(-tr X / 2): 2^nu Gamma_2(nu/2)."""
    nu = 5.0
    kernel = from_log_prob(
        lambda x: (nu - 3) / 2 * torch.linalg.det(x).log() - 0.5 * (x[:, 0, 0] + x[:, 1, 1]),
        4,
        support=C.positive_definite,
        event_shape=(2, 2),
    )
    diagonal, side = torch.linspace(-7, 3.5, 81, dtype=torch.float64), torch.linspace(-9, 9, 121, dtype=torch.float64)
    grid = torch.cartesian_prod(diagonal, side, diagonal)  # z row by row: z_00, z_10, z_11
    cell = (diagonal[1] - diagonal[0]) ** 2 * (side[1] - side[0])
    log_z = (kernel.log_prob(grid).exp().sum() * cell).log().item()
    assert log_z == pytest.approx(nu * math.log(2) + 0.5 * math.log(math.pi) + math.lgamma(nu / 2) + math.lgamma((nu - 1) / 2), abs=2e-4)


def test_uniform_correlation_volume() -> None:
    """The Cholesky factors of 3 x 3 correlations: dR = L_11 dL, and the correlations fill a volume of pi^2 / 2."""
    target = from_log_prob(lambda x: x[:, 1, 1].log(), 9, support=C.corr_cholesky, event_shape=(3, 3))
    axis = torch.linspace(-9, 9, 61, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis, axis)
    volume = target.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 3
    assert volume.item() == pytest.approx(math.pi**2 / 2, rel=1e-4)


def test_unsupported_supports_are_refused_in_one_sentence() -> None:
    law = distributions.Uniform
    for support, word in [
        (C.boolean, "discrete"),
        (C.nonnegative_integer, "discrete"),
        (C.multinomial(3), "discrete"),
        (C.dependent, "instance"),
        (law.support, "instance"),
        (C.symmetric, "no bijection"),
        (C.cat([C.positive, C.positive_integer], lengths=[1, 1]), "discrete"),
    ]:
        with pytest.raises(UnsupportedSupport, match=word):
            bijection(support, torch.Size([2, 2] if support is C.symmetric else [2]))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedSupport, match="single point"):
        bijection(C.simplex, torch.Size([1]))


def test_shapes_that_do_not_fit() -> None:
    for support, shape in [
        (C.positive_definite, (3,)),
        (C.corr_cholesky, (3, 2)),
        (C.simplex, ()),
        (C.cat([C.real, C.positive], lengths=[1, 1]), (3,)),
        (C.stack([C.real, C.positive]), ()),
    ]:
        with pytest.raises(ShapeError, match="event_shape"):
            bijection(support, torch.Size(shape))


def test_mixture_and_registered_supports() -> None:
    mixture = distributions.MixtureSameFamily(distributions.Categorical(torch.ones(2)), distributions.Gamma(torch.ones(2), 1.0))
    assert isinstance(bijection(mixture.support, torch.Size([2])), type(bijection(C.positive, torch.Size([2]))))

    class Shifted(C.Constraint):
        pass

    torch.distributions.biject_to.register(Shifted, lambda _: distributions.AffineTransform(1.0, 3.0))
    onto = bijection(Shifted(), torch.Size([2]))
    x, log_det = onto.push(points(5, 2))
    torch.testing.assert_close(x, 1 + 3 * points(5, 2))
    torch.testing.assert_close(log_det, torch.full((5,), 2 * math.log(3), dtype=torch.float64))
    torch.testing.assert_close(onto.pull(x), points(5, 2))
