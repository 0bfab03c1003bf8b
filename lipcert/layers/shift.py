"""The shift of ShiftViT (Wang et al., AAAI 2022, arXiv 2201.10801): mix positions without multiplying anything.

Four groups of channels move by one pixel (left, right, up, down), the rest stays. Published networks fill the
vacated border with zeros: norm 1, but what leaves the picture is lost, and after a few blocks on a small grid
nothing is left of the shifted channels. A circular shift is an isometry: same constant, nothing lost.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIRECTIONS = ((3, -1), (3, 1), (2, -1), (2, 1))  # (axis, step): left, right, up, down


class Shift(nn.Module):
    """Move 4 groups of `dim // divisor` channels by one pixel; `circular` wraps, otherwise zeros enter.

    1-Lipschitz; an isometry when circular.

    >>> Shift(4, divisor=4, circular=True)(torch.arange(4.0).repeat(4, 1).view(1, 4, 1, 4))[0, :2, 0].tolist()
    [[1.0, 2.0, 3.0, 0.0], [3.0, 0.0, 1.0, 2.0]]
    """

    def __init__(self, dim: int, *, divisor: int = 12, circular: bool = True) -> None:
        super().__init__()
        if divisor < 4 or dim < divisor:
            raise ValueError(f"Shift({dim}, divisor={divisor}): the divisor must be at least 4 and at most the width")
        self.dim, self.divisor, self.circular = dim, divisor, circular
        self.group = dim // divisor

    def forward(self, x: Tensor) -> Tensor:  # (n, dim, h, w) -> (n, dim, h, w)
        g = self.group
        *moving, rest = x.split([g, g, g, g, self.dim - 4 * g], dim=1)
        moved = [self._move(part, axis, step) for part, (axis, step) in zip(moving, DIRECTIONS, strict=True)]
        return torch.cat([*moved, rest], dim=1)

    def _move(self, x: Tensor, axis: int, step: int) -> Tensor:
        if self.circular:
            return torch.roll(x, step, dims=axis)
        size = x.shape[axis]
        kept = x.narrow(axis, 0 if step > 0 else 1, size - 1)
        before, after = (1, 0) if step > 0 else (0, 1)
        return F.pad(kept, (before, after) if axis == 3 else (0, 0, before, after))

    def extra_repr(self) -> str:
        return f"{self.dim}, divisor={self.divisor}, circular={self.circular}"
