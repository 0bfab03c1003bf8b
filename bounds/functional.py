"""In-place operators of an exported program, and where its operators come from in the source.

`relu_` on the fresh output of a convolution is `relu`, as long as nothing else looks at the same memory. Writing
through views (`out[:, :4] = x[:, 4:]`) needs torch's own functionalisation, which turns it into `slice_scatter`; it
also renames some operators, so it is used only where it is needed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

# operators whose result is new memory that no other value shares
_FRESH = frozenset(
    "conv1d conv2d conv3d conv_transpose2d linear addmm matmul mm bmm batch_norm layer_norm group_norm instance_norm "
    "add sub mul div neg cat stack mean sum relu gelu silu sigmoid tanh max_pool2d avg_pool2d adaptive_avg_pool2d "
    "zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full".split()
)


def functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return the program itself if its in-place operators are simple, else torch's functionalised form of it."""
    changing = [node for node in program.graph.nodes if is_inplace(node)]
    if all(_simple(node) for node in changing):
        return program
    return program.run_decompositions({})


def is_inplace(node: torch.fx.Node) -> bool:
    """Return whether an operator writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def out_of_place(target: Any) -> Any:
    """Return the ordinary form of an in-place ATen operator (`aten.relu_.default` → `aten.relu.default`), or None."""
    name, overload = target._schema.name.split("::")[1], target._overloadname
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    return getattr(packet, overload, None) if name.endswith("_") else None


def _simple(node: torch.fx.Node) -> bool:
    """Return whether an in-place operator changes memory that no other value of the program shares."""
    changed = node.args[0]
    if out_of_place(node.target) is None or not isinstance(changed, torch.fx.Node) or changed.op != "call_function":
        return False
    kind = str(changed.target).split(".")[1] if str(changed.target).startswith("aten.") else ""
    if kind not in _FRESH and not (is_inplace(changed) and _simple(changed)):
        return False
    return not any(_may_share(user, changed) for user in changed.users if user is not node)


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
