"""ONNX files as torch modules: a short, documented list of operators, each with the meaning that its ONNX schema gives.

An ONNX file is data: nothing of it is executed but the operators listed in `OPERATORS`; any other one is an error that
names it. Every ONNX node becomes a submodule that carries the node's name, so that an audit can say where a bound comes
from. Sizes that the file computes (Shape, Gather, Concat) stay Python numbers, in NumPy arrays, so that the batch may
be symbolic; a file whose batch is fixed at 1 is read as one that takes any number of inputs.

Own code, because converters on PyPI lack the operators as torch.onnx writes them today (opset 18 to 20).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lipcert.errors import InputError, missing_extra
from lipcert.onnx_operators import OPERATORS


class OnnxNetwork(nn.Module):
    """Run the nodes of an ONNX graph in order. `shape` is that of one input, without the batch; None if not fixed."""

    def __init__(self, graph: Any, path: Path) -> None:
        super().__init__()
        from onnx import numpy_helper

        self.fixed: dict[str, Any] = {}  # whole numbers; weights are buffers
        self.buffer_of: dict[str, str] = {}
        for tensor in graph.initializer:
            self._hold(tensor.name, numpy_helper.to_array(tensor))
        inputs = [value for value in graph.input if value.name not in {t.name for t in graph.initializer}]
        if len(inputs) != 1 or len(graph.output) != 1:
            names = ", ".join(value.name for value in (*inputs, *graph.output))
            raise InputError(f"{path} has {len(inputs)} inputs and {len(graph.output)} outputs ({names}); one of each")
        self.source, self.result = inputs[0].name, graph.output[0].name
        dims = [d.dim_value if d.HasField("dim_value") else None for d in inputs[0].type.tensor_type.shape.dim]
        if len(dims) < 2 or dims[0] not in (None, 1):
            raise InputError(f"the input of {path} has the shape {dims}; its first dimension must count the inputs")
        self.one = dims[0] == 1
        rest = [size for size in dims[1:] if size is not None]
        self.shape = tuple(rest) if len(rest) == len(dims) - 1 else None
        self.plan: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
        for position, node in enumerate(graph.node):
            if node.op_type == "Constant":
                self._hold(node.output[0], _constant(node))
                continue
            name = re.sub(r"\W+", "_", node.name or f"{node.op_type}_{position}").strip("_")
            name = name if name and not hasattr(self, name) else f"{node.op_type}_{position}"
            self.add_module(name, Operator(node, self.one))
            self.plan.append((name, tuple(node.input), tuple(node.output)))

    def _hold(self, name: str, array: np.ndarray) -> None:
        if array.dtype.kind in "fV" or str(array.dtype) == "bfloat16":
            self.buffer_of[name] = f"weight_{len(self.buffer_of)}"
            self.register_buffer(self.buffer_of[name], torch.from_numpy(np.array(array, dtype=_wide(array))))
        elif array.dtype.kind in "iub":
            self.fixed[name] = np.array(array.tolist(), dtype=object)
        else:
            raise InputError(f"the ONNX constant {name} has the type {array.dtype}; floats and integers are understood")

    def forward(self, x: Tensor) -> Tensor:  # (n, ...)
        values: dict[str, Any] = {"": None, **self.fixed, self.source: x}
        for name, buffer in self.buffer_of.items():
            values[name] = self.get_buffer(buffer)
        for name, inputs, outputs in self.plan:
            found = self.get_submodule(name)([values[key] for key in inputs])
            found = found if isinstance(found, tuple) else (found,)
            values.update(zip(outputs, found, strict=False))
        return values[self.result]


class Operator(nn.Module):
    """One ONNX node."""

    def __init__(self, node: Any, one: bool) -> None:
        super().__init__()
        from onnx import helper

        self.kind, self.label = node.op_type, node.name or node.output[0]
        self.attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self.attributes = {k: v.decode() if isinstance(v, bytes) else v for k, v in self.attributes.items()}
        self.attributes.update(kind=node.op_type, outputs=len(node.output), one=one)

    def forward(self, inputs: Sequence[Any]) -> Any:
        try:
            return OPERATORS[self.kind](inputs, self.attributes)
        except InputError as error:
            raise InputError(f"ONNX node {self.label}: {error}") from error


def load_onnx(path: Path, input_shape: tuple[int, ...] | None = None) -> OnnxNetwork:
    """Read an ONNX file with one input and one output, and run it once on zeros where a shape is known.

    Raises InputError where the extra is missing, the file is not ONNX, where it has operators that are not in
    `OPERATORS` (all of them are named), or where it does not run on inputs of that shape.
    """
    try:
        import onnx
    except ImportError as error:
        raise missing_extra("onnx", "onnx") from error
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {error.filename or path}") from error
    except Exception as error:  # protobuf, checker and external data have no common error
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{path} is not a valid ONNX file: {reason[:200]}") from error
    unknown: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type not in (*OPERATORS, "Constant") or node.domain not in ("", "ai.onnx"):
            kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            unknown.setdefault(kind, node.name or (node.output[0] if node.output else "?"))
    if unknown:
        found = ", ".join(f"{kind} (node {name})" for kind, name in sorted(unknown.items()))
        raise InputError(f"{path} uses ONNX operators that are not understood: {found}")
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < 13 and any(node.op_type == "Softmax" for node in model.graph.node):
        raise InputError(f"{path} uses Softmax of opset {opset}, which means another function; convert it to opset 13")
    try:
        network = OnnxNetwork(model.graph, path).eval()
    except InputError:
        raise
    except Exception as error:  # what onnx's own checker lets through: shapes that do not fit, unknown types, no texts
        raise InputError(f"{path} is not a valid ONNX file: {type(error).__name__}: {error}"[:300]) from error
    shape = input_shape or network.shape
    if shape is not None:
        try:
            with torch.no_grad():
                network(torch.zeros(1, *shape))
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{path} does not run on inputs of {shape}: {str(error).splitlines()[0]}") from error
    return network


def _constant(node: Any) -> np.ndarray:
    from onnx import helper, numpy_helper

    attribute = node.attribute[0]
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return numpy_helper.to_array(value)
    kinds = {"value_float": np.float64, "value_floats": np.float64, "value_int": np.int64, "value_ints": np.int64}
    if attribute.name not in kinds:
        raise InputError(f"the ONNX constant {node.output[0]} is given as {attribute.name}; numbers are understood")
    return np.array(value, dtype=kinds[attribute.name])


def _wide(array: np.ndarray) -> type:
    return np.float64 if array.dtype == np.float64 else np.float32  # half precisions are exact in float32
