"""Operators that only make sense together, lifted to one before the walk.

Taken one by one, the two halves of MaxMin cost √2 and centring costs 2; together both are 1. Each pattern is matched
exactly, a near miss is left as it is, which is looser and never wrong. The lifted operator computes the same numbers in
the same order.

- `lipcert.maxmin(a, b)`: a concatenation of max(a, b) and min(a, b), in either order, along any dimension. That a and b
  are the two halves of one value, interleaved or not, is seen by the walk from their pieces, and is not part of the
  pattern.
- `lipcert.maxmin_along(x, dim)`: a concatenation of the maximum and the minimum of x over one dimension of size 2.
- `lipcert.center(x, dims)`: x minus its mean over dimensions that are kept.
- `lipcert.normalize(x, dim, eps, kind)`: rows divided by their length, see `composites`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lipcert.bounds.composites import normalisation, normalize
from lipcert.bounds.graph import Graph, Node, Ref
from lipcert.bounds.simplify import pruned, simplify

_LARGER = ("aten.maximum.default", "aten.max.other")
_SMALLER = ("aten.minimum.default", "aten.min.other")
_LARGEST = ("aten.amax.default", "aten.max.dim")
_SMALLEST = ("aten.amin.default", "aten.min.dim")


def lift(graph: Graph) -> Graph:
    """Return the graph simplified, with every match replaced, and without the nodes that nothing reads any more."""
    graph = simplify(graph)
    table = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        match = _maxmin(node, table) or _center(node, table) or normalisation(node, table)
        if match is not None:
            op, arguments = match
            table[node.name] = replace(node, op=op, arguments=MappingProxyType(arguments), target=_TARGETS[op])
    return pruned(replace(graph, nodes=tuple(table[node.name] for node in graph.nodes)))


def _maxmin(node: Node, table: Mapping[str, Node]) -> tuple[str, dict[str, Any]] | None:
    if node.op not in ("aten.cat.default", "aten.concat.default", "aten.stack.default"):
        return None
    items = node["tensors"]
    if len(items) != 2 or not all(isinstance(item, Ref) for item in items):
        return None
    parts = [table[item.name] for item in items]
    if parts[0].shape != parts[1].shape:
        return None
    form = {"dim": node["dim"], "stacked": node.op.startswith("aten.stack")}
    for flipped, (large, small) in ((False, parts), (True, parts[::-1])):
        if large.op in _LARGER and small.op in _SMALLER:
            pair = [large["self"], large["other"]]
            if (
                all(isinstance(a, Ref) for a in pair)
                and {*pair} == {small["self"], small["other"]}
                and len({*pair}) == 2
            ):
                if table[pair[0].name].shape == table[pair[1].name].shape:
                    return "lipcert.maxmin", {"a": pair[0], "b": pair[1], "flipped": flipped, **form}
        if large.op in _LARGEST and small.op in _SMALLEST and large.output in (None, 0) and small.output in (None, 0):
            x, dims = large["self"], _dims(large)
            same = small["self"] == x and _dims(small) == dims and small["keepdim"] == large["keepdim"]
            if same and isinstance(x, Ref) and len(dims) == 1:
                shape = table[x.name].shape
                dim = dims[0] % len(shape)
                if shape[dim] == 2:
                    arguments = {"x": x, "dim": dim, "keepdim": large["keepdim"], "flipped": flipped}
                    return "lipcert.maxmin_along", {**arguments, "joined": node["dim"], "stacked": form["stacked"]}
    return None


def _center(node: Node, table: Mapping[str, Node]) -> tuple[str, dict[str, Any]] | None:
    if node.op != "aten.sub.Tensor" or node["alpha"] != 1:
        return None
    x, other = node["self"], node["other"]
    if not isinstance(x, Ref) or not isinstance(other, Ref):
        return None
    mean = table[other.name]
    if mean.op != "aten.mean.dim" or mean["self"] != x or not mean["keepdim"] or not mean["dim"]:
        return None
    rank = len(table[x.name].shape)
    return "lipcert.center", {"x": x, "dims": tuple(sorted({d % rank for d in _dims(mean)}))}


def _dims(node: Node) -> tuple[int, ...]:
    given = node["dim"]
    return (given,) if isinstance(given, int) else tuple(given)


# ----------------------------------------------------------------------------------------------- what they compute


def _join(large: Tensor, small: Tensor, dim: int, flipped: bool, stacked: bool) -> Tensor:
    parts: Sequence[Tensor] = (small, large) if flipped else (large, small)
    return torch.stack(tuple(parts), dim) if stacked else torch.cat(tuple(parts), dim)


def maxmin(a: Tensor, b: Tensor, dim: int, flipped: bool, stacked: bool) -> Tensor:
    """Return max(a, b) and min(a, b), one after the other.

    >>> maxmin(torch.tensor([1.0, 4.0]), torch.tensor([3.0, 2.0]), 0, False, False)
    tensor([3., 4., 1., 2.])
    """
    return _join(torch.maximum(a, b), torch.minimum(a, b), dim, flipped, stacked)


def maxmin_along(x: Tensor, dim: int, keepdim: bool, flipped: bool, joined: int, stacked: bool) -> Tensor:
    """Return the maximum and the minimum of x over a dimension, one after the other."""
    return _join(x.amax(dim, keepdim), x.amin(dim, keepdim), joined, flipped, stacked)


def center(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Return x minus its mean over some dimensions.

    >>> center(torch.tensor([[1.0, 3.0]]), (1,))
    tensor([[-1.,  1.]])
    """
    return x - x.mean(tuple(dims), keepdim=True)


_TARGETS = {"lipcert.maxmin": maxmin, "lipcert.maxmin_along": maxmin_along, "lipcert.center": center,
            "lipcert.normalize": normalize}  # fmt: skip
