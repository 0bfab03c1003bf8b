"""What makes a bound large or infinite, and the Lipschitz counterpart that lipcert offers: one table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lipcert.report.shares import number, shares

_WORTH = 0.05  # of the growth: less is not worth a sentence


@dataclass(frozen=True)
class Counterpart:
    """One row: operators as audits name them, what they do to a bound, and what to use in their place.

    `least` is the factor of a row below which there is nothing to say; None where the operator matters only without a
    finite bound.
    """

    operators: tuple[str, ...]
    title: str
    why: str
    instead: str
    least: float | None = 1.0


_LINEAR = {"batch_norm", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "addmm", "mm", "convolution"}
_JOINING = {"add", "sum", "add_", "cat", "mul", "mul_"}
_ATTENTION = ("scaled_dot_product_attention", "attention", "softmax_attention", "multi_head_attention")

COUNTERPARTS = (
    Counterpart(
        ("layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "instance_norm", "rms_norm"),
        "Layer normalisation divides by a standard deviation that can be tiny",
        "its constant is max|γ|/√ε, more than 300 for ε = 1e-5, whatever the images are",
        "CenterNorm, which subtracts the mean and does not divide (lipcert.layers.CenterNorm)",
    ),
    Counterpart(
        (*_ATTENTION, "softmax", "bmm", "matmul"),
        "Dot-product attention multiplies values that depend on the input",
        "queries and keys of any length make it steep: without a bounded input it has no finite constant",
        "scaled cosine similarity attention, whose queries, keys and values are rows divided by √(‖row‖² + ε), with ε "
        "of order 1 (lipcert.layers.ScaledCosineAttention; its values=False has no constant)",
    ),
    Counterpart(
        ("batch_norm",),
        "Batch normalisation with small running variances",
        "channels with variance σ² are multiplied by γ/√(σ²+ε), fused here with the convolution before",
        "training with a penalty on γ/σ, or CenterNorm, which has no running statistics (lipcert.layers.CenterNorm)",
        2.0,
    ),
    Counterpart(
        ("gelu", "silu", "mish", "hardswish", "selu", "elu", "celu"),
        "Smooth activations are steeper than 1 somewhere",
        "GELU 1.129, SiLU 1.100, hardswish 1.5 per layer, and gradients shrink everywhere else",
        "MaxMin or GroupSort, which are 1-Lipschitz and keep the gradient's norm (lipcert.layers.MaxMin)",
        1.01,
    ),
    Counterpart(
        ("max_pool2d", "max_pool1d", "max_pool3d", "max_pool2d_with_indices", "adaptive_max_pool2d"),
        "Max pooling with overlapping windows counts pixels several times",
        "a window of k with stride s has the constant √∏⌈k/s⌉",
        "non-overlapping windows (stride = window), or l2 pooling (lipcert.layers.L2Pool2d)",
        1.01,
    ),
    Counterpart(
        ("mul", "mul_"),
        "A product of two values that depend on the input, as in squeeze-and-excitation or gating",
        "its constant grows with the range of both factors",
        "no gate, or one whose range is bounded on both sides: sigmoid times a normalised value",
    ),
    Counterpart(
        ("add", "sum", "add_", "cat"),
        "Residual sums add the constants of their branches",
        "x + f(x) costs 1 + Lip(f) unless both are one affine map",
        "a linear residual convolution, x + s·conv(x), bounded as one operator (lipcert.layers.LiResConv), "
        "or a weighted mean of the branches",
        1.01,
    ),
    Counterpart(
        ("conv2d", "conv1d", "conv3d", "conv_transpose2d", "linear", "addmm", "mm", "convolution"),
        "Linear layers with large spectral norms",
        "nothing holds their norms while training",
        "power-iteration normalised layers (lipcert.layers.PowerIteration estimates them together), and a loss that "
        "rewards margins over the bound (lipcert train --loss emma)",
        2.0,
    ),
    Counterpart(
        ("div", "reciprocal", "rsqrt", "log", "sqrt", "pow", "exp", "linalg_vector_norm"),
        "A function whose slope has no bound on the range that is known",
        "divisions, roots and powers are steep near zero or far out",
        "a floor under the divisor (x / √(‖x‖² + ε)), or a clamp before the power",
        None,
    ),
    Counterpart(
        ("sign", "round", "floor", "ceil", "trunc", "heaviside", "argmax", "div_mode"),
        "A function that jumps",
        "no Lipschitz constant exists for it: two inputs as close as you like give different outputs",
        "a piecewise linear function with the slope that you want, such as hardtanh in place of sign",
        None,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Advice:
    """A counterpart with the rows that call for it: how many, their part of the growth, and the names of some."""

    counterpart: Counterpart
    layers: int
    part: float | None  # None: among the operators without a bound
    names: tuple[str, ...]


def advice(layers: Sequence[Mapping[str, Any]], unbounded: Sequence[Mapping[str, Any]]) -> list[Advice]:
    """Return what to change, in the order of what it would help: first what has no bound, then by growth.

    A row of several operators counts for the first counterpart of the table that one of them has.
    """
    found: list[Advice] = []
    for entry in COUNTERPARTS:
        names = [str(item.get("name", "?")) for item in unbounded if set(_words(item.get("op"))) & {*entry.operators}]
        if names:
            found.append(Advice(entry, len(names), None, tuple(dict.fromkeys(names))[:3]))
    grown: dict[int, list[tuple[str, float]]] = {}
    normalised = [str(row.get("name", "?")) for row in layers if row.get("op") == "normalize"]
    for row, share in zip(layers, shares(layers), strict=True):
        which = _counterpart(row, normalised)
        if which is not None and share.part is not None and share.part > 0.0:
            grown.setdefault(which, []).append((str(row.get("name", "?")), share.part))
    entries = [
        Advice(COUNTERPARTS[which], len(rows), sum(part for _, part in rows), _largest(rows))
        for which, rows in grown.items()
    ]
    return found + sorted((entry for entry in entries if (entry.part or 0) >= _WORTH), key=lambda e: -(e.part or 0))


def _counterpart(row: Mapping[str, Any], normalised: Sequence[str]) -> int | None:
    """Return the position of a row's counterpart, None where there is nothing to replace.

    Products and sums inside one affine map are with constants; of parts that a concatenation joins, only the steepest
    counts, so that joining costs nothing. Attention whose queries, keys and values are normalised, in the same row or
    in those named `normalised`, is what would be advised.
    """
    factor, op = number(row.get("upper")), str(row.get("op"))
    label, _, inside = op.partition(" of ")
    words = set(_words(op))
    if words & {"affine", "chain"}:
        words &= _LINEAR
    elif label == "cat" and inside:
        words = set(_words(inside)) - _JOINING
    if words & {*_ATTENTION} and _rows_normalised(str(row.get("name", "?")), inside, normalised):
        words -= {*_ATTENTION}
    for position, entry in enumerate(COUNTERPARTS):
        if entry.least is not None and words & {*entry.operators} and factor > entry.least:
            return position
    return None


def _rows_normalised(name: str, inside: str, normalised: Sequence[str]) -> bool:
    """Return whether there is a normalisation for each of the queries, keys and values of every attention of a row."""
    counts = {word: 0 for word in ("normalize", *_ATTENTION)}
    for word, times in re.findall(r"([a-z_0-9]+)(?:×(\d+))?", inside):
        if word in counts:
            counts[word] += int(times or 1)
    found = counts.pop("normalize")
    if attentions := sum(counts.values()):
        return found >= 3 * attentions
    return sum(other == name or f"{name}." in other for other in normalised) >= 3


def _largest(rows: Sequence[tuple[str, float]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name, _ in sorted(rows, key=lambda row: -row[1])))[:3]


def _words(op: Any) -> list[str]:
    """Return the operators that a row's label is made of.

    >>> _words("affine: conv2d×2+batch_norm")
    ['affine', 'conv2d', 'batch_norm']
    """
    return [word for word in re.findall(r"[a-z_0-9]+", str(op).lower().replace("×", " ×")) if not word.isdigit()]
