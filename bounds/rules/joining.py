"""Operators that put values together or repeat them: concatenation, writing into slices, expansion.

Concatenated values have √ΣL_i², in general; pieces of one parent that do not overlap have max L_i (`Piece`), and maps
of one anchor stack to one map, whose norm is taken once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lipcert.bounds.affine import compose, stack
from lipcert.bounds.core import Bound, BoundError, rule
from lipcert.bounds.graph import BatchConstant, Node, Ref
from lipcert.bounds.propagation import Context
from lipcert.bounds.ranges import Range, Ranges, hull, monotone, ranged
from lipcert.bounds.rounding import sqrt_up
from lipcert.bounds.rules.shape import isometry, shift
from lipcert.bounds.values import ONE, Anchor, Representation, Rounding, Value, added, broadcast


@rule("aten.cat.default", "aten.concat.default", "aten.stack.default")
def cat(node: Node, context: Context) -> Value:
    """Bound a concatenation by √ΣL_i²; by max L_i for pieces of one parent; common anchors stack to one map."""
    stacked = node.op.startswith("aten.stack")
    items, dim = node["tensors"], node["dim"] % len(node.shape)
    values = [context.live[item.name] for item in items if isinstance(item, Ref)]
    _same_images(node, context, values, dim, removed=stacked)

    def join(parts: Sequence[Representation]) -> Representation | None:
        data = iter(parts)
        rows = [next(data) if isinstance(item, Ref) else _length(item, dim, stacked) for item in items]
        return _stacked(rows, dim, stacked)

    rounding = Rounding(constant=(1, context.offset(node)))
    return context.nonlinear(node, values, ONE, rounding=rounding, representations=_together(values, join))


@rule("aten.slice_scatter.default", "aten.select_scatter.default")
def scatter(node: Node, context: Context) -> Value:
    """Bound writing a value into some indices of another: what is left of the one and the other are disjoint, √ΣL²."""
    dim = node["dim"] % len(node.shape)
    size, single = node.shape[dim], node.op.startswith("aten.select")
    indices = [node["index"] % size] if single else list(range(size))[slice(node["start"], node["end"], node["step"])]
    if indices == list(range(size)) and isinstance(node["src"], Ref) and not single:
        return isometry(node, context, context.data(node, "src"), lambda given: given)
    base = [context.data(node, "self")] if isinstance(node["self"], Ref) else []
    source = [context.data(node, "src")] if isinstance(node["src"], Ref) else []
    _same_images(node, context, base, dim, removed=False)
    _same_images(node, context, source, dim, removed=single)

    def join(parts: Sequence[Representation]) -> Representation | None:
        left = _masked(parts[0], dim, indices) if base else None
        right = _embedded(parts[-1], dim, indices, size, single) if source else None
        if (base and left is None) or (source and right is None):
            return None
        return added(left, right) if left is not None and right is not None else left or right

    values = [*base, *source]
    rounding = Rounding(constant=(1, context.offset(node)))
    return context.nonlinear(node, values, ONE, rounding=rounding, representations=_together(values, join))


@rule("aten.copy.default")
def copy(node: Node, context: Context) -> Value:
    """Overwrite a value by another, broadcast to its shape."""
    if not isinstance(node["src"], Ref):
        raise BoundError(f"overwriting a value with a constant has no rule ({node.place})")
    return _expanded(node, context, context.data(node, "src"))


@rule("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def expand(node: Node, context: Context) -> Value:
    """Repeat singleton dimensions n times: √n."""
    return _expanded(node, context, context.data(node, "self"))


@rule("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.masked_fill.Scalar",
      "aten.masked_fill.Tensor")  # fmt: skip
def where(node: Node, context: Context) -> Value:
    """Bound a choice between two values by a constant mask: what is left of them is disjoint, √ΣL².

    A mask that depends on the input jumps.
    """
    masked = "masked_fill" in node.op
    first, second = ("self", "value") if masked else ("self", "other")
    values = [context.live[node[name].name] for name in (first, second) if isinstance(node[name], Ref)]
    if isinstance(node["mask" if masked else "condition"], Ref):
        return context.unbounded(node, [context.live[n] for n in node.inputs], "the condition depends on the input")
    for x in values:
        context.aligned(node, x)
    copies = max(math.prod(node.shape) // max(1, math.prod(x.shape)) for x in values)
    factor = Bound(sqrt_up(float(copies)), "upper", "copies")
    return context.nonlinear(node, values, factor, rounding=Rounding(constant=(1, context.offset(node))))


def _together(
    values: Sequence[Value], join: Callable[[Sequence[Representation]], Representation | None]
) -> dict[Anchor, Representation]:
    """Return what `join` makes of the maps from each anchor that all values share."""
    tables = [x.carriers() for x in values]
    made = {}
    for anchor in tables[0]:
        if all(anchor in table for table in tables):
            joined = join([table[anchor] for table in tables])
            if joined is not None:
                made[anchor] = joined
    return made


def _same_images(node: Node, context: Context, values: Sequence[Value], dim: int, *, removed: bool) -> None:
    """Raise BoundError unless all values count the images where the result does, and that is not `dim`."""
    batch = node.batch
    if batch is None:
        return
    expected = batch - 1 if removed and batch > dim else batch
    if batch == dim or any(x.node.batch != expected for x in values):
        raise context.mixed(node)


def _length(item: object, dim: int, stacked: bool) -> int:
    """Return how many rows a constant takes."""
    tensor = item.tensor if isinstance(item, BatchConstant) else item
    if not isinstance(tensor, torch.Tensor):
        raise BoundError(f"cannot concatenate {type(item).__name__}")
    return 1 if stacked else tensor.shape[dim]


def _stacked(parts: Sequence[Representation | int], dim: int, stacked: bool) -> Representation | None:
    """Return maps one after the other along the channels, constants (their number of rows) as zero rows."""
    data = [_inserted(part, dim) if stacked else part for part in parts if isinstance(part, Representation)]
    if not all(part.layout.is_axis(dim, "c") for part in data):
        return None
    total = sum(part if isinstance(part, int) else part.map.c_out for part in parts)
    layouts = {part.layout.placed(dim, "c", total) for part in data}
    if len(layouts) != 1:
        return None
    like, rows = data[0].map, iter(data)
    blank = [like.taps.new_zeros(1, 1, p, like.c_in) if isinstance(p, int) else None for p in parts]
    maps = [next(rows).map if taps is None else replace(like, taps=taps, shifts=((0, 0),), error=0.0) for taps in blank]
    joined = stack(maps)
    members = frozenset[int]().union(*(part.members for part in data))
    return None if joined is None else Representation(joined, layouts.pop(), members)


def _masked(given: Representation, dim: int, indices: Sequence[int]) -> Representation | None:
    """Return a map with some of its channels set to zero; zeros, such as a part not yet written, stay as they are."""
    if not given.map.taps.any() and not given.map.error:
        return given
    if not given.layout.is_axis(dim, "c"):
        return None
    mask = torch.ones(given.map.c_out, dtype=torch.float64)
    mask[list(indices)] = 0.0
    return replace(given, map=given.map.scaled(mask).trimmed())


def _embedded(given: Representation, dim: int, indices: list[int], size: int, single: bool) -> Representation | None:
    """Return a map whose channels or positions go to some indices of a dimension of this size, zeros elsewhere."""
    given = _inserted(given, dim) if single else given
    if given.layout.is_axis(dim, "c"):
        order, mask = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.float64)
        order[indices], mask[indices] = torch.arange(len(indices)), 1.0
        rows = given.map.rows(order)
        return (
            None
            if rows is None
            else replace(given, map=rows.scaled(mask).trimmed(), layout=given.layout.placed(dim, "c", size))
        )
    for axis, name in enumerate("hw"):
        if given.layout.is_axis(dim, name) and indices == list(range(indices[0], indices[-1] + 1)):
            delta, out = [0, 0], list(given.map.out)
            delta[axis], out[axis] = -indices[0], size
            fused = compose(shift(given.map, delta, out, [1, 1]), given.map)
            return None if fused is None else replace(given, map=fused, layout=given.layout.placed(dim, name, size))
    return None


def _inserted(given: Representation, dim: int) -> Representation:
    dims = given.layout.dims
    return replace(given, layout=replace(given.layout, dims=(*dims[:dim], (), *dims[dim:])))


def _expanded(node: Node, context: Context, x: Value) -> Value:
    context.aligned(node, x)
    copies = math.prod(node.shape) // max(1, math.prod(x.shape))
    norm = ONE if copies == 1 else Bound(sqrt_up(float(copies)), "upper", "copies")

    def transform(given: Representation) -> Representation | None:
        dims = ((),) * (len(node.shape) - len(given.layout.dims)) + given.layout.dims
        return broadcast(replace(given, layout=replace(given.layout, dims=dims)), node.shape)

    return context.linear(node, x, transform, norm=lambda: norm, cheap=norm.value)


@ranged(
    "aten.cat.default", "aten.concat.default", "aten.stack.default", "aten.slice_scatter.default",
    "aten.select_scatter.default", "aten.copy.default", "aten.expand.default", "aten.expand_as.default",
    "aten.broadcast_to.default", "aten.repeat.default", "aten.tile.default", "aten.masked_fill.Scalar",
    "aten.masked_fill.Tensor",
)  # fmt: skip
def _joined_range(node: Node, ranges: Ranges) -> Range:
    """Join the ends as the operator joins the entries."""
    return monotone(node, ranges)


@ranged("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf")
def _either_range(node: Node, ranges: Ranges) -> Range:
    """Range over both values, whatever the condition."""
    if not isinstance(node["condition"], Ref):
        return monotone(node, ranges)
    found = hull(ranges.of(node, "self"), ranges.of(node, "other"))
    shape = (1,) * (len(node.shape) - found.low.ndim)
    return Range(found.low.reshape(*shape, *found.low.shape), found.high.reshape(*shape, *found.high.shape))
