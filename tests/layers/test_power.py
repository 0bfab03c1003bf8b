"""Power iteration: converges to the dense norm from below, batched, differentiable, never stuck at zero."""

from __future__ import annotations

import copy

import pytest
import torch
from contract import jacobian_norm
from torch import nn

from lipcert.layers import AvgPool2d, CenterNorm, LiResConv, PowerIteration


def segment(dim: int, grid: int, **kwargs) -> tuple[nn.Module, tuple[int, ...]]:
    module = nn.Sequential(CenterNorm(dim), LiResConv(dim, **kwargs))
    nn.init.normal_(module[0].weight)
    nn.init.normal_(module[0].bias)  # a bias must not count
    nn.init.normal_(module[1].bias)
    return module, (dim, grid, grid)


def dense(module: nn.Module, shape: tuple[int, ...]) -> float:
    return jacobian_norm(copy.deepcopy(module).double(), torch.zeros(shape, dtype=torch.float64))


def test_estimates_converge_from_below_to_the_norm_on_the_true_grid() -> None:
    segments = [
        segment(4, 3),
        segment(4, 3, circular=True),
        segment(4, 5),
        segment(4, 3),
        segment(4, 3, scale=2.0),
        (nn.Conv2d(3, 4, 2, stride=2), (3, 6, 6)),
        (nn.Linear(7, 5), (7,)),
        (nn.Sequential(CenterNorm(4), AvgPool2d(2)), (4, 4, 4)),
    ]
    power = PowerIteration(segments)
    few = [norm.item() for norm in power(1)]
    many = [norm.item() for norm in power(200)]
    for (module, shape), low, high in zip(segments, few, many, strict=True):
        truth = dense(module, shape)
        assert low <= truth * (1 + 1e-5)
        assert high == pytest.approx(truth, rel=1e-3)


def test_equal_segments_share_one_batch_and_grids_do_not_mix() -> None:
    power = PowerIteration([segment(4, 3), segment(4, 5), segment(4, 3)])
    assert sorted(tuple(buffer.shape) for buffer in power.buffers()) == [(1, 100), (2, 36)]


def test_estimate_is_warm_started() -> None:
    module, shape = segment(6, 4)
    power, truth = PowerIteration([(module, shape)]), dense(module, shape)
    errors = [truth - power(1)[0].item() for _ in range(30)]
    assert errors[-1] < errors[0] / 10
    assert PowerIteration([(module, shape)])(1)[0].item() == pytest.approx(truth - errors[0], rel=1e-5)


def test_gradient_is_that_of_the_norm() -> None:
    module, shape = segment(3, 3)
    power = PowerIteration([(module, shape)])
    power(200)
    power(1)[0].backward()
    weight = module[1].branch
    step = 1e-3 * weight.grad / weight.grad.norm()
    before = dense(module, shape)
    with torch.no_grad():
        weight += step
    assert dense(module, shape) - before == pytest.approx((step * weight.grad).sum().item(), rel=0.02)


def test_a_zero_operator_gives_zero_and_the_vector_recovers() -> None:
    linear = nn.Linear(4, 4)
    nn.init.zeros_(linear.weight)
    power = PowerIteration([(linear, (4,))])
    assert power(5)[0].item() == 0.0
    nn.init.eye_(linear.weight)
    assert power(1)[0].item() == pytest.approx(1.0)


def test_a_vector_in_the_kernel_is_not_a_trap() -> None:
    linear = nn.Linear(3, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.tensor([0.0, 0.0, 2.0])))
    power = PowerIteration([(linear, (3,))])
    power.vectors0.copy_(torch.tensor([[1.0, 0.0, 0.0]]))
    assert power(4)[0].item() == pytest.approx(2.0)


def test_tiny_and_huge_weights_are_measured() -> None:
    for factor in (1e-12, 1e12):
        linear = nn.Linear(5, 5)
        with torch.no_grad():
            linear.weight *= factor
        assert PowerIteration([(linear, (5,))])(60)[0].item() == pytest.approx(dense(linear, (5,)), rel=1e-3)


def test_vectors_travel_with_the_state_and_parameters_have_one_owner() -> None:
    linear = nn.Linear(4, 4)
    power = PowerIteration([(linear, (4,))])
    power(3)
    assert list(power.state_dict()) == ["vectors0"]
    other = PowerIteration([(linear, (4,))], seed=1)
    other.load_state_dict(power.state_dict())
    assert other(1)[0].item() == power(1)[0].item()


def test_estimate_is_float32_under_autocast() -> None:
    module, shape = segment(4, 3)
    power = PowerIteration([(module, shape)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert power(100)[0].item() == pytest.approx(dense(module, shape), rel=1e-3)
