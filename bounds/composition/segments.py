"""The seam in the walk: where a value is a chain of affine maps and activations, its bound competes with the product.

The walk bounds a value v by ‖M‖·L(h), M the affine map to it from its earliest anchor h. When h is an activation of a
value that has an affine map from an anchor of its own, and so on back to a first anchor s, v is a chain from s, and

    L(v) ≤ (bound of the chain)·L(s).

This is a statement about v as a function of s alone: that values in between may have other consumers does not matter,
and a branch is never counted twice, because the walk takes the smaller of two bounds of the same number.

The matrices of a chain are those of the kernels (what a pointwise map does to the channels of one position) where all
maps are pointwise on the same positions: then the chain acts on each position alone, and its Lipschitz constant is that
at one position. Otherwise maps are written out as matrices between whole tensors, in the order of the entries there,
while these are small. Entrywise functions commute with both.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lipcert.bounds.affine import AffineMap, segment_bound
from lipcert.bounds.composition.chain import Chain
from lipcert.bounds.composition.methods import METHODS, chain_bound
from lipcert.bounds.composition.slopes import Slopes, slopes
from lipcert.bounds.core import Bound, BoundError
from lipcert.bounds.graph import Graph, Node
from lipcert.bounds.layout import Layout
from lipcert.bounds.rounding import add_up, gamma, mul_up
from lipcert.bounds.values import Anchor, Representation, Value

_ENTRIES = {"fast": 2**23, "tight": 2**25}  # of one matrix
_AFFINE = tuple("linear addmm mm matmul conv batch_norm view reshape flatten permute transpose".split())

Places = list[tuple[Anchor, Representation]]  # affine maps with their anchors, the last map of a chain first


@dataclass(frozen=True, eq=False)
class Link:
    """An activation: its slopes, and the affine map to its argument from an anchor."""

    slopes: Slopes
    anchor: Anchor
    argument: Representation
    members: frozenset[int]


class Segments:
    """Remember the activations of one walk, and bound the chains that they form.

    Only where a chain ends, not for each of its beginnings: these cost as much, and nothing needs their bounds. `keep`
    names values that count as ends.
    """

    def __init__(self, graph: Graph, keep: Collection[str], tightness: str, method: str) -> None:
        if tightness not in METHODS:
            raise BoundError(f"tightness is {' or '.join(map(repr, METHODS))}, got {tightness!r}")
        self._method, self._tightness = method, tightness
        self._links: dict[int, Link] = {}
        self._norms: WeakKeyDictionary[AffineMap, Bound] = WeakKeyDictionary()
        self._inner = _inner(graph, keep)

    def activation(self, value: Value, arguments: Sequence[Value]) -> None:
        """Take note of a value that is a function of one argument, if it acts entry by entry with known slopes."""
        found = slopes(value.node)
        if found is None or len(arguments) != 1:
            return
        (argument,) = arguments
        if value.shape != argument.shape or value.batch != argument.batch or not argument.representations:
            return
        anchor, representation = _earliest(argument)
        if self._small(representation.map):
            members = representation.members | {value.index}
            self._links[value.index] = Link(found, anchor, representation, members)

    def norm(self, m: AffineMap) -> Bound:
        """Return `segment_bound` of a map, once."""
        if m not in self._norms:
            self._norms[m] = segment_bound(m, self._method)
        return self._norms[m]

    def bound(self, value: Value) -> tuple[Value, Bound, frozenset[int]] | None:
        """Return the source of the longest chain that ends in a value, its bound, and the nodes in between."""
        found = None if value.node.name in self._inner else self.chain(value)
        if found is None:
            return None
        source, chain, members = found
        return source, chain_bound(chain, self._tightness, self._method), members

    def chain(self, value: Value) -> tuple[Value, Chain, frozenset[int]] | None:
        """Return the source of the longest chain that ends in a value, the chain, and the nodes in between."""
        anchor, last = _earliest(value)
        places: Places = [(anchor, last)]
        ranges: list[Slopes] = []
        members = last.members
        while (link := self._links.get(anchor[0].index)) is not None:
            anchor = link.anchor
            places.append((anchor, link.argument))
            ranges.append(link.slopes)
            members |= link.members
        if not ranges or not self._small(last.map):
            return None
        matrices = _pointwise(places) or _written_out(places, _ENTRIES[self._tightness])
        if matrices is None:
            return None
        stored, errors = zip(*reversed(matrices), strict=True)
        norms = tuple(self.norm(place.map).require_upper() for _, place in reversed(places))
        return anchor[0], Chain(stored, tuple(reversed(ranges)), errors, norms), members

    def _small(self, m: AffineMap) -> bool:
        size = m.c_out * m.c_in if m.pointwise else m.size * m.c_in * m.n[0] * m.n[1]
        return size <= _ENTRIES[self._tightness]


def _earliest(value: Value) -> tuple[Anchor, Representation]:
    return min(value.representations.items(), key=lambda item: item[0][0].index)


def _inner(graph: Graph, keep: Collection[str]) -> frozenset[str]:
    """Return the values that only one activation reads, which an affine operator takes further: not ends of a chain."""
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in set(node.inputs):
            readers.setdefault(name, []).append(node)
    found = set()
    for node in graph.nodes:
        if slopes(node) is None or node.name in keep or node.inputs[0] in keep:
            continue
        following = readers.get(node.name, [])
        goes_on = len(following) == 1 and following[0].op.removeprefix("aten.").startswith(_AFFINE)
        if goes_on and len(readers[node.inputs[0]]) == 1:
            found.add(node.inputs[0])
    return frozenset(found)


def _own(anchor: Anchor) -> Layout:
    value, channel = anchor
    return Layout.of(value.shape, value.batch, channel)


def _pointwise(places: Places) -> list[tuple[Tensor, float]] | None:
    """Return the channel matrices of maps that are all pointwise on the same positions, else None."""
    if not all(representation.map.pointwise for _, representation in places):
        return None
    for (anchor, _), (_, before) in zip(places, places[1:], strict=False):
        if before.layout != _own(anchor):
            return None
    return [(place.map.regrouped(1).taps[0, 0], place.map.error) for _, place in places]


def _written_out(places: Places, largest: int) -> list[tuple[Tensor, float]] | None:
    """Return the maps as matrices between tensors, or None if one is too large or acts alike along further axes."""
    found = []
    for anchor, representation in places:
        m, layouts = representation.map, (representation.layout, _own(anchor))
        if m.size * m.c_in * m.n[0] * m.n[1] > largest:
            return None
        if any(axis not in "chw" for layout in layouts for axis, _ in layout.sizes):
            return None
        found.append((matrix(m, *layouts), add_up(m.error, _collisions(m))))
    return found


def matrix(m: AffineMap, result: Layout, argument: Layout) -> Tensor:
    """Return a map as a matrix, rows in the order of the entries of a tensor of layout `result`, columns of `argument`.

    Entry by entry from y[i] = Σ_t K_t x[s·i + δ_t]; taps that read one position twice, as short periodic axes do, add.
    """
    taps = m.regrouped(1).taps[:, 0]  # (T, c_out, c_in)
    whole = taps.new_zeros(m.c_out, *m.out, m.c_in, *m.n)
    for tap, shift in zip(taps, m.shifts, strict=True):
        (i, p), (j, q) = (_reached(m, shift[axis], axis) for axis in (0, 1))
        # two index ranges around a slice put their dimensions first: (i, j, c_out, c_in)
        whole[:, i[:, None], j[None], :, p[:, None], q[None]] += tap
    orders = [_order(layout) for layout in (result, argument)]
    return whole.permute(*orders[0], *(3 + axis for axis in orders[1])).reshape(m.size, -1)


def _reached(m: AffineMap, shift: int, axis: int) -> tuple[Tensor, Tensor]:
    """Return the output positions at which a tap reads its grid along an axis, and the positions that it reads."""
    out = torch.arange(m.out[axis], device=m.taps.device)
    read = m.stride[axis] * out + shift
    if m.wrap[axis]:
        return out, read % m.n[axis]
    inside = (read >= 0) & (read < m.n[axis])
    return out[inside], read[inside]


def _order(layout: Layout) -> list[int]:
    """Return the axes c, h, w as 0, 1, 2 in the order of the tensor, those of size 1 first."""
    order = ["chw".index(axis) for dims in layout.dims for axis in dims]
    return [axis for axis in range(3) if axis not in order] + order


def _collisions(m: AffineMap) -> float:
    """Return what adding taps that read the same position can round: γ_T·‖|M|‖."""
    return mul_up(gamma(len(m.shifts)), m.magnitude) if any(m.wrap) else 0.0
