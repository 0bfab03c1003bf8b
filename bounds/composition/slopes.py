"""Slope ranges of activations: α ≤ (f(u) - f(v)) / (u - v) ≤ β for all real u ≠ v, both ends rounded outward.

The larger of |α| and |β| is the constant that `lipcert.bounds.rules.elementwise` uses; chains need both ends. Values to
16 digits were computed with mpmath at the zeros of f'' and are rounded outward by one unit in the last place. They are
global: no range of the argument is assumed. Only functions of one argument that act on every entry alone have slopes;
MaxMin, GroupSort and softmax have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from lipcert.bounds.graph import Node
from lipcert.bounds.rounding import down, mul_up, up

Slopes = tuple[float, float]

_FIXED: dict[str, Slopes] = {
    "relu": (0.0, 1.0),
    "relu6": (0.0, 1.0),
    "tanh": (0.0, 1.0),
    "atan": (0.0, 1.0),
    "log_sigmoid": (0.0, 1.0),
    "softplus": (0.0, 1.0),  # for every β
    "abs": (-1.0, 1.0),
    "sin": (-1.0, 1.0),
    "cos": (-1.0, 1.0),
    "sigmoid": (0.0, 0.25),
    "hardsigmoid": (0.0, up(1.0 / 6.0)),
    "hardswish": (-0.5, 1.5),
    "silu": (down(-0.0998393201288669), up(1.0998393201288669)),
    "mish": (down(-0.1125261223894626), up(1.0884981612517279)),
    "erf": (0.0, up(1.1283791670955126)),
    "selu": (0.0, up(1.7580993408473769)),
}
_GELU: dict[str, Slopes] = {
    "none": (down(-0.1289041451851548), up(1.1289041451851548)),
    "tanh": (down(-0.1289930686587718), up(1.1289930686587718)),
}


def slopes(node: Node) -> Slopes | None:
    """Return the slope range of an operator, or None if it is not an entrywise function of one argument with one."""
    name = node.op.split(".")[1] if node.op.startswith("aten.") else ""
    if len(node.inputs) != 1:
        return None
    found = _FIXED[name] if name in _FIXED else _DEPENDING[name](node) if name in _DEPENDING else None
    return found if found is not None and all(map(math.isfinite, found)) else None


def _leaky_relu(node: Node) -> Slopes:
    return _hull(1.0, float(node["negative_slope"]))


def _prelu(node: Node) -> Slopes | None:
    weight = node["weight"]
    return _hull(1.0, *(float(end) for end in weight.aminmax())) if isinstance(weight, Tensor) else None


def _elu(node: Node) -> Slopes | None:
    """Return the range of f' = scale above zero, scale·alpha·input_scale·e^(input_scale·x) ∈ (0, its end] below."""
    scale, alpha, inner = (float(node[key]) for key in ("scale", "alpha", "input_scale"))
    if inner <= 0.0:
        return None
    ends = [scale, *(multiply(scale, alpha, inner) for multiply in (_down, mul_up))]
    return _hull(0.0, *ends)


def _celu(node: Node) -> Slopes | None:
    return (0.0, 1.0) if float(node["alpha"]) > 0.0 else None


def _clamp(node: Node) -> Slopes:
    """Return [0, 1]: clamping between constants, entry by entry (a broadcast result is refused by its shape)."""
    return 0.0, 1.0


def _hull(*values: float) -> Slopes:
    return min(values), max(values)


def _down(*factors: float) -> float:
    return 0.0 - mul_up(-1.0, *factors)


_DEPENDING: dict[str, Callable[[Node], Slopes | None]] = {
    "gelu": lambda node: _GELU[node["approximate"]],
    "leaky_relu": _leaky_relu,
    "prelu": _prelu,
    "elu": _elu,
    "celu": _celu,
    "hardtanh": _clamp,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
}
