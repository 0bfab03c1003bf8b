"""Composite operators written as small ones: the same numbers, bounds that hold, and what is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense import Apply, assert_sound
from torch import nn

from lipcert.bounds import BoundError, audit
from lipcert.bounds.tracing import trace

EXACT = 1e-8


def weight(*shape):
    return nn.Parameter(torch.randn(*shape))


LINEAR = {
    "a matrix for each row": (lambda m, x: torch.einsum("bhwc,hkc->bhwk", x, m.w), (3, 6, 4), (3, 5, 4)),
    "the weight first": (lambda m, x: torch.einsum("hkc,bhwc->bkhw", m.w, x), (3, 6, 4), (3, 5, 4)),
    "two summed labels": (lambda m, x: torch.einsum("bhwc,kwc->bkh", x, m.w), (2, 5, 4), (3, 5, 4)),
    "an outer product": (lambda m, x: torch.einsum("bi,jk->bjki", x, m.w), (2, 3), (4,)),
    "ellipsis": (lambda m, x: torch.einsum("...c,dc->...d", x, m.w), (6, 4), (3, 5, 4)),
    "no result given": (lambda m, x: torch.einsum("bij,jk", x, m.w), (4, 2), (3, 4)),
    "entry by entry": (lambda m, x: torch.einsum("bij,ij->bij", x, m.w), (3, 4), (3, 4)),
    "addcmul": (lambda m, x: torch.addcmul(m.w, m.w, x, value=2.0), (4,), (3, 4)),
    "lerp": (lambda m, x: torch.lerp(x, m.w, 0.3), (3, 4), (3, 4)),
    "recorded instance statistics": (
        lambda m, x: F.instance_norm(x, *m.w.detach().exp(), use_input_stats=False), (2, 3), (3, 4, 4),
    ),
    "addcmul of a constant product": (lambda m, x: torch.addcmul(x, m.w, m.w), (4,), (3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("what", LINEAR)
def test_norms_are_attained(what):
    function, shape, image = LINEAR[what]
    model = Apply(function, w=weight(*shape))
    result = assert_sound(model, image, EXACT, points=1)
    x = torch.rand(3, *image, dtype=torch.float64)
    assert torch.allclose(result.program(x), model.double()(x), rtol=1e-13, atol=1e-13)


NONLINEAR = {
    "einsum of two values": (lambda m, x: torch.einsum("bij,bkj->bik", x.sigmoid(), x.tanh()), (3, 4)),
    "einsum with heads": (
        lambda m, x: torch.einsum("bihc,bjhc->bhij", *x.sigmoid().view(-1, 3, 2, 2, 2).unbind(2)), (3, 8),
    ),
    "addcmul of two values": (lambda m, x: torch.addcmul(x, x.sigmoid(), x.tanh(), value=0.5), (3, 4)),
    "glu": (lambda m, x: F.glu(x.tanh(), 1), (4, 3)),
    "variance": (lambda m, x: x.var((2, 3)), (2, 3, 3)),
    "biased variance": (lambda m, x: torch.var(x, 1, correction=0, keepdim=True) * x, (3, 4)),
    "standard deviation": (lambda m, x: x.std((2, 3), keepdim=True) + x, (2, 3, 3)),
    "glu of the last dimension": (lambda m, x: F.glu(x.tanh()), (3, 4)),
    "baddbmm": (lambda m, x: torch.baddbmm(x, x.sigmoid(), x.tanh(), beta=0.5, alpha=2), (3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("what", NONLINEAR)
def test_products_have_bounds_on_the_domain(what):
    """Jacobians at points of the domain [0, 1] stay below the bound, which is at most 30 times as large."""
    function, image = NONLINEAR[what]
    model = Apply(function).double()
    result = audit(model, image)
    points = torch.rand(8, *image, dtype=torch.float64)
    norms = []
    for x in points:
        matrix = torch.autograd.functional.jacobian(model, x[None])
        norms.append(float(torch.linalg.matrix_norm(matrix.reshape(-1, x.numel()), 2)))
    assert max(norms) <= result.upper.value <= 30 * max(norms)
    output, error = result.program.evaluate(points)
    assert torch.allclose(output, model(points), rtol=1e-13, atol=1e-13) and error.max() < 1e-12


def test_small_operators_have_names_and_places_of_their_own():
    graph = trace(Apply(lambda m, x: F.glu(x, 1)), (4,))
    assert [node.op.split(".")[1] for node in graph.nodes[1:]] == ["slice", "slice", "sigmoid", "mul"]
    assert len({node.name for node in graph.nodes}) == 5 and all("dense.py" in node.place for node in graph.nodes[1:])


@pytest.mark.parametrize("function", [
    lambda m, x: torch.einsum("bii->bi", x), lambda m, x: torch.einsum("bij,bij,bij->b", x, x, x),
    lambda m, x: torch.einsum("bij,bj->b", x, x[:, 0]), lambda m, x: torch.einsum("bij,cij->bcij", x, x),
    lambda m, x: torch.einsum("bij,bij->ij", x, x), lambda m, x: F.glu(torch.cat([x, x]), 0),
    lambda m, x: x - x.var(0), lambda m, x: x.var(correction=9, dim=1),
])  # fmt: skip
def test_what_is_not_understood_or_mixes_images_is_refused(function):
    with pytest.raises(BoundError):
        audit(Apply(function), (3, 3))


def test_ranges_of_convolutions_over_merged_images():
    """Heads merged with the images, each with a range of its own, as attention with pooled keys does it."""
    def forward(m, x):
        y = m.a((x.sigmoid() * m.w).reshape(-1, 2, 3, 3))
        return (y * y).reshape(-1, 4, 3, 3)

    scales = nn.Parameter(torch.tensor([1.0, 1.0, 9.0, 9.0]).view(4, 1, 1))
    model = Apply(forward, a=nn.Conv2d(2, 2, 3, padding=1), w=scales)
    assert audit(model, (4, 3, 3)).upper.value < float("inf")
