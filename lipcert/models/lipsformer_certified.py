"""LipsFormer arranged for certificates: scaled cosine similarity attention where its constant is known and small.

What differs from LipsFormer (arXiv 2304.09856), which was made for stable training and has constants no certificate can
use:

- values are normalised, ε is 1, projections have norm at most 1 by construction, and ν is chosen so that the attention
  of a window has then the constant 1 (with biases of positions that differ by D, a little more), by the bound of
  `lipcert.bounds.attention`, which grows as √N where the paper's grows as N²;
- an attention branch joins its input as published, `x + a f(x)` with a learned and small at the start, which costs
  1 + |a| (`residual="weighted"`), or as a mean, `(1 - a) x + a f(x)` with a in (0, 1), no steeper than the steeper of
  both (`residual="convex"`). A margin loss makes the network pay for a: in the weighted form it turns attention off, to
  |a| < 1e-7 on all data tried, and certifies more than where it cannot (benchmarks/RESULTS.md);
- positions are mixed by LipShiFT's linear blocks, `MaxMin(x + s K center(shift(x)))`, and channels by the same with a
  pointwise K, in place of 7 x 7 depthwise branches and the GELU MLP: one operator each, near the identity;
- one block attends, the last: further ones cost time, and none brought certified accuracy over the network without
  (`benchmarks/ablation.py --model lipsformer`). `attention=(0, 2)` are two, of the second stage.
  Windows shift on a torus, by an isometry, without mask;
- patches merge by orthogonal convolutions, and LipShiFT's dense layer and normalised head end the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipcert.bounds.attention import Rows, coefficients, column_sums
from lipcert.errors import InputError
from lipcert.layers import LiResConv, MaxMin, NormalizedLinear, ScaledCosineAttention, WindowMix
from lipcert.layers.power import Segment
from lipcert.layers.windows import Size
from lipcert.models.network import PartNetwork
from lipcert.models.parts import Affine, Chunk, LinearShiftBlock, MeanPart, Part, ShiftMix
from lipcert.models.shiftvit import Activation, Center, fitting_patch, patch_convolution
from lipcert.registry import models


class AttentionBlock(MeanPart):
    """Windowed scaled cosine attention f in a residual form: maps (n, dim, h, w) -> the same.

    Estimate: `(1 - a) + a L` ("convex") or `1 + |a| L` ("weighted") with L the attention's `estimate`.

    Args:
        window: side of the windows, or their height and width; they must divide the map.
        start: a before training.
        orthogonal: projections of norm at most 1 by construction; else they are free, and the loss has to hold them.
    """

    def __init__(
        self, in_shape: tuple[int, int, int], *, heads: int, window: int | Size, shift: bool, tau: float, eps: float,
        residual: str, start: float,
        orthogonal: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(start)
        dim, height, width = in_shape
        size = (window, window) if isinstance(window, int) else window
        if height % size[0] or width % size[1]:
            raise InputError(f"windows of {window} do not divide a map of {height}x{width}; choose another window_size")
        if dim % heads:
            raise InputError(f"{heads} heads do not divide {dim} channels; choose another num_heads or embed_dim")
        if residual not in ("convex", "weighted"):
            raise InputError(f"residual must be convex or weighted, not {residual!r}")
        self.dim, self.tokens, self.residual = dim, size[0] * size[1], residual
        attention = ScaledCosineAttention(
            dim, heads, tau=tau, nu=unit_nu(self.tokens, tau, eps), eps=eps, orthogonal=orthogonal, window=size,
        )  # fmt: skip
        if not orthogonal:  # the start is the same
            for third in (*attention.qkv.weight.detach().chunk(3), attention.proj.weight):
                nn.init.orthogonal_(third)
        for linear in (attention.qkv, attention.proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.mix = WindowMix(attention, size, shift=shift, masked=False)
        self.attention = attention
        if residual == "weighted":  # a itself
            self.weight = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.mean(x, y) if self.residual == "convex" else x + self.weight * y

    def segments(self) -> list[Segment]:
        thirds: list[Segment] = [(Chunk(self.attention.qkv, 3, i), (self.dim,)) for i in range(3)]
        return [*thirds, (self.attention.proj, (self.dim,))]

    def lipschitz(self, norms: Sequence[Tensor]) -> Tensor:
        branch = self.attention.estimate(self.tokens, norms)
        return self.mean(1.0, branch) if self.residual == "convex" else 1 + self.weight.abs() * branch


def unit_nu(tokens: int, tau: float, eps: float) -> float:
    """Return the ν for which attention among `tokens` with projections of norm 1 has the constant 1.

    >>> round(unit_nu(16, 1.0, 1.0), 4)
    0.1787
    """
    row = Rows(1.0, 1.0)
    with torch.device("cpu"):  # a number, also where a network is built without memory
        return math.sqrt(eps) / sum(coefficients(row, row, row, tau, column_sums(2 * tau, None, tokens, tokens)))


class ChannelMix(Part):
    """`MaxMin(x + s W x)` at every position, one operator."""

    def __init__(self, in_shape: tuple[int, int, int], scale: float) -> None:
        super().__init__()
        self.in_shape = in_shape
        self.linear, self.activation = LiResConv(in_shape[0], 1, scale=scale), MaxMin()

    def forward(self, x: Tensor) -> Tensor:  # (n, dim, h, w) -> the same
        return self.activation(self.linear(x))

    def segments(self) -> list[Segment]:
        return [(self.linear, self.in_shape)]

    def lipschitz(self, norms: Sequence[Tensor]) -> Tensor:
        return norms[0]


def lipsformer_certified(
    *, num_classes: int, img_size: int, in_chans: int, embed_dim: int, depths: Sequence[int],
    attention: Sequence[int] | None = None, channel_mix: Sequence[int] | None = None,
    num_heads: Sequence[int] | int = 4, window_size: int = 4,
    patch_size: int | None = None, tau: float = 1.0, eps: float = 1.0, residual: str = "weighted", start: float = 0.05,
    orthogonal: bool = True,
    kernel_size: int = 3, scale: float = 0.2, divisor: int = 12, neck: int = 512,
) -> PartNetwork:  # fmt: skip
    """Build the certified arrangement.

    Args:
        depths: blocks per stage, each LipShiFT's linear block, and then what the next two arguments give the last ones.
        attention: how many blocks of each stage attend, True: all of them; None: the last one of the last stage.
        channel_mix: how many blocks of each stage end with a channel mix; None: those that attend.
        window_size: side of the windows, no more than the map.
        patch_size: side of the first patches; None chooses as `lipshift` does.
        tau, eps, residual, start, orthogonal: of the attention, see `AttentionBlock`.
        neck: width of the dense layer over the last map.
    """
    stages = len(depths)
    last = (0,) * (stages - 1) + (1,)
    attends = counts("attention", attention if attention is not None else last, depths)
    mixes = counts("channel_mix", channel_mix if channel_mix is not None else attends, depths)
    heads = (num_heads,) * stages if isinstance(num_heads, int) else tuple(num_heads)
    if len(heads) != stages:
        raise InputError("num_heads needs one entry for each stage")
    patch = fitting_patch(img_size, stages, patch_size)
    dim, grid = embed_dim, img_size // patch
    stem = Affine((in_chans, img_size, img_size), patch_convolution(in_chans, dim, patch, img_size))
    parts: list[Part | nn.Module] = [Center(), stem]
    for stage, depth in enumerate(depths):
        if stage:
            parts.append(Affine((dim, grid, grid), patch_convolution(dim, 2 * dim, 2, grid)))
            dim, grid = 2 * dim, grid // 2
        shape = (dim, grid, grid)
        for i in range(depth):
            mix = ShiftMix(
                dim, kernel_size, scale=scale, shift="circular", divisor=divisor, center=True, circular=False
            )
            parts.append(LinearShiftBlock(shape, mix))
            if i >= depth - attends[stage]:
                block = AttentionBlock(
                    shape, heads=heads[stage], window=min(window_size, grid), shift=i % 2 == 1, tau=tau, eps=eps,
                    residual=residual, start=start, orthogonal=orthogonal,
                )  # fmt: skip
                parts.append(block)
            if i >= depth - mixes[stage]:
                parts.append(ChannelMix(shape, scale))
    parts += [Affine((dim, grid, grid), patch_convolution(dim, neck, grid, grid)), Activation()]
    return PartNetwork(parts, NormalizedLinear(neck, num_classes))


def counts(name: str, given: Sequence[int], depths: Sequence[int]) -> tuple[int, ...]:
    """Return how many blocks of each stage are meant; True is all of them. InputError for what the stages have not.

    >>> counts("attention", (False, 2, True), (4, 4, 6))
    (0, 2, 6)
    """
    if len(given) != len(depths):
        raise InputError(f"{name} needs one entry for each of the {len(depths)} stages, not {len(given)}")
    found = tuple(depth if count is True else int(count) for count, depth in zip(given, depths, strict=True))
    if any(not 0 <= count <= depth for count, depth in zip(found, depths, strict=True)):
        raise InputError(f"{name} counts blocks of stages with {list(depths)} of them, which {list(given)} does not")
    return found


@models.register()
def lipsformer_swin_tiny_1lip(**kwargs: Any) -> nn.Module:
    """Certified LipsFormer for small images: 128 wide, 4 blocks of which the last attends, a dense layer of 512."""
    return lipsformer_certified(**{**dict(embed_dim=128, depths=(4,)), **kwargs})


@models.register()
def lipsformer_swin_small_1lip(**kwargs: Any) -> nn.Module:
    """Certified LipsFormer, 128 and 256 wide, 4 and 6 blocks of which the last attends, a dense layer of 1024."""
    return lipsformer_certified(**{**dict(embed_dim=128, depths=(4, 6), num_heads=(4, 8), neck=1024), **kwargs})
