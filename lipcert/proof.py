"""The proof of a bound as data: the network as a list of operators, and why each value is bounded by others before.

`Proof.of(audit)` writes down what an audit found, so that another program can check it without lipcert or torch; see
docs/certificate.md for the format. Constants of layers are enlarged by a relative 2^-22 (`SLACK`): a checker with
another method arrives at a slightly different number, and what is written must be above that as well. Radii are
computed from the enlarged constants.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lipcert.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lipcert.bounds.audit import Audit
    from lipcert.bounds.core import Bound
    from lipcert.bounds.graph import Graph
    from lipcert.bounds.values import Derivation

SCHEMA = 1
SLACK = 1.0 + 2.0**-22


@dataclass(frozen=True)
class Proof:
    """A network as a list of operators with its tensors, and the steps by which its bound follows."""

    program: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    upper: float
    heads: Sequence[str]  # values that the logits are an affine function of
    file: bytes  # program.safetensors, the tensors of the program
    audit: Audit  # with the bounds that follow from the steps

    @classmethod
    def of(cls, audit: Audit) -> Proof:
        """Write down the proof of an audit; one without a finite bound raises InputError."""
        require_finite(audit)
        graph, derivations = audit.program.graph, audit.program.derivations
        head, last = audit.head, audit.pixel_head
        heads = [name for name in dict.fromkeys((head.source, head.start)) if name] if head is not None else []
        if last is not None:
            heads.append(last.source)
        steps, bounds = _steps(graph, derivations, [*heads, graph.output])
        upper = bounds[graph.output]
        found = replace(audit, upper=upper)
        if head is not None:
            start = None if head.anchor is None else bounds[head.start]
            found = replace(found, head=replace(head, penultimate=bounds[head.source], logits=upper, anchor=start))
        if audit.position is not None:  # the position proof is no part of what is written
            found = replace(found, position=min(upper, audit.position, key=lambda bound: bound.order))
        if last is not None:
            joint = bounds[last.source]
            pixel = min(joint, _enlarged(last.pixel), key=lambda bound: bound.order)
            found = replace(found, pixel_head=replace(last, joint=joint, pixel=pixel))
        program, file = _program(graph)
        return cls(program, steps, upper.value, heads, file, found)

    @property
    def pairwise(self) -> Tensor:
        """Return bounds (k, k) of z_i - z_j that follow from the steps."""
        return self.audit.pairwise()

    def to_json(self) -> dict[str, Any]:
        """Return the parts of certificate.json that hold the proof; the tensors are in the file beside it."""
        return {
            "program": {**self.program, "sha256": hashlib.sha256(self.file).hexdigest()},
            "proof": {"steps": list(self.steps), "upper": self.upper, "heads": list(self.heads)},
        }


def program_of(model: nn.Module, input_shape: Sequence[int]) -> tuple[dict[str, Any], bytes]:
    """Return the list of operators of an exported network and its safetensors file, as `Proof` writes them."""
    import torch

    from lipcert.bounds.patterns import lift
    from lipcert.bounds.tracing import trace

    with torch.no_grad():
        return _program(lift(trace(model, tuple(input_shape))))


def require_finite(audit: Audit) -> None:
    """Raise InputError, with the reasons, unless the bound is a number that radii can be computed from."""
    if math.isfinite(audit.upper.require_upper()):
        return
    if audit.upper.finite:
        reasons = f"its bound, {audit.upper.written}, is above the largest float"
    else:
        reasons = "; ".join(f"{name}: {reason}" for name, _, reason in audit.unbounded[:3])
    raise InputError(f"the network has no finite Lipschitz bound, so nothing can be certified: {reasons}")


def _steps(
    graph: Graph, derivations: Mapping[int, Derivation], results: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, Bound]]:
    """Return the steps by which the results are bounded as functions of the input of the graph, and these bounds."""
    names = [node.name for node in graph.nodes]
    bounds: dict[str, Bound] = {}
    steps = []
    for index in _needed(derivations, [names.index(name) for name in results]):
        derivation, name = derivations[index], names[index]
        if not index:
            bounds[name] = derivation.bound
            continue
        factors = [_enlarged(factor) for factor in derivation.factors]
        sources = [names[i] for i in derivation.sources]
        branches = None
        if graph.nodes[index].op == "aten.cat.default" and derivation.label != "affine" and len(sources) == 1:
            branches = _branches(graph, index, sources[0])
        if branches is not None:
            records, largest = branches
            factors = [max(largest, *factors, key=lambda factor: factor.value)]
        bounds[name] = _composed(factors, [bounds[source] for source in sources], derivation.joint)
        steps.append(
            {
                "value": name,
                "rule": derivation.label,
                "sources": sources,
                "factors": [factor.value for factor in factors],
                "joint": derivation.joint,
                "bound": bounds[name].value,
                "method": ", ".join(dict.fromkeys(factor.method for factor in factors)),
                **({} if branches is None else {"branches": records}),
            }
        )
    return steps, bounds


def _branches(graph: Graph, index: int, source: str) -> tuple[list[dict[str, Any]], Bound] | None:
    """Return the proofs of the parts of a concatenation, and the largest of their bounds.

    The parts are functions of different pieces of one source, and each proof is about such a piece, `start`: it walks
    the part of the network between the two once more. None where a part reads the source in several places.
    """
    from lipcert.bounds.graph import Node, Ref
    from lipcert.bounds.propagation import propagate

    nodes = {node.name: node for node in graph.nodes}
    records, largest = [], []
    for part in graph.nodes[index]["tensors"]:
        if not isinstance(part, Ref):
            return None
        found: set[str] = set()
        waiting = [part.name]
        while waiting:
            name = waiting.pop()
            if name != source and name not in found:
                found.add(name)
                waiting.extend(nodes[name].inputs)
        inside = [node for node in graph.nodes if node.name in found]
        if sum(source in node.inputs for node in inside) != 1 or inside[0].inputs != (source,):
            return None
        start = Node(inside[0].name, "input", {}, inside[0].shape, inside[0].batch)
        piece = replace(graph, nodes=(start, *inside[1:]), output=part.name)
        context, kept = propagate(piece, keep=[part.name])
        if not context.bound(kept[part.name]).finite:
            return None
        steps, bounds = _steps(piece, context.derivations, [part.name])
        records.append({"start": start.name, "steps": steps})
        largest.append(bounds[part.name])
    return records, max(largest, key=lambda bound: bound.order)


def _needed(derivations: Mapping[int, Derivation], results: Sequence[int]) -> list[int]:
    """Return the values that the results rest on, in topological order."""
    found: set[int] = set()
    stack = list(results)
    while stack:
        index = stack.pop()
        if index not in found:
            found.add(index)
            stack.extend(derivations[index].sources)
    return sorted(found)


def _enlarged(factor: Bound) -> Bound:
    """Return a factor with the slack, rounded up; 0 and 1 are exact, and are confirmed by the structure alone."""
    if factor.value in (0.0, 1.0):
        return factor
    return replace(factor, value=math.nextafter(factor.value * SLACK, math.inf))


def _composed(factors: Sequence[Bound], before: Sequence[Bound], joint: bool) -> Bound:
    from lipcert.bounds.values import root, total

    parts = [factor * bound for factor, bound in zip(factors, before, strict=True)]
    return (root if joint else total)(parts)


def _program(graph: Graph) -> tuple[dict[str, Any], bytes]:
    """Return the operators for one image as JSON-able data, and their tensors as a safetensors file."""
    import torch
    from safetensors.torch import save

    from lipcert.bounds.graph import BatchConstant, BatchSize, Ref

    names = {id(tensor): name for name, tensor in graph.weights.items()}
    tensors: dict[str, Tensor] = {}

    def written(argument: Any) -> Any:
        if isinstance(argument, Ref):
            return {"value": argument.name}
        if isinstance(argument, BatchSize):
            return argument.factor
        if isinstance(argument, BatchConstant):
            argument = argument.tensor
        if isinstance(argument, torch.Tensor):
            name = names.setdefault(id(argument), f"constant_{len(names)}")
            tensors[name] = argument
            return {"tensor": name}
        if isinstance(argument, tuple | list):
            return [written(item) for item in argument]
        if isinstance(argument, float) and not math.isfinite(argument):
            return {"number": repr(argument)}
        return argument if argument is None or isinstance(argument, bool | int | float | str) else str(argument)

    nodes = [
        {
            "name": node.name,
            "op": node.op,
            "shape": list(node.shape),
            **({} if node.output is None else {"output": node.output}),
            "arguments": {key: written(argument) for key, argument in node.arguments.items()},
        }
        for node in graph.nodes
    ]
    program = {"schema": SCHEMA, "input": graph.input.name, "output": graph.output, "nodes": nodes}
    return program, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
