"""Whole networks: bounds against Jacobians and secants, blocks as tight as their matrix, heads, pairs, reports."""

from __future__ import annotations

import doctest
import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from dense import Apply, assert_sound
from torch import nn

from lipcert.bounds import BoundError, audit


def maxmin(x):
    a, b = x.chunk(2, 1)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)


def rolled(x):
    """Move four groups of channels by one pixel, around the border."""
    g = x.shape[1] // 6
    moved = [torch.roll(x[:, k * g : (k + 1) * g], step, dim) for k, (dim, step) in enumerate(DIRECTIONS)]
    return torch.cat([*moved, x[:, 4 * g :]], 1)


def filled(x):
    """Move four groups of channels by one pixel, zeros entering, as ShiftViT writes it."""
    g = x.shape[1] // 6
    out = torch.zeros_like(x)
    out[:, :g, :, :-1] = x[:, :g, :, 1:]
    out[:, g : 2 * g, :, 1:] = x[:, g : 2 * g, :, :-1]
    out[:, 2 * g : 3 * g, :-1] = x[:, 2 * g : 3 * g, 1:]
    out[:, 3 * g : 4 * g, 1:] = x[:, 3 * g : 4 * g, :-1]
    out[:, 4 * g :] = x[:, 4 * g :]
    return out


DIRECTIONS = ((3, -1), (3, 1), (2, -1), (2, 1))


def center(m, x):
    return (x - x.mean(1, keepdim=True)) * (7 / 6 * m.w) + m.w


LINEAR_PARTS = {
    "rolled, centred, residual": lambda m, x: (lambda u: u + 0.3 * m.a(u))(center(m, rolled(x))),
    "shift in the branch": lambda m, x: x + 0.3 * m.c(center(m, rolled(x))),
    "zero fill": lambda m, x: filled(x),
    "zero fill beside a pointwise branch": lambda m, x: (lambda u: u + 0.3 * m.b(u))(center(m, x)) + 0.25 * filled(x),
}
PERIODIC = ("shift in the branch", "zero fill")


@pytest.mark.parametrize("which", LINEAR_PARTS)
def test_linear_parts_of_shift_blocks_are_as_tight_as_their_matrix(which):
    """One operator each: within 5 % of the norm of its matrix, and not √5, 2 or 1.7 times it."""
    parts = dict(a=nn.Conv2d(6, 6, 3, padding=1), b=nn.Conv2d(6, 6, 1))
    parts["c"] = nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular")
    model = Apply(LINEAR_PARTS[which], w=nn.Parameter(1 + 0.1 * torch.randn(6, 1, 1)), **parts)
    assert_sound(model, (6, 4, 4), 1e-6 if which in PERIODIC else 0.05, points=1)


class Block(nn.Module):
    """A block of LipShiFT: shift, CenterNorm, linear residual convolution, MaxMin, shortcut."""

    def __init__(self, shift, dim=6):
        super().__init__()
        self.shift = shift
        self.w = nn.Parameter(torch.ones(dim, 1, 1))
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.s1 = nn.Parameter(torch.full((dim, 1, 1), 0.2))
        self.s2 = nn.Parameter(torch.full((dim, 1, 1), 0.3))

    def forward(self, x):
        x = self.shift(x)
        u = center(self, x)
        return x + self.s2 * maxmin(u + self.s1 * self.conv(u))


@pytest.mark.parametrize("shift, depth", [(rolled, 2), (filled, 1)])
def test_a_lipshift_network_costs_its_branches_and_nothing_else(shift, depth):
    blocks = [Block(shift) for _ in range(depth)]
    model = nn.Sequential(nn.Conv2d(3, 6, 2, stride=2), *blocks, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 5))
    result = assert_sound(model, (3, 8, 8))
    expected = 1.0
    for block in blocks:
        branch = Apply(lambda m, x: (lambda u: u + m.b.s1 * m.b.conv(u))(center(m.b, x)), b=block)
        expected *= 1 + 0.3 * audit(branch, (6, 4, 4)).upper.value
    ends = [audit(model[0], (3, 8, 8)), audit(nn.Sequential(*model[depth + 1 :]), (6, 4, 4))]
    assert result.upper.value <= expected * ends[0].upper.value * ends[1].upper.value * (1 + 1e-3)
    assert [row.op for row in result.layers].count("MaxMin of slice×2") == depth
    assert result.program.evaluate(torch.rand(2, 3, 8, 8, dtype=torch.float64))[1].max() < 1e-11


def residual_stage():
    def unit(m, x):
        return F.relu(x + m.b(F.relu(m.a(x))))

    parts = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)) for _ in range(4)]
    for part in parts:
        part[1].running_var.fill_(0.5)
    return nn.Sequential(Apply(unit, a=parts[0], b=parts[1]), Apply(unit, a=parts[2], b=parts[3]))


NETWORKS = {
    "resnet": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2), residual_stage(), nn.AdaptiveAvgPool2d(1),
                                    nn.Flatten(), nn.Linear(8, 4)),
    "vgg": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3),
                                 nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(32, 10), nn.ReLU(), nn.Linear(10, 4)),
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.GELU(), nn.Linear(12, 12), nn.SiLU(), nn.Linear(12, 4)),
    "dense": lambda: Apply(lambda m, x: m.c(torch.cat([x, m.a(x).relu(), m.b(x).relu()], 1)).mean((2, 3)), a=nn.Conv2d(3, 4, 3,
                           padding=1), b=nn.Conv2d(3, 4, 1), c=nn.Conv2d(11, 4, 1)),
    "convnext": lambda: nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), Apply(
        lambda m, x: x + m.g * m.c(F.gelu(m.b(m.n(m.a(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2),
        a=nn.Conv2d(8, 8, 3, padding=1, groups=8), n=nn.LayerNorm(8, eps=0.01), b=nn.Linear(8, 16), c=nn.Linear(16, 8),
        g=nn.Parameter(torch.full((8, 1, 1), 0.1))), nn.Flatten(), nn.Linear(32, 4)),
}  # fmt: skip


@pytest.mark.parametrize("which", NETWORKS)
def test_networks_of_strangers_are_bounded(which):
    model = NETWORKS[which]()
    result = assert_sound(model, (3, 8, 8), points=3)
    assert math.isfinite(result.upper.value) and not result.unbounded
    assert result.layers[-1].cumulative == result.upper


@pytest.mark.parametrize("seed", range(6))
def test_random_networks_are_bounded(seed):
    """A random sequence of operators from all families, on three random points and sixty secants."""
    generator = torch.Generator().manual_seed(seed)

    def layer():
        conv = lambda **o: nn.Conv2d(4, 4, 3, padding=1, **o)  # noqa: E731
        choices = [
            lambda: conv(), lambda: conv(padding_mode="circular"), lambda: conv(groups=2), lambda: nn.Conv2d(4, 4, 1),
            lambda: nn.ReLU(), lambda: Apply(lambda m, x: maxmin(x)), lambda: nn.BatchNorm2d(4).eval(),
            lambda: Apply(lambda m, x: x + 0.5 * m.a(x), a=conv()), lambda: Apply(lambda m, x: torch.roll(x, 1, 3) + x),
            lambda: Apply(lambda m, x: x - x.mean(1, keepdim=True)), lambda: Apply(lambda m, x: rolled(m.a(x)), a=nn.Conv2d(4, 6, 1)),
            lambda: Apply(lambda m, x: x + m.a(x).relu(), a=conv()), lambda: Apply(lambda m, x: x.permute(0, 1, 3, 2).flip(1)),
            lambda: Apply(lambda m, x: torch.cat([m.a(x[:, :2]).tanh(), 0.5 * x[:, 2:].abs()], 1), a=nn.Conv2d(2, 2, 3, padding=1)),
        ]  # fmt: skip
        return choices[int(torch.randint(len(choices), (), generator=generator))]()

    layers: list[nn.Module] = []
    for _ in range(6):
        layers.append(layer())
        if isinstance(layers[-1], Apply) and layers[-1](torch.zeros(1, 4, 4, 4)).shape[1] == 6:
            layers.append(nn.Conv2d(6, 4, 1))
    assert_sound(nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3)), (4, 4, 4), points=3)


HEADS = {
    "linear": (lambda m, x: m.l(torch.tanh(x)), dict),
    "dropout before": (lambda m, x: m.l(F.dropout(torch.tanh(x), 0.5, m.training)), dict),
    "matmul": (lambda m, x: torch.tanh(x) @ m.l.weight.T, dict),
    "addmm": (lambda m, x: torch.addmm(m.l.bias, torch.tanh(x), m.l.weight.T), dict),
    "of a centred value": (lambda m, x: m.l((x - x.mean(1, keepdim=True)) * m.w), lambda: dict(w=nn.Parameter(torch.rand(6)))),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
def test_pairs_of_logits_are_bounded_by_rows_of_the_head(kind):
    forward, parts = HEADS[kind]
    model = Apply(forward, l=nn.Linear(6, 4), **parts()).eval()
    result = audit(model, (6,))
    assert result.head is not None and torch.allclose(result.head.weight, model.l.weight.double())
    pairwise = result.pairwise()
    assert torch.equal(pairwise, pairwise.T) and not pairwise.diagonal().any()
    rows = model.l.weight.double()
    plain = torch.linalg.vector_norm(rows[:, None] - rows[None], dim=-1) * result.head.penultimate.value
    assert (pairwise <= plain * (1 + 1e-12)).all()
    jacobian = torch.autograd.functional.jacobian(model.double(), torch.zeros(1, 6, dtype=torch.float64))[0, :, 0]
    attained = torch.linalg.vector_norm(jacobian[:, None] - jacobian[None], dim=-1)
    assert (attained <= pairwise).all() and torch.allclose(attained, pairwise, rtol=1e-7)  # steepest at zero


def test_without_a_head_pairs_cost_the_root_of_two():
    result = audit(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), (6,))
    assert result.head is None
    expected = math.sqrt(2) * result.upper.value
    off = result.pairwise()[~torch.eye(4, dtype=torch.bool)]
    assert (off >= expected).all() and (off <= expected * (1 + 1e-14)).all()


def test_equal_rows_of_a_head_have_almost_no_difference():
    model = nn.Linear(50, 3)
    model.weight.data[1] = model.weight.data[0]
    pairwise = audit(model, (50,)).pairwise()
    assert 0.0 < pairwise[0, 1] < 1e-6 < 0.1 < pairwise[0, 2]


def test_values_of_many_digits_keep_their_bound():
    """Weights from 1e-200 to 1e200: scaled, not flushed to zero or overflown."""
    for scale in (1e-200, 1e-30, 1e30, 1e200):
        model = nn.Linear(4, 3, bias=False).double()
        model.weight.data *= scale
        exact = float(torch.linalg.matrix_norm(model.weight.detach() / scale, 2))
        assert audit(model, (4,)).upper.value / scale == pytest.approx(exact, rel=1e-9)
    model.weight.data.zero_()
    assert audit(model, (4,)).upper.value == 0.0


def test_the_identity_and_constants_beside_it():
    assert audit(nn.Identity(), (3, 4, 4)).upper.value == 1.0
    assert audit(Apply(lambda m, x: x + torch.ones(4)), (4,)).upper.value == 1.0
    assert audit(Apply(lambda m, x: 0 * x), (4,)).upper.value == 0.0


def test_an_audit_is_a_table_and_json():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    result = audit(model, (3, 4, 4), domain=(-1, 1))
    text = str(result)
    assert "affine: conv2d" in text and text.splitlines()[-1].endswith(f"at most {result.upper.value:.10g}")
    data = json.loads(json.dumps(result.to_json()))
    assert data["input"] == {"shape": [3, 4, 4], "domain": [-1.0, 1.0]} and data["upper"] == result.upper.value
    assert [row["name"] for row in data["layers"]] == ["0", "1", "0, 3"]  # the last is a chain from the input
    assert [row["shape"] for row in data["layers"]] == [[4, 4, 4], [4, 4, 4], [2]]
    cumulative = [row["cumulative"] for row in data["layers"]]
    assert cumulative[1] == cumulative[0] and cumulative[2] == data["upper"]
    endless = audit(nn.Sequential(nn.Linear(3, 3), Apply(lambda m, x: x * x)), (3,), domain=(0, math.inf)).to_json()
    assert endless["input"]["domain"] == [0.0, "inf"]
    assert endless["upper"] == "inf" and endless["unbounded"][0]["op"] == "mul"
    assert endless["layers"][-1]["upper"] == "inf" and endless["layers"][0]["name"] == "0"


def test_the_same_model_has_the_same_audit():
    model = NETWORKS["resnet"]()
    first, second = (audit(model, (3, 8, 8)) for _ in range(2))
    assert first.layers == second.layers and first.weights_sha256 == second.weights_sha256


def test_the_audit_does_not_follow_later_changes_of_the_model():
    model = nn.Linear(3, 2)
    result = audit(model, (3,))
    before = result.program(torch.ones(1, 3, dtype=torch.float64))
    model.weight.data.mul_(2)
    assert torch.equal(result.program(torch.ones(1, 3, dtype=torch.float64)), before)


@pytest.mark.parametrize("options", [dict(tightness="tighter"), dict(domain=(1, 0)), dict(method="svd")])
def test_options_are_checked(options):
    with pytest.raises(BoundError):
        audit(nn.Linear(3, 2), (3,), **options)


def test_gram_iteration_gives_almost_the_same():
    model = NETWORKS["vgg"]()
    eigenvalue, gram = (audit(model, (3, 8, 8), method=method).upper.value for method in ("eigenvalue", "gram"))
    assert gram == pytest.approx(eigenvalue, rel=1e-3)


@pytest.mark.slow
def test_resnet18_has_a_finite_bound(torchvision):
    result = audit(torchvision.models.resnet18(weights=None, num_classes=10), (3, 32, 32))
    assert math.isfinite(result.upper.value) and result.head is not None and result.seconds < 200


def test_examples():
    for name in ("audit", "layout"):  # in the package, `audit` is the function
        assert doctest.testmod(sys.modules[f"lipcert.bounds.{name}"]).failed == 0
