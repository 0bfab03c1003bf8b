"""Audit: everything that can be proved about the Lipschitz constant of a model, and how.

`audit` exports a model, lifts patterns, walks the graph once and collects the result. A certificate rests on nothing
else: neither on how the model was trained nor on what its layers claim.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lipcert.bounds.core import Bound, BoundError
from lipcert.bounds.graph import Graph, Ref
from lipcert.bounds.matrix import scaled
from lipcert.bounds.patterns import lift
from lipcert.bounds.positions import Positions
from lipcert.bounds.program import Errors, Program
from lipcert.bounds.propagation import Context, Domain, propagate
from lipcert.bounds.replay import replay
from lipcert.bounds.report import LayerBound, describe, rows, table
from lipcert.bounds.rounding import enlarge, gamma, mul_up
from lipcert.bounds.tracing import trace
from lipcert.bounds.values import Value


@dataclass(frozen=True)
class Head:
    """The last linear layer z = W h + b: what certificates per pair of classes are made of.

    `penultimate` bounds h, `weight` is W (K, d); None where the last operator is another one, and h then the anchor of
    the last affine segment. `rows` (K, m), where not None, are those of that whole segment from an anchor bounded by
    `anchor`, exact up to `error` in the operator norm. `source` and `start` name h and that anchor in the graph.
    """

    penultimate: Bound
    weight: Tensor | None = field(repr=False)
    logits: Bound
    anchor: Bound | None = None
    rows: Tensor | None = field(default=None, repr=False)
    error: float = 0.0
    source: str = ""
    start: str = ""

    def distances(self) -> Tensor:
        """Return upper bounds of ‖w_i - w_j‖, (K, K), for the rows of the map from `source` to the logits."""
        if self.weight is not None:
            return _differences(self.weight)
        if self.rows is None:
            raise BoundError("a head has a last linear layer, or the rows of the last affine segment")
        return enlarge(_differences(self.rows) + mul_up(2.0, self.error), 2)

    def pairwise(self) -> Tensor:
        """Return upper bounds of the Lipschitz constants of z_i - z_j, (K, K) in float64, zero on the diagonal.

        The smallest of L_h·‖w_i - w_j‖, of the same with the rows of the last segment, and of √2·L.
        """
        best = enlarge(self.distances() * self.penultimate.require_upper(), 1)
        whole = mul_up(math.sqrt(2.0) * (1.0 + 2.0**-52), self.logits.require_upper())
        best = torch.minimum(best, torch.full_like(best, whole))
        if self.rows is not None and self.anchor is not None:
            fused = (_differences(self.rows) + mul_up(2.0, self.error)) * self.anchor.require_upper()
            best = torch.minimum(best, enlarge(fused, 2))
        return enlarge(best, 2).fill_diagonal_(0.0)


@dataclass(frozen=True)
class PixelHead:
    """The last linear layer of a map, z_i = W φ_i + b at every position i: a convolution with kernel 1 (1 x 1).

    `joint` bounds the features φ of all positions together, `pixel` those of any one position; `weight` is W (K, d).
    `source` names φ in the graph.
    """

    joint: Bound
    pixel: Bound
    weight: Tensor = field(repr=False)
    source: str = ""

    def distances(self) -> Tensor:
        """Return upper bounds of ‖w_i - w_j‖, (K, K) in float64, zero on the diagonal."""
        return _differences(self.weight).fill_diagonal_(0.0)


@dataclass(frozen=True)
class Audit:
    """The proved bound of a model from images (l2) to outputs (l2), and where it comes from. `print` shows a table."""

    upper: Bound
    layers: tuple[LayerBound, ...]
    unbounded: tuple[tuple[str, str, str], ...]  # (name, op, reason)
    weights_sha256: str
    input_shape: tuple[int, ...]
    domain: tuple[float, float]  # the least and the largest value of an input
    head: Head | None
    program: Program = field(repr=False)
    seconds: float
    outputs: int
    position: Bound | None = None  # of dimension 1 at any one position, where the output is a map
    pixel_head: PixelHead | None = None  # where a convolution with kernel 1 makes that map
    box: tuple[Tensor, Tensor] | None = field(default=None, repr=False)  # where it holds, if not in all of `domain`

    def pairwise(self) -> Tensor:
        """Return upper bounds of the Lipschitz constants of z_i - z_j (K, K); √2·L off the diagonal without a head."""
        if self.head is not None:
            return self.head.pairwise()
        value = mul_up(math.sqrt(2.0) * (1.0 + 2.0**-52), self.upper.require_upper())
        return torch.full((self.outputs, self.outputs), value, dtype=torch.float64).fill_diagonal_(0.0)

    def evaluate(self, x: Tensor, precision: str = "float64", radius: float = 0.0) -> tuple[Tensor, Errors]:
        """Return the outputs at x, (n, *input_shape), and bounds of their rounding errors; see `Program.evaluate`."""
        return self.program.evaluate_from(None if self.head is None else self.head.source, x, precision, radius)

    def to_json(self) -> dict:
        """Return the audit as JSON-able data; infinities are the string "inf"."""
        return {
            "weights_sha256": self.weights_sha256,
            "input": {"shape": list(self.input_shape), "domain": [_finite(end) for end in self.domain]},
            "norm": "l2",
            "upper": self.upper.written,
            "position": None if self.position is None else self.position.written,
            "lower": None,
            "lower_witness": None,
            "seconds": round(self.seconds, 3),
            "layers": [
                {
                    "name": row.name, "op": row.op, "shape": list(row.shape), "upper": row.upper.written,
                    "lower": None, "method": row.method, "cumulative": row.cumulative.written, "note": row.note,
                }
                for row in self.layers
            ],
            "unbounded": [{"name": name, "op": op, "reason": reason} for name, op, reason in self.unbounded],
        }  # fmt: skip

    def __str__(self) -> str:
        return table(self.layers, self.upper, self.unbounded, self.position)


def audit(
    model: nn.Module | torch.export.ExportedProgram, input_shape: Sequence[int],
    domain: Domain = (0.0, 1.0), tightness: str = "fast", method: str = "auto",
) -> Audit:  # fmt: skip
    """Bound the l2 Lipschitz constant of a model for inputs (n, *input_shape), with every rounding error counted.

    A module is copied, put into evaluation mode and into float64; an exported program is taken as it is. `domain` is
    the interval that inputs lie in, or a box of two tensors of the shape of an input; `tightness` "fast" or "tight"
    (more work for chains of layers and small maps), `method` how norms are bounded (`spectral_norm_upper`).
    Raises BoundError for operators without a rule (all of them at once), weights that are not finite, BatchNorm on
    batch statistics, operators that mix images, and a module that computes something else than what it shows the
    exporter. Where no finite bound is known, `upper` is infinite and `unbounded` says why.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.Sigmoid())
    >>> _ = nn.init.constant_(model[1].weight, 2.0)
    >>> print(audit(model, (1, 2, 2)))
    layer  operators       shape  upper  cumulative  method
    1      affine: linear  1      4      4           matrix, eigenvalue
    2      sigmoid         1      0.25   1           slope
    Lipschitz constant (l2, image to outputs): at most 1
    """
    start = time.perf_counter()
    shape = tuple(int(size) for size in input_shape)
    if not shape or min(shape) < 1:
        raise BoundError(f"input_shape is the shape of one input, such as (3, 32, 32), got {tuple(input_shape)}")
    interval, box = _domain(domain, shape)
    with torch.no_grad():
        graph = lift(trace(model, shape))
        last = _last_linear(graph)
        positions = Positions(graph)
        pointwise = _last_pointwise(graph)
        keep = {graph.output, *(found[0] for found in (last, pointwise) if found)} | positions.needed
        context, kept = propagate(graph, method, keep, box or interval, tightness)
        output = kept[graph.output]
        segment = _last_segment(context, output) if len(output.shape) == 2 else None
        upper = context.bound(output)
        position = positions.bound(context, kept)
        pixel_head = None
        if pointwise is not None and positions.separate:
            name, weight = pointwise
            joint = context.bound(kept[name])
            pixel = min(joint, positions.bound_at(name, context, kept), key=lambda bound: bound.order)
            pixel_head = PixelHead(joint, pixel, weight, name)
        head = None
        if last is not None:
            penultimate = context.bound(kept[last[0]])
            head = Head(penultimate, last[1], upper, source=last[0])
        if segment is not None:
            anchor, name, matrix, error = segment
            head = head or Head(anchor, None, upper, source=name)
            head = replace(head, anchor=anchor, start=name, rows=matrix, error=error)
    needed = [output.index] + ([kept[last[0]].index] if last else [])
    layers = rows(context, needed)
    unbounded = tuple(
        (describe(graph.nodes[index]), derivation.label, f"{derivation.reason} ({graph.nodes[index].place})")
        for index, derivation in sorted(context.derivations.items())
        if derivation.reason
    )
    program = Program(graph, context.steps, context.derivations, context.merged)
    if isinstance(model, nn.Module):
        replay(model, program, shape, box or interval)
    outputs = math.prod(output.shape)
    seconds = time.perf_counter() - start
    sha256 = graph.weights_sha256()
    return Audit(
        upper, layers, unbounded, sha256, shape, interval, head, program, seconds, outputs, position, pixel_head, box
    )  # fmt: skip


def _domain(domain: Domain, shape: tuple[int, ...]) -> tuple[tuple[float, float], tuple[Tensor, Tensor] | None]:
    """Return the interval that a domain lies in, and its box if it is one."""
    ends = [torch.as_tensor(end, dtype=torch.float64) for end in domain]
    if len(ends) != 2 or not all(end.ndim == 0 or tuple(end.shape) == shape for end in ends):
        raise BoundError("domain is an interval (low, high), or a box of two tensors of the shape of one input")
    if not bool((ends[0] <= ends[1]).all()):  # also for NaN
        given = f", got {tuple(domain)}" if ends[0].ndim == ends[1].ndim == 0 else ""
        raise BoundError(f"domain is an interval (low, high) with low ≤ high{given}")
    interval = float(ends[0].min()), float(ends[1].max())
    return interval, None if all(end.ndim == 0 for end in ends) else (ends[0].expand(shape), ends[1].expand(shape))


def _last_linear(graph: Graph) -> tuple[str, Tensor] | None:
    """Return the name of h and the matrix W where the output is W h + b (and nothing after it), else None."""
    node = next(node for node in graph.nodes if node.name == graph.output)
    if len(node.shape) != 2:
        return None
    if node.op == "aten.linear.default" and not isinstance(node["weight"], Ref) and isinstance(node["input"], Ref):
        return node["input"].name, node["weight"]
    if node.op in ("aten.mm.default", "aten.matmul.default"):
        second = node["mat2"] if node.op == "aten.mm.default" else node["other"]
        if isinstance(node["self"], Ref) and isinstance(second, Tensor) and second.ndim == 2:
            return node["self"].name, second.T
    if node.op == "aten.addmm.default" and isinstance(node["mat1"], Ref) and isinstance(node["mat2"], Tensor):
        return node["mat1"].name, node["mat2"].T
    return None


def _last_pointwise(graph: Graph) -> tuple[str, Tensor] | None:
    """Return the name of φ and the matrix W where the output is W φ_i + b at every position i, else None."""
    node = next(node for node in graph.nodes if node.name == graph.output)
    if not re.fullmatch(r"aten\.conv[123]d\.default", node.op):
        return None
    weight, x = node["weight"], node["input"]
    if not isinstance(weight, Tensor) or not isinstance(x, Ref) or len(node.shape) != weight.ndim:
        return None
    ones = {*weight.shape[2:], node["groups"], *_sizes(node["stride"])} == {1}
    return (x.name, weight.flatten(1)) if ones and set(_sizes(node["padding"])) == {0} else None


def _sizes(argument: int | Sequence[int]) -> Sequence[int]:
    return (argument,) if isinstance(argument, int) else argument


def _last_segment(context: Context, output: Value) -> tuple[Bound, str, Tensor, float] | None:
    """Return bound and name of the earliest anchor of the output, the rows of the map from it, and their error."""
    if not output.representations:
        return None
    (anchor, _), found = min(output.representations.items(), key=lambda item: item[0][0].index)
    m = found.map.regrouped(1)
    if m.out != (1, 1) or any(m.wrap) or math.prod(output.shape) != m.c_out:
        return None
    return context.bound(anchor), anchor.node.name, m.taps[:, 0].movedim(1, 0).flatten(1), m.error


def _differences(matrix: Tensor) -> Tensor:
    """Return upper bounds of ‖w_i - w_j‖ for the rows of a matrix, (K, K).

    From the Gram matrix, whose entries err by γ_m‖w_i‖‖w_j‖: ‖w_i - w_j‖² ≤ G_ii + G_jj - 2G_ij + γ_{m+4}(‖w_i‖ +
    ‖w_j‖)².
    """
    matrix, exponent = scaled(matrix)
    gram = matrix @ matrix.T
    squares = gram.diagonal()
    norms = enlarge(torch.linalg.vector_norm(matrix, dim=1), matrix.shape[1] + 4)
    slack = enlarge((norms[:, None] + norms[None]).square() * gamma(matrix.shape[1] + 8), 4) + 2.0**-900
    total = (squares[:, None] + squares[None] - 2.0 * gram).clamp_min(0.0) + slack
    half = exponent // 2  # in two steps, because 2^e alone can overflow
    return enlarge(total.sqrt(), 4) * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half) + 2.0**-1070


def _finite(value: float) -> float | str:
    return ("inf" if value > 0.0 else "-inf") if math.isinf(value) else value
