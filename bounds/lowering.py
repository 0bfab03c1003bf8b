"""Operators that are several: written as the small ones that have rules.

`addcmul`, `baddbmm`, `lerp`, `glu`, variances and the `einsum` of two operands become products, sums, views and one
matrix product, in the order in which PyTorch's documentation defines them. The graph with the small operators is what
is bounded and evaluated; what is not understood stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lipcert.bounds.graph import BatchSize, Graph, Node, Ref

aten = torch.ops.aten


@dataclass
class _Writer:
    """Collect the nodes that stand for one; they have its place and, counted from the right, its batch dimension."""

    node: Node
    table: Mapping[str, Node]
    nodes: list[Node] = field(default_factory=list)

    def shape(self, argument: Any) -> tuple[int, ...]:
        if isinstance(argument, Ref):
            return self.find(argument).shape
        return tuple(argument.shape) if isinstance(argument, Tensor) else ()

    def find(self, ref: Ref) -> Node:
        return next((node for node in self.nodes if node.name == ref.name), None) or self.table[ref.name]

    def add(self, target: Any, shape: Sequence[int], batch: int | None, arguments: Mapping[str, Any]) -> Ref:
        """Append an operator and return its value."""
        name = f"{self.node.name}_part{len(self.nodes)}"
        what = {"op": str(target), "arguments": MappingProxyType(dict(arguments)), "target": target}
        self.nodes.append(replace(self.node, name=name, shape=tuple(shape), batch=batch, output=None, **what))
        return Ref(name)

    def both(self, target: Any, a: Any, b: Any, **more: Any) -> Any:
        """Append an operator of two operands that broadcasts, or evaluate it if both are constants."""
        if not isinstance(a, Ref) and not isinstance(b, Ref):
            return target(a, b, **more)
        shape = tuple(torch.broadcast_shapes(self.shape(a), self.shape(b)))
        return self.add(target, shape, self.batch(shape, a, b), {"self": a, "other": b, **more})

    def batch(self, shape: Sequence[int], *arguments: Any) -> int | None:
        data = [self.find(a) for a in arguments if isinstance(a, Ref)]
        places = {len(shape) - len(node.shape) + node.batch for node in data if node.batch is not None}
        return min(places, default=None)  # the rules refuse operands whose images do not meet


def lowered(graph: Graph) -> Graph:
    """Return the graph with every operator of the table replaced by smaller ones."""
    table: dict[str, Node] = {}
    for node in graph.nodes:
        function = _TABLE.get(node.op)
        writer = _Writer(node, table)
        if function is not None and function(writer) and writer.nodes:
            last = writer.nodes.pop()
            if (last.shape, last.batch) != (node.shape, node.batch):
                raise RuntimeError(f"{node.op} was written as something of another shape ({node.place})")
            for new in writer.nodes:
                table[new.name] = new
            node = replace(last, name=node.name)
        table[node.name] = node
    return replace(graph, nodes=tuple(table.values()))


def _addcmul(writer: _Writer) -> bool:
    """Write self + value·tensor1·tensor2."""
    node = writer.node
    parts = [node["self"], node["tensor1"], node["tensor2"]]
    if not all(isinstance(part, Ref | Tensor) for part in parts):
        return False
    product = writer.both(aten.mul.Tensor, parts[1], parts[2])
    writer.both(aten.add.Tensor, parts[0], product, alpha=node["value"])
    return True


def _baddbmm(writer: _Writer) -> bool:
    """Write beta·self + alpha·(batch1 @ batch2)."""
    node = writer.node
    a, b, bias = node["batch1"], node["batch2"], node["self"]
    if not all(isinstance(part, Ref | Tensor) for part in (a, b, bias)) or not any(isinstance(p, Ref) for p in (a, b)):
        return False
    shape = (*writer.shape(a)[:-1], writer.shape(b)[-1])
    product = writer.add(aten.bmm.default, shape, writer.batch(shape, a, b), {"self": a, "mat2": b})
    if node["beta"] != 1:
        bias = writer.both(aten.mul.Tensor, bias, torch.tensor(float(node["beta"]), dtype=torch.float64))
    writer.both(aten.add.Tensor, bias, product, alpha=node["alpha"])
    return True


def _lerp(writer: _Writer) -> bool:
    """Write self + weight·(end - self) for a number as weight."""
    node = writer.node
    difference = writer.both(aten.sub.Tensor, node["end"], node["self"], alpha=1)
    writer.both(aten.add.Tensor, node["self"], difference, alpha=float(node["weight"]))
    return True


def _variance(writer: _Writer) -> bool:
    """Write the variance as Σ(x - mean)²/(n - correction), the standard deviation as ‖x - mean‖/√(n - correction)."""
    node, x = writer.node, writer.node["self"]
    shape, place = writer.shape(x), writer.find(x).batch
    dims = node["dim"] if node["dim"] not in (None, ()) else tuple(range(len(shape)))
    dims = tuple(sorted({d % len(shape) for d in dims}))
    count = math.prod(shape[d] for d in dims)
    correction = node["correction"] if "correction" in node.arguments else int(node["unbiased"])
    freedom = count - (1 if correction is None else correction)
    if place in dims or freedom <= 0:
        return False
    flat = tuple(1 if d in dims else size for d, size in enumerate(shape))
    kept = {"dim": dims, "keepdim": True, "dtype": None}
    mean = writer.add(aten.mean.dim, flat, place, {"self": x, **kept})
    difference = writer.add(aten.sub.Tensor, shape, place, {"self": x, "other": mean, "alpha": 1})
    kept["keepdim"] = node["keepdim"]
    if node.op.startswith("aten.std"):
        length = {"self": difference, "ord": 2, **kept}
        total, divisor = writer.add(aten.linalg_vector_norm.default, node.shape, node.batch, length), math.sqrt(freedom)
    else:
        square = writer.add(aten.square.default, shape, place, {"self": difference})
        total = writer.add(aten.sum.dim_IntList, node.shape, node.batch, {"self": square, **kept})
        divisor = float(freedom)
    writer.add(aten.div.Scalar, node.shape, node.batch, {"self": total, "other": divisor})
    return True


def _recorded(writer: _Writer) -> bool:
    """Write instance normalisation with recorded statistics as batch normalisation, which it is."""
    node = writer.node
    if node["use_input_stats"]:
        return False
    kept = {key: node[key] for key in ("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps")}
    writer.add(aten.batch_norm.default, node.shape, node.batch, {**kept, "training": False, "cudnn_enabled": False})
    return True


def _glu(writer: _Writer) -> bool:
    """Write a·sigmoid(b) for the two halves of a dimension."""
    node, x = writer.node, writer.node["self"]
    dim = node["dim"] % len(node.shape)
    half = node.shape[dim]
    if dim == node.batch:
        return False
    cuts = [{"self": x, "dim": dim, "start": k * half, "end": (k + 1) * half, "step": 1} for k in (0, 1)]
    a, b = (writer.add(aten.slice.Tensor, node.shape, node.batch, cut) for cut in cuts)
    gate = writer.add(aten.sigmoid.default, node.shape, node.batch, {"self": b})
    writer.both(aten.mul.Tensor, a, gate)
    return True


def _einsum(writer: _Writer) -> bool:
    """Write the einsum of two operands as one matrix product of permuted and flattened operands.

    Labels in both operands and the result count matrices, labels in both operands alone are summed. Labels that one
    operand has twice, or that are summed in one operand alone, are left to whoever reads the error.
    """
    node = writer.node
    operands = node["tensors"]
    if len(operands) != 2 or not all(isinstance(x, Ref | Tensor) for x in operands):
        return False
    labels = _labels(node["equation"], [len(writer.shape(x)) for x in operands])
    if labels is None:
        return False
    first, second, result = labels
    shared = [k for k in result if k in first and k in second]
    summed = [k for k in first if k in second and k not in result]
    rows, columns = ([k for k in result if k in one and k not in shared] for one in (first, second))
    if {*first} != {*shared, *rows, *summed} or {*second} != {*shared, *columns, *summed}:
        return False
    sizes: dict[str, Any] = {}
    for x, names in zip(operands, (first, second), strict=True):
        known = writer.find(x).batch if isinstance(x, Ref) else None
        for k, (name, size) in enumerate(zip(names, writer.shape(x), strict=True)):
            sizes[name] = BatchSize(size) if k == known else sizes.get(name, size) if size == 1 else size
    if any(isinstance(sizes[k], BatchSize) for k in summed):
        return False
    # images that only one operand has count matrices too, for which the other is the same
    one, two = ([k for k in names if isinstance(sizes[k], BatchSize)] for names in (rows, columns))
    rows, columns = [k for k in rows if k not in one], [k for k in columns if k not in two]
    a = _arranged(writer, operands[0], first, (one + shared, rows, summed), sizes)
    b = _arranged(writer, operands[1], second, (two + shared, summed, columns), sizes)
    stack = one + two + shared
    shape = (*(_number(sizes[k]) for k in stack), writer.shape(a)[-2], writer.shape(b)[-1])
    product = writer.add(aten.matmul.default, shape, _place(sizes, stack), {"self": a, "other": b})
    order = [*stack, *rows, *columns]
    if [len(rows), len(columns)] != [1, 1]:
        product = _view(writer, product, [sizes[k] for k in order])
    if order != [*result]:
        dims = tuple(order.index(k) for k in result)
        shape = tuple(_number(sizes[k]) for k in result)
        writer.add(aten.permute.default, shape, _place(sizes, result), {"self": product, "dims": dims})
    return True


def _arranged(
    writer: _Writer, x: Any, names: Sequence[str], groups: tuple[list[str], list[str], list[str]], sizes: dict[str, Any]
) -> Any:
    """Return an operand as a stack of matrices: the first group counts them, the others are rows and columns."""
    order = [name for group in groups for name in group]
    dims = tuple(names.index(name) for name in order)
    given = [*(sizes[k] for k in groups[0]), *(math.prod(sizes[k] for k in group) for group in groups[1:])]
    if not isinstance(x, Ref):
        plain = x.permute(dims)
        return plain.reshape([*plain.shape[: len(groups[0])], *given[-2:]])
    if dims != tuple(range(len(dims))):
        shape = tuple(_number(sizes[k]) for k in order)
        x = writer.add(aten.permute.default, shape, _place(sizes, order), {"self": x, "dims": dims})
    return x if [len(groups[1]), len(groups[2])] == [1, 1] else _view(writer, x, given)


def _view(writer: _Writer, x: Ref, sizes: Sequence[Any]) -> Ref:
    batch = next((k for k, size in enumerate(sizes) if isinstance(size, BatchSize)), None)
    return writer.add(aten.reshape.default, tuple(map(_number, sizes)), batch, {"self": x, "shape": tuple(sizes)})


def _labels(equation: str, ranks: Sequence[int]) -> tuple[list[str], list[str], list[str]] | None:
    """Return the labels of both operands and of the result, "..." written out; None if one repeats."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    if len(operands) != 2 or (not arrow and "." in left):
        return None
    hidden = [chr(0x3B1 + k) for k in range(max(ranks))]
    names = []
    for text, rank in zip(operands, ranks, strict=True):
        dots = rank - len(text.replace("...", ""))
        names.append([*text.replace("...", "".join(hidden[len(hidden) - dots :]) if dots else "")])
    if not arrow:
        every = "".join("".join(name) for name in names)
        right = "".join(sorted(name for name in set(every) if every.count(name) == 1))
    longest = max(rank - len(text.replace("...", "")) for text, rank in zip(operands, ranks, strict=True))
    result = [*right.replace("...", "".join(hidden[len(hidden) - longest :]) if longest else "")]
    unique = all(len(set(name)) == len(name) for name in (*names, result))
    return (names[0], names[1], result) if unique else None


def _number(size: Any) -> int:
    return size.factor if isinstance(size, BatchSize) else size


def _place(sizes: Mapping[str, Any], names: Sequence[str]) -> int | None:
    return next((k for k, name in enumerate(names) if isinstance(sizes[name], BatchSize)), None)


_TABLE: dict[str, Callable[[_Writer], bool]] = {
    "aten.addcmul.default": _addcmul,
    "aten.baddbmm.default": _baddbmm,
    "aten.glu.default": _glu,
    "aten.einsum.default": _einsum,
    "aten.lerp.Scalar": _lerp,
    **{f"aten.{kind}.{form}": _variance for kind in ("var", "std") for form in ("dim", "correction")},
    "aten.instance_norm.default": _recorded,
}
