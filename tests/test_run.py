"""bz.sample: what it accepts, what it refuses in words, where it may be called, what it records and leaves alone."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import boltzsample as bz
from boltzsample.errors import ShapeError
from targets import problem
from tests.small import SMALL, codes, no_gradient, normal, normal_log_prob, sample, severity

# ---- refused in words ----


@pytest.mark.parametrize(
    ("target", "hint"),
    [(normal_log_prob, r"wanted a Target: wrap the function: bz\.from_log_prob"), (object(), "it needs dim, log_prob and grad_log_prob")],
    ids=["function", "object"],
)
def test_what_is_no_target(target: Any, hint: str) -> None:
    with pytest.raises(TypeError, match=hint):
        bz.sample(target)


@pytest.mark.parametrize("name", ["n", "replicates"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "10", None, 10**12 + 1])
def test_bad_counts(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} is .*; wanted an integer from 1 to 10\^12"):
        bz.sample(normal(), SMALL, **{name: value})


@pytest.mark.parametrize("method", [None, bz.MCMC, bz.HMC(), 3])
def test_what_is_no_method(method: Any) -> None:
    with pytest.raises(TypeError, match=r"wanted a name \(auto, mcmc, .*\) or a Sampler object"):
        bz.sample(normal(), method)


def test_an_unknown_name_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"method 'nuts' is not known; known methods: auto, mcmc"):
        bz.sample(normal(), "nuts")


@pytest.mark.parametrize("budget", [0, -5, bz.Budget()])
def test_budgets_that_are_no_limit(budget: Any) -> None:
    if isinstance(budget, bz.Budget):
        assert sample(normal(), budget=budget).config["budget"] == {"evaluations": None, "seconds": None}
    else:
        with pytest.raises(ValueError, match=r"budget evaluations is .*; wanted a positive number"):
            sample(normal(), budget=budget)
        with pytest.raises(ValueError, match="budget seconds"):
            bz.Budget(seconds=budget)


@pytest.mark.parametrize("budget", [1e6, "1000", pytest.param(True, id="True")])
def test_budgets_of_a_wrong_kind(budget: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"budget is .*; wanted an integer"):
        sample(normal(), budget=budget)


def test_a_budget_below_the_price_of_the_search() -> None:
    with pytest.raises(ValueError, match=r"budget is 1000 evaluations.*wanted at least 40000, or starts="):
        sample(normal(), budget=1000)


# ---- methods ----


def test_auto_says_what_it_chose() -> None:
    auto, named = (bz.sample(normal(), method, 4_000, seed=0) for method in ("auto", "mixture-is"))
    assert severity(auto, "AUTO") == "info" and "AUTO" not in codes(named)
    assert auto.status == "ok" and auto.config["method"] == "auto" and auto.config["log_z"] is True
    assert isinstance(auto.sampler.chosen, bz.MixtureIS)  # type: ignore[attr-defined]
    assert "AUTO" in codes(bz.sample(normal(), "auto", 640, seed=0, replicates=2))


def test_a_method_object_is_recorded() -> None:
    result = sample(normal(), replace(SMALL, kernel=bz.HMC(L=3)), n=700, replicates=2)
    config = result.config
    assert (config["method"], config["n"], config["seed"], config["replicates"], config["fit"]) == ("mcmc", 700, 0, 2, True)
    assert (config["device"], config["dtype"], config["threads"]) == ("cpu", "float64", torch.get_num_threads())
    assert config["sampler"]["kernel"]["L"] == 3 and config["sampler"]["chains"] == 32
    assert config["versions"]["torch"] == torch.__version__ and config["log_z"] is False


def test_seconds_and_ledger_by_phase() -> None:
    result = sample(normal())
    assert list(result.ledger) == ["preflight", "starts", "pilot", "warm-up", "sampling", "witness"]
    assert set(result.draws.seconds) == {"starts", "warm-up", "sampling", "witness"} and result.seconds > 0
    assert all(a >= 0 and b >= 0 for a, b in result.ledger.values())


def test_replicates_share_the_price() -> None:
    result = sample(normal(), replicates=3)
    assert all(r.ledger == {k: (a // 3, b // 3) for k, (a, b) in result.ledger.items()} for r in result.replicates)
    assert result.means.method == "mean of 3 replicates"


# ---- where it may be called ----


@contextlib.contextmanager
def _float64_default() -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def _deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


PLACES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64 default": _float64_default,
    "deterministic": _deterministic,
}


@pytest.mark.parametrize("place", PLACES)
def test_the_same_run_wherever_it_is_called(place: str) -> None:
    W = torch.tensor([[1.0, 0.3], [0.0, 0.8]])
    target = bz.from_log_prob(lambda x: normal_log_prob(x @ W.to(x)), dim=2)  # a matmul, which autocast would touch
    plain = sample(target)
    with PLACES[place]():
        result = sample(target)
        assert result.expectation(lambda x: x[..., 0]).value.dtype == torch.float64 and result.summary()
    assert torch.equal(result.draws.x, plain.draws.x)
    assert not result.draws.x.is_inference() and not result.draws.x.requires_grad


def test_starts_made_in_inference_mode() -> None:
    with torch.inference_mode():
        starts = torch.zeros(3, 2)
    assert sample(normal(), starts=starts).draws.x.shape == (32, 20, 2)


def test_float32() -> None:
    """|z| < 4.5 for ten means: false failure 7e-5."""
    p = problem("gaussian-corr-d10")
    result = bz.sample(p.target, "mcmc", 4_000, seed=0, dtype=torch.float32)
    assert result.draws.x.dtype == result.draws.log_prob.dtype == torch.float32 and result.config["dtype"] == "float32"
    assert result.status == "ok" and result.means.value.dtype == torch.float64
    assert bool(((result.means.value - p.truth["mean"].value) / result.means.stderr).abs().max() < 4.5)


def test_float32_under_a_float64_default() -> None:
    with _float64_default():
        assert sample(normal(), dtype=torch.float32).draws.x.dtype == torch.float32


# ---- targets of every kind ----


class Own:
    """A user's class with the three members and nothing else."""

    dim = 2

    def log_prob(self, x: Tensor) -> Tensor:
        return normal_log_prob(x - 1.0)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        return 1.0 - x


def test_a_users_class() -> None:
    """|z| < 4.5 for two means: false failure 1.4e-5."""
    result = sample(Own())
    assert bool(((result.means.value - 1) / result.means.stderr).abs().max() < 4.5)
    assert result.target is not None and result.labels == ("x[0]", "x[1]")


def test_parameters_of_a_module_are_left_alone() -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    marks = [torch.full_like(p, 7.0) for p in net.parameters()]
    for p, mark in zip(net.parameters(), marks, strict=True):
        p.grad = mark.clone()
    before = [p.detach().clone() for p in net.parameters()]
    result = sample(bz.from_log_prob(lambda x: normal_log_prob(x) + net(x)[..., 0], dim=2))
    for p, value, mark in zip(net.parameters(), before, marks, strict=True):
        assert torch.equal(p, value) and p.grad is not None and torch.equal(p.grad, mark) and p.requires_grad
    assert not result.draws.x.requires_grad and not result.draws.log_prob.requires_grad
    assert result.draws.log_prob.grad_fn is None


def test_one_dimension() -> None:
    result = bz.sample(normal(1), "mcmc", 4_000, seed=0)
    assert result.status == "ok" and result.draws.x.shape == (256, 16, 1)
    assert abs(float(result.means.value[0] / result.means.stderr[0])) < 4.5


def test_three_hundred_dimensions() -> None:
    """More than the dense preconditioner takes. max |z| of 300 below 5.5: false failure 1.2e-5."""
    scale = torch.logspace(-2, 2, 300, dtype=torch.float64)
    target = bz.from_log_prob(lambda x: normal_log_prob(x / scale.to(x)), dim=300)
    result = sample(target, bz.MCMC(kernel=bz.HMC(L=4), chains=32, warmup=60), starts=torch.zeros(1, 300), witness=False)
    assert type(result.sampler.map).__name__ == "Diagonal"
    assert bool((result.means.value / result.means.stderr).abs().max() < 5.5)


@pytest.mark.parametrize("dim", [0, -1])
def test_no_dimensions(dim: int) -> None:
    with pytest.raises(ShapeError):
        sample(normal(dim))


@pytest.mark.parametrize(("mean", "sd"), [(0.0, 1e-8), (0.0, 1e8), (1e9, 1.0)])
def test_scales_do_not_matter(mean: float, sd: float) -> None:
    """Fault 27: x -> a + b x gives the same z to rounding of x itself. |z| < 4.5 for three means: 2e-5 a line."""
    target = bz.from_log_prob(lambda x: normal_log_prob((x - mean) / sd), dim=3)
    result = bz.sample(target, "mcmc", 4_000, seed=0)
    assert result.status == "ok"
    assert bool(((result.means.value - mean) / result.means.stderr).abs().max() < 4.5)
    assert bool((result.means.stderr / sd - 1 / math.sqrt(4096 / 3.3)).abs().max() < 0.02)


# ---- few of everything ----


@pytest.mark.parametrize(
    ("chains", "status", "code"), [(1, "untrusted", "ONE_UNIT"), (2, "caution", "FEW_UNITS"), (3, "caution", "FEW_UNITS")]
)
def test_few_chains(chains: int, status: str, code: str) -> None:
    result = sample(normal(), bz.MCMC(chains=chains, warmup=150), n=chains * 1500)
    assert result.status == status and code in codes(result)
    assert result.draws.group is not None and result.draws.group.tolist() == list(range(chains))


@pytest.mark.parametrize("n", [1, 2])
def test_one_draw_is_never_less_than_sixteen_a_chain(n: int) -> None:
    assert sample(normal(), n=n).draws.x.shape == (32, 16, 2)


def test_duplicate_starts_are_the_same_start() -> None:
    result = sample(normal(), starts=[[1.0, 1.0], [1.0, 1.0]])
    assert severity(result, "SAME_STARTS") == "caution" and "DUPLICATE_STREAM" not in codes(result)
    assert not bool((result.draws.x[0] == result.draws.x[1]).all(-1).any())
    assert "SAME_STARTS" not in codes(sample(normal(), starts=[[1.0, 1.0], [1.0, 0.0]]))
    assert "SAME_STARTS" not in codes(sample(normal()))


def test_an_easy_run_is_ok() -> None:
    """Three seeds of N(0, I): any flag of caution or worse has a false rate of a few per thousand a seed."""
    results = [bz.sample(normal(3), "mcmc", 4_000, seed=s) for s in range(3)]
    assert [str(r.status) for r in results] == ["ok"] * 3


def test_an_easy_run_without_a_gradient_names_its_only_doubt() -> None:
    result = sample(no_gradient(), bz.MCMC(chains=64, warmup=100, thin=10), n=64 * 60)
    assert result.status == "caution" and codes(result) - {"NO_GRADIENT"} == {"SINGLE_WITNESS"}


def test_progress_bars_do_not_change_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    shown, silent = sample(normal(), progress=True), sample(normal(), progress=False)
    err = capsys.readouterr().err
    assert torch.equal(shown.draws.x, silent.draws.x)
    assert all(phase in err for phase in ("pilot", "warm-up", "sampling", "optimum audit")) and "accept" in err
