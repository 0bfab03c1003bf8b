"""Entrywise functions, and arithmetic of values with constants.

An entrywise function has the Lipschitz constant sup|f'| in l2. The slopes are global, over all real inputs: suprema
computed to 16 digits with mpmath and rounded up by one unit in the last place. Functions whose slope has no bound over
all real inputs, and products of data, are in `steep.py` and `product.py`.
Rounding: functions of the C library and of vectorised kernels are allowed 64 units in the last place, of the result or
of the argument, whichever a formula with cancellation needs.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lipcert.bounds.core import Bound, BoundError, rule
from lipcert.bounds.graph import Node, Ref
from lipcert.bounds.propagation import Context
from lipcert.bounds.ranges import FAR, Range, Ranges, monotone, ranged, total, widened
from lipcert.bounds.ranges import LIBRARY as RELATIVE
from lipcert.bounds.rounding import enlarge, mul_up, sqrt_up, up
from lipcert.bounds.values import EXACT, ONE, Representation, Rounding, Value, broadcast

LIBRARY = Rounding(inputs=((64, 1.0),), output=64, operations=8)
SIXTH = 2.0**-20  # relative; more than torch's hardsigmoid and hardswish lose by a sixth in float32
SIXTHS = replace(LIBRARY, own_only=True)  # torch multiplies by 1/6 in float32, whatever the type of its argument

_SLOPES = {
    "relu": (1.0, EXACT),
    "relu6": (1.0, EXACT),
    "abs": (1.0, EXACT),
    "tanh": (1.0, LIBRARY),
    "sin": (1.0, LIBRARY),
    "cos": (1.0, LIBRARY),
    "atan": (1.0, LIBRARY),
    "log_sigmoid": (1.0, LIBRARY),
    "sigmoid": (0.25, LIBRARY),
    "hardsigmoid": (up(1.0 / 6.0), SIXTHS),
    "hardswish": (1.5, SIXTHS),
    "silu": (up(1.0998393201288669), LIBRARY),
    "mish": (up(1.0884981612517279), LIBRARY),
    "erf": (up(1.1283791670955126), LIBRARY),
    "selu": (up(1.7580993408473769), LIBRARY),
}


@rule(*(f"aten.{name}.default" for name in _SLOPES))
def entrywise(node: Node, context: Context) -> Value:
    """Bound an entrywise function by its largest slope over all real numbers, sup|f'|."""
    slope, rounding = _SLOPES[node.op.split(".")[1]]
    return context.nonlinear(node, [context.data(node, "self")], Bound(slope, "upper", "slope"), rounding=rounding)


@rule("aten.gelu.default")
def gelu(node: Node, context: Context) -> Value:
    """Bound GELU: Φ(√2) + √2 φ(√2) = 1.12890414… for the exact form, 1.12899306… for the tanh approximation."""
    slope = up(1.1289041451851548) if node["approximate"] == "none" else up(1.1289930686587718)
    return context.nonlinear(node, [context.data(node, "self")], Bound(slope, "upper", "slope"), rounding=LIBRARY)


@rule("aten.leaky_relu.default")
def leaky_relu(node: Node, context: Context) -> Value:
    """Bound leaky ReLU by max(1, |negative slope|)."""
    slope = max(1.0, abs(float(node["negative_slope"])))
    x = context.data(node, "self")
    return context.nonlinear(node, [x], Bound(slope, "upper", "slope"), rounding=Rounding(output=2, operations=1))


@rule("aten.prelu.default")
def prelu(node: Node, context: Context) -> Value:
    """Bound PReLU by max(1, largest |a|)."""
    if isinstance(node["weight"], Ref):
        return context.unbounded(node, [context.live[n] for n in node.inputs], "the slope depends on the input")
    slope = max(1.0, _largest(context.constant(node, "weight")))
    x = context.data(node, "self")
    return context.nonlinear(node, [x], Bound(slope, "upper", "slope"), rounding=Rounding(output=2, operations=1))


@rule("aten.elu.default", "aten.celu.default")
def elu(node: Node, context: Context) -> Value:
    """Bound ELU: slope `scale` above zero, at most |scale·alpha·input_scale| below (|alpha·(1/alpha)| = 1 for CELU)."""
    slope, x = 1.0, context.data(node, "self")
    inner = float(node["input_scale"] if "input_scale" in node.arguments else node["alpha"])
    if inner <= 0.0:
        return context.unbounded(node, [x], "the exponential grows below zero")
    if "scale" in node.arguments:
        slope = max(abs(float(node["scale"])), mul_up(abs(float(node["scale"])), abs(float(node["alpha"])), inner))
    return context.nonlinear(node, [x], Bound(slope, "upper", "slope"), rounding=LIBRARY)


@rule("aten.softshrink.default")
def softshrink(node: Node, context: Context) -> Value:
    """Bound soft shrinkage, x ∓ λ outside [-λ, λ] and 0 inside, by 1 (λ ≥ 0, as torch demands)."""
    return context.nonlinear(node, [context.data(node, "self")], ONE, rounding=Rounding(output=1, operations=1))


@rule("aten.threshold.default")
def threshold(node: Node, context: Context) -> Value:
    """Bound x above a threshold and a constant below it by 1 where the two meet; elsewhere it jumps."""
    x = context.data(node, "self")
    if float(node["threshold"]) != float(node["value"]):
        return context.unbounded(node, [x], "the function jumps: no Lipschitz constant exists")
    return context.nonlinear(node, [x], ONE, rounding=EXACT)


@rule("aten.softplus.default")
def softplus(node: Node, context: Context) -> Value:
    """Bound softplus log(1 + e^(βx))/β by 1.

    PyTorch returns x itself above a threshold, which is off by at most e^(-threshold)/β per entry: that step is an
    error of the evaluation here, not part of the function.
    """
    x = context.data(node, "self")
    beta, threshold = float(node["beta"]), float(node["threshold"])
    if beta <= 0.0:
        raise BoundError(f"softplus needs beta > 0, got {beta} ({node.place})")
    step = mul_up(math.exp(-threshold) * (1.0 + 2.0**-50) / beta, 1.0 + 2.0**-50, sqrt_up(float(math.prod(node.shape))))
    return context.nonlinear(node, [x], ONE, rounding=replace(LIBRARY, absolute=step))


@rule(
    "aten.hardtanh.default",
    "aten.clamp.default",
    "aten.clamp.Tensor",
    "aten.clamp_min.default",
    "aten.clamp_max.default",
)
def clamp(node: Node, context: Context) -> Value:
    """Bound clamping between constants by 1; a median of several values that depend on the input is 1-Lipschitz too."""
    values = [context.live[name] for name in node.inputs]
    return _extremum(node, context, values)


@rule("aten.maximum.default", "aten.minimum.default", "aten.max.other", "aten.min.other")
def extremum(node: Node, context: Context) -> Value:
    """Bound max(a, b) and min(a, b), entry by entry: |max(a,b) - max(a',b')|² ≤ |a-a'|² + |b-b'|²."""
    return _extremum(node, context, [context.live[name] for name in node.inputs])


@rule("lipcert.maxmin")
def maxmin(node: Node, context: Context) -> Value:
    """Bound (max(a,b), min(a,b)): sorting a pair is a permutation of it, 1-Lipschitz in (a, b) together.

    Anil, Lucas, Grosse 2019 (arXiv 1811.05381). With a and b the two halves of one value, that is 1 in the value.
    """
    if node["dim"] % len(node.shape) == node.batch:
        raise context.mixed(node)
    return context.nonlinear(node, [context.live[name] for name in node.inputs], ONE, label="MaxMin")


def _extremum(node: Node, context: Context, values: list[Value]) -> Value:
    for x in values:
        context.aligned(node, x)
    factor = Bound(max(spread(node, x) for x in values), "upper", "isometry")
    return context.nonlinear(node, values, factor, rounding=Rounding(constant=(1, context.offset(node))))


# -------------------------------------------------------------------------------------------------- arithmetic


@rule(
    "aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar", "aten.rsub.Tensor", "aten.rsub.Scalar"
)
def addition(node: Node, context: Context) -> Value:
    """Bound a ± alpha·b: the sum of two maps of a common anchor is one map, else L_a + |alpha| L_b; constants shift."""
    alpha = float(node["alpha"])
    kind = node.op.split(".")[1]
    weights = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[kind]
    terms = [
        (context.data(node, argument), weight)
        for argument, weight in zip(("self", "other"), weights, strict=True)
        if isinstance(node[argument], Ref)
    ]
    inputs = tuple((0 if abs(weight) == 1.0 else 2, mul_up(abs(weight), spread(node, x))) for x, weight in terms)
    if len(terms) == 1:
        context.constant(node, "other" if isinstance(node["self"], Ref) else "self")
        offset = mul_up(context.offset(node), max(1.0, abs(alpha)))
        rounding = Rounding(inputs, output=1, constant=(2, offset), operations=2)
        return scale(node, context, terms[0][0], torch.tensor(terms[0][1], dtype=torch.float64), rounding)
    return context.sum(node, terms, rounding=Rounding(inputs, output=1, operations=2))


@rule("aten.neg.default")
def negation(node: Node, context: Context) -> Value:
    """Negate: an isometry."""
    return scale(node, context, context.data(node, "self"), torch.tensor(-1.0, dtype=torch.float64), EXACT)


@rule("aten.sign.default", "aten.round.default", "aten.floor.default", "aten.ceil.default", "aten.trunc.default",
      "aten.div.Tensor_mode", "aten.div.Scalar_mode", "aten.heaviside.default", "aten.hardshrink.default",
      "aten.frac.default", "aten.remainder.Scalar", "aten.fmod.Scalar")  # fmt: skip
def jump(node: Node, context: Context) -> Value:
    """Give no bound: a function with jumps has no Lipschitz constant."""
    return context.unbounded(
        node, [context.live[n] for n in node.inputs], "the function jumps: no Lipschitz constant exists"
    )


def scale(node: Node, context: Context, x: Value, factor: Tensor, rounding: Rounding, *, roundings: int = 0) -> Value:
    """Return the value of factor·x + const, broadcast to the node; `factor` is exact up to so many roundings.

    A factor that varies along the channels alone is a diagonal matrix and fuses; one that varies over positions does
    not.
    """
    context.aligned(node, x)
    full = factor.reshape((1,) * (len(node.shape) - factor.ndim) + tuple(factor.shape))
    varying = [d for d, size in enumerate(full.shape) if size > 1]
    if node.batch in varying:
        raise context.mixed(node)

    def transform(given: Representation) -> Representation | None:
        layout = given.layout
        layout = replace(layout, dims=((),) * (len(node.shape) - len(layout.dims)) + layout.dims)
        spread = broadcast(replace(given, layout=layout), node.shape)
        if spread is None or (varying and not (len(varying) == 1 and spread.layout.is_axis(varying[0], "c"))):
            return None
        return replace(spread, map=spread.map.scaled(full.flatten(), roundings))

    norm = mul_up(enlarge(_largest(full), roundings), spread(node, x))
    channel = varying[0] - (len(node.shape) - len(x.shape)) if len(varying) == 1 else None
    if channel is not None and (channel < 0 or x.shape[channel] == 1):
        channel = None
    return context.linear(
        node,
        x,
        transform,
        channel=channel,
        norm=lambda: Bound(norm, "upper", "diagonal"),
        cheap=norm,
        rounding=rounding,
    )


def spread(node: Node, x: Value) -> float:
    """Return the norm of broadcasting a value to the shape of a node, √(copies)."""
    return sqrt_up(float(math.prod(node.shape) // max(1, math.prod(x.shape))))


def _largest(tensor: Tensor | None) -> float:
    return float(tensor.abs().max()) if tensor is not None and tensor.numel() else 0.0


# ------------------------------------------------------------------------------------------------------------ ranges

_INCREASING = """threshold softshrink relu relu6 hardtanh clamp_min clamp_max tanh sigmoid atan log_sigmoid erf selu
hardsigmoid""".split()


@ranged(*(f"aten.{name}.default" for name in _INCREASING), "aten.clamp.default", "aten.clamp.Tensor",
        "aten.maximum.default", "aten.minimum.default", "aten.max.other", "aten.min.other", "lipcert.maxmin",
        "aten.softplus.default")  # fmt: skip
def _increasing(node: Node, ranges: Ranges) -> Range:
    exact = node.op.split(".")[1] in ("relu", "relu6", "hardtanh", "maximum", "minimum", "max", "min", "maxmin")
    found = monotone(node, ranges, library=0.0 if exact or "clamp" in node.op else SIXTH)
    if node.op == "aten.softplus.default":  # its linear part, above the threshold, jumps by at most e^-threshold / beta
        step = math.exp(-float(node["threshold"])) / float(node["beta"]) * (1.0 + RELATIVE)
        return Range(found.low, found.high + step)
    return found


@ranged("aten.leaky_relu.default", "aten.elu.default", "aten.celu.default")
def _increasing_or_not(node: Node, ranges: Ranges) -> Range:
    name = "negative_slope" if "negative_slope" in node.arguments else "alpha"
    if float(node[name]) < 0.0:
        return ranges.unknown(node)
    return monotone(node, ranges, library=RELATIVE)


_LOWEST = {  # the only minimum, decreasing before and increasing after it: (where, value)
    "gelu": (-0.7518, -0.1700412),
    "silu": (-1.2785, -0.2784646),
    "mish": (-1.1924, -0.3088435),
    "hardswish": (-1.5, -0.3750001),
}


@ranged(*(f"aten.{name}.default" for name in _LOWEST))
def _dipping(node: Node, ranges: Ranges) -> Range:
    """Range over values at both ends, and the minimum wherever it can be reached."""
    x = ranges.of(node, "self")
    ends = [
        ranges.ends(node, lambda r: r.low.clamp(-FAR, FAR)), ranges.ends(node, lambda r: r.high.clamp(-FAR, FAR)),
    ]  # fmt: skip
    where, least = _LOWEST[node.op.split(".")[1]]
    inside = (x.low < where + 0.01) & (x.high > where - 0.01)
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    found = widened(Range(torch.where(inside, torch.minimum(low, torch.full_like(low, least)), low), high), SIXTH)
    return Range(found.low, torch.where(x.high == math.inf, math.inf, found.high))


@ranged("aten.abs.default")
def _absolute(node: Node, ranges: Ranges) -> Range:
    x = ranges.of(node, "self")
    return Range(torch.maximum(x.low, -x.high).clamp_min(0.0), x.magnitude)


@ranged("aten.sin.default", "aten.cos.default")
def _wave(node: Node, ranges: Ranges) -> Range:
    return ranges.constant(node, -1.0, 1.0)


@ranged("aten.neg.default")
def _negated(node: Node, ranges: Ranges) -> Range:
    x = ranges.of(node, "self")
    return Range(-x.high, -x.low)


@ranged("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar", "aten.rsub.Tensor",
        "aten.rsub.Scalar")  # fmt: skip
def _sum(node: Node, ranges: Ranges) -> Range:
    a, b, alpha = ranges.of(node, "self"), ranges.of(node, "other"), float(node["alpha"])
    kind = node.op.split(".")[1]
    found = total(b, a, -alpha) if kind == "rsub" else total(a, b, alpha if kind == "add" else -alpha)
    rank = len(node.shape)
    low, high = (end.reshape((1,) * (rank - end.ndim) + tuple(end.shape)) for end in (found.low, found.high))
    return Range(low, high)
