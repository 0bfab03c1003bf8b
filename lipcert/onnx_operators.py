"""What the ONNX operators mean: one function of (inputs, attributes) for each, as the ONNX schema defines it.

Data and weights are tensors; whole numbers (sizes, axes, indices) are NumPy arrays of Python numbers, which may be
symbolic. A variant that is not understood raises InputError. The attributes also hold `kind` (the operator's name),
`outputs` (how many there are) and `one` (whether the file takes exactly one input).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lipcert.errors import InputError

Attributes = dict[str, Any]
Operation = Callable[[Sequence[Any], Attributes], Any]  # (inputs, attributes) -> output, or a tuple of outputs
OPERATORS: dict[str, Operation] = {}


def operator(*names: str) -> Callable[[Operation], Operation]:
    """Register a function as the meaning of ONNX operators."""

    def register(function: Operation) -> Operation:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return register


def _entrywise(function: Callable[[Tensor], Tensor]) -> Operation:
    return lambda inputs, attributes: function(inputs[0])


OPERATORS.update(
    Relu=_entrywise(F.relu), Sigmoid=_entrywise(torch.sigmoid), Tanh=_entrywise(torch.tanh), Abs=_entrywise(torch.abs),
    Neg=_entrywise(torch.neg), Exp=_entrywise(torch.exp), Log=_entrywise(torch.log), Sqrt=_entrywise(torch.sqrt),
    Erf=_entrywise(torch.erf), Softplus=_entrywise(F.softplus), Mish=_entrywise(F.mish), Sin=_entrywise(torch.sin),
    Cos=_entrywise(torch.cos), Sign=_entrywise(torch.sign), Floor=_entrywise(torch.floor), Ceil=_entrywise(torch.ceil),
    Round=_entrywise(torch.round), Reciprocal=_entrywise(torch.reciprocal), HardSwish=_entrywise(F.hardswish),
    LeakyRelu=lambda x, a: F.leaky_relu(x[0], a.get("alpha", 0.01)),
    Elu=lambda x, a: F.elu(x[0], a.get("alpha", 1.0)),
    PRelu=lambda x, a: torch.where(x[0] >= 0, x[0], x[0] * x[1]) if x[1].numel() > 1 else F.prelu(x[0], x[1].flatten()),
    Gelu=lambda x, a: F.gelu(x[0], approximate=a.get("approximate", "none")),
    Softmax=lambda x, a: torch.softmax(x[0], a.get("axis", -1)),
    Transpose=lambda x, a: x[0].permute(a["perm"]) if "perm" in a else x[0].permute(*range(x[0].ndim)[::-1]),
    Identity=lambda x, a: x[0],
    Sum=lambda x, a: sum(x[1:], x[0]),
    GlobalAveragePool=lambda x, a: x[0].mean(tuple(range(2, x[0].ndim)), keepdim=True),
    GlobalMaxPool=lambda x, a: x[0].amax(tuple(range(2, x[0].ndim)), keepdim=True),
    Pow=lambda x, a: x[0] ** _scalar(x[1]),
)  # fmt: skip


def _joined(tensors: Callable[[Any, Any], Any], numbers: Callable[[Any, Any], Any]) -> Operation:
    """Return arithmetic of two arguments: tensors, or whole numbers on both sides, which are sizes."""

    def apply(inputs: Sequence[Any], attributes: Attributes) -> Any:
        a, b = inputs
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            return np.asarray(numbers(a, b), dtype=object)
        like = a if isinstance(a, Tensor) else b
        return tensors(_tensor(a, like), _tensor(b, like))

    return apply


OPERATORS.update(
    Add=_joined(torch.add, lambda a, b: a + b),
    Sub=_joined(torch.sub, lambda a, b: a - b),
    Mul=_joined(torch.mul, lambda a, b: a * b),
    Div=_joined(torch.div, lambda a, b: a // b),  # sizes are not negative
    MatMul=_joined(torch.matmul, lambda a, b: a @ b),
)


@operator("Max", "Min")
def extremum(inputs: Sequence[Any], attributes: Attributes) -> Any:
    function = torch.maximum if attributes["kind"] == "Max" else torch.minimum
    like = next(x for x in inputs if isinstance(x, Tensor))
    result = _tensor(inputs[0], like)
    for other in inputs[1:]:
        result = function(result, _tensor(other, like))
    return result


@operator("Gemm")
def gemm(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    """alpha·A·B + beta·C, with A the data and B, C constant matrices as a rule."""
    a, b, c = (*inputs, None)[:3]
    if attributes.get("transA", 0):
        a = a.T
    weight = b if attributes.get("transB", 0) else b.T
    if (alpha := attributes.get("alpha", 1.0)) != 1.0:
        weight = weight * alpha
    if c is None:
        return F.linear(a, weight)
    c = c if (beta := attributes.get("beta", 1.0)) == 1.0 else c * beta
    c = c.flatten() if c.numel() == weight.shape[0] else c
    return F.linear(a, weight, c) if c.ndim == 1 and c.numel() == weight.shape[0] else F.linear(a, weight) + c


@operator("Conv", "ConvTranspose")
def convolution(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x, weight, bias = (*inputs, None)[:3]
    rank, transposed = x.ndim - 2, attributes["kind"] == "ConvTranspose"
    stride, dilation = (_per_axis(attributes, key, rank) for key in ("strides", "dilations"))
    groups = attributes.get("group", 1)
    if transposed:
        begin, end = _pads(attributes, x, weight.shape[2:], stride, dilation)
        if begin != end or "output_shape" in attributes:
            raise InputError("ConvTranspose with an output_shape or with unequal padding is not understood")
        more = attributes.get("output_padding", [0] * rank)
        function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        return function(x, weight, bias, stride, begin, more, groups, dilation)
    x, padding = _padded(x, attributes, weight.shape[2:], stride, dilation, 0.0)
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return function(x, weight, bias, stride, padding, dilation, groups)


@operator("MaxPool")
def max_pool(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x, kernel = inputs[0], attributes["kernel_shape"]
    if attributes["outputs"] > 1:
        raise InputError("MaxPool with its second output, the indices, is not understood")
    stride, dilation = (_per_axis(attributes, key, len(kernel)) for key in ("strides", "dilations"))
    x, padding = _padded(x, attributes, kernel, stride, dilation, -math.inf)
    function: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    return function(x, kernel, stride, padding, dilation, bool(attributes.get("ceil_mode", 0)))


@operator("AveragePool")
def average_pool(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x, kernel = inputs[0], attributes["kernel_shape"]
    stride, dilation = (_per_axis(attributes, key, len(kernel)) for key in ("strides", "dilations"))
    if any(d != 1 for d in dilation):
        raise InputError("AveragePool with dilations is not understood")
    begin, end = _pads(attributes, x, kernel, stride, dilation)
    counted = bool(attributes.get("count_include_pad", 0))
    if begin != end:
        if not counted:
            raise InputError("AveragePool with unequal padding that it does not count is not understood")
        x, begin = F.pad(x, _torch_pads(begin, end)), [0] * len(kernel)
    function: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    return function(x, kernel, stride, begin, bool(attributes.get("ceil_mode", 0)), counted)


@operator("BatchNormalization")
def batch_norm(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    if attributes.get("training_mode", 0):
        raise InputError("BatchNormalization in training mode depends on the batch; export after eval()")
    x, weight, bias, mean, variance = inputs
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, attributes.get("epsilon", 1e-5))


@operator("LayerNormalization")
def layer_norm(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x, weight, bias = (*inputs, None)[:3]
    shape = x.shape[attributes.get("axis", -1) % x.ndim :]
    weight, bias = (None if part is None else part.expand(shape) for part in (weight, bias))
    return F.layer_norm(x, shape, weight, bias, attributes.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def instance_norm(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x, weight, bias = inputs
    return F.instance_norm(x, None, None, weight, bias, True, 0.0, attributes.get("epsilon", 1e-5))


@operator("HardSigmoid")
def hard_sigmoid(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    return torch.clamp(inputs[0] * attributes.get("alpha", 0.2) + attributes.get("beta", 0.5), 0.0, 1.0)


@operator("Clip")
def clip(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x, low, high = (*inputs, None, None)[:3]
    low = attributes.get("min") if low is None else _scalar(low)
    high = attributes.get("max") if high is None else _scalar(high)
    return x if low is None and high is None else torch.clamp(x, low, high)


@operator("Dropout")
def dropout(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    if len(inputs) > 2 and inputs[2] is not None and bool(_scalar(inputs[2])):
        raise InputError("Dropout in training mode is random; export after eval()")
    return inputs[0]


@operator("Cast")
def cast(inputs: Sequence[Any], attributes: Attributes) -> Any:
    """Keep floats as they are (the network is evaluated in one precision), and whole numbers whole."""
    from onnx import TensorProto

    floats = attributes["to"] in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    if isinstance(inputs[0], Tensor) != floats:
        raise InputError("Cast between floats and integers is not understood")
    return inputs[0]


@operator("Flatten")
def flatten(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    if (axis := attributes.get("axis", 1)) != 1:
        raise InputError(f"Flatten with axis {axis} mixes the inputs of a batch or leaves more than one axis")
    return inputs[0].flatten(1)


@operator("Reshape")
def reshape(inputs: Sequence[Any], attributes: Attributes) -> Any:
    x, given = inputs[0], list(np.atleast_1d(inputs[1]))
    sizes = [x.shape[i] if size == 0 and not attributes.get("allowzero", 0) else size for i, size in enumerate(given)]
    if isinstance(x, Tensor):
        if attributes["one"] and x.ndim and len(sizes) > 1 and _is(sizes[0], 1) and not _is(x.shape[0], 1):
            sizes[0] = x.shape[0]  # the file says: one input
        return x.reshape(sizes)
    return np.reshape(x, [int(size) for size in sizes])


@operator("Expand")
def expand(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x, sizes = inputs[0], list(inputs[1])
    shape = [1] * (len(sizes) - x.ndim) + list(x.shape)
    sizes = [1] * (x.ndim - len(sizes)) + sizes
    return x.expand([old if _is(new, 1) else new for old, new in zip(shape, sizes, strict=True)])


@operator("Squeeze", "Unsqueeze")
def squeeze(inputs: Sequence[Any], attributes: Attributes) -> Any:
    x = inputs[0]
    axes = attributes.get("axes") if len(inputs) < 2 or inputs[1] is None else np.atleast_1d(inputs[1])
    adding = attributes["kind"] == "Unsqueeze"
    if axes is None and not isinstance(x, Tensor):
        return np.squeeze(x)
    if axes is None:
        raise InputError("Squeeze without axes depends on the batch size; export it with axes")
    rank = x.ndim + (len(axes) if adding else 0)
    for axis in sorted((int(axis) % rank for axis in axes), reverse=not adding):
        if isinstance(x, Tensor):
            x = x.unsqueeze(axis) if adding else x.squeeze(axis)
        else:
            x = np.expand_dims(x, axis) if adding else np.squeeze(x, axis)
    return x


@operator("Concat")
def concat(inputs: Sequence[Any], attributes: Attributes) -> Any:
    like = next((x for x in inputs if isinstance(x, Tensor)), None)
    if like is None:
        return np.concatenate([np.atleast_1d(x) for x in inputs], attributes["axis"])
    return torch.cat([_tensor(x, like) for x in inputs], attributes["axis"])


@operator("Split")
def split(inputs: Sequence[Any], attributes: Attributes) -> tuple[Tensor, ...]:
    x, axis, count = inputs[0], attributes.get("axis", 0), attributes["outputs"]
    sizes = attributes.get("split") if len(inputs) < 2 or inputs[1] is None else [int(size) for size in inputs[1]]
    return tuple(torch.split(x, sizes or -(-x.shape[axis] // count), axis))


@operator("Slice")
def cut(inputs: Sequence[Any], attributes: Attributes) -> Any:
    x = inputs[0]
    given = [*inputs[1:], *[None] * 4][:4]
    named = ("starts", "ends", "axes", "steps")
    lists = [attributes.get(key) if v is None else list(np.atleast_1d(v)) for key, v in zip(named, given, strict=True)]
    starts, ends = lists[0] or [], lists[1] or []
    axes, steps = lists[2] or range(len(starts)), lists[3] or [1] * len(starts)
    index: list[Any] = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 1:
            raise InputError("Slice with a negative step is not understood")
        index[axis] = slice(start, None if isinstance(end, int) and end >= 2**31 - 1 else end, step)
    return x[tuple(index)]


@operator("Gather")
def gather(inputs: Sequence[Any], attributes: Attributes) -> Any:
    x, index = inputs
    axis = attributes.get("axis", 0)
    if not isinstance(x, Tensor):
        return np.asarray(np.take(x, np.array(index, dtype=np.int64), axis), dtype=object)
    if isinstance(index, Tensor):
        raise InputError("Gather with indices that are no constant is not understood")
    if index.ndim == 0:
        return x.select(axis, int(index.item()))
    axis = axis % x.ndim
    rows = torch.tensor([int(i) % x.shape[axis] for i in index.flatten()], device=x.device)
    return x.index_select(axis, rows).unflatten(axis, index.shape)


@operator("Pad")
def pad(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x, pads, value, axes = (*inputs, None, None, None)[:4]
    sizes = [int(size) for size in (attributes["pads"] if pads is None else pads)]
    value = attributes.get("value", 0.0) if value is None else _scalar(value)
    begin, end = [0] * x.ndim, [0] * x.ndim
    chosen = list(range(x.ndim)) if axes is None else [int(axis) % x.ndim for axis in axes]
    for axis, first, last in zip(chosen, sizes[: len(chosen)], sizes[len(chosen) :], strict=True):
        begin[axis], end[axis] = first, last
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}.get(
        attributes.get("mode", "constant")
    )
    if mode is None:
        raise InputError(f"Pad with the mode {attributes['mode']} is not understood")
    if mode == "constant":
        return F.pad(x, _torch_pads(begin, end), value=value)
    if any((*begin[:2], *end[:2])):
        raise InputError(f"Pad with the mode {mode} over channels or inputs is not understood")
    return F.pad(x, _torch_pads(begin[2:], end[2:]), mode=mode)


@operator("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceL1")
def reduce(inputs: Sequence[Any], attributes: Attributes) -> Tensor:
    x, given = (*inputs, None)[:2]
    axes = attributes.get("axes") if given is None else [int(axis) for axis in np.atleast_1d(given)]
    if not axes:
        raise InputError(f"{attributes['kind']} over all axes mixes the inputs of a batch")
    keep, dims = bool(attributes.get("keepdims", 1)), tuple(axes)
    order = {"ReduceL2": 2, "ReduceL1": 1}.get(attributes["kind"])
    if order is not None:
        return torch.linalg.vector_norm(x, order, dims, keep)
    functions: dict[str, Any] = {
        "ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax, "ReduceMin": torch.amin
    }  # fmt: skip
    return functions[attributes["kind"]](x, dims, keep)


@operator("Shape")
def shape_of(inputs: Sequence[Any], attributes: Attributes) -> Any:
    sizes = list(inputs[0].shape)[attributes.get("start", 0) : attributes.get("end")]
    return _numbers(sizes)


@operator("Range")
def arange(inputs: Sequence[Any], attributes: Attributes) -> Any:
    start, stop, step = (int(np.asarray(value).item()) for value in inputs)
    return _numbers(list(range(start, stop, step)))


# ----------------------------------------------------------------------------------------------------------- arguments


def _numbers(items: Sequence[Any]) -> Any:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def _tensor(value: Any, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value.tolist(), dtype=like.dtype, device=like.device)


def _scalar(value: Any) -> float:
    return float(value.item())


def _is(size: Any, number: int) -> bool:
    """Return whether a size is that plain number; a symbolic one is not."""
    return isinstance(size, int) and size == number


def _per_axis(attributes: Attributes, key: str, rank: int) -> list[int]:
    return list(attributes.get(key) or [1] * rank)


def _pads(
    attributes: Attributes, x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return the padding before and behind each spatial axis."""
    rank = len(kernel)
    mode = attributes.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        pads = list(attributes.get("pads") or [0] * 2 * rank) if mode == "NOTSET" else [0] * 2 * rank
        return pads[:rank], pads[rank:]
    if attributes["kind"] == "ConvTranspose":
        raise InputError(f"ConvTranspose with auto_pad {mode} is not understood")
    begin, end = [], []
    for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True):
        total = max(0, (-(-int(size) // s) - 1) * s + d * (k - 1) + 1 - int(size))
        small, large = total // 2, total - total // 2
        begin.append(small if mode == "SAME_UPPER" else large)
        end.append(large if mode == "SAME_UPPER" else small)
    return begin, end


def _padded(
    x: Tensor, attributes: Attributes, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
    value: float,
) -> tuple[Tensor, list[int]]:  # fmt: skip
    """Return x and the padding that torch's operator can do itself; unequal padding is done here."""
    begin, end = _pads(attributes, x, kernel, stride, dilation)
    if begin == end:
        return x, begin
    return F.pad(x, _torch_pads(begin, end), value=value), [0] * len(kernel)


def _torch_pads(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    return [size for pair in zip(reversed(begin), reversed(end), strict=True) for size in pair]
