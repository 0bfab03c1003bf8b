"""Inner products summed in blocks: the same network, whose rounding errors in float32 have a much smaller bound.

A sum of n products in any order errs by at most γ_n Σ|w||x|: a convolution of 128 channels has n = 1152, a dense layer
of a whole map 8192, and a float32 certificate loses everything. Cut into blocks that are added pairwise, the same sum
errs by γ with the length of a block plus the logarithm of their number, whatever library computes the blocks. These are
operators of the exported program, so its bounds and its errors are proved as those of any other.

Source: Higham, Accuracy and Stability of Numerical Algorithms, 4.2 (blocked and pairwise summation).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lipcert.errors import InputError


def blocked(model: nn.Module, length: int = 64) -> nn.Module:
    """Return a copy whose convolutions and linear layers sum at most about `length` products at a time.

    A block has at least one input channel, so that of a convolution has at least as many products as its kernel
    has taps. Grouped and transposed convolutions stay as they are. Raises InputError for a length below 1.

    >>> blocked(nn.Sequential(nn.Linear(256, 10)), 64)[0]
    BlockedSum(4 blocks of Linear(in_features=256, out_features=10, bias=True))
    """
    if length < 1:
        raise InputError(f"a block holds at least one product, not {length}")
    return _blocked(copy.deepcopy(model), length)


def _blocked(module: nn.Module, length: int) -> nn.Module:
    if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) and getattr(module, "groups", 1) == 1:
        weight: Tensor = module.weight  # type: ignore[assignment]
        size = max(1, length // max(1, weight[0, 0].numel()))
        return module if size >= weight.shape[1] else BlockedSum(module, size)
    for name, child in list(module.named_children()):
        setattr(module, name, _blocked(child, length))
    return module


class BlockedSum(nn.Module):
    """A convolution or linear layer as a pairwise sum over blocks of input channels; plain torch operators."""

    def __init__(self, layer: Any, size: int) -> None:
        super().__init__()
        self.layer: Any = layer
        self.size = size
        self.dim = -1 if isinstance(layer, nn.Linear) else 1

    def forward(self, x: Tensor) -> Tensor:  # as the layer
        parts = [self._part(a, w) for a, w in zip(x.split(self.size, self.dim), self._weights(), strict=True)]
        total, bias = _pairwise(parts), self.layer.bias
        if bias is None:
            return total
        return total + (bias if self.dim == -1 else bias.reshape(-1, *(1,) * (total.ndim - 2)))

    def _weights(self) -> Sequence[Tensor]:
        return self.layer.weight.split(self.size, 1)

    def _part(self, x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(x, weight)
        forward: Any = self.layer._conv_forward
        return forward(x, weight, None)

    def extra_repr(self) -> str:
        return f"{len(self._weights())} blocks of {self.layer!r}"

    def __repr__(self) -> str:
        return f"BlockedSum({self.extra_repr()})"


def _pairwise(parts: Sequence[Tensor]) -> Tensor:
    while len(parts) > 1:
        pairs = [parts[i] + parts[i + 1] for i in range(0, len(parts) - 1, 2)]
        parts = [*pairs, *parts[2 * len(pairs) :]]
    return parts[0]
