"""Norms of convolutions against the matrix of torch's own operator, applied to a basis."""

import doctest
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipcert.bounds import BoundError, convolution, hermitian, symbol, torus
from lipcert.bounds.convolution import conv_norm_upper, kernel_norm_upper
from lipcert.bounds.matrix import eigenvalue_upper

LAYERS = {
    False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def norm(matrix):
    return np.linalg.svd(matrix, compute_uv=False)[0]


def reference(weight, size, *, transposed=False, groups=1, **options):
    """The norm of torch's layer with this weight, from its matrix; ValueError where torch refuses."""
    layer = LAYERS[transposed][weight.ndim - 3]
    channels = weight.shape[:1] + (weight.shape[1] * groups,)
    channels = channels if transposed else channels[::-1]
    entries = channels[0] * math.prod(size)
    basis = torch.eye(entries, dtype=torch.float64).reshape(entries, channels[0], *size)
    try:
        module = layer(*channels, tuple(weight.shape[2:]), groups=groups, bias=False, **options).double()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about 'same' padding of even kernels
            module.weight.copy_(weight)
            return norm(module(basis).reshape(entries, -1).numpy())
    except (RuntimeError, IndexError) as error:
        raise ValueError(str(error)) from error


@st.composite
def convolutions(draw):
    """A weight, an image size and options; about a third of them torch refuses."""
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    longest, kernel = {1: (12, 7), 2: (6, 4), 3: (3, 3)}[dims]

    def sides(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    size, extent, groups = sides(1, longest), sides(1, kernel), draw(st.sampled_from([1, 1, 1, 2, 3]))
    transposed = draw(st.sampled_from([False, False, True]))
    options = {"stride": sides(1, 3), "dilation": sides(1, 2), "groups": groups, "transposed": transposed}
    if transposed:
        options |= {"padding": sides(0, 2), "output_padding": sides(0, 1)}
    else:
        mode = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]))
        full = tuple(d * (k - 1) // 2 for d, k in zip(options["dilation"], extent, strict=True))
        padding = draw(st.sampled_from([full, full, sides(0, 3), "valid"]))
        options |= {"padding_mode": mode, "padding": padding}
        if draw(st.booleans()) and max(options["stride"]) == 1:
            options["padding"] = "same"
    weight = random(
        groups * draw(st.integers(1, 3)), draw(st.integers(1, 3)), *extent, seed=draw(st.integers(0, 2**31))
    )
    shape = draw(st.sampled_from(["any", "any", "positive", "holes"]))
    weight = weight.abs() if shape == "positive" else weight * (weight > 0.3) if shape == "holes" else weight
    return weight, size, options


METHODS = st.sampled_from(["eigenvalue", "tight", "gram"])
CASES = (convolutions(), METHODS, st.sampled_from(["dense", "open", "blocks", "torus", "symbols", "grid"]))


def take(patch, way):
    """Leave only one way to bound a convolution, whatever its size."""
    if way != "dense":
        patch.setattr(convolution, "DENSE_SIDE", 0)
    if way in ("torus", "symbols", "grid"):
        patch.setattr(torus, "OPEN", 0)
    if way == "blocks":  # what large matrices get
        for name, value in {"BLOCK": 2, "SPARSE": 3, "LARGE": 4}.items():
            patch.setattr(hermitian, name, value)
    if way == "symbols":  # what kernels of many taps get
        patch.setattr(torus, "_grams", lambda *_: None)
    if way == "grid":
        patch.setattr(convolution, "WORK", 0)
        patch.setattr(convolution, "COARSE", (2,))


@settings(max_examples=300)
@given(*CASES)
def test_never_below_the_operator(case, method, way):
    compare(case, method, way)


@pytest.mark.nightly
@settings(max_examples=10_000, deadline=None)
@given(*CASES)
def test_never_below_the_operator_in_ten_thousand_cases(case, method, way):
    compare(case, method, way)


def compare(case, method, way):
    weight, size, options = case
    with pytest.MonkeyPatch.context() as patch:
        take(patch, way)
        try:
            truth = reference(weight, size, **options)
        except ValueError:
            with pytest.raises(BoundError):
                conv_norm_upper(weight, size, **options)
            return
        bound = conv_norm_upper(weight, size, method=method, **options)
    assert bound.kind == "upper"
    assert bound.value >= truth * (1 - 1e-13)
    if way == "dense":
        assert bound.value <= truth * (1 + (1e-4 if method == "gram" else 1e-9))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_every_small_padding_by_copies(monkeypatch, mode):
    monkeypatch.setattr(convolution, "DENSE_SIDE", 0)
    accepted = 0
    for n, k, p, s in itertools.product((1, 2, 3, 5, 7), (1, 2, 3, 5), (1, 2, 4), (1, 2, 3)):
        weight = random(1, 1, k, seed=100 * n + 10 * k + p)
        options = {"padding": p, "stride": s, "padding_mode": mode}
        try:
            truth = reference(weight, (n,), **options)
        except ValueError:
            with pytest.raises(BoundError):
                conv_norm_upper(weight, (n,), **options)
            continue
        accepted += 1
        assert conv_norm_upper(weight, (n,), **options).value >= truth * (1 - 1e-13)
    assert accepted > 50


# ------------------------------------------------------------------------------------------------------- exact cases


@pytest.mark.parametrize("stride", [1, 2, (2, 3)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_periodic_convolutions_are_exact(stride, dilation):
    weight = random(3, 2, 3, 3)
    options = {"stride": stride, "dilation": dilation, "padding": dilation, "padding_mode": "circular"}
    truth, bound = reference(weight, (6, 6), **options), conv_norm_upper(weight, (6, 6), **options)
    assert bound.method.startswith("torus")
    assert truth * (1 - 1e-13) <= bound.value <= truth * (1 + 1e-9)


@pytest.mark.parametrize(
    "shape, size, options",
    [
        ((12, 3, 4, 4), (8, 12), {"stride": 4}),  # patch embedding
        ((5, 3, 1, 1), (7, 5), {}),
        ((5, 3, 1, 1), (7, 5), {"stride": 3}),
        ((4, 3, 5, 5), (5, 5), {}),  # a single output
        ((4, 3, 3, 2), (7, 4), {"stride": (4, 2)}),  # windows that do not touch
        ((3, 4, 2, 2), (5, 3), {"stride": 2, "transposed": True}),
        ((4, 3, 3, 3), (1, 1), {"padding": 1}),  # only the middle tap ever meets the image
    ],
)
def test_where_the_symbol_is_one_matrix(monkeypatch, shape, size, options):
    monkeypatch.setattr(convolution, "DENSE_SIDE", 0)
    weight = random(*shape)
    truth, bound = reference(weight, size, **options), conv_norm_upper(weight, size, **options)
    assert bound.method == "matrix, eigenvalue"
    assert truth * (1 - 1e-13) <= bound.value <= truth * (1 + 1e-9)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("kernel", [3, 4])
def test_small_maps_are_exact(mode, kernel):
    weight = random(3, 4, kernel, kernel)
    options = {"padding": kernel // 2, "padding_mode": mode, "stride": 2}
    truth, bound = reference(weight, (5, 6), **options), conv_norm_upper(weight, (5, 6), **options)
    assert bound.method.startswith("dense")
    assert truth * (1 - 1e-13) <= bound.value <= truth * (1 + 1e-9)


@pytest.mark.parametrize("size", [(5, 4), (3, 7)])
def test_same_padding_of_even_kernels_is_lopsided_as_in_torch(size):
    weight = random(2, 2, 4, 2)
    truth = reference(weight, size, padding="same")
    assert truth * (1 - 1e-13) <= conv_norm_upper(weight, size, padding="same").value <= truth * (1 + 1e-9)


def test_channel_permutations_and_diagonals_become_depthwise(monkeypatch):
    monkeypatch.setattr(convolution, "DENSE_SIDE", 0)
    diagonal, order = random(40, 1, 3, 3), torch.randperm(40)
    dense = torch.zeros(40, 40, 3, 3, dtype=torch.float64)
    dense[torch.arange(40), order] = diagonal[:, 0]
    depthwise = conv_norm_upper(diagonal, (30, 30), padding=1, groups=40)
    assert conv_norm_upper(dense, (30, 30), padding=1).value == pytest.approx(depthwise.value, rel=1e-9)
    single = max(conv_norm_upper(kernel[None], (30, 30), padding=1).value for kernel in diagonal)
    assert depthwise.value == pytest.approx(single, rel=1e-9)


# ------------------------------------------------------------------------------------------------------- the theorems


def fft_norm(weight, size):
    """What the formula of periodic convolutions says on a torus of the image's own size."""
    return np.linalg.norm(np.fft.fft2(weight.numpy(), size, axes=(2, 3)).transpose(2, 3, 0, 1), 2, (2, 3)).max()


def test_the_torus_of_the_image_is_no_bound_for_zero_padding(monkeypatch):
    monkeypatch.setattr(convolution, "DENSE_SIDE", 0)
    violated = 0
    for seed, n in itertools.product(range(60), (2, 3, 4)):
        weight = random(1, 1, 3, 3, seed=seed)
        truth = reference(weight, (n, n), padding=1)
        violated += truth > fft_norm(weight, (n, n)) * (1 + 1e-9)
        assert conv_norm_upper(weight, (n, n), padding=1).value >= truth
    assert violated >= 3
    edge = torch.tensor([[[-1.0, 2.0, -1.0]]])  # on one pixel the torus sums the taps to 0, the operator is 2
    assert conv_norm_upper(edge, (1,), padding=1).value >= 2.0


def test_zero_padding_on_the_torus_is_nearly_tight(monkeypatch):
    monkeypatch.setattr(convolution, "DENSE_SIDE", 0)
    weight = random(6, 6, 3, 3)
    truth, bound = reference(weight, (10, 10), padding=1), conv_norm_upper(weight, (10, 10), padding=1)
    assert bound.method.startswith("torus 11x11")
    assert truth <= bound.value <= 1.03 * truth


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("points", [2, 5])
def test_the_grid_factor_is_sharp(monkeypatch, degree, points):
    """1 + R z^degree, R a rotation by π/points: the symbol peaks in the middle between two grid points."""
    angle = math.pi / points
    weight = torch.zeros(2, 2, degree + 1, dtype=torch.float64)
    weight[..., 0] = torch.eye(2)
    cos, sin = math.cos(angle), math.sin(angle)
    weight[..., -1] = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    monkeypatch.setattr(convolution, "WORK", 0)
    monkeypatch.setattr(convolution, "COARSE", (points,))
    monkeypatch.setattr(convolution, "DENSE_SIDE", 0)
    bound = conv_norm_upper(weight, (300,), padding=degree)
    assert bound.method == f"grid {points * degree}, eigenvalue"
    assert reference(weight, (300,), padding=degree) <= 2.0 <= bound.value <= 2.0 * (1 + 1e-9)


def test_the_grid_is_used_for_large_images_only():
    weight = random(64, 64, 3, 3)
    assert conv_norm_upper(random(8, 8, 3, 3), (100, 60), padding=1).method.startswith("torus 101x61")
    sizes = symbol.torus(convolution_of(weight, 224))
    assert sizes == (225, 225) and convolution._work(convolution_of(weight, 2000), (2001, 2001)) > convolution.WORK


def convolution_of(weight, n):
    taps = weight.flatten(2).movedim(2, 0)[:, None]
    shifts = torch.cartesian_prod(torch.arange(3), torch.arange(3)) - 1
    return symbol.Correlation(taps, shifts, (symbol.Axis(n, n, 1),) * 2)


def test_circular_padding_that_is_not_periodic():
    """An even kernel with p = k/2 has one output more than inputs: the formula for periodic ones is too small."""
    weight = random(1, 1, 2, 2).abs()
    options = {"padding": 1, "padding_mode": "circular"}
    truth = reference(weight, (4, 4), **options)
    assert truth > fft_norm(weight, (4, 4)) * 1.01
    assert conv_norm_upper(weight, (4, 4), **options).value >= truth


@pytest.mark.parametrize("mode, factor", [("reflect", 2.0), ("replicate", 3.0), ("circular", 2.0)])
def test_padding_by_copies_counts_them(monkeypatch, mode, factor):
    """A 1×1 kernel reads every copy: the norm is that of the padding, √copies per axis."""
    monkeypatch.setattr(convolution, "DENSE_SIDE", 0)
    options = {"padding": 2, "padding_mode": mode}
    weight = torch.eye(3)[:, :, None, None].double()
    truth, bound = reference(weight, (6, 6), **options), conv_norm_upper(weight, (6, 6), **options)
    assert truth == pytest.approx(factor) and truth <= bound.value <= truth * (1 + 1e-9)


# ---------------------------------------------------------------------------------------------------- composed kernels


@st.composite
def kernels(draw):
    dims = draw(st.sampled_from([1, 2]))
    longest = {1: 10, 2: 5}[dims]

    def sides(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    circular, stride, grid, out = draw(st.booleans()), sides(1, 3), sides(1, longest), sides(1, longest)
    if circular:
        grid = tuple(-(-n // s) * s for n, s in zip(grid, stride, strict=True))
        out = tuple(min(o, n // s) for o, n, s in zip(out, grid, stride, strict=True))
    channels = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    kernel = random(*channels, *sides(1, 4), seed=draw(st.integers(0, 2**31)))
    options = {"offsets": sides(-6, 4), "stride": stride, "grid": grid, "out_grid": out, "circular": circular}
    return kernel.abs() if draw(st.booleans()) else kernel, options


def kernel_matrix(kernel, *, offsets, stride, grid, out_grid, circular):
    """The definition, written out."""
    matrix = np.zeros((kernel.shape[0], *out_grid, kernel.shape[1], *grid))
    for i in itertools.product(*map(range, out_grid)):
        for t in itertools.product(*map(range, kernel.shape[2:])):
            q = tuple(s * a + b + o for s, a, b, o in zip(stride, i, t, offsets, strict=True))
            if circular:
                q = tuple(a % n for a, n in zip(q, grid, strict=True))
            if all(0 <= a < n for a, n in zip(q, grid, strict=True)):
                matrix[(slice(None), *i, slice(None), *q)] += kernel[(..., *t)].numpy()
    return matrix.reshape(kernel.shape[0] * math.prod(out_grid), -1)


@settings(max_examples=200)
@given(kernels(), *CASES[1:])
def test_composed_kernels(case, method, way):
    kernel, options = case
    with pytest.MonkeyPatch.context() as patch:
        take(patch, way)
        value = kernel_norm_upper(kernel, method=method, **options).value
    truth = norm(kernel_matrix(kernel, **options))
    periodic = options["circular"] and all(
        o * s == n for o, s, n in zip(options["out_grid"], options["stride"], options["grid"], strict=True)
    )
    assert value >= truth * (1 - 1e-13)
    if way == "dense" or (periodic and way != "grid"):
        assert value <= truth * (1 + (1e-4 if method == "gram" else 1e-9)) + 1e-15


def test_a_residual_branch_is_one_operator():
    """x + s·conv(x): the kernel with the identity added, not 1 + s‖conv‖."""
    kernel = -0.5 * random(4, 4, 3, 3).abs() / 9
    fused = kernel.clone()
    fused[:, :, 1, 1] += torch.eye(4)
    where = {"offsets": (-1, -1), "stride": 1, "grid": (6, 6), "out_grid": (6, 6), "circular": False}
    bound = kernel_norm_upper(fused, **where).value
    basis = torch.eye(4 * 36, dtype=torch.float64).reshape(-1, 4, 6, 6)
    truth = norm((basis + nn.functional.conv2d(basis, kernel, padding=1)).reshape(4 * 36, -1).numpy())
    assert truth * (1 - 1e-13) <= bound <= truth * (1 + 1e-9)
    assert bound < 1.0 + kernel_norm_upper(kernel, **where).value


def test_the_error_is_added():
    where = {"offsets": (0,), "stride": 1, "grid": (4,), "out_grid": (4,), "circular": False}
    kernel = torch.ones(1, 1, 1)
    assert kernel_norm_upper(kernel, error=0.25, **where).value >= 1.25
    assert kernel_norm_upper(0 * kernel, error=0.25, **where).value == 0.25
    assert kernel_norm_upper(kernel, error=math.inf, **where).value == math.inf
    for error in (-1.0, math.nan):
        with pytest.raises(BoundError, match="error"):
            kernel_norm_upper(kernel, error=error, **where)


def test_composed_kernels_are_checked():
    where = {"stride": 2, "grid": (5,), "out_grid": (2,), "circular": True}
    with pytest.raises(BoundError, match="divide the grid"):
        kernel_norm_upper(torch.ones(1, 1, 1), offsets=(0,), **where)
    with pytest.raises(BoundError, match="offsets"):
        kernel_norm_upper(torch.ones(1, 1, 1), offsets=(0, 0), **(where | {"grid": (4,)}))


# ------------------------------------------------------------------------------------------------- scales and refusals


@pytest.mark.parametrize("exponent", [-1000, -530, -66, 500, 900])
@pytest.mark.parametrize("size", [(4, 4), (40, 40)])
def test_scaling_by_a_power_of_two_scales_the_bound(exponent, size):
    weight = random(3, 3, 3, 3)
    bound = conv_norm_upper(weight, size, padding=1).value
    assert conv_norm_upper(weight * 2.0**exponent, size, padding=1).value == bound * 2.0**exponent


@pytest.mark.parametrize("scale", [1e-320, 1e-160, 1e-20, 1e150])
@pytest.mark.parametrize("transposed", [False, True])
def test_tiny_and_huge_weights(scale, transposed):
    weight = random(2, 3, 3, 2) * scale
    unit = weight * 2.0**1000 if scale < 1 else weight * 2.0**-498
    truth = reference(unit, (5, 4), stride=2, transposed=transposed)
    bound = conv_norm_upper(weight, (5, 4), stride=2, transposed=transposed).value
    scaled = bound * (2.0**1000 if scale < 1 else 2.0**-498)
    assert truth * (1 - 1e-13) <= scaled <= truth * (1 + (1e-2 if scale == 1e-320 else 1e-9))


@pytest.mark.parametrize("mode", ["circular", "replicate"])
@pytest.mark.parametrize("order", list(itertools.permutations([1e16, 1.0, -1e16])))
def test_cancellation_is_part_of_the_bound(mode, order):
    """On one pixel the taps add up to exactly 1, in floating point to 0."""
    weight = torch.tensor([[order]], dtype=torch.float64)
    assert conv_norm_upper(weight, (1,), padding=1, padding_mode=mode).value >= 1.0


def test_zero_weights():
    assert conv_norm_upper(torch.zeros(2, 2, 3, 3), (5, 5), padding=1).value == 0.0
    corner = torch.zeros(2, 2, 3, 3)
    corner[:, :, 0, 0] = 1.0  # on one pixel this tap reads only padding
    assert conv_norm_upper(corner, (1, 1), padding=1).value == 0.0


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.full((2, 2, 3, 3), math.nan)},
        {"weight": torch.full((2, 2, 3, 3), math.inf)},
        {"weight": torch.ones(2, 2)},
        {"weight": torch.ones(2, 2, 3, 3, dtype=torch.int32)},
        {"weight": torch.ones(2, 2, 3, 3, dtype=torch.complex64)},
        {"weight": torch.ones(2, 2, 0, 3)},
        {"input_size": (2, 8)},  # smaller than the kernel
        {"input_size": (8,)},
        {"input_size": (0, 8), "padding": 2},
        {"stride": 0},
        {"stride": (1, 2, 3)},
        {"dilation": 0},
        {"padding": -1},
        {"padding": "full"},
        {"padding": "same", "stride": 2},
        {"padding": "same", "transposed": True},
        {"padding": 1, "padding_mode": "symmetric"},
        {"padding": 8, "padding_mode": "reflect"},
        {"padding": 9, "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "circular", "transposed": True},
        {"padding": 9, "transposed": True, "input_size": (2, 2)},
        {"groups": 3},
        {"groups": 0},
        {"output_padding": 1},
        {"output_padding": 2, "stride": 2, "transposed": True},
        {"method": "power"},
    ],
)
def test_refused(change):
    arguments = {"weight": torch.ones(2, 2, 3, 3), "input_size": (8, 8)} | change
    with pytest.raises(BoundError):
        conv_norm_upper(**arguments)


# ------------------------------------------------------------------------------------------------------------- symbols


def test_symbol_is_the_fourier_transform():
    weight, n = random(2, 3, 3, 4), 8
    frequencies = torch.cartesian_prod(torch.arange(n), torch.arange(n)) * (2 * math.pi / n)
    expected = np.fft.fft2(weight.numpy(), (n, n), axes=(2, 3)).reshape(2, 3, -1).transpose(2, 0, 1)
    assert np.allclose(convolution.symbol(weight, frequencies).numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (8,), (57,), (240,), (6, 10), (7, 7), (4, 3, 5)])
def test_cos_and_sin_are_within_their_error(sizes):
    grid = torch.cartesian_prod(*map(torch.arange, sizes)).reshape(-1, len(sizes))
    block = torch.cartesian_prod(*(torch.arange(-3, 4) for _ in sizes)).reshape(-1, len(sizes))
    turns = (grid[:, None] * block / torch.tensor(sizes, dtype=torch.float64)).sum(-1).numpy()
    exact = [np.zeros(turns.shape, np.longdouble), np.zeros(turns.shape, np.longdouble)]
    angle = 2 * np.pi.as_integer_ratio()[0] / np.longdouble(np.pi.as_integer_ratio()[1]) + 2 * np.longdouble(
        1.2246467991473532e-16  # π minus its float64 value
    )
    whole = (grid[:, None] * block * math.lcm(*sizes) // torch.tensor(sizes)).sum(-1).numpy() % math.lcm(*sizes)
    theta = whole.astype(np.longdouble) / math.lcm(*sizes) * angle
    exact = [np.cos(theta), np.sin(theta)]
    for computed, value in zip(symbol.circle(grid, block, sizes), exact, strict=True):
        assert np.abs(computed.numpy() - value).max() <= 8 * 2.0**-53
        assert computed.abs().max() <= 1.0


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_polyphase_blocks_hold_all_singular_values(stride):
    """The union of the blocks' singular values is that of the periodic operator, each frequency with its opposite."""
    kernel = random(2, 3, 4)
    options = {"offsets": (-2,), "stride": (stride,), "grid": (12,), "out_grid": (12 // stride,), "circular": True}
    axis = symbol.Axis(12, 12 // stride, stride, wrap=True)
    correlation = symbol.Correlation(kernel.movedim(2, 0)[:, None], torch.arange(4)[:, None] - 2, (axis,))
    frequency, turns = symbol.frequencies(symbol.torus(correlation))
    blocks = symbol.symbols(correlation, frequency, turns)
    half = torch.linalg.svdvals(blocks).numpy()
    count = 12 // stride
    twice = [half[j if j <= count // 2 else count - j] for j in range(count)]
    expected = np.linalg.svd(kernel_matrix(kernel, **options), compute_uv=False)
    assert np.allclose(np.sort(np.concatenate(twice))[::-1][: len(expected)], expected, atol=1e-12)
    assert symbol.symbol_error(correlation) < 1e-13


def test_the_dense_matrix_is_the_operator():
    weight = random(4, 2, 3, 3)
    correlation = convolution_of(weight, 5)
    basis = torch.eye(50, dtype=torch.float64).reshape(50, 2, 5, 5)
    expected = nn.functional.conv2d(basis, weight, padding=1).reshape(50, -1).T
    assert torch.allclose(symbol.dense(correlation)[0], expected, atol=1e-15)
    assert eigenvalue_upper(symbol.dense(correlation)).value == pytest.approx(
        conv_norm_upper(weight, (5, 5), padding=1).value, rel=1e-9
    )


def test_examples():
    assert doctest.testmod(convolution).failed == doctest.testmod(symbol).failed == 0
