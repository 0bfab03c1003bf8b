"""Constants that hold where arguments stay near their ranges: computed values leave the exact ranges a little."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lipcert.bounds import pieces
from lipcert.bounds.core import Bound
from lipcert.bounds.graph import Node
from lipcert.bounds.propagation import Context
from lipcert.bounds.rounding import add_up
from lipcert.bounds.values import Rounding, Value

LOOSE = 2.0**-10  # of a size


def both(
    node: Node, context: Context, inputs: Sequence[Value], factors: Sequence[float], margins: Sequence[float],
    rounding: Rounding,
) -> Value:  # fmt: skip
    """Return the value of a function with ‖Δresult‖ ≤ Σ factor·‖Δinput‖ on the domain; ∞ where a factor is."""
    if any(math.isinf(factor) for factor in factors):
        return context.unbounded(node, inputs, "the ranges of its arguments are not known")
    value = context.value(node, inputs, factors, rounding, margins=margins)
    bounds = [Bound(factor, "upper", "range") for factor in factors]
    value.candidates.append(lambda: context.derive(inputs, bounds, node.op.split(".")[1]))
    pieces.apart(value, [[(x, bound)] for x, bound in zip(inputs, bounds, strict=True)])
    context.bound(value)
    return value


def wide(size: float) -> float:
    """Return a size enlarged by its margin."""
    return add_up(size, margin(size))


def margin(size: float) -> float:
    """Return how far a computed value may leave a range of this size."""
    return size * LOOSE + 2.0**-40
