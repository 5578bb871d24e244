"""Every fault of TRUST.md section 4 that preflight can see fires its own error; healthy densities of every scale stay quiet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from boltzsample import errors
from boltzsample.adapters import from_log_prob
from boltzsample.maps import Dense, Diagonal
from boltzsample.preflight import check_gradient, check_interface
from boltzsample.target import FunctionTarget, Target
from boltzsample.views import Constrained, Pullback, Tempered
from tests.counted import Counted

LogProb = Callable[[Tensor], Tensor]


def points(dim: int, dtype: torch.dtype = torch.float64, k: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(k, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def skewed(x: Tensor) -> Tensor:
    """Log-gamma coordinates of unequal shapes: skewed, never symmetric."""
    shape = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    return (shape * x - x.exp()).sum(-1)


def preflight(target: Target, x: Tensor) -> None:
    check_interface(target, x)
    check_gradient(target, x)


# ---- faults 1-4: shape, cross-talk, dtype, device -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "got"),
    [
        (lambda x: skewed(x)[:, None], r"\(4, 1\)"),
        (lambda x: skewed(x).sum(), r"\(\)"),
        (lambda x: skewed(x)[:, None] + skewed(x), r"\(4, 4\)"),
        (lambda x: -x.square(), r"\(4, 3\)"),
        (lambda x: -x.square().sum(0), r"\(3,\)"),
    ],
)
@pytest.mark.parametrize("own_class", [False, True])
def test_wrong_shape_is_named_and_never_squeezed(fn: LogProb, got: str, own_class: bool) -> None:
    target = Own(fn, 3) if own_class else from_log_prob(fn, dim=3)
    with pytest.raises(errors.ShapeError, match=got) as raised:
        check_interface(target, points(3))
    assert "(4,)" in str(raised.value) and ".sum(-1)" in str(raised.value)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: skewed(x) - 0.1 * skewed(x).sum(),
        lambda x: skewed(x - x.mean(0)),
        lambda x: skewed(x).cumsum(0),
        lambda x: skewed(x) + 1e-2 * torch.arange(len(x)).to(x),
        lambda x: skewed(x) - 1e6 + 0.01 * x.mean(),  # small beside a constant, not beside the differences that matter
    ],
)
def test_crosstalk(fn: LogProb) -> None:
    with pytest.raises(errors.BatchCrosstalkError, match="other points"):
        check_interface(from_log_prob(fn, dim=3), points(3))


@pytest.mark.parametrize(
    ("fn", "dtype"),
    [
        (lambda x: skewed(x).long(), torch.float64),
        (lambda x: skewed(x).half(), torch.float32),
        (lambda x: skewed(x.bfloat16()), torch.float32),
        (lambda x: skewed(x.float()), torch.float64),
        (lambda x: skewed(x * torch.ones(3, dtype=torch.float64)), torch.float32),
        (lambda x: -(x @ torch.eye(3, dtype=torch.float64)).square().sum(-1), torch.float32),
        (lambda x: -torch.einsum("ni,ij,nj->n", x, torch.eye(3, dtype=torch.float64), x), torch.float32),
        (lambda x: skewed(x).numpy(), torch.float64),
        (lambda x: 1.0, torch.float64),
    ],
)
def test_wrong_dtype(fn: LogProb, dtype: torch.dtype) -> None:
    with pytest.raises(errors.DtypeError, match=r"x|torch\.Tensor"):
        check_interface(from_log_prob(fn, dim=3), points(3, dtype))


def test_integer_points() -> None:
    with pytest.raises(errors.DtypeError, match=r"torch\.int64"):
        check_interface(from_log_prob(skewed, dim=3), torch.arange(12).reshape(4, 3))


def test_wrong_device() -> None:
    with pytest.raises(errors.DeviceError, match="meta"):
        check_interface(from_log_prob(lambda x: skewed(x).to("meta"), dim=3), points(3))


# ---- faults 5-8: NaN, +inf, -inf ----------------------------------------------------------------------------------------------


def test_nan_and_minus_inf_are_no_fault_of_the_interface() -> None:
    torn = from_log_prob(lambda x: torch.where(x[:, 0] > 0, skewed(x), torch.nan), dim=2)
    edge = from_log_prob(lambda x: torch.where(x[:, 0] > 0, skewed(x), -torch.inf), dim=2)
    for target in (torn, edge):
        assert check_interface(target, points(2)).has_gradient


def test_plus_inf_carries_its_point() -> None:
    x = points(2)
    with pytest.raises(errors.PositiveInfinityError, match=r"\+inf") as raised:
        check_interface(from_log_prob(lambda y: torch.where(y[:, 0] == x[2, 0], torch.inf, skewed(y)), dim=2), x)
    assert raised.value.x is not None and torch.equal(raised.value.x, x[2])


def test_start_without_a_finite_value() -> None:
    with pytest.raises(errors.InitFailed, match="-inf"):
        check_gradient(from_log_prob(lambda x: torch.where(x[:, 0] > 9, skewed(x), -torch.inf), dim=2), points(2))


def test_nan_gradient_at_a_start() -> None:
    root = from_log_prob(lambda x: torch.where(x > 0, -x.sqrt(), x).sum(-1), dim=2)  # 0 * nan of the unused branch
    with pytest.raises(errors.GradMismatchError, match="finite"):
        check_gradient(root, -points(2).abs())


# ---- fault 11: the gradient ---------------------------------------------------------------------------------------------------


def autograd(fn: LogProb) -> LogProb:
    return lambda x: FunctionTarget(fn, x.shape[-1]).grad_log_prob(x)


WRONG = {
    "0.99": lambda x: 0.99 * autograd(skewed)(x),
    "minus": lambda x: -autograd(skewed)(x),
    "zero": torch.zeros_like,
    "clipped": lambda x: autograd(skewed)(x).clamp(-0.3, 0.3),
    "one coordinate": lambda x: autograd(skewed)(x) * torch.tensor([1.0, 1.0, 0.9]).to(x),
    "rolled": lambda x: autograd(skewed)(x).roll(1, -1),
    "constant": lambda x: autograd(skewed)(x) + 0.1,
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_wrong_gradient(name: str, dtype: torch.dtype, scale: float) -> None:
    if name == "0.99" and dtype == torch.float32:
        pytest.skip("2% is the tolerance of float32")
    target = FunctionTarget(lambda x: skewed(x / scale), 3, lambda x: WRONG[name](x / scale) / scale)
    with pytest.raises(errors.GradMismatchError, match=r"at x = \[.*by central differences and .* by the gradient"):
        check_gradient(target, scale * points(3, dtype))


def test_detached_part() -> None:
    with pytest.raises(errors.GradMismatchError, match="detach"):
        check_gradient(from_log_prob(lambda x: skewed(x) - 0.1 * x.detach().square().sum(-1), dim=3), points(3))


def test_gradient_of_the_wrong_shape() -> None:
    for grad in (lambda x: -x.sum(-1), lambda x: -x[:, :2], lambda x: -x[..., None]):
        with pytest.raises(errors.ShapeError, match="grad_log_prob"):
            check_interface(FunctionTarget(lambda x: -0.5 * x.square().sum(-1), 4, grad), points(4))  # dim = k: nothing may broadcast


def test_two_densities_in_one_class() -> None:
    class Twofold(Own):
        def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * self.log_prob(x), self.grad_log_prob(x)

    with pytest.raises(errors.GradMismatchError, match="same density"):
        check_interface(Twofold(skewed, 2), points(2))


def test_density_without_a_gradient() -> None:
    target = Counted(from_log_prob(lambda x: skewed(x.detach()), dim=3))
    seen = check_interface(target, points(3))
    assert not seen.has_gradient and (seen.log_prob_rows, seen.grad_rows) == (target.log_prob_rows, target.grad_rows)


# ---- faults 15-22: noise, writes, modes, strides, sizes -----------------------------------------------------------------------


def test_noise() -> None:
    noise = torch.Generator().manual_seed(1)
    with pytest.raises(errors.NondeterministicError, match="two calls"):
        check_interface(from_log_prob(lambda x: skewed(x) + 1e-3 * torch.randn(len(x), generator=noise).to(x), dim=3), points(3))


def test_dropout_left_on() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)).double()
    target = from_log_prob(lambda x: skewed(x) + net(x).squeeze(-1), dim=3)
    with pytest.raises(errors.NondeterministicError, match=r"eval\(\)"):
        check_interface(target, points(3))
    net.eval()
    preflight(target, points(3))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("write", [lambda x: x.mul_(2.0), lambda x: x.clamp_(max=1e9), lambda x: x.requires_grad_()])
def test_input_written_to(write: Callable[[Tensor], Tensor]) -> None:
    x = points(3)
    kept = x.clone()
    with pytest.raises(errors.MutatesInputError, match="the points it was given"):
        check_interface(from_log_prob(lambda y: skewed(write(y)), dim=3), x)
    assert torch.equal(x, kept)


def test_input_written_to_behind_torch() -> None:
    def fn(x: Tensor) -> Tensor:
        x.numpy()[0, 0] = 7.0
        return skewed(x)

    with pytest.raises(errors.MutatesInputError, match="wrote to"):
        check_interface(from_log_prob(fn, dim=3), points(3))


class Own:
    """A user's own class: no joint method, gradient by the autograd idiom everyone writes."""

    def __init__(self, fn: LogProb, dim: int) -> None:
        self.fn, self.dim = fn, dim

    def log_prob(self, x: Tensor) -> Tensor:
        return self.fn(x)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.log_prob(x).sum(), x)[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_grad_mode(mode: Callable[[], torch.no_grad]) -> None:
    with mode():
        preflight(Own(skewed, 3), points(3))
        preflight(from_log_prob(skewed, dim=3), points(3) * 1.0)


def test_own_class_for_flat_batches_only() -> None:
    flat = Own(lambda x: -torch.einsum("ni,ni->n", x, x), 3)
    with pytest.raises(errors.ShapeError, match="from_log_prob") as raised:
        check_interface(flat, points(3))
    assert raised.value.__cause__ is not None  # the user's own traceback is kept
    preflight(from_log_prob(flat.log_prob, dim=3), points(3))
    with pytest.raises(errors.ShapeError, match=r"\(2, 2\)"):
        check_interface(Own(lambda x: -x.square().sum(1), 3), points(3))


def test_own_class_without_methods() -> None:
    class Half:
        dim = 2

        def log_prob(self, x: Tensor) -> Tensor:
            return skewed(x)

    with pytest.raises(TypeError, match="no grad_log_prob"):
        check_interface(Half(), points(2))  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", [0, -1, 2.0, True, None])
def test_dim_must_be_a_positive_int(dim: int) -> None:
    with pytest.raises(errors.ShapeError, match="dim"):
        check_interface(Own(skewed, dim), points(2))


def test_points_of_another_dimension() -> None:
    with pytest.raises(errors.ShapeError, match=r"\(6, 2\).*3"):
        check_interface(from_log_prob(skewed, dim=3), points(2))


def test_errors_of_the_user_pass_through() -> None:
    def fn(x: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as raised:
        check_interface(from_log_prob(fn, dim=2), points(2))
    assert raised.traceback[-1].name == "fn"


def test_default_dtype_may_be_anything() -> None:
    before = torch.get_default_dtype()
    try:
        for default in (torch.float64, torch.float16):
            torch.set_default_dtype(default)
            preflight(from_log_prob(skewed, dim=3), points(3, torch.float32))
            assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(before)


def test_autocast_of_the_caller_is_switched_off() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        preflight(from_log_prob(lambda x: skewed(x @ torch.eye(3)), dim=3), points(3, torch.float32))


def test_strided_and_expanded_points() -> None:
    preflight(from_log_prob(skewed, dim=3), points(6)[:, ::2])
    preflight(from_log_prob(skewed, dim=3), points(6).T[:, :3])
    preflight(from_log_prob(skewed, dim=3), points(3)[:1].expand(5, 3))


def test_global_random_state_is_untouched() -> None:
    before = torch.get_rng_state()
    preflight(from_log_prob(skewed, dim=3), points(3))
    assert torch.equal(before, torch.get_rng_state())


# ---- the price, and the quiet side --------------------------------------------------------------------------------------------


def funnel(x: Tensor) -> Tensor:
    v = x[..., 0]
    return -0.5 * (v / 3).square() - 0.5 * x[..., 1:].square().sum(-1) * (-v).exp() - 0.5 * (x.shape[-1] - 1) * v


def correlated(x: Tensor) -> Tensor:
    """Condition number 1e6: noisy in float32."""
    scale = torch.logspace(-3, 0, x.shape[-1], dtype=x.dtype)
    return -0.5 * ((x + x.mean(-1, keepdim=True)) / scale).square().sum(-1)


HEALTHY: dict[str, LogProb] = {
    "gaussian": lambda x: -0.5 * x.square().sum(-1),
    "skewed": skewed,
    "funnel": funnel,
    "correlated": correlated,
    "student": lambda x: -3.0 * (1 + x.square().sum(-1) / 5).log(),
    "laplace": lambda x: -x.abs().sum(-1),
    "offset": lambda x: skewed(x) - 1e4,
    "truncated": lambda x: torch.where((x > -1.5).all(-1), skewed(x), -torch.inf),
    "two far modes": lambda x: torch.logaddexp(-0.5 * (x - 30).square().sum(-1), 0.7 - 0.5 * (x + 30).square().sum(-1)),
    "quartic": lambda x: -(x**4).sum(-1),
}


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("dim", [1, 2, 31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_healthy_densities_stay_quiet(name: str, dim: int, dtype: torch.dtype, scale: float) -> None:
    target = Counted(from_log_prob(lambda x: HEALTHY[name](x / scale), dim=dim))
    x = scale * points(dim, dtype, seed=dim)
    spent = check_interface(target, x)
    finite = x[target.target.log_prob(x).isfinite()]
    if len(finite):
        more = check_gradient(target, finite)
        assert target.log_prob_rows == spent.log_prob_rows + more.log_prob_rows
        assert target.grad_rows == spent.grad_rows + more.grad_rows
        assert target.total <= 60 or name == "laplace"  # kinks cost a few more rows


@pytest.mark.parametrize("width", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("name", ["gaussian", "skewed", "student", "quartic", "funnel"])
def test_starts_much_wider_or_narrower_than_the_density(name: str, width: float) -> None:
    target = from_log_prob(HEALTHY[name], dim=3)
    x = width * points(3)
    x = x[target.log_prob(x).isfinite() & target.grad_log_prob(x).isfinite().all(-1)]
    if len(x):
        check_gradient(target, x)
    check_gradient(target, torch.zeros(2, 3, dtype=torch.float64))


def test_narrow_densities_from_the_origin_and_from_far_offsets() -> None:
    student = from_log_prob(lambda x: -3.0 * (1 + (x / 1e-6).square().sum(-1) / 5).log(), dim=2)
    check_gradient(student, 1e-7 + torch.zeros(1, 2, dtype=torch.float64))
    check_gradient(from_log_prob(lambda x: skewed(x - 1e9), dim=2), 1e9 + points(2))


@pytest.mark.parametrize("dim", [31, 1000])
def test_kinks_within_a_float32_step_are_no_quarrel(dim: int) -> None:
    for seed in range(30):
        check_gradient(from_log_prob(HEALTHY["laplace"], dim=dim), points(dim, torch.float32, seed=seed))


def test_views_pass() -> None:
    base = from_log_prob(skewed, dim=3)
    L = torch.tensor([[2.0, 0, 0], [0.3, 0.1, 0], [-0.5, 0.2, 1.0]], dtype=torch.float64)
    m = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    for view in (
        Pullback(base, Dense(m, L)),
        Pullback(Tempered(base, torch.tensor(0.3, dtype=torch.float64)), Diagonal(m, m)),
        Constrained(base, torch.distributions.constraints.positive),
        from_log_prob(lambda p: p.log().sum(-1), dim=4, support=torch.distributions.constraints.simplex),
    ):
        preflight(view, points(3))
