"""The zoo: gradients against autograd, batches of any shape, both precisions, one graph, any device."""

from __future__ import annotations

import pickle

import pytest
import torch

from tests.zoo import NAMES, get, skewed, typical


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reach", [1.0, 5.0])
def test_gradient_is_that_of_log_prob(name: str, reach: float) -> None:
    p = get(name)
    for points in (reach * skewed(p.target.dim), reach * typical(p)):
        x = points.requires_grad_()
        (wanted,) = torch.autograd.grad(p.target.log_prob(x).sum(), x)
        grad = p.target.grad_log_prob(x.detach())
        assert bool(grad.isfinite().all())
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-11 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_joint_pass_equals_the_two_methods(name: str) -> None:
    target = get(name).target
    x = skewed(target.dim)
    joint = getattr(target, "log_prob_and_grad", None)
    if joint is None:
        pytest.skip("no joint method")
    log_p, grad = joint(x)
    torch.testing.assert_close(log_p, target.log_prob(x), rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, target.grad_log_prob(x), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_any_shape(name: str) -> None:
    target = get(name).target
    x = skewed(target.dim, 6)
    log_p, grad = target.log_prob(x), target.grad_log_prob(x)
    assert log_p.shape == (6,) and grad.shape == x.shape
    torch.testing.assert_close(target.log_prob(x.reshape(2, 3, -1)), log_p.reshape(2, 3))
    torch.testing.assert_close(target.grad_log_prob(x.reshape(2, 3, -1)), grad.reshape(2, 3, -1))
    torch.testing.assert_close(target.log_prob(x[1]), log_p[1])
    torch.testing.assert_close(target.grad_log_prob(x[1]), grad[1])
    assert target.log_prob(x[:0]).shape == (0,) and target.grad_log_prob(x[:0]).shape == (0, target.dim)


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_float64(name: str) -> None:
    p = get(name)
    x = typical(p).float()
    for method in (p.target.log_prob, p.target.grad_log_prob):
        single, double = method(x), method(x.double())
        assert single.dtype == torch.float32 and double.dtype == torch.float64
        # gaussian-ill-d100 cancels coordinates of size 100 to resolve .01: 6e-8 * 100/.01 = 6e-4 of an sd
        rtol = 3e-3 if name == "gaussian-ill-d100" else 1e-4
        torch.testing.assert_close(single.double(), double, rtol=rtol, atol=rtol * float(double.abs().median()))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_in_one_graph_and_pickles(name: str) -> None:
    target = get(name).target
    x = skewed(target.dim, 3)
    compiled = torch.compile(target.grad_log_prob, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), target.grad_log_prob(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(target)).log_prob(x), target.log_prob(x))


@pytest.mark.parametrize("name", NAMES)
def test_constants_follow_the_device(name: str) -> None:
    """The meta device refuses to mix with any other, and no value can be looked at on it."""
    target = get(name).target
    x = torch.empty(4, target.dim, device="meta")
    for out in (target.log_prob(x), target.grad_log_prob(x)):
        assert out.device.type == "meta" and out.dtype == torch.float32
