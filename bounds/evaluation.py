"""How `Program` runs single operators: as torch does, but where a proof of the rounding wants another order.

Layer, group and instance normalisation take two passes, so that the variance comes from the differences themselves.
Long inner products of convolutions and matrices are summed in blocks: an error of γ_{n/b + b} instead of γ_n, a tenth
for the usual sizes, at the same cost. hardsigmoid divides by 6, where torch multiplies by 1/6 rounded to float32.
Attention is written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lipcert.bounds.graph import Node, call
from lipcert.bounds.values import Rounding

MOST_BLOCKS = 16
SHORTEST = 32  # terms of a block


def block_count(channels: int, length: int) -> int:
    """Return into how many blocks of channels an inner product of this length is cut.

    >>> block_count(96, 864), block_count(7, 63)
    (16, 1)
    """
    fitting = [b for b in range(1, MOST_BLOCKS + 1) if channels % b == 0 and length // b >= SHORTEST]
    return max(fitting, default=1)


def evaluate(node: Node, arguments: dict[str, Any], rounding: Rounding) -> Tensor:
    """Return the result of one operator on computed arguments."""
    own = _OWN.get(node.op)
    result = own(node, arguments, rounding.blocks) if own is not None else call(node.target, arguments)
    return result[node.output or 0] if isinstance(result, tuple | list) else result


def _convolution(node: Node, a: dict[str, Any], blocks: int) -> Tensor:
    parts = zip(a["input"].chunk(blocks, 1), a["weight"].chunk(blocks, 1), strict=True)
    total = _sum([call(node.target, {**a, "input": x, "weight": w, "bias": None}) for x, w in parts])
    return total if a["bias"] is None else total + a["bias"].reshape(-1, *(1,) * (total.ndim - 2))


def _linear(node: Node, a: dict[str, Any], blocks: int) -> Tensor:
    parts = zip(a["input"].chunk(blocks, -1), a["weight"].chunk(blocks, -1), strict=True)
    total = _sum([torch.nn.functional.linear(x, w) for x, w in parts])
    return total if a["bias"] is None else total + a["bias"]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _two_pass(x: Tensor, dims: Sequence[int], eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return weight·(x - mean)/√(var + ε) + bias, the variance from the differences themselves."""
    difference = x - x.mean(tuple(dims), keepdim=True)
    result = difference / (difference.square().mean(tuple(dims), keepdim=True) + eps).sqrt()
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def _layer_norm(node: Node, a: dict[str, Any], blocks: int) -> Tensor:
    dims = range(-len(a["normalized_shape"]), 0)
    return _two_pass(a["input"], dims, a["eps"], a["weight"], a["bias"])


def _group_norm(node: Node, a: dict[str, Any], blocks: int) -> Tensor:
    x, groups = a["input"], a["num_groups"] if "num_groups" in a else a["group"]
    rows = x.reshape(x.shape[0], groups, -1)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    weight, bias = (None if a[key] is None else a[key].reshape(shape) for key in ("weight", "bias"))
    result = _two_pass(rows, (2,), a["eps"], None, None).reshape(x.shape)
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def _instance_norm(node: Node, a: dict[str, Any], blocks: int) -> Tensor:
    return _group_norm(node, {**a, "num_groups": a["input"].shape[1]}, blocks)


def _hardsigmoid(node: Node, a: dict[str, Any], blocks: int) -> Tensor:
    return (a["self"] + 3.0).clamp(0.0, 6.0) / 6.0


def _hardswish(node: Node, a: dict[str, Any], blocks: int) -> Tensor:
    return a["self"] * _hardsigmoid(node, a, blocks)


def _attention(node: Node, a: dict[str, Any], blocks: int) -> Tensor:
    q, k, scale = a["query"], a["key"], a["scale"]
    scores = (q @ k.mT) * (1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    mask = a["attn_mask"]
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if a["is_causal"]:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, dtype=scores.dtype, device=scores.device).triu(1)
    return scores.softmax(-1) @ a["value"]


def _view(node: Node, a: dict[str, Any], blocks: int) -> Tensor:
    return a["self"].reshape(a["size"])  # what was contiguous in the model may not be here


_OWN: dict[str, Callable[[Node, dict[str, Any], int], Tensor]] = {
    **{f"aten.conv{d}d.{form}": _convolution for d in (1, 2, 3) for form in ("default", "padding")},
    "aten.linear.default": _linear,
    "aten.view.default": _view,
    "aten.hardsigmoid.default": _hardsigmoid,
    "aten.hardswish.default": _hardswish,
    "aten.layer_norm.default": _layer_norm,
    "aten.native_layer_norm.default": _layer_norm,
    "aten.group_norm.default": _group_norm,
    "aten.native_group_norm.default": _group_norm,
    "aten.instance_norm.default": _instance_norm,
    "aten.scaled_dot_product_attention.default": _attention,
}
