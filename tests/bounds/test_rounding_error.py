"""The running error against what really happens: rational arithmetic, float32 against float64, and absurd looseness."""

from __future__ import annotations

import doctest
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from dense import Apply
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import lipcert.bounds.evaluation
from lipcert.bounds import BoundError, audit
from lipcert.bounds.rules.linear import absolute_norm, convolved, schur, windows


def maxmin(x):
    a, b = x.chunk(2, 1)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)


def conv(**options):
    return nn.Conv2d(8, 8, 3, padding=1, **options)


def block(m, x):
    u = (x - x.mean(1, keepdim=True)) * m.w
    return x + 0.2 * maxmin(u + 0.2 * m.a(torch.roll(u, 1, 3)))


NETWORKS = {
    "shift blocks": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 2, stride=2), *(Apply(block, a=conv(), w=nn.Parameter(torch.ones(8, 1, 1))) for _ in range(4)),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)),
    "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), conv(stride=2),
                                          nn.Flatten(), nn.Linear(32, 5)),
    "smooth": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.GELU(), nn.Linear(16, 16), nn.ELU(), nn.SiLU(),
                                    nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5), nn.Sigmoid()),
    "residual": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), *(Apply(lambda m, x: x + m.a(x).relu(), a=conv()) for _ in range(3)),
                                      nn.Flatten(), nn.Linear(512, 5)),
    "pieces": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), *(Apply(
        lambda m, x: torch.cat([m.a(x[:, :4]).relu(), x[:, 4:].abs()], 1), a=nn.Conv2d(4, 4, 3, padding=1)) for _ in range(3))),
    "windows": lambda: nn.Sequential(Apply(lambda m, x: m.a(x.view(-1, 3, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 12)).relu()
                                           .reshape(-1, 16, 5), a=nn.Linear(12, 5)), nn.Flatten(), nn.Linear(80, 4)),
}  # fmt: skip


@pytest.mark.parametrize("which", NETWORKS)
def test_float32_stays_within_its_bound_and_the_bound_is_not_absurd(which):
    model = NETWORKS[which]().eval()
    result = audit(model, (3, 8, 8))
    x = torch.rand(6, 3, 8, 8)
    with torch.no_grad():
        deployed = model(x).double()
    exact, error = result.program.evaluate(x.double())
    _, allowed = result.program.evaluate(x.double(), "float32")
    happened = (deployed - exact).flatten(1).norm(dim=1)
    assert (happened <= allowed).all()
    assert (allowed <= 1e6 * happened.max()).all()
    assert (error < 1e-7 * allowed).all() and error.max() < 1e-9 and (error > 0).all()


@pytest.mark.parametrize("which", ["shift blocks", "smooth"])
def test_the_whole_ball_is_covered(which):
    model = NETWORKS[which]().eval()
    result = audit(model, (3, 8, 8))
    x, radius = torch.rand(4, 3, 8, 8), 2.0
    step = torch.randn_like(x)
    inside = x + radius * 0.999 * step / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    with torch.no_grad():
        happened = (model(inside).double() - result.program(inside.double())).flatten(1).norm(dim=1)
    centre, ball = (result.program.evaluate(x.double(), "float32", r)[1] for r in (0.0, radius))
    assert (happened <= ball).all() and (centre < ball).all()


def rational(model, x):
    """Evaluate Linear, ReLU and scaling in exact arithmetic."""
    values = [Fraction(float(v)) for v in x]
    for layer in model:
        if isinstance(layer, nn.Linear):
            rows, bias = layer.weight.tolist(), layer.bias.tolist()
            values = [
                sum((Fraction(w) * v for w, v in zip(row, values, strict=True)), Fraction(b))
                for row, b in zip(rows, bias, strict=True)
            ]
        else:
            values = [max(v, Fraction(0)) for v in values]
    return values


@pytest.mark.parametrize("scale", [1.0, 1e-160, 1e150])
def test_float64_stays_within_its_bound_of_the_exact_value(scale):
    """Against rational arithmetic, also where squares of the values underflow or overflow."""
    model = nn.Sequential(nn.Linear(70, 70), nn.ReLU(), nn.Linear(70, 30), nn.ReLU(), nn.Linear(30, 4)).double()
    for layer in (model[0], model[2], model[4]):
        layer.bias.data *= scale
    x = scale * torch.randn(2, 70, dtype=torch.float64)
    outputs, errors = audit(model, (70,)).program.evaluate(x)
    for image, output, error in zip(x, outputs, errors, strict=True):
        exact = rational(model, image)
        squared = sum((Fraction(float(o)) - e) ** 2 for o, e in zip(output, exact, strict=True))
        assert 0 < squared <= Fraction(float(error)) ** 2
        if scale == 1.0:
            assert Fraction(float(error)) ** 2 < squared * 10**10


def test_errors_do_not_double_at_every_block():
    """Ten linear residuals: the error grows like the norm of what follows, not like (1 + √n)^10."""
    parts = [Apply(lambda m, x: x + 0.05 * m.a(x), a=conv()) for _ in range(10)]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), *[p for part in parts for p in (part, Apply(lambda m, x: maxmin(x)))], nn.Flatten()
    )
    result = audit(model, (3, 4, 4))
    assert result.program.evaluate(torch.rand(2, 3, 4, 4, dtype=torch.float64))[1].max() < 1e-11


@settings(max_examples=80, deadline=None)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)), kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)), bias=st.booleans(), layout=st.booleans(),
    cached=st.sampled_from([1, 2**23]),
)  # fmt: skip
def test_own_convolutions_are_torchs(size, kernel, stride, padding, dilation, bias, layout, cached):
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    x = torch.randn(5, 3, *size, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if layout else x
    layer = nn.Conv2d(3, 4, kernel, stride, padding, dilation, bias=bias).double()
    node = replace(audit(nn.Conv2d(3, 4, 1), (3, 2, 2)).program.graph.nodes[-1], arguments={})
    arguments = {
        "input": x, "weight": layer.weight.detach(), "bias": None if layer.bias is None else layer.bias.detach(),
        "stride": stride, "padding": padding, "dilation": dilation, "groups": 1,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lipcert.bounds.evaluation, "CACHED", cached)
        result = lipcert.bounds.evaluation.evaluate(node, arguments, {})
    assert torch.allclose(result, layer(x), rtol=1e-12, atol=1e-13) and result.shape == layer(x).shape


def test_normalisations_are_proved_for_our_evaluation_only():
    model = nn.Sequential(nn.GroupNorm(2, 4, eps=0.01), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.LayerNorm(36, eps=0.1))
    nn.init.normal_(model[0].weight), nn.init.normal_(model[0].bias)
    program = audit(model, (4, 3, 3)).program
    x = torch.randn(3, 4, 3, 3, dtype=torch.float64)
    output, error = program.evaluate(x)
    assert (error < 1e-10).all() and torch.allclose(output, model.double()(x), rtol=0, atol=1e-12)
    assert program.evaluate(x, "float32")[1].isinf().all()


def test_softplus_counts_the_step_at_its_threshold():
    program = audit(Apply(lambda m, x: F.softplus(x)), (1,)).program
    x = torch.tensor([[20.0 + 1e-9]], dtype=torch.float64)
    output, error = program.evaluate(x)
    exact = 20.0 + 1e-9 + float(torch.log1p(torch.exp(torch.tensor(-20.0 - 1e-9, dtype=torch.float64))))
    assert 1e-9 < abs(float(output) - exact) <= float(error)


def test_what_may_overflow_in_float32_has_no_bound():
    program = audit(nn.Linear(3, 3), (3,)).program
    x = torch.full((1, 3), 1e38, dtype=torch.float64)
    assert program.evaluate(x, "float32")[1].isinf().all() and program.evaluate(x)[1].isfinite().all()


@pytest.mark.parametrize("x, options", [
    (torch.zeros(2, 3), {}), (torch.zeros(2, 4, dtype=torch.float64), {}),
    (torch.full((1, 3), float("nan"), dtype=torch.float64), {}), (torch.zeros(1, 3, dtype=torch.float64), {"precision": "tf32"}),
    (torch.zeros(1, 3, dtype=torch.float64), {"radius": -1.0}),
])  # fmt: skip
def test_inputs_are_checked(x, options):
    with pytest.raises(BoundError):
        audit(nn.Linear(3, 3), (3,)).program.evaluate(x, **options)


def test_an_empty_batch_has_no_rows():
    output, error = audit(nn.Linear(3, 2), (3,)).program.evaluate(torch.zeros(0, 3, dtype=torch.float64))
    assert output.shape == (0, 2) and error.shape == (0,)


def test_examples():
    assert doctest.testmod(lipcert.bounds.evaluation).failed == 0


@pytest.mark.parametrize("last", ["linear", "sum"])
def test_differences_of_logits_err_by_their_own_rows(last: str) -> None:
    """Rows that are nearly equal: what errs before them cancels, and the bound of a difference says so."""
    torch.manual_seed(0)
    common = torch.randn(1, 64)
    head = nn.Linear(64, 5)
    head.weight.data = 3 * common + 0.1 * torch.randn(5, 64)
    features = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    if last == "linear":
        model = nn.Sequential(features, head)
    else:  # no last linear operator: the rows of the last affine segment
        model = Apply(lambda m, x: m.b(m.a(x)) - 0.5, a=features, b=head)
    result = audit(model, (3, 4, 4))
    assert result.head is not None
    x = torch.rand(64, 3, 4, 4)
    exact, _ = result.evaluate(x.double())
    _, errors = result.evaluate(x.double(), "float32", 0.0)
    happened = (model.float()(x).double() - exact).detach()
    pairs = (happened[:, :, None] - happened[:, None]).abs()
    allowed = errors.before[:, None, None] * result.head.distances() + 2**0.5 * errors.since[:, None, None]
    assert bool((pairs <= allowed).all())
    assert float((allowed / (2 * errors.whole[:, None, None])).max()) < 0.5
    rows = head.weight.double()
    assert bool((result.head.distances() >= (rows[:, None] - rows).norm(dim=-1) * (1 - 1e-12)).all())


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 2), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2))
def test_norms_of_absolute_weights_are_those_of_a_dense_matrix(
    data, groups: int, size: int, stride: int, dilation: int, padding: int
) -> None:
    """For every convolution: at least ‖|W|‖ as a dense matrix, and it where one window or none overlaps another."""
    kernel = data.draw(st.integers(1, 4))
    n = dilation * (kernel - 1) + 1 + data.draw(st.integers(0, 4)) - 2 * padding
    assume(n > 0)
    weight = torch.randn(2 * groups, size, kernel, kernel, dtype=torch.float64) * torch.rand(1, size, 1, 1)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    basis = torch.eye(groups * size * n * n, dtype=torch.float64).reshape(-1, groups * size, n, n)
    dense = F.conv2d(basis, weight.abs(), **options)
    copies = windows((kernel,) * 2, (stride,) * 2, (dilation,) * 2, dense.shape[2:])
    found, truth = convolved(weight, groups, copies), float(torch.linalg.matrix_norm(dense.flatten(1), 2))
    assert truth * (1 - 1e-12) <= found
    if dense.shape[2:].numel() == 1 and padding == 0:
        assert found <= truth * 1.01


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(-300, 300), st.integers(0, 3))
def test_absolute_norms_hold_at_every_scale(rows: int, columns: int, scale: int, zeros: int) -> None:
    matrix = torch.randn(rows, columns, dtype=torch.float64)
    matrix[:, :zeros] = 0.0
    found = absolute_norm(matrix * 2.0**scale) / 2.0**scale
    truth = float(torch.linalg.matrix_norm(matrix.abs(), 2))
    assert truth * (1 - 1e-12) <= found <= schur(matrix) * (1 + 1e-12)
    assert found <= truth * 1.05 or zeros
