"""The bound of one position: above every block of the Jacobian, and below the bound of the whole where maps grow."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from dense import Apply
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lipcert.bounds import Audit, Bound, audit
from lipcert.bounds.core import RULES
from lipcert.bounds.positions import POSITIONED, Reading, Source, positioned

SHAPE = (4, 6, 6)


def blocks(model: nn.Module, shape: tuple[int, ...], points: int = 4) -> tuple[float, float]:
    """Return the largest norm of the Jacobian of one position, and of the whole, over random points of [0, 1]."""
    generator = torch.Generator().manual_seed(3)
    model = model.double().eval()
    one = whole = 0.0
    for k in range(points):
        x = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
        x = x.round() if k % 2 else x
        matrix = _jacobian(model, x)
        one = max(one, float(torch.linalg.matrix_norm(matrix.flatten(1, -2).movedim(1, 0), 2).max()))
        whole = max(whole, float(torch.linalg.matrix_norm(matrix.flatten(0, -2), 2)))
    return one, whole


def _jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Return the Jacobian of the channels first, (c, positions…, inputs)."""
    return torch.autograd.functional.jacobian(lambda v: model(v)[0], x).flatten(-x.ndim)


def check(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> tuple[Audit, float]:
    result = audit(model, shape)
    one, whole = blocks(model, shape)
    assert result.position is not None and result.position.kind == "upper"
    assert one <= result.position.value * (1 + 1e-9), f"{one} > {result.position.value}\n{result}"
    assert whole <= result.upper.value * (1 + 1e-9)
    assert result.position.order <= result.upper.order
    return result, one


def up(x: Tensor, factor: float = 3, mode: str = "bilinear") -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode=mode)


def norm() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(4)
    layer.running_var.uniform_(0.2, 2.0)
    nn.init.normal_(layer.weight)
    return layer


def conv(i: int = 4, o: int = 4, k: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **options)


# Everything below stands behind an enlargement by 3, which multiplies the bound of the whole by 3 and not that of a
# position; the number is the least ratio of the two that the rule must keep.
AFTER = {
    "activation": (lambda m, x: F.gelu(up(m.a(x))), dict(a=conv()), 2.9),
    "nearest": (lambda m, x: up(m.a(x), mode="nearest").relu(), dict(a=conv()), 2.9),
    "cubic": (lambda m, x: up(m.a(x), mode="bicubic").relu(), dict(a=conv()), 1.6),
    "corners": (lambda m, x: F.interpolate(m.a(x), size=13, mode="bilinear", align_corners=True), dict(a=conv()), 1.9),
    "batch norm": (lambda m, x: m.b(up(m.a(x)).relu()), dict(a=conv(), b=norm()), 2.9),
    "constants": (
        lambda m, x: 3.0 - (up(m.a(x)).relu() * m.c) / 2.0,
        dict(a=conv(), c=nn.Parameter(torch.randn(4, 1, 1))),
        2.9,
    ),
    "pointwise": (lambda m, x: m.b(up(m.a(x).relu()).relu()), dict(a=conv(), b=conv(4, 3)), 2.9),
    "groups": (lambda m, x: m.b(up(m.a(x).relu()).relu()), dict(a=conv(), b=conv(4, 6, groups=2)), 2.9),
    "window": (lambda m, x: m.b(up(m.a(x).relu()).relu()), dict(a=conv(), b=conv(4, 3, 3, padding=1)), 1.0),
    "branches": (lambda m, x: up(m.a(x)).relu() - 0.5 * up(m.b(x)).tanh(), dict(a=conv(), b=conv()), 2.9),
    "channels side by side": (
        lambda m, x: torch.cat([up(m.a(x)).relu(), up(m.b(x)).relu()], 1),
        dict(a=conv(), b=conv()),
        2.9,
    ),
    "positions side by side": (
        lambda m, x: torch.cat([up(m.a(x)).relu(), up(m.b(x)).relu()], 2),
        dict(a=conv(), b=conv()),
        2.9,
    ),
    "MaxMin": (
        lambda m, x: torch.cat([torch.maximum(*up(m.a(x)).chunk(2, 1)), torch.minimum(*up(m.a(x)).chunk(2, 1))], 1),
        dict(a=conv()),
        2.9,
    ),
    "MaxMin of two": (
        lambda m, x: torch.cat([torch.maximum(up(m.a(x)), up(m.b(x))), torch.minimum(up(m.a(x)), up(m.b(x)))], 1),
        dict(a=conv(), b=conv()),
        1.0,
    ),
    "rows": (
        lambda m, x: F.layer_norm(up(m.a(x)).permute(0, 2, 3, 1), (4,), eps=0.5).movedim(-1, 1),
        dict(a=conv()),
        2.9,
    ),
    "rows, normalised": (lambda m, x: F.normalize(up(m.a(x)), dim=1, eps=0.5), dict(a=conv()), 2.9),
    "centred": (lambda m, x: up(m.a(x)).relu() - up(m.a(x)).relu().mean(1, keepdim=True), dict(a=conv()), 2.9),
    "softmax": (lambda m, x: up(m.a(x)).softmax(1), dict(a=conv()), 2.9),
    "tokens": (
        lambda m, x: m.b(up(m.a(x)).relu().flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (18, 18)),
        dict(a=conv(), b=nn.Linear(4, 3)),
        2.9,
    ),
    "moved": (
        lambda m, x: F.pad(up(m.a(x)).relu().roll((1, 2), (2, 3)).flip(2), (1, 0, 2, 1))[:, :, 2:],
        dict(a=conv()),
        2.9,
    ),
    "reflected": (lambda m, x: F.pad(up(m.a(x)).relu(), (1, 1, 1, 1), mode="reflect"), dict(a=conv()), 2.9),
    "average": (lambda m, x: F.avg_pool2d(up(m.a(x)).relu(), 3, 1), dict(a=conv()), 2.9),
    "pooled and spread": (
        lambda m, x: m.b(x.mean((2, 3), keepdim=True)).relu().expand(-1, -1, 6, 6),
        dict(b=conv()),
        5.9,
    ),
    "pooled and resized": (lambda m, x: up(F.adaptive_avg_pool2d(m.a(x), 2).relu(), 6), dict(a=conv()), 5.9),
    "pixel shuffle": (lambda m, x: F.pixel_shuffle(up(m.a(x)).relu(), 2), dict(a=conv(4, 8)), 2.9),
    "transposed": (lambda m, x: m.b(m.a(x).relu()), dict(a=conv(), b=nn.ConvTranspose2d(4, 3, 2, stride=2)), 1.0),
    "transposed, overlapping": (
        lambda m, x: m.b(m.a(x).relu()),
        dict(a=conv(), b=nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)),
        1.0,
    ),
    "selected": (lambda m, x: torch.stack([up(m.a(x)).relu(), up(m.a(x)).tanh()], 1)[:, 0], dict(a=conv()), 1.0),
}


@pytest.mark.parametrize("name", AFTER)
def test_one_position_is_bounded_behind_an_enlargement(name: str) -> None:
    torch.manual_seed(0)
    forward, parts, least = AFTER[name]
    result, _ = check(Apply(forward, **parts))
    assert result.position is not None
    assert result.upper.value >= least * result.position.value, str(result)


# Operators whose results read several positions, or more of one: each with the names under which taking the position of
# the argument for that of the result, by the factor 1, must show.
NOT_ALONE = {
    "group norm": (lambda m, x: F.group_norm(up(m.a(x)), 2, eps=0.5), "group_norm.default"),
    "layer norm over a row": (lambda m, x: F.layer_norm(up(m.a(x)), (18,), eps=0.1), "layer_norm.default"),
    "channels become positions": (lambda m, x: up(m.a(x)).relu().transpose(1, 2), "transpose.int"),
    "reshaped across channels": (lambda m, x: up(m.a(x)).reshape(-1, 36, 36), "reshape.default"),
    "positions become channels": (lambda m, x: F.pixel_unshuffle(up(m.a(x)).relu(), 3), "pixel_unshuffle.default"),
    "a sum over rows": (lambda m, x: up(m.a(x)).relu().sum(2, keepdim=True), "sum.dim_IntList"),
    "a sum over channels": (lambda m, x: up(m.a(x)).sum(1, keepdim=True), "sum.dim_IntList"),
    "sums along a row": (lambda m, x: up(m.a(x)).cumsum(3), "cumsum.default"),
    "one channel for all": (lambda m, x: up(m.a(x)).relu()[:, :1].expand(-1, 5, -1, -1), "expand.default"),
    "a product of data": (lambda m, x: up(m.a(x) + 3.0) * up(m.b(x) + 3.0), "mul.Tensor"),
}


def positive() -> dict[str, nn.Module]:
    """Return two maps with positive weights: what adds up along rows or channels has one sign."""
    layers = dict(a=conv(), b=conv())
    for layer in layers.values():
        layer.weight.data.abs_()
    return layers


@pytest.mark.parametrize("name", NOT_ALONE)
def test_what_joins_positions_is_not_taken_for_what_does_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    forward, op = NOT_ALONE[name]
    model = Apply(forward, **positive())
    check(model)

    def mistaken(node, channel, nodes):
        x = nodes[node.inputs[0]]
        factor = Bound(1.0, "upper", "")
        return Reading((Source(x.name, min(channel, len(x.shape) - 1), lambda context: factor),))

    monkeypatch.setitem(POSITIONED, f"aten.{op}", mistaken)
    with pytest.raises(AssertionError, match=">"):
        check(model)


def test_without_an_enlargement_it_is_the_bound_of_the_whole_and_logits_have_none() -> None:
    model = Apply(lambda m, x: m.b(m.a(x).relu()), a=conv(k=3, padding=1), b=conv())
    result, _ = check(model)
    assert result.position == result.upper
    assert result.to_json()["position"] == result.upper.value
    flat = audit(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), (1, 6, 6))
    assert flat.position is None and "position" not in str(flat)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 4), st.integers(1, 3), st.integers(1, 5), st.sampled_from(["nearest", "bilinear", "bicubic"]),
    st.sampled_from([1, 3]), st.integers(0, 99),
)  # fmt: skip
def test_decoders_of_all_sizes(channels: int, side: int, factor: int, mode: str, kernel: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = Apply(
        lambda m, x: up(m.c(torch.cat([m.a(x), up(m.b(F.avg_pool2d(x, 2)).relu(), 2, mode)], 1)).relu(), factor, mode),
        a=conv(2, channels), b=conv(2, 3, kernel, padding=kernel // 2),
        c=conv(channels + 3, 2, kernel, padding=kernel // 2),
    )  # fmt: skip
    check(model, (2, 2 * side, 2 * side))


def test_a_linear_decoder_is_bounded_exactly() -> None:
    """Nearest enlargement of a pointwise map: what a position reads is one pixel, by the norm of the matrix."""
    torch.manual_seed(0)
    model = Apply(lambda m, x: up(m.a(x), 4, "nearest"), a=conv(4, 3))
    result, one = check(model)
    assert result.position is not None and result.position.value <= one * (1 + 1e-9)
    assert math.isclose(result.upper.value, 4 * one, rel_tol=1e-9)


def test_every_operator_with_positions_has_a_rule_and_none_has_two() -> None:
    assert POSITIONED.keys() <= RULES.keys()
    with pytest.raises(ValueError, match="already has a rule"):
        positioned("aten.relu.default")(lambda node, channel, nodes: None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("enlarged", [False, True])
def test_a_pointwise_convolution_at_the_end_gives_features_and_weight(bias: bool, enlarged: bool) -> None:
    """Both constants are above the features' own Jacobian, and rows of W times the features' are above each pair's."""
    parts = dict(a=conv(4, 5, 3, padding=1), head=conv(5, 3, 1, bias=bias))
    nn.init.normal_(parts["head"].weight)

    def features(m, x: Tensor) -> Tensor:
        return up(m.a(x).tanh(), 2) if enlarged else m.a(x).tanh()

    result, _ = check(Apply(lambda m, x: m.head(features(m, x)), **parts))
    head = result.pixel_head
    assert head is not None and torch.equal(head.weight, parts["head"].weight.detach().flatten(1))
    inner = Apply(features, **parts)
    one, whole = blocks(inner, SHAPE)
    assert one <= head.pixel.require_upper() * (1 + 1e-9) and whole <= head.joint.require_upper() * (1 + 1e-9)
    assert (head.pixel.value < head.joint.value / 1.9) == enlarged
    rows = head.weight[:, None] - head.weight[None]
    distances = head.distances()
    assert bool((distances >= rows.norm(dim=2)).all()) and bool((distances.diagonal() == 0).all())
    torch.testing.assert_close(distances, rows.norm(dim=2), rtol=1e-6, atol=1e-6)
    model = Apply(lambda m, x: m.head(features(m, x)), **parts).double().eval()
    matrix = _jacobian(model, torch.rand(1, *SHAPE, dtype=torch.float64))  # (3, h, w, inputs)
    for i in range(3):
        for j in range(i):
            change = (matrix[i] - matrix[j]).flatten(0, -2)  # of z_i - z_j, at every position
            assert bool((change.norm(dim=1) <= distances[i, j] * head.pixel.value * (1 + 1e-9)).all())
            assert float(torch.linalg.matrix_norm(change, 2)) <= distances[i, j] * head.joint.value * (1 + 1e-9)


@pytest.mark.parametrize(
    "last",
    [
        conv(4, 3, 3, padding=1),
        conv(4, 4, 1, groups=2),
        conv(4, 3, 1, stride=2),
        conv(4, 3, 1, padding=1),
        nn.Sequential(conv(4, 3, 1), nn.ReLU()),
        nn.Sequential(conv(4, 3, 1), nn.Upsample(scale_factor=2)),
        nn.Sequential(conv(4, 3, 1), nn.Flatten()),
    ],
    ids=["3x3", "groups", "stride", "padding", "activation behind", "enlarged behind", "flattened behind"],
)
def test_what_is_almost_a_pointwise_head_is_none(last: nn.Module) -> None:
    assert audit(nn.Sequential(conv(), nn.Tanh(), last), SHAPE).pixel_head is None
