"""How far one position of a result can move: L_pix beside the bound L of the whole (docs/bounds.md 3).

The channels at one position of a map, the logits of one pixel, are a selection of its entries, so the bound L of the
whole holds for them. Where a map is enlarged it is loose: upsampling by s copies each entry s² times, which multiplies
L by s, and no position knows of it. `Positions` follows the result backwards as far as such an operator lies behind it,

    L_pix(result) ≤ min( L(result), what a rule makes of L_pix and L of the arguments ),

and takes L elsewhere. Rules are registered by ATen name with `@positioned(...)` in `rules/positions.py`; an operator
without one has L_pix ≤ L, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from lipcert.bounds.core import Bound
from lipcert.bounds.graph import Graph, Node
from lipcert.bounds.propagation import Context
from lipcert.bounds.values import Value, root, total

Factor = Callable[[Context], Bound]


@dataclass(frozen=True)
class Source:
    """An argument, which of its dimensions holds the channels, and by how much it counts."""

    name: str
    channel: int
    factor: Factor


@dataclass(frozen=True)
class Reading:
    """What one position of a value reads: the sum, root of squares or largest of factor·L_pix over its sources.

    `whole`: another bound, factor·L of one source; for an operator that reads a window. `enlarges`: the operator has
    more positions than its argument, so L_pix can be less than L.
    """

    sources: tuple[Source, ...]
    join: str = "sum"  # "sum", "root", "largest"
    whole: tuple[str, Factor] | None = None
    enlarges: bool = False


Rule = Callable[[Node, int, Mapping[str, Node]], Reading | None]
Function = TypeVar("Function", bound=Rule)
POSITIONED: dict[str, Rule] = {}


def positioned(*names: str) -> Callable[[Function], Function]:
    """Register the reading of the named operators, called as `function(node, channel, nodes)`; twice is a ValueError.

    `channel` is the dimension of the result that is not part of a position; None as the answer means L.
    """

    def register(function: Function) -> Function:
        for name in names:
            if name in POSITIONED:
                raise ValueError(f"operator {name} already has a rule for its positions")
            POSITIONED[name] = function
        return function

    return register


class Positions:
    """Bound the channels (dimension 1) at any one position of the result of a graph.

    `needed` names the values whose bounds are asked for after the walk.
    """

    def __init__(self, graph: Graph) -> None:
        self._nodes = {node.name: node for node in graph.nodes}
        self._indices = {node.name: index for index, node in enumerate(graph.nodes)}
        self._readings: dict[tuple[str, int], Reading | None] = {}
        self._output = graph.output
        output = self._nodes[graph.output]
        self.separate = len(output.shape) >= 3 and output.batch in (0, None)
        self.needed = self._plan((graph.output, 1)) if self.separate else set()

    def bound(self, context: Context, values: Mapping[str, Value]) -> Bound | None:
        """Return L_pix of the result after the walk; None where it has no positions (logits of one image)."""
        if not self.separate:
            return None
        known: dict[tuple[str, int], Bound] = {}
        return self._bound(self._output, 1, context, values, known)

    def bound_at(self, name: str, context: Context, values: Mapping[str, Value]) -> Bound:
        """Return L_pix of another value of the graph, one of `values`, whose dimension 1 holds the channels."""
        if self._readings.get((name, 1)) is None:
            return context.bound(values[name])
        return self._bound(name, 1, context, values, {})

    def _plan(self, result: tuple[str, int]) -> set[str]:
        """Read what is behind a value, as far as L_pix can be less than L; return the values whose L is asked for.

        These are the result, the last on each way back, and the arguments of windows.
        """
        pending, seen = [result], set[tuple[str, int]]()
        while pending:
            key = name, channel = pending[-1]
            if key in seen:  # what is behind it has been read
                pending.pop()
                reading = self._readings[key]
                behind = () if reading is None else reading.sources
                if reading is not None and not reading.enlarges and not any(map(self._gains, behind)):
                    self._readings[key] = None
                continue
            seen.add(key)
            rule = POSITIONED.get(self._nodes[name].op)
            reading = self._readings[key] = None if rule is None else rule(self._nodes[name], channel, self._nodes)
            pending += [(s.name, s.channel) for s in (() if reading is None else reading.sources)]
        kept = [reading for reading in self._readings.values() if reading is not None]
        ends = {s.name for reading in kept for s in reading.sources if not self._gains(s)}
        return {result[0], *ends, *(reading.whole[0] for reading in kept if reading.whole)}

    def _gains(self, source: Source) -> bool:
        return self._readings[source.name, source.channel] is not None

    def _bound(
        self, name: str, channel: int, context: Context, values: Mapping[str, Value],
        known: dict[tuple[str, int], Bound],
    ) -> Bound:  # fmt: skip
        key = name, channel
        if key not in known:
            reading = self._readings[key]
            ways = []
            if name in self.needed:
                ways.append(context.bound(values[name]))
            elif self._indices[name] in context.derivations:
                ways.append(context.derivations[self._indices[name]].bound)
            if reading is not None:
                parts = [
                    source.factor(context) * self._bound(source.name, source.channel, context, values, known)
                    for source in reading.sources
                ]
                if reading.join == "largest":
                    ways.append(max(parts, key=lambda bound: bound.order))
                else:
                    ways.append((total if reading.join == "sum" else root)(parts))
                if reading.whole is not None:
                    ways.append(reading.whole[1](context) * context.bound(values[reading.whole[0]]))
            known[key] = min(ways, key=lambda bound: bound.order)
        return known[key]
