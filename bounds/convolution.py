"""Proved spectral norms of convolutions of every kind, on their true grid.

Every convolution, with its padding, stride, dilation and groups, or transposed, is written as a `Correlation`
(`lipcert.bounds.symbol`), and its norm is bounded in one of three ways, all rounded up:

- *torus*: zero padding injects the image into a torus large enough that wrapping around only meets zeros, and keeps
  some of the outputs, so that the norm is at most the largest ‖H(ω)‖ over the finitely many frequencies of that torus.
  (On a torus of the image's own size this is false.) A periodic convolution is its own torus, exactly.
- *grid*: where the torus has too many frequencies, a coarser grid of P points on an axis where the symbol has degree D
  gives  sup_ω ‖H(ω)‖ ≤ max_grid ‖H‖ / cos(πD / 2P),  and the supremum bounds every torus. Proof: with a unit vector on
  either side and each phase shifted to its middle, Re u*H(ω)v is a real function of exponential type D/2, bounded by
  the supremum; where it attains it, it falls off no faster than a cosine of that frequency (Duffin and Schaeffer 1938),
  and the next grid point is at most π/P away. Axes multiply.
- *dense*: for small maps the matrix itself, which is tighter by 3 to 12 % on images of 4 to 8 pixels.

Padding by copies of the image (reflect, replicate, and circular where that is not periodic) is a matrix of zeros and
ones with one 1 per row; its norm is the root of the largest number of copies of a pixel that are read, counted per
axis, times the unpadded convolution on the padded image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipcert.bounds.core import Bound, BoundError
from lipcert.bounds.matrix import norm_upper, resolve, scaled
from lipcert.bounds.rounding import UNIT, add_up, div_up, gamma, mul_up, scale_up, sqrt_up, sub_down
from lipcert.bounds.spectral import TINY, Method, frobenius
from lipcert.bounds.symbol import Axis, Correlation, degrees, dense, symbol, torus, trimmed, untangled
from lipcert.bounds.torus import largest_symbol, open_axis

__all__ = ["conv_norm_upper", "correlation_norm", "kernel_norm_upper", "symbol"]

DENSE_SIDE = 2048  # the smaller side of a matrix that is formed
DENSE_ENTRIES = 2**25  # its entries, 256 MiB
WORK = 2e11  # floating-point operations, some ten seconds on one core, above which something coarser is done
COARSE = (32, 16)  # grid points per degree of the symbol where the torus is too large: 1.0012 or 1.0048 per axis

Sizes = int | Sequence[int]


@torch.no_grad()
def conv_norm_upper(
    weight: Tensor,
    input_size: Sequence[int],
    *,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: Sizes = 0,
    method: str = "auto",
) -> Bound:
    """Bound the l2 norm of a 1-, 2- or 3-dimensional convolution of images of exactly this size.

    weight: (c_out, c_in/groups, *k) as in torch.nn.Conv2d, or (c_in, c_out/groups, *k) with `transposed` as in
    torch.nn.ConvTranspose2d; `input_size` is the spatial size of the input; the other arguments mean what they mean
    there ("same" and "valid" paddings and all padding modes included). Raises BoundError for a combination that torch
    would refuse, and for weights that are not finite.

    >>> bound = conv_norm_upper(torch.ones(1, 1, 2, 2), (8, 8), stride=2)
    >>> bound.method, 2.0 <= bound.value < 2.0 + 1e-12
    ('matrix, eigenvalue', True)
    """
    weight, exponent = _kernel(weight)
    dims = weight.ndim - 2
    if groups < 1 or weight.shape[0] % groups:
        raise BoundError(
            f"the {weight.shape[0]} first channels of {tuple(weight.shape)} do not split into {groups} groups"
        )
    sides = _sides("input_size", input_size, dims, 1, broadcast=False)
    strides = _sides("stride", stride, dims, 1)
    dilations = _sides("dilation", dilation, dims, 1)
    extents = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
    pads = _pads(padding, extents, strides, transposed)
    if padding_mode not in ("zeros", "circular", "reflect", "replicate"):
        raise BoundError(f"padding_mode is 'zeros', 'circular', 'reflect' or 'replicate', got {padding_mode!r}")
    if transposed and padding_mode != "zeros":
        raise BoundError(f"a transposed convolution is padded by zeros only, not by {padding_mode!r}")
    extra = _sides("output_padding", output_padding, dims, 0)
    if any(extra) and not transposed:
        raise BoundError(f"output_padding {output_padding!r} belongs to a transposed convolution")

    axes, offsets = [], []
    for j, (n, s, (left, right)) in enumerate(zip(sides, strides, pads, strict=True)):
        if transposed:  # the adjoint of a convolution from the output's grid to the input's
            if extra[j] >= max(s, dilations[j]):
                raise BoundError(
                    f"output_padding {extra[j]} must be below the stride {s} or the dilation {dilations[j]}"
                )
            full, out = (n - 1) * s - 2 * left + extents[j] + extra[j] + 1, n
            axis, offset = Axis(full, out, s), -left
        else:
            full, out = n, (n + left + right - extents[j] - 1) // s + 1
            axis, offset = _padded(n, out, s, left, right, padding_mode)
        if full < 1 or out < 1:
            raise BoundError(f"the kernel spans {extents[j] + 1} positions on axis {j}, more than the padded input {n}")
        axes.append(axis)
        offsets.append(offset)
    taps = weight.flatten(2).movedim(2, 0).unflatten(1, (groups, -1))  # (T, g, c_out/g, c_in/g)
    shifts = _displacements(weight.shape[2:], offsets, dilations)
    bound = correlation_norm(Correlation(taps, shifts, tuple(axes)), resolve(method, weight))
    return Bound(scale_up(bound.value, exponent), "upper", bound.method)


@torch.no_grad()
def kernel_norm_upper(
    kernel: Tensor,
    *,
    offsets: Sequence[int],
    stride: Sizes,
    grid: Sequence[int],
    out_grid: Sequence[int],
    circular: bool,
    error: float = 0.0,
    method: str = "auto",
) -> Bound:
    """Bound the norm of a composed kernel with taps at any displacement.

    The map is y[i] = Σ_t K_t x[s·i + t + offset] for 0 ≤ i < out_grid and 0 ≤ t < k per axis, with the kernel
    (c_out, c_in, *k), x zero outside `grid`, or periodic on it if `circular` (then the stride divides the grid and
    out_grid is at most grid/stride, else BoundError). The identity is one more tap. `error` ≥ 0 bounds the norm of the
    difference between the exact map and the kernel as stored; it is added.

    >>> kernel = torch.tensor([[[[0.0, 1.0, 1.0]]]])  # x + its right neighbour, on a ring
    >>> bound = kernel_norm_upper(kernel, offsets=(0, -1), stride=1, grid=(1, 4), out_grid=(1, 4), circular=True)
    >>> 2.0 <= bound.value < 2.0 + 1e-9
    True
    """
    if not 0.0 <= error <= math.inf:
        raise BoundError(f"the error of a kernel is a nonnegative number, got {error!r}")
    kernel, exponent = _kernel(kernel)
    dims = kernel.ndim - 2
    strides = _sides("stride", stride, dims, 1)
    inputs = _sides("grid", grid, dims, 1, broadcast=False)
    outputs = _sides("out_grid", out_grid, dims, 1, broadcast=False)
    if len(offsets) != dims:
        raise BoundError(f"offsets {tuple(offsets)} need one number for each of the {dims} axes of the kernel")
    axes = tuple(Axis(n, out, s, circular) for n, out, s in zip(inputs, outputs, strides, strict=True))
    if circular and any(axis.n % axis.stride or axis.out * axis.stride > axis.n for axis in axes):
        raise BoundError(
            f"a circular kernel needs strides that divide the grid and at most grid/stride outputs, got grid {inputs}, "
            f"stride {strides}, out_grid {outputs}"
        )
    taps = kernel.flatten(2).movedim(2, 0)[:, None]  # (T, 1, c_out, c_in)
    shifts = _displacements(kernel.shape[2:], [int(o) for o in offsets], (1,) * dims)
    bound = correlation_norm(Correlation(taps, shifts, axes), resolve(method, kernel))
    value = scale_up(bound.value, exponent)
    return Bound(add_up(value, error) if error else value, "upper", bound.method)


@torch.no_grad()
def correlation_norm(correlation: Correlation, method: Method) -> Bound:
    """Bound the norm of a correlation whose largest weight is in [1/2, 1) or zero, padding by copies included.

    Scale with `lipcert.bounds.matrix.scaled` first, and the bound back with `lipcert.bounds.rounding.scale_up`.
    """
    correlation = trimmed(correlation)
    if not len(correlation.taps):
        return Bound(0.0, "upper", "zero")
    correlation = untangled(correlation)
    sizes, degree = torus(correlation), degrees(correlation)
    attained = list(map(_attained, correlation.axes, degree, *_reads(correlation)))
    if not all(attained) and _fits(correlation):
        return _dense_bound(correlation, method)
    copies = math.prod(
        max(torch.bincount(torch.tensor(axis.source)[max(low, 0) : high + 1]).tolist())
        for axis, low, high in zip(correlation.axes, *_reads(correlation), strict=True)
        if axis.source is not None
    )
    sizes = tuple(1 if d == 0 else size for d, size in zip(degree, sizes, strict=True))  # degree 0: ‖H‖ is constant
    full = sizes
    for points in COARSE:
        if _work(correlation, sizes) > WORK:
            sizes = tuple(min(size, points * d) if d else 1 for d, size in zip(degree, full, strict=True))
    factor = 1.0
    for d, size, least in zip(degree, sizes, full, strict=True):
        if size < least:  # three roundings of an angle below 0.1, and a cosine to 4 units in the last place: within 8u
            factor = mul_up(factor, div_up(1.0, sub_down(math.cos(math.pi * d / (2 * size)), 8.0 * UNIT["float64"])))
    whole = sizes == full
    open = open_axis(correlation, sizes, attained, method) if whole else None
    sizes = tuple(1 if j == open else size for j, size in enumerate(sizes))
    twistable = whole and not any(axis.wrap for axis in correlation.axes)
    value, twisted = largest_symbol(correlation, sizes, open, method, twistable)
    grid = "x".join("open" if j == open else str(size) for j, size in enumerate(sizes))
    name = f"{'torus' if whole else 'grid'} {grid}{', twisted' if twisted else ''}"
    place = "matrix" if max(sizes) == 1 and open is None else name
    return Bound(mul_up(value, factor, sqrt_up(float(copies))), "upper", f"{place}, {method}")


def _dense_bound(correlation: Correlation, method: Method) -> Bound:
    """Bound the norm of the matrix of a small map; where copies are added up, each entry rounds fewer than T sums."""
    matrix = dense(correlation)
    bound = norm_upper(matrix, method)
    value = bound.value
    if any(axis.wrap or axis.source is not None for axis in correlation.axes):
        taps = len(correlation.taps)
        sums = float(frobenius(dense(Correlation(correlation.taps.abs(), correlation.shifts, correlation.axes))).max())
        value = add_up(value, mul_up(gamma(taps), sums, 1.0 + gamma(taps + 1)), TINY)
    return Bound(value, "upper", f"dense {matrix.shape[-2]}x{matrix.shape[-1]}, {method}")


def _reads(correlation: Correlation) -> tuple[list[int], list[int]]:
    """Return the lowest and the highest position that is read, per axis."""
    low, high = correlation.shifts.amin(0).tolist(), correlation.shifts.amax(0).tolist()
    return low, [h + axis.stride * (axis.out - 1) for h, axis in zip(high, correlation.axes, strict=True)]


def _attained(axis: Axis, degree: int, low: int, high: int) -> bool:
    """Tell whether the torus gives the norm itself on this axis, so that the matrix can be no tighter."""
    if axis.source is not None:
        return False
    if axis.wrap:
        return axis.out * axis.stride == axis.n
    first = -(low // axis.stride) if low < 0 else 0  # the first output that reads nothing before the image
    extent = high - axis.stride * (axis.out - 1) - low
    return degree == 0 and first < axis.out and low + first * axis.stride + extent < axis.n


def _fits(correlation: Correlation) -> bool:
    """Tell whether the matrix of the map is small enough to be formed and bounded."""
    _, groups, rows, columns = correlation.taps.shape
    rows *= math.prod(axis.out for axis in correlation.axes)
    columns *= math.prod(axis.n for axis in correlation.axes)
    side = min(rows, columns)
    work = groups * side * side * (2 * max(rows, columns) + 8 * side)
    return side <= DENSE_SIDE and groups * rows * columns <= DENSE_ENTRIES and work <= WORK


def _work(correlation: Correlation, sizes: tuple[int, ...]) -> float:
    """Estimate the floating-point operations for the symbols on a grid: forming, squaring and factorising them."""
    taps, groups, rows, columns = correlation.taps.shape
    columns *= min(taps, math.prod(axis.stride for axis in correlation.axes))
    side = min(rows, columns)
    per_block = 8 * side * side * (max(rows, columns) + 2 * side) + 4 * taps * rows * columns
    return math.prod(sizes) / 2 * groups * per_block


def _kernel(kernel: Tensor) -> tuple[Tensor, int]:
    """Return the kernel in float64, scaled by a power of two, and that exponent; raise BoundError for another shape."""
    if not isinstance(kernel, Tensor) or kernel.ndim not in (3, 4, 5) or kernel.is_complex():
        given = f"{kernel.dtype} {tuple(kernel.shape)}" if isinstance(kernel, Tensor) else type(kernel).__name__
        raise BoundError(f"a convolution needs a real kernel (c_out, c_in, *k) with 1 to 3 spatial axes, got {given}")
    if not kernel.numel():
        raise BoundError(f"a convolution needs a kernel with at least one weight, got the shape {tuple(kernel.shape)}")
    return scaled(kernel)


def _sides(name: str, value: Sizes, dims: int, least: int, broadcast: bool = True) -> tuple[int, ...]:
    """Return one integer per axis, each at least `least`; a single one stands for all axes, as in torch's options."""
    sides = (int(value),) if isinstance(value, int) else tuple(int(v) for v in value)
    sides = sides * dims if len(sides) == 1 and broadcast else sides
    if len(sides) != dims or min(sides) < least:
        raise BoundError(f"{name} is {dims} integers of at least {least}, got {value!r}")
    return sides


def _pads(
    padding: Sizes | str, extents: list[int], strides: tuple[int, ...], transposed: bool
) -> list[tuple[int, int]]:
    """Return the padding before and after the image per axis; "same" puts the odd one after, as torch does."""
    if isinstance(padding, str):
        if padding not in ("same", "valid") or transposed or (padding == "same" and max(strides) > 1):
            raise BoundError(
                f"padding {padding!r} is neither 'valid' nor 'same' of a convolution of stride 1; give numbers"
            )
        return [(e // 2, e - e // 2) if padding == "same" else (0, 0) for e in extents]
    return [(p, p) for p in _sides("padding", padding, len(extents), 0)]


def _padded(n: int, out: int, stride: int, left: int, right: int, mode: str) -> tuple[Axis, int]:
    """Return the axis of a padded convolution and the displacement of its tap 0."""
    if mode == "zeros" or left == right == 0:
        return Axis(n, out, stride), -left
    if max(left, right) > (n - 1 if mode == "reflect" else n if mode == "circular" else math.inf):
        raise BoundError(f"padding {max(left, right)} is too large for padding_mode {mode!r} on {n} positions")
    if mode == "circular" and n % stride == 0 and out * stride <= n:
        return Axis(n, out, stride, wrap=True), -left
    source = range(-left, n + right)
    if mode == "reflect":
        mirrored = (abs(q) for q in source)
        source_of = tuple(min(q, 2 * (n - 1) - q) for q in mirrored)
    elif mode == "circular":
        source_of = tuple(q % n for q in source)
    else:
        source_of = tuple(min(max(q, 0), n - 1) for q in source)
    return Axis(n + left + right, out, stride, source=source_of), 0


def _displacements(size: Sequence[int], offsets: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """Return the displacement of every tap, in the order of a flattened kernel, (T, axes)."""
    ranges = [torch.arange(k) * d + o for k, d, o in zip(size, dilations, offsets, strict=True)]
    return torch.cartesian_prod(*ranges).reshape(-1, len(ranges))
