"""Every layer against the contract; what is special about each one below it."""

from __future__ import annotations

import math

import pytest
import torch
from contract import jacobian_norm, layer_contract
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipcert.bounds import audit
from lipcert.export import export
from lipcert.layers import (
    AvgPool2d,
    CenterNorm,
    Dropout,
    DropPath,
    GroupSort,
    L2Pool2d,
    LiResConv,
    MaxMin,
    NormalizedLinear,
    Shift,
    pairwise_distances,
)

test_center_norm = layer_contract(lambda: CenterNorm(6), (6, 4, 4))
test_center_norm_uncorrected = layer_contract(lambda: CenterNorm(6, correction=False), (6, 1, 1))
test_maxmin = layer_contract(MaxMin, (6, 3, 3))
test_group_sort = layer_contract(lambda: GroupSort(3), (6, 3, 3))
test_full_sort = layer_contract(lambda: GroupSort(None), (6,))
test_lires_conv = layer_contract(lambda: LiResConv(4), (4, 5, 5))
test_lires_conv_circular = layer_contract(lambda: LiResConv(4, circular=True), (4, 6, 6))
test_lires_conv_pointwise = layer_contract(lambda: LiResConv(4, 1), (4, 1, 1))
test_lires_center = layer_contract(lambda: nn.Sequential(CenterNorm(4), LiResConv(4)), (4, 5, 5))
test_shift_zero = layer_contract(lambda: Shift(6, divisor=5, circular=False), (6, 4, 4))
test_shift_circular = layer_contract(lambda: Shift(6, divisor=5, circular=True), (6, 4, 4))
test_avg_pool = layer_contract(lambda: AvgPool2d(2), (3, 5, 4))
test_l2_pool = layer_contract(lambda: L2Pool2d(2), (3, 4, 4))
test_drop_path = layer_contract(lambda: DropPath(0.5), (3, 4, 4))
test_dropout = layer_contract(lambda: Dropout(0.5), (3, 4, 4))
test_head = layer_contract(lambda: NormalizedLinear(8, 3), (8,))


def upper(layer: nn.Module, *shape: int) -> float:
    return audit(export(layer), shape).upper.require_upper()


def test_center_norm_costs_its_correction_and_nothing_without() -> None:
    assert upper(CenterNorm(6), 6, 3, 3) == pytest.approx(6 / 5, rel=1e-9)
    assert upper(CenterNorm(6, correction=False), 6, 3, 3) == pytest.approx(1.0, rel=1e-9)


def test_center_norm_matrix_is_its_linear_part() -> None:
    layer = CenterNorm(5)
    nn.init.normal_(layer.weight)
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), x @ layer.matrix().T)


@pytest.mark.parametrize("layer", [MaxMin(), GroupSort(2), GroupSort(None)])
def test_sorting_activations_are_bounded_by_one_and_reach_it(layer: nn.Module) -> None:
    assert upper(layer, 6, 2, 2) == pytest.approx(1.0, rel=1e-9)
    assert jacobian_norm(layer, torch.randn(6, 2, 2, dtype=torch.float64)) == pytest.approx(1.0, rel=1e-9)


def test_maxmin_and_group_sort_hold_the_same_values() -> None:
    x = torch.randn(5, 6)
    pairs = torch.stack(MaxMin()(x).chunk(2, dim=1), dim=2)
    torch.testing.assert_close(
        GroupSort(2)(torch.stack(x.chunk(2, dim=1), dim=2).flatten(1)).view(5, 3, 2), pairs.flip(2)
    )


@pytest.mark.parametrize("layer, shape", [(MaxMin(), (3,)), (GroupSort(2), (3,)), (L2Pool2d(2), (1, 3, 3))])
def test_shapes_that_do_not_fit_are_refused(layer: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="needs"):
        layer(torch.zeros(1, *shape))


def test_circular_shift_is_an_isometry_and_zero_fill_is_not() -> None:
    x = torch.randn(2, 12, 3, 3)
    assert Shift(12, circular=True)(x).norm() == pytest.approx(x.norm().item(), rel=1e-6)
    assert Shift(12, circular=False)(x).norm() < x.norm()
    assert upper(Shift(12, circular=False), 12, 3, 3) == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("axis, step, channel", [(3, -1, 0), (3, 1, 1), (2, -1, 2), (2, 1, 3)])
def test_shift_moves_each_group_by_one_pixel(axis: int, step: int, channel: int) -> None:
    x = torch.randn(1, 5, 4, 4)
    moved = Shift(5, divisor=5, circular=True)(x)
    torch.testing.assert_close(moved[:, channel], x.roll(step, axis)[:, channel])
    torch.testing.assert_close(moved[:, 4], x[:, 4])
    filled = Shift(5, divisor=5, circular=False)(x)
    inside = moved.clone()
    inside.select(axis, 0 if step > 0 else 3)[:, channel] = 0
    torch.testing.assert_close(filled[:, channel], inside[:, channel])


def test_repeated_zero_fill_erases_the_shifted_channels_of_a_small_map() -> None:
    x = torch.randn(1, 12, 3, 3)
    for _ in range(3):
        x = Shift(12, circular=False)(x)
    assert x[:, :4].abs().max() == 0


def test_pooling_constants() -> None:
    assert upper(AvgPool2d(2), 3, 4, 4) == pytest.approx(0.5, rel=1e-9)
    assert upper(AvgPool2d(3), 2, 7, 7) == pytest.approx(1 / 3, rel=1e-9)
    assert upper(L2Pool2d(2), 3, 4, 4) == pytest.approx(1.0, rel=1e-9)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(L2Pool2d(4)(x).flatten(1), x.flatten(2).norm(dim=2))


@pytest.mark.parametrize("layer", [DropPath(0.9), Dropout(0.9)])
def test_dropout_costs_and_gains_nothing_at_inference(layer: nn.Module) -> None:
    assert upper(layer, 3, 4, 4) == 1.0
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer.eval()(x), x)


def test_drop_path_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = DropPath(0.25)(torch.ones(4000, 1))
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)


@settings(max_examples=15)
@given(st.integers(0, 2**16), st.floats(0.0, 0.5))
def test_linear_residual_is_cheaper_than_the_sum(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    layer = LiResConv(3, scale=scale)
    residual = upper(layer, 3, 4, 4)
    conv = nn.Conv2d(3, 3, 3, padding=1)
    conv.weight = nn.Parameter(layer.branch.detach())
    assert residual <= (1 + scale * upper(conv, 3, 4, 4)) * (1 + 1e-9)
    assert jacobian_norm(export(layer), torch.zeros(3, 4, 4, dtype=torch.float64)) <= residual


def test_head_rows_have_norm_one_whatever_the_raw_weights() -> None:
    head = NormalizedLinear(8, 4)
    with torch.no_grad():
        head.raw *= torch.tensor([[1e-20], [1.0], [1e18], [3.0]])
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(4))


def test_pairwise_distances() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    distances = pairwise_distances(weight)
    torch.testing.assert_close(distances, torch.cdist(weight, weight), atol=1e-5, rtol=1e-5)
    assert (distances.diagonal() == 0).all()
    distances.sum().backward()
    assert weight.grad is not None and bool(torch.isfinite(weight.grad).all())
    assert math.isclose(pairwise_distances(torch.eye(2))[0, 1].item(), math.sqrt(2), rel_tol=1e-6)
