"""from_pyro: the model's log-density with the Jacobian of its supports, names and shapes back, refusals, and nothing global changed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from torch import Tensor
from torch.distributions import constraints

import boltzsample as bz
from boltzsample import errors
from boltzsample.adapters import VectorizeError
from boltzsample.constraints import UnsupportedSupport
from boltzsample.preflight import check_gradient, check_interface
from tests import small

F64 = torch.float64


def points(n: int, dim: int, seed: int = 2, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, dim, dtype=F64, generator=torch.Generator().manual_seed(seed))


def near(estimate: bz.Estimate, truth: Tensor | float, largest_error: float) -> None:
    """Within 4.5 standard errors, which are small enough to mean something."""
    assert (estimate.stderr < largest_error).all(), estimate.stderr
    assert ((estimate.value - truth).abs() < 4.5 * estimate.stderr).all(), (estimate.value, truth, estimate.stderr)


# ---- log-densities against closed forms and against Pyro ----------------------------------------------------------------------


def test_every_term_of_a_small_model() -> None:
    """HalfCauchy, a Uniform whose bound is latent, a likelihood and a factor: written out by hand."""

    def model(y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.0))
        u = pyro.sample("u", dist.Uniform(-1.0, sigma))
        pyro.sample("y", dist.Normal(u, sigma).expand([3]).to_event(1), obs=y)
        pyro.factor("prior", -(u**2))

    y = torch.tensor([0.3, -1.2, 2.0])
    target, z = bz.from_pyro(model, y), points(7, 2)
    sigma = z[:, 0].exp()
    u = -1 + (sigma + 1) * z[:, 1].sigmoid()
    log_p = math.log(2 / math.pi) - math.log(2.0) - (1 + (sigma / 2) ** 2).log() - (sigma + 1).log() - u**2
    log_p = log_p - 1.5 * math.log(2 * math.pi) - 3 * sigma.log() - 0.5 * ((y.to(F64) - u[:, None]) / sigma[:, None]).square().sum(-1)
    log_det = z[:, 0] + (sigma + 1).log() + torch.nn.functional.logsigmoid(z[:, 1]) + torch.nn.functional.logsigmoid(-z[:, 1])
    torch.testing.assert_close(target.log_prob(z), log_p + log_det)
    read = target.readout(z.reshape(7, 1, 2))
    torch.testing.assert_close(read["u"], u[:, None])
    torch.testing.assert_close(target.pull(read), z.reshape(7, 1, 2))


def wide(x: Tensor, y: Tensor) -> None:
    """One of everything."""
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    u = pyro.sample("u", dist.Uniform(0.0, sigma))
    pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    pyro.sample("L", dist.LKJCholesky(3, 2.0))
    pyro.sample("R", dist.LKJ(3, 1.5))
    pyro.sample("S", dist.Wishart(5.0, torch.eye(2)))
    pyro.sample("shifted", dist.TransformedDistribution(dist.Exponential(1.0), [dist.transforms.AffineTransform(1.0, 2.0)]))
    pyro.sample("g", dist.Gamma(2.0, u).expand([2]).to_event(1))
    pyro.sample("m", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), dist.Normal(torch.tensor([-3.0, 3.0]), 1.0)))
    with pyro.plate("columns", 2, dim=-1), pyro.plate("rows", 3, dim=-2), poutine.scale(scale=0.5):
        pyro.sample("b", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", 4):
        mean = pyro.deterministic("mean", w[0] + w[1] * x)
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


DATA = torch.arange(4.0), torch.tensor([1.0, 2.0, 0.0, 1.0])
FREE: dict[str, Callable[[Tensor], Tensor]] = {  # coordinates of a value that may vary on their own
    "p": lambda v: v[..., :2],
    "L": lambda v: v[..., [1, 2, 2], [0, 0, 1]],
    "R": lambda v: v[..., [1, 2, 2], [0, 0, 1]],
    "S": lambda v: v[..., [0, 1, 1], [0, 0, 1]],
}


def test_a_wide_model_is_pyros_density_plus_the_jacobian(request: pytest.FixtureRequest) -> None:
    target = bz.from_pyro(wide, *DATA)
    assert target.sites == {"sigma": 1, "u": 1, "p": 2, "w": 2, "L": 3, "R": 3, "S": 3, "shifted": 1, "g": 2, "m": 1, "b": 6}
    z = points(3, target.dim, scale=0.7)
    values = target.readout(z)
    assert {k: tuple(v.shape[1:]) for k, v in values.items() if k in ("p", "b", "S", "mean", "sigma")} == {
        "sigma": (), "p": (3,), "S": (2, 2), "b": (3, 2), "mean": (4,),
    }  # fmt: skip
    torch.testing.assert_close(target.pull(values), z)

    def free(z: Tensor) -> Tensor:
        read = target.readout(z)
        return torch.cat([FREE.get(name, lambda v: v)(read[name]).reshape(len(z), -1) for name in target.sites], -1)

    steps = 1e-6 * torch.eye(target.dim, dtype=F64)
    jacobian = torch.stack([(free(z + h) - free(z - h)) / 2e-6 for h in steps], -1)
    torch.set_default_dtype(F64)  # for Pyro's own run
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    for i in range(len(z)):
        given = {name: v[i] for name, v in values.items() if name in target.sites}
        trace = poutine.trace(poutine.condition(wide, data=given)).get_trace(*(d.to(F64) for d in DATA))
        with pyro.validation_enabled(False):
            log_p = trace.log_prob_sum()
        torch.testing.assert_close(target.log_prob(z[i]), log_p + torch.linalg.slogdet(jacobian[i])[1], rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_wide_model_passes_preflight(dtype: torch.dtype) -> None:
    target = bz.from_pyro(wide, *DATA)
    z = points(4, target.dim, scale=0.5).to(dtype)
    assert check_interface(target, z).has_gradient
    check_gradient(target, z)
    assert target.log_prob(z[:0]).shape == (0,) and target.readout(z[:0])["p"].shape == (0, 3)
    assert target.readout(z[0])["p"].shape == (3,)


def eight_schools(sd: Tensor, y: Tensor, centred: bool = False) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        if centred:
            theta = pyro.sample("theta", dist.Normal(mu, tau))
        else:
            theta = pyro.deterministic("theta", mu + tau * pyro.sample("eta", dist.Normal(0.0, 1.0)))
        pyro.sample("y", dist.Normal(theta, sd), obs=y)


SCHOOLS = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]), torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])


@pytest.mark.parametrize("centred", [False, True])
def test_pyros_own_potential_where_it_is_right(centred: bool) -> None:
    """Fixed supports only; Pyro runs one point at a time, in float64 because we convert the data."""
    sd, y = (d.to(F64) for d in SCHOOLS)
    target = bz.from_pyro(eight_schools, sd, y, centred=centred)
    _, potential, _, _ = initialize_model(eight_schools, (sd, y), {"centred": centred})
    z = points(5, 10)
    names = ["mu", "tau", "theta" if centred else "eta"]
    parts = [dict(zip(names, (row[0], row[1], row[2:]), strict=True)) for row in z]
    ours = target.log_prob(z)
    theirs = torch.stack([-potential(p) for p in parts])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)  # its constants are float32


def test_float32_constants_lose_nothing() -> None:
    """Constants inside the model are float32 to Pyro; in a run in float64 they are float64, and so is the density."""
    target = bz.from_pyro(lambda: pyro.sample("x", dist.Normal(0.1, 0.3)))
    truth = -0.5 * ((0.7 - 0.1) / 0.3) ** 2 - math.log(0.3) - 0.5 * math.log(2 * math.pi)
    assert target.log_prob(torch.tensor([0.7], dtype=F64)).item() == pytest.approx(truth, abs=1e-14)
    with pytest.raises(AssertionError):  # this would see them: float32 constants
        assert dist.Normal(0.1, 0.3).log_prob(torch.tensor(0.7, dtype=F64)).item() == pytest.approx(truth, abs=1e-14)


def test_masks_scales_conditions_and_reparametrisations_count_as_in_pyro() -> None:
    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        with poutine.mask(mask=torch.tensor([True, False, True])), poutine.scale(scale=3.0), pyro.plate("n", 3):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    y = torch.tensor([1.0, 100.0, 2.0])
    z = points(4, 1)
    normal = lambda v, m, s: dist.Normal(torch.as_tensor(m, dtype=F64), s).log_prob(v)  # noqa: E731
    truth = normal(z, 0.0, 2.0).sum(-1) + 3 * (normal(z, 1.0, 1.0) + normal(z, 2.0, 1.0)).sum(-1)
    torch.testing.assert_close(bz.from_pyro(model, y).log_prob(z), truth)

    def shifted() -> None:  # p(x)^3 is a density of x, not of what x is the image of
        with poutine.scale(scale=3.0):
            pyro.sample("x", dist.TransformedDistribution(dist.Exponential(1.0), [dist.transforms.AffineTransform(1.0, 2.0)]))

    torch.testing.assert_close(bz.from_pyro(shifted).log_prob(z), (-3 * z.exp() - 3 * math.log(2.0) + z + math.log(2.0)).sum(-1))

    fixed = bz.from_pyro(poutine.condition(eight_schools, data={"tau": torch.tensor(2.0)}), *SCHOOLS)
    assert list(fixed.sites) == ["mu", "eta"]
    full = bz.from_pyro(eight_schools, *SCHOOLS)
    z = points(3, 9)
    with_tau = torch.cat([z[:, :1], torch.full((3, 1), math.log(2.0), dtype=F64), z[:, 1:]], -1)
    torch.testing.assert_close(fixed.log_prob(z), full.log_prob(with_tau) - math.log(2.0))

    moved = bz.from_pyro(poutine.reparam(eight_schools, config={"theta": LocScaleReparam(0.0)}), *SCHOOLS, centred=True)
    assert list(moved.sites) == ["mu", "tau", "theta_decentered"] and "theta" in moved.readout(points(1, 10))
    torch.testing.assert_close(moved.log_prob(points(3, 10)), full.log_prob(points(3, 10)))


def test_params_are_constants_at_their_values() -> None:
    def model() -> None:
        loc = pyro.param("loc", torch.tensor(1.0))
        pyro.sample("x", dist.Normal(loc, pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)))

    pyro.clear_param_store()
    pyro.param("loc", torch.tensor(5.0))  # as an earlier SVI left it
    try:
        target = bz.from_pyro(model)
        assert set(pyro.get_param_store().keys()) == {"loc"}
        pyro.get_param_store()["loc"] = torch.tensor(9.0)
        z = points(4, 1)
        truth = dist.Normal(torch.tensor(5.0, dtype=F64), 2.0).log_prob(z[:, 0])
        torch.testing.assert_close(target.log_prob(z), truth)
        assert set(pyro.get_param_store().keys()) == {"loc"} and pyro.param("loc").item() == 9.0
    finally:
        pyro.clear_param_store()


class Regression(PyroModule):
    """A PyroModule: one latent weight matrix, one plain parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        with torch.no_grad():
            self.linear.bias.fill_(0.5)

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)


def test_a_pyro_module() -> None:
    x, y = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]]), torch.tensor([1.0, 0.0, 2.0])
    pyro.clear_param_store()
    target, w = bz.from_pyro(Regression().double(), x, y), points(5, 2)
    mean = w @ x.to(F64).T + 0.5
    truth = dist.Normal(torch.zeros(2, dtype=F64), 1.0).log_prob(w).sum(-1) + dist.Normal(mean, 0.5).log_prob(y.to(F64)).sum(-1)
    torch.testing.assert_close(target.log_prob(w), truth)
    check_gradient(target, w)
    with pytest.raises(errors.DtypeError, match="mixes dtypes"):
        bz.from_pyro(Regression(), x, y).log_prob(w)
    assert not pyro.get_param_store().keys()


# ---- normalisation and conjugate models ---------------------------------------------------------------------------------------


LAWS: dict[str, Callable[[], Any]] = {
    "half-cauchy": lambda: dist.HalfCauchy(2.0),
    "gamma": lambda: dist.Gamma(0.3, 1.0),
    "beta": lambda: dist.Beta(0.5, 3.0),
    "pareto": lambda: dist.Pareto(2.0, 3.0),
    "inverse-gamma": lambda: dist.InverseGamma(3.0, 2.0),
    "folded": lambda: dist.FoldedDistribution(dist.Normal(1.0, 1.0)),
    "improper on (0, 1)": lambda: dist.ImproperUniform(constraints.unit_interval, (), ()),
    "1 - 2 y, y gamma": lambda: dist.TransformedDistribution(dist.Gamma(0.3, 1.0), [dist.transforms.AffineTransform(1.0, -2.0)]),
}


@pytest.mark.parametrize("name", LAWS)
def test_one_site_integrates_to_one(name: str) -> None:
    target = bz.from_pyro(lambda: pyro.sample("x", LAWS[name]()))
    z = torch.linspace(-120, 120, 240_001, dtype=F64)
    assert torch.trapezoid(target.log_prob(z[:, None]).exp(), z).item() == pytest.approx(1.0, abs=2e-5)


def test_a_law_that_casts_its_value_is_seen() -> None:
    """Gamma.log_prob casts to the dtype of its rate: one made outside of the model in float32 would lose small values."""
    law = dist.Gamma(0.3, 1.0)
    with pytest.raises(errors.DtypeError, match=r"site x is computed in torch\.float32"):
        bz.from_pyro(lambda: pyro.sample("x", law)).log_prob(points(2, 1))


def test_a_conjugate_normal_through_sample() -> None:
    """Normal mean and inverse-gamma variance: closed forms for both, 20 data."""
    y = torch.linspace(-1.0, 3.0, 20)

    def model(y: Tensor) -> None:
        v = pyro.sample("v", dist.InverseGamma(3.0, 4.0))
        m = pyro.sample("m", dist.Normal(0.0, (v / 2.0).sqrt()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m, v.sqrt()), obs=y)

    n, mean = 20, y.double().mean()
    a = 3.0 + n / 2
    b = 4.0 + 0.5 * (y.double() - mean).square().sum() + 0.5 * n * 2.0 / (n + 2.0) * mean**2
    result = small.sample(bz.from_pyro(model, y), n=6400)
    near(result.expectation(lambda d: d["m"]), n * mean / (n + 2.0), 0.02)
    near(result.expectation(lambda d: d["v"]), b / (a - 1), 0.03)
    near(result.expectation(lambda d: d["m"].square() / d["v"]), (n * mean / (n + 2.0)) ** 2 * a / b + 1 / (n + 2.0), 0.03)


def test_eight_schools_through_sample() -> None:
    """Truths by quadrature over mu and log tau, the theta integrated out."""
    result = small.sample(bz.from_pyro(eight_schools, *SCHOOLS), bz.MCMC(chains=64, warmup=60), n=2_000)
    near(result.expectation(lambda d: d["mu"]), 4.3968, 0.2)
    near(result.expectation(lambda d: d["tau"].log()), 0.8021, 0.1)
    near(result.expectation(lambda d: d["theta"][..., [0, 2, 6]]), torch.tensor([6.2119, 3.9270, 6.2967]), 0.25)
    near(result.probability(lambda d: d["theta"][..., 0] > d["theta"][..., 2]), 0.6174, 0.03)
    assert result.labels[:3] == ("mu", "tau", "eta[0]") and result.labels[-1] == "theta[7]"


def test_named_and_shaped_sites_through_sample() -> None:
    """Dirichlet and multinomial counts, a Uniform below a latent scale: names in every output, starts in the model's space."""

    def model(counts: Tensor) -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
        pyro.sample("counts", dist.Multinomial(10, p), obs=counts)
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        pyro.factor("tail", -scale)
        pyro.sample("below", dist.Uniform(0.0, scale))
        pyro.deterministic("odds", p[:2] / p[2])

    target = bz.from_pyro(model, torch.tensor([5.0, 3.0, 2.0]))
    result = small.sample(target, n=6400)
    near(result.expectation(lambda d: d["p"]), torch.tensor([6.0, 5.0, 5.0]) / 16, 0.01)
    near(result.expectation(lambda d: d["below"] / d["scale"]), 0.5, 0.02)
    assert result.labels == ("p[0]", "p[1]", "p[2]", "scale", "below", "odds[0]", "odds[1]")
    text = result.summary()
    assert all(f"\n{label} " in text for label in result.labels)
    posterior = result.to_arviz()["posterior"]
    assert {name: posterior[name].shape[2:] for name in posterior} == {"p": (3,), "scale": (), "below": (), "odds": (2,)}
    result.plot("forest")


def test_starts_in_the_models_space() -> None:
    target = bz.from_pyro(eight_schools, *SCHOOLS)
    starts = {"mu": torch.tensor([4.0, 0.0]), "tau": torch.tensor([3.0, 1.0]), "eta": torch.zeros(2, 8)}
    z = target.pull(starts)
    torch.testing.assert_close(z[:, :2], torch.tensor([[4.0, math.log(3.0)], [0.0, 0.0]]))
    assert target.pull({**starts, "tau": torch.tensor([3.0, -1.0])})[1].isnan().any()
    with pytest.raises(errors.ShapeError, match=r"got a dict of mu; wanted .* mu, tau, eta"):
        target.pull({"mu": torch.zeros(2)})
    with pytest.raises(errors.ShapeError, match=r"site eta came with shape \(2, 7\); wanted \(8,\)"):
        target.pull({**starts, "eta": torch.zeros(2, 7)})
    with pytest.raises(errors.ShapeError, match="got a Tensor"):
        target.pull(torch.zeros(2, 10))


# ---- what is refused ----------------------------------------------------------------------------------------------------------


def discrete() -> None:
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    with pyro.plate("n", 2):
        pyro.sample("flip", dist.Bernoulli(0.5))
    pyro.sample("x", dist.Normal(k.float(), 1.0))


def subsampled() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 100, subsample_size=10):
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(10))


def chosen_subsample() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 100, subsample=torch.arange(10)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(10))


def no_latent() -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def twice() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(0.0, 1.0))


def one_site(law: Any) -> Callable[[], Any]:
    return lambda: pyro.sample("angle", law)


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (discrete, errors.PyroModelError, "discrete latent sites .*: k, flip; sum them out"),
        (subsampled, errors.PyroModelError, "plate data takes 10 of 100"),
        (chosen_subsample, errors.PyroModelError, "plate data takes 10 of 100"),
        (no_latent, errors.PyroModelError, "no latent site"),
        (twice, errors.PyroModelError, "two sites are named x"),
        (one_site(dist.VonMises(0.0, 1.0)), UnsupportedSupport, "site angle: VonMises cannot be sampled: its support is a circle"),
        (one_site(dist.ProjectedNormal(torch.ones(2))), UnsupportedSupport, "site angle: ProjectedNormal"),
        (one_site(dist.Delta(torch.tensor(1.0))), UnsupportedSupport, r"site angle: Delta .*pyro\.deterministic"),
        ("model", TypeError, "model is a str"),
    ],
)
def test_models_that_are_refused(model: Any, error: type[Exception], words: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(error, match=words):
        bz.from_pyro(model)
    assert torch.equal(torch.get_rng_state(), state)


def branching() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, 1.0 if x > 0 else 2.0), obs=torch.tensor(1.0))


def noisy() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.randn(()))


@pytest.mark.parametrize("model", [branching, noisy])
def test_models_that_cannot_run_on_many_points(model: Callable[[], None]) -> None:
    with pytest.raises(VectorizeError, match=r"`if` on latent values, no \.item\(\), no random numbers .*one_by_one\(\)"):
        bz.from_pyro(model).log_prob(points(4, 1))


def test_one_by_one() -> None:
    target, z = bz.from_pyro(branching).one_by_one(), points(5, 1)
    sd = torch.where(z[:, 0] > 0, 1.0, 2.0).to(F64)
    truth = -0.5 * z[:, 0] ** 2 - sd.log() - 0.5 / sd**2 - math.log(2 * math.pi)
    torch.testing.assert_close(target.log_prob(z), truth)
    torch.testing.assert_close(target.grad_log_prob(z), -z)
    slow, fast = bz.from_pyro(wide, *DATA).one_by_one(), bz.from_pyro(wide, *DATA)
    z = points(3, slow.dim)
    torch.testing.assert_close(bz.log_prob_and_grad(slow, z), bz.log_prob_and_grad(fast, z))
    torch.testing.assert_close(slow.readout(z), fast.readout(z))
    torch.testing.assert_close(slow.pull(slow.readout(z)), z)


@pytest.mark.parametrize("counts", [[5.0, 3.0, 2.0], [0.0, 10.0, 0.0]])
def test_multinomial_counts(counts: list[float]) -> None:
    """torch's own log_prob is beyond vmap."""
    data = torch.tensor(counts, dtype=F64)
    target = bz.from_pyro(lambda y: pyro.sample("y", dist.Multinomial(10, pyro.sample("p", dist.Dirichlet(torch.ones(3)))), obs=y), data)
    z = points(4, 2)
    p = target.readout(z)["p"]
    truth = torch.stack([dist.Multinomial(10, q).log_prob(data) for q in p]) + bz.from_torch_distribution(
        torch.distributions.Dirichlet(torch.ones(3, dtype=F64))
    ).log_prob(z)
    torch.testing.assert_close(target.log_prob(z), truth)


def test_models_that_compute_in_a_lower_precision() -> None:
    x = torch.arange(5.0)

    def elementwise() -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * x, 1.0).to_event(1), obs=x)  # float32 times a float64 number is float32

    def matrices() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=torch.tensor(0.0))

    for model, words in ((elementwise, r"site y is computed in torch\.float32"), (matrices, "mixes dtypes")):
        target = bz.from_pyro(model)
        with pytest.raises(errors.DtypeError, match=words + r".*from_pyro\(model, data\)"):
            target.log_prob(torch.zeros(3, target.dim, dtype=F64))
        assert target.log_prob(torch.zeros(3, target.dim)).dtype == torch.float32


def test_sites_that_come_and_go() -> None:
    extra: list[int] = []

    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        if extra:
            pyro.sample("z", dist.Normal(0.0, 1.0))

    target = bz.from_pyro(model)
    extra.append(1)
    with pytest.raises(errors.PyroModelError, match="site z was not there"):
        target.log_prob(points(2, 1))
    more = bz.from_pyro(model)
    extra.clear()
    with pytest.raises(errors.PyroModelError, match="were x, z and are now x;"):
        more.log_prob(points(2, 2))


def test_an_error_of_the_model_comes_through() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        bz.from_pyro(model)


# ---- nothing behind the user's back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("validation", [True, False])
def test_global_state_is_as_it_was(validation: bool) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    flags = lambda: (dist.is_validation_enabled(), poutine.util.is_validation_enabled(), torch.distributions.Normal(0, 1)._validate_args)  # noqa: E731
    with pyro.validation_enabled(validation):
        expected = flags()
        target = bz.from_pyro(wide, *DATA)
        bz.log_prob_and_grad(target, points(3, target.dim))
        target.readout(points(3, target.dim))
        with pytest.raises(KeyError):
            bz.from_pyro(lambda: {}["missing"])
        with pytest.raises(VectorizeError):
            bz.from_pyro(branching).log_prob(points(3, 1))
        assert flags() == expected and expected[0] is validation
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert not pyro.get_param_store().keys() and not pyro.poutine.runtime._PYRO_STACK
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # type: ignore[index]


def test_arguments_are_not_written_to_and_follow_the_run() -> None:
    data = {"y": torch.tensor([1.0, 2.0])}

    def model(data: dict[str, Tensor]) -> None:
        assert data["y"].dtype == torch.get_default_dtype()
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 2):
            pyro.sample("y", dist.Normal(x, 1.0), obs=data["y"])

    target = bz.from_pyro(model, data)
    assert target.log_prob(points(2, 1)).dtype == F64 and data["y"].dtype == torch.float32
    assert torch.equal(data["y"], torch.tensor([1.0, 2.0]))


def test_observed_values_follow_the_run() -> None:
    y = torch.tensor([1.0, 2.0])  # not an argument: a vector in float32 minus a number in float64 is float32

    def model() -> None:
        pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    x = points(3, 1)
    truth = -0.5 * x[:, 0].square() - 0.5 * (x - y).square().sum(-1) - 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(bz.from_pyro(model).log_prob(x), truth)
    assert y.dtype == torch.float32


def test_many_points_are_one_run_of_the_model() -> None:
    runs: list[int] = []

    def model() -> None:
        runs.append(1)
        pyro.sample("x", dist.Normal(0.0, 1.0))

    target = bz.from_pyro(model)
    bz.log_prob_and_grad(target, points(64, 1))
    before = len(runs)
    bz.log_prob_and_grad(target, points(64, 1))
    assert len(runs) == before + 1 and target.compilable is False
