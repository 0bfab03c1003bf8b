"""Batch, layer, group and instance normalisation at inference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipcert.bounds.core import Bound, BoundError, rule
from lipcert.bounds.graph import Node, Ref
from lipcert.bounds.propagation import Context
from lipcert.bounds.ranges import Range, Ranges, product, ranged, total, widened
from lipcert.bounds.rounding import div_up, enlarge, mul_up, sqrt_up
from lipcert.bounds.rules.elementwise import scale
from lipcert.bounds.values import Rounding, Value


@rule("aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default")
def batch_norm(node: Node, context: Context) -> Value:
    """Bound BatchNorm at inference, weight·(x - mean)/√(var + ε) + bias: a diagonal map, fused with its neighbours.

    With the statistics of the batch itself (training mode, or none recorded) it mixes images: BoundError.
    """
    x = context.data(node, "input")
    if node.arguments.get("training", False) or node["running_mean"] is None:
        raise BoundError(
            f"BatchNorm uses the statistics of the batch ({node.place}): training mode or track_running_stats=False. "
            "Call eval() on a model that has recorded statistics"
        )
    context.axis(node, x, 1)
    variance, weight = context.constant(node, "running_var"), context.constant(node, "weight")
    mean, bias = context.constant(node, "running_mean"), context.constant(node, "bias")
    if node.output not in (None, 0) or variance is None or mean is None:
        raise BoundError(f"only the normalised value of {node.op} has a rule ({node.place})")
    if bool((variance + node["eps"] <= 0.0).any()):
        raise BoundError(f"BatchNorm has a variance that is not positive ({node.place})")
    factor = (variance + float(node["eps"])).rsqrt() * (1.0 if weight is None else weight)
    shape = (-1, *(1,) * (len(x.shape) - 2))
    largest = float(factor.abs().max())
    positions = sqrt_up(float(math.prod(x.shape) // x.shape[1]))
    shift = _norm(factor * mean) + (0.0 if bias is None else _norm(bias))  # kernels may fold the two into one constant
    constant = mul_up(enlarge(shift, x.shape[1] + 8), positions)
    lost = 4.0 + 1.0 / float((variance + float(node["eps"])).min())  # by a variance or an ε that underflows
    rounding = Rounding(((8, enlarge(largest, 8)),), output=2, constant=(8, constant), operations=lost)
    return scale(node, context, x, factor.reshape(shape), rounding, roundings=8)


@rule("aten.layer_norm.default", "aten.native_layer_norm.default")
def layer_norm(node: Node, context: Context) -> Value:
    """Bound LayerNorm by max|weight|/√ε: its Jacobian is diag(weight)(1/s)(P - zzᵀ/(Ds²)) with s² = var + ε ≥ ε.

    The matrix in parentheses has singular values at most 1. The bound is attained where the variance vanishes.
    """
    x = context.data(node, "input")
    shape = [int(size) for size in node["normalized_shape"]]
    for dim in range(1, len(shape) + 1):
        context.axis(node, x, -dim)
    return _normalised(node, context, x, shape)


@rule("aten.group_norm.default", "aten.native_group_norm.default")
def group_norm(node: Node, context: Context) -> Value:
    """Bound GroupNorm by max|weight|/√ε, group by group, as `layer_norm`; the groups are disjoint."""
    x = context.data(node, "input")
    groups = int(node["num_groups"] if "num_groups" in node.arguments else node["group"])
    for dim in range(1, len(x.shape)):
        context.axis(node, x, dim)
    return _normalised(node, context, x, [math.prod(x.shape[1:]) // groups])


@rule("aten.instance_norm.default")
def instance_norm(node: Node, context: Context) -> Value:
    """Bound InstanceNorm with statistics of the image by max|weight|/√ε, as `layer_norm`, channel by channel."""
    x = context.data(node, "input")
    if not node["use_input_stats"]:
        raise BoundError(f"InstanceNorm with recorded statistics has no rule ({node.place}); use BatchNorm")
    for dim in range(1, len(x.shape)):
        context.axis(node, x, dim)
    return _normalised(node, context, x, [math.prod(x.shape[2:])])


@rule("lipcert.normalize")
def normalize(node: Node, context: Context) -> Value:
    """Bound the normalisation of rows by 1/ε or 1/√ε; see `lipcert.bounds.composites` for the four forms."""
    x = context.data(node, "x")
    count = x.shape[context.axis(node, x, node["dim"])]
    eps = float(node["eps"])
    if eps <= 0.0:
        return context.unbounded(node, [x], "normalisation with ε = 0 has no Lipschitz constant")
    slope = div_up(1.0, eps if node["kind"] in ("max", "sum") else math.nextafter(math.sqrt(eps), 0.0))
    label = "1/ε" if node["kind"] in ("max", "sum") else "1/√ε"
    power = 2 if node["kind"] in ("max", "sum") else 1
    rounding = Rounding(output=count + 16, operations=_lost(count, eps**power), squares=count)
    return context.nonlinear(node, [x], Bound(slope, "upper", label), rounding=rounding)


@rule("aten.rms_norm.default")
def rms_norm(node: Node, context: Context) -> Value:
    """Bound RMSNorm, weight·x/√(mean x² + ε), by max|weight|/√ε."""
    x = context.data(node, "input")
    shape = [int(size) for size in node["normalized_shape"]]
    for dim in range(1, len(shape) + 1):
        context.axis(node, x, -dim)
    if isinstance(node["weight"], Ref):
        return context.unbounded(node, [context.live[n] for n in node.inputs], "the weight depends on the input")
    weight = context.constant(node, "weight")
    eps = torch.finfo(torch.float64).eps if node["eps"] is None else float(node["eps"])
    if eps <= 0.0:
        return context.unbounded(node, [x], "normalisation with ε = 0 has no Lipschitz constant")
    largest = 1.0 if weight is None else float(weight.abs().max())
    slope = div_up(largest, math.nextafter(math.sqrt(eps), 0.0))
    count = math.prod(shape)
    lost = _lost(count, eps) * max(1.0, largest)
    # without ε torch takes the unit roundoff of the type it runs in, so that a float32 program is another function
    rounding = Rounding(output=count + 16, operations=lost, squares=count, own_only=node["eps"] is None)
    return context.nonlinear(node, [x], Bound(slope, "upper", "1/√ε"), rounding=rounding)


def _normalised(node: Node, context: Context, x: Value, shape: Sequence[int]) -> Value:
    """Return the value of weight·(x - mean)/√(var + ε) + bias over groups of ∏shape entries.

    Rounding, for the two-pass evaluation of `Program` (mean, difference d, mean of d², quotient): the computed d errs
    by γ_{D+2}‖x‖, and d ↦ d/√(mean d² + ε) is (1/√ε)-Lipschitz; all later operations are relative errors of the result.
    """
    if isinstance(node["weight"], Ref) or isinstance(node["bias"], Ref):
        values = [context.live[name] for name in node.inputs]
        return context.unbounded(node, values, "the weight of the normalisation depends on the input")
    if node.output not in (None, 0):
        raise BoundError(f"only the normalised value of {node.op} has a rule ({node.place})")
    weight, bias, eps = context.constant(node, "weight"), context.constant(node, "bias"), float(node["eps"])
    if eps <= 0.0:
        return context.unbounded(node, [x], "normalisation with ε = 0 has no Lipschitz constant")
    count = math.prod(shape)
    largest = 1.0 if weight is None else float(weight.abs().max())
    slope = div_up(largest, math.nextafter(math.sqrt(eps), 0.0))
    constant = 0.0
    if bias is not None:
        copies = math.prod(x.shape) // bias.numel()
        constant = mul_up(enlarge(_norm(bias), bias.numel() + 2), sqrt_up(float(copies)))
    rounding = Rounding(
        ((count + 3, slope),),
        output=count + 16,
        constant=(count + 16, constant),
        operations=_lost(2 * count, eps) * max(1.0, largest),
        squares=count,
        own_only=True,
    )
    return context.nonlinear(node, [x], Bound(slope, "upper", "1/√ε"), rounding=rounding)


def _lost(count: int, floor: float) -> float:
    """Return how often the smallest number a normalised row may be off because squares or ε underflow.

    With s the sum of the squares, off by d, and ρ(s) = √(s + floor) or max(√s, √floor) or √s + √floor:
    ‖x‖·|1/ρ(s) - 1/ρ(s + d)| ≤ d/floor, since √s·|√(s + d) - √s| ≤ d. Where floor < d all of it is lost, which a
    program refuses as it does a small variance.
    """
    return (count + 8.0) * (1.0 + 1.0 / floor) if floor >= 2.0**-1000 else math.inf


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


# ------------------------------------------------------------------------------------------------------------ ranges


@ranged("aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default")
def _batch_norm_range(node: Node, ranges: Ranges) -> Range:
    if node.arguments.get("training", False) or node["running_mean"] is None or isinstance(node["weight"], Ref):
        return ranges.unknown(node)
    shape = (1, -1, *(1,) * (len(node.shape) - 2))
    factor = (node["running_var"] + float(node["eps"])).rsqrt()
    factor = factor if node["weight"] is None else factor * node["weight"]
    x = ranges.of(node, "input")
    centred = total(x, Range(node["running_mean"].reshape(shape), node["running_mean"].reshape(shape)), -1.0)
    scaled = product(centred, widened(Range(factor, factor), 2.0**-49).reshaped(shape))
    if node["bias"] is None:
        return scaled
    bias = node["bias"].reshape(shape)
    return total(scaled, Range(bias, bias))


@ranged("aten.layer_norm.default", "aten.native_layer_norm.default", "aten.group_norm.default",
        "aten.native_group_norm.default", "aten.instance_norm.default")  # fmt: skip
def _normalised_range(node: Node, ranges: Ranges) -> Range:
    """Range over |(x - mean)/√(var + ε)| ≤ √(D - 1) for each of D entries: the others can balance no more."""
    weight, bias = node["weight"], node["bias"]
    if isinstance(weight, Ref) or isinstance(bias, Ref) or node.output not in (None, 0):
        return ranges.unknown(node)
    rank = len(node.shape)
    if "normalized_shape" in node.arguments:
        count = math.prod(int(size) for size in node["normalized_shape"])
        shape = (*(1,) * (rank - len(node["normalized_shape"])), *node["normalized_shape"])
    else:
        groups = node.arguments.get("num_groups", node.arguments.get("group", node.shape[1]))
        count, shape = math.prod(node.shape[1:]) // int(groups), (1, -1, *(1,) * (rank - 2))
    found = ranges.constant(node, -math.sqrt(count), math.sqrt(count))
    if weight is not None:
        found = product(found, Range(weight.reshape(shape), weight.reshape(shape)))
    return found if bias is None else total(found, Range(bias.reshape(shape), bias.reshape(shape)))


@ranged("lipcert.normalize")
def _unit_range(node: Node, ranges: Ranges) -> Range:
    """Range over entries of rows of length at most 1, or √D where the mean is taken."""
    size = math.sqrt(node.shape[node["dim"]]) * (1.0 + 2.0**-50) if node["kind"] == "mean" else 1.0
    return ranges.constant(node, -size, size)


@ranged("aten.rms_norm.default")
def _rms_range(node: Node, ranges: Ranges) -> Range:
    if isinstance(node["weight"], Ref):
        return ranges.unknown(node)
    count = math.prod(int(size) for size in node["normalized_shape"])
    found = ranges.constant(node, -math.sqrt(count), math.sqrt(count))
    if node["weight"] is None:
        return found
    weight = node["weight"].reshape((1,) * (len(node.shape) - node["weight"].ndim) + tuple(node["weight"].shape))
    return product(found, Range(weight, weight))
