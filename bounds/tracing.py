"""From a PyTorch model to a `Graph`.

torch.export runs without decompositions, so that convolutions, normalisations and activations stay whole, and with a
symbolic batch, so that the graph shows which dimension of every value counts the images. Operators of constants alone
(weights, buffers, literals) are evaluated once in float64; what they give is from then on part of the weights. In-place
operators become ordinary ones, pieces of a `chunk`, `split` or `unbind` become slices, casts between floating-point
types disappear: the graph is evaluated in one precision.

A model may return its result in a dictionary, a tuple or a dataclass, as long as it is the only one.

*Models for one image at a time.* Where torch.export cannot keep the batch symbolic (a program that fixes its batch),
the model is exported for a batch of exactly one image and evaluated image by image, provided that it gives the same
results for a few images at once. What is then proved is a property of that function of one image.
"""

from __future__ import annotations

import copy
import itertools
import operator
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lipcert.bounds.core import BoundError
from lipcert.bounds.functional import (
    DROPOUT,
    SHAPE_ONLY,
    autocasts,
    constant,
    functional,
    inlined,
    is_inplace,
    module_path,
    out_of_place,
    source_line,
    weight_names,
)
from lipcert.bounds.graph import BatchConstant, BatchSize, Graph, Node, Ref, call, leaves, refs
from lipcert.bounds.lowering import lowered
from lipcert.bounds.simplify import pruned

Example = tuple[int, ...]
_CUTS = (
    "chunk",
    "split",
    "split_with_sizes",
    "unbind",
    "tensor_split",
    "unsafe_chunk",
    "unsafe_split",
    "unsafe_split_with_sizes",
)
# operators that compute nothing: what they make of weights is the same in every precision
_MOVES = frozenset(
    "view reshape _unsafe_view flatten unflatten transpose t permute numpy_T mT swapaxes movedim expand expand_as "
    "unsqueeze squeeze slice select narrow index index_select gather cat stack chunk split split_with_sizes unbind "
    "tensor_split clone contiguous alias detach detach_ lift_fresh_copy lift_fresh roll flip repeat tile "
    "repeat_interleave diagonal tril triu neg abs relu maximum minimum constant_pad_nd pad masked_fill where copy fill "
    "zeros ones full zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty empty arange "
    "scalar_tensor eye slice_scatter select_scatter pixel_shuffle pixel_unshuffle dropout to _to_copy type_as".split()
)
_CASTS = ("aten.to.", "aten._to_copy.", "aten.type_as.", "aten.float.", "aten.double.")


def trace(model: nn.Module | torch.export.ExportedProgram, input_shape: Example) -> Graph:
    """Export a model (a float64 copy in evaluation mode) for inputs (n, *input_shape) and return its graph.

    Raises BoundError where torch cannot export the model, where weights are NaN or infinite, where the result is not
    one tensor, and where a value does not keep the images of a batch apart.
    """
    if isinstance(model, torch.export.ExportedProgram):
        program = model
    else:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_complex() or tensor.is_quantized:
                raise BoundError(
                    f"{name} has the type {tensor.dtype}, and its copy in float64 is another network (complex numbers "
                    "lose their imaginary parts); only networks of real numbers can be bounded"
                )
        try:
            plain = copy.deepcopy(model).eval().to(torch.float64)
        except Exception as error:
            raise BoundError(f"the model cannot be copied to float64: {_first_line(error)}") from error
        # float32 holds the weights as exactly as float64 does, and is what models with casts of their own run in
        given = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
        narrow = given <= {torch.float32, torch.bfloat16, torch.float16}
        program = _export(plain, input_shape, (torch.float64, torch.float32) if narrow else (torch.float64,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = functional(program)
    return _Builder(program, input_shape).graph()


def _export(model: nn.Module, input_shape: Example, dtypes: Sequence[torch.dtype]) -> torch.export.ExportedProgram:
    """Export a model in the first of these types that it runs in, with a symbolic batch if possible."""
    device = next((p.device for p in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    errors = []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for shapes, dtype in itertools.product((dynamic, None), dtypes):
            example = torch.zeros(2 if shapes else 1, *input_shape, dtype=dtype, device=device)
            model = model.to(dtype)
            try:
                program = torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)
            except Exception as error:
                errors.append(error)
                continue
            if shapes or _same_alone(model, example):
                return program
    raise BoundError(
        f"torch.export cannot export the model for inputs (batch, {', '.join(map(str, input_shape))}): "
        f"{_first_line(errors[0])}. Give the right input shape, and keep the program free of branches on data and "
        "of a fixed batch size"
    ) from errors[0]


def _same_alone(model: nn.Module, example: Tensor) -> bool:
    """Return whether a model takes two and three images at once and treats them as it treats each of them alone."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, *example.shape[1:], generator=generator).to(example)
    close = 1e-6 if example.dtype == torch.float64 else 1e-3
    alone = [_tensors(model(image)) for image in images.split(1)]
    for count in (2, 3):
        try:
            together = _tensors(model(images[:count]))
        except Exception:
            return False
        for k, part in enumerate(together):
            rows = [result[k] for result in alone[:count]]
            if any(row.shape[:1] != (1,) for row in rows) or part.shape != (count, *rows[0].shape[1:]):
                return False
            expected = torch.cat(rows)
            if not torch.allclose(part, expected, rtol=close, atol=close * float(expected.abs().max())):
                return False
    return True


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:400].rstrip(".")


class _Builder:
    """Turn one exported program into a Graph; `environment` maps fx nodes to Ref, tensors, numbers and tuples."""

    def __init__(self, program: torch.export.ExportedProgram, input_shape: Example) -> None:
        self.program = program
        self.environment: dict[torch.fx.Node, Any] = {}
        self.nodes: dict[str, Node] = {}
        self.weights: dict[str, Tensor] = {}
        self.symbol: Any = None
        self.input_shape = tuple(input_shape)
        self.names = weight_names(program)
        self.departures: list[tuple[str, str]] = []

    def graph(self) -> Graph:
        signature = self.program.graph_signature
        if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
            changed = ", ".join((signature.buffers_to_mutate or signature.user_inputs_to_mutate).values())
            raise BoundError(f"the model changes {changed} while it runs; only a fixed function can be bounded")
        with torch.no_grad():
            for node in inlined(self.program.graph_module).nodes:
                if node.op == "placeholder":
                    self.environment[node] = self._placeholder(node)
                elif node.op == "call_function":
                    self.environment[node] = self._call(node)
                elif node.op == "output":
                    return self._finish(node)
        raise BoundError("the exported program has no output")

    def _placeholder(self, node: torch.fx.Node) -> Any:
        signature = self.program.graph_signature
        for table in (signature.inputs_to_parameters, signature.inputs_to_buffers):
            if node.name in table:
                name = table[node.name]
                tensor = self.program.state_dict.get(name, self.program.constants.get(name))
                return self._weight(name, tensor, bool(node.users))
        if node.name in signature.inputs_to_lifted_tensor_constants:
            name = signature.inputs_to_lifted_tensor_constants[node.name]
            return self._weight(name, self.program.constants[name], bool(node.users))
        value = node.meta["val"]
        if not isinstance(value, Tensor) or self.nodes:
            raise BoundError(f"the model must take exactly one tensor; {node.name} is another input")
        first = value.shape[0] if value.ndim else 0
        self.symbol = first.node.expr if isinstance(first, torch.SymInt) else None
        given, shape = self.input_shape, tuple(value.shape[1:])
        if shape != given or (self.symbol is None and first != 1):
            raise BoundError(
                f"the program was exported for inputs {tuple(value.shape)}, not (batch, *{given}); export it for that "
                "shape with a dynamic batch dimension or a batch of one"
            )
        self.nodes[node.name] = Node(node.name, "input", {}, (1, *given), None if self.symbol is None else 0)
        return Ref(node.name)

    def _weight(self, name: str, tensor: Tensor | None, used: bool) -> Any:
        if not used:
            return None
        if not isinstance(tensor, Tensor):
            raise BoundError(f"the program refers to {name}, which is not a tensor")
        tensor = _upcast(tensor.detach())
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BoundError(f"weight {name} has NaN or infinite entries; no bound holds for it")
        self.weights[name] = tensor
        return tensor

    def _call(self, node: torch.fx.Node) -> Any:
        value = node.meta.get("val")
        if value is None or isinstance(value, int | float | bool | torch.SymInt | torch.SymBool | torch.SymFloat):
            return self._number(node, value)
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self.environment[n])
        if node.target is operator.getitem:
            return self._item(node, node.args[0], args[0], args[1])
        # writes of constants are repeated on the tensors themselves, which share memory as those of the program do
        written = is_inplace(node) and not constant(node, self.names)
        target = out_of_place(node.target) if written else node.target
        arguments = _bind(target, args, kwargs)
        data = list(refs(list(arguments.values())))
        if str(target) in SHAPE_ONLY or not data:
            result: Any = self._fold(node, target, arguments)
        else:
            if str(target).startswith(_CASTS) and isinstance(value, Tensor) and value.is_floating_point():
                self._note_cast(node, value.dtype)
                target, arguments = torch.ops.aten.alias.default, {"self": data[0]}
            result = self._record(node, target, arguments)
        changed: Any = node
        while is_inplace(changed):  # whoever reads the changed value from here on, by any name, reads the new one
            changed = changed.args[0]
            self.environment[changed] = result
        return result

    def _number(self, node: torch.fx.Node, value: Any) -> Any:
        """Return a Python number of the program; one that is read off the data would hide a branch from the proof."""
        data = any(isinstance(self.environment.get(n), Ref) for n in node.all_input_nodes)
        if data and value is not None and not str(node.target).startswith("aten.sym_"):
            raise BoundError(
                f"{node.target} turns data into a Python number ({module_path(node)}, {source_line(node)}); "
                "keep it a tensor"
            )
        return self._size(value) if isinstance(value, torch.SymInt) else value

    def _item(self, node: torch.fx.Node, parent: Any, source: Any, index: Any) -> Any:
        """Return one of several results: a piece becomes a slice of what was cut, others name their output."""
        if not isinstance(source, Ref):
            return source[index]
        whole = self.nodes[source.name]
        kind = whole.op.split(".")[1]
        if kind not in _CUTS:
            return self._record(node, whole.target, whole.arguments, output=index)
        cut = whole["self"]
        dim = whole["dim"] % len(self.nodes[cut.name].shape)
        if kind == "unbind":
            return self._record(node, torch.ops.aten.select.int, {"self": cut, "dim": dim, "index": index})
        sizes = [self._size(piece.shape[dim]) for piece in parent.meta["val"]]
        lengths = [size for size in sizes if isinstance(size, int)]
        if len(lengths) < len(sizes):
            raise self._mixed(node)
        start = sum(lengths[:index])
        arguments = {"self": cut, "dim": dim, "start": start, "end": start + lengths[index], "step": 1}
        return self._record(node, torch.ops.aten.slice.Tensor, arguments)

    def _record(self, node: torch.fx.Node, target: Any, arguments: Mapping[str, Any], output: int | None = None) -> Ref:
        value = node.meta["val"]
        shape, batch = self._shape(node, value) if isinstance(value, Tensor) else ((), None)
        plain = arguments if output is not None else {
            key: _double(self._per_image(node, argument)) for key, argument in arguments.items()
        }  # further results of one operator have its arguments
        fixed = MappingProxyType(dict(plain))
        where = module_path(node), source_line(node)
        self.nodes[node.name] = Node(node.name, str(target), fixed, shape, batch, *where, output=output, target=target)
        return Ref(node.name)

    def _fold(self, node: torch.fx.Node, target: Any, arguments: Mapping[str, Any]) -> Any:
        """Evaluate an operator of constants; one with a batch dimension is evaluated for two images."""
        if str(target) in DROPOUT and arguments["train"] is False:
            return arguments["input"]
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            raise BoundError(
                f"{target} is random ({module_path(node)}, {source_line(node)}); only a fixed function can be bounded"
            )
        plain = {key: self._twice(argument) for key, argument in arguments.items()}
        if (
            str(target).startswith(_CASTS)
            and isinstance(plain.get("self"), Tensor)
            and plain["self"].is_floating_point()
        ):
            if node.meta["val"].is_floating_point():
                self._note_cast(node, node.meta["val"].dtype)
            result = plain["self"] if node.meta["val"].is_floating_point() else call(target, plain)
        else:
            result = call(target, plain)
            self._note_arithmetic(node, target, plain, result)
        if isinstance(result, Tensor):
            return self._batched(node, _upcast(result), node.meta["val"], arguments)
        pieces = zip(result, node.meta["val"], strict=True)
        return type(result)(self._batched(node, _upcast(piece), value, arguments) for piece, value in pieces)

    def _note_cast(self, node: torch.fx.Node, dtype: torch.dtype) -> None:
        """Remember a cast, which a program in another precision than its own obeys."""
        kind = str(dtype).removeprefix("torch.")
        if kind != "float64":  # more than is needed does no harm
            self.departures.append((kind, f"casts to {kind} ({module_path(node)}, {source_line(node)})"))

    def _note_arithmetic(self, node: torch.fx.Node, target: Any, arguments: Mapping[str, Any], result: Any) -> None:
        """Remember that weights are computed from others, which rounds them more than once where the program does it.
        """
        read = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves(list(arguments.values())))
        made = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves(result))
        if read and made and str(target).split(".")[1].removesuffix("_") not in _MOVES:
            self.departures.append(("", f"computes weights, {target} ({module_path(node)}, {source_line(node)})"))

    def _batched(self, node: torch.fx.Node, tensor: Tensor, value: Tensor, arguments: Mapping[str, Any]) -> Any:
        sizes = [self._size(size) for size in value.shape]
        axes = [axis for axis, size in enumerate(sizes) if isinstance(size, BatchSize)]
        if not axes:
            if any(isinstance(leaf, BatchSize | BatchConstant) for leaf in leaves(list(arguments.values()))):
                raise self._mixed(node)
            return tensor
        alike = bool((tensor == tensor.narrow(axes[0], 0, 1)).all())
        if len(axes) > 1 or (sizes[axes[0]] != BatchSize(1) and not alike):
            raise self._mixed(node)
        return BatchConstant(tensor, axes[0])

    def _twice(self, argument: Any) -> Any:
        """Return an argument for a batch of two; data only lends its shape (zeros_like)."""
        if isinstance(argument, BatchSize):
            return 2 * argument.factor
        if isinstance(argument, BatchConstant):
            return argument.tensor
        if isinstance(argument, Ref):
            node = self.nodes[argument.name]
            shape = [2 * size if axis == node.batch else size for axis, size in enumerate(node.shape)]
            return next(iter(self.weights.values()), torch.zeros(())).new_empty(shape, dtype=torch.float64)
        return type(argument)(map(self._twice, argument)) if isinstance(argument, list | tuple) else argument

    def _per_image(self, node: torch.fx.Node, argument: Any) -> Any:
        """Return an argument of a data operator: a constant with a batch dimension must be the same for all images."""
        if isinstance(argument, list | tuple):
            return tuple(self._per_image(node, item) for item in argument)
        if not isinstance(argument, BatchConstant):
            return argument
        first, second = argument.tensor.chunk(2, argument.axis)
        if not torch.equal(first, second):
            raise self._mixed(node)
        return BatchConstant(first, argument.axis)

    def _size(self, size: Any) -> int | BatchSize:
        """Return a size as an integer, or as a multiple of the batch."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        values = {n: size.node.expr.subs(self.symbol, n) for n in (2, 3, 7)}
        factor = values[2] / 2
        if not factor.is_integer or any(value != n * factor for n, value in values.items()):
            raise BoundError(
                f"a size depends on the batch as {size.node.expr}; only multiples of the batch size are understood"
            )
        return BatchSize(int(factor))

    def _shape(self, node: torch.fx.Node, value: Tensor) -> tuple[tuple[int, ...], int | None]:
        sizes = [self._size(size) for size in value.shape]
        axes = [axis for axis, size in enumerate(sizes) if isinstance(size, BatchSize)]
        if self.symbol is not None and len(axes) != 1:
            raise self._mixed(node)
        shape = tuple(size.factor if isinstance(size, BatchSize) else size for size in sizes)
        return shape, axes[0] if axes else None

    def _mixed(self, node: torch.fx.Node) -> BoundError:
        return BoundError(
            f"{node.target} mixes the images of a batch ({module_path(node)}, {source_line(node)}); "
            "a certificate needs a function of one image"
        )

    def _entries(self, count: int) -> str:
        """Return how many values the program returns, and their names where it has names for them."""
        spec = self.program.call_spec.out_spec
        names = spec.context if spec is not None and spec.type in (dict, OrderedDict) else ()
        return f"{count} values" + (f" ({', '.join(map(repr, names))})" if names else "")

    def _finish(self, node: torch.fx.Node) -> Graph:
        outputs: Any = node.args[0]
        results = [self.environment[value] if isinstance(value, torch.fx.Node) else value for value in outputs]
        if len(results) != 1 or not isinstance(results[0], Ref):
            raise BoundError(
                "the model must return one tensor that depends on its input, but it returns "
                f"{self._entries(len(results))}; wrap it in a module that picks one"
            )
        result = self.nodes[results[0].name]
        if self.symbol is not None and (result.batch != 0 or result.shape[0] != 1):
            raise BoundError(
                f"the result does not have one row per image: {result.op} puts images together ({result.place}); "
                "return (batch, ...)"
            )
        graph = Graph(
            tuple(self.nodes.values()), results[0].name, MappingProxyType(self.weights), self.symbol is not None,
            (*self.departures, *autocasts(self.program.graph_module)),
        )  # fmt: skip
        return pruned(lowered(graph))


def _bind(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments by the names of the schema, defaults filled in."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return {**{f"argument{k}": arg for k, arg in enumerate(args)}, **kwargs}
    bound = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        else:
            bound[argument.name] = kwargs.get(argument.name, argument.default_value)
    return bound


def _double(argument: Any) -> Any:
    """Return float64 for a floating-point type: an operator with a type of its own is evaluated like all others."""
    return torch.float64 if isinstance(argument, torch.dtype) and argument.is_floating_point else argument


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor
