"""Where the exact values of a graph lie, for every input of the domain: intervals, entry by entry.

Rules that multiply data need to know how large a factor can be. This is a second analysis beside the walk, evaluated
only where a rule asks for it: networks made of linear maps and Lipschitz functions never do.

A `Range` holds two float64 tensors that broadcast to the shape of a node for one image: singleton along dimensions
where nothing varies, (1, C, 1, 1) for one interval a channel. Functions are registered by ATen name beside the rule of
the operator, with `@ranged(...)`; an operator without one has the range (-∞, ∞), looser and never wrong.

Interval arithmetic: f([a, b]) is contained in the result for every entry, every rounding outward (Moore 1966). What is
exact in floating point (selections, maxima, negation) is not widened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lipcert.bounds.graph import BatchConstant, BatchSize, Graph, Node, Ref, call
from lipcert.bounds.rounding import gamma

LIBRARY = 2.0**-46  # relative error granted to functions of the C library, 128 units in the last place
FAR = 1e300  # stands for ∞ where a function would give NaN
MOST = 2**24  # entries up to which a range is kept for each entry; larger ones are reduced to a number


@dataclass(frozen=True, eq=False)
class Range:
    """Hold low ≤ value ≤ high for all inputs of the domain, entry by entry."""

    low: Tensor
    high: Tensor

    @property
    def largest(self) -> float:
        """Return the largest absolute value, ∞ if nothing is known."""
        return float(torch.maximum(self.low.abs(), self.high.abs()).max())

    @property
    def magnitude(self) -> Tensor:
        """Return the largest absolute value of each entry."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.low).all() and torch.isfinite(self.high).all())

    def reshaped(self, shape: Sequence[int]) -> Range:
        return Range(self.low.reshape(tuple(shape)), self.high.reshape(tuple(shape)))

    def over(self, *dims: int) -> Range:
        """Return one range for all entries along some dimensions."""
        if not dims:
            return self
        return Range(self.low.amin(dims, keepdim=True), self.high.amax(dims, keepdim=True))


RangeFunction = TypeVar("RangeFunction", bound=Callable[..., Range])
RANGES: dict[str, Callable[[Node, Ranges], Range]] = {}


def ranged(*names: str) -> Callable[[RangeFunction], RangeFunction]:
    """Register the range of the named operators, called as `function(node, ranges)`; a second one is a ValueError."""

    def register(function: RangeFunction) -> RangeFunction:
        for name in names:
            if name in RANGES:
                raise ValueError(f"operator {name} already has a range function")
            RANGES[name] = function
        return function

    return register


class Ranges:
    """Evaluate ranges of a graph on demand: `ranges(name)` is the range of a node.

    >>> from torch import nn
    >>> from lipcert.bounds.patterns import lift
    >>> from lipcert.bounds.tracing import trace
    >>> graph = lift(trace(nn.Sequential(nn.Flatten(), nn.Sigmoid()), (1, 2, 2)))
    >>> found = Ranges(graph, (0.0, 1.0))(graph.output)
    >>> round(float(found.low), 6), round(float(found.high), 6)
    (0.5, 0.731059)
    """

    def __init__(self, graph: Graph, domain: tuple[float | Tensor, float | Tensor]) -> None:
        self.nodes: Mapping[str, Node] = {node.name: node for node in graph.nodes}
        self.device = next(iter(graph.weights.values()), torch.zeros(())).device
        ends = (torch.as_tensor(end, dtype=torch.float64, device=self.device) for end in domain)
        low, high = (end.reshape((1,) * (len(graph.input.shape) - end.ndim) + tuple(end.shape)) for end in ends)
        self._known = {graph.input.name: Range(low, high)}

    def __call__(self, name: str) -> Range:
        pending = [name]
        while pending:
            node = self.nodes[pending[-1]]
            missing = [source for source in set(node.inputs) if source not in self._known]
            if node.name not in self._known and missing and node.op in RANGES:
                pending += missing
                continue
            pending.pop()
            if node.name not in self._known:
                function = RANGES.get(node.op)
                found = self.unknown(node) if function is None else function(node, self)
                self._known[node.name] = self._reduced(node, found)
        return self._known[name]

    def of(self, node: Node, argument: str) -> Range:
        """Return the range of an argument, data or constant, as a tensor of numbers."""
        return self.given(node[argument])

    def given(self, argument: Any) -> Range:
        if isinstance(argument, Ref):
            return self(argument.name)
        tensor = argument.tensor if isinstance(argument, BatchConstant) else argument
        exact = torch.as_tensor(tensor, dtype=torch.float64, device=self.device)
        return Range(exact, exact)

    def shape(self, argument: Any) -> tuple[int, ...]:
        """Return the shape of an argument for one image."""
        if isinstance(argument, Ref):
            return self.nodes[argument.name].shape
        tensor = argument.tensor if isinstance(argument, BatchConstant) else argument
        return tuple(torch.as_tensor(tensor).shape)

    def unknown(self, node: Node) -> Range:
        """Return (-∞, ∞)."""
        infinite = torch.full((1,) * len(node.shape), math.inf, dtype=torch.float64, device=self.device)
        return Range(-infinite, infinite)

    def constant(self, node: Node, low: float, high: float) -> Range:
        """Return one interval for all entries of a node."""
        one = torch.ones((1,) * len(node.shape), dtype=torch.float64, device=self.device)
        return Range(one * low, one * high)

    def ends(self, node: Node, pick: Callable[[Range], Tensor], **replaced: Any) -> Tensor:
        """Evaluate an operator with every data argument replaced by `pick` of its range, in its full shape."""
        arguments = {**node.arguments, **replaced}
        result = call(node.target, {key: self._plain(argument, pick) for key, argument in arguments.items()})
        return result[node.output or 0] if isinstance(result, tuple | list) else result

    def matrix_norm(self, name: str) -> float:
        """Bound the spectral norm of every matrix in a stack (..., m, n): by Frobenius, and by √(‖·‖₁‖·‖_∞)."""
        shape = self.nodes[name].shape
        magnitude = self(name).magnitude.expand(shape)
        columns, rows = magnitude.sum(-2).amax(-1), magnitude.sum(-1).amax(-1)
        square = torch.linalg.vector_norm(magnitude, dim=(-2, -1))
        best = float(torch.minimum(square, (columns * rows).sqrt()).max())
        return math.inf if math.isnan(best) else best * (1.0 + 2.0**-50 * (sum(shape[-2:]) * 4 + 16))

    def _plain(self, argument: Any, pick: Callable[[Range], Tensor]) -> Any:
        if isinstance(argument, Ref):
            return pick(self(argument.name)).expand(self.shape(argument)).contiguous()
        if isinstance(argument, BatchSize):
            return argument.factor
        if isinstance(argument, BatchConstant):
            return argument.tensor
        return [self._plain(item, pick) for item in argument] if isinstance(argument, tuple) else argument

    def _reduced(self, node: Node, found: Range) -> Range:
        """Return the same range, singleton where nothing varies, and checked."""
        low, high = found.low, found.high
        low, high = torch.where(low.isnan(), -math.inf, low), torch.where(high.isnan(), math.inf, high)
        if low.ndim != len(node.shape):
            raise RuntimeError(f"the range of {node.op} has the shape {tuple(low.shape)}, the node {node.shape}")
        for dim, size in enumerate(node.shape):
            if low.shape[dim] not in (1, size) or high.shape[dim] not in (1, size):
                raise RuntimeError(f"the range of {node.op} has the shape {tuple(low.shape)}, the node {node.shape}")
            low, high = _singleton(low, dim), _singleton(high, dim)
        if max(low.numel(), high.numel()) > MOST:
            low, high = low.amin().expand((1,) * low.ndim), high.amax().expand((1,) * high.ndim)
        return Range(low.contiguous(), high.contiguous())


def monotone(node: Node, ranges: Ranges, *, roundings: int = 0, library: float = 0.0) -> Range:
    """Return the range of an operator that does not decrease in any entry of any data argument.

    Evaluated at the lower and at the upper ends. `roundings`: an operator with nonnegative weights, whose computed sums
    err by γ_n times itself on absolute values; `library`: relative error of a function of one entry.
    """
    low, high = ranges.ends(node, lambda r: r.low), ranges.ends(node, lambda r: r.high)
    if roundings:
        slack = ranges.ends(node, lambda r: r.magnitude) * (2.0 * gamma(roundings)) + 2.0**-1000
        return Range(low - slack, high + slack)
    return widened(Range(low, high), library) if library else Range(low, high)


def widened(found: Range, relative: float) -> Range:
    """Return a range enlarged by a relative error of its ends, and a tiny absolute one."""
    tiny = 2.0**-1000
    return Range(found.low - found.low.abs() * relative - tiny, found.high + found.high.abs() * relative + tiny)


def hull(*ranges: Range) -> Range:
    """Return the smallest range that contains several, broadcast together."""
    low, high = ranges[0].low, ranges[0].high
    for other in ranges[1:]:
        low, high = torch.minimum(low, other.low), torch.maximum(high, other.high)
    return Range(low, high)


def product(a: Range, b: Range) -> Range:
    """Return the range of a·b, entry by entry, broadcast; 0·∞ counts as 0 only where 0 is the whole range."""
    ends = [
        torch.where((x == 0.0) | (y == 0.0), 0.0, x * y) for x in (a.low, a.high) for y in (b.low, b.high)
    ]
    low, high = (getattr(torch.stack(torch.broadcast_tensors(*ends)), pick)(0) for pick in ("amin", "amax"))
    return widened(Range(low, high), 2.0**-52)


def total(a: Range, b: Range, factor: float = 1.0) -> Range:
    """Return the range of a + factor·b, broadcast."""
    one, two = (b.low * factor, b.high * factor) if factor >= 0 else (b.high * factor, b.low * factor)
    low, high = a.low + one, a.high + two
    below, above = (a.low.abs() + one.abs()) * 2.0**-51, (a.high.abs() + two.abs()) * 2.0**-51
    return Range(low - below - 2.0**-1000, high + above + 2.0**-1000)


def affine(x: Range, matrix: Tensor, offset: Tensor | None, dim: int) -> Range:
    """Return the range of W x + b along one dimension: W·middle ± |W|·radius, with the rounding of both."""
    if not x.finite:
        size = [*x.low.shape]
        size[dim] = 1
        infinite = x.low.new_full(size, math.inf)
        return Range(-infinite, infinite)
    count = matrix.shape[1]
    shape = [*torch.broadcast_shapes(x.low.shape, x.high.shape)]  # padding may have made one end vary and not the other
    shape[dim] = count
    low, high = (end.expand(shape).movedim(dim, -1) for end in (x.low, x.high))
    middle, radius = (low + high) / 2, (high - low) / 2 * (1.0 + 2.0**-50)
    value = middle @ matrix.T
    slack = (radius + (4 * count + 16) * 2.0**-53 * torch.maximum(low.abs(), high.abs())) @ matrix.T.abs()
    if offset is not None:
        value = value + offset
        slack = slack + offset.abs() * 2.0**-51
    slack = slack * (1.0 + (4 * count + 16) * 2.0**-53) + 2.0**-1000
    return Range((value - slack).movedim(-1, dim), (value + slack).movedim(-1, dim))


def _singleton(tensor: Tensor, dim: int) -> Tensor:
    first = tensor.narrow(dim, 0, 1)
    return first if tensor.shape[dim] > 1 and bool((tensor == first).all()) else tensor
