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
    pairwise: Tensor  # (k, k), bounds of z_i - z_j that follow from the steps

    @classmethod
    def of(cls, audit: Audit) -> Proof:
        """Write down the proof of an audit; one without a finite bound raises InputError."""
        require_finite(audit)
        graph, derivations = audit.program.graph, audit.program.derivations
        indices = {node.name: index for index, node in enumerate(graph.nodes)}
        head = audit.head
        heads = [] if head is None else [name for name in dict.fromkeys((head.source, head.start)) if name]
        bounds: dict[int, Bound] = {}
        steps = []
        for index in _needed(derivations, [indices[name] for name in (*heads, graph.output)]):
            derivation = derivations[index]
            if not index:
                bounds[index] = derivation.bound
                continue
            factors = [_enlarged(factor) for factor in derivation.factors]
            bounds[index] = _composed(factors, [bounds[i] for i in derivation.sources], derivation.joint)
            steps.append(
                {
                    "value": graph.nodes[index].name,
                    "rule": derivation.label,
                    "sources": [graph.nodes[i].name for i in derivation.sources],
                    "factors": [factor.value for factor in factors],
                    "joint": derivation.joint,
                    "bound": bounds[index].value,
                    "method": ", ".join(dict.fromkeys(factor.method for factor in factors)),
                }
            )
        upper = bounds[indices[graph.output]]
        found = replace(audit, upper=upper)
        if head is not None:
            start = None if head.anchor is None else bounds[indices[head.start]]
            found = replace(
                found, head=replace(head, penultimate=bounds[indices[head.source]], logits=upper, anchor=start)
            )
        program, file = _program(graph)
        return cls(program, steps, upper.value, heads, file, found.pairwise())

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


def _needed(derivations: Mapping[int, Any], results: Sequence[int]) -> list[int]:
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
