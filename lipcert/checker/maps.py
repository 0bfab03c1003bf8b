"""Maps: the two forms in which a linear function of a value is held.

A `Kernel` multiplies the channels of a grid at offsets, as a convolution does. A `Map` moves and scales entries, of the
value itself or of what a kernel makes of it. Both are exactly the map that the program states, but for an error whose
norm is bounded and counted; what is of neither form is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .reading import ENTRIES, Array, Rejected, require
from .rounding import UP, frobenius, gamma

Grid = tuple[int, int, int]  # channels, height, width of one value
Pair = tuple[int, int]


@dataclass(frozen=True)
class Kernel:
    """A linear map of grids: out[:, y] = Σ_t taps[t] · in[:, stride·y + t] with two-dimensional y and t.

    Outside its grid `in` is zero, or, if the kernel is `periodic`, goes on as on a torus of the size of the grid. The
    taps may differ from the exact ones by Σ_t ‖·‖_F ≤ error, which also bounds the operator norm of the difference:
    taking entries of a shifted grid has norm at most 1, if none is taken twice (`phases`).
    """

    taps: Mapping[Pair, Array]  # each (c_out, c_in)
    source: Grid
    target: Grid
    stride: Pair = (1, 1)
    error: float = 0.0
    periodic: bool = False

    @property
    def size(self) -> float:
        """An upper bound of Σ_t ‖taps[t]‖_F, and so of the norm of the map of these taps; 0 if they are zero."""
        return sum(frobenius(tap) for tap in self.taps.values() if tap.any()) * UP

    @property
    def alone(self) -> bool:
        """Whether it is a matrix at each position alone."""
        return {*self.taps} == {(0, 0)} and self.stride == (1, 1) and self.source[1:] == self.target[1:]

    def terms(self, axis: int) -> int:
        """Return the largest number of entries that are not zero in a row (axis 1) or a column (axis 0)."""
        return int(np.sum([(tap != 0).sum(axis) for tap in self.taps.values()], axis=0).max()) if self.taps else 0

    def reach(self, axis: int) -> Pair:
        """Return the first and the last position that is read along an axis, possibly outside of the grid."""
        offsets = [t[axis] for t in self.taps] or [0]
        return min(offsets), self.stride[axis] * (self.target[1 + axis] - 1) + max(offsets)

    def reaches(self) -> tuple[Pair, Pair]:
        return self.reach(0), self.reach(1)

    def on_torus(self) -> Kernel:
        """Return the same map as a periodic kernel: one that reads nothing outside of its grid is both."""
        inside = all(low >= 0 and high < n for n, (low, high) in zip(self.source[1:], self.reaches(), strict=True))
        require(self.periodic or inside, "zeros are beyond the border of one map, and a torus beyond that of another")
        return replace(self, periodic=True)


def compose(second: Kernel, first: Kernel) -> Kernel:
    """Return second ∘ first; Rejected if it is not of this form.

    What `second` reads as zero outside the grid between them must be zero by the formula of `first` as well: there,
    `first` must read nothing but zeros. If `second` is periodic, `first` must be as well, with the same torus: as many
    positions times its stride as its source has. An entry of a product adds at most as many terms as a row of `second`
    and a column of `first` have.
    """
    require(second.source == first.target, "shapes do not fit")
    if second.periodic:
        first = first.on_torus()
        same = all(first.target[i] * first.stride[i - 1] == first.source[i] for i in (1, 2))
        require(same, "the torus of one map is not that of another")
    for axis in (0, 1) if not second.periodic else ():
        (low, high), size, step = second.reach(axis), first.source[1 + axis], first.stride[axis]
        beyond = [*range(low, 0), *range(first.target[1 + axis], high + 1)]
        cut = any(first.periodic or 0 <= step * p + t[axis] < size for p in beyond for t in first.taps)
        require(not cut, "what is beyond the border of the map between is cut off, so they are not one convolution")
    taps: dict[Pair, Array] = {}
    for t, b in second.taps.items():
        for r, a in first.taps.items():
            offset = (first.stride[0] * t[0] + r[0], first.stride[1] * t[1] + r[1])
            taps[offset] = taps[offset] + b @ a if offset in taps else b @ a
            require(len(taps) * len(b) * a.shape[1] <= ENTRIES, "the kernel is too large")
    terms = min(second.terms(1), first.terms(0))
    rounding = gamma(terms + 2) * second.size * first.size + 1e-300 if terms else 0.0
    known = second.size * first.error + second.error * (first.size + first.error)
    stride = (first.stride[0] * second.stride[0], first.stride[1] * second.stride[1])
    return Kernel(taps, first.source, second.target, stride, (rounding + known) * UP, first.periodic)


def total(a: Kernel, b: Kernel) -> Kernel:
    """Return the sum of two maps of one source and one target."""
    if a.periodic or b.periodic:
        a, b = a.on_torus(), b.on_torus()
    require((a.source, a.target, a.stride) == (b.source, b.target, b.stride), "summands differ in shape or stride")
    taps = dict(a.taps)
    for t, tap in b.taps.items():
        taps[t] = taps[t] + tap if t in taps else tap
    return replace(a, taps=taps, error=(a.error + b.error + gamma(1) * (a.size + b.size)) * UP)


def phases(kernel: Kernel) -> Kernel:
    """Return the same map with stride 1: position s·q + r of channel i is position q of channel (r, i).

    Where the stride divides a torus, q is periodic as the position is. No entry of a torus may be taken twice.
    """
    (s0, s1), (c, h, w) = kernel.stride, kernel.source
    if kernel.periodic:
        once = h % s0 == w % s1 == 0 and kernel.target[1] * s0 <= h and kernel.target[2] * s1 <= w
        require(once, "a torus whose positions are taken twice, or that its stride does not divide")
    if (s0, s1) == (1, 1):
        return kernel
    taps: dict[Pair, Array] = {}
    for t, tap in kernel.taps.items():
        q, phase = (t[0] // s0, t[1] // s1), (t[0] % s0) * s1 + t[1] % s1
        wide = taps.setdefault(q, np.zeros((tap.shape[0], s0 * s1 * c)))
        wide[:, phase * c : (phase + 1) * c] = tap
    return replace(kernel, taps=taps, source=(s0 * s1 * c, -(-h // s0), -(-w // s1)), stride=(1, 1))


def opened(kernel: Kernel, axis: int) -> Kernel:
    """Return the same map (of stride 1, not periodic) with the positions along an axis as channels: channel y·c + i."""
    (c, d), (h, n) = (kernel.target[0], kernel.source[0]), (kernel.target[1 + axis], kernel.source[1 + axis])
    require(not kernel.periodic and h * c * n * d <= ENTRIES, "the map is too large to be written out, or periodic")
    taps: dict[Pair, Array] = {}
    for t, tap in kernel.taps.items():
        left = (0, t[1]) if axis == 0 else (t[0], 0)
        whole = taps.setdefault(left, np.zeros((h, c, n, d)))
        for y in range(max(0, -t[axis]), min(h, n - t[axis])):
            whole[y, :, y + t[axis]] = tap
    grids = [(k[0] * k[1], 1, k[2]) if axis == 0 else (k[0] * k[2], k[1], 1) for k in (kernel.source, kernel.target)]
    taps = {t: whole.reshape(h * c, n * d) for t, whole in taps.items()}
    return replace(kernel, taps=taps, source=grids[0], target=grids[1])


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
    def of(cls, kernel: Kernel, source: Sequence[int], before: float | None = None) -> Map:
        """Return a kernel as a map to a value of the shape (1, c, h, w)."""
        shape = (1, *kernel.target)
        return cls(source, np.arange(math.prod(shape)).reshape(shape), np.ones(shape), kernel, before)

    def moved(self, at: Array) -> Map:
        """Return the map to the value whose entries are those at these places of the value, or 0 for -1."""
        where, scale = np.append(self.where, -1), np.append(self.scale, 0.0)
        return replace(self, where=where[at], scale=scale[at])

    def as_kernel(self) -> Kernel:
        """Return the map as one kernel; Rejected if it is not of this form.

        Guess source channel, offset and factor of every channel from its first entry, then compare all entries.
        """
        require(self.before is None, "what is before it is known by its norm alone")
        try:
            made = self._kernel(periodic=False)
        except Rejected:
            made = self._kernel(periodic=True)
        return made if self.kernel is None else compose(made, self.kernel)

    def _kernel(self, periodic: bool) -> Kernel:
        origin = grid_of(self.source) if self.kernel is None else self.kernel.target
        target = grid_of(self.where.shape)
        where, scale = self.where.reshape(target), self.scale.reshape(target)
        live = (where >= 0) & (scale != 0)
        at = np.stack(np.unravel_index(np.maximum(where, 0), origin))  # channel, row, column that an entry comes from
        down, right = live[:, 1:] & live[:, :-1], live[:, :, 1:] & live[:, :, :-1]
        single = origin[1:] if periodic else (1, 1)  # a single output of all that a torus has
        s0 = int(np.diff(at[1], axis=1)[down][0]) % origin[1] or origin[1] if down.any() else single[0]
        s1 = int(np.diff(at[2], axis=2)[right][0]) % origin[2] or origin[2] if right.any() else single[1]
        another = "entries are moved in another way than by channels and offsets"
        taps: dict[Pair, Array] = {}
        for c in np.flatnonzero(live.any((1, 2))):
            y, x = np.argwhere(live[c])[0]
            channel, row, column = (int(i) for i in at[:, c, y, x])
            t = (row - s0 * int(y), column - s1 * int(x))
            rows, columns = s0 * np.arange(target[1])[:, None] + t[0], s1 * np.arange(target[2]) + t[1]
            if periodic:
                rows, columns = rows % origin[1], columns % origin[2]
            inside = (rows >= 0) & (rows < origin[1]) & (columns >= 0) & (columns < origin[2])
            expected = np.where(inside, (channel * origin[1] + rows) * origin[2] + columns, -1)
            require(np.array_equal(np.where(live[c], where[c], -1), expected), another)
            require(bool((scale[c][live[c]] == scale[c, y, x]).all()), another)
            if t not in taps:
                require((len(taps) + 1) * target[0] * origin[0] <= ENTRIES, "the kernel is too large")
                taps[t] = np.zeros((target[0], origin[0]))
            taps[t][c, channel] = scale[c, y, x]
        made = Kernel(taps, origin, target, (s0, s1), periodic=periodic)
        if not np.isin(scale, (-1, 0, 1)).all():  # a factor may have been rounded
            made = replace(made, error=gamma(2) * made.size)
        return made

    def at_positions(self) -> tuple[Map, Array]:
        """Return a map that changes the channels of every position alone, and which of them the value consists of.

        Rejected if the value has not, at each position, the same mixture of channels of one position.
        """
        channels, height, width = grid_of(self.source) if self.kernel is None else self.kernel.target
        n = height * width
        where, scale = (x.reshape(x.shape[1], -1) for x in (self.where, self.scale))
        channel, place = where[:, :1] // n, where[:1] % n
        whole = (where >= 0) & (where == channel * n + place) & (scale == scale[:, :1])
        require(bool(whole.all()), "entries are moved in another way than by channels and positions")
        shape = (1, len(where), height, width)
        inner = (channel * n + np.arange(n)).reshape(shape)
        return replace(self, where=inner, scale=np.repeat(scale[:, :1], n, 1).reshape(shape)), place


def identity(shape: Sequence[int]) -> Map:
    require(0 < math.prod(shape) <= ENTRIES, "a value is too large")
    return Map(shape, np.arange(math.prod(shape)).reshape(shape), np.ones(shape))


def joined(maps: Sequence[Map], dim: int | None) -> Map:
    """Return the map to several values, concatenated along a dimension, or one after the other if it is None."""
    first = maps[0]
    same = all(m.kernel is first.kernel and m.before == first.before for m in maps)
    require(same, "its parts come from different maps")
    where, scale = np.concatenate([m.where for m in maps], dim), np.concatenate([m.scale for m in maps], dim)
    return replace(first, where=where, scale=scale)


def grid_of(shape: Sequence[int]) -> Grid:
    """Return the grid of a value for one image: (1, c, h, w), or (1, d) as d channels of one position."""
    if len(shape) in (2, 4) and shape[0] == 1 and all(0 < side <= 1 << 14 for side in shape):
        return (shape[1], 1, 1) if len(shape) == 2 else (shape[1], shape[2], shape[3])
    raise Rejected(f"a value of shape {list(shape)} is no image")
