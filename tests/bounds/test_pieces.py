"""Channels that are split and joined again cost what the steepest part costs: proved against attacks and by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.bounds import audit


class Cosine(nn.Module):
    """`(1 - s) x + s f(x)`, f attention over all positions, its rows normalised: maps (n, c, h, w) -> the same.

    `form`: one operator, or written out. `reduced`: keys and values from a map of a quarter of the positions.
    """

    def __init__(self, dim: int, heads: int, *, form: str = "operator", reduced: bool = False, share: float = 0.3):
        super().__init__()
        self.heads, self.form, self.share = heads, form, share
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.reduce = nn.Conv2d(dim, dim, 2, stride=2) if reduced else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        few = tokens if self.reduce is None else self.reduce(x).flatten(2).mT
        q, k, v = (self.rows(part) for part in (self.q(tokens), *self.kv(few).chunk(2, -1)))
        y = F.scaled_dot_product_attention(q, k, v) if self.form == "operator" else ((q @ k.mT) / 2).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).flatten(2)).mT.unflatten(2, x.shape[2:])
        return (1 - self.share) * x + self.share * y

    def rows(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return x / torch.sqrt(x.square().sum(-1, keepdim=True) + 0.5)


class Gate(nn.Module):
    """`tanh(W x) · sigmoid(V x)`, a product of two values that have ranges."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).tanh() * self.b(x).sigmoid()


class Split(nn.Module):
    """Halves of the channels go through one part each and are joined."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([self.first(a), self.second(b)], 1)


class Scaled(nn.Module):
    """`s·|x|`."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.abs()


class Crossed(nn.Module):
    """Attention of one half to the other: no function of either."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = Cosine(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = (half.flatten(2).mT for half in x.chunk(2, 1))
        q, k, v = (self.attention.rows(part) for part in (self.attention.q(a), *self.attention.kv(b).chunk(2, -1)))
        y = F.scaled_dot_product_attention(q, k, v)
        return torch.cat([a, y.transpose(1, 2).flatten(2)], 2)


def attacked(model: nn.Module, shape: tuple[int, ...], seed: int = 0, points: int = 6) -> float:
    """Return the largest Jacobian norm at some points of the unit box: spread, and near one point."""
    generator = torch.Generator().manual_seed(seed)
    best = 0.0
    for i in range(points):
        x = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
        x = x if i % 2 else 0.5 + 0.01 * (x - 0.5)
        jacobian = torch.autograd.functional.jacobian(model, x).reshape(-1, x.numel())
        best = max(best, float(torch.linalg.matrix_norm(jacobian, 2)))
    return best


def conv(dim: int, out: int | None = None) -> nn.Module:
    return nn.Conv2d(dim, out or dim, 3, padding=1)


def branch(kind: str, dim: int) -> nn.Module:
    return {
        "attention": lambda: Cosine(dim, 2),
        "written": lambda: Cosine(dim, 1, form="written"),
        "reduced": lambda: nn.Sequential(nn.Tanh(), Cosine(dim, 2, reduced=True)),
        "gate": lambda: nn.Sequential(Gate(dim), nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)),
        "convolutions": lambda: nn.Sequential(conv(dim), nn.ReLU(), nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim)),
        "nested": lambda: nn.Sequential(nn.Tanh(), Split(Cosine(dim // 2, 1), conv(dim // 2)), nn.ReLU()),
    }[kind]()


KINDS = ("attention", "written", "reduced", "gate", "convolutions", "nested")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_are_above_every_attack(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    first = nn.Identity() if seed % 2 else branch(KINDS[(KINDS.index(kind) + seed + 1) % len(KINDS)], 4)
    model = nn.Sequential(conv(2, 8), nn.ReLU(), Split(first, branch(kind, 4)), nn.Conv2d(8, 3, 1))
    for parameter in model.parameters():
        parameter.data.mul_((0.5, 1.0, 2.0)[seed])
    model = model.double().eval()
    result = audit(model, (2, 4, 4))
    assert attacked(model, (2, 4, 4), seed) <= result.upper.value < math.inf
    x = torch.rand(3, 2, 4, 4, dtype=torch.float64)
    output, error = result.program.evaluate(x)
    assert bool(((output - model(x)).flatten(1).norm(dim=1) <= 2 * error).all()) and float(error.max()) < 1e-6


@pytest.mark.parametrize("kind", ["attention", "written", "reduced", "gate"])
def test_two_parts_cost_the_steeper_one(kind: str) -> None:
    """And so do parts of parts: channels that wait on two levels, as in a hierarchy with skip connections."""
    torch.manual_seed(0)
    part = branch(kind, 4).double().eval()
    alone = audit(part, (4, 4, 4)).upper.value
    for first, own in ((nn.Identity(), 1.0), (Scaled(3.0), 3.0)):
        split = Split(first, part)
        for model, shape in ((split, (8, 4, 4)), (Split(nn.ReLU(), nn.Sequential(split, nn.ReLU())), (16, 4, 4))):
            found = audit(nn.Sequential(nn.ReLU(), model).double().eval(), shape).upper.value
            assert found == pytest.approx(max(alone, own, 1.0), rel=1e-6)


def test_a_half_that_attends_to_the_other_is_no_piece() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(), Crossed(4)).double().eval()
    found = audit(model, (8, 3, 3)).upper.value
    assert max(1.0, attacked(model, (8, 3, 3))) <= found < math.inf
    first = nn.Sequential(nn.ReLU(), Split(nn.Identity(), Cosine(4, 1))).double().eval()
    assert audit(first, (8, 3, 3)).upper.value < found


def test_affine_maps_inside_a_piece_have_one_norm() -> None:
    """Two maps that undo each other, behind a slice and behind an activation: 1, and not the product of their norms."""
    there, back = nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False)
    for layer, steep in ((there, 10.0), (back, 0.1)):
        layer.weight.data = torch.tensor([[steep, 0.0], [0.0, 1.0]])[..., None, None]
    for before in (nn.Identity(), nn.Sigmoid()):
        part = nn.Sequential(before, there, back, nn.ReLU())
        model = nn.Sequential(nn.ReLU(), Split(nn.ReLU(), part)).double().eval()
        assert audit(model, (4, 2, 2)).upper.value == pytest.approx(1.0, abs=1e-6)


def test_parts_of_values_that_are_less_steep_count_with_their_own_bounds() -> None:
    """‖(a, 10 b/10)‖: the pieces of the value cost 10, one bound for each √2."""
    first = nn.Conv2d(4, 4, 1, bias=False)
    first.weight.data = torch.diag(torch.tensor([1.0, 1.0, 0.1, 0.1]))[..., None, None]
    steep = nn.Conv2d(2, 2, 1, bias=False)
    steep.weight.data = 10.0 * torch.eye(2)[..., None, None]
    model = nn.Sequential(first, Split(nn.ReLU(), nn.Sequential(nn.ReLU(), steep, nn.ReLU()))).double().eval()
    assert audit(model, (4, 2, 2)).upper.value <= math.sqrt(2.0) + 1e-6
