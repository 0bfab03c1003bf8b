"""Chains in whole networks: slopes of operators, matrices of maps, and where the walk takes a chain for a bound."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from dense import Apply, assert_sound, dense, jacobian_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipcert.attacks.ascent import lipschitz_lower
from lipcert.bounds import BoundError, audit
from lipcert.bounds.affine import AffineMap
from lipcert.bounds.composition import METHODS, slopes
from lipcert.bounds.composition.segments import Segments, matrix
from lipcert.bounds.layout import Layout
from lipcert.bounds.tracing import trace

ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky": lambda x: F.leaky_relu(x, 0.3),
    "steep": lambda x: F.leaky_relu(x, -2.0),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "elu 2": lambda x: F.elu(x, 2.0),
    "celu": lambda x: F.celu(x, 0.5),
    "selu": F.selu,
    "softplus": F.softplus,
    "softplus 3": lambda x: F.softplus(x, 3.0),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.7),
    "clamp": lambda x: x.clamp(min=0.1),
    "abs": torch.abs,
    "sin": torch.sin,
    "cos": torch.cos,
    "atan": torch.atan,
    "erf": torch.erf,
    "log sigmoid": F.logsigmoid,
    "prelu": lambda x: F.prelu(x, torch.tensor([0.4], dtype=x.dtype)),
}


def node_of(function):
    return next(n for n in trace(Apply(lambda m, x: function(x)), (3,)).nodes if n.inputs)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_hold_are_nearly_attained_and_agree_with_the_rule(name):
    node = node_of(ACTIVATIONS[name])
    low, high = slopes(node)
    x = torch.cat([torch.linspace(-12, 12, 400001), torch.linspace(-0.01, 0.01, 1001)]).double().sort()[0]
    y = ACTIVATIONS[name](x)
    quotients = (y.diff() / x.diff())[x.diff() > 0]
    if name not in ("hardswish", "hardsigmoid"):  # which multiply by a float32 constant
        assert quotients.min() >= low - 1e-9 and quotients.max() <= high + 1e-9
    assert quotients.min() <= low + 0.01 and quotients.max() >= high - 2e-3
    rule = audit(Apply(lambda m, x: ACTIVATIONS[name](x)), (3,), domain=(-math.inf, math.inf)).upper.value
    assert max(abs(low), abs(high)) == rule


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.softmax(-1),
        lambda x: torch.maximum(x, x.flip(-1)),
        torch.sign,
        torch.exp,
        lambda x: torch.ops.aten.elu(x, 1.0, 1.0, -1.0),
        lambda x: torch.cat([x, x], 1),
        lambda x: x.sort(-1)[0],
        lambda x: torch.clamp(x, x.flip(1), x + 1),
    ],
)
def test_what_is_not_entrywise_with_a_slope_range_has_none(function):
    nodes = [node for node in trace(Apply(lambda m, x: function(x)), (4,)).nodes if node.inputs]
    assert nodes and all(slopes(node) is None for node in nodes)


MAPS = [
    AffineMap(torch.randn(3, 2, 2, 1, dtype=torch.float64), ((0, 0), (1, -1), (-1, 2)), (4, 5), (2, 3), stride=(2, 2)),
    AffineMap(torch.randn(2, 1, 3, 2, dtype=torch.float64), ((0, 0), (0, 3)), (1, 3), (1, 3), wrap=(False, True)),
    AffineMap(torch.randn(1, 1, 3, 2, dtype=torch.float64), ((0, 0),), (1, 1), (1, 1)),
]


@pytest.mark.parametrize("m", MAPS)
def test_maps_are_written_out_in_the_order_of_the_tensor(m):
    own = Layout.of((1, m.c_in, *m.n), 0, 1)
    result = Layout.of((1, m.c_out, *m.out), 0, 1)
    expected = dense(m)
    assert torch.allclose(matrix(m, result, own), expected)
    last = result.permute((0, 2, 3, 1))  # channels last
    moved = expected.reshape(m.c_out, *m.out, -1).permute(1, 2, 0, 3).reshape(m.size, -1)
    assert torch.allclose(matrix(m, last, own), moved)
    last = Layout.of((1, *m.n, m.c_in), 0, 3)
    moved = expected.reshape(m.size, m.c_in, *m.n).permute(0, 2, 3, 1).reshape(m.size, -1)
    assert torch.allclose(matrix(m, result, last), moved)


def mlp(*widths, activation=nn.ReLU):
    layers = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


WHOLE = {
    "mlp": (lambda: nn.Sequential(nn.Flatten(), mlp(16, 12, 10, 3, activation=nn.GELU)), (1, 4, 4), True),
    "batch norm between": (
        lambda: nn.Sequential(mlp(6, 5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).eval(),
        (6,),
        True,
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(3, 4, 2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64, 3),
        ),
        (2, 7, 7),
        True,
    ),
    "channels last": (
        lambda: Apply(
            lambda m, x: m.b(F.relu(m.a(x)).permute(0, 2, 3, 1).flatten(1)), a=nn.Conv2d(2, 3, 2), b=nn.Linear(27, 4)
        ),
        (2, 4, 4),
        True,
    ),
    "transposed before": (
        lambda: Apply(
            lambda m, x: m.b(F.relu(m.a(x)).transpose(2, 3).flatten(1)), a=nn.Conv2d(2, 3, 2), b=nn.Linear(27, 4)
        ),
        (2, 4, 4),
        True,
    ),
    "tokens": (lambda: mlp(5, 9, 5, activation=nn.GELU), (7, 5), True),
    "one by one": (lambda: nn.Sequential(nn.Conv2d(4, 9, 1), nn.GELU(), nn.Conv2d(9, 4, 1)), (4, 6, 6), True),
    "circular": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"),
        ),
        (2, 2, 4),
        True,
    ),
    "residual linear": (
        lambda: Apply(lambda m, x: m.b(F.relu(x + m.a(x))), a=nn.Linear(6, 6), b=nn.Linear(6, 6)),
        (6,),
        True,
    ),
    "fork inside": (
        lambda: Apply(
            lambda m, x: (lambda h: m.b(h) + m.c(F.relu(m.b(h))))(F.relu(m.a(x))),
            a=nn.Linear(6, 6),
            b=nn.Linear(6, 6),
            c=nn.Linear(6, 6),
        ),
        (6,),
        False,
    ),
    "residual": (
        lambda: Apply(lambda m, x: x + m.b(F.relu(m.a(x))), a=nn.Linear(6, 6), b=nn.Linear(6, 6)),
        (6,),
        False,
    ),
    "two of one": (
        lambda: Apply(
            lambda m, x: torch.cat([m.b(F.relu(m.a(x))), m.c(F.relu(m.a(x)))], 1),
            a=nn.Linear(6, 6),
            b=nn.Linear(6, 4),
            c=nn.Linear(6, 4),
        ),
        (6,),
        False,
    ),
}


@pytest.mark.parametrize("which", WHOLE)
def test_networks_are_chains_where_they_can_be(which, monkeypatch):
    """Above every Jacobian, at both settings; from the input in one row where the network is one chain."""
    make, shape, whole = WHOLE[which]
    model = make()
    fast = assert_sound(model, shape)
    tight = audit(model, shape, tightness="tight")
    assert jacobian_norm(model, shape, 30) <= tight.upper.value <= fast.upper.value
    with monkeypatch.context() as without:
        without.setattr(Segments, "bound", lambda self, value: None)
        plain = audit(model, shape).upper.value
    assert fast.upper.value <= plain * (1 + 1e-12)
    if whole:
        assert tight.layers[-1].op.startswith("chain: ") and tight.layers[-1].cumulative == tight.layers[-1].upper
        assert tight.upper.value < plain * 0.97
    x = torch.rand(3, *shape)
    with torch.no_grad():
        happened = (model.float()(x).double() - tight.program(x.double())).flatten(1).norm(dim=1)
    assert (happened <= tight.program.evaluate(x.double(), "float32")[1]).all()


def test_pointwise_maps_of_different_dimensions_are_not_one_position():
    """A map of the channels and one of the columns: the norms multiply, whatever the product of their matrices is."""
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Linear(6, 3))
    for layer in (model[0], model[2]):
        layer.weight.data = layer.weight.data.abs()
    model[0].weight.data[1:] *= 0.01
    model[2].weight.data[:, 0] *= 0.01
    model[0].bias.data.fill_(100.0)
    norms = [float(torch.linalg.matrix_norm(model[k].weight.data.double().flatten(1), 2)) for k in (0, 2)]
    assert norms[0] * norms[1] <= audit(model, (4, 2, 6)).upper.value <= norms[0] * norms[1] * (1 + 1e-6)


@st.composite
def networks(draw):
    depth = draw(st.integers(1, 4))
    widths = draw(st.lists(st.integers(1, 12), min_size=depth + 1, max_size=depth + 1))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layer = nn.Linear(a, b).double()
        layer.weight.data *= 10.0 ** draw(st.integers(-2, 2))
        name = draw(st.sampled_from(sorted(ACTIVATIONS)))
        layers += [layer, Apply(lambda m, x, f=ACTIVATIONS[name]: f(x))]
    return nn.Sequential(*layers[:-1]), widths[0]


@given(networks())
@settings(max_examples=25, deadline=None)
def test_random_fully_connected_networks_are_above_attacks(case):
    model, size = case
    result = audit(model, (size,), domain=(-2, 2))
    lower = lipschitz_lower(model, (size,), steps=10, domain=(-2, 2), evaluate=result.program.evaluate)
    assert lower.value <= result.upper.value
    assert jacobian_norm(model, (size,)) <= result.upper.value * (1 + 1e-9)


def test_the_head_profits_from_the_chain_below_it():
    torch.manual_seed(0)
    model = mlp(8, 16, 16, 5)
    result = audit(model, (8,))
    norms = [float(torch.linalg.matrix_norm(model[k].weight.detach(), 2)) for k in (0, 2)]
    assert result.head.penultimate.value < 0.95 * norms[0] * norms[1]
    tight = audit(model, (8,), tightness="tight").head.penultimate.value
    assert tight < result.head.penultimate.value


def test_sorting_is_not_a_slope():
    """MaxMin between linear layers is bounded by their product, as before."""

    def maxmin(m, x):
        a, b = x.chunk(2, 1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)

    model = nn.Sequential(nn.Linear(4, 6), Apply(maxmin), nn.Linear(6, 3))
    for tightness in METHODS:
        result = audit(model, (4,), tightness=tightness)
        assert not any(row.op.startswith("chain") for row in result.layers)


def test_an_unknown_tightness_is_refused():
    with pytest.raises(BoundError, match="fast"):
        audit(nn.Linear(2, 2), (2,), tightness="loose")
