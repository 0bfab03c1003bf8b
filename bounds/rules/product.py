"""Products and quotients of values, of which one or both depend on the input.

    a'b' - ab = (a' - a) b' + a (b' - b),

so a product of two values is Lipschitz where both are bounded, and their ranges over the domain say how far. A factor
that is constant makes it a diagonal map.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from lipcert.bounds.core import Bound, BoundError, rule
from lipcert.bounds.graph import Node, Ref
from lipcert.bounds.matrix import spectral_norm_upper
from lipcert.bounds.propagation import Context
from lipcert.bounds.ranges import Range, Ranges, product, ranged, widened
from lipcert.bounds.rounding import div_up, mul_up, sqrt_up, up
from lipcert.bounds.rules.attention import written_out
from lipcert.bounds.rules.elementwise import scale, spread
from lipcert.bounds.rules.linear import contraction, schur
from lipcert.bounds.rules.margins import LOOSE, both, margin, wide
from lipcert.bounds.values import ONE, Rounding, Value

SILU = Bound(up(1.0998393201288669), "upper", "slope")


@rule("aten.mul.Tensor", "aten.mul.Scalar")
def multiplication(node: Node, context: Context) -> Value:
    """Bound a·b, entry by entry: max|c| for a constant factor c, else sup|b|·L_a + sup|a|·L_b over the domain.

    x·sigmoid(x), as SiLU is written out, has that function's slope.
    """
    if not (isinstance(node["self"], Ref) and isinstance(node["other"], Ref)):
        x = context.live[node.inputs[0]]
        factor = context.constant(node, "other" if isinstance(node["self"], Ref) else "self")
        if factor is None:
            raise BoundError(f"{node.op} without a factor ({node.place})")
        return scale(node, context, x, factor, Rounding(output=2, operations=1))
    a, b = context.data(node, "self"), context.data(node, "other")
    for x in (a, b):
        context.aligned(node, x)
    for x, gate in ((a, b), (b, a)):
        if gate.node.op == "aten.sigmoid.default" and gate.node["self"] == Ref(x.node.name):
            return context.nonlinear(node, [x], SILU, rounding=Rounding(((64, 1.1),), output=130, operations=8))
    largest = [context.ranges(x.node.name).largest for x in (a, b)]
    factors = [mul_up(wide(size), spread(node, x)) for x, size in zip((a, b), largest[::-1], strict=True)]
    margins = [margin(size) for size in largest]
    return both(node, context, [a, b], factors, margins, Rounding(output=1, operations=1))


@rule("aten.div.Tensor", "aten.div.Scalar")
def division(node: Node, context: Context) -> Value:
    """Bound a/b: max|1/c| for a constant divisor, else L_a/m + sup|a|·L_b/m² where |b| ≥ m > 0 on the domain."""
    if not isinstance(node["other"], Ref):
        divisor = context.constant(node, "other")
        if divisor is None or bool((divisor == 0.0).any()):
            raise BoundError(f"division by zero ({node.place})")
        x = context.data(node, "self")
        return scale(node, context, x, divisor.reciprocal(), Rounding(output=2, operations=1), roundings=1)
    b = context.data(node, "other")
    context.aligned(node, b)
    least = distance_from_zero(context.ranges(b.node.name)) * (1.0 - LOOSE)
    inputs = [context.data(node, "self"), b] if isinstance(node["self"], Ref) else [b]
    for x in inputs:
        context.aligned(node, x)
    if not least > 0.0:
        return context.unbounded(node, inputs, "the divisor depends on the input, and its range contains zero")
    size = context.ranges.of(node, "self").largest
    steep = mul_up(div_up(div_up(wide(size), least), least), spread(node, b))
    rounding = Rounding(output=2, operations=1)
    if len(inputs) == 1:
        return both(node, context, [b], [steep], [least * LOOSE], rounding)
    gentle = mul_up(div_up(1.0, least), spread(node, inputs[0]))
    return both(node, context, inputs, [gentle, steep], [margin(size), least * LOOSE], rounding)


@rule("aten.mm.default", "aten.matmul.default", "aten.bmm.default")
def matmul(node: Node, context: Context) -> Value:
    """Bound AB: the norm of a constant matrix, taken along one dimension of the other, or sup‖A‖·L_B + sup‖B‖·L_A.

    ‖A'B' - AB‖_F ≤ ‖A' - A‖_F ‖B'‖ + ‖A‖ ‖B' - B‖_F for every pair of matrices in a stack, with the norms bounded by
    √(‖·‖₁‖·‖_∞) and Frobenius from the ranges of the entries.
    """
    second = "mat2" if "mat2" in node.arguments else "other"
    values = [context.live[name] for name in node.inputs]
    if isinstance(node["self"], Ref) and isinstance(node[second], Ref):
        a, b = context.data(node, "self"), context.data(node, second)
        for x in (a, b):
            if len(x.shape) < 2 or (x.node.batch is not None and x.node.batch >= len(x.shape) - 2):
                raise context.mixed(node)
            context.aligned(node, x)
        if (attended := written_out(node, context, a, b)) is not None:
            return attended
        sizes = [context.ranges.matrix_norm(x.node.name) for x in (a, b)]
        copies = [_stacked_copies(node, x) for x in (a, b)]
        factors = [mul_up(wide(size), copy) for size, copy in zip(sizes[::-1], copies, strict=True)]
        length = a.shape[-1]
        roots = [sqrt_up(float(x.shape[-1] * x.shape[-2])) for x in (a, b)]  # ‖|A|‖ ≤ √(mn) max|a|
        rounding = Rounding(((length + 1, mul_up(roots[1], wide(context.ranges(b.node.name).largest), copies[0])),),
                            operations=2 * length)  # fmt: skip
        return both(node, context, [a, b], factors, [margin(s) for s in sizes], rounding)
    right = isinstance(node["self"], Ref)
    x = values[0]
    matrix = context.constant(node, second if right else "self")
    if matrix is None or matrix.ndim < 2 or len(x.shape) < 2:
        raise BoundError(f"{node.op} of a vector has no rule ({node.place}); use a matrix of one row or column")
    matrix = matrix.mT if right else matrix
    dim = len(x.shape) - (1 if right else 2)
    if matrix.ndim == 2:
        return contraction(node, context, x, matrix, dim)
    context.axis(node, x, dim)
    repeats = math.prod(node.shape) // matrix.shape[-2] * matrix.shape[-1] // math.prod(x.shape)
    if repeats > 1:
        return context.unbounded(node, values, "a stack of matrices multiplies one value")
    norm = cache(lambda: spectral_norm_upper(matrix, context.method))
    size = max(schur(one) for one in matrix.flatten(0, -3))
    rounding = Rounding(inputs=((matrix.shape[-1] + 2, size),), operations=2 * matrix.shape[-1])
    return context.linear(node, x, None, norm=norm, cheap=size, rounding=rounding)


@rule("aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim", "aten.norm.ScalarOpt_dim_dtype")
def vector_norm(node: Node, context: Context) -> Value:
    """Bound p-norms over disjoint groups: | ‖a‖_p - ‖b‖_p | ≤ ‖a-b‖_p ≤ ‖a-b‖₂ for p ≥ 2, √n‖a-b‖₂ for p = 1."""
    x = context.data(node, "self")
    order = node["ord"] if "ord" in node.arguments else node["p"]
    order = 2.0 if order is None else float(order)
    given = node["dim"]
    dims = range(len(x.shape)) if given is None or given == () else [given] if isinstance(given, int) else given
    count = math.prod(x.shape[context.axis(node, x, d)] for d in dims)
    if order == 1.0:
        factor = Bound(sqrt_up(float(count)), "upper", "norm inequality")
    elif order >= 2.0:
        factor = ONE
    else:
        raise BoundError(f"the {order}-norm has no rule ({node.place}); use an order of 1 or at least 2")
    rounding = Rounding(output=count + 8, operations=count, squares=count if order == 2.0 else 0)
    if order not in (1.0, 2.0, math.inf):  # powers that underflow, or overflow in another precision
        lost = sqrt_up(float(math.prod(node.shape))) * (count * 2.0**-1022) ** (1.0 / order) * (1.0 + 2.0**-40)
        rounding = Rounding(output=count + 8 + 64, absolute=lost, operations=count, own_only=True)
    return context.nonlinear(node, [x], factor, rounding=rounding)


def distance_from_zero(found: Range) -> float:
    """Return the least absolute value in a range, 0 if it contains zero or touches it."""
    return max(0.0, float(torch.maximum(found.low, -found.high).min()))


def _stacked_copies(node: Node, x: Value) -> float:
    """Return √(how often each matrix of a stack is used)."""
    uses = math.prod(node.shape[:-2]) // max(1, math.prod(x.shape[:-2]))
    return sqrt_up(float(uses))


@ranged("aten.mul.Tensor", "aten.mul.Scalar")
def _multiplied(node: Node, ranges: Ranges) -> Range:
    a, b = ranges.of(node, "self"), ranges.of(node, "other")
    if node["self"] == node["other"]:
        magnitude = a.magnitude
        least = torch.maximum(a.low, -a.high).clamp_min(0.0)
        return widened(Range(least * least, magnitude * magnitude), 2.0**-52)
    return _shaped(node, product(a, b))


@ranged("aten.div.Tensor", "aten.div.Scalar")
def _divided(node: Node, ranges: Ranges) -> Range:
    a, b = ranges.of(node, "self"), ranges.of(node, "other")
    if not distance_from_zero(b) > 0.0:
        return ranges.unknown(node)
    inverse = widened(Range(b.high.reciprocal(), b.low.reciprocal()), 2.0**-52)
    return _shaped(node, product(a, inverse))


@ranged("aten.mm.default", "aten.matmul.default", "aten.bmm.default")
def _matrix_product(node: Node, ranges: Ranges) -> Range:
    """Bound |Σ_k a_k b_k| ≤ Σ_k |a_k||b_k|, and where one factor has no negative entry, the sum from both sides."""
    second = "mat2" if "mat2" in node.arguments else "other"
    sides: list[Range] = []
    for argument in ("self", second):
        side, shape = ranges.of(node, argument), ranges.shape(node[argument])
        sides.append(Range(side.low.expand(shape), side.high.expand(shape)))
    a, b = sides
    if not (a.finite and b.finite) or a.low.ndim < 2 or b.low.ndim < 2:
        return ranges.unknown(node)
    size = (a.magnitude @ b.magnitude) * (1.0 + 2.0**-50 * (a.low.shape[-1] + 4)) + 2.0**-1000
    if bool((b.low >= 0.0).all()):
        low, high = _one_sided(Range(b.low.mT, b.high.mT), Range(a.low.mT, a.high.mT), size.mT)
        return Range(low.mT, high.mT)
    if bool((a.low >= 0.0).all()):
        return Range(*_one_sided(a, b, size))
    return Range(-size, size)


def _one_sided(a: Range, b: Range, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends of a @ b for a ≥ 0 whose sums of absolute values are at most `size`.

    a_k b_k ≥ a_k b̲_k, at its least for the smallest a_k where b̲_k ≥ 0 and for the largest where it is negative; the
    sums err by γ_n times `size`. Where neither factor is negative, nor is the sum.
    """
    slack = size * (2.0**-50 * (a.low.shape[-1] + 4)) + 2.0**-1000
    low = a.low @ b.low.clamp_min(0.0) + a.high @ b.low.clamp_max(0.0) - slack
    high = a.high @ b.high.clamp_min(0.0) + a.low @ b.high.clamp_max(0.0) + slack
    never = (b.low >= 0.0).all(-2, keepdim=True)
    return torch.where(never, low.clamp_min(0.0), low), high


def _shaped(node: Node, found: Range) -> Range:
    """Return a range with leading singleton dimensions, as broadcasting puts them there."""
    rank = len(node.shape)
    low, high = (end.reshape((1,) * (rank - end.ndim) + tuple(end.shape)) for end in (found.low, found.high))
    return Range(low, high)


@ranged("aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim", "aten.norm.ScalarOpt_dim_dtype")
def _norm_range(node: Node, ranges: Ranges) -> Range:
    """Range over norms of the smallest and of the largest absolute values."""
    x, given = ranges.of(node, "self"), node["dim"]
    shape = ranges.shape(node["self"])
    dims = range(len(shape)) if given is None or given == () else [given] if isinstance(given, int) else given
    order = node["ord"] if "ord" in node.arguments else node["p"]
    ends = (torch.maximum(x.low, -x.high).clamp_min(0.0), x.magnitude)
    least, most = (torch.linalg.vector_norm(end.expand(shape), 2.0 if order is None else float(order), tuple(dims),
                                            bool(node["keepdim"])) for end in ends)  # fmt: skip
    return widened(Range(least, most), 2.0**-40)
