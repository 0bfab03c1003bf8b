"""What one position of a result reads of the positions of its arguments; see `lipcert.bounds.positions`.

A position is an index of every dimension but that of the channels. With x_p the channels of x at p:

- a map that acts at each position alone, with constant f: L_pix ≤ f·L_pix(x);
- y_p = Σ_q w_pq x_q (averages, interpolation): L_pix ≤ max_p Σ_q |w_pq| · L_pix(x), which is 1·L_pix(x) for convex
  combinations, whatever the number of copies;
- a convolution y_p = Σ_t K_t x_{p+t}: L_pix ≤ Σ_t ‖K_t‖·L_pix(x), and ‖[K_t]_t‖·L(x), because the x_{p+t} are disjoint
  parts of x;
- a concatenation: √ΣL_pix² along the channels, the largest along a position.

Proofs: the triangle inequality, and Cauchy-Schwarz for the window.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lipcert.bounds.core import Bound
from lipcert.bounds.graph import Node, Ref, each
from lipcert.bounds.matrix import spectral_norm_upper
from lipcert.bounds.positions import Factor, Reading, Source, positioned
from lipcert.bounds.propagation import Context
from lipcert.bounds.rounding import enlarge, sqrt_up
from lipcert.bounds.rules.resample import axis_matrix
from lipcert.bounds.rules.shape import permutation
from lipcert.bounds.values import ONE, total

Nodes = Mapping[str, Node]

_ENTRYWISE = """relu relu6 abs tanh sin cos atan log_sigmoid sigmoid hardsigmoid hardswish silu mish erf selu gelu
leaky_relu prelu elu celu softplus hardtanh clamp clamp_min clamp_max neg alias contiguous clone detach
lift_fresh_copy dropout feature_dropout alpha_dropout batch_norm exp log sqrt rsqrt""".split()


@positioned(*(f"aten.{name}.default" for name in _ENTRYWISE), "aten.clamp.Tensor", "aten.pow.Tensor_Scalar")
def entrywise(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Read the same position: each entry of the result depends on that of the argument, by the constant of the step."""
    return _same(node, channel, nodes)


@positioned("aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar")
def scaling(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Read the same position, if one factor is constant."""
    return _same(node, channel, nodes)


@positioned("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar", "aten.rsub.Tensor",
            "aten.rsub.Scalar")  # fmt: skip
def addition(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Read the same position of every term; one that is broadcast along the channels counts √(their number) times."""
    alpha = float(node["alpha"])
    kind = node.op.split(".")[1]
    weights = {"add": (1.0, alpha), "sub": (1.0, alpha), "rsub": (alpha, 1.0)}[kind]
    sources = []
    for argument, weight in zip(("self", "other"), weights, strict=True):
        if isinstance(node[argument], Ref):
            source = _broadcast(node, channel, node[argument].name, nodes, abs(weight))
            if source is None:
                return None
            sources.append(source)
    return Reading(tuple(sources))


@positioned("aten.layer_norm.default", "aten.native_layer_norm.default", "aten.rms_norm.default",
            "lipcert.normalize", "lipcert.center", "aten.softmax.int", "aten._softmax.default",
            "aten.log_softmax.int")  # fmt: skip
def along_channels(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Read the same position, if the operator acts along the channels alone."""
    if "normalized_shape" in node.arguments:
        dims: Sequence[int] = range(len(node.shape) - len(node["normalized_shape"]), len(node.shape))
    else:
        dims = node["dims"] if "dims" in node.arguments else (node["dim"],)
    return _same(node, channel, nodes) if [d % len(node.shape) for d in dims] == [channel] else None


@positioned("lipcert.maxmin")
def maxmin(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Read the same position of both arguments; of one value, where they are its two halves along the channels."""
    if node["stacked"] or node["dim"] % len(node.shape) != channel:
        return None
    halves = [nodes[node[key].name] for key in ("a", "b")]
    parents = {half["self"].name for half in halves if half.op == "aten.slice.Tensor" and isinstance(half["self"], Ref)}
    if len(parents) == 1 and all(half.op == "aten.slice.Tensor" for half in halves):
        parent = nodes[parents.pop()]
        kept = [_slice(half, parent.shape, channel) for half in halves]
        if not kept[0] & kept[1]:
            return Reading((Source(parent.name, channel, _one),))
    return Reading(tuple(Source(half.name, channel, _one) for half in halves), "root")


def _slice(half: Node, shape: Sequence[int], channel: int) -> set[int]:
    """Return the channels that a slice keeps: all of them if it cuts another dimension."""
    indices = range(shape[channel])
    cut = half["dim"] % len(shape) == channel
    return {*(indices[slice(half["start"], half["end"], half["step"])] if cut else indices)}


@positioned("aten.cat.default", "aten.concat.default")
def cat(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Read one of the parts if they lie side by side, all of them if they are joined along the channels."""
    names = [item.name for item in node["tensors"] if isinstance(item, Ref)]
    if any(len(nodes[name].shape) != len(node.shape) for name in names):
        return None
    sources = tuple(Source(name, channel, _one) for name in names)
    return Reading(sources, "root" if node["dim"] % len(node.shape) == channel else "largest")


# ------------------------------------------------------------------------------------------------- linear maps


@positioned("aten.linear.default")
def linear(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Read the same position, by ‖W‖."""
    weight = node["weight"]
    if channel != len(node.shape) - 1 or not isinstance(weight, Tensor) or not isinstance(node["input"], Ref):
        return None
    return Reading((Source(node["input"].name, channel, _norm([weight])),))


@positioned("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default", "aten.conv1d.padding",
            "aten.conv2d.padding", "aten.conv3d.padding")  # fmt: skip
def convolution(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Read a window: by Σ_t ‖K_t‖, and by ‖[K_t]_t‖ of the whole argument; groups act on disjoint channels."""
    weight, x = node["weight"], node["input"]
    if channel != 1 or not isinstance(weight, Tensor) or not isinstance(x, Ref) or len(node.shape) != weight.ndim:
        return None
    groups = weight.flatten(2).unflatten(0, (node["groups"], -1))  # (g, out/g, in/g, taps)
    taps = [groups[..., t] for t in range(groups.shape[-1])]
    whole = None if len(taps) == 1 else (x.name, _norm([groups.flatten(2)]))
    return Reading((Source(x.name, 1, _norm(taps)),), whole=whole)


@positioned("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
def transposed_convolution(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Read the taps of one phase: the largest Σ ‖K_t‖ over those t that are equal modulo the stride.

    Taps that dilation moves are counted as if all of them met.
    """
    weight, x = node["weight"], node["input"]
    if channel != 1 or not isinstance(weight, Tensor) or not isinstance(x, Ref) or len(node.shape) != weight.ndim:
        return None
    stride = each(node["stride"], weight.ndim - 2)
    dilated = any(d != 1 for d in each(node["dilation"], weight.ndim - 2))
    phases: dict[tuple[int, ...], list[Tensor]] = {}
    for t in itertools.product(*(range(size) for size in weight.shape[2:])):
        phase = tuple(0 if dilated else i % s for i, s in zip(t, stride, strict=True))
        place: tuple[Any, ...] = (..., *t)
        tap = weight[place].unflatten(0, (node["groups"], -1))  # (g, in/g, out/g)
        phases.setdefault(phase, []).append(tap)
    sums = [_norm(taps) for taps in phases.values()]

    def largest(context: Context) -> Bound:
        return max((one(context) for one in sums), key=lambda bound: bound.order)

    return Reading((Source(x.name, 1, largest),), enlarges=math.prod(stride) > 1)


@positioned(*(f"aten.{name}.{form}" for form in ("vec", "default")
              for name in ("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
                           "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
                           "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d",
                           "upsample_bicubic2d")))  # fmt: skip
def resampling(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Read an average of positions: 1, or the largest Σ|w| of the rows where weights are negative (cubic)."""
    x = nodes[node.inputs[0]]
    if channel != 1:
        return None
    factor: Factor = _one
    if "cubic" in node.op:
        sums = [axis_matrix(node, x.shape, axis).abs().sum(1).max() for axis in range(2, len(x.shape))]
        weight = enlarge(float(torch.stack(sums).prod()), 16)
        factor = _constant(Bound(weight, "upper", "row sums"))
    larger = math.prod(node.shape) > math.prod(x.shape)
    return Reading((Source(x.name, 1, factor),), enlarges=larger)


@positioned("aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default",
            "aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default", "aten.adaptive_avg_pool3d.default",
            "aten._adaptive_avg_pool2d.default")  # fmt: skip
def average(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Read an average of positions."""
    if channel != 1 or node.arguments.get("divisor_override") is not None:
        return None
    return Reading((Source(node.inputs[0], 1, _one),))


@positioned("aten.mean.dim")
def mean(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Read an average of positions, if it is not over the channels."""
    x = nodes[node.inputs[0]]
    given = node["dim"]
    if given is None or given == ():
        return None
    dims = {d % len(x.shape) for d in ((given,) if isinstance(given, int) else given)}
    left = [d for d in range(len(x.shape)) if node["keepdim"] or d not in dims]
    before = left[channel]
    return None if before in dims else Reading((Source(x.name, before, _one),))


# ------------------------------------------------------------------------------------------------ moving entries


@positioned("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.flatten.using_ints",
            "aten.unflatten.int", "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims",
            "aten.unsqueeze.default", "aten.view_as.default", "aten.reshape_as.default")  # fmt: skip
def view(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Read the same entries, if the view leaves the channels one dimension: its size and what lies before it stay."""
    x = nodes[node.inputs[0]]
    size, before = node.shape[channel], math.prod(node.shape[:channel])
    for dim in range(len(x.shape)):
        if x.shape[dim] == size and math.prod(x.shape[:dim]) == before:
            return Reading((Source(x.name, dim, _one),))
    return None


@positioned("aten.permute.default", "aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default",
            "aten.movedim.int", "aten.movedim.intlist", "aten.t.default", "aten.numpy_T.default",
            "aten.mT.default")  # fmt: skip
def permute(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Read the same entries."""
    return Reading((Source(node.inputs[0], permutation(node, len(node.shape))[channel], _one),))


@positioned("aten.slice.Tensor", "aten.narrow.default", "aten.roll.default", "aten.flip.default",
            "aten.pad.default", "aten.constant_pad_nd.default", "aten.pixel_shuffle.default")  # fmt: skip
def moved(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Read entries of one position, each at most once, or constants; padding may copy positions, not channels."""
    if node.op.startswith("aten.pixel_shuffle") and channel != len(node.shape) - 3:
        return None
    if node.op.startswith(("aten.roll", "aten.flip")):
        dims = {d % len(node.shape) for d in node["dims"]}
        if not dims or (channel in dims and len(dims) > 1):
            return None
    if node.op == "aten.pad.default" and node["mode"] != "constant":
        if channel >= len(node.shape) - len(node["pad"]) // 2:
            return None
    return Reading((Source(node.inputs[0], channel, _one),))


@positioned("aten.select.int")
def select(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Read one index of a dimension that is not the channels'."""
    x = nodes[node.inputs[0]]
    dim = node["dim"] % len(x.shape)
    return Reading((Source(x.name, channel + (dim <= channel), _one),))


@positioned("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def expand(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Read the position that was copied: √(copies along the channels)."""
    source = _broadcast(node, channel, node.inputs[0], nodes, 1.0)
    x = nodes[node.inputs[0]]
    return None if source is None else Reading((source,), enlarges=math.prod(node.shape) > math.prod(x.shape))


# ------------------------------------------------------------------------------------------------------- factors


def _same(node: Node, channel: int, nodes: Nodes) -> Reading | None:
    """Return the reading of an operator of one argument that acts position by position, by the constant of its step."""
    if len({*node.inputs}) != 1 or nodes[node.inputs[0]].shape != node.shape:
        return None

    def constant(context: Context) -> Bound:
        step = context.steps[context.nodes.index(node)]
        return total([Bound(factor, "upper", "slope") for factor in step.factors])

    return Reading((Source(node.inputs[0], channel, constant),))


def _broadcast(node: Node, channel: int, name: str, nodes: Nodes, weight: float) -> Source | None:
    """Return what a position reads of a value that is broadcast; None if the value has no such dimension."""
    shape = nodes[name].shape
    dim = channel - (len(node.shape) - len(shape))
    if dim < 0:
        return None
    copies = node.shape[channel] // max(1, shape[dim])
    return Source(name, dim, _constant(Bound(sqrt_up(float(copies)), "upper", "copies") * Bound(weight, "upper", "")))


def _norm(matrices: Sequence[Tensor]) -> Factor:
    """Return Σ ‖M‖ over (stacks of) matrices."""
    return lambda context: total([spectral_norm_upper(matrix, context.method) for matrix in matrices])


def _constant(bound: Bound) -> Factor:
    return lambda context: bound


def _one(context: Context) -> Bound:
    return ONE
