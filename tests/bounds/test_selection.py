"""Operators that pick, repeat and mask entries: norms that are attained, images kept apart, ranges that hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense import assert_sound
from torch import nn

from lipcert.bounds import BoundError, audit
from lipcert.bounds.patterns import lift
from lipcert.bounds.ranges import Ranges
from lipcert.bounds.tracing import trace

EXACT = 1e-8


class Indexed(nn.Module):
    """A function of x and of a constant index."""

    def __init__(self, function, index) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("index", index)

    def forward(self, x):
        return self.function(x, self.index)


def picking(function, index=None, shape=(3, 4)):
    return Indexed(function, torch.tensor([0.0]) if index is None else torch.tensor(index)), shape


CASES = {
    "two indices": picking(lambda x, i: x[:, i, i + 1], [0, 1, 1]),
    "two indices with room between": picking(lambda x, i: x[:, i, :, i].transpose(0, 1), [0, 1, 1], (3, 4, 3)),
    "a table of indices": picking(lambda x, i: x[:, i], [[0, 1], [1, 1]]),
    "gather": picking(lambda x, i: torch.gather(x, 2, i.expand(x.shape[0], -1, -1)), [[[0, 3], [1, 1], [2, 0]]]),
    "unfold": picking(lambda x, i: x.unfold(2, 3, 1).unfold(3, 3, 2), shape=(2, 5, 5)),
    "im2col": picking(lambda x, i: F.unfold(x, 3, padding=1), shape=(2, 5, 5)),
    "col2im": picking(lambda x, i: F.fold(x, (4, 4), 3, padding=1), shape=(18, 16)),
    "col2im, disjoint": picking(lambda x, i: F.fold(x, (4, 4), 2, stride=2), shape=(8, 4)),
    "cumulative sum": picking(lambda x, i: x.cumsum(2)),
    "im2col, disjoint": picking(lambda x, i: F.unfold(x, 2, stride=2), shape=(2, 4, 4)),
    "diagonal": picking(lambda x, i: torch.diagonal(x, 1, 1, 2)),
    "triangle": picking(lambda x, i: x.tril(1).abs()),
    "repeat": picking(lambda x, i: x.repeat(1, 2, 3)),
    "repeat interleave": picking(lambda x, i: x.repeat_interleave(3, 1)),
    "repeat images": picking(lambda x, i: (2 * x.repeat(3, 1, 1)).view(3, -1, 3, 4).transpose(0, 1)),
    "repeat images one by one": picking(lambda x, i: (2 * x.repeat_interleave(3, 0)).view(-1, 3, 3, 4).abs()),
    "where": picking(lambda x, i: torch.where(i > 0, x, 2 * x.flip(1)), [[1.0, -1.0, 1.0, -1.0]]),
    "where, one value": picking(lambda x, i: torch.where(i > 0, x[:, :1], 2.0), [[1.0], [1.0], [1.0]]),
    "masked fill": picking(lambda x, i: x.masked_fill(i > 0, -5.0), [1.0, -1.0, 1.0, -1.0]),
    "masked fill, infinity": picking(lambda x, i: x.masked_fill(i > 0, -float("inf")).relu(), [1.0, -1.0, 1.0, -1.0]),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_norms_are_attained(what):
    model, shape = CASES[what]
    slack = None if what == "where" else EXACT
    result = assert_sound(model, shape, slack, points=4)
    x = torch.rand(3, *shape)
    deployed = model.float()(x).double()
    output, allowed = result.program.evaluate(x.double(), "float32")
    assert ((deployed - output).flatten(1).norm(dim=1) <= allowed).all()
    assert torch.allclose(output, model.double()(x.double()), rtol=1e-14)


@pytest.mark.parametrize("what", CASES)
def test_ranges_hold(what):
    model, shape = CASES[what]
    graph = lift(trace(model, shape))
    found = Ranges(graph, (-1.0, 2.0))(graph.output)
    result = model.double()(torch.rand(200, *shape, dtype=torch.float64) * 3.0 - 1.0)
    assert (result >= found.low).all() and (result <= found.high).all()
    assert float(found.low.min()) >= -10.0 or what.endswith("infinity")


def test_a_mask_is_as_large_as_the_larger_side():
    """√(L₁² + L₂²) for the two sides, although they are disjoint in the result: not below 2, not above √5."""
    value = audit(*CASES["where"]).upper.value
    assert 2.0 <= value <= 5.0**0.5 * (1 + 1e-12)


MIXING = {
    "index of images": picking(lambda x, i: x[i], [1, 0]),
    "index of images and more": picking(lambda x, i: x[i, i], [1, 0]),
    "unfolded images": picking(lambda x, i: x.unfold(0, 2, 2)),
    "diagonal of images": picking(lambda x, i: torch.diagonal(x, 0, 0, 1)),
    "triangle of images": picking(lambda x, i: x.permute(1, 0, 2).tril(-1).permute(1, 0, 2)),
    "gathered images": picking(lambda x, i: torch.gather(x, 0, torch.zeros_like(x, dtype=torch.int64))),
    "images repeated, read one by one": picking(lambda x, i: x.repeat(2, 1, 1).view(-1, 2, 3, 4).flatten(1)),
}  # fmt: skip


@pytest.mark.parametrize("what", MIXING)
def test_images_are_kept_apart(what):
    with pytest.raises(BoundError):
        audit(*MIXING[what])


@pytest.mark.parametrize("function", [
    lambda x, i: torch.where(x > 0.5, x, 0.0), lambda x, i: torch.gather(x, 2, x.argmax(2, keepdim=True)),
])  # fmt: skip
def test_choices_that_depend_on_the_input_have_no_bound(function):
    """Or no rule at all: comparisons and positions of maxima have none."""
    try:
        assert audit(*picking(function)).upper.value == float("inf")
    except BoundError as error:
        assert "no rule" in str(error)
