"""Chains of affine maps and activations: every method above what slopes attain, exact where it must be, and proved."""

from __future__ import annotations

import doctest
import math
from fractions import Fraction

import numpy
import pytest
import torch
import torch.nn.functional as F
from dense import Apply, assert_sound, dense, jacobian_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lipcert.bounds.composition.chain
import lipcert.bounds.composition.methods
from lipcert.attacks.ascent import lipschitz_lower
from lipcert.bounds import BoundError, audit
from lipcert.bounds.affine import AffineMap
from lipcert.bounds.composition import METHODS, Chain, chain_bound, slopes
from lipcert.bounds.composition.certificate import proved
from lipcert.bounds.composition.chain import _compressed
from lipcert.bounds.composition.methods import _closed_form, product
from lipcert.bounds.composition.segments import matrix
from lipcert.bounds.layout import Layout
from lipcert.bounds.patterns import lift
from lipcert.bounds.propagation import propagate
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


# ------------------------------------------------------------------------------------------------ chains of matrices


def attained(chain, seed=0, tries=12):
    """Return a large norm of W_K D_{K-1} ⋯ D_1 W_1 over diagonal D_k with slopes at an end, improved one at a time."""
    generator = torch.Generator().manual_seed(seed)

    def norm(choice):
        total = chain.matrices[0]
        for W, (low, high), bits in zip(chain.matrices[1:], chain.slopes, choice, strict=True):
            total = W @ (torch.where(bits, high, low).double()[:, None] * total)
        return float(numpy.linalg.norm(total.numpy(), 2))

    best, chosen = -1.0, None
    for _ in range(tries):
        choice = [torch.rand(len(W), generator=generator) < 0.5 for W in chain.matrices[:-1]]
        if (value := norm(choice)) > best:
            best, chosen = value, choice
    best = max(best, norm([torch.ones(len(W), dtype=torch.bool) for W in chain.matrices[:-1]]))
    for bits in chosen or []:
        for i in range(len(bits)):
            bits[i] = ~bits[i]
            value = norm(chosen)
            if value > best:
                best = value
            else:
                bits[i] = ~bits[i]
    return best * 2.0**chain.exponent


@st.composite
def chains(draw, linear=False, widest=12, deepest=5):
    """Draw widths, depth, slopes of all activations, scales from 1e-6 to 1e6, ranks and zeros."""
    depth = draw(st.integers(1, deepest))
    widths = draw(st.lists(st.integers(1, widest), min_size=depth + 1, max_size=depth + 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    matrices = []
    for rows, columns in zip(widths[1:], widths[:-1], strict=True):
        kind = draw(st.sampled_from(["normal", "normal", "low rank", "positive", "zero rows", "zero"]))
        W = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        if kind == "low rank":
            W = W[:, :1] @ torch.randn(1, columns, generator=generator, dtype=torch.float64)
        elif kind == "positive":
            W = W.abs()
        elif kind == "zero rows":
            W[::2] = 0.0
        elif kind == "zero" and draw(st.integers(0, 5)) == 0:
            W = torch.zeros_like(W)
        matrices.append(W * 10.0 ** draw(st.integers(-6, 6)))
    ends = st.floats(-2.0, 2.0, width=32)
    ranges = []
    for _ in range(depth - 1):
        if linear:
            ranges.append((end := draw(ends), end))
        else:
            low, high = sorted((draw(ends), draw(ends)))
            known = [(0.0, 1.0), (-0.13, 1.13), (0.0, 0.25), (-1.0, 1.0), (-0.5, 1.5)]
            ranges.append(draw(st.sampled_from(known)) if draw(st.booleans()) else (low, high))
    return Chain(tuple(matrices), tuple(ranges))


@given(chains())
@settings(max_examples=100, deadline=None)
def test_every_method_is_above_what_slopes_within_the_range_attain(chain):
    floor, normal = attained(chain), chain.normal()
    limit = product(chain)
    assert limit.value >= floor * (1 - 1e-12)
    whole = chain_bound(chain)
    assert whole.kind == "upper" and floor * (1 - 1e-12) <= whole.value <= limit.value
    if normal is not None:
        assert all(norm * steep <= 1.0 for norm, steep in zip(normal.norms, (*normal.steepest, 1.0), strict=True))
        for method in METHODS["fast"]:
            bound = method(normal)
            assert bound is None or (bound.kind == "upper" and bound.value >= floor * (1 - 1e-12)), method


@given(chains(widest=6, deepest=4))
@settings(max_examples=25, deadline=None)
def test_optimised_multipliers_are_sound_and_no_worse(chain):
    tight, fast = chain_bound(chain, "tight").value, chain_bound(chain).value
    assert attained(chain) * (1 - 1e-12) <= tight <= fast


@given(chains(linear=True))
@settings(max_examples=80, deadline=None)
def test_linear_activations_give_the_norm_of_the_product(chain):
    total = chain.matrices[0]
    for W, (slope, _) in zip(chain.matrices[1:], chain.slopes, strict=True):
        total = W @ (slope * total)
    exact, limit = float(torch.linalg.matrix_norm(total, 2)), product(chain).value
    bound = chain_bound(chain).value
    assert exact * (1 - 1e-12) <= bound <= exact * (1 + 1e-9) + 1e-12 * limit


def test_almost_linear_activations_are_almost_the_norm_of_the_product():
    torch.manual_seed(0)
    W = [torch.randn(8, 8, dtype=torch.float64) for _ in range(3)]
    exact = float(torch.linalg.matrix_norm(W[2] @ W[1] @ W[0], 2))
    for width, slack in ((1e-2, 0.3), (1e-4, 0.05), (1e-6, 0.01), (1e-9, 0.01)):
        bound = chain_bound(Chain(tuple(W), ((1.0 - width, 1.0),) * 2)).value
        assert exact <= bound <= exact * (1 + slack)


def test_one_neuron_at_a_time_is_exact():
    chain = Chain(tuple(torch.tensor([[w]], dtype=torch.float64) for w in (3.0, -2.0, 0.5)), ((0.0, 1.0), (-0.5, 0.25)))
    for tightness in METHODS:
        assert 1.5 <= chain_bound(chain, tightness).value <= 1.5 * (1 + 1e-9)


def test_nonnegative_weights_have_the_norm_of_their_product_and_less_is_refused():
    """With all ReLUs active the product of the matrices is attained; multipliers prove it, and prove nothing smaller."""
    torch.manual_seed(0)
    W = [torch.rand(n, m, dtype=torch.float64) for n, m in ((10, 2), (12, 10), (2, 12))]
    chain = Chain(tuple(W), ((0.0, 1.0),) * 2)
    exact = float(torch.linalg.matrix_norm(W[2] @ W[1] @ W[0], 2))
    bound = chain_bound(chain, "tight")
    assert bound.method == "LipSDP-Neuron" and exact <= bound.value <= exact * (1 + 1e-5)
    normal = chain.normal()
    square, scalars = _closed_form(normal)
    multipliers = [torch.full_like(V[:, 0], s) for V, s in zip(normal.matrices, scalars, strict=False)]
    closed = proved(normal, square, multipliers)
    assert exact < closed < product(chain).value * 0.999
    for factor in (1 - 1e-6, 0.99, 0.5, 1e-3):
        assert proved(normal, square * factor, multipliers) is None
    for k in range(2):
        wrong = [m * (1.01 if i == k else 1.0) for i, m in enumerate(multipliers)]
        value = proved(normal, square, wrong)
        assert value is None or value >= closed * (1 - 1e-9)
    assert proved(normal, square, [m * 1e-3 for m in multipliers]) is None
    assert proved(normal, square, [-m for m in multipliers]) is None
    assert proved(normal, square, [m * math.nan for m in multipliers]) is None


@given(chains(widest=5, deepest=3), st.floats(-3.0, 3.0), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_no_proposal_proves_a_bound_below_what_is_attained(chain, exponent, seed):
    """Random multipliers and any L: either nothing, or something true."""
    normal = chain.normal()
    if normal is None or normal.depth < 2 or (start := _closed_form(normal)) is None:
        return
    generator = torch.Generator().manual_seed(seed)
    multipliers = [
        s * 10.0 ** (exponent * torch.rand(len(W), generator=generator, dtype=torch.float64))
        for s, W in zip(start[1], normal.matrices, strict=False)
    ]
    for factor in (0.01, 0.5, 0.9, 1.0, 2.0):
        value = proved(normal, start[0] * factor, multipliers)
        assert value is None or value >= attained(chain) * (1 - 1e-12)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**31), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_compressed_input_dominates_the_wide_one_exactly(rows, extra, seed, singular):
    """M Mᵀ - W Wᵀ is positive semidefinite in rational arithmetic: all pivots of an elimination are nonnegative."""
    W = torch.randn(rows, rows + extra, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if singular:
        W[0] = W[-1]
    M = _compressed(W)
    assert M is not None and M.shape == (rows, rows)
    assert torch.linalg.matrix_norm(M @ M.T - W @ W.T, 2) <= 1e-12 * torch.linalg.matrix_norm(W, 2) ** 2
    big, small = ([[Fraction(v) for v in row] for row in X.tolist()] for X in (M, W))
    square = [
        [
            sum(x * y for x, y in zip(big[i], big[j], strict=True))
            - sum(x * y for x, y in zip(small[i], small[j], strict=True))
            for j in range(rows)
        ]
        for i in range(rows)
    ]
    for k in range(rows):
        assert square[k][k] > 0
        for i in range(k + 1, rows):
            ratio = square[i][k] / square[k][k]
            square[i] = [a - ratio * b for a, b in zip(square[i], square[k], strict=True)]


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e150])
def test_scales_do_not_matter(scale):
    torch.manual_seed(0)
    W = [torch.randn(n, m, dtype=torch.float64) for n, m in ((6, 9), (7, 6), (3, 7))]
    plain = chain_bound(Chain(tuple(W), ((0.0, 1.0),) * 2))
    far = chain_bound(Chain((W[0] * scale, W[1], W[2]), ((0.0, 1.0),) * 2))
    assert far.value / scale == pytest.approx(plain.value, rel=1e-9) and plain.method == far.method


def test_errors_of_the_matrices_are_counted():
    """Matrices that are only known up to 0.01 have a bound above that of any within the distance."""
    torch.manual_seed(0)
    W = [torch.randn(5, 5, dtype=torch.float64) for _ in range(3)]
    apart = [
        0.01 * E / torch.linalg.matrix_norm(E, 2) for E in (torch.randn(5, 5, dtype=torch.float64) for _ in range(3))
    ]
    known = Chain(tuple(W), ((0.0, 1.0), (-0.1, 1.1)), (0.01,) * 3)
    moved = Chain(tuple(a + b for a, b in zip(W, apart, strict=True)), known.slopes)
    assert chain_bound(Chain(known.matrices, known.slopes)).value < chain_bound(known).value
    normal = known.normal()
    for method in METHODS["tight"]:
        bound = method(normal)
        assert bound is None or bound.value >= attained(moved, tries=200)


@pytest.mark.parametrize(
    "arguments",
    [
        ((torch.eye(2), torch.eye(3)), ((0.0, 1.0),)),
        ((torch.eye(2),) * 2, ()),
        ((torch.eye(2),) * 2, ((1.0, 0.0),)),
        ((torch.eye(2),) * 2, ((0.0, math.inf),)),
        ((torch.eye(2),) * 2, ((math.nan, 1.0),)),
        ((torch.ones(2),), ()),
    ],
)
def test_chains_that_do_not_fit_are_refused(arguments):
    with pytest.raises(BoundError):
        Chain(*arguments)


# --------------------------------------------------------------------------------------------------- in the walk

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
    "mlp": (lambda: nn.Sequential(nn.Flatten(), mlp(16, 12, 10, 3, activation=nn.GELU)), (1, 4, 4), 1),
    "batch norm between": (
        lambda: nn.Sequential(mlp(6, 5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).eval(),
        (6,),
        1,
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
        1,
    ),
    "channels last": (
        lambda: Apply(
            lambda m, x: m.b(F.relu(m.a(x)).permute(0, 2, 3, 1).flatten(1)), a=nn.Conv2d(2, 3, 2), b=nn.Linear(27, 4)
        ),
        (2, 4, 4),
        1,
    ),
    "transposed before": (
        lambda: Apply(
            lambda m, x: m.b(F.relu(m.a(x)).transpose(2, 3).flatten(1)), a=nn.Conv2d(2, 3, 2), b=nn.Linear(27, 4)
        ),
        (2, 4, 4),
        1,
    ),
    "tokens": (lambda: mlp(5, 9, 5, activation=nn.GELU), (7, 5), 1),
    "one by one": (lambda: nn.Sequential(nn.Conv2d(4, 9, 1), nn.GELU(), nn.Conv2d(9, 4, 1)), (4, 6, 6), 1),
    "circular": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"),
        ),
        (2, 2, 4),
        1,
    ),
    "residual linear": (
        lambda: Apply(lambda m, x: m.b(F.relu(x + m.a(x))), a=nn.Linear(6, 6), b=nn.Linear(6, 6)),
        (6,),
        1,
    ),
    "fork inside": (
        lambda: Apply(
            lambda m, x: (lambda h: m.b(h) + m.c(F.relu(m.b(h))))(F.relu(m.a(x))),
            a=nn.Linear(6, 6),
            b=nn.Linear(6, 6),
            c=nn.Linear(6, 6),
        ),
        (6,),
        None,
    ),
    "residual": (lambda: Apply(lambda m, x: x + m.b(F.relu(m.a(x))), a=nn.Linear(6, 6), b=nn.Linear(6, 6)), (6,), None),
    "two of one": (
        lambda: Apply(
            lambda m, x: torch.cat([m.b(F.relu(m.a(x))), m.c(F.relu(m.a(x)))], 1),
            a=nn.Linear(6, 6),
            b=nn.Linear(6, 4),
            c=nn.Linear(6, 4),
        ),
        (6,),
        None,
    ),
}


@pytest.mark.parametrize("which", WHOLE)
def test_networks_are_chains_where_they_can_be(which):
    """Above every Jacobian, at both settings; from the input in one row where the network is one chain."""
    make, shape, rows = WHOLE[which]
    model = make()
    fast = assert_sound(model, shape)
    tight = audit(model, shape, tightness="tight")
    assert jacobian_norm(model, shape, 30) <= tight.upper.value <= fast.upper.value
    if rows is not None:
        assert tight.layers[-1].op.startswith("chain: ") and tight.layers[-1].cumulative == tight.layers[-1].upper.value
        assert tight.upper.value < layer_by_layer(model, shape) * 0.97
    x = torch.rand(3, *shape)
    with torch.no_grad():
        happened = (model.float()(x).double() - tight.program(x.double())).flatten(1).norm(dim=1)
    assert (happened <= tight.program.evaluate(x.double(), "float32")[1]).all()


def layer_by_layer(model, shape):
    """Return the bound without chains."""
    graph = lift(trace(model, shape))
    context, kept = propagate(graph, keep={graph.output})
    context.segments._links.clear()
    return unchained(context, kept[graph.output].index)


def unchained(context, index):
    derivation = context.derivations.get(index)
    if derivation is None:
        value = next(v for v in context.live.values() if v.index == index)
        context.bound(value)
        derivation = context.derivations[index]
    derivation = derivation.carried or derivation
    parts = [f.value * unchained(context, i) for f, i in zip(derivation.factors, derivation.sources, strict=True)]
    return 1.0 if not parts else math.hypot(*parts) if derivation.joint else sum(parts)


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


@pytest.mark.parametrize("module", ["chain", "methods"])
def test_docstrings(module):
    assert doctest.testmod(getattr(lipcert.bounds.composition, module)).failed == 0
