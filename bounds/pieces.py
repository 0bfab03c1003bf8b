"""Pieces: values that are functions of a part of an earlier value, and what they cost together (docs/bounds.md 3).

A value v is a piece of a parent p if, for a set I of indices of one dimension of p and p_I the entries there,

    ‖Δv‖ ≤ f · ‖Δp_I‖   between any two inputs,                                                                  (1)

and v is computed from p_I alone. A slice p_I is one, with f = 1 (`rules/shape.py`). What is made of pieces is one:

- *An operator* of one argument, ‖Δv‖ ≤ L ‖Δx‖ with a piece x: f = L f_x.
- *A segment.* v = M a + const for an anchor a. If a is a piece of p, ‖Δv‖ ≤ ‖M‖ ‖Δa‖ ≤ ‖M‖ f_a ‖Δp_I‖: one norm for the
  whole segment, where the norms of its operators may have a far larger product. If a is p itself and v is computed from
  p_I alone, M is zero on all other entries of p, so ‖Δv‖ = ‖M Δp‖ ≤ ‖M‖ ‖Δp_I‖.
- *Several arguments apart*, ‖Δv‖ ≤ Σ_k g_k ‖Δx_k‖, all of them pieces of p with the same I: f = Σ_k g_k f_k. So it is
  for sums, products of values that have ranges, and attention; each g_k f_k may be the smallest of several.
- *Several arguments together*, ‖Δv‖² ≤ g² Σ_k ‖Δx_k‖², pieces with disjoint I_k: then Σ_k f_k² ‖Δp_{I_k}‖² ≤ (max f_k)²
  ‖Δp_I‖² for the union I, so f = g max f_k, in place of √Σ f_k². Where I is the whole dimension, (1) says that ‖Δv‖ ≤
  f ‖Δp‖, and if p is a piece of a value before it, so is v, with f f_p.

Channels that are split, taken through parts of a network of their own and concatenated cost what the steepest part
costs. A part of the network that is no piece, because one of its operators does not say so, costs √Σ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from lipcert.bounds.affine import AffineMap
from lipcert.bounds.core import Bound
from lipcert.bounds.values import Piece, Value, total

Way = tuple[Value, Bound]  # an argument of a value, or what it is made of, and by how much it counts


def after(value: Value, x: Value, operator: Callable[[], Bound]) -> None:
    """Make the result of an operator of this norm a piece of all that its argument is a piece of."""
    for parent, piece in x.pieces.items():
        factor = cache(lambda piece=piece: piece.factor() * operator())
        value.pieces[parent] = replace(piece, factor=factor, members=piece.members | {value.index})


def apart(value: Value, arguments: Sequence[Sequence[Way]]) -> None:
    """Make a value with ‖Δvalue‖ ≤ Σ_k g_k ‖Δx_k‖ a piece of what all x_k are the same piece of.

    For every argument there may be several ways (x_k, g_k): the smallest counts.
    """
    for parent in dict.fromkeys(parent for x, _ in arguments[0] for parent in x.pieces):
        known = [[(x.pieces[parent], g) for x, g in ways if parent in x.pieces] for ways in arguments]
        found = [piece for ways in known for piece, _ in ways]
        if all(known) and len({(piece.dim, piece.indices) for piece in found}) == 1:
            factor = cache(lambda known=known: total([_least(ways) for ways in known]))
            value.pieces[parent] = Piece(found[0].dim, found[0].indices, factor, _members(value, found))


def together(value: Value, xs: Sequence[Value], factor: Bound) -> None:
    """Make a value with ‖Δvalue‖² ≤ factor²·Σ‖Δx_k‖² a piece of what the x_k are disjoint pieces of."""
    for parent in [parent for parent in xs[0].pieces if all(parent in x.pieces for x in xs)]:
        found = [x.pieces[parent] for x in xs]
        union = frozenset[int]().union(*(piece.indices for piece in found))
        if len({piece.dim for piece in found}) == 1 and len(union) == sum(len(piece.indices) for piece in found):
            largest = cache(lambda ps=found: max((p.factor() for p in ps), key=lambda bound: bound.order) * factor)
            value.pieces[parent] = Piece(found[0].dim, union, largest, _members(value, found))
    for parent in [parent for parent, piece in value.pieces.items() if whole(parent, piece)]:
        inner = value.pieces[parent]
        for older, piece in parent.pieces.items():
            product = cache(lambda a=piece, b=inner: a.factor() * b.factor())
            value.pieces.setdefault(older, replace(piece, factor=product, members=_members(value, [piece, inner])))


def segments(value: Value, norm: Callable[[AffineMap], Bound]) -> None:
    """Take the norms of whole segments: of the map from each anchor, the earliest that is a piece of a parent."""
    found: dict[Value, Piece] = {}
    for (anchor, _), known in sorted(value.representations.items(), key=lambda item: item[0][0].index):
        operator = cache(lambda m=known.map: norm(m))
        if anchor in value.pieces:
            found.setdefault(anchor, replace(value.pieces[anchor], factor=operator, members=known.members))
        for parent, piece in anchor.pieces.items():
            product = cache(lambda piece=piece, operator=operator: piece.factor() * operator())
            found.setdefault(parent, replace(piece, factor=product, members=piece.members | known.members))
    value.pieces.update(found)


def whole(parent: Value, piece: Piece) -> bool:
    """Return whether a piece is made of all of its parent."""
    return len(piece.indices) == parent.shape[piece.dim]


def _least(ways: Sequence[tuple[Piece, Bound]]) -> Bound:
    return min((piece.factor() * g for piece, g in ways), key=lambda bound: bound.order)


def _members(value: Value, pieces: Sequence[Piece]) -> frozenset[int]:
    return frozenset({value.index}).union(*(piece.members for piece in pieces))
