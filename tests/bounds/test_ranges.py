"""Ranges contain every value that the domain reaches; bounds that rest on them hold inside the domain."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from dense import Apply
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipcert.attacks.ascent import lipschitz_lower
from lipcert.bounds import audit
from lipcert.bounds.graph import BatchConstant, BatchSize, Ref, call
from lipcert.bounds.patterns import lift
from lipcert.bounds.ranges import RANGES, Range, Ranges, product, ranged, total
from lipcert.bounds.tracing import trace


def values(graph, x):
    """Return the value of every node at x, as the graph computes it."""
    known = {graph.input.name: x}

    def plain(argument):
        if isinstance(argument, Ref):
            return known[argument.name]
        if isinstance(argument, BatchSize):
            return argument.factor * len(x)
        if isinstance(argument, BatchConstant):
            return argument.tensor
        return [plain(item) for item in argument] if isinstance(argument, tuple) else argument

    for node in graph.nodes[1:]:
        result = call(node.target, {key: plain(argument) for key, argument in node.arguments.items()})
        known[node.name] = result[node.output or 0] if isinstance(result, tuple | list) else result
    return known


def points(shape, low, high, count=12):
    """Return random points of a box, corners among them, one at a time."""
    generator = torch.Generator().manual_seed(5)
    for k in range(count):
        x = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
        yield low + (high - low) * (x.round() if k % 3 == 0 else x)


def norm(*shape):
    layer = nn.BatchNorm2d(shape[0])
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.2, 2.0)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def _linear_attention(q, k, v):
    """Kernel attention with ReLU features, its denominator computed as one more column of v."""
    summed = q @ (k.mT @ F.pad(v, (0, 1), value=1.0))
    return summed[..., :-1] / (summed[..., -1:] + 1.0)


SHAPE = (4, 6, 6)
MODELS = {
    "conv": (lambda m, x: m.a(x), lambda: dict(a=nn.Conv2d(4, 6, 3, padding=1, groups=2))),
    "strided, dilated": (lambda m, x: m.a(x), lambda: dict(a=nn.Conv2d(4, 6, 3, stride=2, dilation=2))),
    "same": (lambda m, x: m.a(x), lambda: dict(a=nn.Conv2d(4, 3, 4, padding="same"))),
    "transposed": (lambda m, x: m.a(x), lambda: dict(a=nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2))),
    "batch norm": (lambda m, x: m.a(m.b(x)), lambda: dict(a=norm(5), b=nn.Conv2d(4, 5, 1))),
    "layer norm": (lambda m, x: m.a(x), lambda: dict(a=nn.LayerNorm(6))),
    "group norm": (lambda m, x: m.a(x), lambda: dict(a=nn.GroupNorm(2, 4))),
    "linear": (lambda m, x: m.a(x) - m.b(x), lambda: dict(a=nn.Linear(6, 3), b=nn.Linear(6, 3, bias=False))),
    "product of one sign": (
        lambda m, x: m.a(x).relu() @ m.b(x) - m.b(x) @ m.a(x).relu() + m.a(x).relu() @ m.b(x).relu(),
        lambda: dict(a=nn.Linear(6, 6), b=nn.Linear(6, 6)),
    ),
    "linear attention": (
        lambda m, x: _linear_attention(m.a(x).relu(), m.b(x).relu(), m.a(x)),
        lambda: dict(a=nn.Linear(6, 6), b=nn.Linear(6, 6)),
    ),
    "entrywise": (
        lambda m, x: F.gelu(x) + F.silu(x) * F.mish(-x) - F.hardswish(3 * x) + F.softplus(x) + F.elu(x) + x.sin(),
        dict,
    ),
    "gates": (lambda m, x: x * m.a(x.mean((2, 3), keepdim=True)).sigmoid(), lambda: dict(a=nn.Conv2d(4, 4, 1))),
    "roots": (lambda m, x: (x.square().sum(1, keepdim=True) + 0.1).sqrt() + (x.abs() + 0.5).rsqrt(), dict),
    "powers": (lambda m, x: x.pow(3) + (x + 4).pow(-1.5) + (0.3 * x).exp() / (x.abs() + 1), dict),
    "softmax": (lambda m, x: x.softmax(1) @ x.transpose(2, 3) + x.log_softmax(-1), dict),
    "normalised": (lambda m, x: F.normalize(x, dim=1) * x.norm(dim=1, keepdim=True), dict),
    "pieces": (lambda m, x: torch.cat([x[:, :2].amax(1, True), F.pad(x, (1, 1))[:, 1:, :, 1:-1].flip(3)], 1), dict),
    "pools": (lambda m, x: F.avg_pool2d(x, 3, 1, 1) + F.max_pool2d(x, 3, 1, 1) - x.mean(1, keepdim=True), dict),
    "centred": (lambda m, x: x - x.mean((1, 2), keepdim=True), dict),
    "maxmin": (lambda m, x: torch.cat([torch.maximum(*x.chunk(2, 1)), torch.minimum(*x.chunk(2, 1))], 1), dict),
    "attention": (lambda m, x: F.scaled_dot_product_attention(x, 2 * x, x.flip(3)), dict),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("domain", [(0.0, 1.0), (-3.0, 2.0)])
def test_every_value_lies_in_its_range(name, domain):
    torch.manual_seed(0)
    forward, parts = MODELS[name]
    graph = lift(trace(Apply(forward, **parts()), SHAPE))
    ranges = Ranges(graph, domain)
    for x in points(SHAPE, *domain):
        for key, value in values(graph, x).items():
            found = ranges(key)
            assert found.finite, key
            assert bool((value >= found.low - 1e-13).all() and (value <= found.high + 1e-13).all()), key


@pytest.mark.parametrize("name", MODELS)
def test_bounds_from_ranges_hold_inside_the_domain(name):
    torch.manual_seed(1)
    forward, parts = MODELS[name]
    model = Apply(forward, **parts()).double().eval()
    result = audit(model, SHAPE)
    lower = lipschitz_lower(model, SHAPE, steps=12, evaluate=result.program.evaluate)
    assert 0.0 < lower.value <= result.upper.value < math.inf
    x = torch.cat(list(points(SHAPE, 0.0, 1.0)))
    output, error = result.program.evaluate(x)
    # torch's hardswish multiplies by a sixth that is rounded to float32
    assert bool(((output - model(x)).flatten(1).norm(dim=1) <= error * 2 + 1e-6 * (name == "entrywise")).all())
    assert float(error.max()) < 1e-7  # softplus is linear from 20 on, off by e^-20


@pytest.mark.parametrize("name, exact", [("gelu", F.gelu), ("silu", F.silu), ("mish", F.mish)])
def test_the_dip_of_an_activation_is_found(name, exact):
    graph = lift(trace(Apply(lambda m, x: exact(x)), (1,)))
    lowest = float(exact(torch.linspace(-3, 0, 300_001, dtype=torch.float64)).min())
    found = Ranges(graph, (-5.0, 1.0))(graph.output)
    assert lowest - 1e-3 < float(found.low) <= lowest
    beside = Ranges(graph, (-0.2, 1.0))(graph.output)
    assert float(beside.low) == pytest.approx(float(exact(torch.tensor(-0.2, dtype=torch.float64))), rel=1e-5)


reals = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(st.tuples(reals, reals), st.tuples(reals, reals), st.floats(0, 1), st.floats(0, 1), st.floats(-4, 4))
@settings(max_examples=300, deadline=None)
def test_interval_arithmetic(first, second, s, t, factor):
    a, b = (Range(*torch.tensor(sorted(pair), dtype=torch.float64)[:, None]) for pair in (first, second))
    x = float(a.low + s * (a.high - a.low))
    y = float(b.low + t * (b.high - b.low))
    x, y = min(max(x, float(a.low)), float(a.high)), min(max(y, float(b.low)), float(b.high))
    assert float(product(a, b).low) <= x * y <= float(product(a, b).high)
    assert float(total(a, b, factor).low) <= x + factor * y <= float(total(a, b, factor).high)


@pytest.mark.parametrize(
    "forward, domain",
    [
        (lambda m, x: x.exp(), (0, math.inf)), (lambda m, x: 1 / x, (0, 1)), (lambda m, x: x.sqrt(), (0, 1)),
        (lambda m, x: x / x.sum(-1, keepdim=True), (-1, 1)), (lambda m, x: x.log(), (0, 1)),
        (lambda m, x: x * x, (-math.inf, math.inf)),
    ],
)  # fmt: skip
def test_without_a_finite_slope_on_the_domain_there_is_no_bound(forward, domain):
    result = audit(Apply(forward), (3,), domain=domain)
    assert math.isinf(result.upper.value) and len(result.unbounded) == 1


def test_an_error_above_its_margin_makes_the_rounding_error_infinite():
    """1/b with b in [1e-9, 1] by a clamp, behind a cancellation that loses more than a thousandth of 1e-9."""
    model = Apply(lambda m, x: 1 / ((x + 1e10) - 1e10).clamp(1e-9, 1.0))
    result = audit(model, (1,))
    assert result.upper.value == pytest.approx(1e18, rel=1e-2)
    _, error = result.program.evaluate(torch.tensor([[0.5]], dtype=torch.float64))
    assert math.isinf(float(error))
    gentle = audit(Apply(lambda m, x: 1 / (x + 0.5)), (1,))
    assert float(gentle.program.evaluate(torch.tensor([[0.5]], dtype=torch.float64))[1]) < 1e-13


def test_silu_written_out_has_the_slope_of_silu():
    written = audit(Apply(lambda m, x: x * x.sigmoid()), (3,), domain=(-100, 100))
    assert written.upper.value == audit(nn.SiLU(), (3,)).upper.value
    other = audit(Apply(lambda m, x: x * (2 * x).sigmoid()), (3,), domain=(-100, 100))
    assert other.upper.value > 10


def test_an_operator_has_one_range_function():
    name = next(iter(RANGES))
    with pytest.raises(ValueError, match="already"):
        ranged(name)(lambda node, ranges: None)
