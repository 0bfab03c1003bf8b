"""Softmax attention, as one operator or written out: the inequality of `lipcert.bounds.attention` in the graph.

The rows of queries, keys and values are bounded through the linear layer that makes them, head by head: a LayerNorm
before it keeps its rows in an ellipsoid, other values in the box of their ranges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lipcert.bounds import pieces
from lipcert.bounds.attention import Columns, Rows, coefficients, column_sums
from lipcert.bounds.core import Bound, BoundError, rule
from lipcert.bounds.graph import BatchConstant, Node, Ref
from lipcert.bounds.matrix import spectral_norm_upper
from lipcert.bounds.origin import origin
from lipcert.bounds.propagation import Context
from lipcert.bounds.ranges import Range, Ranges, ranged
from lipcert.bounds.rounding import enlarge, gamma, mul_up, sqrt_up
from lipcert.bounds.rules.margins import margin, wide
from lipcert.bounds.values import Derivation, Rounding, Value

HEADS = 4096  # more different sets of features are not looked at one by one
DATA = "attention without a bound on its {}: dot-product attention alone has no Lipschitz constant; normalise before it"


@dataclass(frozen=True)
class Part:
    """Queries, keys or values: their rows, and the linear layer they are cut from, if there is one."""

    value: Value
    rows: Rows
    layer: str = ""  # the input of the layer
    norm: float = math.inf  # of the rows of its matrix that are used


@rule("aten.scaled_dot_product_attention.default")
def scaled_dot_product_attention(node: Node, context: Context) -> Value:
    """Bound softmax(s QKᵀ + mask) V by |s|R_vR_k L_Q + |s|R_vR_q√c' L_K + √c L_V; see `lipcert.bounds.attention`.

    A mask M that depends on the input adds R_v L_M, by the same proof with dS = dM, and c is the number of queries.
    """
    q, k, v = (context.data(node, name) for name in ("query", "key", "value"))
    if node.arguments.get("enable_gqa") or float(node["dropout_p"]) != 0.0:
        raise BoundError(f"attention with grouped queries or dropout has no rule ({node.place})")
    added = [context.data(node, "attn_mask")] if isinstance(node["attn_mask"], Ref) else []
    _separate(node, context, [q, k, v, *added])
    queries, keys = q.shape[-2], k.shape[-2]
    bias = None if added else _mask(node["attn_mask"])
    if node["is_causal"]:
        bias = torch.full((queries, keys), -math.inf, dtype=torch.float64, device=q.device).triu(1)
    scale = 1.0 / math.sqrt(q.shape[-1]) if node["scale"] is None else float(node["scale"])
    parts = [part(context, x) for x in (q, k, v)]
    weights = _weights(node, parts, scale, [] if bias is None else [bias], bounded=not added)
    if weights is None:
        missing = "queries, keys or values"
        return context.unbounded(node, [q, k, v, *added], DATA.format(missing))
    values = parts[2].rows
    size = abs(scale) * parts[0].rows.norm * parts[1].rows.norm
    if bias is not None:
        size += float(torch.where(bias.isinf(), 0.0, bias).abs().max())
    moved = []
    for mask in added:
        largest = context.ranges(mask.node.name).largest
        size += wide(largest)
        scores = math.prod(node.shape[:-1]) * keys
        factor = mul_up(wide(values.radius), sqrt_up(scores / math.prod(mask.shape)))
        moved.append((mask, Bound(factor, "upper", "attention"), margin(largest)))
    rounding = Rounding(absolute=_absolute(size, values.norm, q.shape[-1], keys, math.prod(node.shape) // v.shape[-1]),
                        operations=2 * (keys + q.shape[-1]), own_only=True)  # fmt: skip
    margins = [margin(p.rows.norm) for p in parts]
    factors = [*weights, *(bound.value for _, bound, _ in moved)]
    margins += [limit for *_, limit in moved]
    result = context.value(node, [q, k, v, *added], factors, rounding, margins=margins)
    result.candidates += _derivations(context, parts, weights, moved)
    _pieces(context, result, parts, weights, moved)
    context.bound(result)
    return result


def written_out(node: Node, context: Context, a: Value, b: Value) -> Value | None:
    """Return the value of P·V where P is a softmax of scaled products of queries and keys, None where it is not."""
    nodes = context.ranges.nodes
    if a.node.op != "aten.softmax.int" or a.node["dim"] % len(a.shape) != len(a.shape) - 1 or len(a.shape) < 3:
        return None
    found = _scores(nodes, a.node["self"].name)
    if found is None:
        return None
    product, scale, biases = found
    q, transposed = (context.kept.get(product[name].name) for name in ("self", _second(product)))
    if q is None or transposed is None:
        return None
    parts = [part(context, q), part(context, transposed, columns=True), part(context, b)]
    weights = _weights(node, parts, scale, biases)
    if weights is None:
        return None
    # P and V alone: ‖P'V' - PV‖_F ≤ ‖P' - P‖_F ‖V'‖ + ‖P‖ ‖V' - V‖_F with P exact, and ‖|V|‖ ≤ ‖V‖ √(smaller side)
    size, length = context.ranges.matrix_norm(b.node.name), a.shape[-1]
    largest = mul_up(wide(size), sqrt_up(math.prod(node.shape[:-2]) / math.prod(a.shape[:-2])))
    rounding = Rounding(((length + 1, mul_up(largest, sqrt_up(float(min(b.shape[-2:]))))),), operations=2 * length)
    alone = [largest, weights[2]]
    margins = [math.inf, margin(size)]
    result = context.value(node, [a, b], alone, rounding, margins=margins)
    result.candidates += _derivations(context, parts, weights)
    _pieces(context, result, parts, weights)
    result.candidates.append(
        lambda: context.derive([a, b], [Bound(factor, "upper", "range") for factor in alone], "matmul")
    )
    context.bound(result)
    return result


def part(context: Context, x: Value, *, columns: bool = False) -> Part:
    """Return what bounds the rows (columns, of transposed keys) of queries, keys or values."""
    ranges, nodes = context.ranges, context.ranges.nodes
    found = ranges(x.node.name)
    ends = [end.expand(x.shape).mT if columns else end.expand(x.shape) for end in (found.low, found.high)]
    rows = _box(*ends)
    where = origin(nodes, x.node.name)
    index = where.index.mT if columns else where.index
    layer = nodes[where.source]
    factor = abs(where.factor)
    if not index.numel() or bool((index == 0).any()):
        return Part(x, rows)
    if layer.op == "lipcert.normalize" and layer["kind"] != "mean" and _same_group(layer, index):
        return Part(x, Rows(min(rows.norm, factor), min(rows.radius, factor)))
    if layer.op != "aten.linear.default" or not isinstance(layer["weight"], Tensor) or isinstance(layer["bias"], Ref):
        return Part(x, rows)
    width = layer.shape[-1]
    feature = ((index - 1) % width).to(torch.int64)
    if not bool((feature == feature[..., :1, :]).all()):
        return Part(x, rows)
    heads = torch.unique(feature[..., 0, :].reshape(-1, feature.shape[-1]), dim=0)
    if len(heads) > HEADS:
        return Part(x, rows)
    centre, scale, radius = _input_rows(ranges, layer["input"].name)
    matrix = layer["weight"]
    spread = mul_up(spectral_norm_upper((matrix * scale)[heads], context.method).value, radius, factor, 1 + 2.0**-40)
    middle = matrix @ centre if layer["bias"] is None else matrix @ centre + layer["bias"]
    slack = matrix.abs() @ centre.abs() * 2.0**-40
    offset = float(torch.linalg.vector_norm((middle.abs() + slack)[heads], dim=1).max()) * factor * (1 + 2.0**-40)
    rows = Rows(min(rows.norm, offset + spread), min(rows.radius, spread))
    if torch.unique(index).numel() < index.numel():
        return Part(x, rows)
    used = torch.unique(heads)
    norm = spectral_norm_upper(matrix[used], context.method).value
    return Part(x, rows, layer["input"].name, mul_up(norm, factor, 1 + 2.0**-40))


def _box(low: Tensor, high: Tensor) -> Rows:
    """Return the rows of a box: every row along the last dimension, the same centre for all rows of one head."""
    norm = torch.linalg.vector_norm(torch.maximum(low.abs(), high.abs()), dim=-1).max()
    half = (high.amax(-2) - low.amin(-2)) / 2
    radius = torch.linalg.vector_norm(half, dim=-1).max()
    count = low.shape[-1] + 4
    norm, radius = (float(x) if not x.isnan() else math.inf for x in (norm, radius))
    return Rows(enlarge(norm, count), enlarge(radius, count))


def _input_rows(ranges: Ranges, name: str) -> tuple[Tensor, Tensor, float]:
    """Return (centre, scale, radius): every row of a value is centre + scale·u with ‖u‖ ≤ radius."""
    nodes = ranges.nodes
    where = origin(nodes, name)
    norm = nodes[where.source]
    width = nodes[name].shape[-1]
    one = torch.ones(width, dtype=torch.float64, device=ranges.device)
    if norm.op == "aten.layer_norm.default" and list(norm["normalized_shape"]) == [width] and where.factor == 1.0:
        kept = where.index.numel() and bool((where.index > 0).all())
        kept = kept and bool(((where.index - 1) % width == torch.arange(width)).all())
        if kept and not isinstance(norm["weight"], Ref) and not isinstance(norm["bias"], Ref):
            weight = one if norm["weight"] is None else norm["weight"]
            return (0.0 * one if norm["bias"] is None else norm["bias"]), weight, sqrt_up(float(width))
    found = ranges(name)
    every = tuple(range(len(nodes[name].shape) - 1))
    low, high = (end.expand(*end.shape[:-1], width) for end in (found.low, found.high))
    low, high = low.amin(every), high.amax(every)
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        return 0.0 * one, one, math.inf
    return (low + high) / 2, (high - low) / 2 * (1 + 2.0**-50) + low.abs() * 2.0**-50, sqrt_up(float(width))


def _same_group(node: Node, index: Tensor) -> bool:
    """Return whether every row consists of entries that were normalised together."""
    shape, dim = node.shape, node["dim"] % len(node.shape)
    after = math.prod(shape[dim + 1 :])
    flat = index - 1
    group = torch.div(flat, shape[dim] * after, rounding_mode="floor") * after + flat % after
    return bool((group == group[..., :1]).all()) and torch.unique(index).numel() == index.numel()


def _weights(
    node: Node, parts: Sequence[Part], scale: float, biases: Sequence[Tensor], *, bounded: bool = True
) -> tuple[float, float, float] | None:
    """Return the coefficients for queries, keys and values with ranges widened by their margins, None if infinite.

    `bounded`: all that is added to the products are these `biases`.
    """
    q, k, v = (Rows(wide(p.rows.norm), wide(p.rows.radius)) for p in parts)
    queries, keys = node.shape[-2], parts[2].value.shape[-2]
    spread = 2.0 * abs(scale) * q.norm * k.radius * (1 + 2.0**-40)
    hidden = [bias for bias in biases if bool(bias.isinf().any())]
    for bias in biases:
        if not bool(bias.isinf().any()):
            spread += float((bias.amax(-1) - bias.amin(-1)).max()) * (1 + 2.0**-40)
    if not math.isfinite(spread) or not bounded:
        spread = math.inf
    try:
        columns = column_sums(spread, hidden[0] if len(hidden) == 1 else None, queries, keys)
    except ValueError as error:
        raise BoundError(f"{error} ({node.place})") from error
    if len(hidden) > 1:  # their union may leave a row fewer keys than each does
        columns = Columns(float(queries), float(queries))
    found = coefficients(q, k, v, scale, columns)
    heads = math.prod(node.shape[:-2])  # what is broadcast to several heads moves them all
    a, b, c = (mul_up(f, sqrt_up(heads / math.prod(p.value.shape[:-2]))) for f, p in zip(found, parts, strict=True))
    return (a, b, c) if math.isfinite(a + b + c) else None


def _derivations(
    context: Context, parts: Sequence[Part], weights: Sequence[float],
    moved: Sequence[tuple[Value, Bound, float]] = (),
) -> list:  # fmt: skip
    """Return the ways to a bound: through each part, or through the layers they are cut from; and what is `moved` too.
    """
    bounds = [Bound(weight, "upper", "attention") for weight in weights]
    apart = [p.value for p in parts]
    limits = [margin(p.rows.norm) for p in parts]

    def derive(values: Sequence[Value], factors: Sequence[Bound], margins: Sequence[float]) -> Derivation:
        return replace(context.derive(values, factors, "attention"), margins=tuple(margins))

    ways = [partial(derive, *zip(*zip(apart, bounds, limits, strict=True), *moved, strict=True))]
    through: list[tuple[Value, Bound, float]] = []
    for p, bound, limit in zip(parts, bounds, limits, strict=True):
        source = context.kept.get(p.layer)
        if source is None:
            through.append((p.value, bound, limit))
        else:
            norm = Bound(p.norm, "upper", "projection")
            through.append((source, bound * norm, limit / max(p.norm, 2.0**-500)))
    ways.append(partial(derive, *zip(*through, *moved, strict=True)))
    return ways


def _pieces(
    context: Context, result: Value, parts: Sequence[Part], weights: Sequence[float],
    moved: Sequence[tuple[Value, Bound, float]] = (),
) -> None:  # fmt: skip
    """Make attention inside a piece of a value a piece of it: each part through itself, or the layer it is cut from."""
    ways: list[list[pieces.Way]] = []
    for p, weight in zip(parts, weights, strict=True):
        bound = Bound(weight, "upper", "attention")
        ways.append([(p.value, bound)])
        if (source := context.kept.get(p.layer)) is not None:
            ways[-1].append((source, bound * Bound(p.norm, "upper", "projection")))
    pieces.apart(result, [*ways, *([(mask, bound)] for mask, bound, _ in moved)])


def _scores(nodes: Mapping[str, Node], name: str) -> tuple[Node, float, list[Tensor]] | None:
    """Return the product of queries and keys behind scores, what it is scaled by, and the constants added to it."""
    scale = 1.0
    biases: list[Tensor] = []
    while True:
        node = nodes[name]
        kind = node.op.split(".")[1]
        if kind in ("matmul", "bmm") and len(node.inputs) == 2:
            return node, scale, biases
        if len(node.inputs) != 1:
            return None
        if kind in ("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten", "expand"):
            if node.shape[-2:] != nodes[node.inputs[0]].shape[-2:]:
                return None
        elif kind in ("add", "sub") and node["alpha"] == 1 and isinstance(node["self"], Ref):
            bias = _tensor(node["other"])
            biases.append((bias if kind == "add" else -bias).expand(node.shape).reshape(-1, *node.shape[-2:]) * scale)
        elif kind in ("mul", "div") and isinstance(node["self"], Ref):
            factor = _tensor(node["other"])
            scale *= float(factor.abs().max() if kind == "mul" else factor.abs().reciprocal().max()) * (1 + 2.0**-50)
            if biases and factor.numel() > 1:
                return None
        else:
            return None
        name = node.inputs[0]


def _tensor(argument: object) -> Tensor:
    given = argument.tensor if isinstance(argument, BatchConstant) else argument
    return torch.as_tensor(given, dtype=torch.float64)


def _second(node: Node) -> str:
    return "mat2" if "mat2" in node.arguments else "other"


def _mask(given: object) -> Tensor | None:
    if given is None:
        return None
    tensor = given.tensor if isinstance(given, BatchConstant) else given
    if not isinstance(tensor, Tensor):
        return None
    if tensor.dtype == torch.bool:
        return torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device).masked_fill(~tensor, -math.inf)
    return tensor.to(torch.float64)


def _separate(node: Node, context: Context, values: Sequence[Value]) -> None:
    for x in values:
        if len(x.shape) < 3 or (x.node.batch is not None and x.node.batch >= len(x.shape) - 2):
            raise context.mixed(node)
        context.aligned(node, x)


def _absolute(scores: float, values: float, width: int, keys: int, rows: int) -> float:
    """Bound the rounding of one attention: scores within δ change a softmax by a factor e^±2δ."""
    delta = (gamma(width + 8) + 2.0**-51) * scores
    relative = math.expm1(min(2.0 * delta, 1.0)) + gamma(keys + 256) if delta < 0.5 else math.inf
    return sqrt_up(float(rows)) * values * (relative + gamma(keys + 8)) * 1.0625


@ranged("aten.scaled_dot_product_attention.default")
def _mean_range(node: Node, ranges: Ranges) -> Range:
    """Range over averages of the values: those of each column over all keys."""
    values = ranges.of(node, "value")
    shape = ranges.shape(node["value"])
    low, high = (end.expand(shape).amin(-2, True) if k == 0 else end.expand(shape).amax(-2, True)
                 for k, end in enumerate((values.low, values.high)))  # fmt: skip
    slack = torch.maximum(low.abs(), high.abs()) * (2.0 * gamma(shape[-2] + 256))
    return Range(low - slack, high + slack)
