"""Pooling over non-overlapping windows with exact Lipschitz constants."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AvgPool2d(nn.Module):
    """Average over k x k windows, stride k: norm exactly 1/k. Rows and columns that fill no window are left out.

    >>> AvgPool2d(2).factor
    0.5
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.factor = 1 / size

    def forward(self, x: Tensor) -> Tensor:  # (n, c, h, w) -> (n, c, h // size, w // size)
        return F.avg_pool2d(x, self.size)

    def extra_repr(self) -> str:
        return f"{self.size}"


class L2Pool2d(nn.Module):
    """Euclidean norm over k x k windows, stride k: 1-Lipschitz, and it keeps the norm of its input.

    >>> L2Pool2d(2)(torch.ones(1, 1, 2, 2)).item()
    2.0
    """

    factor = 1.0

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:  # (n, c, h, w) -> (n, c, h // size, w // size), size divides h and w
        n, c, h, w = x.shape
        k = self.size
        if h % k or w % k:
            raise ValueError(f"L2Pool2d({k}) needs height and width in multiples of {k}, not {h}x{w}")
        windows = x.reshape(n, c, h // k, k, w // k, k)
        return torch.linalg.vector_norm(windows, dim=(3, 5))

    def extra_repr(self) -> str:
        return f"{self.size}"
