"""FunctionTarget, from_log_prob and log_prob_and_grad: shapes, modes, rejected points, one point at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from boltzsample import errors
from boltzsample.adapters import VectorizeError, from_log_prob
from boltzsample.preflight import check_gradient, check_interface
from boltzsample.target import FunctionTarget, Target, log_prob_and_grad, readout


def skewed(x: Tensor) -> Tensor:
    shape = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    return (shape * x - x.exp()).sum(-1)


def slope(x: Tensor) -> Tensor:
    return torch.arange(1, x.shape[-1] + 1, dtype=x.dtype) - x.exp()


def points(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (2, 1, 4), (0,)])
@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("grad", [None, slope])
def test_any_batch_shape(batch: tuple[int, ...], dim: int, grad: Callable[[Tensor], Tensor] | None) -> None:
    target, x = from_log_prob(skewed, dim=dim, grad=grad), points(*batch, dim)
    log_p, g = log_prob_and_grad(target, x)
    assert log_p.shape == batch and g.shape == x.shape and log_p.dtype == g.dtype == x.dtype
    torch.testing.assert_close(log_p, skewed(x))
    torch.testing.assert_close(g, slope(x))
    torch.testing.assert_close(target.log_prob(x), log_p)
    torch.testing.assert_close(target.grad_log_prob(x), g)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_grad_mode_and_no_graph_comes_out(mode: Callable[[], torch.no_grad]) -> None:
    weight = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    target = from_log_prob(lambda x: weight * skewed(x), dim=3)
    with mode():
        x = points(4, 3) + 0.0
        log_p, grad = log_prob_and_grad(target, x)
        assert not log_p.requires_grad and not grad.requires_grad and not x.requires_grad
    torch.testing.assert_close(grad, 2 * slope(points(4, 3)))
    assert weight.grad is None


def test_strided_and_expanded_points() -> None:
    target, x = from_log_prob(skewed, dim=3), points(4, 6)
    for y in (x[:, ::2], x.T[:, :3], x[:1, :3].expand(4, 3), x[None, :, 3:].expand(2, 4, 3)):
        torch.testing.assert_close(log_prob_and_grad(target, y)[1], slope(y))


def test_gradient_where_the_density_is_zero_is_zero() -> None:
    target = from_log_prob(lambda x: torch.where(x[:, 0] > 0, x[:, 0].log(), -torch.inf), dim=1)
    log_p, grad = log_prob_and_grad(target, torch.tensor([[2.0], [0.0], [-1.0]]))
    assert log_p.tolist()[1:] == [-torch.inf, -torch.inf] and grad.tolist() == [[0.5], [0.0], [0.0]]


def test_rejected_points_count_as_density_zero() -> None:
    def fn(x: Tensor) -> Tensor:
        if (x[:, 0] < 0).any():
            raise errors.RejectPoint
        return skewed(x)

    def grad(x: Tensor) -> Tensor:
        fn(x)
        return slope(x)

    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, 0.1]])
    for target in (from_log_prob(fn, dim=2), from_log_prob(fn, dim=2, grad=grad)):
        log_p, g = log_prob_and_grad(target, x)
        assert log_p[1] == -torch.inf and (g[1] == 0).all()
        torch.testing.assert_close(g[[0, 2]], slope(x[[0, 2]]))


def test_no_gradient_through_numpy() -> None:
    target = from_log_prob(lambda x: torch.from_numpy(-(x.detach().numpy() ** 2).sum(-1)), dim=2)
    with pytest.raises(errors.NoGradient, match="grad="):
        target.grad_log_prob(points(3, 2))
    assert not check_interface(target, points(4, 2)).has_gradient


def test_own_class_without_a_joint_method() -> None:
    class Own:
        dim = 2

        def log_prob(self, x: Tensor) -> Tensor:
            return skewed(x)

        def grad_log_prob(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.log_prob(x).sum(), x)[0]

    assert isinstance(Own(), Target)
    with torch.no_grad():
        torch.testing.assert_close(log_prob_and_grad(Own(), points(2, 3, 2))[1], slope(points(2, 3, 2)))
    assert readout(Own(), points(1, 2)).shape == (1, 2)  # type: ignore[union-attr]


def test_no_graph_leaks_out_of_a_joint_method() -> None:
    weight = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    class Leaky:
        dim = 2

        def log_prob(self, x: Tensor) -> Tensor:
            return weight * skewed(x)

        def grad_log_prob(self, x: Tensor) -> Tensor:
            return weight * slope(x)

        def log_prob_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.log_prob(x), self.grad_log_prob(x)

    assert not any(t.requires_grad for t in log_prob_and_grad(Leaky(), points(3, 2)))


# ---- from_log_prob at the door ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, -3, 2.5, "2", None])
def test_bad_dim(dim: int) -> None:
    with pytest.raises(errors.ShapeError, match="dim must be"):
        from_log_prob(skewed, dim=dim)


def test_bad_names_and_event_shape() -> None:
    with pytest.raises(errors.ShapeError, match="2 entries for dim=3"):
        from_log_prob(skewed, dim=3, names=["a", "b"])
    with pytest.raises(errors.ShapeError, match=r"\(2, 2\) holds 4"):
        from_log_prob(skewed, dim=3, event_shape=(2, 2))
    named = from_log_prob(skewed, dim=2, names=["a", "b"])
    assert isinstance(named, FunctionTarget) and named.names == ("a", "b")


def test_one_point_at_a_time() -> None:
    def fn(x: Tensor) -> Tensor:
        assert x.shape == (3,)
        return skewed(x)

    target, x = from_log_prob(fn, dim=3, vectorized=False), points(2, 4, 3)
    torch.testing.assert_close(log_prob_and_grad(target, x)[1], slope(x))
    check_interface(target, points(4, 3))
    check_gradient(target, points(4, 3))
    given = from_log_prob(fn, dim=3, vectorized=False, grad=slope)
    torch.testing.assert_close(log_prob_and_grad(given, x)[1], slope(x))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: skewed(x) if x[0] > 0 else -skewed(x),
        lambda x: torch.tensor(float(x.sum().item())),
        lambda x: skewed(x) + torch.randn(()),
        lambda x: 1.0,
    ],
)
def test_vmap_that_fails_says_what_to_do(fn: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(VectorizeError, match=r"torch\.where") as raised:
        from_log_prob(fn, dim=2, vectorized=False).log_prob(points(3, 2))
    assert raised.value.__cause__ is not None


def test_errors_of_the_user_pass_through_vmap() -> None:
    def fn(x: Tensor) -> Tensor:
        return x @ torch.ones(7, dtype=x.dtype)

    with pytest.raises(RuntimeError, match="size") as raised:
        from_log_prob(fn, dim=2, vectorized=False).log_prob(points(3, 2))
    assert not isinstance(raised.value, errors.BoltzsampleError)


def test_a_function_of_matrices() -> None:
    def fn(x: Tensor) -> Tensor:
        assert x.shape[1:] == (2, 3)
        return -x[:, 0].square().sum(-1) - 3 * x[:, 1].square().sum(-1)

    def grad(x: Tensor) -> Tensor:
        return -2 * x * torch.tensor([[1.0], [3.0]], dtype=x.dtype)

    x = points(5, 6)
    for target in (from_log_prob(fn, dim=6, event_shape=(2, 3)), from_log_prob(fn, dim=6, event_shape=(2, 3), grad=grad)):
        torch.testing.assert_close(log_prob_and_grad(target, x)[1], grad(x.reshape(5, 2, 3)).reshape(5, 6))
        read = readout(target, x)
        assert isinstance(read, Tensor) and read.shape == (5, 2, 3)


def test_support_is_applied() -> None:
    target = from_log_prob(skewed, dim=4, support=constraints.simplex, names=["a", "b", "c", "d"])
    read = readout(target, points(5, 3))
    assert target.dim == 3 and isinstance(read, Tensor)
    torch.testing.assert_close(read.sum(-1), torch.ones(5, dtype=torch.float64))
