"""Where the entries of a value come from, through operators that only move entries.

A fused projection is one linear layer whose output is viewed, permuted and cut into queries, keys and values of several
heads, and into windows. Instead of matching the many ways to write this, the operators are run on the numbers of the
entries: what comes out says for every entry which one it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipcert.bounds.graph import BatchConstant, BatchSize, Node, Ref, call

MOVING = frozenset(
    f"aten.{name}"
    for name in (
        "alias.default contiguous.default clone.default view.default reshape.default _unsafe_view.default "
        "flatten.using_ints unflatten.int squeeze.default squeeze.dim squeeze.dims unsqueeze.default view_as.default "
        "permute.default transpose.int swapaxes.default movedim.int movedim.intlist t.default mT.default slice.Tensor "
        "narrow.default select.int index_select.default index.Tensor flip.default roll.default constant_pad_nd.default "
        "pad.default detach.default expand.default"
    ).split()
)
LARGEST = 2**26  # entries of a value whose origin is looked for


@dataclass(frozen=True, eq=False)
class Origin:
    """Say that value = factor · (entries of `source`, numbered from 1 in `index`; 0 stands for a zero put in)."""

    source: str
    index: Tensor
    factor: float = 1.0


def origin(nodes: Mapping[str, Node], name: str, *, places: bool = True) -> Origin:
    """Return the nearest value, backwards, that is made by something else than moving entries and scaling all alike.

    Without `places`, or for a value of too many entries, the index is empty.
    """
    chain: list[Node] = []
    node = nodes[name]
    while (source := _moved(node)) is not None:
        chain.append(node)
        node = nodes[source]
    size = math.prod(node.shape)
    if not places or size > LARGEST:
        return Origin(node.name, torch.zeros(0))
    index, factor = torch.arange(1, size + 1, dtype=torch.float64).reshape(node.shape), 1.0
    for step in reversed(chain):
        constant = _factor(step)
        if constant is not None:
            factor *= constant
            continue
        arguments = {key: _given(argument, index) for key, argument in step.arguments.items()}
        index = call(step.target, arguments)
    return Origin(node.name, index, factor)


def _moved(node: Node) -> str | None:
    """Return what a node moves or scales, None if it does something else."""
    if len(node.inputs) != 1 or node.output is not None:
        return None
    if node.op in MOVING:
        fill = node.arguments.get("value")
        constant = node.arguments.get("mode", "constant") == "constant"
        return node.inputs[0] if constant and not fill else None
    return node.inputs[0] if _factor(node) is not None else None


def _factor(node: Node) -> float | None:
    """Return the number that a node multiplies all entries by."""
    if node.op not in ("aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar"):
        return None
    other = node["other"] if isinstance(node["self"], Ref) else node["self"]
    if isinstance(other, Tensor) and other.numel() == 1 and other.ndim <= len(node.shape):
        other = float(other)
    if isinstance(other, bool) or not isinstance(other, int | float):
        return None
    if node.op.startswith("aten.mul"):
        return float(other)
    return 1.0 / float(other) if other and isinstance(node["self"], Ref) else None


def _given(argument: Any, index: Tensor) -> Any:
    if isinstance(argument, Ref):
        return index
    if isinstance(argument, BatchSize):
        return argument.factor
    if isinstance(argument, BatchConstant):
        return argument.tensor
    return [_given(item, index) for item in argument] if isinstance(argument, tuple) else argument
