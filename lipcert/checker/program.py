"""The program: the list of operators, read and understood node by node."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .attention import ATTENTION
from .maps import Map, identity
from .operators import OPERATORS, Operation, Value
from .reading import ENTRIES, Array, Rejected, only, require, take
from .resampling import RESAMPLING

KNOWN = OPERATORS | RESAMPLING | ATTENTION
SCHEMA = 1


@dataclass(frozen=True)
class Node:
    """One operator; its arguments are values, tensors, and what JSON holds."""

    op: str
    shape: Sequence[int]
    arguments: Mapping[str, Any]
    whole: bool  # the result is the only one of the operator


class Program:
    """The nodes by name, in order. An operator that cannot be understood is refused when it is used."""

    def __init__(self, record: Any, tensors: Mapping[str, Array]) -> None:
        only(record, ("schema", "input", "output", "nodes", "sha256"), "program")
        schema = take(record, "schema", int, "program")
        require(schema == SCHEMA, f"program: schema {schema} is not {SCHEMA}, the one that this checker knows")
        self.nodes: dict[str, Node] = {}
        self.input, self.output = take(record, "input", str, "program"), take(record, "output", str, "program")
        for i, node in enumerate(take(record, "nodes", list, "program")):
            name = take(node, "name", str, f"node {i}")
            where = f"node {i} ({name})"
            only(node, ("name", "op", "shape", "arguments", "output"), where)
            require(name not in self.nodes, f"{where}: the name appears twice")
            op, shape = take(node, "op", str, where), take(node, "shape", list, where)
            require(all(type(side) is int and side > 0 for side in shape), f"{where}: 'shape' is malformed")
            require(math.prod(shape) <= ENTRIES, f"{where}: 'shape' is too large")
            first = op == "input"
            require(first == (i == 0) == (name == self.input), f"{where}: the input is the first node, and no other")
            given = take(node, "arguments", dict, where)
            arguments = {key: self._argument(value, tensors, where) for key, value in given.items()}
            self.nodes[name] = Node(op, shape, arguments, node.get("output") is None)
        require(self.output in self.nodes, f"program: there is no node {self.output!r}")
        self.order = {name: i for i, name in enumerate(self.nodes)}
        self._operations: dict[str, Operation] = {}

    def _argument(self, given: Any, tensors: Mapping[str, Array], where: str) -> Any:
        """Return the value or the tensor that an argument refers to, or else the argument itself.

        What no operator takes, such as a tensor of integers, stays the record that it is: operators refuse those.
        """
        if isinstance(given, list):
            return [self._argument(item, tensors, where) for item in given]
        name = next(iter(given.values())) if isinstance(given, dict) and len(given) == 1 else None
        if isinstance(name, str) and "value" in given:
            require(name in self.nodes, f"{where}: the value {name!r} is not that of an earlier node")
            return Value(name, self.shape(name), self.nodes[name].op == "lipcert.normalize")
        if isinstance(name, str) and "tensor" in given:
            require(name in tensors, f"{where}: there is no tensor {name!r}")
            return tensors[name] if tensors[name].dtype == np.float64 else given
        return given

    def shape(self, name: str) -> Sequence[int]:
        return self.nodes[name].shape

    def operation(self, name: str) -> Operation:
        """Return what a node computes; Rejected with the name of its operator if this is not known."""
        if name not in self._operations:
            node = self.nodes[name]
            try:
                require(node.op in KNOWN and node.whole, "it is not known here")
                for argument in node.arguments.values():
                    if isinstance(argument, Value) and argument.unit:
                        self.operation(argument.name)  # refuses another normalisation than of rows
                made = KNOWN[node.op](node.shape, **node.arguments)
                zeros = [np.zeros((1, *self.shape(x))) for x in made.inputs]
                require(list(made.run(*zeros)[0].shape) == [1, *node.shape], "the shape of the result")
            except (TypeError, ValueError, AttributeError, IndexError, KeyError, ArithmeticError) as error:
                raise Rejected(f"operator {node.op} ({name}) cannot be rechecked: arguments ({error})") from error
            except Rejected as error:
                raise Rejected(f"operator {node.op} ({name}) cannot be rechecked: {error}") from error
            self._operations[name] = made
        return self._operations[name]

    def between(self, values: Sequence[str], source: str) -> list[str]:
        """Return the nodes on the way from the source to affine functions of it, in order; `values` among them."""
        found: set[str] = set()
        waiting = list(values)
        while waiting:
            name = waiting.pop()
            if name == source or name in found:
                continue
            before = self.order[name] < self.order[source]
            if before or self.operation(name).trace is None:
                raise Rejected(f"it is not an affine function of {source} alone, because of {name}")
            found.add(name)
            waiting.extend(self.operation(name).inputs)
        return sorted(found, key=self.order.__getitem__)

    def maps(self, values: Sequence[str], source: str) -> list[Map]:
        """Return the linear maps from the source to values that are affine functions of it alone."""
        made = {source: identity(self.shape(source))}
        for name in self.between(values, source):
            operation = self.operation(name)
            assert operation.trace is not None
            try:
                made[name] = operation.trace(*(made[x] for x in operation.inputs))
            except Rejected as error:
                raise Rejected(f"operator {self.nodes[name].op} ({name}) cannot be rechecked: {error}") from error
        return [made[name] for name in values]
