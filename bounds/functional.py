"""In-place operators of an exported program, and where its operators come from in the source.

`relu_` on the fresh output of a convolution is `relu`, as long as nothing else looks at the same memory. Writing
through views (`out[:, :4] = x[:, 4:]`) needs torch's own functionalisation, which turns it into `slice_scatter`; it
also renames some operators, so it is used only where it is needed. Regions that only switch gradients or autocast are
written out in place: casts mean nothing to a graph that is evaluated in one precision.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from lipcert.bounds.core import BoundError

_VIEWS = frozenset("slice select view reshape unsqueeze squeeze permute transpose expand alias narrow".split())
SHAPE_ONLY = {
    f"aten.{name}.default"
    for name in "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty".split()
}
DROPOUT = ("aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default")
_REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")

# operators whose result is new memory that no other value shares
_FRESH = frozenset(
    "conv1d conv2d conv3d conv_transpose2d linear addmm matmul mm bmm batch_norm layer_norm group_norm instance_norm "
    "add sub mul div neg cat stack mean sum relu gelu silu sigmoid tanh max_pool2d avg_pool2d adaptive_avg_pool2d "
    "zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full".split()
)


def functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return the program itself if its in-place operators are simple, else torch's functionalised form of it."""
    if not _unclear(program):
        return program
    program = program.run_decompositions({})
    for node in _unclear(program):
        raise BoundError(
            f"{node.target} writes into memory that other values may share ({module_path(node)}, {source_line(node)}); "
            "write it without changing a tensor in place"
        )
    return program


def _unclear(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    """Return the in-place operators, in any region, that are not simple."""
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    weights = weight_names(program)
    return [node for graph in graphs for node in graph.nodes if is_inplace(node) and not _simple(node, weights)]


def inlined(module: torch.fx.GraphModule) -> torch.fx.Graph:
    """Return a copy of the graph of a program in which regions stand in place of the calls to them.

    Raises BoundError for branches, loops and every other operator that runs a graph of its own.
    """
    graph = torch.fx.Graph()
    graph.output(_write(module, graph, {}))
    return graph


def autocasts(module: torch.fx.GraphModule) -> list[tuple[str, str]]:
    """Return what a program does in regions of lower precision: (type, "runs a part in …")."""
    found = []
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            if str(node.target) == "wrap_with_autocast" and node.args[2]:
                kind = str(node.args[1] or torch.float16).removeprefix("torch.")
                found.append((kind, f"runs a part in {kind} ({module_path(node)}, {source_line(node)})"))
    return found


def _write(module: torch.fx.GraphModule, graph: torch.fx.Graph, known: dict[torch.fx.Node, Any]) -> Any:
    """Copy the nodes of a module to the end of a graph and return what it outputs; `known` starts as its arguments."""
    for node in module.graph.nodes:
        if node in known or node.op == "get_attr":
            continue
        if node.op == "output":
            return torch.fx.node.map_arg(node.args[0], known.__getitem__)
        called = [a for a in node.args if isinstance(a, torch.fx.Node) and a.op == "get_attr"]
        if called:
            region = getattr(module, str(called[0].target))
            if str(node.target) not in _REGIONS or not isinstance(region, torch.fx.GraphModule):
                raise BoundError(
                    f"{node.target} runs a part of the program under a condition or repeatedly ({module_path(node)}, "
                    f"{source_line(node)}); only a fixed sequence of operators can be bounded"
                )
            given = [known[a] for a in node.args[node.args.index(called[0]) + 1 :]]
            inner = dict(zip(region.graph.find_nodes(op="placeholder"), given, strict=True))
            known[node] = _write(region, graph, inner)
        elif node.target is operator.getitem and isinstance(known[node.args[0]], list | tuple):
            known[node] = known[node.args[0]][node.args[1]]
        else:
            known[node] = graph.node_copy(node, known.__getitem__)
    raise BoundError("the exported program has no output")


def is_inplace(node: torch.fx.Node) -> bool:
    """Return whether an operator writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def out_of_place(target: Any) -> Any:
    """Return the ordinary form of an in-place ATen operator (`aten.relu_.default` → `aten.relu.default`), or None."""
    name, overload = target._schema.name.split("::")[1], target._overloadname
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    return getattr(packet, overload, None) if name.endswith("_") else None


def _simple(node: torch.fx.Node, weights: Collection[str]) -> bool:
    """Return whether an in-place operator changes memory that no other value of the program shares, or nothing."""
    changed = node.args[0]
    if str(node.target).replace("_.", ".") in DROPOUT and node.args[2] is False:
        return True
    if constant(node, weights):
        return _made(node)  # then the program's own writes are repeated
    if out_of_place(node.target) is None or not isinstance(changed, torch.fx.Node) or changed.op != "call_function":
        return False
    kind = str(changed.target).split(".")[1] if str(changed.target).startswith("aten.") else ""
    if kind not in _FRESH and not (is_inplace(changed) and _simple(changed, weights)):
        return False
    return not any(_may_share(user, changed) for user in changed.users if user is not node)


def constant(node: torch.fx.Node, weights: Collection[str]) -> bool:
    """Return whether an operator depends on weights alone, but for the shape that `zeros_like` takes of something."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current.op == "placeholder" and current.name not in weights:
            return False
        if str(current.target) not in SHAPE_ONLY:
            pending += [source for source in current.all_input_nodes if source not in seen]
            seen.update(current.all_input_nodes)
    return True


def weight_names(program: torch.export.ExportedProgram) -> frozenset[str]:
    """Return the names by which the graph of a program calls its parameters, buffers and literal tensors."""
    signature = program.graph_signature
    tables = (signature.inputs_to_parameters, signature.inputs_to_buffers, signature.inputs_to_lifted_tensor_constants)
    return frozenset(name for table in tables for name in table)


def _made(node: torch.fx.Node) -> bool:
    """Return whether an in-place operator writes, through views, into memory that an operator of the program made."""
    changed = node
    while isinstance(changed, torch.fx.Node) and str(changed.target).startswith("aten."):
        kind = str(changed.target).split(".")[1]
        if kind in _FRESH:
            return True
        if kind not in _VIEWS and not is_inplace(changed):
            return False
        changed = changed.args[0]  # type: ignore[assignment]
    return False


def _may_share(node: torch.fx.Node, changed: torch.fx.Node) -> bool:
    """Return whether a value may share memory with its argument `changed`; operators not known to be fresh may."""
    if node.op != "call_function" or (is_inplace(node) and node.args[0] is changed):
        return True
    name = str(node.target)
    return not (name.startswith("aten.") and name.split(".")[1].removesuffix("_") in _FRESH)


def module_path(node: torch.fx.Node) -> str:
    """Return the qualified name of the module whose forward ran an operator, "" at the top level."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else path


def source_line(node: torch.fx.Node) -> str:
    """Return "file.py:12" of the innermost line outside torch, else of the innermost line; "" if unknown."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    outside = [frame for frame in frames if "/torch/" not in frame[0].replace("\\", "/")]
    if not frames:
        return ""
    file, line = (outside or frames)[-1]
    return f"{Path(file).name}:{line}"
