"""The decoders of Lip-SegFormer: from the maps of all stages to one map of features at the stride of the first.

SegFormer's decoder (arXiv 2105.15203, equation 4) enlarges every map to the first one's size, and enlarging by s
multiplies the constant of a map by s. Three ways around that:

- `SplitDecoder`: half of the channels of a stage go on, half wait. What comes back from below is shuffled up, an
  isometry, and joins them: two functions of disjoint channels, together no steeper than the steeper one;
- `MLPDecoder`, closest to SegFormer: enlarged bilinearly by s and divided by s, so that large maps cost what small ones
  do;
- `ShuffleDecoder`: projected to s² times as many channels, which are shuffled up. Enlargement by repetition, divided by
  s, is one of the projections that it may learn.

The last two average: their fused map costs √(Σ L_i² / n) for constants L_i of the n stages.

A decoder says what a stage keeps for it and what goes on (`split`), and tells the training-time estimate about itself:
its affine pieces (`segments`), and how their norms and the stages' constants compose (`compose`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.layers import MaxMin
from lipcert.layers.power import Segment
from lipcert.models.parts import Part

Grid = tuple[int, int]


class SplitDecoder(nn.Module):
    """Join the halves from the smallest stage up: `x <- blocks(cat(kept half, pixel_shuffle(x)))`."""

    def __init__(self, stages: Sequence[Sequence[Part]]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(*parts) for parts in stages)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the half that waits and the half that goes on, the latter as a map of half the size."""
        kept, on = x.chunk(2, 1)
        return kept, F.pixel_unshuffle(on, 2)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[-1]
        for kept, stage in zip(maps[-2::-1], self.stages, strict=True):
            x = stage(torch.cat([kept, F.pixel_shuffle(x, 2)], 1))
        return x

    def segments(self) -> list[Segment]:
        return segments(self.stages)

    def compose(self, encoder: Sequence[Tensor], norms: Iterator[Tensor]) -> Tensor:
        """Return the constant behind the stem: disjoint halves count with the larger of their constants."""
        constant = encoder[-1]
        for before, stage in zip(encoder[-2::-1], self.stages, strict=True):
            constant = product(before * constant.clamp_min(1.0), stage, norms)
        return constant


class FusingDecoder(nn.Module):
    """Project every stage, enlarge all to the first one's size, average by a pointwise convolution and MaxMin.

    How a map is enlarged by s at the cost of the small one is what subclasses say, and how many channels that takes.

    Args:
        dims: channels of the stages; each is half as high and wide as the one before.
        dim: channels of the result.
        grid: of the first stage.
    """

    def __init__(self, dims: Sequence[int], dim: int, grid: Grid) -> None:
        super().__init__()
        self.grid, self.dims = grid, tuple(dims)
        self.linears = nn.ModuleList(pointwise(width, dim * self.factor(2**i)) for i, width in enumerate(dims))
        self.fuse, self.activation = pointwise(len(dims) * dim, dim), MaxMin()

    def factor(self, s: int) -> int:
        """Return how many channels make one of an enlarged map."""
        raise NotImplementedError

    def enlarge(self, x: Tensor, s: int) -> Tensor:
        """Return a map s times as high and wide, at most as steep as x in l2: (n, c, h, w) -> (n, c/factor, sh, sw)."""
        raise NotImplementedError

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map twice: the decoder sees all that goes on."""
        return x, x

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        enlarged = [self.enlarge(linear(x), 2**i) for i, (linear, x) in enumerate(zip(self.linears, maps, strict=True))]
        return self.activation(self.fuse(torch.cat(enlarged, 1) / math.sqrt(len(maps))))

    def segments(self) -> list[Segment]:
        grids = [(self.grid[0] >> i, self.grid[1] >> i) for i in range(len(self.dims))]
        small = [(linear, (width, *grid)) for linear, width, grid in zip(self.linears, self.dims, grids, strict=True)]
        return [*small, (self.fuse, (self.fuse.in_channels, *self.grid))]

    def compose(self, encoder: Sequence[Tensor], norms: Iterator[Tensor]) -> Tensor:
        """Return ‖fuse‖ √(Σ (‖linear_i‖ L_i)² / n), L_i the constant of stage i behind the stem."""
        constant, squares = encoder[0].new_ones(()), encoder[0].new_zeros(())
        for stage in encoder:
            constant = constant * stage
            squares = squares + (constant * next(norms)) ** 2
        return next(norms) * (squares / len(encoder)).sqrt()


class MLPDecoder(FusingDecoder):
    """SegFormer's decoder, its bilinearly enlarged maps divided by what enlarging costs."""

    def factor(self, s: int) -> int:
        return 1

    def enlarge(self, x: Tensor, s: int) -> Tensor:
        if s == 1:
            return x
        size = (s * x.shape[2], s * x.shape[3])
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False) / s


class ShuffleDecoder(FusingDecoder):
    """Channels become pixels, an isometry, in place of interpolation."""

    def factor(self, s: int) -> int:
        return s * s

    def enlarge(self, x: Tensor, s: int) -> Tensor:
        return F.pixel_shuffle(x, s)


Decoder = SplitDecoder | FusingDecoder


def parts_of(stages: nn.ModuleList) -> Iterable[Part]:
    """Return the parts of all stages in their order."""
    return (part for stage in stages for part in stage.children() if isinstance(part, Part))


def segments(stages: nn.ModuleList) -> list[Segment]:
    """Return the affine pieces of all stages in their order."""
    return [segment for part in parts_of(stages) for segment in part.segments()]


def product(constant: Tensor, stage: nn.Module, norms: Iterator[Tensor]) -> Tensor:
    """Return a constant times those of the parts of a stage, which take their norms from `norms`."""
    for part in stage.children():
        assert isinstance(part, Part)
        constant = constant * part.lipschitz([next(norms) for _ in part.segments()])
    return constant


def pointwise(in_dim: int, out_dim: int) -> nn.Conv2d:
    """Return a 1 x 1 convolution with orthogonal rows or columns at the start."""
    return orthogonal(nn.Conv2d(in_dim, out_dim, 1))


def orthogonal(conv: nn.Conv2d) -> nn.Conv2d:
    """Start with orthogonal rows or columns and no bias."""
    nn.init.orthogonal_(conv.weight.flatten(1))  # a view
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
