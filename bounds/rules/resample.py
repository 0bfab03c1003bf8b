"""Resampling: nearest, linear and cubic interpolation to another size.

Each acts on every axis by a small matrix of its own, so its norm is the product of their norms (a Kronecker product).
The matrices are exact: positions and weights are formed in rational arithmetic, from the sizes or from the scale
factors where the model gives them, and rounded once.

The position of output i is t = s·i with `align_corners`, s = (n-1)/(m-1), else t = s·(i + 1/2) - 1/2 with s = n/m or
1/factor. Linear interpolation takes the hat function of the distance to t, t cut off at 0 from below; cubic
interpolation Keys' kernel with a = -3/4; neighbours outside the axis are replaced by its ends. Source: Keys 1981, and
PyTorch's documentation of `interpolate`.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from lipcert.bounds.core import Bound, rule
from lipcert.bounds.graph import Node, call
from lipcert.bounds.matrix import spectral_norm_upper
from lipcert.bounds.propagation import Context
from lipcert.bounds.ranges import Range, Ranges, monotone, ranged
from lipcert.bounds.rounding import add_up, mul_up, sqrt_up
from lipcert.bounds.rules.linear import schur
from lipcert.bounds.values import Rounding, Value

_NEAREST = [f"aten.{form}{d}d" for form in ("upsample_nearest", "_upsample_nearest_exact") for d in (1, 2, 3)]
_LINEAR = ["aten.upsample_linear1d", "aten.upsample_bilinear2d", "aten.upsample_trilinear3d"]
_CUBIC = ["aten.upsample_bicubic2d"]


def _overloads(names: list[str]) -> list[str]:
    return [f"{name}.{overload}" for name in names for overload in ("vec", "default")]


@rule(*_overloads(_NEAREST))
def nearest(node: Node, context: Context) -> Value:
    """Bound nearest-neighbour resampling by √(largest number of copies of an entry), axis by axis.

    Which entry an output takes is asked of PyTorch itself: it multiplies in float32, which decides at a boundary.
    """
    x, axes = _image(node, context)
    copies = math.prod(int(torch.bincount(_neighbours(node, x.shape, axis)).max()) for axis in axes)
    norm = Bound(sqrt_up(float(copies)), "upper", "copies")
    return context.linear(node, x, None, norm=lambda: norm, cheap=norm.value)


@rule(*_overloads(_LINEAR + _CUBIC))
def interpolation(node: Node, context: Context) -> Value:
    """Bound linear or cubic interpolation by ∏‖A‖ over its axes, A the exact matrix of one axis.

    Rounding: computed positions err by less than 4u(n + 1), the weights, functions of them whose slopes are at most
    3/2, by less than 8u(n + 8) each: on the neighbours, and on the next ones, because a position can be rounded across
    an integer. With P the matrix of ones at these places, the whole errs by at most the sum over the axes of
    8u(n + 8)‖P‖ times the norms ‖|A|‖ of the others, next to the rounding of the sums; doubled for terms in u².
    """
    x, axes = _image(node, context)
    reach = 2 if "cubic" in node.op else 1
    norm, taps, sizes, places = Bound(1.0, "upper", "axes"), 1, [], []
    for axis in axes:
        matrix = axis_matrix(node, x.shape, axis).to(x.device)
        slack = Bound(math.sqrt(matrix.numel()) * 2.0**-52, "upper", "axes")  # the entries are rounded, by u at most
        norm = norm * (spectral_norm_upper(matrix, context.method) + slack)
        near = torch.nn.functional.max_pool1d((matrix != 0.0).to(torch.float64)[None], 2 * reach + 1, 1, reach)[0]
        taps *= int(near.sum(1).max())
        sizes.append(schur(matrix))
        places.append(schur(near))
    others = [mul_up(1.0, *sizes[:k], *sizes[k + 1 :]) for k in range(len(sizes))]
    count = max(8 * (max(x.shape[axis] for axis in axes) + 8), taps + 8)
    size = add_up(mul_up(1.0, *sizes), *(mul_up(p, other) for p, other in zip(places, others, strict=True)))
    rounding = Rounding(((count, mul_up(2.0, size)),), operations=2 * taps + 8)
    return context.linear(node, x, None, norm=lambda: norm, cheap=norm.value, rounding=rounding)


def axis_matrix(node: Node, shape: tuple[int, ...], axis: int) -> Tensor:
    """Return the matrix (m, n) by which an interpolation acts on one axis of an image of `shape`."""
    n, m = shape[axis], node.shape[axis]
    cubic = "cubic" in node.op
    matrix = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        if node["align_corners"]:
            t = Fraction(n - 1, m - 1) * i if m > 1 else Fraction(0)
        else:
            t = _scale(node, axis, n, m) * (i + Fraction(1, 2)) - Fraction(1, 2)
            t = t if cubic else max(t, Fraction(0))
        row: dict[int, Fraction] = {}
        first = math.floor(t)
        for j in range(first - 1, first + 3) if cubic else range(first, first + 2):
            place = min(max(j, 0), n - 1)
            weight = _keys(abs(t - j)) if cubic else max(Fraction(0), 1 - abs(t - j))
            row[place] = row.get(place, Fraction(0)) + weight
        for place, weight in row.items():
            matrix[i, place] = float(weight)  # correctly rounded
    return matrix


def _keys(distance: Fraction) -> Fraction:
    """Return Keys' cubic convolution kernel with a = -3/4."""
    a, d = Fraction(-3, 4), distance
    if d <= 1:
        return ((a + 2) * d - (a + 3)) * d * d + 1
    return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a if d < 2 else Fraction(0)


def _scale(node: Node, axis: int, n: int, m: int) -> Fraction:
    """Return the step between outputs, in inputs: that of the scale factor where the model gives one."""
    factor: float | None
    if "scale_factors" in node.arguments:
        given = node["scale_factors"]
        factor = None if given is None else given[axis - 2]
    else:
        names = [name for name in ("scales_d", "scales_h", "scales_w") if name in node.arguments]
        factor = node["scales"] if "scales" in node.arguments else node[names[axis - 2]]
    return Fraction(n, m) if factor is None or factor <= 0.0 else 1 / Fraction(factor)


def _neighbours(node: Node, shape: tuple[int, ...], axis: int) -> Tensor:
    """Return which index of one axis each output takes."""
    index = torch.arange(shape[axis], dtype=torch.float64)
    ramp = index.reshape([-1 if d == axis else 1 for d in range(len(shape))]).expand(shape).contiguous()
    data = "input" if "input" in node.arguments else "self"
    result = call(node.target, {**node.arguments, data: ramp})
    return result.movedim(axis, 0).flatten(1)[:, 0].round().to(torch.int64)


def _image(node: Node, context: Context) -> tuple[Value, range]:
    """Return the argument, images (n, c, ...) first, and its spatial dimensions."""
    x = context.data(node, "input" if "input" in node.arguments else "self")
    if x.node.batch not in (0, None) or node.batch != x.node.batch:
        raise context.mixed(node)
    return x, range(2, len(x.shape))


# ------------------------------------------------------------------------------------------------------------ ranges


@ranged(*_overloads(_NEAREST))
def _nearest_range(node: Node, ranges: Ranges) -> Range:
    return monotone(node, ranges)


@ranged(*_overloads(_LINEAR + _CUBIC))
def _interpolated_range(node: Node, ranges: Ranges) -> Range:
    """Range over averages, which stay in the interval; cubic weights sum to 1, their absolute values to at most 11/8.

    With s the product of those sums over the axes, values of [l, h] give at least (l + h)/2 - s(h - l)/2.
    """
    x = ranges.of(node, "input" if "input" in node.arguments else "self")
    x = x.over(*range(2, x.low.ndim))
    if "cubic" not in node.op or not x.finite:
        return x
    middle, radius = (x.low + x.high) / 2, (x.high - x.low) / 2
    slack = radius * 1.890625 + x.magnitude * 2.0**-46 + 2.0**-1000
    return Range(middle - slack, middle + slack)
