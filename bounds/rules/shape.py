"""Operators that move entries: views, slices, padding, rolling.

Each output entry is one input entry or a constant, so the norm is the root of the largest number of copies of an entry:
1 for anything that does not repeat. Most of them change an affine map exactly: channels are rows of its kernel,
positions are shifts of its taps. A slice also remembers which part of its parent it is (`Piece`), so that putting parts
together again costs max L_i and not √ΣL_i².
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from lipcert.bounds.affine import AffineMap, compose, identity
from lipcert.bounds.core import Bound, BoundError, rule
from lipcert.bounds.graph import Node, Ref
from lipcert.bounds.layout import Layout
from lipcert.bounds.propagation import Context
from lipcert.bounds.ranges import Range, Ranges, monotone, ranged
from lipcert.bounds.rounding import sqrt_up
from lipcert.bounds.rules.selection import picked
from lipcert.bounds.values import ONE, Piece, Representation, Rounding, Transform, Value


@rule(*(f"aten.{name}.default" for name in "alias contiguous clone detach detach_ lift_fresh_copy".split()))
def unchanged(node: Node, context: Context) -> Value:
    """Pass a value on: norm 1. (`detach` is the identity, whatever automatic differentiation says.)"""
    x = context.data(node, "self")
    return isometry(node, context, x, lambda given: given)


@rule("aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default")
def dropout(node: Node, context: Context) -> Value:
    """Pass a value on: dropout at inference is the identity, norm 1 and not 1 - p; while training it is an error."""
    if node["train"]:
        raise BoundError(f"{node.op} is random while training ({node.place}); call eval()")
    return isometry(node, context, context.data(node, "input"), lambda given: given)


@rule("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.flatten.using_ints",
      "aten.unflatten.int", "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.unsqueeze.default",
      "aten.view_as.default", "aten.reshape_as.default")  # fmt: skip
def view(node: Node, context: Context) -> Value:
    """Pass the entries on in the same order: an isometry. Views that put entries of two images together are refused."""
    x = context.live[node.inputs[0]]
    merged = _merged(node, context, x)

    def transform(given: Representation) -> Representation | None:
        layout = given.layout.reshape(node.shape)
        return None if layout is None else replace(given, layout=layout)

    return context.linear(node, x, transform, norm=lambda: ONE, cheap=1.0, merged=merged)


@rule("aten.permute.default", "aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default",
      "aten.movedim.int", "aten.movedim.intlist", "aten.t.default", "aten.numpy_T.default",
      "aten.mT.default")  # fmt: skip
def permute(node: Node, context: Context) -> Value:
    """Permute the dimensions: an isometry."""
    x = context.data(node, "self")
    order = permutation(node, len(x.shape))
    return isometry(node, context, x, lambda given: replace(given, layout=given.layout.permute(order)))


@rule("aten.slice.Tensor", "aten.narrow.default", "aten.select.int", "aten.index_select.default")
def part(node: Node, context: Context) -> Value:
    """Keep some indices of one dimension: norm 1 (√k if an index repeats k times), and a piece of what was cut."""
    x = context.data(node, "self")
    dim = node["dim"] % len(x.shape)
    size = x.shape[dim]
    kind = node.op.split(".")[1]
    if kind == "select":
        indices = [node["index"] % size]
    elif kind == "narrow":
        start = node["start"] % size if size else 0
        indices = list(range(start, start + node["length"]))
    elif kind == "index_select":
        if isinstance(node["index"], Ref):
            return context.unbounded(node, [context.live[n] for n in node.inputs], "the index depends on the input")
        indices = [int(i) % size for i in node["index"]]
    else:
        indices = list(range(size))[slice(node["start"], node["end"], node["step"])]
    if indices == list(range(size)) and kind != "select":
        return isometry(node, context, x, lambda given: given)
    context.axis(node, x, dim)
    return _cut(node, context, x, dim, indices, drop=kind == "select")


@rule("aten.index.Tensor")
def gather(node: Node, context: Context) -> Value:
    """Keep constant indices: √(largest number of repeats of an entry); of one dimension, a piece of what was cut."""
    x = context.data(node, "self")
    given = [(d, index) for d, index in enumerate(node["indices"]) if index is not None]
    if any(isinstance(index, Ref) for _, index in given) or len(node.inputs) > 1:
        return context.unbounded(node, [context.live[n] for n in node.inputs], "the index depends on the input")
    if len(given) != 1 or given[0][1].ndim != 1 or given[0][1].dtype == torch.bool:
        return picked(node, context, x)
    dim = context.axis(node, x, given[0][0])
    return _cut(node, context, x, dim, [int(i) % x.shape[dim] for i in given[0][1]], drop=False)


@rule("aten.flip.default")
def flip(node: Node, context: Context) -> Value:
    """Reverse dimensions: an isometry; reversed channels fuse."""
    x = context.data(node, "self")
    dims = [context.axis(node, x, d) for d in node["dims"]]

    def transform(given: Representation) -> Representation | None:
        for dim in dims:
            order = torch.arange(given.map.c_out - 1, -1, -1)
            rows = given.map.rows(order) if given.layout.is_axis(dim, "c") else None
            if rows is None:
                return None
            given = replace(given, map=rows)
        return given

    return isometry(node, context, x, transform)


@rule("aten.roll.default")
def roll(node: Node, context: Context) -> Value:
    """Shift circularly: a permutation, an isometry. On positions it is a periodic kernel with a single tap."""
    x = context.data(node, "self")
    if not node["dims"]:
        raise context.mixed(node)
    steps = [(context.axis(node, x, d), s) for d, s in zip(_list(node["dims"]), _list(node["shifts"]), strict=True)]

    def transform(given: Representation) -> Representation | None:
        for dim, step in steps:
            new = _rolled(given, dim, step)
            if new is None:
                return None
            given = new
        return given

    return isometry(node, context, x, transform)


@rule("aten.pad.default", "aten.constant_pad_nd.default")
def pad(node: Node, context: Context) -> Value:
    """Pad: by constants norm 1; by copies of the value √(largest number of copies of an entry), per dimension.

    Zeros around the channels are zero rows, around the positions a shift; periodic padding reads periodically. Padding
    by another constant differs by a constant. Negative padding crops.
    """
    x = context.data(node, "self")
    rank = len(x.shape)
    given = [int(p) for p in node["pad"]]
    pads = {rank - 1 - k // 2: (given[k], given[k + 1]) for k in range(0, len(given), 2) if any(given[k : k + 2])}
    for dim in pads:
        context.axis(node, x, dim)
    mode = node.arguments.get("mode", "constant")
    copies = math.prod(_copies(x.shape[dim], *sides, mode) for dim, sides in pads.items())
    norm = ONE if copies == 1 else Bound(sqrt_up(float(copies)), "upper", "copies")

    def transform(representation: Representation) -> Representation | None:
        found: Representation | None = representation
        for dim, (before, after) in pads.items():
            if mode not in ("constant", "circular") or found is None:
                return None
            found = _padded(found, dim, before, after, mode == "circular")
        return found

    rounding = Rounding(constant=(1, context.offset(node)))
    return context.linear(node, x, transform, norm=lambda: norm, cheap=norm.value, rounding=rounding)


@rule("aten.pixel_unshuffle.default")
def pixel_unshuffle(node: Node, context: Context) -> Value:
    """Move blocks of r×r positions into channels: an isometry, here a strided kernel of single ones."""
    x = context.data(node, "self")
    r = int(node["downscale_factor"])
    _images_first(node, context, x)
    expected, result = Layout.of(x.shape, 0, 1), Layout.of(node.shape, 0, 1)
    _, channels, h, w = x.shape

    def transform(given: Representation) -> Representation | None:
        if given.layout != expected:
            return None
        taps = given.map.taps.new_zeros(r * r, channels, r * r, 1)
        taps[range(r * r), :, range(r * r)] = 1.0
        shifts = tuple((a, b) for a in range(r) for b in range(r))
        fused = compose(AffineMap(taps, shifts, (h, w), (h // r, w // r), stride=(r, r)), given.map)
        return None if fused is None else replace(given, map=fused, layout=result)

    return isometry(node, context, x, transform)


@rule("aten.pixel_shuffle.default", "aten.channel_shuffle.default")
def pixel_shuffle(node: Node, context: Context) -> Value:
    """Move channels into blocks of positions, or channels among themselves: an isometry."""
    x = context.data(node, "self")
    _images_first(node, context, x)
    return context.linear(node, x, None, norm=lambda: ONE, cheap=1.0)


# ----------------------------------------------------------------------------------------- the work of the rules


def isometry(node: Node, context: Context, x: Value, transform: Transform | None) -> Value:
    """Return the value of an operator of norm 1."""
    return context.linear(node, x, transform, norm=lambda: ONE, cheap=1.0)


def _cut(node: Node, context: Context, x: Value, dim: int, indices: list[int], *, drop: bool) -> Value:
    """Return the value of x[..., indices, ...] along a dimension, which `drop` removes."""
    repeats = max(Counter(indices).values(), default=1)
    norm = ONE if repeats == 1 else Bound(sqrt_up(float(repeats)), "upper", "copies")

    def transform(given: Representation) -> Representation | None:
        found = _selected(given, dim, indices)
        return None if found is None else replace(found, layout=found.layout.without([dim]) if drop else found.layout)

    value = context.linear(node, x, transform, norm=lambda: norm, cheap=norm.value)
    value.pieces[x] = Piece(dim, frozenset(indices), lambda: norm, frozenset({value.index}))
    return value


def _selected(given: Representation, dim: int, indices: list[int]) -> Representation | None:
    """Return a map restricted to some indices of one dimension: rows, or every s-th position from a first one."""
    m, layout = given.map, given.layout
    if layout.is_axis(dim, "c"):
        rows = m.rows(torch.tensor(indices, dtype=torch.int64))
        return None if rows is None else replace(given, map=rows, layout=layout.placed(dim, "c", len(indices)))
    for axis, name in enumerate("hw"):
        step = indices[1] - indices[0] if len(indices) > 1 else 1
        if layout.is_axis(dim, name) and step > 0 and indices == list(range(indices[0], indices[-1] + 1, step)):
            delta, out, stride = [0, 0], list(m.out), [1, 1]
            delta[axis], out[axis], stride[axis] = indices[0], len(indices), step
            fused = compose(shift(m, delta, out, stride), m)
            return None if fused is None else replace(given, map=fused, layout=layout.placed(dim, name, len(indices)))
    return None


def _rolled(given: Representation, dim: int, step: int) -> Representation | None:
    m, layout = given.map, given.layout
    if layout.is_axis(dim, "c"):
        rows = m.rows((torch.arange(m.c_out) - step) % m.c_out)
        return None if rows is None else replace(given, map=rows)
    for axis, name in enumerate("hw"):
        if layout.is_axis(dim, name):
            delta, wrap = [0, 0], [False, False]
            delta[axis], wrap[axis] = -step, True
            fused = compose(shift(m, delta, m.out, [1, 1], wrap), m)
            return None if fused is None else replace(given, map=fused)
    return None


def _padded(given: Representation, dim: int, before: int, after: int, circular: bool) -> Representation | None:
    m, layout = given.map, given.layout
    if layout.is_axis(dim, "c"):
        size = m.c_out
        indices = torch.arange(-before, size + after)
        rows = m.rows(indices % size if circular else indices.clamp(0, size - 1))
        if rows is None:
            return None
        if not circular:
            rows = rows.scaled(((indices >= 0) & (indices < size)).to(torch.float64))
        return replace(given, map=rows, layout=layout.placed(dim, "c", len(indices)))
    for axis, name in enumerate("hw"):
        if layout.is_axis(dim, name):
            delta, out, wrap = [0, 0], list(m.out), [False, False]
            delta[axis], out[axis], wrap[axis] = -before, m.out[axis] + before + after, circular
            fused = compose(shift(m, delta, out, [1, 1], wrap), m)
            return None if fused is None else replace(given, map=fused, layout=layout.placed(dim, name, out[axis]))
    return None


def shift(
    m: AffineMap, delta: Sequence[int], out: Sequence[int], stride: Sequence[int], wrap: Sequence[bool] = (False, False)
) -> AffineMap:
    """Return the map y[i] = x[stride·i + delta] on what `m` writes."""
    return replace(
        identity(m.c_out, m.out, m.taps.device), shifts=((delta[0], delta[1]),), out=(out[0], out[1]),
        stride=(stride[0], stride[1]), wrap=(wrap[0], wrap[1]),
    )  # fmt: skip


def _copies(size: int, before: int, after: int, mode: str) -> int:
    """Return how often an entry occurs after padding one dimension."""
    places = range(-before, size + after)
    if mode == "constant":
        return 1
    if mode == "circular":
        return max(Counter(p % size for p in places).values())
    if mode == "replicate":
        return max(Counter(min(max(p, 0), size - 1) for p in places).values())
    if mode == "reflect":
        mirrored = (abs(p) for p in places)
        return max(Counter(min(p, 2 * (size - 1) - p) for p in mirrored).values())
    raise BoundError(f"padding mode {mode!r} has no rule")


def _merged(node: Node, context: Context, x: Value) -> tuple[int, int]:
    """Return how the images lie in the batch dimension after a view that keeps the order of all entries.

    Entries are ordered as (outer, image, inner); the product of the sizes before the image, and that after it, do not
    change. A view whose batch dimension does not fit them would put entries of two images into one.
    """
    if x.node.batch is None or node.batch is None:
        return (1, 1)
    outer = math.prod(x.shape[: x.node.batch]) * x.merged[0]
    before, size = math.prod(node.shape[: node.batch]), node.shape[node.batch]
    if outer % before or size % (outer // before):
        raise context.mixed(node)
    return outer // before, size // (outer // before)


_SWAPPED = {"transpose": ("dim0", "dim1"), "swapdims": ("dim0", "dim1"), "swapaxes": ("axis0", "axis1")}


def permutation(node: Node, rank: int) -> list[int]:
    kind = node.op.split(".")[1]
    order = list(range(rank))
    if kind == "permute":
        return [d % rank for d in node["dims"]]
    if kind == "movedim":
        source = [d % rank for d in _list(node["source"])]
        target = [d % rank for d in _list(node["destination"])]
        rest = iter([d for d in order if d not in source])
        return [source[target.index(d)] if d in target else next(rest) for d in order]
    if kind == "numpy_T":
        return order[::-1]
    first, second = _SWAPPED.get(kind, (None, None))
    a, b = (node[first] % rank, node[second] % rank) if first and second else (rank - 2, rank - 1)
    order[a], order[b] = order[b], order[a]
    return order


def _list(value: int | Sequence[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _images_first(node: Node, context: Context, x: Value) -> None:
    if len(x.shape) != 4 or x.node.batch not in (0, None):
        raise context.mixed(node)


# ------------------------------------------------------------------------------------------------------------ ranges


@ranged(
    *(f"aten.{name}.default" for name in "alias contiguous clone detach detach_ lift_fresh_copy".split()),
    "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.flatten.using_ints",
    "aten.unflatten.int", "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.unsqueeze.default",
    "aten.view_as.default", "aten.reshape_as.default", "aten.permute.default", "aten.transpose.int",
    "aten.swapaxes.default", "aten.swapdims.default", "aten.movedim.int", "aten.movedim.intlist", "aten.t.default",
    "aten.numpy_T.default",
    "aten.mT.default", "aten.slice.Tensor", "aten.narrow.default", "aten.select.int", "aten.index_select.default",
    "aten.index.Tensor", "aten.flip.default", "aten.roll.default", "aten.pad.default", "aten.constant_pad_nd.default",
    "aten.pixel_unshuffle.default", "aten.pixel_shuffle.default", "aten.channel_shuffle.default",
)  # fmt: skip
def _selected_range(node: Node, ranges: Ranges) -> Range:
    """Move the ends as the operator moves the entries."""
    if len(set(node.inputs)) > 1 and "index" in node.op:
        return ranges.unknown(node)
    return monotone(node, ranges)


@ranged("aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default")
def _same_range(node: Node, ranges: Ranges) -> Range:
    return ranges.of(node, "input")
