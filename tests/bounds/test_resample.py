"""Resampling: exact matrices of the axes, against PyTorch's kernels in both precisions, and norms that are attained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense import Apply, assert_sound
from hypothesis import given, settings
from hypothesis import strategies as st

from lipcert.bounds import BoundError, audit
from lipcert.bounds.graph import Node
from lipcert.bounds.patterns import lift
from lipcert.bounds.ranges import Ranges
from lipcert.bounds.rules.resample import axis_matrix
from lipcert.bounds.tracing import trace

aten = torch.ops.aten
EXACT = 1e-8

MODES = {
    "bilinear, larger": ((1, 4, 5), dict(size=(7, 9), mode="bilinear")),
    "bilinear, corners": ((1, 4, 5), dict(size=(7, 9), mode="bilinear", align_corners=True)),
    "bilinear, to one pixel": ((1, 4, 5), dict(size=(1, 2), mode="bilinear", align_corners=True)),
    "bilinear, factor": ((2, 4, 5), dict(scale_factor=1.7, mode="bilinear")),
    "bilinear, factor recomputed": ((2, 4, 5), dict(scale_factor=1.7, mode="bilinear", recompute_scale_factor=True)),
    "bilinear, smaller": ((1, 7, 5), dict(size=(3, 2), mode="bilinear")),
    "bicubic, larger": ((1, 4, 5), dict(size=(7, 9), mode="bicubic")),
    "bicubic, corners": ((1, 4, 5), dict(size=(7, 9), mode="bicubic", align_corners=True)),
    "bicubic, factor": ((1, 5, 5), dict(scale_factor=0.6, mode="bicubic")),
    "linear": ((2, 4), dict(size=7, mode="linear")),
    "trilinear": ((1, 2, 3, 2), dict(scale_factor=2, mode="trilinear")),
    "nearest": ((1, 4, 5), dict(size=(7, 9), mode="nearest")),
    "nearest, factor": ((2, 3, 3), dict(scale_factor=2, mode="nearest")),
    "nearest, smaller": ((1, 7, 5), dict(size=(3, 2), mode="nearest")),
    "nearest exact": ((1, 4, 5), dict(size=(7, 3), mode="nearest-exact")),
    "nearest in one dimension": ((2, 4), dict(size=9, mode="nearest")),
    "nearest in three": ((1, 2, 3, 2), dict(scale_factor=2, mode="nearest")),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_norms_are_attained_and_errors_contained(mode):
    shape, options = MODES[mode]
    model = Apply(lambda m, x: F.interpolate(x, **options))
    program = assert_sound(model, shape, EXACT, points=1).program
    x = torch.rand(3, *shape)
    with torch.no_grad():
        deployed = model.float()(x).double()
    output, allowed = program.evaluate(x.double(), "float32")
    happened = (deployed - output).flatten(1).norm(dim=1)
    assert (happened <= allowed).all() and (allowed < 0.01).all()
    assert torch.equal(output, model(x.double()))


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 40), m=st.integers(1, 60), corners=st.booleans(), cubic=st.booleans(),
    factor=st.none() | st.floats(0.3, 4.0),
)  # fmt: skip
def test_the_matrix_is_what_the_kernel_computes(n, m, corners, cubic, factor):
    """In float64 up to the rounding that the rule counts, 8u(n + 8) a weight."""
    if factor is not None:
        m = max(1, int(n * factor))
    target = aten.upsample_bicubic2d.vec if cubic else aten.upsample_bilinear2d.vec
    factors = None if factor is None else [factor, 1.0]
    arguments = {
        "input": None, "output_size": None if factors else [m, 1], "align_corners": corners, "scale_factors": factors,
    }  # fmt: skip
    node = Node("y", str(target), arguments, (1, 1, m, 1), 0, target=target)
    exact = axis_matrix(node, (1, 1, n, 1), 2)
    basis = torch.eye(n, dtype=torch.float64).reshape(n, 1, n, 1)
    computed = target(basis, arguments["output_size"], corners, factors).reshape(n, -1).T
    assert exact.shape == computed.shape
    assert (exact - computed).abs().max() <= 8 * 2.0**-53 * (n + 8)
    assert (exact.sum(1) - 1.0).abs().max() < 1e-12
    single = target(basis.float(), arguments["output_size"], corners, factors).reshape(n, -1).T.double()
    assert (exact - single).abs().max() <= 8 * 2.0**-24 * (n + 8)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_ranges_hold(mode):
    model = Apply(lambda m, x: F.interpolate(x, (7, 6), mode=mode))
    graph = lift(trace(model, (2, 4, 3)))
    found = Ranges(graph, (-1.0, 2.0))(graph.output)
    corners = torch.randint(0, 2, (500, 2, 4, 3), dtype=torch.float64) * 3.0 - 1.0
    result = model(corners)
    assert (result >= found.low).all() and (result <= found.high).all()
    if mode != "bicubic":
        assert float(found.low.min()) == -1.0 and float(found.high.max()) == 2.0
    else:
        assert float(result.max()) > 2.5 and float(found.high.max()) < 3.5  # cubic interpolation overshoots


def test_images_are_not_resampled_among_each_other():
    with pytest.raises(BoundError, match="mixes the images"):
        audit(Apply(lambda m, x: F.interpolate(x.transpose(0, 1), (2, 2), mode="nearest").transpose(0, 1)), (1, 4, 4))
