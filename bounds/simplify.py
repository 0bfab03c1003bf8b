"""Graphs without operators that do nothing and without operators that are computed twice.

`x[:, :4]` is exported as a slice of a slice that takes everything, and two calls of `x.chunk(2)` as four slices. Parts
of one value are recognised as such only if they name the same parent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lipcert.bounds.graph import BatchConstant, Graph, Node, Ref

_NOTHING = {f"aten.{name}.default" for name in ("alias", "contiguous", "clone", "detach", "detach_", "lift_fresh_copy")}
_MAYBE_NOTHING = {
    f"aten.{name}"
    for name in (
        "slice.Tensor expand.default view.default reshape.default _unsafe_view.default flatten.using_ints "
        "squeeze.default squeeze.dim squeeze.dims expand_as.default view_as.default reshape_as.default"
    ).split()
}
_DROPOUT = {f"aten.{name}.default" for name in ("dropout", "feature_dropout", "alpha_dropout")}


def simplify(graph: Graph) -> Graph:
    """Return the graph with every operator once, and without those that hand on their argument as it is."""
    same: dict[str, str] = {}  # removed node → the node that stands for it
    seen: dict[Any, str] = {}
    kept: dict[str, Node] = {}
    for node in graph.nodes:
        arguments = {key: _renamed(argument, same) for key, argument in node.arguments.items()}
        node = replace(node, arguments=MappingProxyType(arguments))
        source = _hands_on(node, kept)
        key = (node.op, node.output, node.shape, node.batch, *((name, _key(arguments[name])) for name in arguments))
        if source is None and node.name != graph.input.name:
            source = seen.setdefault(key, node.name)
        if source is not None and source != node.name:
            same[node.name] = source
        else:
            kept[node.name] = node
    return pruned(replace(graph, nodes=tuple(kept.values()), output=same.get(graph.output, graph.output)))


def pruned(graph: Graph) -> Graph:
    """Return the graph without nodes that the output does not depend on."""
    table = {node.name: node for node in graph.nodes}
    needed, stack = {graph.input.name}, [graph.output]
    while stack:
        name = stack.pop()
        if name not in needed:
            needed.add(name)
            stack.extend(table[name].inputs)
    return replace(graph, nodes=tuple(node for node in graph.nodes if node.name in needed))


def _hands_on(node: Node, table: Mapping[str, Node]) -> str | None:
    """Return the name of the argument that the node returns unchanged, None if it does something."""
    if node.op in _DROPOUT and node["train"] is False and isinstance(node["input"], Ref):
        return node["input"].name
    if node.op in _NOTHING or node.op in _MAYBE_NOTHING:
        ref = node["self"]
        if isinstance(ref, Ref):
            source = table[ref.name]
            if (source.shape, source.batch) == (node.shape, node.batch) and not _reversed(node):
                return source.name
    return None


def _reversed(node: Node) -> bool:
    """Return whether a slice of full size may still change the order; torch allows positive steps only."""
    return node.op == "aten.slice.Tensor" and node["step"] != 1


def _renamed(argument: Any, same: Mapping[str, str]) -> Any:
    if isinstance(argument, Ref):
        return Ref(same.get(argument.name, argument.name))
    return tuple(_renamed(item, same) for item in argument) if isinstance(argument, tuple) else argument


def _key(argument: Any) -> Any:
    """Return something hashable that is equal for equal arguments; tensors are equal only to themselves."""
    if isinstance(argument, tuple | list):
        return tuple(_key(item) for item in argument)
    if isinstance(argument, Tensor | BatchConstant):
        return id(argument)
    return type(argument), argument
