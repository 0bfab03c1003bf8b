"""Entrywise functions whose slope has no bound over all real numbers: powers, roots, exponentials, logarithms.

On the range of their argument they have one, sup|f'|, taken over the range enlarged by a margin because computed values
leave the exact range a little. Also softmax and its relatives, which are Lipschitz everywhere.
"""

from __future__ import annotations

import math

import torch

from lipcert.bounds.core import Bound, rule
from lipcert.bounds.graph import Node
from lipcert.bounds.propagation import Context
from lipcert.bounds.ranges import LIBRARY as RELATIVE
from lipcert.bounds.ranges import Range, Ranges, monotone, ranged, widened
from lipcert.bounds.rounding import sqrt_up
from lipcert.bounds.rules.elementwise import LIBRARY
from lipcert.bounds.rules.margins import LOOSE
from lipcert.bounds.values import ONE, Rounding, Value

SAFE = 1.0 + 2.0**-40  # more than the error of the few operations that evaluate a slope


@rule("aten.exp.default", "aten.log.default", "aten.sqrt.default", "aten.rsqrt.default", "aten.reciprocal.default",
      "aten.square.default", "aten.pow.Tensor_Scalar", "aten.exp2.default", "aten.log1p.default")  # fmt: skip
def steep(node: Node, context: Context) -> Value:
    """Bound by sup|f'| over the range of the argument; without a finite supremum there is no bound."""
    x = context.data(node, "self")
    found = context.ranges(x.node.name)
    low, high = float(found.low.min()), float(found.high.max())
    margin = LOOSE * (low if low > 0.0 else 1.0 if not math.isfinite(high) else max(1.0, abs(low), abs(high)))
    if _power(node) is not None and low >= 0.0:
        margin = LOOSE * low  # roots must not reach zero
    try:
        slope = _slope(node, low - margin, high + margin) * SAFE
    except (OverflowError, ZeroDivisionError, ValueError):
        slope = math.inf
    if not math.isfinite(slope):
        return context.unbounded(node, [x], f"the slope has no bound on its range, [{low:.4g}, {high:.4g}]")
    return context.nonlinear(node, [x], Bound(slope, "upper", "slope on the range"), rounding=LIBRARY, margins=[margin])


def _power(node: Node) -> float | None:
    """Return the exponent of a function that is a power."""
    kind = node.op.split(".")[1]
    fixed = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "square": 2.0}
    return float(node["exponent"]) if kind == "pow" else fixed.get(kind)


def _slope(node: Node, low: float, high: float) -> float:
    """Return sup|f'| on [low, high]; an error of arithmetic means that there is none."""
    kind = node.op.split(".")[1]
    if kind in ("exp", "exp2"):
        return math.exp(high) if kind == "exp" else 2.0**high
    if kind in ("log", "log1p"):
        least = low + (kind == "log1p")
        return 1.0 / least if least > 0.0 else math.inf
    power = _power(node)
    if power is None:
        return math.inf
    size = max(abs(low), abs(high))
    if power == 0.0:
        return 0.0
    if power >= 1.0 and (power == int(power) or low >= 0.0):
        return power * size ** (power - 1.0)
    if low > 0.0:
        return abs(power) * max(low ** (power - 1.0), high ** (power - 1.0) if math.isfinite(high) else 0.0)
    if high < 0.0 and power == int(power):
        return abs(power) * (-high) ** (power - 1.0)
    return math.inf


@rule("aten.softmax.int", "aten._softmax.default")
def softmax(node: Node, context: Context) -> Value:
    """Bound softmax along a dimension by 1/2 (Nair, arXiv 2510.23012; its Jacobian is a covariance of unit vectors).

    Rounding: p(1 ± δ) with δ from n sums, library functions and u·|x - max x|, and t·e^-t ≤ 1 for the last.
    """
    x = context.data(node, "self")
    count = x.shape[context.axis(node, x, node["dim"])]
    absolute = 2.0**-52 * sqrt_up(float(math.prod(x.shape)))
    rounding = Rounding(output=count + 200, absolute=absolute, operations=count + 8, own_only=True)
    return context.nonlinear(node, [x], Bound(0.5, "upper", "softmax"), rounding=rounding)


@rule("aten.log_softmax.int", "aten._log_softmax.default")
def log_softmax(node: Node, context: Context) -> Value:
    """Bound log-softmax over n entries by √n: its Jacobian I - 1pᵀ is an oblique projection of norm √n‖p‖ ≤ √n."""
    x = context.data(node, "self")
    count = x.shape[context.axis(node, x, node["dim"])]
    rounding = Rounding(((count + 130, 2.0 * sqrt_up(float(count))),), output=count + 130, operations=count + 8)
    return context.nonlinear(node, [x], Bound(sqrt_up(float(count)), "upper", "oblique projection"), rounding=rounding)


@rule("aten.logsumexp.default")
def logsumexp(node: Node, context: Context) -> Value:
    """Bound log Σ exp by 1: its gradient is a probability vector, of l2 norm at most 1."""
    x = context.data(node, "self")
    given = node["dim"]
    dims = [context.axis(node, x, d) for d in ([given] if isinstance(given, int) else given)]
    count = math.prod(x.shape[d] for d in dims)
    return context.nonlinear(node, [x], ONE, rounding=Rounding(((count + 130, 2.0),), output=count + 130,
                                                              operations=count + 8))  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ ranges


@ranged("aten.exp.default", "aten.log.default", "aten.sqrt.default", "aten.exp2.default", "aten.log1p.default")
def _increasing(node: Node, ranges: Ranges) -> Range:
    if node.op != "aten.exp.default" and node.op != "aten.exp2.default":
        if not bool((ranges.of(node, "self").low >= 0.0).all()):
            return ranges.unknown(node)
    return monotone(node, ranges, library=RELATIVE)


@ranged("aten.rsqrt.default", "aten.reciprocal.default", "aten.square.default", "aten.pow.Tensor_Scalar")
def _powers(node: Node, ranges: Ranges) -> Range:
    x, power = ranges.of(node, "self"), _power(node)
    if power is None:
        return ranges.unknown(node)
    least = torch.maximum(x.low, -x.high).clamp_min(0.0)
    if power > 0.0 and power == int(power):
        if int(power) % 2:
            return widened(Range(x.low**power, x.high**power), RELATIVE)
        return widened(Range(least**power, x.magnitude**power), RELATIVE)
    if not bool((x.low >= 0.0).all()) or (power < 0.0 and not bool((x.low > 0.0).all())):
        return ranges.unknown(node)
    ends = (x.low**power, x.high**power)
    return widened(Range(*(ends if power > 0.0 else ends[::-1])), RELATIVE)


@ranged("aten.softmax.int", "aten._softmax.default")
def _probabilities(node: Node, ranges: Ranges) -> Range:
    return ranges.constant(node, 0.0, 1.0)


@ranged("aten.log_softmax.int", "aten._log_softmax.default")
def _log_probabilities(node: Node, ranges: Ranges) -> Range:
    """Range over x - log Σ e^x ≥ x - max x - log n."""
    x, dim = ranges.of(node, "self"), node["dim"]
    least = x.low - x.high.amax(dim, keepdim=True) - math.log(node.shape[dim]) * SAFE
    return Range(least - (least.abs() + x.magnitude) * 2.0**-50, torch.zeros_like(least))
