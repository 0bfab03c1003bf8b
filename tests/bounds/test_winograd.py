"""Winograd's form of a 3x3 convolution: what it computes and how far it rounds, against extended precision."""

from __future__ import annotations

import runpy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

import lipcert.bounds.winograd as winograd
from lipcert.bounds import audit
from lipcert.bounds.rounding import gamma

wide = np.finfo(np.longdouble).eps < 2.0**-60
pytestmark = pytest.mark.skipif(not wide, reason="needs a longdouble that is longer than a double")


def exact(x: Tensor, weight: Tensor, padding: tuple[int, int]) -> NDArray[np.longdouble]:
    """Return the convolution in extended precision, (n, c_out, h, w)."""
    a, b = padding
    image = np.pad(x.numpy().astype(np.longdouble), ((0, 0), (0, 0), (a, a), (b, b)))
    kernel = weight.numpy().astype(np.longdouble)
    height, width = image.shape[2] - 2, image.shape[3] - 2
    result = np.zeros((len(x), len(weight), height, width), dtype=np.longdouble)
    for i in range(3):
        for j in range(3):
            result += np.einsum("oc,nchw->nohw", kernel[:, :, i, j], image[:, :, i : i + height, j : j + width])
    return result


def distance(computed: Tensor, truth: NDArray[np.longdouble]) -> NDArray[np.longdouble]:
    return np.sqrt(((computed.numpy().astype(np.longdouble) - truth) ** 2).sum((1, 2, 3)))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)), channels=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)), cached=st.sampled_from([1, 2**22]),
    scale=st.integers(-200, 200), spread=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_the_rounding_of_tiles_is_bounded(size, channels, padding, cached, scale, spread, seed) -> None:
    assume(all(n + 2 * p > 2 for n, p in zip(size, padding, strict=True)))
    torch.manual_seed(seed)
    x = torch.randn(3, channels[0], *size, dtype=torch.float64)
    weight = torch.randn(channels[1], channels[0], 3, 3, dtype=torch.float64) * 2.0**scale
    if spread:  # magnitudes far apart, and sums that cancel
        x *= 2.0 ** torch.randint(-40, 40, x.shape)
        weight *= 2.0 ** torch.randint(-40, 40, (1, channels[0], 1, 1))
        weight[:, :, 1] = -weight[:, :, 0]
    truth = exact(x, weight, padding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "CACHED", cached)
        result = winograd.convolve(x, winograd.transformed(weight), padding, truth.shape[2:]).permute(0, 3, 1, 2)
    count, bound = winograd.rounding(weight)
    norms = torch.linalg.vector_norm(x, dim=(1, 2, 3)).numpy()
    assert (distance(result, truth) <= gamma(count) * bound * norms).all()
    relative = distance(result, truth) / (np.sqrt((truth**2).sum((1, 2, 3))) + 1e-300)
    assert spread or (relative < 1e-13).all()


def test_a_convolution_at_the_worst_of_its_tiles_stays_within_the_bound() -> None:
    """Ascent on the error itself: inputs for which the rounding is large, not random ones."""
    torch.manual_seed(0)
    weight = torch.randn(16, 16, 3, 3, dtype=torch.float64)
    count, bound = winograd.rounding(weight)
    kernel = winograd.transformed(weight)
    best, largest = torch.randn(1, 16, 8, 8, dtype=torch.float64), 0.0
    for step in range(150):
        x = best + torch.randn_like(best) * 0.5 ** (step // 30)
        found = winograd.convolve(x, kernel, (1, 1), (8, 8)).permute(0, 3, 1, 2)
        error = float(distance(found, exact(x, weight, (1, 1)))[0]) / float(x.norm())
        if error > largest:
            best, largest = x, error
    assert 1e-16 < largest <= gamma(count) * bound


@pytest.mark.parametrize("scale", [1.0, 1e-100, 1e150])
def test_the_errors_of_a_program_hold_for_tiles(scale: float) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 24, 3, padding=1).double()
    layer.weight.data *= scale
    layer.bias.data *= scale
    x = torch.rand(2, 16, 7, 9, dtype=torch.float64)
    program = audit(layer, (16, 7, 9)).program
    output, errors = program.evaluate(x)
    truth = exact(x, layer.weight.data, (1, 1)) + layer.bias.data.numpy()[:, None, None]
    found = distance(output, truth)
    assert (found > 0).all() and (found <= errors.numpy()).all() and (errors.numpy() < 1e-9 * scale).all()
    assert torch.allclose(output, layer(x), rtol=1e-12, atol=1e-12 * scale)


def test_a_deployed_program_keeps_its_inner_products() -> None:
    """Only our own evaluation has tiles: what is said of a float32 program does not change with them."""
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 16, 3, padding=1).double()
    x = torch.rand(1, 16, 8, 8, dtype=torch.float64)
    tiled = audit(layer, (16, 8, 8)).program.evaluate(x, "float32")[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "LEAST", 17)
        plain = audit(layer, (16, 8, 8)).program.evaluate(x, "float32")[1]
    assert float(plain) < float(tiled) < float(plain) * (1 + 1e-6)


@pytest.mark.parametrize("options, out", [
    (dict(stride=(2, 2)), (8, 8)), (dict(dilation=(2, 1)), (8, 8)), (dict(groups=2), (8, 8)), ({}, (2, 2)),
    ({}, (1, 9)),
])  # fmt: skip
def test_where_tiles_do_not_apply(options, out) -> None:
    usual = dict(stride=(1, 1), dilation=(1, 1), groups=1)
    weight = torch.zeros(32, 32, 3, 3)
    assert winograd.applies(weight, (8, 8), **usual) and not winograd.applies(weight, out, **{**usual, **options})
    assert not winograd.applies(weight[:8], (8, 8), **usual) and not winograd.applies(weight[..., :2], (8, 8), **usual)


def test_matrices_have_memory_wherever_they_are_made() -> None:
    with torch.device("meta"):
        made = runpy.run_path(winograd.__file__)
    assert torch.equal(made["BEFORE"], winograd.BEFORE)


def test_matrices_are_those_of_a_convolution() -> None:
    """Exactly, in integers: Σ_ξ a_ξ (24² g_ξ)(b_ξ) is 24² times the correlation of a 6x6 tile by a 3x3 kernel."""
    tile, kernel = torch.eye(36, dtype=torch.float64), torch.eye(9, dtype=torch.float64)
    made = torch.einsum("ox,xk,xd->okd", winograd.AFTER, winograd.KERNEL, winograd.BEFORE)
    images = F.conv2d(tile.view(36, 1, 6, 6), kernel.view(9, 1, 3, 3))  # (36, 9, 4, 4)
    assert torch.equal(made, 576 * images.flatten(2).permute(2, 1, 0))


@pytest.mark.parametrize("exponent", [-900, 900])
def test_the_size_of_the_rounding_scales_with_the_weights(exponent: int) -> None:
    """Also where the product of two sums of them has no float."""
    weight = torch.randn(16, 16, 3, 3, dtype=torch.float64)
    count, size = winograd.rounding(weight)
    assert winograd.rounding(weight * 2.0**exponent) == (count, pytest.approx(size * 2.0**exponent, rel=1e-12))
