"""A small immutable graph of ATen operators: what an exported model computes, for one image.

Every `Node` has one output and names its arguments as the operator's schema does. A data argument is a `Ref` to another
node; everything else is constant: numbers, and float64 tensors that were weights or came from weights alone. Sizes are
those of a batch of one image; `Node.batch` says which dimension counts the images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ref:
    """Name a value that depends on the input."""

    name: str


@dataclass(frozen=True)
class BatchSize:
    """Stand for `factor` times the number of images."""

    factor: int


@dataclass(frozen=True, eq=False)
class BatchConstant:
    """Hold a constant that has a batch dimension: here that of one image, of size 1 or of equal entries alone."""

    tensor: Tensor = field(repr=False)
    axis: int

    def repeated(self, images: int) -> Tensor:
        """Return the constant for so many images."""
        shape = list(self.tensor.shape)
        shape[self.axis] *= images
        return self.tensor.narrow(self.axis, 0, 1).expand(shape)


@dataclass(frozen=True, eq=False)
class Node:
    """One operator: its name ("aten.conv2d.default"), its arguments by the names of its schema, and where it stands.

    A data argument is a `Ref`, a constant a float64 tensor (or a `BatchConstant`). `shape` is that of one image,
    `batch` the dimension that counts the images, `output` which of several results this is.
    """

    name: str
    op: str
    arguments: Mapping[str, Any]
    shape: tuple[int, ...]
    batch: int | None
    module: str = ""
    source: str = ""
    output: int | None = None
    target: Any = field(default=None, repr=False)

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the names of the data arguments, in order, with repeats."""
        return tuple(ref.name for argument in self.arguments.values() for ref in refs(argument))

    @property
    def place(self) -> str:
        """Return module path and source line for messages."""
        parts = (f"module {self.module}" if self.module else "", self.source)
        return ", ".join(part for part in parts if part) or self.name


@dataclass(frozen=True, eq=False)
class Graph:
    """Hold the nodes in topological order, the input first; `output` names the result."""

    nodes: tuple[Node, ...]
    output: str
    weights: Mapping[str, Tensor]  # the parameters and buffers that the result depends on
    batched: bool  # False for a program exported for a batch of exactly one image
    # What the program does and this list does not: ("", "computes weights, …"), or a cast, which is none in a precision
    departures: tuple[tuple[str, str], ...] = ()

    @property
    def input(self) -> Node:
        return self.nodes[0]

    def weights_sha256(self) -> str:
        """Return the SHA-256 of the weights: names in order, shapes, and values as little-endian float64 or int64."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            tensor = self.weights[name].detach().cpu().contiguous()
            exact = tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64).numpy()
            digest.update(f"{name}\0{exact.dtype.str[1:]}{tuple(tensor.shape)}\0".encode())
            digest.update(exact.astype(exact.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()


def call(target: Any, arguments: Mapping[str, Any]) -> Any:
    """Run an ATen operator, or a function of ours, on arguments by name.

    A view is taken as a reshape: what lies contiguous in memory in the model may not do so here.
    """
    if str(target) in ("aten.view.default", "aten._unsafe_view.default"):
        return arguments["self"].reshape(arguments["size"])
    schema = getattr(target, "_schema", None)
    if schema is None:
        return target(**arguments)
    positional = [arguments[a.name] for a in schema.arguments if not a.kwarg_only]
    named = {a.name: arguments[a.name] for a in schema.arguments if a.kwarg_only}
    return target(*positional, **named)


def given(argument: Any, values: Mapping[str, Any], x: Tensor) -> Any:
    """Return an argument for the images x at hand, from the values of the nodes before."""
    if isinstance(argument, Ref):
        return values[argument.name]
    if isinstance(argument, BatchSize):
        return argument.factor * x.shape[0]
    if isinstance(argument, BatchConstant):
        return argument.repeated(x.shape[0]).to(x.device)
    if isinstance(argument, Tensor):
        return argument.to(x) if argument.is_floating_point() else argument.to(x.device)
    return [given(item, values, x) for item in argument] if isinstance(argument, tuple) else argument


def each(value: int | Sequence[int], axes: int) -> list[int]:
    """Return one number for each axis, of an argument that may give one for all of them."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * axes if len(numbers) == 1 else numbers


def leaves(argument: Any) -> Iterator[Any]:
    if isinstance(argument, list | tuple):
        for item in argument:
            yield from leaves(item)
    else:
        yield argument


def refs(argument: Any) -> Iterator[Ref]:
    return (leaf for leaf in leaves(argument) if isinstance(leaf, Ref))
