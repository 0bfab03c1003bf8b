"""Operators: what each computes, its constants, and what rounding adds. Affine ones also give the map that they are.

Operators of arguments that stand in the file get them by name, as JSON holds them, so each refuses what it does not
expect. That a result has the shape that the program states is checked for all of them at once (`Program.operation`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from .maps import Kernel, Map, Pair, compose, grid_of, joined, total
from .norms import norm
from .reading import ENTRIES, Array, Rejected, require
from .rounding import UNIT, UP, frobenius, gamma, lengths

BLOCK = 64  # channels that are added at once


@dataclass(frozen=True)
class Value:
    """An argument that is the result of an earlier node, its shape, and whether its rows are normalised."""

    name: str
    shape: Sequence[int]
    unit: bool = False


@dataclass(frozen=True)
class Operation:
    """What one node computes from the values `inputs`.

    ‖Δresult‖ ≤ Σ factors_i ‖Δinput_i‖, or √Σ(factors_i ‖Δinput_i‖)² if `joint`. `run` takes batches (images, *shape)
    and returns the result and an l2 bound of what rounding adds to it, image by image. `trace` makes the map to the
    result out of those to the inputs, for an affine operator. `place` says what the result is at one position (one
    index of dimensions 2 and 3): a function of the inputs there ("same"), a "mean" of theirs, or anything ("").
    """

    inputs: Sequence[str]
    factors: Sequence[float]
    run: Callable[..., tuple[Array, Array]]
    trace: Callable[..., Map] | None = None
    joint: bool = False
    place: str = ""


# --------------------------------------------------------------------------------------------- entries that are moved


def _slice(self: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Array:
    require(step > 0, "step")
    return self[(slice(None),) * (dim % self.ndim) + (slice(start, end, step),)]


def _narrow(self: Array, dim: int, start: int, length: int) -> Array:
    require(0 <= start and 0 < length, "start or length")
    return _slice(self, dim, start, start + length)


def _roll(self: Array, shifts: list[int], dims: list[int]) -> Array:
    require(len(shifts) == len(dims) > 0, "shifts or dims")
    return np.roll(self, shifts, dims)


def _flatten(self: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    start, end = start_dim % self.ndim, end_dim % self.ndim
    require(start <= end, "start_dim or end_dim")
    return self.reshape(*self.shape[:start], -1, *self.shape[end + 1 :])


def _unflatten(self: Array, dim: int, sizes: list[int]) -> Array:
    dim = dim % self.ndim
    return self.reshape(*self.shape[:dim], *sizes, *self.shape[dim + 1 :])


def _unshuffle(self: Array, downscale_factor: int) -> Array:
    (n, c, h, w), r = self.shape, downscale_factor
    return self.reshape(n, c, h // r, r, w // r, r).transpose(0, 1, 3, 5, 2, 4).reshape(n, c * r * r, h // r, w // r)


def _shuffle(self: Array, upscale_factor: int) -> Array:
    (n, c, h, w), r = self.shape, upscale_factor
    return self.reshape(n, c // r**2, r, r, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, c // r**2, h * r, w * r)


def _pad(self: Array, pad: list[int], **mode: Any) -> Array:
    require(len(pad) % 2 == 0 and all(0 <= p < 1 << 14 for p in pad), "pad")
    widths = [(0, 0)] * (self.ndim - len(pad) // 2) + [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
    return np.pad(self, widths, **mode)


MOVES: dict[str, Callable[..., Array]] = {
    "aten.slice.Tensor": _slice,
    "aten.narrow.default": _narrow,
    "aten.roll.default": _roll,
    "aten.permute.default": lambda self, dims: np.transpose(self, dims),
    "aten.transpose.int": lambda self, dim0, dim1: np.swapaxes(self, dim0, dim1),
    "aten.mT.default": lambda self: np.swapaxes(self, -2, -1),
    "aten.reshape.default": lambda self, shape: np.reshape(self, shape),
    "aten.view.default": lambda self, size: np.reshape(self, size),
    "aten.flatten.using_ints": _flatten,
    "aten.unflatten.int": _unflatten,
    "aten.pixel_unshuffle.default": _unshuffle,
    "aten.pixel_shuffle.default": _shuffle,
}


def moving(move: Callable[..., Array]) -> Callable[..., Operation]:
    """Return the operator that moves entries as a function does with an array of their places; -1 is a new zero."""

    def operator(shape: Sequence[int], /, self: Value, **options: Any) -> Operation:
        for option in options.values():
            numbers = option if isinstance(option, list) else [option]
            require(all(n is None or (type(n) is int and abs(n) < 1 << 31) for n in numbers), "its numbers")
        at = move(np.arange(math.prod(self.shape)).reshape(self.shape), **options)
        copies = math.sqrt(np.bincount(at[at >= 0]).max(initial=0)) * UP
        same = len(shape) == len(self.shape) == 4 and list(at.shape[2:]) == list(self.shape[2:])
        if same:
            n = math.prod(at.shape[2:])
            same = bool(((at < 0) | (at % n == np.arange(n).reshape(at.shape[2:]))).all())

        def run(array: Array) -> tuple[Array, Array]:
            flat = np.concatenate([array.reshape(len(array), -1), np.zeros((len(array), 1))], 1)
            return flat[:, at], np.zeros(len(array))

        return Operation([self.name], [copies], run, lambda m: m.moved(at), place="same" if same else "")

    return operator


def padding(shape: Sequence[int], self: Value, pad: list[int], mode: str = "constant", value: Any = None) -> Operation:
    """Pad with zeros, or with what is on the other side ("circular", at most once around)."""
    require(mode in ("constant", "circular") and value in (None, 0), f"padding with {mode!r}")
    how: dict[str, Any] = {"mode": "wrap"} if mode == "circular" else {"constant_values": -1}
    once = mode == "constant" or all(p <= self.shape[-1 - i // 2] for i, p in enumerate(pad))
    require(once, "a pad that is wider than the image")
    return moving(partial(_pad, **how))(shape, self=self, pad=pad)


def concatenation(shape: Sequence[int], tensors: list[Value], dim: int = 0) -> Operation:
    require(bool(tensors) and all(isinstance(x, Value) for x in tensors), "a constant among its arguments")
    require(type(dim) is int and -len(shape) <= dim < len(shape), "dim")
    dim = dim % len(shape)

    def run(*arrays: Array) -> tuple[Array, Array]:
        return np.concatenate(arrays, dim + 1), np.zeros(len(arrays[0]))

    names, place = [x.name for x in tensors], "same" if dim == 1 else ""
    return Operation(names, [1.0] * len(names), run, lambda *maps: joined(maps, dim), True, place)


# --------------------------------------------------------------------------------------------------- sums and products


def _sum(sign: float) -> Callable[..., Operation]:
    def operator(shape: Sequence[int], self: Any, other: Any, alpha: float = 1) -> Operation:
        require(type(alpha) is int and alpha == 1, "alpha")
        if sign > 0 and not isinstance(self, Value):
            self, other = other, self
        require(isinstance(self, Value), "a constant less a value")
        if not isinstance(other, Value):
            constant = sign * _constant(other, self.shape)
            return Operation([self.name], [1.0], lambda x: _rounded(x + constant, 1), lambda m: m, place="same")
        require(list(self.shape) == list(other.shape), "broadcasting")

        def trace(first: Map, second: Map) -> Map:
            kernel = total(first.as_kernel(), replace(second, scale=sign * second.scale).as_kernel())
            return Map.of(kernel, first.source).moved(np.arange(math.prod(shape)).reshape(shape))

        names = [self.name, other.name]
        return Operation(names, [1.0, 1.0], lambda x, y: _rounded(x + sign * y, 1), trace, place="same")

    return operator


def _product(inverse: bool) -> Callable[..., Operation]:
    """Return the product of a value with a constant, or its quotient by one."""

    def operator(shape: Sequence[int], self: Any, other: Any) -> Operation:
        x, constant = (self, other) if inverse or isinstance(self, Value) else (other, self)
        require(isinstance(x, Value) and not isinstance(constant, Value), "a product of two values")
        factors = _constant(constant, x.shape)
        require(not inverse or bool(factors.all()), "a division by zero")
        usual = (factors == 0) | (np.abs(factors) > 1e-100) & (np.abs(factors) < 1e100)
        require(bool(usual.all()), "a factor that is too large or too small")
        factors = 1 / factors if inverse else factors  # rounded once

        def trace(m: Map) -> Map:
            if not np.isin(m.scale, (-1, 0, 1)).all():  # entries of `scale` are rounded once at most
                m = Map.of(m.as_kernel(), m.source).moved(np.arange(math.prod(shape)).reshape(shape))
            return replace(m, scale=m.scale * factors)

        largest = float(np.abs(factors).max()) * UP
        return Operation([x.name], [largest], lambda array: _rounded(array * factors, 2), trace, place="same")

    return operator


def _rounded(result: Array, roundings: int) -> tuple[Array, Array]:
    """Return a result whose entries were rounded this often, and a bound of what that changed."""
    return result, gamma(roundings + 1) * lengths(result)


def _constant(constant: Any, shape: Sequence[int]) -> Array:
    """Return a number or a tensor that is broadcast to a value."""
    require(type(constant) in (int, float, np.ndarray), "a constant")
    array = np.asarray(constant, dtype=np.float64)
    require(np.broadcast_shapes(array.shape, tuple(shape)) == tuple(shape), "the shape of a constant")
    return np.broadcast_to(array, tuple(shape))


# ------------------------------------------------------------------------------------------------------------- kernels


def apply(kernel: Kernel, grids: Array) -> Array:  # (n, c_in, h_in, w_in) -> (n, c_out, h_out, w_out)
    """Return the map of a batch, added in blocks of channels: fewer roundings than one after the other."""
    (n, c, *_), (_, h, w) = grids.shape, kernel.target
    pads = [(max(0, -a), max(0, b - n + 1)) for (a, b), n in zip(kernel.reaches(), kernel.source[1:], strict=True)]
    grids = np.pad(grids, ((0, 0), (0, 0), *pads), mode="wrap" if kernel.periodic else "constant")
    (s0, s1), (top, left) = kernel.stride, (pads[0][0], pads[1][0])
    result = np.zeros((n, kernel.target[0], h * w))
    for (y, x), tap in kernel.taps.items():
        read = grids[:, :, top + y : top + y + s0 * (h - 1) + 1 : s0, left + x : left + x + s1 * (w - 1) + 1 : s1]
        read = read.reshape(n, c, h * w)
        for start in range(0, c, BLOCK):
            result += tap[:, start : start + BLOCK] @ read[:, start : start + BLOCK]
    return result.reshape(n, *kernel.target)


def _through(
    kernel: Kernel, x: Value, shape: Sequence[int], bias: Array | None = None, rows: bool = False
) -> Operation:
    """Return the operator of a kernel between images, or, with `rows`, of one that multiplies each row of a value.

    Row number i of a value is position i of a grid (d, 1, count). What rounding adds to Σ_t K_t x_t + b, with k entries
    of K in a row, is at most gamma(k + 2) (Σ_t |K_t||x_t| + |b|), of norm gamma(k + 2) (Σ_t ‖K_t‖_F ‖x‖ + ‖b‖).
    """
    natural = [*x.shape[:-1], kernel.target[0]] if rows else [1, *kernel.target]
    require(list(shape) == natural, f"its result is {natural}, not {list(shape)}")
    require(bias is None or bias.shape == (kernel.target[0],), "the shape of the bias")
    offset = np.zeros((1, 1, 1)) if bias is None else bias[:, None, None]
    size, added = kernel.size, frobenius(np.broadcast_to(offset, kernel.target))
    blocks = len(kernel.taps) * -(-kernel.source[0] // BLOCK)
    relative = gamma(min(kernel.terms(1), BLOCK + blocks) + 3)
    enter: Array = np.arange(math.prod(x.shape))
    leave: Array = np.arange(math.prod(shape))
    if rows:
        enter, leave = enter.reshape(-1, x.shape[-1]).T, leave.reshape(kernel.target[0], -1).T
    enter, leave = enter.reshape(1, *kernel.source), leave.reshape(shape)

    def run(array: Array) -> tuple[Array, Array]:
        flat = array.reshape(len(array), -1)
        result = apply(kernel, flat[:, enter[0]]) + offset
        arisen = (relative * size + kernel.error) * lengths(flat) + relative * added
        return result.reshape(len(array), -1)[:, leave], arisen * UP

    def trace(m: Map) -> Map:
        m = m.moved(enter)
        try:
            made = Map.of(compose(kernel, m.as_kernel()), m.source)
        except Rejected:
            if m.kernel is not None and not kernel.alone:
                raise
            made = Map.of(kernel, m.source, norm(m)) if m.kernel is None else _before_moves(kernel, m)
        return made.moved(leave)

    place = "same" if kernel.alone and not rows else ""
    return Operation([x.name], [(size + kernel.error) * UP], run, trace, place=place)


def _before_moves(kernel: Kernel, m: Map) -> Map:
    """Return kernel ∘ m where m moves whole positions: a matrix at each position alone may as well act before."""
    before, place = m.at_positions()
    c, (height, width) = kernel.target[0], before.where.shape[2:]
    first = replace(kernel, source=(kernel.source[0], height, width), target=(c, height, width))
    at = np.arange(c)[:, None] * (height * width) + place
    return Map.of(compose(first, before.as_kernel()), m.source).moved(at.reshape(1, *kernel.target))


def _pair(sizes: Any, default: Pair) -> Pair:
    if sizes in (None, []):
        return default
    require(isinstance(sizes, list) and len(sizes) == 2, f"{sizes!r} is no pair of sizes")
    require(all(type(size) is int and 0 <= size < 1 << 14 for size in sizes), f"{sizes!r} is no pair of sizes")
    return sizes[0], sizes[1]


def _convolution(
    shape: Sequence[int], x: Value, weight: Array, bias: Array | None, s: Pair, p: Pair, d: Pair, groups: int,
    error: float = 0.0,
) -> Operation:  # fmt: skip
    """Return a convolution with stride s, padding p, dilation d, whose weight differs from the exact one by `error`."""
    c, h, w = grid_of(x.shape)
    c_out, per, *k = weight.shape
    require(len(x.shape) == 4 and len(k) == 2 and min(*k, *s, *d) > 0, "its sizes")
    require(type(groups) is int and groups > 0 and per * groups == c, "the shape of the weight")
    require(c_out % groups == 0 and c_out * c * math.prod(k) <= ENTRIES, "groups or size")
    taps = {}
    for y, z in np.ndindex(*k):
        tap = taps[d[0] * y - p[0], d[1] * z - p[1]] = np.zeros((c_out, c))
        for g in range(groups):
            rows = slice(g * c_out // groups, (g + 1) * c_out // groups)
            tap[rows, g * per : (g + 1) * per] = weight[rows, :, y, z]
    out = [(n + 2 * p[i] - d[i] * (k[i] - 1) - 1) // s[i] + 1 for i, n in enumerate((h, w))]
    require(min(out) > 0, "its sizes")
    return _through(Kernel(taps, (c, h, w), (c_out, out[0], out[1]), s, error), x, shape, bias)


def convolution(
    shape: Sequence[int], input: Value, weight: Array, bias: Array | None = None, stride: Any = None,
    padding: Any = None, dilation: Any = None, groups: int = 1,
) -> Operation:  # fmt: skip
    s, p, d = _pair(stride, (1, 1)), _pair(padding, (0, 0)), _pair(dilation, (1, 1))
    return _convolution(shape, input, weight, bias, s, p, d, groups)


def average(
    shape: Sequence[int], self: Value, kernel_size: Any, stride: Any = None, padding: Any = None,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None,
) -> Operation:  # fmt: skip
    """Average over windows: a convolution of every channel by itself."""
    k, p = _pair(kernel_size, (0, 0)), _pair(padding, (0, 0))
    require(ceil_mode is False and divisor_override is None and (count_include_pad is True or p == (0, 0)), "options")
    require(0 < math.prod(k) <= ENTRIES, "its sizes")
    c = grid_of(self.shape)[0]
    weight = np.full((c, 1, *k), 1 / math.prod(k))
    return _convolution(shape, self, weight, None, _pair(stride, k), p, (1, 1), c, UNIT * math.sqrt(c) * UP)


def linear(shape: Sequence[int], input: Value, weight: Array, bias: Array | None = None) -> Operation:
    """Multiply along the last dimension."""
    require(weight.ndim == 2 and weight.shape[1] == input.shape[-1], "the shape of the weight")
    (c_out, c), count = weight.shape, math.prod(input.shape[:-1])
    return _through(Kernel({(0, 0): weight}, (c, 1, count), (c_out, 1, count)), input, shape, bias, rows=True)


def centering(shape: Sequence[int], x: Value, dims: list[int]) -> Operation:
    """Subtract the mean over some dimensions: an orthogonal projection, as is the mean."""
    require(bool(dims) and all(type(d) is int and 0 < d < len(x.shape) for d in dims), "dims")
    axes, count = tuple(d + 1 for d in dims), math.prod(x.shape[d] for d in dims)

    def run(array: Array) -> tuple[Array, Array]:
        return array - array.mean(axes, keepdims=True), 2 * gamma(count + 8) * lengths(array)

    trace = None
    if dims == [1] and len(x.shape) == 4:
        grid = grid_of(x.shape)
        require(grid[0] ** 2 <= ENTRIES, "too many channels")
        matrix = np.eye(grid[0]) - 1 / grid[0]
        error = 2 * UNIT * frobenius(matrix) + 2 * UNIT  # of 1/c and of the difference
        trace = _through(Kernel({(0, 0): matrix}, grid, grid, error=error), x, shape).trace
    return Operation([x.name], [1.0], run, trace)


# ---------------------------------------------------------------------------------------------------------- activations


def maxmin(shape: Sequence[int], a: Value, b: Value, dim: int, flipped: bool, stacked: bool) -> Operation:
    """max and min of two values: (a, b) -> (max, min) swaps or keeps each pair, so it is 1-Lipschitz together."""
    require(a.shape == b.shape and stacked is False and type(flipped) is bool, "this arrangement")
    require(type(dim) is int and 0 < dim < len(shape), "dim")

    def run(x: Array, y: Array) -> tuple[Array, Array]:
        pair = [np.maximum(x, y), np.minimum(x, y)]
        return np.concatenate(pair[::-1] if flipped else pair, dim + 1), np.zeros(len(x))

    return Operation([a.name, b.name], [1.0, 1.0], run, joint=True, place="same" if dim == 1 else "")


OPERATORS: dict[str, Callable[..., Operation]] = {
    **{name: moving(function) for name, function in MOVES.items()},
    "aten.pad.default": padding,
    "aten.cat.default": concatenation,
    "aten.add.Tensor": _sum(1.0),
    "aten.sub.Tensor": _sum(-1.0),
    "aten.mul.Tensor": _product(inverse=False),
    "aten.div.Tensor": _product(inverse=True),
    "aten.conv2d.default": convolution,
    "aten.avg_pool2d.default": average,
    "aten.linear.default": linear,
    "lipcert.center": centering,
    "lipcert.maxmin": maxmin,
}
