"""Re-prove a certificate from its files alone, with NumPy and safetensors; docs/certificate.md is the format.

    python checker.py certificate.json [--images images.safetensors]

This file imports nothing of lipcert and shares no method with it, so that an error there is not repeated here. It is
meant to be read in one sitting, in this order: reading files that may be hostile; maps, the forms in which a linear
function of a value is held; norms, proved by Cholesky factorisations; the operators; the steps; the rows.

Everything that is accepted has been confirmed by a number of the checker's own. Whatever cannot be confirmed ends in
`Rejected`, with one sentence that says what and where: a claim that is false, and one that this checker cannot judge.

Arithmetic. u = 2^-53, gamma(n) = nu / (1 - nu). A sum of n products, added in any order, with or without fused
multiplication, errs by at most gamma(n) times the sum of the absolute products (Higham, "Accuracy and Stability of
Numerical Algorithms", ch. 3); BLAS is taken to compute sums of products (no Strassen), libm and NumPy's elementary
functions to be right to 4 units in the last place.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Grid = tuple[int, int, int]  # channels, height, width of one value
Pair = tuple[int, int]

UNIT = 2.0**-53
UP = 1.0 + 2.0**-44  # more than 100 roundings of positive numbers
WIDE = 1.0 + 2.0**-10  # rows of norm 1, and what is computed of them
JSON_BYTES, JSON_DEPTH, TENSOR_BYTES, TEXT_BYTES = 64 << 20, 64, 4 << 30, 1 << 30
ENTRIES = 1 << 26  # of one array that is formed
DENSE_SIDE, DENSE_ENTRIES, OPEN_SIDE, OPEN, MATRIX_SIDE = 2048, 1 << 25, 4096, 9, 8192  # see `kernel_norm`
SCHEMA = 1
COLUMNS = dict(
    idx=int, label=int, predict=int, radius=float, correct=int, time=str, margin=float, error=float, image=str
)  # fmt: skip
COUNTS = ("pixels", "stable", "valid", "correct", "certified", "certified_alone")
SCENE_COLUMNS = dict(idx=int, eps=float, **dict.fromkeys(COUNTS, int))
VOID = 255  # the label of a pixel that has none


class Rejected(Exception):
    """Something of a certificate does not hold, or cannot be confirmed: one sentence that says what and where."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Rejected(what)


def gamma(n: int) -> float:
    """Return an upper bound of nu / (1 - nu), the relative error of n roundings."""
    return n * UNIT / (1 - n * UNIT) * (1 + 4 * UNIT)


# ------------------------------------------------------------------------------------------------ reading hostile files


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; refuse huge and deep ones, keys that appear twice, and numbers that are not."""
    require(path.stat().st_size <= JSON_BYTES, f"{path.name} is larger than {JSON_BYTES} bytes")
    text = path.read_bytes()
    depth = 0
    for token in re.finditer(rb'"(?:\\.|[^"\\])*"|[\[{\]}]', text):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token.group(), 0)
        require(depth <= JSON_DEPTH, f"{path.name} is nested deeper than {JSON_DEPTH}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = next((key for key in keys if keys.count(key) > 1), None) if len({*keys}) < len(keys) else None
        require(twice is None, f"{path.name}: the key {twice!r} appears twice")
        return dict(pairs)

    def number(digits: str) -> float:
        require(math.isfinite(float(digits)), f"{path.name}: {digits[:40]} is not a finite number")
        return float(digits)

    def integer(digits: str) -> int:
        require(len(digits) <= 20, f"{path.name}: the number {digits[:20]}… is too long")
        return int(digits)

    try:
        return json.loads(
            text.decode(), object_pairs_hook=once, parse_float=number, parse_int=integer, parse_constant=number
        )
    except (ValueError, RecursionError) as error:
        raise Rejected(f"{path.name} is not JSON: {error}") from error


def read_tensors(path: Path, sha256: str) -> dict[str, Array]:
    """Return the tensors of a safetensors file with this hash, which must be float64 or int64 and finite."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    require(path.stat().st_size <= TENSOR_BYTES, f"{path.name} is larger than {TENSOR_BYTES} bytes")
    data = path.read_bytes()
    require(hashlib.sha256(data).hexdigest() == sha256, f"{path.name} has another SHA-256 than program.sha256")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise Rejected(f"{path.name} is not a safetensors file: {error}") from error
    for name, tensor in tensors.items():
        known = tensor.dtype in (np.float64, np.int64)
        require(known, f"{path.name}: tensor {name!r} is {tensor.dtype}, not float64 or int64")
        require(bool(np.isfinite(tensor).all()), f"{path.name}: tensor {name!r} has entries that are not finite")
    return tensors


def read_table(path: Path, columns: Mapping[str, Callable[[str], Any]], count: int) -> list[Any]:
    """Return the rows of a tab-separated file with these columns, as records."""
    require(path.stat().st_size <= TEXT_BYTES, f"{path.name} is larger than {TEXT_BYTES} bytes")
    header, *lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    intact = header == "\t".join(columns) and lines[-1:] == [""]
    require(intact, f"{path.name}: the header or the last line is damaged")
    whole = len(lines) - 1 == count
    require(whole, f"{path.name}: there are {len(lines) - 1} rows, not {count} as certificate.json says")
    rows = []
    for i, line in enumerate(lines[:-1]):
        try:
            cells = zip(columns.items(), line.split("\t"), strict=True)
            rows.append(SimpleNamespace(**{name: kind(cell) for (name, kind), cell in cells}))
        except ValueError as error:
            raise Rejected(f"row {i}: malformed ({error})") from error
    return rows


def take(record: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return record[key] if it is of this kind (a bool is no number)."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Rejected(f"{where}: {key!r} is missing or malformed")
    return value


def number_of(record: Any, key: str, where: str) -> float:
    value = take(record, key, (int, float), where)
    require(0 <= value < math.inf, f"{where}: {key} {value!r} is not a finite number from 0")
    return float(value)


def only(record: Any, keys: Sequence[str], where: str) -> None:
    """Refuse keys that this checker does not know: they might change what is meant."""
    require(isinstance(record, dict), f"{where}: it is no record")
    for unknown in sorted(set(record) - set(keys)):
        raise Rejected(f"{where}: unknown key {unknown!r}")


# ---------------------------------------------------------------------------------------------------------------- maps


@dataclass(frozen=True)
class Kernel:
    """A linear map of grids: out[:, y] = Σ_t taps[t] · in[:, stride·y + t] with two-dimensional y and t.

    Outside its grid `in` is zero. The taps may differ from the exact ones by Σ_t ‖·‖_F ≤ error, which also bounds the
    operator norm of the difference: taking entries of a shifted grid has norm at most 1.
    """

    taps: Mapping[Pair, Array]  # each (c_out, c_in)
    source: Grid
    target: Grid
    stride: Pair = (1, 1)
    error: float = 0.0

    @property
    def size(self) -> float:
        """An upper bound of Σ_t ‖taps[t]‖_F."""
        return sum(frobenius(tap) for tap in self.taps.values()) * UP

    @property
    def cheap(self) -> float:
        """An upper bound of the norm by row and column sums of the whole map's absolute values."""
        if not self.taps:
            return self.error
        summed = np.sum([np.abs(tap) for tap in self.taps.values()], axis=0)
        return (schur(summed) * (1 + gamma(len(self.taps) + 8)) + self.error) * UP

    @property
    def terms(self) -> int:
        """The largest number of entries of `in` that enter one entry of `out`."""
        return self._most(1)

    def _most(self, axis: int) -> int:
        return int(np.sum([(tap != 0).sum(axis) for tap in self.taps.values()], axis=0).max()) if self.taps else 0

    def moves(self, axis: int) -> bool:
        """Whether all entries are 0, 1 or -1, with at most one of the latter in each row (axis 1) or column (0)."""
        return self._most(axis) <= 1 and all(bool(np.isin(tap, (-1, 0, 1)).all()) for tap in self.taps.values())

    def reach(self, axis: int) -> Pair:
        """Return the first and the last position that is read along an axis, possibly outside of the grid."""
        offsets = [t[axis] for t in self.taps] or [0]
        return min(offsets), self.stride[axis] * (self.target[1 + axis] - 1) + max(offsets)


def frobenius(array: Array) -> float:
    """Return an upper bound of the Frobenius norm; the last term is for squares that underflow."""
    return math.sqrt(float(np.sum(np.square(np.abs(array))))) * (1 + gamma(array.size + 8)) + 1e-150


def schur(magnitudes: Array) -> float:
    """Return √(largest row sum · largest column sum), an upper bound of the norm of a matrix of this magnitude."""
    sums = float(magnitudes.sum(1).max(initial=0.0)) * float(magnitudes.sum(0).max(initial=0.0))
    return math.sqrt(sums) * (1 + gamma(max(magnitudes.shape) + 8))


def eye(n: int) -> Array:
    require(n * n <= ENTRIES, f"{n} channels are too many")
    return np.eye(n)


def pointwise(matrix: Array, size: Pair, error: float = 0.0) -> Kernel:
    """Return the map that multiplies the channels at every position by a matrix."""
    return Kernel({(0, 0): matrix}, (matrix.shape[1], *size), (matrix.shape[0], *size), error=error)


def compose(second: Kernel, first: Kernel) -> Kernel:
    """Return second ∘ first, exactly this map; Rejected if it is not of this form.

    What `second` reads as zero outside the grid between them must be zero by the formula of `first` as well: there,
    `first` must read nothing but zeros.
    """
    require(second.source == first.target, "shapes do not fit")
    for axis in (0, 1):
        (low, high), size, step = second.reach(axis), first.source[1 + axis], first.stride[axis]
        beyond = [*range(low, 0), *range(first.target[1 + axis], high + 1)]
        cut = any(0 <= step * p + t[axis] < size for p in beyond for t in first.taps)
        require(not cut, "what is beyond the border of the map between is cut off, so they are not one convolution")
    taps: dict[Pair, Array] = {}
    for t, b in second.taps.items():
        for r, a in first.taps.items():
            offset = (first.stride[0] * t[0] + r[0], first.stride[1] * t[1] + r[1])
            taps[offset] = taps[offset] + b @ a if offset in taps else b @ a
            require(len(taps) * len(b) * a.shape[1] <= ENTRIES, "the kernel is too large")
    exact = second.moves(1) or first.moves(0)  # then no two products are added
    rounding = 0.0 if exact else gamma(second.terms + 2) * second.size * first.size + 1e-300
    known = second.size * first.error + second.error * (first.size + first.error)
    stride = (first.stride[0] * second.stride[0], first.stride[1] * second.stride[1])
    return Kernel(taps, first.source, second.target, stride, (rounding + known) * UP)


def total(a: Kernel, b: Kernel) -> Kernel:
    """Return the sum of two maps of one source and one target."""
    require((a.source, a.target, a.stride) == (b.source, b.target, b.stride), "summands differ in shape or stride")
    taps = dict(a.taps)
    meet = False
    for t, tap in b.taps.items():
        meet |= t in taps and bool(((taps[t] != 0) & (tap != 0)).any())
        taps[t] = taps[t] + tap if t in taps else tap
    rounding = gamma(1) * (a.size + b.size) if meet else 0.0
    return replace(a, taps=taps, error=(a.error + b.error + rounding) * UP)


@dataclass(frozen=True)
class Map:
    """A linear map from one value to another: entry by entry, scale · kernel(source)[where].

    Without a kernel, `where` counts the entries of the source itself: entries are moved, repeated, scaled, dropped (-1
    stands for zero). With `before`, the kernel acts on the result of a map of at most this norm.
    """

    source: Sequence[int]  # its shape
    where: Array  # of the shape of the value
    scale: Array
    kernel: Kernel | None = None
    before: float | None = None

    @classmethod
    def of(cls, kernel: Kernel, shape: Sequence[int], source: Sequence[int], before: float | None = None) -> Map:
        """Return a kernel as a map to a value of this shape."""
        where = np.arange(math.prod(shape)).reshape(shape)
        return cls(source, where, np.ones(shape), kernel, before)

    def moved(self, move: Callable[[Array, Any], Array]) -> Map:
        """Return what a function makes of it that moves entries, called with the array and what it shall fill in."""
        return replace(self, where=move(self.where, -1), scale=move(self.scale, 0.0))

    def as_kernel(self) -> Kernel:
        """Return the map as one kernel, exactly; Rejected if it is not of this form.

        Guess source channel, offset and factor of every channel from its first entry, then compare all entries.
        """
        require(self.before is None, "what is before it is known by its norm alone")
        origin = grid_of(self.source) if self.kernel is None else self.kernel.target
        target = grid_of(self.where.shape)
        where, scale = self.where.reshape(target), self.scale.reshape(target)
        live = (where >= 0) & (scale != 0)
        if self.kernel is not None and origin == target and np.array_equal(where.ravel(), np.arange(where.size)):
            if (scale == 1).all():
                return self.kernel
        at = np.stack(np.unravel_index(np.maximum(where, 0), origin))
        stride = [1, 1]
        for axis in (0, 1):
            both = np.diff(live.astype(int), axis=1 + axis) == 0
            both &= live.take(range(1, target[1 + axis]), 1 + axis)
            if both.any():
                stride[axis] = int(np.diff(at[1 + axis], axis=1 + axis)[both][0])
        require(min(stride) > 0, "entries are moved in another way than by channels and offsets")
        taps: dict[Pair, Array] = {}
        for c in np.flatnonzero(live.any((1, 2))):
            y, x = np.argwhere(live[c])[0]
            channel, row, column = (int(i) for i in at[:, c, y, x])
            t = (row - stride[0] * int(y), column - stride[1] * int(x))
            rows = stride[0] * np.arange(target[1])[:, None] + t[0]
            columns = stride[1] * np.arange(target[2]) + t[1]
            inside = (rows >= 0) & (rows < origin[1]) & (columns >= 0) & (columns < origin[2])
            expected = np.where(inside, (channel * origin[1] + rows) * origin[2] + columns, -1)
            same = np.array_equal(np.where(live[c], where[c], -1), expected)
            same &= bool((scale[c][live[c]] == scale[c, y, x]).all())
            require(same, "entries are moved in another way than by channels and offsets")
            if t not in taps:
                require((len(taps) + 1) * target[0] * origin[0] <= ENTRIES, "the kernel is too large")
                taps[t] = np.zeros((target[0], origin[0]))
            taps[t][c, channel] = scale[c, y, x]
        made = Kernel(taps, origin, target, (stride[0], stride[1]))
        made = made if made.moves(1) else replace(made, error=gamma(2) * made.size)  # a factor may have been rounded
        return made if self.kernel is None else compose(made, self.kernel)


def identity(shape: Sequence[int]) -> Map:
    require(0 < math.prod(shape) <= ENTRIES, "a value is too large")
    return Map(shape, np.arange(math.prod(shape)).reshape(shape), np.ones(shape))


def joined(maps: Sequence[Map], dim: int | None) -> Map:
    """Return the map to several values, concatenated along a dimension, or one after the other if it is None."""
    first = maps[0]
    same = all(m.kernel is first.kernel and m.before == first.before for m in maps)
    require(same, "its parts come from different maps")
    where, scale = ([getattr(m, name) for m in maps] for name in ("where", "scale"))
    return replace(first, where=np.concatenate(where, dim), scale=np.concatenate(scale, dim))


def grid_of(shape: Sequence[int]) -> Grid:
    """Return the grid of a value for one image: (1, c, h, w), or (1, d) as d channels of one position."""
    if len(shape) in (2, 4) and shape[0] == 1 and all(0 < side <= 1 << 14 for side in shape):
        return (shape[1], 1, 1) if len(shape) == 2 else (shape[1], shape[2], shape[3])
    raise Rejected(f"a value of shape {list(shape)} is no image")


# --------------------------------------------------------------------------------------------------------------- norms


@dataclass(frozen=True)
class Aim:
    """What decides how much is tried, and nothing else: which bound is enough, and which torus is said to give it."""

    enough: float = 0.0
    open: bool = False
    twisted: bool = False


LEAST = Aim()


def norm(m: Map, aim: Aim = LEAST) -> float:
    """Return a proved upper bound of the operator norm.

    out_i = s_i k_{w(i)} has ‖out‖² = Σ_j (Σ_{i: w(i) = j} s_i²) k_j²: for moved entries, the largest sum is the square
    of the norm itself; behind a kernel, its channel c counts with the root of the largest sum over its entries j.
    """
    live = m.where >= 0
    size = math.prod(m.source if m.kernel is None else m.kernel.target)
    sums = np.bincount(m.where[live], np.square(m.scale[live]), size)
    whole = bool(np.isin(m.scale, (-1, 0, 1)).all())  # then sums are exact
    rounding = gamma(8 + (0 if whole else int(np.bincount(m.where[live]).max(initial=0))))
    if m.kernel is None:
        return float(sums.max()) if whole and sums.max() <= 1 else math.sqrt(sums.max()) * (1 + rounding) * UP
    factors = np.sqrt(sums.reshape(m.kernel.target[0], -1).max(1))[:, None]
    kernel = replace(m.kernel, taps={t: factors * tap for t, tap in m.kernel.taps.items()})
    if not whole or factors.max() > 1:
        error = m.kernel.error * float(factors.max()) * (1 + rounding) + rounding * kernel.size + 1e-300
        kernel = replace(kernel, error=error * UP)
    if m.before in (None, 1.0, 0.0):
        return kernel_norm(kernel, aim) if m.before != 0.0 else 0.0
    return kernel_norm(kernel, replace(aim, enough=aim.enough / m.before)) * m.before * UP


def joint_norm(maps: Sequence[Map], aim: Aim = LEAST) -> float:
    """Return an upper bound of the norm of the map to several values together."""
    try:
        return norm(joined([replace(m, where=m.where.ravel(), scale=m.scale.ravel()) for m in maps], 0), aim)
    except Rejected:
        return math.sqrt(sum(norm(m, aim) ** 2 for m in maps)) * UP


def kernel_norm(kernel: Kernel, aim: Aim = LEAST) -> float:
    """Return a proved upper bound of the norm of a kernel.

    With stride s, position s·q + r of channel i is position q of channel (r, i): a map of stride 1 with s₀s₁c channels.
    The positions of an axis can be taken as channels, too (`opened`); with both, or if nothing but one tap is left
    that reads no zeros, the map is one matrix. Otherwise it is a part of the convolution on a torus of m positions per
    axis, if outputs are different positions there, h ≤ m, and if, with the image on positions 0 … n-1, every read
    outside of it is a position outside of it: m ≥ n - (first read) and m ≥ (last read) + 1. Then inserting zeros, the
    torus, keeping h outputs is the map. As what comes round meets zeros, its sign does not matter: the torus on which
    it changes (twisted) contains the map as well. Torus maps are block diagonal in a Fourier basis, with the norm
    max_j ‖Σ_t K_t e^(-2πi⟨j, t⟩/m)‖, on the twisted one for j + 1/2.
    """
    kernel = _phases(kernel)
    largest = max((float(np.abs(tap).max(initial=0.0)) for tap in kernel.taps.values()), default=0.0)
    require(math.isfinite(largest + kernel.error), "the numbers are too large to be rechecked")
    if largest == 0.0:
        return kernel.error
    scale = 2.0 ** math.ceil(math.log2(largest))  # entries of at most 1: what underflows does not matter
    kernel = replace(kernel, taps={t: tap / scale for t, tap in kernel.taps.items() if tap.any()})
    rows, columns = math.prod(kernel.target), math.prod(kernel.source)
    reaches = [kernel.reach(axis) for axis in (0, 1)]
    inside = all(low >= 0 and high < n for (low, high), n in zip(reaches, kernel.source[1:], strict=True))
    if len(kernel.taps) > 1 or not inside:
        if min(rows, columns) > DENSE_SIDE or rows * columns > DENSE_ENTRIES:
            return _torus_norm(kernel, scale, aim)
        kernel = opened(opened(kernel, 0), 1)
    return (proved_norm(kernel.taps.values()) * scale + kernel.error) * UP


def _torus_norm(kernel: Kernel, scale: float, aim: Aim) -> float:
    """Try the plain and the twisted torus, and both with the shorter axis opened, until a bound is enough."""
    sides = zip(kernel.source[1:], kernel.target[1:], (kernel.reach(0), kernel.reach(1)), strict=True)
    torus = [max(n - min(low, 0), high + 1, h) for n, h, (low, high) in sides]
    short = 0 if torus[0] <= torus[1] else 1
    side = min(kernel.source[0] * kernel.source[1 + short], kernel.target[0] * kernel.target[1 + short])
    found = math.inf
    ways = [(open, twisted) for open in (False, True) for twisted in (False, True)]
    for open, twisted in sorted(ways, key=lambda way: way != (aim.open, aim.twisted)):
        if open and (torus[short] > OPEN or side > OPEN_SIDE):
            continue
        k = opened(kernel, short) if open else kernel
        sizes = [1 if open and axis == short else m for axis, m in enumerate(torus)]
        require(math.prod(sizes) * max(k.source[0], k.target[0]) < 1 << 24, "the map is too large")
        error = 2 * gamma(len(k.taps) + 40) * k.size  # of a block: see `_symbols`
        found = min(found, ((proved_norm(_symbols(k.taps, sizes, twisted)) + error) * scale + k.error) * UP)
        if found <= aim.enough:
            break
    return found


def _phases(kernel: Kernel) -> Kernel:
    """Return the same map with stride 1."""
    (s0, s1), (c, h, w) = kernel.stride, kernel.source
    if (s0, s1) == (1, 1):
        return kernel
    taps: dict[Pair, Array] = {}
    for t, tap in kernel.taps.items():
        q, phase = (t[0] // s0, t[1] // s1), (t[0] % s0) * s1 + t[1] % s1
        wide = taps.setdefault(q, np.zeros((tap.shape[0], s0 * s1 * c)))
        wide[:, phase * c : (phase + 1) * c] = tap
    return replace(kernel, taps=taps, source=(s0 * s1 * c, -(-h // s0), -(-w // s1)), stride=(1, 1))


def opened(kernel: Kernel, axis: int) -> Kernel:
    """Return the same map (of stride 1) with the positions along an axis as channels: channel y·c + i."""
    (c, d), (h, n) = (kernel.target[0], kernel.source[0]), (kernel.target[1 + axis], kernel.source[1 + axis])
    taps: dict[Pair, Array] = {}
    require(h * c * n * d <= ENTRIES, "the map is too large to be written out")
    for t, tap in kernel.taps.items():
        left = (0, t[1]) if axis == 0 else (t[0], 0)
        whole = taps.setdefault(left, np.zeros((h, c, n, d)))
        for y in range(max(0, -t[axis]), min(h, n - t[axis])):
            whole[y, :, y + t[axis]] = tap
    target, source = ((k[0] * k[1 + axis], *np.delete(k[1:], axis)) for k in (kernel.target, kernel.source))
    grids = [(c, 1, int(side)) if axis == 0 else (c, int(side), 1) for c, side in (source, target)]
    taps = {t: whole.reshape(h * c, n * d) for t, whole in taps.items()}
    return replace(kernel, taps=taps, source=grids[0], target=grids[1])


def _symbols(taps: Mapping[Pair, Array], torus: Sequence[int], twisted: bool) -> Iterator[Array]:
    """Yield the blocks (c_out, c_in) of a real convolution on a torus, one of each conjugate pair.

    Angles 2πk/N with exact integers k < N have three roundings below 2π, cosine and sine 4 units: each factor is within
    32u. With T taps, real and imaginary part err by gamma(T + 40) Σ|K_t| each, so a block by at most twice that times
    Σ_t ‖K_t‖_F.
    """
    halves = [2 if twisted and m > 1 else 1 for m in torus]  # j + 1/2 of m is 2j + 1 of 2m
    turn = math.lcm(*(half * m for half, m in zip(halves, torus, strict=True)))
    offsets = np.array(list(taps), dtype=np.int64)
    flat = np.stack(list(taps.values())).reshape(len(taps), -1)
    shape = next(iter(taps.values())).shape
    for j in np.ndindex(*torus):
        pair = tuple(m - 1 - i if half == 2 else -i % m for i, m, half in zip(j, torus, halves, strict=True))
        if j <= pair:
            steps = [(half * i + half - 1) * (turn // (half * m)) for i, m, half in zip(j, torus, halves, strict=True)]
            angles = 2 * np.pi * (offsets @ np.array(steps, dtype=np.int64) % turn / turn)
            if j == pair and not twisted:  # angles of 0 and π
                yield (np.cos(angles).round() @ flat).reshape(shape)
            else:
                yield (np.cos(angles) @ flat - 1j * (np.sin(angles) @ flat)).reshape(shape)


def proved_norm(blocks: Iterable[Array]) -> float:
    """Return an upper bound of max ‖A‖ over matrices A with entries of moderate size.

    An eigenvalue solver proposes τ, a little above max ‖A‖²; nothing rests on it. For A of m rows (the smaller side)
    and n columns, with n' = n products of real numbers per entry of AA*, n' = 2n in its real and imaginary part if A is
    complex, and G = fl(AA*):

      1. ‖G - AA*‖ ≤ 2 gamma(n') ‖A‖_F², for the Hermitian matrix that its lower triangle defines.
      2. B = fl(τI - G) differs from τI - G on the diagonal only, by at most u·max|B_ii|.
      3. If the Cholesky factorisation of B runs to its end, computed C satisfies CC* = B + D with
         |D_ij| ≤ g/(1-g)·√(B_ii B_jj), g = gamma(m+1) (Demmel 1989; Rump, "Verification of positive definiteness",
         BIT 46, 2006; here g = gamma(4m+16), for complex entries and for divisions done as products with a reciprocal),
         so ‖D‖ ≤ g/(1-g)·tr B and B ≥ -g/(1-g)·tr B.

    Together ‖A‖² ≤ τ + 2g·tr B + u·max B_ii + 2 gamma(n')‖A‖_F², with 2g for g/(1-g) and the rounding of the trace.
    """
    tau = best = 0.0
    for block in blocks:
        a = block if block.shape[0] <= block.shape[1] else block.conj().T
        require(len(a) <= MATRIX_SIDE, "a matrix is too large to be factorised here")
        gram = a @ a.conj().T
        mass = float(np.sum(np.square(a.real)) + np.sum(np.square(a.imag))) * (1 + gamma(2 * a.size + 8))
        square = _confirmed(gram, tau) if tau else None
        if square is None and mass:
            top = float(np.linalg.eigvalsh(gram)[-1])
            proposals = (top * (1 + slack) for slack in (1e-11, 1e-10, 1e-9, 4e-9))
            square, tau = next(((s, t) for t in proposals if (s := _confirmed(gram, t))), (None, 0.0))
            require(square is not None, "no factorisation proves the norm")
        best = max(best, (square or 0.0) + 2 * gamma(2 * a.shape[1]) * mass + 2.0**-900)
    return math.sqrt(best) * UP


def _confirmed(gram: Array, tau: float) -> float | None:
    """Return an upper bound of the largest eigenvalue if τ exceeds it."""
    shifted = -gram
    diagonal = np.arange(len(gram))
    shifted[diagonal, diagonal] += tau
    entries = shifted[diagonal, diagonal].real.copy()
    try:
        factor = np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return None
    if not np.isfinite(factor[diagonal, diagonal]).all():
        return None
    return (tau + 2 * gamma(4 * len(gram) + 16) * float(entries.sum()) + UNIT * float(entries.max())) * UP


# ----------------------------------------------------------------------------------------------------------- operators


@dataclass(frozen=True)
class Value:
    """An argument that is the result of an earlier node, its shape, and whether its rows are normalised."""

    name: str
    shape: Sequence[int]
    unit: bool = False


Run = Callable[..., tuple[Array, Array]]


@dataclass(frozen=True)
class Operation:
    """What one node computes from the values `inputs`.

    ‖Δresult‖ ≤ Σ factors_i ‖Δinput_i‖, or √Σ(factors_i ‖Δinput_i‖)² if `joint`; it holds where computed inputs are
    within `margin` of exact ones. `run` takes batches (images, *shape) and returns the result and an l2 bound of what
    rounding adds to it, image by image. `trace` makes the map to the result out of those to the inputs, for an affine
    operator.
    """

    inputs: Sequence[str]
    factors: Sequence[float]
    run: Run
    trace: Callable[..., Map] | None = None
    joint: bool = False
    margin: float = math.inf


def norms(x: Array) -> Array:
    """Return upper bounds of the l2 norms of the entries of a batch."""
    flat = x.reshape(len(x), -1)
    return np.sqrt(np.square(flat).sum(1)) * (1 + gamma(flat.shape[1] + 8)) + 1e-150


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


def _moving(function: Callable[..., Array]) -> Callable[..., Operation]:
    """Return the operator that moves entries as a function of arrays does."""

    def operator(shape: Sequence[int], /, self: Value, **options: Any) -> Operation:
        for option in options.values():
            numbers = option if isinstance(option, list) else [option]
            require(all(n is None or (type(n) is int and abs(n) < 1 << 31) for n in numbers), "its numbers")
        return _moved(self, lambda array, fill: function(array, **options))

    return operator


def _moved(x: Value, move: Callable[[Array, Any], Array]) -> Operation:
    where = move(np.arange(math.prod(x.shape)).reshape(x.shape), -1)
    copies = math.sqrt(np.bincount(where[where >= 0]).max(initial=0)) * UP

    def run(array: Array) -> tuple[Array, Array]:
        flat = np.concatenate([array.reshape(len(array), -1), np.zeros((len(array), 1))], 1)
        return flat[:, where], np.zeros(len(array))

    return Operation([x.name], [copies], run, lambda m: m.moved(move))


def _pad(shape: Sequence[int], self: Value, pad: list[int], mode: str = "constant", value: Any = None) -> Operation:
    require(mode == "constant" and value in (None, 0), f"padding with {mode!r}")
    require(len(pad) % 2 == 0 and all(type(p) is int and 0 <= p < 1 << 14 for p in pad), "pad")
    widths = [(0, 0)] * (len(self.shape) - len(pad) // 2)
    widths += [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
    require([n + a + b for n, (a, b) in zip(self.shape, widths, strict=True)] == list(shape), "the shape of the result")
    return _moved(self, lambda array, fill: np.pad(array, widths, constant_values=fill))


def _through(kernel: Kernel, x: Value, shape: Sequence[int], bias: Array | None = None) -> Operation:
    """Return the operator of a kernel between grids."""
    require(bias is None or bias.shape == (kernel.target[0],), "the shape of the bias")
    offset = np.zeros((1, 1, 1)) if bias is None else bias[:, None, None]
    magnitudes = replace(kernel, taps={t: np.abs(tap) for t, tap in kernel.taps.items()})

    def run(array: Array) -> tuple[Array, Array]:
        grid = array.reshape(len(array), *kernel.source)
        result, roundings = apply(kernel, grid)
        majorant = apply(magnitudes, np.abs(grid))[0] + np.abs(offset)
        arisen = gamma(roundings + 3) * norms(majorant) * (1 + 1e-6) + kernel.error * norms(array)
        return (result + offset).reshape(len(array), *shape), arisen * UP

    def trace(m: Map) -> Map:
        try:
            return Map.of(compose(kernel, m.as_kernel()), shape, m.source)
        except Rejected:
            if m.kernel is not None:
                raise
            return Map.of(kernel, shape, m.source, norm(m))

    return Operation([x.name], [kernel.cheap], run, trace)


def apply(kernel: Kernel, x: Array) -> tuple[Array, int]:
    """Return the map of (n, c, h, w), and a number of roundings such that gamma of it bounds the relative error.

    Channels are added in blocks of 64, blocks and taps one after the other: much less than any order of all of them.
    """
    pads = [(max(0, -low), max(0, high - n + 1)) for n, (low, high) in
            zip(kernel.source[1:], (kernel.reach(0), kernel.reach(1)), strict=True)]  # fmt: skip
    x = np.pad(x, ((0, 0), (0, 0), *pads))
    c, h, w = kernel.target
    out = np.zeros((len(x), c, h * w))
    sums = 0
    for t, tap in kernel.taps.items():
        cuts = [slice(p[0] + o, p[0] + o + s * (side - 1) + 1, s)
                for p, o, s, side in zip(pads, t, kernel.stride, (h, w), strict=True)]  # fmt: skip
        part = x[:, :, cuts[0], cuts[1]].reshape(len(x), -1, h * w)
        for start in range(0, kernel.source[0], 64):
            out += tap[:, start : start + 64] @ part[:, start : start + 64]
            sums += 1
    return out.reshape(len(x), c, h, w), min(kernel.terms, 64 + sums) + 1


def _pair(value: Any, default: Pair) -> Pair:
    made = default if value in (None, []) else tuple(value) if isinstance(value, list) else (value, value)
    made = (made[0], made[0]) if len(made) == 1 else made
    require(len(made) == 2 and all(type(v) is int and 0 <= v < 1 << 14 for v in made), f"{value!r} is no pair of sizes")
    return made[0], made[1]


def _windows(x: Value, k: Pair, s: Pair, p: Pair, d: Pair = (1, 1)) -> tuple[Grid, list[tuple[Pair, Pair]], Pair]:
    """Return the grid of a value, the taps of a window (index and offset), and how many windows there are."""
    require(len(x.shape) == 4 and min(*k, *s, *d) > 0, "its sizes")
    (c, h, w) = grid_of(x.shape)
    out = [(n + 2 * q - e * (m - 1) - 1) // f + 1 for n, q, e, m, f in zip((h, w), p, d, k, s, strict=True)]
    require(min(out) > 0, "its sizes")
    return (c, h, w), [(t, (d[0] * t[0] - p[0], d[1] * t[1] - p[1])) for t in np.ndindex(*k)], (out[0], out[1])


def _conv(
    shape: Sequence[int], input: Value, weight: Array, bias: Array | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Operation:  # fmt: skip
    s = _pair(stride, (1, 1))
    c_out, per, *size = weight.shape
    k = _pair(size, (0, 0))
    grid, places, out = _windows(input, k, s, _pair(padding, (0, 0)), _pair(dilation, (1, 1)))
    require(type(groups) is int and groups > 0 and per * groups == grid[0], "the shape of the weight")
    require(c_out % groups == 0 and c_out * grid[0] * len(places) <= ENTRIES, "groups or size")
    taps = {}
    for t, offset in places:
        taps[offset] = np.zeros((c_out, grid[0]))
        for g in range(groups):
            rows = slice(g * c_out // groups, (g + 1) * c_out // groups)
            taps[offset][rows, g * per : (g + 1) * per] = weight[rows, :, t[0], t[1]]
    require(list(shape) == [1, c_out, *out], f"its result is {[1, c_out, *out]}, not {list(shape)}")
    return _through(Kernel(taps, grid, (c_out, *out), s), input, shape, bias)


def _average(
    shape: Sequence[int], self: Value, kernel_size: Any, stride: Any = None, padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None,
) -> Operation:  # fmt: skip
    k, p = _pair(kernel_size, (1, 1)), _pair(padding, (0, 0))
    s = _pair(stride, k)
    require(ceil_mode is False and divisor_override is None and (count_include_pad is True or p == (0, 0)), "options")
    (c, h, w), places, out = _windows(self, k, s, p)
    require(list(shape) == [1, c, *out], f"its result is {[1, c, *out]}, not {list(shape)}")
    part = eye(c) / (k[0] * k[1])
    error = UNIT * math.sqrt(c) * UP
    return _through(Kernel({t: part for _, t in places}, (c, h, w), (c, *out), s, error), self, shape)


def _linear(shape: Sequence[int], input: Value, weight: Array, bias: Array | None = None) -> Operation:
    """Multiply along the last dimension: each of the N rows of a value is a position of a grid (d, 1, N)."""
    require(weight.ndim == 2 and weight.shape[1] == input.shape[-1], "the shape of the weight")
    require(list(shape) == [*input.shape[:-1], len(weight)], "the shape of the result")
    if len(input.shape) == 2:
        return _through(pointwise(weight, (1, 1)), input, shape, bias)
    count = math.prod(input.shape[:-1])
    kernel = pointwise(weight, (1, count))
    plain = _through(kernel, input, shape, bias)

    def rows(array: Array) -> Array:
        return np.swapaxes(array.reshape(len(array), count, -1), 1, 2)

    def run(array: Array) -> tuple[Array, Array]:
        result, arisen = plain.run(rows(array))
        return np.swapaxes(result.reshape(len(array), -1, count), 1, 2).reshape(len(array), *shape), arisen

    def trace(m: Map) -> Map:
        require(m.kernel is None, "a product with more than moved entries")
        made = Map.of(kernel, (len(weight), count), m.source, norm(m))
        return made.moved(lambda array, fill: array.T.reshape(shape))

    return replace(plain, run=run, trace=trace)


def _sum(sign: float) -> Callable[..., Operation]:
    def operator(shape: Sequence[int], self: Any, other: Any, alpha: float = 1) -> Operation:
        require(type(alpha) is int and alpha == 1, "alpha")
        if sign > 0 and not isinstance(self, Value):
            self, other = other, self
        require(isinstance(self, Value), "a constant less a value")
        constant = None if isinstance(other, Value) else sign * _constant(other, self.shape)
        require(constant is not None or list(self.shape) == list(other.shape), "broadcasting")

        def run(*arrays: Array) -> tuple[Array, Array]:
            result = arrays[0] + (constant if constant is not None else sign * arrays[1])
            return result, gamma(2) * norms(result)

        def trace(first: Map, *more: Map) -> Map:
            if constant is not None:
                return first
            second = replace(more[0], scale=sign * more[0].scale)
            return Map.of(total(first.as_kernel(), second.as_kernel()), shape, first.source)

        inputs = [self.name] if constant is not None else [self.name, other.name]
        return Operation(inputs, [1.0] * len(inputs), run, trace)

    return operator


def _constant(constant: Any, shape: Sequence[int]) -> Array:
    """Return a number or a tensor that is broadcast to a value."""
    require(type(constant) in (int, float, np.ndarray), "a constant")
    array = np.asarray(constant, dtype=np.float64)
    require(np.broadcast_shapes(array.shape, tuple(shape)) == tuple(shape), "the shape of a constant")
    return np.broadcast_to(array, tuple(shape))


def _product(inverse: bool) -> Callable[..., Operation]:
    """Return the product of a value with a constant, or its quotient by one."""

    def operator(shape: Sequence[int], self: Any, other: Any) -> Operation:
        x, constant = (self, other) if inverse or isinstance(self, Value) else (other, self)
        require(isinstance(x, Value) and not isinstance(constant, Value), "a product of two values")
        factors = _constant(constant, x.shape)
        require(not inverse or bool((factors != 0).all()), "a division by zero")
        factors = 1 / factors if inverse else factors  # rounded once

        def run(array: Array) -> tuple[Array, Array]:
            return array * factors, gamma(3) * norms(array * factors)

        def trace(m: Map) -> Map:
            if not np.isin(m.scale, (-1, 0, 1)).all():
                m = Map.of(m.as_kernel(), shape, m.source)
            return replace(m, scale=m.scale * factors)

        return Operation([x.name], [float(np.abs(factors).max()) * UP], run, trace)

    return operator


def _center(shape: Sequence[int], x: Value, dims: list[int]) -> Operation:
    """Subtract the mean over some dimensions: an orthogonal projection."""
    require(bool(dims) and all(type(d) is int and 0 < d < len(x.shape) for d in dims), "dims")
    axes, count = tuple(d + 1 for d in dims), math.prod(x.shape[d] for d in dims)

    def run(array: Array) -> tuple[Array, Array]:
        majorant = np.abs(array) + np.abs(array).mean(axes, keepdims=True)
        return array - array.mean(axes, keepdims=True), gamma(count + 8) * norms(majorant)

    def trace(m: Map) -> Map:
        matrix = eye(shape[1]) - 1.0 / shape[1]
        error = 2 * UNIT * frobenius(matrix) + 2 * UNIT  # of 1/c and of the difference
        return Map.of(compose(pointwise(matrix, grid_of(shape)[1:], error), m.as_kernel()), shape, m.source)

    return Operation([x.name], [1.0], run, trace if dims == [1] else None)


def _cat(shape: Sequence[int], tensors: list[Value], dim: int = 0) -> Operation:
    require(bool(tensors) and all(isinstance(x, Value) for x in tensors), "a constant among its arguments")
    require(type(dim) is int and -len(shape) <= dim < len(shape), "dim")
    require(sum(math.prod(x.shape) for x in tensors) == math.prod(shape), "the shape of the result")
    dim = dim % len(shape)

    def run(*arrays: Array) -> tuple[Array, Array]:
        return np.concatenate(arrays, dim + 1), np.zeros(len(arrays[0]))

    return Operation([x.name for x in tensors], [1.0] * len(tensors), run, lambda *maps: joined(maps, dim), True)


def _maxmin(shape: Sequence[int], a: Value, b: Value, dim: int, flipped: bool, stacked: bool) -> Operation:
    """max and min of two values: (a, b) -> (max, min) swaps or keeps each pair, so it is 1-Lipschitz together."""
    require(a.shape == b.shape and stacked is False and type(flipped) is bool, "this arrangement")
    require(type(dim) is int and 0 < dim < len(shape), "dim")

    def run(x: Array, y: Array) -> tuple[Array, Array]:
        pair = [np.maximum(x, y), np.minimum(x, y)]
        return np.concatenate(pair[::-1] if flipped else pair, dim + 1), np.zeros(len(x))

    return Operation([a.name, b.name], [1.0, 1.0], run, joint=True)


def _normalize(shape: Sequence[int], x: Value, dim: int, eps: float, kind: str) -> Operation:
    """x/√(‖x‖² + ε) by rows, of norm below 1; its derivative (I - yy*)/√(‖x‖² + ε) is at most 1/√ε."""
    require(kind == "squares" and type(dim) is int and dim == len(shape) - 1, "another normalisation than of rows")
    require(type(eps) in (int, float) and 2.0**-60 < eps < 2.0**60, "eps")

    def run(array: Array) -> tuple[Array, Array]:
        result = array / np.sqrt(np.square(array).sum(-1, keepdims=True) + eps)
        return result, gamma(shape[-1] + 16) * norms(result)

    return Operation([x.name], [1.0 / math.sqrt(eps) * UP], run)


def _attention(
    shape: Sequence[int], query: Value, key: Value, value: Value, attn_mask: Array | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Operation:  # fmt: skip
    """softmax(s QKᵀ + B) V, window by window and head by head, with all rows of norm at most R.

    dO_i = Σ_j p_ij (v_j - v̄_i) dS_ij + Σ_j p_ij dv_j, dS_ij = s(⟨dq_i, k_j⟩ + ⟨q_i, dk_j⟩). With V_i = Σ_j p_ij ‖v_j -
    v̄_i‖², Cauchy-Schwarz for the probabilities p_i· gives at most |s|R²‖dq_i‖ for the part of dq, and (Σ_i p_ij V_i)
    s²R²‖dk_j‖², summed over j, for the square of that of dk; the part of dv is at most √(largest column sum) ‖dV‖, as
    ‖P‖² ≤ ‖P‖₁‖P‖_∞. Scores of one row differ by at most D = 2|s|R² + osc(B), so p_ij ≤ q = e^D/(e^D + M - 1) for M
    keys. V_i ≤ R²; and if p_ij ≥ 1/2 for a v_j of length ρ, V_i ≤ pρ² + (1-p)R² - max(0, pρ - (1-p)R)² ≤ 4p(1-p)R²
    (where the maximum is 0, pρ² + (1-p)R² ≤ (1-p)R²/p; elsewhere it increases with ρ). So p_ij V_i ≤ h(p_ij) R² with
    h(p) = p, from 1/2 on 4p²(1-p), which is at most 16/27, at p = 2/3. docs/bounds.md 3.
    """
    require(enable_gqa is False and is_causal is False and dropout_p == 0.0, "another attention")
    require(query.unit and key.unit and value.unit, "rows without a bound: queries, keys and values are normalised")
    (*lead, n, d), (*others, m, _) = query.shape, key.shape
    require(key.shape == value.shape and lead == others and key.shape[-1] == d and len(lead) > 0, "its shapes")
    require(math.prod(lead) * n * m <= ENTRIES, "too many scores")
    factor = 1.0 / math.sqrt(d) if scale is None else scale
    require(type(factor) in (int, float) and abs(factor) < 1e6, "scale")
    bias = np.zeros((1, 1)) if attn_mask is None else attn_mask
    require(np.broadcast_shapes(bias.shape, (*lead, n, m)) == (*lead, n, m), "the shape of attn_mask")
    bias = np.broadcast_to(bias, (*bias.shape[:-2], n, m))
    s = abs(factor) * UP
    spread = min((2 * s * WIDE**2 + float((bias.max(-1) - bias.min(-1)).max())) * UP, 600.0)
    q = min(1.0, math.exp(spread) / (math.exp(spread) + m - 1) * UP) if spread < 600.0 else 1.0
    p = min(q, 2 / 3)
    varying = 0.0 if m == 1 else (q if q <= 0.5 else 4 * p * p * (1 - p)) * UP
    along = s * WIDE**2 * (m > 1)
    factors = [along * UP, s * WIDE**2 * math.sqrt(n * varying) * UP, math.sqrt(n * q) * UP]

    def run(queries: Array, keys: Array, values: Array) -> tuple[Array, Array]:
        scores = factor * (queries @ keys.swapaxes(-1, -2)) + bias
        largest = np.abs(queries) @ np.abs(keys).swapaxes(-1, -2) * s + np.abs(bias)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        # scores within δ change probabilities by a factor e^±2δ; the difference to the largest is rounded once more
        delta = (gamma(d + 8) * largest.reshape(len(queries), -1).max(1) + 1e-300) * 2
        relative = np.expm1(np.minimum(2 * delta, 1.0)) + gamma(m + 64)
        error = np.where(delta < 2.0**-10, 2 * relative, math.inf)
        return weights @ values, error * norms(weights @ np.abs(values))

    return Operation([query.name, key.name, value.name], factors, run, margin=2.0**-10)


OPERATORS: dict[str, Callable[..., Operation]] = {
    **{name: _moving(function) for name, function in MOVES.items()},
    "aten.pad.default": _pad,
    "aten.conv2d.default": _conv,
    "aten.linear.default": _linear,
    "aten.avg_pool2d.default": _average,
    "aten.cat.default": _cat,
    "aten.add.Tensor": _sum(1.0),
    "aten.sub.Tensor": _sum(-1.0),
    "aten.mul.Tensor": _product(inverse=False),
    "aten.div.Tensor": _product(inverse=True),
    "lipcert.center": _center,
    "lipcert.maxmin": _maxmin,
    "lipcert.normalize": _normalize,
    "aten.scaled_dot_product_attention.default": _attention,
}
RULES = {"lipcert.maxmin": "MaxMin", "aten.scaled_dot_product_attention.default": "attention"}


class Program:
    """The list of operators, read and understood node by node; what cannot be understood is refused when it is used."""

    def __init__(self, record: Any, tensors: Mapping[str, Array]) -> None:
        only(record, ("schema", "input", "output", "nodes", "sha256"), "program")
        schema = take(record, "schema", int, "program")
        require(schema == SCHEMA, f"program: schema {schema} is not {SCHEMA}, the one that this checker knows")
        self.tensors = tensors
        self.nodes: dict[str, dict[str, Any]] = {}
        self.input, self.output = take(record, "input", str, "program"), take(record, "output", str, "program")
        for i, node in enumerate(take(record, "nodes", list, "program")):
            name = take(node, "name", str, f"node {i}")
            where = f"node {i} ({name})"
            only(node, ("name", "op", "shape", "arguments", "output"), where)
            require(name not in self.nodes, f"{where}: the name appears twice")
            shape = take(node, "shape", list, where)
            require(all(type(side) is int and side > 0 for side in shape), f"{where}: 'shape' is malformed")
            require(math.prod(shape) <= ENTRIES, f"{where}: 'shape' is too large")
            first = take(node, "op", str, where) == "input"
            require(first == (i == 0) == (name == self.input), f"{where}: the input is the first node, and no other")
            for argument in _leaves(take(node, "arguments", dict, where)):
                if "value" in argument and argument["value"] not in self.nodes:
                    raise Rejected(f"{where}: the value {argument['value']!r} is not that of an earlier node")
                if "tensor" in argument and argument["tensor"] not in tensors:
                    raise Rejected(f"{where}: there is no tensor {argument['tensor']!r}")
            self.nodes[name] = node
        require(self.output in self.nodes, f"program: there is no node {self.output!r}")
        self.order = {name: i for i, name in enumerate(self.nodes)}
        self._operations: dict[str, Operation] = {}

    def shape(self, name: str) -> Sequence[int]:
        return self.nodes[name]["shape"]

    def operation(self, name: str) -> Operation:
        """Return what a node computes; Rejected with the name of its operator if this is not known."""
        if name not in self._operations:
            node = self.nodes[name]
            try:
                require(node["op"] in OPERATORS and node.get("output") is None, "it is not known here")
                arguments = {key: self._argument(value) for key, value in node["arguments"].items()}
                made = OPERATORS[node["op"]](node["shape"], **arguments)
                zeros = [np.zeros((1, *self.shape(x))) for x in made.inputs]
                require(list(made.run(*zeros)[0].shape) == [1, *node["shape"]], "the shape of the result")
            except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
                raise Rejected(f"operator {node['op']} ({name}) cannot be rechecked: arguments ({error})") from error
            except Rejected as error:
                raise Rejected(f"operator {node['op']} ({name}) cannot be rechecked: {error}") from error
            self._operations[name] = made
        return self._operations[name]

    def _argument(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._argument(item) for item in value]
        if not isinstance(value, dict):
            return value
        if set(value) == {"value"}:
            name = value["value"]
            unit = self.nodes[name]["op"] == "lipcert.normalize"
            if unit:
                self.operation(name)  # refuses another normalisation than of rows
            return Value(name, self.shape(name), unit)
        if set(value) == {"tensor"}:
            require(self.tensors[value["tensor"]].dtype == np.float64, "a tensor of integers")
            return self.tensors[value["tensor"]]
        raise Rejected(f"the argument {json.dumps(value)[:60]}")

    def between(self, values: Sequence[str], source: str) -> list[str]:
        """Return the nodes on the way from the source to affine functions of it, in order; `values` among them."""
        found: set[str] = set()
        waiting = list(values)
        while waiting:
            name = waiting.pop()
            if name == source or name in found:
                continue
            before = self.order[name] < self.order[source]
            if before or self.operation(name).trace is None:
                raise Rejected(f"it is not an affine function of {source} alone, because of {name}")
            found.add(name)
            waiting.extend(self.operation(name).inputs)
        return sorted(found, key=self.order.__getitem__)

    def maps(self, values: Sequence[str], source: str) -> list[Map]:
        """Return the linear maps from the source to values that are affine functions of it alone."""
        made = {source: identity(self.shape(source))}
        for name in self.between(values, source):
            operation = self.operation(name)
            assert operation.trace is not None
            try:
                made[name] = operation.trace(*(made[x] for x in operation.inputs))
            except Rejected as error:
                raise Rejected(f"operator {self.nodes[name]['op']} ({name}) cannot be rechecked: {error}") from error
        return [made[name] for name in values]


def _leaves(arguments: Any) -> Iterator[dict[str, Any]]:
    """Yield the references in the arguments of a node."""
    for argument in arguments.values() if isinstance(arguments, dict) else arguments:
        if isinstance(argument, dict):
            require(all(isinstance(name, str) for name in argument.values()), "program: an argument is malformed")
            yield argument
        elif isinstance(argument, list):
            yield from _leaves(argument)


# --------------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Step:
    """One step of the proof, with what this checker found itself."""

    value: str
    sources: Sequence[str]
    factors: Sequence[float]  # own
    joint: bool
    claimed: Sequence[float]
    nodes: Sequence[str]  # between the sources and the value, which is the last of them
    branches: Sequence[tuple[str, str, Sequence[Step]]] = ()  # start, end, steps


def prove(program: Program, records: Any, base: str, where: str = "") -> tuple[list[Step], dict[str, float]]:
    """Confirm steps that bound values as functions of `base`; return them and own bounds of the values."""
    claimed: dict[str, Fraction] = {base: Fraction(1)}
    bounds: dict[str, float] = {base: 1.0}
    steps = []
    for i, record in enumerate(records):
        here = f"{where}step {i}"
        only(record, ("value", "rule", "sources", "factors", "joint", "bound", "method", "branches"), here)
        value, rule = take(record, "value", str, here), take(record, "rule", str, here)
        here = f"{here} ({value}, {rule})"
        sources, factors = take(record, "sources", list, here), take(record, "factors", list, here)
        method = take(record, "method", str, here)
        joint, bound = take(record, "joint", bool, here), number_of(record, "bound", here)
        known = value in program.nodes and value not in bounds
        require(known, f"{here}: the value is no node, or was bounded before")
        require(0 < len(sources) == len(factors), f"{here}: sources and factors do not correspond")
        for source in sources:
            if not isinstance(source, str) or source not in claimed:
                raise Rejected(f"{here}: the source {source!r} is not the input or the value of an earlier step")
        numbers = [number_of({"factor": factor}, "factor", here) for factor in factors]
        aim = Aim(numbers[0], "open" in method, "twisted" in method)
        branches = take(record, "branches", list, here) if "branches" in record else None
        try:
            own, nodes, inner = _confirm(program, value, rule, sources, joint, branches, aim, here)
            for factor, found in zip(numbers, own, strict=True):
                require(found <= factor, f"the factor {factor!r} is below {found!r}, which is what can be proved")
        except Rejected as error:
            raise error if str(error).startswith(here) else Rejected(f"{here}: {error}") from error
        parts = [Fraction(f) * claimed[s] for f, s in zip(numbers, sources, strict=True)]
        squared = sum(p * p for p in parts) if joint else sum(parts) ** 2
        if Fraction(bound) ** 2 < squared:
            raise Rejected(f"{here}: the bound {bound!r} is below what its factors give, {math.sqrt(squared)!r}")
        claimed[value] = Fraction(bound)
        mine = [f * bounds[s] for f, s in zip(own, sources, strict=True)]
        bounds[value] = (math.hypot(*mine) if joint else sum(mine)) * (1.0 if own == [1.0] else UP)
        steps.append(Step(value, sources, own, joint, numbers, nodes, inner))
    return steps, bounds


def _confirm(
    program: Program, value: str, rule: str, sources: Sequence[str], joint: bool, branches: Any, aim: Aim, where: str
) -> tuple[list[float], list[str], list[tuple[str, str, Sequence[Step]]]]:
    """Return own factors of a step, the nodes that it passes, and its branches, proved."""
    require(rule != "chain", "bounds of chains of affine maps and activations cannot be rechecked")
    op = program.nodes[value]["op"]
    operation = program.operation(value)
    affine = operation.trace is not None
    own = RULES.get(op, op.split(".")[1] if "." in op else op)
    require(rule == own or (rule == "affine" and affine), f"the operator of the value is {op}, not called {rule!r}")
    arguments = list(operation.inputs)
    if branches is not None:
        require(op == "aten.cat.default" and len(sources) == 1, "only a concatenation of one source has branches")
        factor, proved = _branches(program, arguments, sources[0], branches, where)
        return [factor], [value], proved
    if affine and len(sources) == 1:
        nodes = program.between([value], sources[0])
        return [norm(program.maps([value], sources[0])[0], aim)], nodes, []
    if list(sources) == arguments:
        require(operation.joint or not joint, "only what is side by side counts jointly")
        return list(operation.factors), [value], []
    require(len(sources) == 1, "the sources are not its arguments in order")
    require(operation.joint or len(arguments) == 1, "the sources are not its arguments in order")
    nodes = program.between(arguments, sources[0])
    factor = max(operation.factors)
    found = joint_norm(program.maps(arguments, sources[0]), replace(aim, enough=aim.enough / factor))
    return [found if factor == 1.0 else found * factor * UP], [*nodes, value], []


def _branches(
    program: Program, arguments: Sequence[str], source: str, branches: Sequence[Any], where: str
) -> tuple[float, list[tuple[str, str, Sequence[Step]]]]:
    """Bound a concatenation whose parts are functions f_i of different parts s_i = S_i x of one source.

    If f_i has the constant b_i, ‖Δvalue‖² = Σ ‖Δf_i‖² ≤ max b_i² Σ ‖Δs_i‖² ≤ max b_i² ‖(S_i)_i‖² ‖Δx‖².
    """
    require(len(branches) == len(arguments), "there is not one branch for each part")
    proved: list[tuple[str, str, Sequence[Step]]] = []
    largest = 0.0
    for i, (record, end) in enumerate(zip(branches, arguments, strict=True)):
        here = f"{where}, branch {i}: "
        only(record, ("start", "steps"), here[:-2])
        start = take(record, "start", str, here[:-2])
        require(start in program.nodes, f"{here}there is no node {start!r}")
        steps, bounds = prove(program, take(record, "steps", list, here[:-2]), start, here)
        require(end in bounds, f"{here}no step bounds {end}")
        proved.append((start, end, steps))
        largest = max(largest, bounds[end])
    starts = joint_norm(program.maps([start for start, _, _ in proved], source))
    return (largest if starts == 1.0 else largest * starts * UP), proved


def pairwise(program: Program, bounds: Mapping[str, float], heads: Sequence[str]) -> tuple[Array, dict[str, Array]]:
    """Return own bounds L (k, k) of z_i - z_j, and for each head the distances ‖w_i - w_j‖ (k, k).

    Where the output is a map of logits (1, k, h, w), those at one position, which are W times the head there, plus b.
    """
    shape = program.shape(program.output)
    require(len(shape) in (2, 4) and shape[0] == 1 and shape[1] > 1, "the output is not a vector of logits")
    best = np.full((shape[1], shape[1]), math.sqrt(2) * bounds[program.output] * UP)
    distances = {}
    for head in heads:
        try:
            require(head != program.output, "it is the output itself")
            kernel = _phases(program.maps([program.output], head)[0].as_kernel())
            if len(shape) == 2:
                kernel = opened(opened(kernel, 0), 1)
            require({*kernel.taps} == {(0, 0)}, "the output is no matrix times it")
        except Rejected as error:
            raise Rejected(f"proof: the head {head!r}: {error}") from error
        rows = kernel.taps[0, 0]
        distances[head] = (np.stack([norms(rows - row) for row in rows]) + 2 * kernel.error) * UP
        best = np.minimum(best, bounds[head] * distances[head] * UP)
    return best, distances


# ---------------------------------------------------------------------------------------------------------------- rows


def evaluate(
    program: Program, steps: Sequence[Step], distances: Mapping[str, Array], images: Array
) -> tuple[Array, Array, Array]:
    """Return the logits (n, k, …) of images, l2 bounds (n,) of their errors, and (n, k, k) of those of differences.

    The latter are |error of z_a - z_b| at any one position. At each node, something arises: for a sum of t terms B x +
    b at most gamma(t)(|B||x| + |b|) entry by entry, nothing if entries are only moved. What arises between the sources
    of a step and its value reaches the value through the operators between, each with its own constant; what the
    sources bring, through the proved factors.
    """
    results = {program.input: images[:, None]}
    arisen = {program.input: np.zeros(len(images))}
    last = {x: name for name in program.nodes if name != program.input for x in program.operation(name).inputs}
    for name in program.nodes:
        if name != program.input:
            inputs = program.operation(name).inputs
            results[name], arisen[name] = program.operation(name).run(*(results[x] for x in inputs))
            for x in {*inputs}:
                if last[x] == name and x != program.output:
                    del results[x]
    errors = _carried(program, steps, program.input, arisen)
    logits = results[program.output].reshape(len(images), *program.shape(program.output)[1:])
    whole = errors[program.output]
    doubts = np.repeat(2 * whole[:, None, None], logits.shape[1], 1).repeat(logits.shape[1], 2)
    for head, apart in distances.items():
        nodes = program.between([program.output], head)
        since = _within(program, {head: 0 * whole}, nodes, arisen)[program.output]
        doubts = np.minimum(doubts, errors[head][:, None, None] * apart + math.sqrt(2) * since[:, None, None])
    return logits, whole, doubts * UP


def _carried(program: Program, steps: Sequence[Step], base: str, arisen: Mapping[str, Array]) -> dict[str, Array]:
    """Return bounds of the errors of values, if `base` has none."""
    errors = {base: np.zeros_like(arisen[program.input])}
    for step in steps:
        margin = program.operation(step.value).margin
        known = [np.where(errors[s] <= margin, errors[s], math.inf) for s in step.sources]
        local = {s: 0 * arisen[program.input] for s in step.sources}
        for start, end, inner in step.branches:
            local[end] = _carried(program, inner, start, arisen)[end]
        inside = _within(program, local, step.nodes, arisen)[step.value]
        errors[step.value] = (_combined(step.factors, known, step.joint) + inside) * UP
    return errors


def _within(
    program: Program, known: dict[str, Array], nodes: Sequence[str], arisen: Mapping[str, Array]
) -> dict[str, Array]:
    """Carry errors of values through nodes, operator by operator."""
    for name in nodes:
        operation = program.operation(name)
        inputs = [known[x] for x in operation.inputs]
        known[name] = (_combined(operation.factors, inputs, operation.joint) + arisen[name]) * UP
    return known


def _combined(factors: Sequence[float], errors: Sequence[Array], joint: bool) -> Array:
    parts = [factor * error for factor, error in zip(factors, errors, strict=True)]
    return (np.sqrt(np.sum(np.square(parts), axis=0)) if joint else np.sum(parts, axis=0)) * UP


@dataclass(frozen=True)
class Facts:
    """What a certificate says that it is about; `radii` and `scenes` (SHA-256 of image and labels) if it has masks."""

    shape: Grid
    domain: tuple[float, float]
    n: int
    precision: str
    radii: Sequence[float] = ()
    scenes: Sequence[tuple[str, str]] = ()

    @classmethod
    def of(cls, record: Any) -> Facts:
        shape, domain = (take(record, key, list, "certificate") for key in ("input_shape", "domain"))
        sides = len(shape) == 3 and all(type(side) is int and 0 < side < 1 << 16 for side in shape)
        require(sides, f"certificate: input_shape {shape} is no shape of an image")
        interval = len(domain) == 2 and all(type(x) in (int, float) for x in domain) and domain[0] < domain[1]
        require(interval, f"certificate: domain {domain} is no interval")
        precision = take(record, "precision", str, "certificate")
        known = precision in ("float64", "float64 program", "float32")
        known &= take(record, "norm", str, "certificate") == "l2"
        require(known, "certificate: precision or norm is not one that this checker knows")
        facts = cls((*shape,), (float(domain[0]), float(domain[1])), take(record, "n", int, "certificate"), precision)
        task = record.get("task", "classification")
        require(task in ("classification", "segmentation"), f"certificate: task {task!r} is not known here")
        if task == "classification":
            return facts
        radii, scenes = (take(record, key, list, "certificate") for key in ("eps", "scenes"))
        require(0 < len(radii) and all(type(r) in (int, float) and r >= 0 for r in radii), "certificate: eps")
        hashes = all(isinstance(s, list) and len(s) == 2 and all(isinstance(h, str) for h in s) for s in scenes)
        require(hashes and len(scenes) == facts.n, "certificate: 'scenes' is not one pair of SHA-256 for each image")
        return replace(facts, radii=[float(r) for r in radii], scenes=[(s[0], s[1]) for s in scenes])


def read_rows(path: Path, facts: Facts, lipschitz: Array) -> list[Any]:
    """Read the rows of certificates.tsv and check what can be checked without images."""
    apart = lipschitz + np.where(np.eye(len(lipschitz)), math.inf, 0.0)
    largest = (facts.domain[1] - facts.domain[0]) * math.sqrt(math.prod(facts.shape)) * UP
    rows = read_table(path, COLUMNS, facts.n)
    for i, row in enumerate(rows):
        where = f"row {i}"
        require(row.idx == i, f"{where}: its idx is {row.idx}")
        usual = 0 <= row.radius <= largest
        require(usual, f"{where}: the radius {row.radius!r} is negative, no number, or beyond the domain's diameter")
        right = row.correct == int(row.predict == row.label)
        require(right, f"{where}: correct is {row.correct}, with label {row.label} and prediction {row.predict}")
        require(bool(re.fullmatch("[0-9a-f]{64}", row.image)), f"{where}: the SHA-256 of the image is malformed")
        if row.radius > 0:
            sound = 0 <= row.predict < len(apart) and row.margin > 0 and 0 <= row.error < math.inf
            require(sound, f"{where}: a radius without a prediction, a margin or an error")
            possible = row.radius * float(apart[row.predict].min()) <= row.margin * UP
            require(possible, f"{where}: the radius {row.radius!r} is above its margin over any constant")
    return rows


def check_row(row: Any, z: Array, doubts: Array, error: float, lipschitz: Array) -> None:
    """Confirm a row with its own logits (k,), doubts (k, k), and constants (k, k)."""
    p, where = row.predict, f"row {row.idx}"
    if row.radius == 0:
        return
    finite = bool(np.isfinite(z).all() and np.isfinite(error))
    require(finite, f"{where}: the logits or their errors are not finite")
    require(int(np.argmax(z)) == p, f"{where}: the prediction is {int(np.argmax(z))}, not {p}")
    gaps = z[p] - z - doubts[p] - 4 * UNIT * (np.abs(z) + abs(z[p]))
    others = np.arange(len(z)) != p
    require(bool((gaps[others] > 0).all()), f"{where}: the margin is not above the rounding error")
    ordinary = others & (lipschitz[p] > 0)
    radius = float((gaps[ordinary] / lipschitz[p][ordinary]).min(initial=math.inf)) * (1 - 2.0**-50)
    proved = row.radius <= radius
    require(proved, f"{where}: the radius {row.radius!r} is above {radius!r}, which is what can be proved")
    margin = float((z[p] - z)[others].min())
    near = abs(row.margin - margin) <= 2 * (row.error + error) * UP + 1e-15 * abs(margin)
    require(near, f"{where}: the margin {row.margin!r} is not {margin!r}")


def read_scenes(path: Path, facts: Facts, shape: Sequence[int]) -> list[Any]:
    """Read the rows of scenes.tsv, one for each image and radius, and check what can be checked without images."""
    require(len(shape) == 4, "the output is not a map of logits")
    k, pixels = len(facts.radii), math.prod(shape[2:])
    rows = read_table(path, SCENE_COLUMNS, facts.n * k)
    for i, row in enumerate(rows):
        expected = i // k, facts.radii[i % k]
        require((row.idx, row.eps) == expected, f"row {i}: it is image {row.idx} at {row.eps!r}, not {expected}")
        ordered = 0 <= row.certified_alone <= row.correct <= row.valid <= row.pixels == pixels
        ordered &= 0 <= row.stable <= pixels and 0 <= row.certified <= row.correct
        require(ordered, f"row {i}: its counts contradict each other or the {pixels} pixels")
    return rows


def check_scene(
    rows: Sequence[Any], logits: Array, doubts: Array, pairs: Array, lipschitz: float, labels: Array
) -> None:
    """Confirm the rows of one image with its own logits (k, h, w) and labels (h, w).

    Pixel i, of class a, becomes b only if what the logits are made of moves there by (z_a - z_b - E_ab) / N_ab; d_i is
    the least of these. All of it together moves by L eps, and pixels are disjoint parts of it: the pixels that change
    satisfy Σ d_i² ≤ (L eps)², whichever they are, so no more change than there are of the cheapest ones.
    """
    z, label = logits.reshape(len(logits), -1), labels.ravel()
    predict = np.argmax(z, axis=0)
    own = np.take_along_axis(z, predict[None], 0)
    with np.errstate(all="ignore"):
        gaps = own - z - doubts[:, predict] - 4 * UNIT * (np.abs(z) + np.abs(own))
        distance = np.where(gaps > 0, gaps / pairs[:, predict], 0.0)  # infinite where the classes have equal rows
    distance[predict, np.arange(len(predict))] = math.inf
    certain = np.isfinite(z).all(0) & np.isfinite(doubts).all()
    least = np.where(certain, distance.min(0), 0.0) * (1 - 2.0**-48)
    right = (label == predict) & (label != VOID)
    counts = int(np.count_nonzero(label != VOID)), int(np.count_nonzero(right))

    def kept(of: Array, eps: float) -> int:
        costs = np.cumsum(np.square(np.sort(of))) * (1 - gamma(2 * len(of) + 8)) - 1e-290
        return len(of) - int(np.count_nonzero(costs <= (lipschitz * eps * UP) ** 2 * UP))

    for row in rows:
        where, claimed = f"row of image {row.idx} at {row.eps}", (row.valid, row.correct)
        require(claimed == counts, f"{where}: valid and correct are {claimed}, not {counts}")
        most = {"stable": kept(least, row.eps), "certified": kept(least[right], row.eps)}
        most["certified_alone"] = int(np.count_nonzero(least[right] > lipschitz * row.eps * UP))
        for name, proved in most.items():
            claim = getattr(row, name)
            require(claim <= proved, f"{where}: {name} {claim} is above {proved}, which is what can be proved")


# ---------------------------------------------------------------------------------------------------------- everything


@dataclass(frozen=True)
class Report:
    """What was found. `reason` is empty if everything that was looked at holds."""

    accepted: bool
    reason: str
    steps: int = 0  # confirmed
    rows: int = 0  # images that there are rows of, consistent in themselves
    images: int = 0  # whose rows were confirmed
    upper: float = math.nan  # own bound of the output
    claimed: float = math.nan
    note: str = ""
    own: Sequence[tuple[str, float, float]] = ()  # value, own factor, claimed factor

    def __str__(self) -> str:
        if not self.accepted:
            return self.reason
        bound = f"{self.steps} steps confirmed: L = {self.upper:.9g} (claimed {self.claimed:.9g})"
        return f"{bound}; the rows of {self.images} images confirmed" + (f"; {self.note}" if self.note else "")


def check(
    certificate: Path, *, weights: Path | None = None, images: Array | None = None, labels: Array | None = None,
    batch_size: int = 50, progress: Callable[[int], None] = lambda done: None,
) -> Report:  # fmt: skip
    """Check a certificate, and the rows of `images` 0 … n-1 (n, c, h, w) as far as they are given.

    `labels` (n, h', w') are those of the positions of segmented images. `weights` is program.safetensors, by default
    the one beside the certificate; no path in the files is followed. Raises OSError for files that are not there. What
    does not hold, or cannot be judged, is the `reason` of the report.
    """
    try:
        record = read_json(certificate)
        facts = Facts.of(record)
        program_record, proof = (take(record, key, dict, "certificate") for key in ("program", "proof"))
        sha256 = take(program_record, "sha256", str, "program")
        tensors = read_tensors(weights or certificate.parent / "program.safetensors", sha256)
        program = Program(program_record, tensors)
        fits = program.shape(program.input) == [1, *facts.shape]
        require(fits, f"the input of the program is not an image {list(facts.shape)}, as input_shape says")
        only(proof, ("steps", "upper", "heads"), "proof")
        steps, bounds = prove(program, take(proof, "steps", list, "proof"), program.input)
        require(program.output in bounds, "proof: no step bounds the output")
        upper = number_of(proof, "upper", "proof")
        last = next((s["bound"] for s in proof["steps"] if s["value"] == program.output), 1.0)
        require(upper >= last, f"proof: upper {upper!r} is below the bound of the output")
        heads = take(proof, "heads", list, "proof")
        for head in heads:
            require(isinstance(head, str) and head in bounds, f"proof: the head {head!r} has no step")
        lipschitz, distances = pairwise(program, bounds, heads)
        if facts.radii:
            head = heads[0] if heads else program.output
            measure = distances.get(head, np.full(lipschitz.shape, math.sqrt(2) * UP)), bounds[head]
            rows = read_scenes(certificate.parent / "scenes.tsv", facts, program.shape(program.output))
        else:
            rows = read_rows(certificate.parent / "certificates.tsv", facts, lipschitz)
        checked, note = 0, ""
        if facts.precision != "float64":
            note = f"rows about {facts.precision} programs are not rechecked yet"
        elif images is None:
            note = "without images, only the proof and the arithmetic of the rows were checked"
        else:
            fits = images.ndim == 4 and images.shape[1:] == facts.shape
            require(fits, f"the images are {list(images.shape[1:])}, not {list(facts.shape)}")
            require(len(images) <= facts.n, f"there are {len(images)} images, but {facts.n} rows")
            masks = not facts.radii or (labels is not None and len(labels) == len(images))
            require(masks, "the labels of the positions of each image are needed as well")
            for start in range(0, len(images), batch_size):
                part = images[start : start + batch_size].astype(np.float64)
                for i, image in enumerate(part, start):
                    digest = facts.scenes[i][0] if facts.radii else rows[i].image
                    require(sha256_of(image, "<f8") == digest, f"row {i}: the image has another SHA-256")
                    inside = bool(((image >= facts.domain[0]) & (image <= facts.domain[1])).all())
                    require(inside, f"row {i}: the image is outside the domain {list(facts.domain)}")
                with np.errstate(all="ignore"):
                    found = evaluate(program, steps, distances, part)
                for i, (z, error, doubts) in enumerate(zip(*found, strict=True), start):
                    if facts.radii and labels is not None:
                        digest, k = sha256_of(labels[i], "<i8"), len(facts.radii)
                        require(digest == facts.scenes[i][1], f"row of image {i}: its labels have another SHA-256")
                        require(labels[i].shape == z.shape[1:], f"row of image {i}: its labels are of another size")
                        check_scene(rows[i * k : (i + 1) * k], z, doubts, *measure, labels[i])
                    else:
                        check_row(rows[i], z, doubts, error, lipschitz)
                checked += len(part)
                progress(len(part))
    except Rejected as error:
        return Report(False, str(error))
    except (RecursionError, MemoryError, OverflowError, np.linalg.LinAlgError) as error:
        return Report(False, f"the certificate is too large to be rechecked ({type(error).__name__})")
    own = [(s.value, f, c) for s in _flat(steps) for f, c in zip(s.factors, s.claimed, strict=True)]
    return Report(True, "", len(_flat(steps)), facts.n, checked, bounds[program.output], upper, note, own)


def _flat(steps: Sequence[Step]) -> list[Step]:
    """Return steps and those of their branches."""
    return [inner for step in steps for inner in (*(s for *_, b in step.branches for s in _flat(b)), step)]


def sha256_of(array: Array, kind: str) -> str:
    """Return the SHA-256 of an array as little-endian numbers in order."""
    return hashlib.sha256(np.ascontiguousarray(array, dtype=kind).tobytes()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Check from the command line: 0 if everything holds, 3 if not, 2 if files are missing."""
    parser = argparse.ArgumentParser(description="Re-prove a certificate of lipcert with NumPy alone.")
    parser.add_argument("certificate", type=Path, help="certificate.json")
    parser.add_argument("--weights", type=Path, help="program.safetensors, if it is not beside the certificate")
    parser.add_argument("--images", type=Path, help="safetensors: images (n, c, h, w), perhaps labels (n, h, w)")
    options = parser.parse_args(arguments)
    try:
        tensors: dict[str, Array] = {}
        if options.images is not None:
            from safetensors.numpy import load_file

            tensors = load_file(options.images)
        labels, images = tensors.pop("labels", None), next(iter(tensors.values()), None)
        report = check(options.certificate, weights=options.weights, images=images, labels=labels)
    except (OSError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(report if report.accepted else f"does not verify: {report.reason}")
    return 0 if report.accepted else 3


if __name__ == "__main__":
    sys.exit(main())
