"""How `Program` runs single operators: as torch does, but where a proof of the rounding wants another order.

Layer, group and instance normalisation take two passes, so that the variance comes from the differences themselves.
Convolutions are matrix products of gathered windows, or of transformed tiles where `lipcert.bounds.winograd` applies:
in float64 torch's own take longer on a processor. hardsigmoid divides by 6, where torch multiplies by 1/6 rounded to
float32. Attention is written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lipcert.bounds import winograd
from lipcert.bounds.graph import Node, call, each

CACHED = 2**23  # bytes of windows that are gathered at once: more are slower


def evaluate(node: Node, arguments: dict[str, Any], kernels: dict[str, Tensor]) -> Tensor:
    """Return the result of one operator on computed arguments.

    `kernels` keeps what is computed of weights once, by the names of nodes.
    """
    if node.op == "aten.conv2d.default":
        return _convolution(node, arguments, kernels)
    own = _OWN.get(node.op)
    result = own(node, arguments) if own is not None else call(node.target, arguments)
    return result[node.output or 0] if isinstance(result, tuple | list) else result


def _convolution(node: Node, a: dict[str, Any], kernels: dict[str, Tensor]) -> Tensor:
    x, weight = a["input"], a["weight"]
    if x.device.type != "cpu" or a["groups"] != 1:
        return call(node.target, a)
    stride, dilation = each(a["stride"], 2), each(a["dilation"], 2)
    if not winograd.applies(weight, node.shape[2:], stride=stride, dilation=dilation, groups=a["groups"]):
        return _gathered(a)
    if node.name not in kernels:
        kernels[node.name] = winograd.transformed(weight)
    result = winograd.convolve(x, kernels[node.name], each(a["padding"], 2), node.shape[2:])
    return _channels_second(result, a["bias"])


def _gathered(a: dict[str, Any]) -> Tensor:
    """Gather the windows of some images, multiply, go on: one inner product for each output entry, in any order."""
    x, weight = a["input"], a["weight"]
    (up, left), (down, right), (below, beside) = (each(a[key], 2) for key in ("padding", "stride", "dilation"))
    channels, (rows, columns) = x.shape[1], weight.shape[2:]
    height, width = (
        (size - gap * (k - 1) - 1) // step + 1
        for size, k, step, gap in zip(
            (x.shape[2] + 2 * up, x.shape[3] + 2 * left), (rows, columns), (down, right), (below, beside), strict=True
        )
    )
    if height == width == below == beside == 1 and not up and not left:  # one window, which need not be gathered
        pixels = x[..., :rows, :columns].flatten(1)
        return torch.nn.functional.linear(pixels, weight.flatten(1), a["bias"])[..., None, None]
    padded = torch.nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, up, up)).contiguous()
    matrix = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])
    result = x.new_empty(len(x), height, width, weight.shape[0])
    image, row, column, _ = padded.stride()
    strides = (image, down * row, right * column, below * row, beside * column, 1)
    count = max(1, CACHED // (8 * height * width * len(matrix)))
    for images, out in zip(padded.split(count), result.split(count), strict=True):
        windows = images.as_strided((len(images), height, width, rows, columns, channels), strides)
        torch.mm(windows.reshape(-1, len(matrix)), matrix, out=out.view(-1, weight.shape[0]))
    return _channels_second(result, a["bias"])


def _channels_second(result: Tensor, bias: Tensor | None) -> Tensor:
    """Return (n, h, w, c), to which the bias is added, as (n, c, h, w)."""
    return (result if bias is None else result.add_(bias)).permute(0, 3, 1, 2)


def _two_pass(x: Tensor, dims: Sequence[int], eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return weight·(x - mean)/√(var + ε) + bias, the variance from the differences themselves."""
    difference = x - x.mean(tuple(dims), keepdim=True)
    result = difference / (difference.square().mean(tuple(dims), keepdim=True) + eps).sqrt()
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def _layer_norm(node: Node, a: dict[str, Any]) -> Tensor:
    dims = range(-len(a["normalized_shape"]), 0)
    return _two_pass(a["input"], dims, a["eps"], a["weight"], a["bias"])


def _group_norm(node: Node, a: dict[str, Any]) -> Tensor:
    x, groups = a["input"], a["num_groups"] if "num_groups" in a else a["group"]
    rows = x.reshape(x.shape[0], groups, -1)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    weight, bias = (None if a[key] is None else a[key].reshape(shape) for key in ("weight", "bias"))
    result = _two_pass(rows, (2,), a["eps"], None, None).reshape(x.shape)
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def _instance_norm(node: Node, a: dict[str, Any]) -> Tensor:
    return _group_norm(node, {**a, "num_groups": a["input"].shape[1]})


def _hardsigmoid(node: Node, a: dict[str, Any]) -> Tensor:
    return (a["self"] + 3.0).clamp(0.0, 6.0) / 6.0


def _hardswish(node: Node, a: dict[str, Any]) -> Tensor:
    return a["self"] * _hardsigmoid(node, a)


def _attention(node: Node, a: dict[str, Any]) -> Tensor:
    q, k, scale = a["query"], a["key"], a["scale"]
    scores = (q @ k.mT) * (1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    mask = a["attn_mask"]
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if a["is_causal"]:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, dtype=scores.dtype, device=scores.device).triu(1)
    return scores.softmax(-1) @ a["value"]


def _view(node: Node, a: dict[str, Any]) -> Tensor:
    return a["self"].reshape(a["size"])  # what was contiguous in the model may not be here


_OWN: dict[str, Callable[[Node, dict[str, Any]], Tensor]] = {
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
