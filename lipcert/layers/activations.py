"""Activations that keep gradient norms: MaxMin and GroupSort (Anil, Lucas, Grosse, ICML 2019, arXiv 1811.05381).

Both permute their inputs, so they are 1-Lipschitz and their Jacobian is orthogonal wherever it exists.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MaxMin(nn.Module):
    """Sort each pair of channels (i, i + C/2): maxima in the first half, minima in the second.

    >>> MaxMin()(torch.tensor([[1.0, 5.0, 3.0, 4.0]])).tolist()
    [[3.0, 5.0, 1.0, 4.0]]
    """

    def forward(self, x: Tensor) -> Tensor:  # (n, c, ...) -> (n, c, ...), c even
        if x.shape[1] % 2:
            raise ValueError(f"MaxMin needs an even number of channels, not {x.shape[1]}")
        a, b = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


class GroupSort(nn.Module):
    """Sort each group of `group_size` neighbouring channels in ascending order; the whole channel axis if None.

    >>> GroupSort(2)(torch.tensor([[3.0, 1.0, 2.0, 4.0]])).tolist()
    [[1.0, 3.0, 2.0, 4.0]]
    """

    def __init__(self, group_size: int | None = 2) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:  # (n, c, ...) -> (n, c, ...), c a multiple of group_size
        channels = x.shape[1]
        size = channels if self.group_size is None else self.group_size
        if channels % size:
            raise ValueError(f"GroupSort({size}) needs a multiple of {size} channels, not {channels}")
        grouped = x.reshape(x.shape[0], channels // size, size, *x.shape[2:])
        return torch.sort(grouped, dim=2).values.reshape(x.shape)

    def extra_repr(self) -> str:
        return f"{self.group_size}"
