"""Operators that pick entries in any pattern: several index tensors, overlapping windows, repeats.

Every output entry is one entry of the argument, or a constant. So the norm is √(how often the most frequent entry
occurs), counted by running the operator on the numbers of the entries. The same run, on two images, shows that entries
of different images stay apart.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lipcert.bounds.core import Bound, rule
from lipcert.bounds.graph import BatchConstant, BatchSize, Node, Ref, call
from lipcert.bounds.propagation import Context
from lipcert.bounds.ranges import Range, Ranges, monotone, ranged
from lipcert.bounds.rounding import sqrt_up
from lipcert.bounds.values import ONE, Rounding, Value

_PICKING = [f"aten.{name}.default" for name in "unfold im2col gather take_along_dim diagonal tril triu".split()]


@rule(*_PICKING, "aten.repeat_interleave.self_int", "aten.repeat.default", "aten.tile.default")
def selection(node: Node, context: Context) -> Value:
    """Bound an operator that picks entries by √(largest number of copies of an entry)."""
    if len(set(node.inputs)) > 1:
        return context.unbounded(node, [context.live[n] for n in node.inputs], "the index depends on the input")
    return picked(node, context, context.live[node.inputs[0]])


@rule("aten.col2im.default")
def folded(node: Node, context: Context) -> Value:
    """Bound the adjoint of `im2col`, which adds up overlapping windows, by the same norm: √(windows an entry)."""
    x = context.data(node, "self")
    if x.node.batch not in (0, None) or len(x.shape) != 3 or x.merged != (1, 1):
        raise context.mixed(node)
    windows = round(float(_run(node, torch.ones(x.shape, dtype=torch.float64), 1).max()))
    norm = ONE if windows <= 1 else Bound(sqrt_up(float(windows)), "upper", "copies")
    rounding = Rounding(((windows, norm.value),), operations=windows)
    return context.linear(node, x, None, norm=lambda: norm, cheap=norm.value, rounding=rounding)


def picked(node: Node, context: Context, x: Value) -> Value:
    """Return the value of an operator that copies entries of one argument or writes constants."""
    entries, merged = _entries(node, context, x)
    copies = int(torch.bincount(entries).max()) if entries.numel() else 0
    norm = ONE if copies <= 1 else Bound(sqrt_up(float(copies)), "upper", "copies")
    return context.linear(node, x, None, norm=lambda: norm, cheap=norm.value, merged=merged)


def _entries(node: Node, context: Context, x: Value) -> tuple[Tensor, tuple[int, int]]:
    """Return the numbers of the entries of one image that the outputs copy, and how its batch dimension is merged.

    Raises BoundError where an output of one image copies an entry of another.
    """
    numbers = torch.arange(1, math.prod(x.shape) + 1, dtype=torch.float64).reshape(x.shape)  # 0 is a constant
    alone = _run(node, numbers, 1).round().to(torch.int64)
    batch = x.node.batch
    if batch is None:
        return alone[alone > 0], (1, 1)
    far = math.prod(x.shape) + 1
    outer, inner = x.merged
    both = torch.stack([numbers, numbers + far]).movedim(0, batch)  # (..., 2, outer·inner, ...)
    both = both.unflatten(batch + 1, (outer, inner)).movedim(batch, batch + 1).flatten(batch, batch + 2)
    result = _run(node, both, 2).round().to(torch.int64)
    for merged in _ways(node, x):
        if node.batch is not None and math.prod(merged) == node.shape[node.batch]:
            parts = result.unflatten(node.batch, (merged[0], 2, merged[1])).movedim(node.batch + 1, 0)
            first, second = (part.flatten(node.batch, node.batch + 1) for part in parts)
            apart = bool((first < far).all()) and bool(((second == 0) | (second >= far)).all())
            if apart and torch.equal(first, alone) and torch.equal(first, (second - far).clamp_min(0)):
                return first[first > 0], merged
    raise context.mixed(node)


def _ways(node: Node, x: Value) -> list[tuple[int, int]]:
    """Return how the images may lie in the batch dimension of the result: as before, copies around or inside."""
    outer, inner = x.merged
    size = node.shape[node.batch] if node.batch is not None else 1
    more = max(1, size // max(1, outer * inner))
    return list(dict.fromkeys([(outer, inner), (outer * more, inner), (outer, inner * more)]))


def _run(node: Node, numbers: Tensor, images: int) -> Tensor:
    """Return the result for so many images, the argument replaced by numbers."""

    def given(argument: Any) -> Any:
        if isinstance(argument, Ref):
            return numbers
        if isinstance(argument, BatchSize):
            return argument.factor * images
        if isinstance(argument, BatchConstant):
            return argument.repeated(images).cpu()
        if isinstance(argument, Tensor):
            return argument.cpu()
        return [given(item) for item in argument] if isinstance(argument, tuple) else argument

    return call(node.target, {key: given(argument) for key, argument in node.arguments.items()})


@ranged(*_PICKING, "aten.repeat_interleave.self_int")
def _picked_range(node: Node, ranges: Ranges) -> Range:
    if len(set(node.inputs)) > 1:
        return ranges.unknown(node)
    return monotone(node, ranges)


@ranged("aten.col2im.default")
def _folded_range(node: Node, ranges: Ranges) -> Range:
    """Range over sums of as many entries as windows can meet."""
    return monotone(node, ranges, roundings=math.prod(node["kernel_size"]) + 1)
