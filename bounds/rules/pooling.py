"""Means, maxima and sorting along dimensions, and pooling over windows.

Averages are linear and fuse where they are convolutions (windows of one size, zero padding counted); other averages act
on each axis alone and have the norm of a Kronecker product. A maximum over windows is at most √(windows that contain
one pixel)-Lipschitz, and exactly that.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from lipcert.bounds.affine import AffineMap, compose, pointwise, segment_bound
from lipcert.bounds.core import Bound, BoundError, rule
from lipcert.bounds.graph import Node, each
from lipcert.bounds.layout import Layout
from lipcert.bounds.matrix import spectral_norm_upper
from lipcert.bounds.propagation import Context
from lipcert.bounds.ranges import Range, Ranges, monotone, ranged, total
from lipcert.bounds.rounding import div_up, gamma, sqrt_up
from lipcert.bounds.values import ONE, Representation, Rounding, Value


@rule("aten.mean.dim", "aten.sum.dim_IntList")
def mean(node: Node, context: Context) -> Value:
    """Bound a mean over n entries by 1/√n, a sum by √n; over channels or positions it is a map that fuses."""
    x = context.data(node, "self")
    given = node["dim"]
    rank = len(x.shape)
    every = range(rank) if given is None or given == () else [given] if isinstance(given, int) else given
    dims = sorted({context.axis(node, x, d) for d in every})
    count = math.prod(x.shape[d] for d in dims)
    averaged = node.op.startswith("aten.mean")

    def transform(found: Representation) -> Representation | None:
        layout, m = found.layout, found.map
        axes = {axis for d in dims for axis in layout.dims[d]}
        if not axes <= set("chw"):
            return None
        total: AffineMap | None = m
        if axes & set("hw"):
            sides = tuple(layout.size(axis) if axis in axes else 1 for axis in "hw")
            taps = m.taps.new_ones(sides[0] * sides[1], m.c_out, 1, 1)
            out = (m.out[0] // sides[0], m.out[1] // sides[1])
            shifts = tuple(itertools.product(range(sides[0]), range(sides[1])))
            total = compose(AffineMap(taps, shifts, m.out, out, stride=(sides[0], sides[1])), m)
        if total is not None and "c" in axes:
            total = compose(pointwise(m.taps.new_ones(1, m.c_out), total.out), total)
        if total is None:
            return None
        if averaged:
            total = total.scaled(torch.tensor([1.0 / count], dtype=torch.float64), 0 if count & (count - 1) == 0 else 1)
        smaller = layout.resized(**dict.fromkeys(axes, 1))
        return replace(found, map=total, layout=smaller if node["keepdim"] else smaller.without(dims))

    norm = sqrt_up(div_up(1.0, float(count)) if averaged else float(count))
    bound = Bound(norm, "upper", "mean" if averaged else "sum")
    channel = dims[0] if len(dims) == 1 else None
    rounding = Rounding(((count + 2, norm),), operations=count + 1)
    return context.linear(node, x, transform, channel=channel, norm=lambda: bound, cheap=norm, rounding=rounding)


@rule("lipcert.center")
def center(node: Node, context: Context) -> Value:
    """Bound x - mean(x) over some dimensions by 1: an orthogonal projection; over channels it fuses."""
    x = context.data(node, "x")
    dims = [context.axis(node, x, d) for d in node["dims"]]
    count = math.prod(x.shape[d] for d in dims)

    def transform(found: Representation) -> Representation | None:
        if len(dims) != 1 or not found.layout.is_axis(dims[0], "c"):
            return None
        matrix = torch.eye(count, dtype=torch.float64, device=found.map.taps.device) - 1.0 / count
        projection = replace(
            pointwise(matrix, found.map.out), error=count * 2.0**-51
        )  # each entry errs by less than 4u
        fused = compose(projection, found.map)
        return None if fused is None else replace(found, map=fused)

    rounding = Rounding(((count + 3, 1.0),), output=1, operations=count + 2)
    channel = dims[0] if len(dims) == 1 else None
    return context.linear(node, x, transform, channel=channel, norm=lambda: ONE, cheap=1.0, rounding=rounding)


@rule("aten.amax.default", "aten.amin.default", "aten.max.dim", "aten.min.dim", "aten.kthvalue.default",
      "aten.median.dim")  # fmt: skip
def extremum_along(node: Node, context: Context) -> Value:
    """Bound a maximum, minimum or other order statistic over dimensions by 1: |Δ| ≤ ‖a - b‖_∞, group by group."""
    x = context.data(node, "self")
    _values_only(node)
    given = node["dim"]
    every = range(len(x.shape)) if given == () else [given] if isinstance(given, int) else given
    for d in every:
        context.axis(node, x, d)
    return context.nonlinear(node, [x], ONE)


@rule("lipcert.maxmin_along")
def maxmin_along(node: Node, context: Context) -> Value:
    """Bound (max, min) over a dimension of size 2 by 1: sorting each pair, 1-Lipschitz."""
    x = context.data(node, "x")
    context.axis(node, x, node["dim"])
    if node["joined"] % len(node.shape) == node.batch:
        raise context.mixed(node)
    return context.nonlinear(node, [x], ONE, label="MaxMin")


@rule("aten.sort.default", "aten.sort.stable", "aten.topk.default")
def sort(node: Node, context: Context) -> Value:
    """Bound sorted values by 1: sorting is nonexpansive (rearrangement inequality). GroupSort is this after a view."""
    x = context.data(node, "self")
    _values_only(node)
    context.axis(node, x, node["dim"])
    return context.nonlinear(node, [x], ONE)


@rule("aten.max_pool1d.default", "aten.max_pool2d.default", "aten.max_pool3d.default",
      "aten.max_pool2d_with_indices.default")  # fmt: skip
def max_pool(node: Node, context: Context) -> Value:
    """Bound max pooling by √(largest number of windows that contain one pixel), axis by axis; 1 without overlap."""
    x = context.data(node, "self")
    _values_only(node)
    sides, kernel, stride, padding = _windows(node, context, x)
    dilation = each(node["dilation"], len(sides))
    first = len(x.shape) - len(sides)
    counts = [
        _covered(n, node.shape[first + j], k, s, p, d)
        for j, (n, k, s, p, d) in enumerate(zip(sides, kernel, stride, padding, dilation, strict=True))
    ]
    return context.nonlinear(node, [x], Bound(sqrt_up(float(math.prod(counts))), "upper", "windows per pixel"))


@rule("aten.adaptive_max_pool1d.default", "aten.adaptive_max_pool2d.default", "aten.adaptive_max_pool3d.default")
def adaptive_max_pool(node: Node, context: Context) -> Value:
    """Bound adaptive max pooling as `max_pool`; window i of m covers ⌊i n/m⌋ to ⌈(i+1) n/m⌉."""
    x = context.data(node, "self")
    _values_only(node)
    axes = int(node.op[node.op.index("pool") + 4])
    counts = []
    for dim in range(len(x.shape) - axes, len(x.shape)):
        context.axis(node, x, dim)
        n, m = x.shape[dim], node.shape[dim]
        places = (j for i in range(m) for j in range(i * n // m, -(-(i + 1) * n // m)))
        counts.append(max(Counter(places).values()))
    return context.nonlinear(node, [x], Bound(sqrt_up(float(math.prod(counts))), "upper", "windows per pixel"))


@rule("aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default")
def avg_pool(node: Node, context: Context) -> Value:
    """Bound average pooling: a convolution of one channel, fused; where windows differ, ‖A_h‖‖A_w‖ of its axes."""
    x = context.data(node, "self")
    sides, kernel, stride, padding = _windows(node, context, x)
    divisor = node.arguments.get("divisor_override")
    out = node.shape[len(x.shape) - len(sides) :]
    clipped = [
        any(min(s * i - p + k, n + p) - (s * i - p) < k for i in range(o))
        for n, k, s, p, o in zip(sides, kernel, stride, padding, out, strict=True)
    ]
    if (node["count_include_pad"] or not any(padding)) and not any(clipped) and len(sides) < 3:
        return _mean_of_windows(node, context, x, kernel, stride, padding, divisor or math.prod(kernel))
    if divisor is not None:
        raise BoundError(f"average pooling with divisor_override and clipped windows has no rule ({node.place})")
    matrices = []
    for n, k, s, p, o in zip(sides, kernel, stride, padding, out, strict=True):
        matrix = torch.zeros(o, n, dtype=torch.float64)
        for i in range(o):
            start, end = s * i - p, min(s * i - p + k, n + p)
            inside = range(max(start, 0), min(end, n))
            matrix[i, list(inside)] = 1.0 / ((end - start) if node["count_include_pad"] else max(1, len(inside)))
        matrices.append(matrix)
    return _separable(node, context, x, matrices)


@rule("aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default", "aten.adaptive_avg_pool3d.default",
      "aten._adaptive_avg_pool2d.default")  # fmt: skip
def adaptive_avg_pool(node: Node, context: Context) -> Value:
    """Bound adaptive average pooling: windows of one size where the output divides the input, else ‖A_h‖‖A_w‖."""
    x = context.data(node, "self")
    axes = 1 if "1d" in node.op else 3 if "3d" in node.op else 2
    first = len(x.shape) - axes
    for dim in range(first, len(x.shape)):
        context.axis(node, x, dim)
    sides, out = x.shape[first:], node.shape[first:]
    if axes < 3 and all(n % o == 0 for n, o in zip(sides, out, strict=True)):
        kernel = [n // o for n, o in zip(sides, out, strict=True)]
        return _mean_of_windows(node, context, x, kernel, kernel, [0] * axes, math.prod(kernel))
    matrices = []
    for n, o in zip(sides, out, strict=True):
        matrix = torch.zeros(o, n, dtype=torch.float64)
        for i in range(o):
            start, end = i * n // o, -(-(i + 1) * n // o)
            matrix[i, start:end] = 1.0 / (end - start)
        matrices.append(matrix)
    return _separable(node, context, x, matrices)


def _mean_of_windows(
    node: Node,
    context: Context,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    divisor: int,
) -> Value:
    """Return the value of a sum over windows, zeros outside, divided by `divisor`."""
    axes = len(kernel)
    if x.node.batch not in (0, None) or len(x.shape) != axes + 2:
        raise context.mixed(node)
    expected, result = Layout.of(x.shape, 0, 1), Layout.of(node.shape, 0, 1)
    if axes == 1:
        kernel, stride, padding = [1, *kernel], [1, *stride], [0, *padding]
    grid, out = _grid(x.shape, axes), _grid(node.shape, axes)
    shifts = tuple((a - padding[0], b - padding[1]) for a in range(kernel[0]) for b in range(kernel[1]))
    taps = torch.ones(len(shifts), x.shape[1], 1, 1, dtype=torch.float64, device=x.device)
    window = AffineMap(taps, shifts, grid, out, stride=(stride[0], stride[1]))
    roundings = 0 if divisor & (divisor - 1) == 0 else 1
    second = window.scaled(torch.tensor([1.0 / divisor], dtype=torch.float64), roundings)

    def transform(given: Representation) -> Representation | None:
        fused = compose(second, given.map) if given.layout == expected else None
        return None if fused is None else replace(given, map=fused, layout=result)

    norm = cache(lambda: segment_bound(second, context.method))
    rounding = Rounding(((len(shifts) + 3, second.magnitude),), operations=len(shifts) + 2)
    return context.linear(node, x, transform, channel=1, norm=norm, cheap=second.magnitude, rounding=rounding)


def _separable(node: Node, context: Context, x: Value, matrices: list[Tensor]) -> Value:
    """Return the value of a linear map that acts on each axis by its own matrix: ‖A ⊗ B‖ = ‖A‖‖B‖.

    The entries 1/n are rounded: an error of at most u per entry, hence of u·√(rows·columns) in the norm, is added.
    """
    norm = Bound(1.0, "upper", "axes")
    for matrix in matrices:
        slack = Bound(math.sqrt(matrix.numel()) * 2.0**-52, "upper", "axes")
        norm = norm * (spectral_norm_upper(matrix, context.method) + slack)
    terms = math.prod(int(matrix.count_nonzero(1).max()) for matrix in matrices)
    rounding = Rounding(((terms + 4, norm.value),), operations=terms + 2)
    return context.linear(node, x, None, norm=lambda: norm, cheap=norm.value, rounding=rounding)


def _windows(node: Node, context: Context, x: Value) -> tuple[tuple[int, ...], list[int], list[int], list[int]]:
    axes = int(node.op[node.op.index("pool") + 4])
    first = len(x.shape) - axes
    for dim in range(first, len(x.shape)):
        context.axis(node, x, dim)
    kernel = each(node["kernel_size"], axes)
    stride = each(node["stride"], axes) if node["stride"] else kernel
    return x.shape[first:], kernel, stride, each(node["padding"], axes)


def _covered(n: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Return the largest number of windows that contain one position of an axis."""
    places = (stride * i + dilation * t - padding for i in range(out) for t in range(kernel))
    return max(Counter(place for place in places if 0 <= place < n).values())


def _grid(shape: Sequence[int], axes: int) -> tuple[int, int]:
    return (shape[2], shape[3]) if axes == 2 else (1, shape[2])


def _values_only(node: Node) -> None:
    if node.output not in (None, 0):
        raise BoundError(f"the indices of {node.op} jump; only its values have a rule ({node.place})")


# ------------------------------------------------------------------------------------------------------------ ranges


@ranged("aten.mean.dim", "aten.sum.dim_IntList", "aten.avg_pool1d.default", "aten.avg_pool2d.default",
        "aten.avg_pool3d.default", "aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default",
        "aten.adaptive_avg_pool3d.default", "aten._adaptive_avg_pool2d.default")  # fmt: skip
def _averaged_range(node: Node, ranges: Ranges) -> Range:
    """Average the ends; sums of n entries err by γ_n."""
    count = math.prod(ranges.shape(node["self"]))
    return monotone(node, ranges, roundings=count + 8)


@ranged("aten.amax.default", "aten.amin.default", "aten.max.dim", "aten.min.dim", "aten.kthvalue.default",
        "aten.median.dim", "aten.adaptive_max_pool1d.default", "aten.adaptive_max_pool2d.default",
        "aten.adaptive_max_pool3d.default", "aten.sort.default",
        "aten.sort.stable", "aten.topk.default", "aten.max_pool1d.default", "aten.max_pool2d.default",
        "aten.max_pool3d.default", "aten.max_pool2d_with_indices.default", "lipcert.maxmin_along")  # fmt: skip
def _ordered_range(node: Node, ranges: Ranges) -> Range:
    """Order the ends: the k-th largest entry does not decrease when an entry grows."""
    return ranges.unknown(node) if node.output not in (None, 0) else monotone(node, ranges)


@ranged("lipcert.center")
def _centred_range(node: Node, ranges: Ranges) -> Range:
    x, dims = ranges.of(node, "x"), node["dims"]
    shape = ranges.shape(node["x"])
    count = math.prod(shape[d] for d in dims)
    ends = [end.expand(shape).mean(tuple(dims), keepdim=True) for end in (x.low, x.high)]
    slack = x.magnitude.amax(tuple(dims), keepdim=True) * (2.0 * gamma(count + 4))
    return total(x, Range(ends[0] - slack, ends[1] + slack), -1.0)
