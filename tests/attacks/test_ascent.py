"""Lower bounds against closed forms: attained by the pair, close to the truth, never above it, inside the domain."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipcert.attacks.ascent import LowerBound, lipschitz_lower


class Function(nn.Module):
    """A plain function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def linear(weight) -> nn.Linear:
    weight = torch.as_tensor(weight, dtype=torch.float64)
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.fill_(float(weight.abs().max()))
    return layer


def check(bound: LowerBound, model: nn.Module, truth: float, reach: float, domain=(0.0, 1.0)) -> None:
    assert reach * truth <= bound.value <= truth
    model = model.double()
    with torch.no_grad():
        out_x, out_y = model(bound.x[None]), model(bound.y[None])
    quotient = float((out_x - out_y).norm() / (bound.x - bound.y).norm())
    assert bound.value <= quotient * (1 + 1e-14)  # what it says is what the pair does
    assert bound.value >= quotient * (1 - 1e-5)
    for point in (bound.x, bound.y):
        assert point.dtype == torch.float64
        assert point.min() >= domain[0] and point.max() <= domain[1]


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_linear_map_in_a_box_reaches_the_spectral_norm(rows, columns, seed, scale):
    weight = np.random.default_rng(seed).standard_normal((rows, columns)) * scale
    model = linear(weight)
    truth = np.linalg.norm(weight, 2) * (1 + 1e-14)
    check(lipschitz_lower(model, (columns,), steps=40, seed=seed), model, truth, 0.999)


def test_clustered_singular_values_are_resolved():
    # singular values 1 − (k/300)²: the power iteration alone is still at 0.998 after these steps
    values = 1 - (np.arange(300) / 300) ** 2
    left, right = (np.linalg.qr(np.random.default_rng(i).standard_normal((300, 300)))[0] for i in range(2))
    weight = left * values @ right
    model = linear(weight)
    check(lipschitz_lower(model, (300,), steps=100), model, 1 + 1e-13, 0.9999)


def test_convolution_equals_its_dense_matrix():
    layer = nn.Conv2d(2, 3, 3, padding=1, stride=2).double()
    basis = torch.eye(2 * 6 * 6, dtype=torch.float64).reshape(-1, 2, 6, 6)
    dense = (layer(basis) - layer(torch.zeros_like(basis))).flatten(1).detach().numpy()
    bound = lipschitz_lower(layer, (2, 6, 6), steps=60)
    assert bound.x.shape == (2, 6, 6)
    check(bound, layer, np.linalg.norm(dense, 2) * (1 + 1e-13), 0.999)


def test_starts_on_the_faces_of_the_box_are_moved_inside():
    model = linear(np.diag([1.0, 2.0, 5.0]))
    for starts in (torch.zeros(1, 3), torch.ones(1, 3)):
        check(lipschitz_lower(model, (3,), starts, steps=30), model, 5.0, 0.999)


@pytest.mark.parametrize(
    ("function", "truth"),
    [
        (lambda x: x**2, 2.0),  # steepest at the face x = 1
        (lambda x: torch.sin(3 * x), 3.0),  # steepest at the face x = 0
        (lambda x: torch.sigmoid(8 * (x - 0.3)), 2.0),  # steepest inside
        (lambda x: 10 * torch.relu(x - 0.6), 10.0),  # flat on more than half of the box
    ],
)
def test_the_ascent_moves_to_the_steepest_place(function, truth):
    model = Function(function)
    check(lipschitz_lower(model, (1,), steps=60), model, truth, 0.995)


def test_what_lies_outside_the_domain_does_not_count():
    model = Function(lambda x: x + 100 * torch.relu(x - 1.5) + 100 * torch.relu(-0.5 - x))
    check(lipschitz_lower(model, (4,), steps=30), model, 1.0, 0.999)
    wide = lipschitz_lower(model, (4,), steps=60, domain=(-1.0, 2.0))
    check(wide, model, 101.0, 0.9, domain=(-1.0, 2.0))


def test_two_layers_with_relu_reach_the_region_where_all_units_are_active():
    # the hidden units cancel each other's bias only where every pixel is bright
    first, second = linear(np.diag([1.0, 3.0])), linear(np.diag([2.0, 1.0]))
    with torch.no_grad():
        first.bias.copy_(torch.tensor([-0.2, -2.4]))
        second.bias.zero_()
    model = nn.Sequential(first, nn.ReLU(), second)
    check(lipschitz_lower(model, (2,), steps=80), model, 3.0, 0.999)


def test_constant_maps_and_a_step_give_zero_and_a_large_number():
    constant = Function(lambda x: torch.ones_like(x) + 0 * x)
    assert lipschitz_lower(constant, (3,), steps=3).value == 0.0
    step = Function(lambda x: torch.sigmoid(1e6 * (x - 0.5)))
    assert 1e3 < lipschitz_lower(step, (1,), steps=20).value <= 2.5e5


def test_a_network_cut_off_from_its_gradient_is_searched_all_the_same():
    weight = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    for function in (lambda x: x.detach() @ weight, lambda x: torch.ops.aten.copy(x, x @ weight)):
        bound = lipschitz_lower(Function(function), (3,), steps=60)
        assert 4.5 < bound.value <= 5.0
    jump = lipschitz_lower(Function(lambda x: x + (x.round() - x).detach()), (2,), steps=20)
    assert jump.value > 1.5  # the true function jumps, whatever its gradient says


def test_an_error_bound_of_the_outputs_is_subtracted():
    model = linear(np.diag([1.0, 2.0]))

    def evaluate(points):
        return model(points), points.new_full((len(points),), 0.05)

    with torch.no_grad():
        bound = lipschitz_lower(model, (2,), steps=30, evaluate=evaluate)
    assert bound.value <= (2 * 1.0 - 2 * 0.05) / 1.0  # the longest pair along the second axis has length 1
    assert bound.value >= 1.89 and bound.proved
    noisy = lipschitz_lower(model, (2,), steps=5, evaluate=lambda p: (model(p).detach(), p.new_full((len(p),), 9.0)))
    assert not noisy.proved and 1.9 <= noisy.value <= 2.0  # nothing is left of it: an allowance, said so
    endless = lipschitz_lower(model, (2,), steps=5, evaluate=lambda p: (model(p).detach(), p[:, 0] + 1e999))
    assert not endless.proved and 1.9 <= endless.value <= 2.0


def test_the_model_is_left_alone_and_the_seed_decides():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 2)).train()
    before = torch.get_rng_state()
    first, second = (lipschitz_lower(model, (3,), steps=10, seed=7) for _ in range(2))
    assert first.value == second.value and torch.equal(first.x, second.x)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training and model[0].weight.dtype == torch.float32 and model[0].weight.requires_grad


def test_bad_input_is_refused():
    model = linear(np.eye(2))
    with pytest.raises(ValueError, match="smaller one first"):
        lipschitz_lower(model, (2,), domain=(1.0, 0.0))
    with pytest.raises(ValueError, match="shape"):
        lipschitz_lower(model, (2,), torch.zeros(2))
    with pytest.raises(ValueError, match="lie in the domain"):
        lipschitz_lower(model, (2,), torch.full((1, 2), 1.5))
    with pytest.raises(ValueError, match="no finite output"):
        lipschitz_lower(Function(lambda x: x * math.nan), (2,))
