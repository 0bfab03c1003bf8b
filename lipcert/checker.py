"""Re-prove a certificate from its files alone, with NumPy and safetensors; docs/certificate.md is the format.

    python checker.py certificate.json [--images images.safetensors]

This file imports nothing of lipcert and shares no method with it, so that an error there is not repeated here. It is
meant to be read in one sitting, in this order: reading files that may be hostile; kernels, the one form in which every
affine operator is written; norms, proved by Cholesky factorisations; the operators; the steps; the rows.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Grid = tuple[int, int, int]  # channels, height, width of one value
Pair = tuple[int, int]

UNIT = 2.0**-53
UP = 1.0 + 2.0**-44  # more than 100 roundings of positive numbers
JSON_BYTES, JSON_DEPTH, TENSOR_BYTES = 64 << 20, 64, 4 << 30
ENTRIES = 1 << 26  # of one array that is formed
DENSE_SIDE = 2048
SCHEMA = 1
COLUMNS = ("idx", "label", "predict", "radius", "correct", "time", "margin", "error", "image")


class Rejected(Exception):
    """Something of a certificate does not hold, or cannot be confirmed: one sentence that says what and where."""


def gamma(n: int) -> float:
    """Return an upper bound of nu / (1 - nu), the relative error of n roundings."""
    return n * UNIT / (1 - n * UNIT) * (1 + 4 * UNIT)


# ------------------------------------------------------------------------------------------------ reading hostile files


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; refuse huge and deep ones, keys that appear twice, and numbers that are not."""
    if path.stat().st_size > JSON_BYTES:
        raise Rejected(f"{path.name} is larger than {JSON_BYTES} bytes")
    text = path.read_bytes()
    depth = 0
    for token in re.finditer(rb'"(?:\\.|[^"\\])*"|[\[{\]}]', text):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token.group(), 0)
        if depth > JSON_DEPTH:
            raise Rejected(f"{path.name} is nested deeper than {JSON_DEPTH}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            raise Rejected(f"{path.name}: the key {next(k for k in keys if keys.count(k) > 1)!r} appears twice")
        return made

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise Rejected(f"{path.name}: {digits[:40]} is not a finite number")
        return value

    def integer(digits: str) -> int:
        if len(digits) > 20:
            raise Rejected(f"{path.name}: the number {digits[:20]}… is too long")
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

    if path.stat().st_size > TENSOR_BYTES:
        raise Rejected(f"{path.name} is larger than {TENSOR_BYTES} bytes")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Rejected(f"{path.name} has another SHA-256 than program.sha256")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise Rejected(f"{path.name} is not a safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in (np.float64, np.int64):
            raise Rejected(f"{path.name}: tensor {name!r} is {tensor.dtype}, not float64 or int64")
        if not np.isfinite(tensor).all():
            raise Rejected(f"{path.name}: tensor {name!r} has entries that are not finite")
    return tensors


def take(record: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return record[key] if it is of this kind (a bool is no number)."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Rejected(f"{where}: {key!r} is missing or malformed")
    return value


def only(record: Any, keys: Sequence[str], where: str) -> None:
    """Refuse keys that this checker does not know: they might change what is meant."""
    if not isinstance(record, dict):
        raise Rejected(f"{where}: it is no record")
    if unknown := sorted(set(record) - set(keys)):
        raise Rejected(f"{where}: unknown key {unknown[0]!r}")


# ------------------------------------------------------------------------------------------------------------- kernels


@dataclass(frozen=True)
class Kernel:
    """An affine operator's linear part: out[:, y] = Σ_t taps[t] · in[:, stride·y + t] with two-dimensional y and t.

    Outside its grid `in` is zero, or, if `wraps`, periodic. Vectors are grids of one position. The taps may differ from
    the exact ones by Σ_t ‖·‖_F ≤ error, which also bounds the operator norm of the difference: taking entries of a
    shifted grid has norm at most 1.
    """

    taps: Mapping[Pair, Array]  # each (c_out, c_in)
    source: Grid
    target: Grid
    stride: Pair = (1, 1)
    wraps: bool = False
    error: float = 0.0

    @property
    def size(self) -> float:
        """An upper bound of Σ_t ‖taps[t]‖_F."""
        return sum(frobenius(tap) for tap in self.taps.values()) * UP

    def reach(self, axis: int) -> tuple[int, int]:
        """Return the first and the last position that is read along an axis, possibly outside of the grid."""
        offsets = [t[axis] for t in self.taps] or [0]
        return min(offsets), self.stride[axis] * (self.target[1 + axis] - 1) + max(offsets)

    @property
    def inside(self) -> bool:
        """Whether nothing outside the grid is read, so that the extension does not matter."""
        return all(0 <= self.reach(a)[0] and self.reach(a)[1] < self.source[1 + a] for a in (0, 1))

    @property
    def gain(self) -> float:
        """An upper bound of Σ_t ‖|taps[t]|‖, and so of Σ_t ‖(|taps| ∘ A)[t]‖_F / Σ_t ‖A[t]‖_F for every A (Schur)."""
        return sum(min(frobenius(tap), _schur(np.abs(tap))) for tap in self.taps.values()) * UP

    @property
    def terms(self) -> int:
        """The largest number of entries of `in` that enter one entry of `out`."""
        return int(np.sum([(tap != 0).sum(1) for tap in self.taps.values()], axis=0).max()) if self.taps else 0

    @property
    def selects(self) -> bool:
        """Whether every entry of `out` is exactly zero or plus or minus one entry of `in`."""
        return (
            not self.error and self.terms <= 1 and all(bool(np.isin(t, (-1, 0, 1)).all()) for t in self.taps.values())
        )


def frobenius(array: Array) -> float:
    """Return an upper bound of the Frobenius norm; the last term is for squares that underflow."""
    return math.sqrt(float(np.sum(np.square(np.abs(array))))) * (1 + gamma(array.size + 8)) + 1e-150


def _schur(magnitudes: Array) -> float:
    """Return √(largest row sum · largest column sum), an upper bound of the norm of a matrix of this magnitude."""
    sums = float(magnitudes.sum(1).max(initial=0.0)) * float(magnitudes.sum(0).max(initial=0.0))
    return math.sqrt(sums) * (1 + gamma(max(magnitudes.shape) + 8))


def eye(n: int) -> Array:
    if n * n > ENTRIES:
        raise Rejected(f"{n} channels are too many")
    return np.eye(n)


def identity(grid: Grid) -> Kernel:
    return Kernel({(0, 0): eye(grid[0])}, grid, grid)


def compose(second: Kernel, first: Kernel) -> Kernel:
    """Return second ∘ first, exactly this map; Rejected if it is not of this form.

    What `second` reads outside the grid between them must be what `first` gives there by its own formula: with zeros,
    `first` must read nothing but outside; periodically, `first` must be periodic with that very period.
    """
    grid, wraps = first.target, first.wraps
    if second.source != grid:
        raise Rejected("shapes do not fit")
    if not second.inside:
        wraps = second.wraps
        if first.wraps != wraps and not first.inside:
            raise Rejected("zeros and periodic continuation are mixed")
        if wraps and any(first.source[1 + a] != first.stride[a] * grid[1 + a] for a in (0, 1)):
            raise Rejected("a periodic continuation does not fit the stride before it")
        if not wraps and not all(_vanishes(first, second, axis) for axis in (0, 1)):
            raise Rejected("what is beyond the border of the map between is cut off, so they are not one convolution")
    taps: dict[Pair, Array] = {}
    for t, b in second.taps.items():
        for r, a in first.taps.items():
            offset = (first.stride[0] * t[0] + r[0], first.stride[1] * t[1] + r[1])
            if wraps:
                offset = (offset[0] % first.source[1], offset[1] % first.source[2])
            product = b @ a
            taps[offset] = taps[offset] + product if offset in taps else product
            if len(taps) * product.size > ENTRIES:
                raise Rejected("the kernel is too large")
    rounding = 0.0 if second.selects else gamma(second.terms + 2) * second.gain * first.size + 1e-300
    known = second.gain * first.error + second.error * (first.size + first.error)
    stride = (first.stride[0] * second.stride[0], first.stride[1] * second.stride[1])
    return Kernel(taps, first.source, second.target, stride, wraps, (rounding + known) * UP)


def _vanishes(first: Kernel, second: Kernel, axis: int) -> bool:
    """Whether `first`, continued to all positions outside its grid that `second` reads, reads zeros only there."""
    low, high = second.reach(axis)
    outside = [*range(low, 0), *range(first.target[1 + axis], high + 1)]
    size, stride = first.source[1 + axis], first.stride[axis]
    return not any(0 <= stride * p + t[axis] < size for p in outside for t in first.taps)


def total(kernels: Sequence[Kernel]) -> Kernel:
    """Return the sum of maps of one source and one target."""
    wraps = any(k.wraps and not k.inside for k in kernels)
    if any(k.wraps != wraps and not k.inside for k in kernels):
        raise Rejected("zeros and periodic continuation are mixed")
    if len({(k.source, k.target, k.stride) for k in kernels}) != 1:
        raise Rejected("summands differ in shape or stride")
    taps: dict[Pair, Array] = {}
    added = 0  # entries of different summands meet: one rounding each
    for kernel in kernels:
        for t, tap in kernel.taps.items():
            where = (t[0] % kernel.source[1], t[1] % kernel.source[2]) if wraps else t
            if where in taps:
                added += bool(((taps[where] != 0) & (tap != 0)).any())
                tap = taps[where] + tap
            taps[where] = tap
    error = sum(k.error for k in kernels) + (gamma(added) * sum(k.size for k in kernels) if added else 0.0)
    return replace(kernels[0], taps=taps, wraps=wraps, error=error * UP)


def stack(kernels: Sequence[Kernel]) -> Kernel:
    """Return the map to all the targets, one above the other along the channels."""
    return total([compose(place, k) for place, k in zip(placements([k.target for k in kernels]), kernels, strict=True)])


def placements(grids: Sequence[Grid]) -> list[Kernel]:
    """Return the maps that put values into one, channels after channels."""
    if len({grid[1:] for grid in grids}) != 1:
        raise Rejected("values of different size are concatenated")
    everything = eye(sum(grid[0] for grid in grids))
    ends = np.cumsum([grid[0] for grid in grids])
    whole = (len(everything), *grids[0][1:])
    return [Kernel({(0, 0): everything[:, end - g[0] : end]}, g, whole) for g, end in zip(grids, ends, strict=True)]


def apply(kernel: Kernel, x: Array) -> tuple[Array, int]:
    """Return the map of (n, c, h, w), and a number of roundings such that gamma of it bounds the relative error.

    Channels are added in blocks of 64, blocks and taps one after the other: much less than any order of all of them.
    """
    (first0, last0), (first1, last1) = kernel.reach(0), kernel.reach(1)
    before = max(0, -first0), max(0, -first1)
    after = max(0, last0 - kernel.source[1] + 1), max(0, last1 - kernel.source[2] + 1)
    if any((*before, *after)):
        mode = "wrap" if kernel.wraps else "constant"
        x = np.pad(x, ((0, 0), (0, 0), (before[0], after[0]), (before[1], after[1])), mode=mode)  # type: ignore[call-overload]
    c, h, w = kernel.target
    out = np.zeros((len(x), c, h * w))
    sums = 0
    for (t0, t1), tap in kernel.taps.items():
        rows = slice(before[0] + t0, before[0] + t0 + kernel.stride[0] * (h - 1) + 1, kernel.stride[0])
        columns = slice(before[1] + t1, before[1] + t1 + kernel.stride[1] * (w - 1) + 1, kernel.stride[1])
        part = x[:, :, rows, columns].reshape(len(x), -1, h * w)
        for start in range(0, kernel.source[0], 64):
            out += tap[:, start : start + 64] @ part[:, start : start + 64]
            sums += 1
    return out.reshape(len(x), c, h, w), min(kernel.terms, 64 + sums) + 1


# --------------------------------------------------------------------------------------------------------------- norms


def norm(kernel: Kernel) -> float:
    """Return a proved upper bound of the operator norm.

    With stride s, position s·q + r of channel i is position q of channel (r, i): a map of stride 1 with s₀s₁c channels
    (`_phases`). If it has one tap K that reads nothing outside, its norm is ‖K‖; if
    it has one position, that of the taps side by side (`rows_of`). Otherwise it is a part of the
    convolution on a torus of m positions per axis, if m is so large that
      - outputs are different positions, h ≤ m;
      - for zeros: with the image on positions 0 … n-1, every read outside of it is a position of the torus outside of
        it, m ≥ n - (first read) and m ≥ (last read) + 1. Then inserting zeros, the torus, keeping h outputs is the map;
      - for `wraps`: m = n.
    The torus map is block diagonal in the Fourier basis: its norm is max_j ‖Σ_t K_t e^(-2πi⟨j, t⟩/m)‖.
    Small maps are written out as one matrix instead, whose norm is never larger.
    """
    taps, image = _phases(kernel)
    c, h, w = kernel.target
    if kernel.wraps and not kernel.inside and (h > image[0] or w > image[1]):
        raise Rejected("a periodic continuation is copied")
    if (h, w) == (1, 1):
        taps = {(0, 0): rows_of(kernel)}
    if not taps:
        return kernel.error
    if not kernel.error and _partial_permutation(taps):
        return 1.0
    if len(taps) == 1 and (kernel.inside or (h, w) == (1, 1)):
        return proved_norm(next(iter(taps.values()))[None], kernel.error)
    entries = math.prod(kernel.target) * math.prod(kernel.source)
    if min(math.prod(kernel.target), math.prod(kernel.source)) <= DENSE_SIDE and entries <= ENTRIES:
        return proved_norm(_matrix(kernel)[None], kernel.error)
    torus = []
    for axis in (0, 1):
        offsets = [t[axis] for t in taps]
        low, high = min(0, *offsets), max(0, *offsets) + kernel.target[1 + axis] - 1
        n = image[axis]
        torus.append(n if kernel.wraps and not kernel.inside else max(n - low, high + 1, kernel.target[1 + axis]))
    if math.prod(torus) * next(iter(taps.values())).size > 8 * ENTRIES:
        raise Rejected("the map is too large to be bounded here")
    weight = sum(frobenius(tap) for tap in taps.values()) * UP
    return max(
        proved_norm(blocks, error + kernel.error) for blocks, error in _symbols(taps, (torus[0], torus[1]), weight)
    )


def _phases(kernel: Kernel) -> tuple[dict[Pair, Array], Pair]:
    """Return the taps of the same map with stride 1, zero ones left out, and the size of its image, rounded up."""
    (s0, s1), (c, h, w) = kernel.stride, kernel.source
    if kernel.wraps and not kernel.inside and (h % s0 or w % s1):
        raise Rejected("a stride does not divide the period")
    taps: dict[Pair, Array] = {}
    for t, tap in kernel.taps.items():
        if tap.any():
            q, phase = (t[0] // s0, t[1] // s1), (t[0] % s0) * s1 + t[1] % s1
            wide = taps.setdefault(q, np.zeros((tap.shape[0], s0 * s1 * c)))
            wide[:, phase * c : (phase + 1) * c] = tap
    return taps, (-(-h // s0), -(-w // s1))


def _partial_permutation(taps: Mapping[Pair, Array]) -> bool:
    """Whether no entry of `out` and none of `in` is used twice, and all factors are plus or minus one: norm 1."""
    used = np.sum([tap != 0 for tap in taps.values()], axis=0)
    exact = all(bool(np.isin(tap, (-1, 0, 1)).all()) for tap in taps.values())
    return exact and int(used.sum(0).max()) <= 1 and int(used.sum(1).max()) <= 1


def _symbols(taps: Mapping[Pair, Array], torus: Pair, weight: float) -> Iterator[tuple[Array, float]]:
    """Yield the blocks (frequencies, c_out, c_in) of a real convolution on a torus, one of each conjugate pair.

    Angles 2πk/m with exact integers k < m have three roundings below 2π, cosine and sine 4 units: each factor is
    within 32u. With T taps, real and imaginary part err by gamma(T + 40) Σ|K_t| each, so the block by at most twice
    that times `weight` ≥ Σ_t ‖K_t‖_F.
    """
    m0, m1 = torus
    chosen = [(a, b) for a in range(m0) for b in range(m1) if (a, b) <= ((m0 - a) % m0, (m1 - b) % m1)]
    offsets = np.array(list(taps))  # (T, 2)
    kernels = np.stack(list(taps.values()))  # (T, c_out, c_in)
    step = max(1, (1 << 20) // kernels[0].size)
    for start in range(0, len(chosen), step):
        frequencies = np.array(chosen[start : start + step])
        turns = (frequencies[:, :1] * offsets[:, 0] % m0) / m0 + (frequencies[:, 1:] * offsets[:, 1] % m1) / m1
        angles = 2 * np.pi * (turns % 1.0)
        flat = kernels.reshape(len(kernels), -1)
        blocks = np.cos(angles) @ flat - 1j * (np.sin(angles) @ flat)
        yield blocks.reshape(-1, *kernels.shape[1:]), 2 * gamma(len(taps) + 40) * weight * UP


def rows_of(kernel: Kernel) -> Array:
    """Return the matrix of a map to one position: the taps side by side, without those beside the image, which is 0."""
    size, known = kernel.source[1:], kernel.wraps or kernel.inside
    inner = [tap for t, tap in kernel.taps.items() if known or (0 <= t[0] < size[0] and 0 <= t[1] < size[1])]
    return np.concatenate([*inner, np.zeros((kernel.target[0], 1))], axis=1)


def _matrix(kernel: Kernel) -> Array:
    """Return the matrix of a small map."""
    (c, h, w), (d, y, x) = kernel.target, kernel.source
    matrix = np.zeros((c, h, w, d, y, x))
    for t, tap in kernel.taps.items():
        for p in np.ndindex(h, w):
            r = tuple(kernel.stride[a] * p[a] + t[a] for a in (0, 1))
            if kernel.wraps:
                r = (r[0] % y, r[1] % x)
            if 0 <= r[0] < y and 0 <= r[1] < x:
                matrix[:, p[0], p[1], :, r[0], r[1]] += tap
    return matrix.reshape(c * h * w, d * y * x)


def proved_norm(blocks: Array, error: float) -> float:
    """Return an upper bound of max ‖A + E‖ over matrices A of a stack (f, a, b) and all E with ‖E‖ ≤ error.

    An eigenvalue solver proposes τ, a little above max ‖A‖²; nothing rests on it. With the real form R of A (complex A
    = X + iY has the norm of [[X, -Y], [Y, X]]), the smaller of RRᵀ and RᵀR, m x m of sums of n products, computed as G:

      1. ‖G - RRᵀ‖ ≤ gamma(n) ‖|R||R|ᵀ‖ ≤ gamma(n) ‖R‖_F², for the symmetric matrix that its lower triangle defines.
      2. B = fl(τI - G) differs from τI - G on the diagonal only, by at most u·max|B_ii|.
      3. If the Cholesky factorisation of B runs to its end, computed C satisfies CCᵀ = B + D with
         |D_ij| ≤ g/(1-g)·√(B_ii B_jj), g = gamma(m+1) (Demmel 1989; Rump, "Verification of positive definiteness",
         BIT 46, 2006; here g = gamma(2m+8), for divisions done as products with a reciprocal), so ‖D‖ ≤ g/(1-g)·tr B
         and B ≥ -g/(1-g)·tr B.

    Together ‖A‖² ≤ τ + 2g·tr B + u·max B_ii + gamma(n)‖R‖_F², with 2g for g/(1-g) and the rounding of the trace.
    Blocks are scaled to entries of at most 1 by a power of two, so that what underflows is below 2^-900.
    """
    largest = float(np.abs(blocks).max(initial=0.0))
    if not math.isfinite(largest + error):
        raise Rejected("the numbers are too large to be rechecked")
    if largest == 0.0:
        return error
    scale = 2.0 ** math.ceil(math.log2(largest))
    scaled = blocks / scale
    if scaled.shape[1] > scaled.shape[2]:
        scaled = scaled.conj().swapaxes(1, 2)
    real = scaled
    proposal = scaled @ scaled.conj().swapaxes(1, 2)
    if np.iscomplexobj(scaled):
        real = np.block([[scaled.real, -scaled.imag], [scaled.imag, scaled.real]])
    gram = real @ real.swapaxes(1, 2) if real is not scaled else proposal
    m, n = real.shape[1:]
    mass = float(np.square(real).sum((1, 2)).max()) * (1 + gamma(m * n + 8))
    top = float(np.linalg.eigvalsh(proposal)[:, -1].max())
    diagonal = np.arange(m)
    for slack in (1e-11, 1e-10, 1e-9, 4e-9):
        tau = top * (1 + slack)
        shifted = -gram
        shifted[:, diagonal, diagonal] += tau
        entries = shifted[:, diagonal, diagonal].copy()
        try:
            factor = np.linalg.cholesky(shifted)
        except np.linalg.LinAlgError:
            continue
        if np.isfinite(factor[:, diagonal, diagonal]).all():
            rounding = 2 * gamma(2 * m + 8) * float(entries.sum(1).max()) + UNIT * float(entries.max())
            square = tau + rounding + gamma(n) * mass + 2.0**-900
            return (math.sqrt(square) * scale + error) * UP
    raise Rejected("no factorisation proves the norm")


def cheap_norm(kernel: Kernel) -> float:
    """Return an upper bound of the norm by row and column sums of the whole map's absolute values."""
    taps, _ = _phases(replace(kernel, wraps=False))
    if not taps:
        return kernel.error
    copies = 1.0  # of an entry of a periodic image, along both axes
    for axis in (0, 1) if kernel.wraps else ():
        copies *= math.ceil(kernel.stride[axis] * kernel.target[1 + axis] / kernel.source[1 + axis])
    summed = np.sum([np.abs(tap) for tap in taps.values()], axis=0)
    return _schur(summed) * math.sqrt(copies) * (1 + gamma(len(taps) + 8)) + kernel.error


# ----------------------------------------------------------------------------------------------------------- operators


@dataclass(frozen=True)
class Operation:
    """What one node computes from the values `inputs`: Σ kernels · inputs + constant, or a function of all of them.

    A function is `constant`-Lipschitz with respect to all its arguments together, and is computed to `units` units
    relative to its result, or, if `absolute`, to 1.
    """

    inputs: Sequence[str]
    kernels: Sequence[Kernel] = ()
    offset: Array | float = 0.0
    function: Callable[..., Array] | None = None
    constant: float = 1.0
    units: int = 0
    absolute: bool = False


@dataclass(frozen=True)
class Value:
    """An argument that is the result of an earlier node."""

    name: str
    grid: Grid


def grid_of(shape: Sequence[int]) -> Grid:
    """Return the grid of a value for one image: (1, c, h, w), or (1, d) as d channels of one position."""
    if len(shape) in (2, 4) and shape[0] == 1 and all(0 < side <= 1 << 14 for side in shape):
        return (shape[1], 1, 1) if len(shape) == 2 else (shape[1], shape[2], shape[3])
    raise Rejected(f"values of shape {list(shape)} cannot be rechecked")


def _pair(value: Any, default: Pair) -> Pair:
    made = default if value in (None, []) else tuple(value) if isinstance(value, list) else (value, value)
    if len(made) == 1:
        made = (made[0], made[0])
    if len(made) != 2 or not all(type(v) is int and 0 <= v < 1 << 16 for v in made):
        raise Rejected(f"{value!r} is no pair of sizes")
    return made[0], made[1]


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise Rejected(what)


def _axis(dim: int, shape: Sequence[int]) -> int:
    """Return 0, 1 or 2 for channels, height, width."""
    _require(type(dim) is int and -len(shape) <= dim < len(shape) and dim % len(shape) > 0, f"dimension {dim!r}")
    return dim % len(shape) - 1


def _view(x: Value, target: Grid) -> Operation:
    """Reshape: nothing, or all positions of all channels, in order, as channels of one position."""
    c, h, w = x.grid
    if x.grid == target:
        return Operation([x.name], [identity(x.grid)])
    _require(target == (c * h * w, 1, 1), "such a reshape")
    _require(c * h * w * h * w * c <= ENTRIES, "a flattened map of this size")
    everything = eye(c * h * w).reshape(c * h * w, c, h, w)
    return Operation(
        [x.name], [Kernel({t: everything[:, :, t[0], t[1]].copy() for t in np.ndindex(h, w)}, x.grid, target)]
    )


def _conv(
    target: Grid, shapes: Any, input: Value, weight: Array, bias: Array | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Operation:  # fmt: skip
    s, p, d = _pair(stride, (1, 1)), _pair(padding, (0, 0)), _pair(dilation, (1, 1))
    c_out, per, *size = weight.shape
    c, h, w = input.grid
    _require(len(size) == 2 and type(groups) is int and groups > 0 and per * groups == c, "the shape of the weight")
    _require(c_out % groups == 0 and min(*s, *d, *size) > 0, "stride, dilation or groups")
    out = [(n + 2 * q - e * (k - 1) - 1) // f + 1 for n, q, e, k, f in zip((h, w), p, d, size, s, strict=True)]
    _require((c_out, *out) == target, f"its result is {[c_out, *out]}, not {list(target)}")
    taps = {}
    for t in np.ndindex(*size):
        tap = np.zeros((c_out, c))
        for g in range(groups):
            rows = slice(g * c_out // groups, (g + 1) * c_out // groups)
            tap[rows, g * per : (g + 1) * per] = weight[rows, :, t[0], t[1]]
        taps[d[0] * t[0] - p[0], d[1] * t[1] - p[1]] = tap
    _require(bias is None or bias.shape == (c_out,), "the shape of the bias")
    return Operation([input.name], [Kernel(taps, input.grid, target, s)], 0.0 if bias is None else bias[:, None, None])


def _linear(target: Grid, shapes: Any, input: Value, weight: Array, bias: Array | None = None) -> Operation:
    _require(
        len(shapes[input.name]) == 2 and weight.ndim == 2 and weight.shape[1] == input.grid[0], "the shape of weight"
    )
    _require(bias is None or bias.shape == weight.shape[:1], "the shape of the bias")
    kernel = Kernel({(0, 0): weight}, input.grid, (len(weight), 1, 1))
    return Operation([input.name], [kernel], 0.0 if bias is None else bias[:, None, None])


def _slice(
    target: Grid, shapes: Any, self: Value, dim: int = 0, start: int | None = None, end: int | None = None,
    step: int = 1,
) -> Operation:  # fmt: skip
    axis = _axis(dim, shapes[self.name])
    _require(type(step) is int and step > 0, "step")
    _require(all(v is None or type(v) is int for v in (start, end)), "start or end")
    kept = range(self.grid[axis])[start:end:step]
    if axis == 0:
        kernel = Kernel({(0, 0): eye(self.grid[0])[list(kept)]}, self.grid, (len(kept), *self.grid[1:]))
    else:
        offset = (kept.start, 0) if axis == 1 else (0, kept.start)
        sides = (len(kept), self.grid[2]) if axis == 1 else (self.grid[1], len(kept))
        stride = (step, 1) if axis == 1 else (1, step)
        kernel = Kernel({offset: eye(self.grid[0])}, self.grid, (self.grid[0], *sides), stride)
    return Operation([self.name], [kernel])


def _narrow(target: Grid, shapes: Any, self: Value, dim: int, start: int, length: int) -> Operation:
    _require(type(start) is int and type(length) is int and start >= 0 and length > 0, "start or length")
    return _slice(target, shapes, self, dim, start, start + length)


def _roll(target: Grid, shapes: Any, self: Value, shifts: Any, dims: Any) -> Operation:
    offset = [0, 0, 0]
    for shift, dim in zip(
        shifts if isinstance(shifts, list) else [shifts], dims if isinstance(dims, list) else [dims], strict=True
    ):
        _require(type(shift) is int, "shifts")
        offset[_axis(dim, shapes[self.name])] -= shift
    if offset[0] % self.grid[0]:
        _require(offset[1:] == [0, 0], "a roll along channels and positions")
        return Operation(
            [self.name], [Kernel({(0, 0): np.roll(eye(self.grid[0]), -offset[0], 0)}, self.grid, self.grid)]
        )
    where = (offset[1] % self.grid[1], offset[2] % self.grid[2])
    return Operation([self.name], [Kernel({where: eye(self.grid[0])}, self.grid, self.grid, wraps=True)])


def _cat(target: Grid, shapes: Any, tensors: list[Value], dim: int = 0) -> Operation:
    _require(all(isinstance(x, Value) for x in tensors) and bool(tensors), "a constant among its arguments")
    _require(_axis(dim, shapes[tensors[0].name]) == 0, "a concatenation along positions")
    return Operation([x.name for x in tensors], placements([x.grid for x in tensors]))


def _pad(
    target: Grid, shapes: Any, self: Value, pad: list[int], mode: str = "constant", value: Any = None
) -> Operation:
    _require(mode in ("constant", "circular") and value in (None, 0), f"padding with {mode!r}")
    _require(len(pad) in (2, 4) and len(shapes[self.name]) == 4 and all(type(p) is int for p in pad), "pad")
    left, right, top, bottom = (*pad, 0, 0)[:4]
    sides = (self.grid[1] + top + bottom, self.grid[2] + left + right)
    _require(min(sides) > 0, "pad")
    wraps = mode == "circular"
    return Operation(
        [self.name],
        [Kernel({(-top, -left): eye(self.grid[0])}, self.grid, (self.grid[0], *sides), wraps=wraps)],
    )


def _sum(sign: float) -> Callable[..., Operation]:
    def operator(target: Grid, shapes: Any, self: Any, other: Any, alpha: float = 1) -> Operation:
        _require(type(alpha) in (int, float), "alpha")
        inputs, kernels, offset = [], [], np.zeros(1)
        for x, factor in ((self, 1.0), (other, sign * alpha)):
            if isinstance(x, Value):
                _require(x.grid == target, "broadcasting")
                inputs.append(x.name)
                kernels.append(Kernel({(0, 0): factor * eye(x.grid[0])}, x.grid, x.grid))
            else:
                _require(factor in (-1.0, 1.0) and not offset.any(), "a multiple of a constant")
                value = self if isinstance(self, Value) else other
                _require(isinstance(value, Value), "a sum of constants")
                offset = factor * _spread(x, shapes[value.name], target)
        return Operation(inputs, kernels, offset)

    return operator


def _spread(constant: Any, shape: Sequence[int], target: Grid) -> Array:
    """Return a number or a tensor that broadcasts to a value as an array (c, h, w)."""
    _require(type(constant) in (int, float, np.ndarray), "a constant")
    array = np.asarray(constant, dtype=np.float64)
    _require(np.broadcast_shapes(array.shape, tuple(shape)) == tuple(shape), "the shape of a constant")
    return np.broadcast_to(array, tuple(shape)).reshape(target)


def _product(target: Grid, shapes: Any, self: Any, other: Any) -> Operation:
    x, constant = (self, other) if isinstance(self, Value) else (other, self)
    _require(isinstance(x, Value) and not isinstance(constant, Value), "a product of two values")
    factors = _spread(constant, shapes[x.name], target)
    _require(bool((factors == factors[:, :1, :1]).all()), "a factor for each position")
    eye(target[0])  # refuses too many
    return Operation([x.name], [Kernel({(0, 0): np.diag(factors[:, 0, 0])}, x.grid, target)])


def _center(target: Grid, shapes: Any, x: Value, dims: list[int]) -> Operation:
    _require(isinstance(dims, list) and [_axis(d, shapes[x.name]) for d in dims] == [0], "centring over positions")
    matrix = eye(target[0]) - 1.0 / target[0]
    error = 2 * UNIT * frobenius(matrix) + 2 * UNIT  # of 1/c and of the difference
    return Operation([x.name], [Kernel({(0, 0): matrix}, x.grid, x.grid, error=error)])


def _average(
    target: Grid, shapes: Any, self: Value, kernel_size: Any, stride: Any = None, padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None,
) -> Operation:  # fmt: skip
    k, p = _pair(kernel_size, (1, 1)), _pair(padding, (0, 0))
    s = _pair(stride, k)
    _require(ceil_mode is False and divisor_override is None and (count_include_pad is True or p == (0, 0)), "options")
    _require(min(*k, *s) > 0, "sizes")
    c, h, w = self.grid
    out = (c, (h + 2 * p[0] - k[0]) // s[0] + 1, (w + 2 * p[1] - k[1]) // s[1] + 1)
    part = eye(c) / (k[0] * k[1])
    taps = {(a - p[0], b - p[1]): part for a, b in np.ndindex(*k)}
    return Operation([self.name], [Kernel(taps, self.grid, out, s, error=UNIT * math.sqrt(c) * UP)])


def _global_average(target: Grid, shapes: Any, self: Value, output_size: Any) -> Operation:
    _require(_pair(output_size, (0, 0)) == (1, 1), "output_size")
    return _average(target, shapes, self, list(self.grid[1:]))


def _mean(
    target: Grid, shapes: Any, self: Value, dim: list[int], keepdim: bool = False, dtype: None = None
) -> Operation:
    _require(sorted(_axis(d, shapes[self.name]) for d in dim) == [1, 2] and dtype is None, "dim")
    return _average(target, shapes, self, list(self.grid[1:]))


def _unshuffle(target: Grid, shapes: Any, self: Value, downscale_factor: int) -> Operation:
    (c, h, w), r = self.grid, downscale_factor
    _require(type(r) is int and 0 < r <= min(h, w) and h % r == 0 and w % r == 0, "downscale_factor")
    taps = {}
    for t in np.ndindex(r, r):
        tap = np.zeros((c, r * r, c))
        tap[:, t[0] * r + t[1]] = eye(c)
        taps[t] = tap.reshape(c * r * r, c)
    return Operation([self.name], [Kernel(taps, self.grid, (c * r * r, h // r, w // r), (r, r))])


def _maxmin(target: Grid, shapes: Any, a: Value, b: Value, dim: int, flipped: bool, stacked: bool) -> Operation:
    """max and min of two values: (a, b) -> (max, min) swaps or keeps each pair, so it is 1-Lipschitz together."""
    _require(
        a.grid == b.grid and stacked is False and type(flipped) is bool and _axis(dim, shapes[a.name]) == 0,
        "this arrangement",
    )

    def sort(x: Array, y: Array) -> Array:
        pair = [np.maximum(x, y), np.minimum(x, y)]
        return np.concatenate(pair[::-1] if flipped else pair, axis=1)

    return Operation([a.name, b.name], function=sort)


def _entrywise(
    function: Callable[[Array], Array], constant: float, units: int = 0, absolute: bool = False
) -> Callable[..., Operation]:
    def operator(target: Grid, shapes: Any, self: Value) -> Operation:
        return Operation([self.name], function=function, constant=constant, units=units, absolute=absolute)

    return operator


def _leaky(target: Grid, shapes: Any, self: Value, negative_slope: float = 0.01) -> Operation:
    _require(type(negative_slope) in (int, float), "negative_slope")
    slope = max(1.0, abs(negative_slope))
    return Operation([self.name], function=lambda x: np.where(x > 0, x, x * negative_slope), constant=slope, units=1)


def _clamp(target: Grid, shapes: Any, self: Value, min_val: float = -1.0, max_val: float = 1.0) -> Operation:
    _require(type(min_val) in (int, float) and type(max_val) in (int, float) and min_val <= max_val, "limits")
    return Operation([self.name], function=lambda x: np.clip(x, min_val, max_val))


def _flatten(target: Grid, shapes: Any, self: Value, start_dim: int = 0, end_dim: int = -1) -> Operation:
    _require(start_dim == 1 and end_dim in (-1, len(shapes[self.name]) - 1), "start_dim or end_dim")
    return _view(self, target)


def _same(target: Grid, shapes: Any, self: Value, **ignored: Any) -> Operation:
    return _view(self, target)


AFFINE: dict[str, Callable[..., Operation]] = {
    "aten.conv2d.default": _conv,
    "aten.linear.default": _linear,
    "aten.slice.Tensor": _slice,
    "aten.narrow.default": _narrow,
    "aten.roll.default": _roll,
    "aten.cat.default": _cat,
    "aten.pad.default": _pad,
    "aten.add.Tensor": _sum(1.0),
    "aten.sub.Tensor": _sum(-1.0),
    "aten.mul.Tensor": _product,
    "lipcert.center": _center,
    "aten.avg_pool2d.default": _average,
    "aten.adaptive_avg_pool2d.default": _global_average,
    "aten.mean.dim": _mean,
    "aten.pixel_unshuffle.default": _unshuffle,
    "aten.flatten.using_ints": _flatten,
    **dict.fromkeys(
        (
            "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default",
            "aten.clone.default", "aten.contiguous.default", "aten.alias.default", "aten.squeeze.dims",
        ),
        _same,
    ),
}  # fmt: skip
IMAGES = ("aten.conv2d.default", "aten.avg_pool2d.default", "aten.adaptive_avg_pool2d.default",
          "aten.pixel_unshuffle.default")  # fmt: skip
EQUAL = ("aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor")
FUNCTIONS: dict[str, tuple[str, Callable[..., Operation]]] = {  # with the rule that a step calls them by
    "lipcert.maxmin": ("MaxMin", _maxmin),
    "aten.relu.default": ("relu", _entrywise(lambda x: np.maximum(x, 0.0), 1.0)),
    "aten.abs.default": ("abs", _entrywise(np.abs, 1.0)),
    "aten.leaky_relu.default": ("leaky_relu", _leaky),
    "aten.hardtanh.default": ("hardtanh", _clamp),
    "aten.tanh.default": ("tanh", _entrywise(np.tanh, 1.0, 8, True)),
    "aten.sigmoid.default": ("sigmoid", _entrywise(lambda x: 0.5 + 0.5 * np.tanh(0.5 * x), 0.25, 8, True)),
}


class Program:
    """The list of operators, read and understood node by node; what cannot be understood is refused when it is used."""

    def __init__(self, record: Any, tensors: Mapping[str, Array]) -> None:
        only(record, ("schema", "input", "output", "nodes", "sha256"), "program")
        if take(record, "schema", int, "program") != SCHEMA:
            raise Rejected(f"program: schema {record['schema']} is not {SCHEMA}, the one that this checker knows")
        self.tensors = tensors
        self.nodes: dict[str, dict[str, Any]] = {}
        self.input, self.output = take(record, "input", str, "program"), take(record, "output", str, "program")
        for i, node in enumerate(take(record, "nodes", list, "program")):
            name = take(node, "name", str, f"node {i}")
            where = f"node {i} ({name})"
            only(node, ("name", "op", "shape", "arguments", "output"), where)
            if name in self.nodes:
                raise Rejected(f"{where}: the name appears twice")
            shape = take(node, "shape", list, where)
            if not all(type(side) is int for side in shape):
                raise Rejected(f"{where}: 'shape' is malformed")
            if (take(node, "op", str, where) == "input") != (i == 0) or (i == 0) != (name == self.input):
                raise Rejected(f"{where}: the input is the first node, and no other")
            for argument in _leaves(take(node, "arguments", dict, where)):
                if "value" in argument and argument["value"] not in self.nodes:
                    raise Rejected(f"{where}: the value {argument['value']!r} is not that of an earlier node")
                if "tensor" in argument and argument["tensor"] not in tensors:
                    raise Rejected(f"{where}: there is no tensor {argument['tensor']!r}")
            self.nodes[name] = node
        if self.output not in self.nodes:
            raise Rejected(f"program: there is no node {self.output!r}")
        self.order = {name: i for i, name in enumerate(self.nodes)}
        self.shapes = {name: node["shape"] for name, node in self.nodes.items()}
        self._operations: dict[str, Operation] = {}
        self._paths: dict[tuple[str, ...], float] = {}

    def grid(self, name: str) -> Grid:
        return grid_of(self.shapes[name])

    def is_affine(self, name: str) -> bool:
        return self.nodes[name]["op"] in AFFINE

    def operation(self, name: str) -> Operation:
        """Return what a node computes; Rejected with the name of its operator if this is not known."""
        if name in self._operations:
            return self._operations[name]
        node = self.nodes[name]
        known = AFFINE.get(node["op"]) or FUNCTIONS.get(node["op"], (None, None))[1]
        try:
            _require(known is not None and node.get("output") is None, "it is not known here")
            assert known is not None
            target = self.grid(name)
            arguments = {key: self._argument(value) for key, value in node["arguments"].items()}
            made = known(target, self.shapes, **arguments)
            if made.function is None:
                _require(bool(made.inputs) and all(k.target == target for k in made.kernels), "the shape of the result")
                before = [self.shapes[x] for x in made.inputs]
                _require(node["op"] not in IMAGES or all(len(s) == 4 for s in before), "an argument that is no image")
                _require(node["op"] not in EQUAL or all(s == node["shape"] for s in before), "broadcasting")
            else:
                grids = [self.grid(x) for x in made.inputs]
                _require(target == (sum(g[0] for g in grids), *grids[0][1:]), "the shape of the result")
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise Rejected(f"operator {node['op']} ({name}) cannot be rechecked: arguments ({error})") from error
        except Rejected as error:
            raise Rejected(f"operator {node['op']} ({name}) cannot be rechecked: {error}") from error
        self._operations[name] = made
        return made

    def _argument(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._argument(item) for item in value]
        if not isinstance(value, dict):
            return value
        if set(value) == {"value"}:
            return Value(value["value"], self.grid(value["value"]))
        if set(value) == {"tensor"}:
            _require(self.tensors[value["tensor"]].dtype == np.float64, "a tensor of integers")
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
            if self.order[name] < self.order[source] or not self.is_affine(name):
                raise Rejected(f"it is not an affine function of {source} alone, because of {name}")
            found.add(name)
            waiting.extend(self.operation(name).inputs)
        return sorted(found, key=self.order.__getitem__)

    def trace(self, values: Sequence[str], start: str, nodes: Sequence[str]) -> Kernel:
        """Return the linear map from `start` to the values, one above the other, through `nodes` (of `between`)."""
        maps = {start: identity(self.grid(start))}
        for name in nodes:
            if name == start:
                continue
            operation = self.operation(name)
            try:
                inputs = zip(operation.inputs, operation.kernels, strict=True)
                if parts := [compose(kernel, maps[x]) for x, kernel in inputs if x in maps]:
                    maps[name] = total(parts)
            except Rejected as error:
                raise Rejected(f"operator {self.nodes[name]['op']} ({name}) cannot be rechecked: {error}") from error
        missing = [name for name in values if name not in maps]
        if missing:
            raise Rejected(f"{missing[0]} does not depend on {start}")
        return maps[values[0]] if len(values) == 1 else stack([maps[name] for name in values])

    def path(self, values: Sequence[str], start: str, nodes: Sequence[str]) -> float:
        """Return a cheap bound of the norm of the map from a node to values."""
        key = (start, *values, *nodes[:1])
        if key not in self._paths:
            self._paths[key] = cheap_norm(self.trace(values, start, nodes))
        return self._paths[key]


def _leaves(arguments: Any) -> Iterator[dict[str, Any]]:
    """Yield the references in the arguments of a node."""
    for argument in arguments.values() if isinstance(arguments, dict) else arguments:
        if isinstance(argument, dict):
            if not all(isinstance(name, str) for name in argument.values()):
                raise Rejected("program: an argument is malformed")
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
    arguments: Sequence[str]  # affine functions of the only source, or the sources; the value itself if it is affine
    nodes: Sequence[str]  # between the only source and the arguments


def prove(program: Program, proof: Any) -> tuple[list[Step], dict[str, float], list[str]]:
    """Confirm every step; return them, own bounds of the values, and the heads."""
    only(proof, ("steps", "upper", "heads"), "proof")
    claimed: dict[str, Fraction] = {program.input: Fraction(1)}
    bounds: dict[str, float] = {program.input: 1.0}
    steps = []
    for i, record in enumerate(take(proof, "steps", list, "proof")):
        where = f"step {i}"
        only(record, ("value", "rule", "sources", "factors", "joint", "bound", "method"), where)
        value, rule = take(record, "value", str, where), take(record, "rule", str, where)
        where = f"step {i} ({value}, {rule})"
        sources, factors = take(record, "sources", list, where), take(record, "factors", list, where)
        take(record, "method", str, where)
        joint, bound = take(record, "joint", bool, where), _number(record, "bound", where)
        if value not in program.nodes or value in bounds:
            raise Rejected(f"{where}: the value is no node, or was bounded before")
        if not sources or len(sources) != len(factors):
            raise Rejected(f"{where}: sources and factors do not correspond")
        for source in sources:
            if not isinstance(source, str) or source not in claimed:
                raise Rejected(f"{where}: the source {source!r} is not the input or the value of an earlier step")
        numbers = [_number({"factor": factor}, "factor", where) for factor in factors]
        try:
            step = _confirm(program, value, rule, sources, numbers, joint)
        except Rejected as error:
            raise Rejected(f"{where}: {error}") from error
        parts = [Fraction(f) * claimed[s] for f, s in zip(numbers, sources, strict=True)]
        squared = sum(p * p for p in parts) if joint else sum(parts) ** 2
        if Fraction(bound) ** 2 < squared:
            raise Rejected(f"{where}: the bound {bound!r} is below what its factors give, {math.sqrt(squared)!r}")
        claimed[value] = Fraction(bound)
        own = [f * bounds[s] for f, s in zip(step.factors, sources, strict=True)]
        bounds[value] = (math.hypot(*own) if joint else sum(own)) * (1.0 if step.factors == [1.0] else UP)
        steps.append(step)
    if program.output not in claimed:
        raise Rejected("proof: no step bounds the output")
    upper = _number(proof, "upper", "proof")
    if Fraction(upper) < claimed[program.output]:
        raise Rejected(f"proof: upper {upper!r} is below the bound of the output")
    heads = take(proof, "heads", list, "proof")
    for head in heads:
        if not isinstance(head, str) or head not in bounds:
            raise Rejected(f"proof: the head {head!r} has no step")
    return steps, bounds, heads


def _number(record: Any, key: str, where: str) -> float:
    value = take(record, key, (int, float), where)
    if not 0 <= value < math.inf:
        raise Rejected(f"{where}: {key} {value!r} is not a finite number from 0")
    return float(value)


def _confirm(
    program: Program, value: str, rule: str, sources: Sequence[str], claimed: Sequence[float], joint: bool
) -> Step:
    """Find own factors for a step and compare; Rejected without saying where."""
    op = program.nodes[value]["op"]
    nodes: Sequence[str] = ()
    if rule == "chain":
        raise Rejected("bounds of chains of affine maps and activations cannot be rechecked yet")
    if rule == "affine":
        _require(len(sources) == 1, "an affine function has one source")
        arguments: Sequence[str] = [value]
        nodes = program.between(arguments, sources[0])
        factors = [norm(program.trace(arguments, sources[0], nodes))]
    elif op in FUNCTIONS:
        _require(rule == FUNCTIONS[op][0], f"the operator of the value is {op}, which is not called {rule!r}")
        operation = program.operation(value)
        arguments = operation.inputs
        if len(sources) == 1 and list(sources) != list(arguments):
            nodes = program.between(arguments, sources[0])
            factors = [norm(program.trace(arguments, sources[0], nodes))]
            factors = [f if operation.constant == 1.0 else f * operation.constant * UP for f in factors]
        else:
            _require(list(sources) == list(arguments), "the sources are not its arguments in order")
            factors = [operation.constant] * len(sources)
    elif program.is_affine(value):
        operation = program.operation(value)
        arguments = operation.inputs
        names = {"aten.add.Tensor": "add", "aten.sub.Tensor": "sub", "aten.cat.default": "cat"}
        _require(op in names and rule == names[op], f"the operator of the value is {op}, which is not called {rule!r}")
        _require(list(sources) == list(arguments), "the sources are not its arguments in order")
        factors = [norm(kernel) for kernel in operation.kernels]
        if joint:
            _require(op == "aten.cat.default", "only what is side by side counts jointly")
    else:
        program.operation(value)  # says that it is not known
        raise Rejected(f"operator {op} cannot be rechecked")
    for factor, own in zip(claimed, factors, strict=True):
        if not own <= factor:
            raise Rejected(f"the factor {factor!r} is below {own!r}, which is what can be proved")
    return Step(value, sources, factors, joint, claimed, arguments, nodes)


def pairwise(program: Program, bounds: Mapping[str, float], heads: Sequence[str]) -> tuple[Array, dict[str, Array]]:
    """Return own bounds L (k, k) of z_i - z_j, and for each head the distances ‖w_i - w_j‖ (k, k)."""
    k, *position = program.grid(program.output)
    if position != [1, 1] or k < 2:
        raise Rejected("the output is not a vector of logits")
    best = np.full((k, k), math.sqrt(2) * bounds[program.output] * UP)
    distances = {}
    for head in heads:
        try:
            _require(head != program.output, "it is the output itself")
            kernel = program.trace([program.output], head, program.between([program.output], head))
        except Rejected as error:
            raise Rejected(f"proof: the head {head!r}: {error}") from error
        rows = rows_of(kernel)
        distances[head] = (np.stack([_norms(rows - row) for row in rows]) + 2 * kernel.error) * UP
        best = np.minimum(best, bounds[head] * distances[head] * UP)
    return best, distances


# ---------------------------------------------------------------------------------------------------------------- rows


def evaluate(
    program: Program, steps: Sequence[Step], heads: Sequence[str], images: Array
) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
    """Return logits (n, k), l2 bounds E (n,) of their errors, and (error, what arises after it) for heads.

    At each node, something arises: for Σ_j B_j x_j + b, by rounding t terms at most gamma(t)(Σ_j|B_j||x_j| + |b|)
    entry by entry, and ‖B_j computed - B_j‖‖x_j‖; nothing if entries are only moved. What arises at a node of a step
    reaches its value through the linear map between them (bounded by row and column sums), what the source of the step
    brings through the proved factor:

        e(value) ≤ Σ_i factor_i e(source_i) + constant Σ_(nodes n between) ‖n -> arguments‖ arisen(n) + arisen(value).
    """
    results: dict[str, Array] = {program.input: images}
    arisen: dict[str, Array] = {program.input: np.zeros(len(images))}
    for name in program.nodes:
        if name == program.input:
            continue
        operation = program.operation(name)
        xs = [results[x] for x in operation.inputs]
        if operation.function is not None:
            results[name] = operation.function(*xs)
            scale = math.sqrt(results[name][0].size) if operation.absolute else _norms(results[name])
            arisen[name] = operation.units * UNIT * scale * np.ones(len(images))
            continue
        offset = operation.offset
        moved = not np.any(offset) and sum(k.terms for k in operation.kernels) <= 1
        disjoint = program.nodes[name]["op"] == "aten.cat.default"
        value, majorant = np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1, 1))
        terms, inexact = 1 + len(xs), np.zeros(len(images))
        exact = (moved or (disjoint and not np.any(offset))) and all(k.selects for k in operation.kernels)
        for kernel, x in zip(operation.kernels, xs, strict=True):
            part, roundings = apply(kernel, x)
            value = value + part
            if not exact:
                magnitudes = replace(kernel, taps={t: np.abs(tap) for t, tap in kernel.taps.items()})
                majorant = majorant + apply(magnitudes, np.abs(x))[0]
                terms += roundings
                inexact = inexact + kernel.error * _norms(x)
        results[name] = value + offset
        if exact:
            arisen[name] = np.zeros(len(images))
        else:
            arisen[name] = (gamma(terms + 2) * _norms(majorant + np.abs(offset)) * (1 + 1e-6) + inexact) * UP
    errors: dict[str, Array] = {program.input: np.zeros(len(images))}

    def inside(arguments: Sequence[str], nodes: Sequence[str]) -> Array:
        found = np.zeros(len(images))
        for name in nodes:
            if arisen[name].any():
                found = found + program.path(arguments, name, nodes) * arisen[name]
        return found

    for step in steps:
        brought = [f * errors[s] for f, s in zip(step.factors, step.sources, strict=True)]
        error = np.sqrt(np.sum(np.square(brought), axis=0)) if step.joint else np.sum(brought, axis=0)
        constant = 1.0
        if step.arguments != [step.value]:
            constant = program.operation(step.value).constant
            error = error + arisen[step.value]
        if step.nodes:
            error = error + constant * inside(step.arguments, step.nodes)
        errors[step.value] = error * UP
    after = {}
    for head in heads:
        after[head] = errors[head], inside([program.output], program.between([program.output], head)) * UP
    logits = results[program.output].reshape(len(images), -1)
    return logits, errors[program.output], after


def _norms(x: Array) -> Array:
    """Return upper bounds of the l2 norms of the entries of a batch."""
    flat = x.reshape(len(x), -1)
    return np.sqrt(np.square(flat).sum(1)) * (1 + gamma(flat.shape[1] + 8)) + 1e-150


@dataclass(frozen=True)
class Row:
    """The claims of one row of certificates.tsv."""

    idx: int
    label: int
    predict: int
    radius: float
    correct: int
    margin: float
    error: float
    image: str


def read_rows(path: Path, n: int, classes: int, largest: float) -> list[Row]:
    """Read the rows and check what can be checked without images."""
    if path.stat().st_size > 1 << 30:
        raise Rejected(f"{path.name} is larger than {1 << 30} bytes")
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    if lines[0] != "\t".join(COLUMNS) or lines[-1] != "":
        raise Rejected(f"{path.name}: the header or the last line is damaged")
    if len(lines) - 2 != n:
        raise Rejected(f"{path.name}: there are {len(lines) - 2} rows, not {n} as certificate.json says")
    rows = []
    for i, line in enumerate(lines[1:-1]):
        where = f"row {i}"
        cells = line.split("\t")
        try:
            _require(len(cells) == len(COLUMNS), "its cells")
            idx, label, predict, correct = (int(cells[k]) for k in (0, 1, 2, 4))
            row = Row(idx, label, predict, float(cells[3]), correct, float(cells[6]), float(cells[7]), cells[8])
        except (ValueError, Rejected) as error:
            raise Rejected(f"{where}: malformed ({error})") from error
        if row.idx != i:
            raise Rejected(f"{where}: its idx is {row.idx}")
        if not 0 <= row.radius <= largest:
            raise Rejected(
                f"{where}: the radius {row.radius!r} is negative, no number, or beyond the domain's diameter"
            )
        if row.correct != int(row.predict == row.label):
            raise Rejected(f"{where}: correct is {row.correct}, with label {row.label} and prediction {row.predict}")
        if row.radius > 0 and not (0 <= row.predict < classes and row.margin > 0 and 0 <= row.error < math.inf):
            raise Rejected(f"{where}: a radius without a prediction, a margin or an error")
        if not re.fullmatch("[0-9a-f]{64}", row.image):
            raise Rejected(f"{where}: the SHA-256 of the image is malformed")
        rows.append(row)
    return rows


def check_rows(
    program: Program, steps: Sequence[Step], heads: Sequence[str], lipschitz: Array, distances: Mapping[str, Array],
    rows: Sequence[Row], images: Array, domain: tuple[float, float],
) -> None:  # fmt: skip
    """Confirm rows with their images (n, c, h, w) float64: own logits, own errors, own radii."""
    for row, image in zip(rows, images, strict=True):
        if hashlib.sha256(np.ascontiguousarray(image, dtype="<f8").tobytes()).hexdigest() != row.image:
            raise Rejected(f"row {row.idx}: the image has another SHA-256")
        if not ((image >= domain[0]) & (image <= domain[1])).all():
            raise Rejected(f"row {row.idx}: the image is outside the domain {list(domain)}")
    with np.errstate(all="ignore"):
        logits, whole, after = evaluate(program, steps, heads, images)
    for i, row in enumerate(rows):
        z, p = logits[i], row.predict
        if row.radius == 0:
            continue
        if not np.isfinite(z).all() or not np.isfinite(whole[i]):
            raise Rejected(f"row {row.idx}: the logits or their errors are not finite")
        if int(np.argmax(z)) != p:
            raise Rejected(f"row {row.idx}: the prediction is {int(np.argmax(z))}, not {p}")
        doubt = np.full(len(z), 2 * whole[i])
        for head, (before, since) in after.items():
            doubt = np.minimum(doubt, before[i] * distances[head][p] + math.sqrt(2) * since[i])
        gaps = z[p] - z - doubt * UP - 4 * UNIT * (np.abs(z) + abs(z[p]))
        others = np.arange(len(z)) != p
        ordinary = others & (lipschitz[p] > 0)
        if not (gaps[others] > 0).all():
            raise Rejected(f"row {row.idx}: the margin is not above the rounding error")
        radius = float((gaps[ordinary] / lipschitz[p][ordinary]).min(initial=math.inf)) * (1 - 2.0**-50)
        if not row.radius <= radius:
            raise Rejected(f"row {row.idx}: the radius {row.radius!r} is above {radius!r}, which is what can be proved")
        margin = float((z[p] - z)[others].min())
        if abs(row.margin - margin) > 2 * (row.error + whole[i]) * UP + 1e-15 * abs(margin):
            raise Rejected(f"row {row.idx}: the margin {row.margin!r} is not {margin!r}")


# ---------------------------------------------------------------------------------------------------------- everything


@dataclass(frozen=True)
class Report:
    """What was found. `reason` is empty if everything that was looked at holds."""

    accepted: bool
    reason: str
    steps: int = 0  # confirmed
    rows: int = 0  # read, and consistent in themselves
    images: int = 0  # rows confirmed with their images
    upper: float = math.nan  # own bound of the output
    claimed: float = math.nan
    note: str = ""
    own: Sequence[tuple[str, float, float]] = ()  # value, own factor, claimed factor

    def __str__(self) -> str:
        if not self.accepted:
            return self.reason
        bound = f"{self.steps} steps confirmed: L = {self.upper:.9g} (claimed {self.claimed:.9g})"
        return f"{bound}; {self.images} of {self.rows} radii confirmed" + (f"; {self.note}" if self.note else "")


def check(
    certificate: Path, *, weights: Path | None = None, images: Array | None = None, batch_size: int = 50,
    progress: Callable[[int], None] = lambda done: None,
) -> Report:  # fmt: skip
    """Check a certificate, and the rows 0 … n-1 for `images` (n, c, h, w) as far as they are given.

    `weights` is program.safetensors, by default the one beside the certificate; no path in the files is followed.
    Raises OSError for files that are not there. What does not hold, or cannot be judged, is the `reason` of the report.
    """
    folder = certificate.parent
    try:
        record = read_json(certificate)
        facts = _facts(record)
        program_record = take(record, "program", dict, "certificate")
        sha256 = take(program_record, "sha256", str, "program")
        tensors = read_tensors(weights or folder / "program.safetensors", sha256)
        program = Program(program_record, tensors)
        if program.shapes[program.input] != [1, *facts.shape]:
            raise Rejected(f"the input of the program is not an image {list(facts.shape)}, as input_shape says")
        proof = take(record, "proof", dict, "certificate")
        steps, bounds, heads = prove(program, proof)
        lipschitz, distances = pairwise(program, bounds, heads)
        low, high = facts.domain
        largest = (high - low) * math.sqrt(math.prod(facts.shape)) * UP
        rows = read_rows(folder / "certificates.tsv", facts.n, len(lipschitz), largest)
        apart = lipschitz + np.where(np.eye(len(lipschitz)), math.inf, 0.0)
        for row in rows:
            if row.radius > 0 and row.radius * float(apart[row.predict].min()) > row.margin * UP:
                raise Rejected(f"row {row.idx}: the radius {row.radius!r} is above its margin over any constant")
        checked, note = 0, ""
        if facts.precision != "float64":
            note = f"radii of {facts.precision} programs are not rechecked yet"
        elif images is None:
            note = "without images, only the proof and the arithmetic of the rows were checked"
        else:
            if images.ndim != 4 or images.shape[1:] != facts.shape:
                raise Rejected(f"the images are {list(images.shape[1:])}, not {list(facts.shape)}")
            if len(images) > len(rows):
                raise Rejected(f"there are {len(images)} images, but {len(rows)} rows")
            for start in range(0, len(images), batch_size):
                part = images[start : start + batch_size].astype(np.float64)
                part_rows = rows[start : start + len(part)]
                check_rows(program, steps, heads, lipschitz, distances, part_rows, part, facts.domain)
                checked += len(part)
                progress(len(part))
    except Rejected as error:
        return Report(False, str(error))
    except (RecursionError, MemoryError, OverflowError, np.linalg.LinAlgError) as error:
        return Report(False, f"the certificate is too large to be rechecked ({type(error).__name__})")
    own = [(s.value, f, c) for s in steps for f, c in zip(s.factors, s.claimed, strict=True)]
    upper = _number(proof, "upper", "proof")
    return Report(True, "", len(steps), len(rows), checked, bounds[program.output], upper, note, own)


@dataclass(frozen=True)
class Facts:
    """What a certificate says that it is about."""

    shape: Grid
    domain: tuple[float, float]
    n: int
    precision: str


def _facts(record: Any) -> Facts:
    shape = take(record, "input_shape", list, "certificate")
    domain = take(record, "domain", list, "certificate")
    if len(shape) != 3 or not all(type(side) is int and 0 < side < 1 << 16 for side in shape):
        raise Rejected(f"certificate: input_shape {shape} is no shape of an image")
    if len(domain) != 2 or not all(type(x) in (int, float) for x in domain) or not domain[0] < domain[1]:
        raise Rejected(f"certificate: domain {domain} is no interval")
    precision = take(record, "precision", str, "certificate")
    if precision not in ("float64", "float32") or take(record, "norm", str, "certificate") != "l2":
        raise Rejected("certificate: precision or norm is not one that this checker knows")
    n = take(record, "n", int, "certificate")
    return Facts((shape[0], shape[1], shape[2]), (float(domain[0]), float(domain[1])), n, precision)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check from the command line: 0 if everything holds, 3 if not, 2 if files are missing."""
    parser = argparse.ArgumentParser(description="Re-prove a certificate of lipcert with NumPy alone.")
    parser.add_argument("certificate", type=Path, help="certificate.json")
    parser.add_argument("--weights", type=Path, help="program.safetensors, if it is not beside the certificate")
    parser.add_argument("--images", type=Path, help="safetensors file with one tensor (n, c, h, w): the first n images")
    options = parser.parse_args(arguments)
    try:
        images = None
        if options.images is not None:
            from safetensors.numpy import load_file

            (images,) = load_file(options.images).values()
        report = check(options.certificate, weights=options.weights, images=images)
    except (OSError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(report if report.accepted else f"does not verify: {report.reason}")
    return 0 if report.accepted else 3


if __name__ == "__main__":
    sys.exit(main())
