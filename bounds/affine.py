"""Affine maps between values of a network, kept in symbolic form so that a whole segment is bounded as one operator.

An `AffineMap` is the linear part of

    y[i] = Σ_t K_t x[s·i + δ_t] + const,     0 ≤ i < out (two spatial axes),      K_t a c_out × c_in matrix (per group),

where x is read as zero outside its grid of n positions, or periodically (`wrap`). Write it R T E: E puts x into the
plane (zeros around it, or periodic copies), T is a strided convolution of the plane, R keeps the positions i < out.

*Sums.* R T₁ E + R T₂ E = R (T₁ + T₂) E whenever grid, stride and output agree: the identity shortcut, pointwise maps
and one convolution are one kernel. A map that reads only inside its grid has the same E either way, so it also adds to
a periodic one.

*Composition.* (R₂ T₂ E₂)(R₁ T₁ E₁) = R₂ (T₂ T₁) E₁ if and only if what R₁ cuts off is never read or is zero. Per axis,
let A be the positions where T₁ E₁ can be nonzero and B those that R₂ T₂ reads: A ∩ B ⊆ [0, out₁) is enough. Pointwise
maps pass on either side, crops and zero pads where they lose nothing; two zero-padded 3×3 convolutions do not, and
`compose` returns None: the truncation between them is not a compression. For periodic maps see `_join`.

Kernels are float64 and composed in floating point: `error` bounds ‖exact - stored‖ in the operator norm. With S(M) an
upper bound of ‖|M|‖ (Schur test: √(largest row sum · largest column sum)), for sums and products of length n

    ‖fl(M₂M₁) - M₂M₁‖ ≤ γ_n S(M₂) S(M₁),       ‖fl(M₁ + M₂) - (M₁ + M₂)‖ ≤ u (S(M₁) + S(M₂)) (1 + u).

Source of the sums and compositions: docs/bounds.md 2 and 3; Higham, chapter 3, for γ_n.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lipcert.bounds.convolution import correlation_norm
from lipcert.bounds.core import Bound
from lipcert.bounds.matrix import resolve, scaled
from lipcert.bounds.rounding import add_up, enlarge, gamma, mul_up, scale_up, sqrt_up
from lipcert.bounds.symbol import Axis, Correlation

Pair = tuple[int, int]
LARGEST = 2**24  # entries of a composed kernel; a larger one closes the segment instead
UNDERFLOW = 2.0**-1000  # more than all underflows of one composition


@dataclass(frozen=True, eq=False)
class AffineMap:
    """Hold taps (T, groups, c_out/groups, c_in/groups) at distinct shifts δ, both grids, stride and wrap."""

    taps: Tensor
    shifts: tuple[Pair, ...]
    n: Pair
    out: Pair
    stride: Pair = (1, 1)
    wrap: tuple[bool, bool] = (False, False)
    error: float = 0.0

    @property
    def groups(self) -> int:
        return self.taps.shape[1]

    @property
    def c_out(self) -> int:
        return self.taps.shape[1] * self.taps.shape[2]

    @property
    def c_in(self) -> int:
        return self.taps.shape[1] * self.taps.shape[3]

    @property
    def size(self) -> int:
        """Return the number of output entries."""
        return self.c_out * self.out[0] * self.out[1]

    @property
    def diagonal(self) -> bool:
        """Return whether every tap multiplies channel by channel."""
        return self.taps.shape[2] == self.taps.shape[3] == 1

    @property
    def pointwise(self) -> bool:
        """Return whether output i depends on input i alone."""
        return self.shifts == ((0, 0),) and self.stride == (1, 1) and self.n == self.out

    @cached_property
    def identity(self) -> bool:
        return self.pointwise and self.diagonal and self.error == 0.0 and bool((self.taps == 1.0).all())

    @cached_property
    def selection(self) -> bool:
        """Return whether every output is one input or zero: products with such a map on the left round nothing."""
        if self.error or not bool(((self.taps == 0.0) | (self.taps == 1.0)).all()):
            return False
        return bool((self.taps.sum((0, 3)) <= 1.0).all())

    @cached_property
    def magnitude(self) -> float:
        """Return S ≥ ‖|M|‖ ≥ ‖M‖ for the stored kernel: the Schur test, rows and columns summed over all taps."""
        absolute = self.taps.abs()
        entries = absolute != 0.0
        sums = []
        for dims in ((0, 3), (0, 2)):
            largest, terms = float(absolute.sum(dims).max()), int(entries.sum(dims).max())
            sums.append(largest if terms <= 1 else enlarge(largest, terms))
        return sqrt_up(mul_up(*sums, float(math.prod(_repeats(self, axis) for axis in (0, 1)))))

    def regrouped(self, groups: int) -> AffineMap:
        """Return the same map with fewer groups; `groups` divides the present number."""
        if groups == self.groups:
            return self
        count, present, rows, columns = self.taps.shape
        each = present // groups
        taps = self.taps.new_zeros(count, groups, each, rows, each, columns)
        blocks = self.taps.reshape(count, groups, each, rows, columns)
        for j in range(each):
            taps[:, :, j, :, j, :] = blocks[:, :, j]
        return replace(self, taps=taps.reshape(count, groups, each * rows, each * columns))

    def rows(self, index: Tensor) -> AffineMap | None:
        """Return the map that keeps the output channels `index` (any order, repeats allowed); None if too large."""
        if len(index) == self.c_out and bool((index == torch.arange(self.c_out, device=index.device)).all()):
            return self
        count, groups, rows, columns = self.taps.shape
        if count * len(index) * self.c_in > LARGEST:
            return None
        index = index.to(self.taps.device)
        group = torch.div(index, rows, rounding_mode="floor")
        taps = self.taps.new_zeros(count, len(index), groups, columns)
        taps[:, torch.arange(len(index), device=index.device), group] = self.taps[:, group, index % rows]
        repeats = float(torch.bincount(index).max())
        error = mul_up(self.error, sqrt_up(repeats)) if self.error else 0.0
        return replace(self, taps=taps.reshape(count, 1, len(index), self.c_in), error=error).trimmed()

    def scaled(self, factors: Tensor, roundings: int = 0) -> AffineMap:
        """Return diag(factors) · M, one or c_out of them, for exact factors within γ_roundings of those given."""
        factors = factors.to(self.taps).reshape(-1).expand(self.c_out)
        if roundings == 0 and bool((factors == 1.0).all()):
            return self
        taps = self.taps * factors.reshape(1, self.groups, -1, 1)
        scaled = replace(self, taps=taps, error=0.0)
        largest = enlarge(float(factors.abs().max()), roundings)
        mantissa = torch.frexp(factors)[0].abs()
        power = roundings == 0 and bool(((mantissa == 0.5) | (mantissa == 0.0)).all())  # 0 and ±2^k: nothing is rounded
        rounding = 0.0 if power else add_up(mul_up(gamma(roundings + 2), scaled.magnitude), UNDERFLOW)
        return replace(scaled, error=add_up(mul_up(self.error, largest), rounding))

    def trimmed(self) -> AffineMap:
        """Return the same map without taps that are zero or read nothing: it may now fuse with more."""
        used = self.taps.flatten(1).any(1).tolist()
        used = [
            u and all(_meets(self, shift, axis) for axis in (0, 1)) for u, shift in zip(used, self.shifts, strict=True)
        ]
        if all(used):
            return self
        keep = [t for t, u in enumerate(used) if u]
        if not keep:  # the zero map keeps one tap
            return replace(self, taps=torch.zeros_like(self.taps[:1]), shifts=((0, 0),))
        return replace(self, taps=self.taps[keep], shifts=tuple(self.shifts[t] for t in keep))

    def untangled(self) -> AffineMap:
        """Return the same map with one group per channel if its taps are diagonal matrices."""
        if self.groups > 1 or self.c_out != self.c_in or self.c_out == 1:
            return self
        diagonal = self.taps.diagonal(dim1=2, dim2=3)  # (T, 1, c)
        if int(self.taps.count_nonzero()) != int(diagonal.count_nonzero()):
            return self
        return replace(self, taps=diagonal.reshape(len(self.shifts), -1, 1, 1).contiguous())


def identity(channels: int, grid: Pair, device: torch.device | str = "cpu") -> AffineMap:
    """Return the identity on (channels, *grid)."""
    return AffineMap(torch.ones(1, channels, 1, 1, dtype=torch.float64, device=device), ((0, 0),), grid, grid)


def pointwise(matrix: Tensor, grid: Pair) -> AffineMap:
    """Return the map that multiplies the channels at every position by a matrix (c_out, c_in)."""
    return AffineMap(matrix.to(torch.float64)[None, None], ((0, 0),), grid, grid)


def add(a: AffineMap, b: AffineMap) -> AffineMap | None:
    """Return a + b, or None if the two do not read and write the same grids in the same way."""
    if (a.n, a.out, a.stride, a.c_in, a.c_out) != (b.n, b.out, b.stride, b.c_in, b.c_out):
        return None
    for axis in (0, 1):
        if a.wrap[axis] != b.wrap[axis] and not (_inside(a, axis) if b.wrap[axis] else _inside(b, axis)):
            return None
    groups = math.gcd(a.groups, b.groups)
    shifts = tuple(dict.fromkeys((*a.shifts, *b.shifts)))
    if len(shifts) * a.c_out * a.c_in // groups > LARGEST:
        return None
    taps = a.taps.new_zeros(len(shifts), groups, a.c_out // groups, a.c_in // groups)
    for term in (a.regrouped(groups), b.regrouped(groups)):
        taps[[shifts.index(shift) for shift in term.shifts]] += term.taps
    wrap = (a.wrap[0] or b.wrap[0], a.wrap[1] or b.wrap[1])
    rounding = mul_up(gamma(1), add_up(a.magnitude, b.magnitude)) if set(a.shifts) & set(b.shifts) else 0.0
    return replace(a, taps=taps, shifts=shifts, wrap=wrap, error=add_up(a.error, b.error, rounding)).trimmed()


def stack(maps: list[AffineMap]) -> AffineMap | None:
    """Return the map to the output channels of all the maps, one after the other, or None if grids differ."""
    first = maps[0]
    wrap = tuple(any(m.wrap[axis] for m in maps) for axis in (0, 1))
    for m in maps:
        if (m.n, m.out, m.stride, m.c_in) != (first.n, first.out, first.stride, first.c_in):
            return None
        if any(wrap[axis] and not m.wrap[axis] and not _inside(m, axis) for axis in (0, 1)):
            return None
    shifts = tuple(dict.fromkeys(shift for m in maps for shift in m.shifts))
    channels = sum(m.c_out for m in maps)
    if len(shifts) * channels * first.c_in > LARGEST:
        return None
    taps = first.taps.new_zeros(len(shifts), 1, channels, first.c_in)
    start = 0
    for m in maps:
        taps[[shifts.index(shift) for shift in m.shifts], :, start : start + m.c_out] = m.regrouped(1).taps
        start += m.c_out
    error = sqrt_up(add_up(*(mul_up(m.error, m.error) for m in maps)))
    joined = replace(first, taps=taps, shifts=shifts, wrap=(bool(wrap[0]), bool(wrap[1])), error=error)
    return joined.trimmed().untangled()


def compose(second: AffineMap, first: AffineMap) -> AffineMap | None:
    """Return second ∘ first as one map, or None if a truncation between them, or the size of the kernel, forbids it."""
    if first.out != second.n or first.c_out != second.c_in:
        raise ValueError(f"maps do not fit: {first.c_out} channels on {first.out} into {second.c_in} on {second.n}")
    if first.identity:
        return second
    if second.identity:
        return first
    joined = [_join(second, first, axis) for axis in (0, 1)]
    if None in joined:
        return None
    groups = math.gcd(second.groups, first.groups)
    (s, t) = first.stride
    moved = {
        (a, b): (s * second.shifts[a][0] + first.shifts[b][0], t * second.shifts[a][1] + first.shifts[b][1])
        for a in range(len(second.shifts))
        for b in range(len(first.shifts))
    }
    shifts = tuple(dict.fromkeys(moved.values()))
    if len(shifts) * second.c_out * first.c_in // groups > LARGEST:
        return None
    taps = _multiply(second, first, groups, moved, {shift: k for k, shift in enumerate(shifts)})
    length = second.taps.shape[3] * (second.groups // groups) * len(moved)
    rounding = 0.0
    if not second.selection:
        rounding = add_up(mul_up(gamma(length), second.magnitude, first.magnitude), UNDERFLOW)
    error = add_up(
        mul_up(second.magnitude, first.error), mul_up(second.error, add_up(first.magnitude, first.error)), rounding
    )
    return AffineMap(
        taps, shifts, first.n, second.out,
        stride=(first.stride[0] * second.stride[0], first.stride[1] * second.stride[1]),
        wrap=(bool(joined[0]), bool(joined[1])),
        error=error,
    ).trimmed()  # fmt: skip


def _multiply(second: AffineMap, first: AffineMap, groups: int, moved: dict, position: dict) -> Tensor:
    """Return the taps of the composition; diagonal factors scale rows or columns instead of becoming matrices."""
    pairs = [(position[shift], a, b) for (a, b), shift in moved.items()]
    shape = (len(position), groups, second.c_out // groups, first.c_in // groups)
    taps = first.taps.new_zeros(shape)
    if first.diagonal and not second.diagonal:
        for k, a, b in pairs:  # scale the columns of each tap
            taps[k] += second.taps[a] * first.taps[b].reshape(second.groups, 1, -1)
        return taps
    if second.diagonal:
        for k, a, b in pairs:  # scale the rows of each tap
            taps[k] += first.taps[b] * second.taps[a].reshape(first.groups, -1, 1)
        return taps
    left, right = second.regrouped(groups).taps, first.regrouped(groups).taps
    for k, a, b in pairs:
        taps[k] += left[a] @ right[b]
    return taps


# ------------------------------------------------------------------------------------------------------ grids and axes


def _reads(m: AffineMap, axis: int) -> Pair:
    """Return the first and the last position that the map reads along an axis, inside its grid or not."""
    shifts = [shift[axis] for shift in m.shifts]
    return min(shifts), max(shifts) + m.stride[axis] * (m.out[axis] - 1)


def _meets(m: AffineMap, shift: Pair, axis: int) -> bool:
    """Return whether a tap at this shift reads any position of the grid."""
    stride, delta = m.stride[axis], shift[axis]
    first = max(0, -(delta // stride))  # the least i ≥ 0 with stride·i + delta ≥ 0
    return m.wrap[axis] or (first < m.out[axis] and stride * first + delta < m.n[axis])


def _inside(m: AffineMap, axis: int) -> bool:
    """Return whether the map reads only positions of its grid, so that what surrounds the grid does not matter."""
    low, high = _reads(m, axis)
    return low >= 0 and high < m.n[axis]


def _join(second: AffineMap, first: AffineMap, axis: int) -> bool | None:
    """Return whether second ∘ first wraps along an axis, or None if the two do not fuse there.

    Let f be the formula of `first` evaluated at all integers. What `second` reads is f on [0, out₁) and, outside, zeros
    or the periodic continuation of f. The two fuse where that equals f on every position that is read:

    - only positions in [0, out₁) are read: always;
    - `second` reads zeros outside: f must vanish there: not wrapped, and A ∩ B ⊆ [0, out₁) with A the support of f;
    - `second` wraps: f, its own reads made periodic, must have the period out₁: stride · out₁ is a multiple of n, and
      `first` wraps or reads only inside its grid.
    """
    out = first.out[axis]
    low, high = _reads(second, axis)
    if low >= 0 and high < out:
        return first.wrap[axis]
    if second.wrap[axis]:
        periodic = first.stride[axis] * out % first.n[axis] == 0 and (first.wrap[axis] or _inside(first, axis))
        return True if periodic else None
    if first.wrap[axis]:
        return None
    shifts, stride, n = [shift[axis] for shift in first.shifts], first.stride[axis], first.n[axis]
    start, end = -(max(shifts) // stride), (n - 1 - min(shifts)) // stride  # A: the i with 0 ≤ stride·i + δ < n
    first_read, last_read = max(low, start), min(high, end)
    return False if first_read > last_read or (first_read >= 0 and last_read < out) else None


def _repeats(m: AffineMap, axis: int) -> int:
    """Return how often a periodic axis reads the same window; 1 where it does not wrap."""
    if not m.wrap[axis]:
        return 1
    return max(Counter(m.stride[axis] * i % m.n[axis] for i in range(m.out[axis])).values())


# -------------------------------------------------------------------------------------------- from a segment to a bound


def segment_bound(m: AffineMap, method: str = "auto") -> Bound:
    """Bound the operator norm of a map: the one place where the kernel of a whole segment meets the spectral bounds.

    The norm of the stored kernel is bounded by `lipcert.bounds.convolution`, on its exact torus where it wraps and as a
    compression otherwise, then `error` is added. Where a periodic axis reads some windows r times (circular padding
    kept as it is), the rows are a selection with multiplicity r of those of a torus map: factor √r.
    """
    m = m.trimmed().untangled()
    if not bool(m.taps.any()):
        return Bound(m.error, "upper", "zero")
    if m.magnitude <= float(m.taps.abs().max()) * (1.0 + 2.0**-40):  # selections and the like: no norm is smaller
        return Bound(add_up(m.magnitude, m.error), "upper", "row and column sums")
    repeats, stride, out = 1, list(m.stride), list(m.out)
    for axis in (0, 1):
        if m.wrap[axis] and m.stride[axis] * m.out[axis] != m.n[axis]:
            repeats *= _repeats(m, axis)
            stride[axis], out[axis] = 1, m.n[axis]
    taps, exponent = scaled(m.taps)
    axes = tuple(Axis(m.n[k], out[k], stride[k], m.wrap[k]) for k in (0, 1))
    bound = correlation_norm(Correlation(taps, torch.tensor(m.shifts), axes), resolve(method, taps))
    value = mul_up(scale_up(bound.value, exponent), sqrt_up(float(repeats)))
    name = bound.method if value <= m.magnitude else "row and column sums"
    return Bound(add_up(min(value, m.magnitude), m.error), "upper", name)
