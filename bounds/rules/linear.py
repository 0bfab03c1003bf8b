"""Linear operators with constant weights: convolutions and matrix products.

Each is one tap list or one channel matrix, composed with the affine map of its argument where the two fuse
(docs/bounds.md 2 and 3), and bounded alone where not. Biases do not matter for a Lipschitz constant. Rounding: an inner
product of length n errs by γ_n Σ|w||x|, in any order of summation (Higham, chapter 3); one more rounding for the bias
and one for weights that had to be rounded to the precision of the program.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from lipcert.bounds import winograd
from lipcert.bounds.affine import AffineMap, compose, pointwise, segment_bound
from lipcert.bounds.convolution import conv_norm_upper
from lipcert.bounds.core import BoundError, rule
from lipcert.bounds.graph import Node, Ref, each
from lipcert.bounds.layout import Layout
from lipcert.bounds.matrix import scaled, spectral_norm_upper
from lipcert.bounds.propagation import Context
from lipcert.bounds.ranges import Range, Ranges, affine, ranged
from lipcert.bounds.rounding import div_up, enlarge, mul_up, scale_up, sqrt_up
from lipcert.bounds.spectral import TINY
from lipcert.bounds.values import Representation, Rounding, Value


@rule(
    "aten.conv1d.default", "aten.conv2d.default", "aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.default",
    "aten.conv3d.padding",
)  # fmt: skip
def convolution(node: Node, context: Context) -> Value:
    """Bound a convolution: ‖conv‖ = max_ω ‖K̂(ω)‖ on a torus that contains it, fused with what surrounds it."""
    x = context.data(node, "input")
    weight = _weight(node, context, "weight")
    if weight is None:
        return context.unbounded(node, [x], "the kernel of the convolution depends on the input")
    axes = weight.ndim - 2
    _images_first(node, context, x, axes)
    dilation = each(node["dilation"], axes)
    extents = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    padding = node["padding"]
    before = [e // 2 if padding == "same" else 0 for e in extents] if isinstance(padding, str) else each(padding, axes)
    stride = each(node["stride"], axes)
    size = convolved(weight, node["groups"], windows(weight.shape[2:], stride, dilation, node.shape[2:]))
    rounding = _rounding(node, context, weight, weight[0].numel(), size)
    if axes == 2 and winograd.applies(weight, node.shape[2:], stride=stride, dilation=dilation, groups=node["groups"]):
        rounding = _tiled(rounding, weight)
    if axes == 3:
        norm = cache(
            lambda: conv_norm_upper(
                weight, x.shape[2:], stride=node["stride"], padding=padding, dilation=dilation, groups=node["groups"],
                method=context.method,
            )
        )  # fmt: skip
        return context.linear(node, x, None, norm=norm, cheap=schur(weight), rounding=rounding)
    second = _kernel(weight, x.shape, node.shape, each(node["stride"], axes), before, dilation, node["groups"])
    expected = Layout.of(x.shape, 0, 1)

    def transform(given: Representation) -> Representation | None:
        if given.layout != expected:
            return None
        fused = compose(second, given.map)
        return None if fused is None else replace(given, map=fused, layout=Layout.of(node.shape, 0, 1))

    norm = cache(lambda: segment_bound(second, context.method))
    return context.linear(node, x, transform, channel=1, norm=norm, cheap=second.magnitude, rounding=rounding)


@rule("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
def transposed_convolution(node: Node, context: Context) -> Value:
    """Bound a transposed convolution by the norm of its adjoint, a convolution; it does not fuse."""
    x = context.data(node, "input")
    weight = _weight(node, context, "weight")
    if weight is None:
        return context.unbounded(node, [x], "the kernel of the convolution depends on the input")
    axes = weight.ndim - 2
    _images_first(node, context, x, axes)
    norm = cache(
        lambda: conv_norm_upper(
            weight, x.shape[2:], stride=each(node["stride"], axes), padding=each(node["padding"], axes),
            dilation=each(node["dilation"], axes), groups=node["groups"], transposed=True,
            output_padding=each(node["output_padding"], axes), method=context.method,
        )
    )  # fmt: skip
    rounding = _rounding(node, context, weight, weight[:, 0].numel(), schur(weight))
    return context.linear(node, x, None, norm=norm, cheap=schur(weight), rounding=rounding)


@rule("aten.linear.default")
def linear(node: Node, context: Context) -> Value:
    """Bound x ↦ xWᵀ + b along the last dimension by ‖W‖; positions do not add up: the map is block diagonal."""
    x = context.data(node, "input")
    weight = _weight(node, context, "weight")
    if weight is None:
        return context.unbounded(node, [x], "the weight matrix depends on the input")
    return contraction(node, context, x, weight, len(x.shape) - 1)


@rule("aten.addmm.default")
def addmm(node: Node, context: Context) -> Value:
    """Bound beta·bias + alpha·xM for a constant matrix M, as `linear`."""
    if not isinstance(node["mat1"], Ref) or isinstance(node["mat2"], Ref) or isinstance(node["self"], Ref):
        return context.unbounded(
            node, [context.live[n] for n in node.inputs], "product of two values that depend on the input"
        )
    x, matrix = context.data(node, "mat1"), context.constant(node, "mat2")
    if matrix is None or float(node["alpha"]) != 1.0:
        raise BoundError(f"addmm with alpha = {node['alpha']} has no rule ({node.place}); scale the matrix instead")
    return contraction(node, context, x, matrix.T, 1, bias="self")


@rule("aten.cumsum.default")
def cumulative_sum(node: Node, context: Context) -> Value:
    """Bound a cumulative sum as the lower triangular matrix of ones that it is."""
    x = context.data(node, "self")
    dim = context.axis(node, x, node["dim"])
    ones = torch.ones(x.shape[dim], x.shape[dim], dtype=torch.float64, device=x.device)
    return contraction(node, context, x, ones.tril(), dim, bias="")


def contraction(node: Node, context: Context, x: Value, matrix: Tensor, dim: int, *, bias: str = "bias") -> Value:
    """Return the value of a matrix (k, d) applied along dimension `dim` of x, of size d.

    Where that dimension holds the channels, positions stay; where it holds whole (c, h, w) arrays, as after a flatten,
    the matrix is one window that covers the grid.
    """
    dim = context.axis(node, x, dim)

    def transform(given: Representation) -> Representation | None:
        layout, first = given.layout, given.map
        if layout.is_axis(dim, "c"):
            second = pointwise(matrix, first.out)
        elif set(layout.dims[dim]) == {axis for dims in layout.dims for axis in dims} <= set("chw"):
            second = _window(matrix, layout, dim)
        else:
            return None
        fused = compose(second, first)
        if fused is None:
            return None
        flat = layout if layout.is_axis(dim, "c") else layout.resized(c=1, h=1, w=1)
        return replace(given, map=fused, layout=flat.placed(dim, "c", matrix.shape[0]))

    norm = cache(lambda: spectral_norm_upper(matrix, context.method))
    size = absolute_norm(matrix)
    rounding = _rounding(node, context, matrix, matrix.shape[1], size, bias)
    return context.linear(node, x, transform, channel=dim, norm=norm, cheap=size, rounding=rounding)


def _window(matrix: Tensor, layout: Layout, dim: int) -> AffineMap:
    """Return a matrix on flattened (c, h, w) arrays as one window with a tap at every position."""
    order = layout.dims[dim]
    c, h, w = (layout.size(axis) for axis in "chw")
    taps = matrix.reshape(-1, *(layout.size(axis) for axis in order))
    missing = [axis for axis in "chw" if axis not in order]
    taps = taps.reshape(*taps.shape, *(1 for _ in missing))
    position = {axis: k + 1 for k, axis in enumerate((*order, *missing))}
    taps = taps.permute(position["h"], position["w"], 0, position["c"])  # (h, w, k, c)
    shifts = tuple(itertools.product(range(h), range(w)))
    return AffineMap(taps.reshape(h * w, 1, -1, c), shifts, (h, w), (1, 1))


def _kernel(
    weight: Tensor, shape: tuple[int, ...], out: tuple[int, ...], stride: list[int], before: list[int],
    dilation: list[int], groups: int,
) -> AffineMap:  # fmt: skip
    """Return a convolution of images of `shape` (1, c, [h,] w) as an affine map."""
    if weight.ndim == 3:
        weight, stride, before, dilation = weight[:, :, None], [1, *stride], [0, *before], [1, *dilation]
        shape, out = (*shape[:2], 1, shape[2]), (*out[:2], 1, out[2])
    shifts = tuple(
        (a * dilation[0] - before[0], b * dilation[1] - before[1])
        for a in range(weight.shape[2])
        for b in range(weight.shape[3])
    )
    taps = weight.unflatten(0, (groups, -1)).flatten(3).permute(3, 0, 1, 2).contiguous()  # (T, g, c_out/g, c_in/g)
    return AffineMap(taps, shifts, (shape[2], shape[3]), (out[2], out[3]), stride=(stride[0], stride[1])).trimmed()


def _weight(node: Node, context: Context, argument: str) -> Tensor | None:
    """Return constant weights, None where weights or bias depend on the input."""
    if isinstance(node[argument], Ref) or isinstance(node["bias"], Ref):
        return None
    return context.constant(node, argument)


def _images_first(node: Node, context: Context, x: Value, axes: int) -> None:
    if len(x.shape) != axes + 2 or x.node.batch not in (0, None):
        raise context.mixed(node)


def _rounding(node: Node, context: Context, weight: Tensor, length: int, size: float, bias: str = "bias") -> Rounding:
    """Return the rounding of inner products of this length, in l2 over all outputs, the bias included.

    `size` is a bound of ‖|W|‖, of the operator with the absolute values of its weights.
    """
    offset = context.constant(node, bias) if bias in node.arguments else None
    constant = 0.0
    if offset is not None:
        norm = enlarge(float(torch.linalg.vector_norm(offset)), offset.numel() + 2)
        constant = mul_up(norm, sqrt_up(div_up(math.prod(node.shape), offset.numel())))
    return Rounding(((length + 3, size),), constant=(length + 3, constant), operations=2 * length + 2)


def _tiled(rounding: Rounding, weight: Tensor) -> Rounding:
    """Return the rounding of a convolution that `Program` may evaluate by `lipcert.bounds.winograd`."""
    count, size = winograd.rounding(weight)
    ((plain, norm),) = rounding.inputs
    operations = rounding.operations + winograd.AMPLIFIED * 2 * weight.shape[1]
    lost = mul_up(winograd.LOST, size)
    # where it does not, on other devices, these are inner products as well
    return replace(rounding, evaluated=((max(count, plain), max(size, norm)),), operations=operations, absolute=lost)


def schur(weight: Tensor) -> float:
    """Return an upper bound of ‖|W|‖ for a matrix or a kernel (c_out, c_in, *k), in either direction, by the Schur
    test.

    √(largest sum of a row · largest sum of a column), rows and columns taken over all taps; in a kernel with groups the
    columns add up rows of other groups as well, which only enlarges the bound.
    """
    absolute = weight.abs()
    rows, columns = absolute.flatten(1).sum(1).max(), absolute.transpose(0, 1).flatten(1).sum(1).max()
    return sqrt_up(mul_up(enlarge(float(rows), weight.numel()), enlarge(float(columns), weight.numel())))


def windows(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], out: Sequence[int]) -> int:
    """Return in how many windows of a convolution an entry of its argument lies at most.

    >>> windows((3,), (1,), (1,), (8,)), windows((4, 4), (4, 4), (1, 1), (8, 8)), windows((7,), (1,), (1,), (2,))
    (3, 1, 2)
    """
    several = [k if d > 1 else -(-k // s) for k, s, d in zip(kernel, stride, dilation, strict=True)]
    return math.prod(min(k, n) for k, n in zip(several, out, strict=True))


def convolved(weight: Tensor, groups: int, copies: int) -> float:
    """Return an upper bound of ‖|W|‖ for a convolution whose windows hold each entry of its argument `copies` times.

    The smallest of three: the Schur test; √copies·‖A‖, with A the kernel as a matrix on one window, because the squares
    of what A gives add up over the windows; and ‖Σ_t |K_t|‖, which is the largest value of the symbol.
    """
    parts = weight.unflatten(0, (groups, -1))
    window = max(absolute_norm(part.flatten(1)) for part in parts)
    taps = enlarge(max(absolute_norm(part.abs().flatten(2).sum(2)) for part in parts), weight[0, 0].numel())
    return min(schur(weight), mul_up(window, sqrt_up(float(copies))), taps)


def absolute_norm(matrix: Tensor, steps: int = 4) -> float:
    """Return an upper bound of ‖|A|‖ for a matrix (m, n), at most that of the Schur test and hardly above the norm.

    For any positive x, ‖|A|‖² ≤ max_i (|A|ᵀ|A|x)_i / x_i (Collatz and Wielandt); x comes from a few power iterations.
    All terms are nonnegative, so that a relative error of γ_{m+n+4} covers the roundings, and TINY all underflow.
    """
    magnitude, exponent = scaled(matrix.abs())
    simple = schur(matrix)
    if not magnitude.numel() or not magnitude.any():
        return simple
    vector = magnitude.new_ones(matrix.shape[1])
    for _ in range(steps):
        vector = vector / vector.max()
        vector = vector.clamp_min(2.0**-20)
        image = magnitude.T @ (magnitude @ vector)
        largest = float((image / vector).max())
        found = sqrt_up(enlarge(largest, sum(matrix.shape) + 8) + TINY)
        simple = min(simple, scale_up(found, exponent))
        vector = image
    return simple


# ------------------------------------------------------------------------------------------------------------ ranges


@ranged("aten.cumsum.default")
def _cumulative_range(node: Node, ranges: Ranges) -> Range:
    dim = node["dim"] % len(node.shape)
    ones = torch.ones(node.shape[dim], node.shape[dim], dtype=torch.float64, device=ranges.device)
    return affine(ranges.of(node, "self"), ones.tril(), None, dim)


@ranged("aten.linear.default", "aten.addmm.default")
def _linear_range(node: Node, ranges: Ranges) -> Range:
    data, weight, bias = ("mat1", "mat2", "self") if "mat1" in node.arguments else ("input", "weight", "bias")
    matrix, offset = node[weight], node[bias]
    if not isinstance(matrix, Tensor) or isinstance(offset, Ref) or not isinstance(node[data], Ref):
        return ranges.unknown(node)
    if data == "mat1" and (node["alpha"] != 1 or node["beta"] != 1):
        return ranges.unknown(node)
    return affine(ranges.of(node, data), matrix.T if data == "mat1" else matrix, offset, len(node.shape) - 1)


@ranged(
    "aten.conv1d.default", "aten.conv2d.default", "aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.default",
    "aten.conv3d.padding", "aten.conv_transpose1d.default", "aten.conv_transpose2d.input",
    "aten.conv_transpose3d.input",
)  # fmt: skip
def _convolution_range(node: Node, ranges: Ranges) -> Range:
    """Range over one interval a channel: every tap reads a value of that interval, or the zero of a padding."""
    weight, bias, groups = node["weight"], node["bias"], int(node["groups"])
    if not isinstance(weight, Tensor) or isinstance(bias, Ref):
        return ranges.unknown(node)
    transposed = "transpose" in node.op
    x = ranges.of(node, "input")
    x = x.over(0, *range(2, x.low.ndim))  # also over what a view merged with the images
    padding = node["padding"]
    if transposed or padding == "same" or (padding != "valid" and any(each(padding, 1))):
        x = Range(x.low.clamp_max(0.0), x.high.clamp_min(0.0))
    if not x.finite:
        return ranges.unknown(node)
    low, high = (end.expand(1, ranges.shape(node["input"])[1], *end.shape[2:]).flatten() for end in (x.low, x.high))
    taps = weight.flatten(2)
    if transposed:  # (c_in, c_out/g, T) -> (c_out, c_in/g, T)
        taps = taps.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    taps = taps.unflatten(0, (groups, -1))  # (g, c_out/g, c_in/g, T)
    count = taps.shape[2] * taps.shape[3]
    # each tap has its own value in the interval: sums of positive and of negative weights
    positive, negative = taps.clamp_min(0.0).sum(3), taps.clamp_max(0.0).sum(3)
    low, high = low.unflatten(0, (groups, -1, 1)), high.unflatten(0, (groups, -1, 1))
    least = (positive @ low + negative @ high).flatten()
    most = (positive @ high + negative @ low).flatten()
    slack = ((positive - negative) @ torch.maximum(low.abs(), high.abs())).flatten() * ((2 * count + 16) * 2.0**-53)
    if bias is not None:
        least, most, slack = least + bias, most + bias, slack + bias.abs() * 2.0**-51
    slack = slack * 1.0625 + 2.0**-1000
    shape = (1, -1, *(1,) * (len(node.shape) - 2))
    return Range((least - slack).reshape(shape), (most + slack).reshape(shape))
