"""Windows of a map: cut, shift, put together; what tokens of one window are to each other.

Swin Transformer (Liu et al., ICCV 2021, arXiv 2103.14030). Maps have their channels last, (n, h, w, c). Cutting and
shifting move entries and change none: isometries. What differs: tokens that a cyclic shift brings into one window from
far apart get -∞ instead of -100 added to their scores, which changes no float32 result and lets a bound count the
tokens that are really seen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]


def partition(x: Tensor, window: Size) -> Tensor:
    """Cut a map (n, h, w, c) into windows (n, windows, tokens, c); the window must divide the map.

    >>> partition(torch.arange(8).view(1, 2, 4, 1), (2, 2))[0, 0].flatten().tolist()
    [0, 1, 4, 5]
    """
    n, h, w, c = x.shape
    a, b = window
    if h % a or w % b:
        raise ValueError(f"windows of {a}x{b} do not divide a map of {h}x{w}")
    return x.reshape(n, h // a, a, w // b, b, c).transpose(2, 3).reshape(n, (h // a) * (w // b), a * b, c)


def merge(x: Tensor, window: Size, size: Size) -> Tensor:
    """Put windows (n, windows, tokens, c) together to a map (n, h, w, c) of this `size`, as `partition` cut them."""
    n, c = x.shape[0], x.shape[-1]
    (a, b), (h, w) = window, size
    return x.reshape(n, h // a, w // b, a, b, c).transpose(2, 3).reshape(n, h, w, c)


def relative_index(window: Size) -> Tensor:
    """Return for each pair of tokens of a window its row in a table of all (2a - 1)(2b - 1) relative positions.

    >>> relative_index((1, 2))
    tensor([[1, 0],
            [2, 1]])
    """
    a, b = window
    rows = torch.arange(a, device="cpu").repeat_interleave(b)
    columns = torch.arange(b, device="cpu").repeat(a)
    down = rows[:, None] - rows[None] + a - 1
    across = columns[:, None] - columns[None] + b - 1
    return down * (2 * b - 1) + across  # (a b, a b)


def shift_mask(size: Size, window: Size, shift: Size) -> Tensor:
    """Return (windows, tokens, tokens): 0 for pairs that are neighbours in the map before the shift, -∞ for others."""
    axes = []
    for length, width, step in zip(size, window, shift, strict=True):
        place = torch.arange(length, device="cpu")
        after = [place >= length - edge for edge in (width, step)] if step else []
        axes.append(sum(after, torch.zeros_like(place)))
    region = (axes[0][:, None] * 3 + axes[1])[None, :, :, None]
    windows = partition(region, window)[0, :, :, 0]  # (windows, tokens)
    apart = windows[:, :, None] != windows[:, None, :]
    return torch.zeros(apart.shape, device="cpu").masked_fill(apart, -torch.inf)


class WindowMix(nn.Module):
    """Apply an attention inside each window of a map, (n, h, w, c) -> the same.

    A map that the windows do not divide is padded with zeros at the right and lower border, as in torchvision.

    Args:
        attention: maps (n, windows, tokens, c) to the same, given also a mask.
        window: of tokens, high and wide.
        shift: roll the map by half a window before cutting it, and back afterwards; along an axis with one window only
            there is nothing to shift.
        masked: let tokens that are together only because of the roll ignore each other. Without, the map is a torus.
    """

    def __init__(self, attention: nn.Module, window: Size, *, shift: bool = False, masked: bool = True) -> None:
        super().__init__()
        self.attention, self.window, self.shift, self.masked = attention, window, shift, masked

    def forward(self, x: Tensor) -> Tensor:
        (h, w), (a, b) = x.shape[1:3], self.window
        down, right = -h % a, -w % b
        if down or right:
            x = F.pad(x, (0, 0, 0, right, 0, down))
        size = (h + down, w + right)
        steps = [
            width // 2 if self.shift and width < length else 0 for length, width in zip(size, self.window, strict=True)
        ]
        mask = None
        if any(steps):
            x = torch.roll(x, (-steps[0], -steps[1]), (1, 2))
            if self.masked:
                mask = shift_mask(size, self.window, (steps[0], steps[1])).to(x)
        x = merge(self.attention(partition(x, self.window), mask), self.window, size)
        if any(steps):
            x = torch.roll(x, steps, (1, 2))
        return x[:, :h, :w] if down or right else x

    def extra_repr(self) -> str:
        return f"{self.window}, shift={self.shift}, masked={self.masked}"
