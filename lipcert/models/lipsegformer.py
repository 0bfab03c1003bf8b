"""Lip-SegFormer: SegFormer's hierarchy with Lipschitz parts, the encoder and decoder of certified segmentation.

What Lipschitz continuity changes of SegFormer (arXiv 2105.15203, `segformer.py`):

- patches are merged without overlap: by one convolution at the start, by pixel-unshuffle between stages, an isometry;
- each channel's mean over the image is taken away, a projection, so that brightness counts for nothing; and a learned
  map of constants is added behind the first convolution, which makes nothing steeper and says where in the image a
  pixel is, as the zero padding of SegFormer's depthwise convolutions does;
- blocks are those of LipShiFT, `MaxMin(x + s K center(shift(x)))`, one operator near the identity, in place of
  attention and Mix-FFN;
- the decoder does not enlarge all stages to one size, which multiplies the constant of a map by the factor of
  enlargement. `decoder="split"`: every stage sends half of its channels to the decoder and the other half onwards. What
  comes back is shuffled up, an isometry, and joins the first half: two functions of disjoint channels, together no
  steeper than the steeper one. `decoder="mlp"` is SegFormer's: each stage is projected, enlarged bilinearly by s and
  divided by s, so that the enlarged maps cost no more than the small ones, and the average of all is fused.

The estimate composes as the proof does; certificates use `lipcert.bounds` alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.errors import InputError
from lipcert.layers import MaxMin, PowerIteration
from lipcert.layers.power import Segment
from lipcert.models.network import Estimated
from lipcert.models.parts import LinearShiftBlock, ShiftMix
from lipcert.registry import models


class LipSegFormer(Estimated):
    """Pixels (n, c, h, w) in [0, 1] -> logits (n, num_classes, h/4, w/4)."""

    def __init__(
        self, stem: nn.Conv2d, stages: Sequence[Sequence[LinearShiftBlock]], decoder: SplitDecoder | MLPDecoder,
        head: nn.Conv2d, stem_segment: Segment,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stem, self.head, self.decoder = stem, head, decoder
        self.positions = nn.Parameter(torch.zeros(stem.out_channels, *(side // 4 for side in stem_segment[1][1:])))
        self.stages = nn.ModuleList(nn.Sequential(*blocks) for blocks in stages)
        self.power = PowerIteration([stem_segment, *_segments(self.stages), *decoder.segments()])

    def forward(self, x: Tensor) -> Tensor:
        x, kept = self.stem(x - x.mean((2, 3), keepdim=True)) + self.positions, []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i + 1 < len(self.stages):
                part, x = self.decoder.split(x)
                kept.append(part)
                x = F.pixel_unshuffle(x, 2)
        return self.head(self.decoder([*kept, x]))

    def lipschitz_estimate(self, iterations: int = 1) -> Tensor:
        """Run the power iterations and return the estimate of the features' constant, differentiable in all weights."""
        norms = iter(self.power(iterations))
        stem = next(norms)
        stages = [_product(stem.new_ones(()), stage, norms) for stage in self.stages]
        return stem * self.decoder.compose(stages, norms)


class SplitDecoder(nn.Module):
    """Join the halves from the smallest stage up: `x <- blocks(cat(kept half, pixel_shuffle(x)))`."""

    def __init__(self, stages: Sequence[Sequence[LinearShiftBlock]]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(*blocks) for blocks in stages)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the decoder keeps and what goes on."""
        kept, on = x.chunk(2, 1)
        return kept, on

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[-1]
        for kept, stage in zip(maps[-2::-1], self.stages, strict=True):
            x = stage(torch.cat([kept, F.pixel_shuffle(x, 2)], 1))
        return x

    def segments(self) -> list[Segment]:
        return _segments(self.stages)

    def compose(self, encoder: Sequence[Tensor], norms: Iterator[Tensor]) -> Tensor:
        """Return the constant behind the stem: disjoint halves count with the larger of their constants."""
        constant = encoder[-1]
        for before, stage in zip(encoder[-2::-1], self.stages, strict=True):
            constant = _product(before * constant.clamp_min(1.0), stage, norms)
        return constant


class MLPDecoder(nn.Module):
    """Project every stage, enlarge it by s, divide by s, fuse: SegFormer's decoder with the factors of its maps."""

    def __init__(self, dims: Sequence[int], dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.dims = grid, tuple(dims)
        self.linears = nn.ModuleList(_pointwise(width, dim) for width in dims)
        self.fuse, self.activation = _pointwise(len(dims) * dim, dim), MaxMin()

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map twice: the decoder sees all that goes on."""
        return x, x

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        unified = [
            F.interpolate(linear(x), size=size, mode="bilinear", align_corners=False) * 0.5**i if i else linear(x)
            for i, (linear, x) in enumerate(zip(self.linears, maps, strict=True))
        ]
        return self.activation(self.fuse(torch.cat(unified, 1) / math.sqrt(len(maps))))

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


def _segments(stages: nn.ModuleList) -> list[Segment]:
    return [segment for stage in stages for block in stage.children() for segment in _block(block).segments()]


def _product(constant: Tensor, stage: nn.Module, norms: Iterator[Tensor]) -> Tensor:
    """Return a constant times those of the blocks of a stage."""
    for block in stage.children():
        constant = constant * _block(block).lipschitz([next(norms)])
    return constant


def _block(module: nn.Module) -> LinearShiftBlock:
    assert isinstance(module, LinearShiftBlock)
    return module


def _pointwise(in_dim: int, out_dim: int) -> nn.Conv2d:
    return _orthogonal(nn.Conv2d(in_dim, out_dim, 1))


def _orthogonal(conv: nn.Conv2d) -> nn.Conv2d:
    """Start with orthogonal rows or columns and no bias."""
    nn.init.orthogonal_(conv.weight.flatten(1))  # a view
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def lipsegformer(
    *,
    num_classes: int,
    img_size: int,
    in_chans: int,
    embed_dim: int,
    depths: Sequence[int],
    decoder_depths: Sequence[int] = (),
    height: int | None = None,
    decoder: str = "split",
    decoder_dim: int = 128,
    kernel_size: int = 3,
    scale: float = 0.2,
    divisor: int = 12,
) -> LipSegFormer:
    """Build a Lip-SegFormer for images of `height` x `img_size` pixels (None: square).

    `decoder_depths` are the blocks of the split decoder from the smallest map up (none: two each). Sides that
    4·2^(stages - 1) does not divide, and channels that 4 does not divide, raise InputError.
    """
    sides = (height or img_size, img_size)
    smallest = 4 * 2 ** (len(depths) - 1)
    if any(side % smallest for side in sides):
        raise InputError(f"images of {sides[0]}x{sides[1]} pixels: both sides must be multiples of {smallest}")
    if embed_dim % 4:
        raise InputError(f"embed_dim must be a multiple of 4, not {embed_dim}")
    if decoder not in ("split", "mlp"):
        raise InputError(f"decoder must be split or mlp, not {decoder!r}")
    grid = sides[0] // 4, sides[1] // 4
    dims, grids = [embed_dim], [grid]
    for _ in depths[1:]:
        dims.append(dims[-1] * (2 if decoder == "split" else 4))
        grids.append((grids[-1][0] // 2, grids[-1][1] // 2))

    def blocks(dim: int, grid: tuple[int, int], depth: int) -> list[LinearShiftBlock]:
        mixes = (
            ShiftMix(dim, kernel_size, scale=scale, shift="circular", divisor=divisor, center=True, circular=False)
            for _ in range(depth)
        )
        return [LinearShiftBlock((dim, *grid), mix) for mix in mixes]

    stages = [blocks(*row) for row in zip(dims, grids, depths, strict=True)]
    stem = _orthogonal(nn.Conv2d(in_chans, embed_dim, 4, stride=4))
    part: SplitDecoder | MLPDecoder
    if decoder == "split":
        deep = decoder_depths or (2,) * (len(depths) - 1)
        if len(deep) != len(depths) - 1:
            raise InputError(f"decoder_depths names {len(deep)} levels, and {len(depths)} stages have one fewer")
        part = SplitDecoder([blocks(*row) for row in zip(dims[-2::-1], grids[-2::-1], deep, strict=True)])
        width = embed_dim
    else:
        part, width = MLPDecoder(dims, decoder_dim, grid), decoder_dim
    return LipSegFormer(stem, stages, part, _pointwise(width, num_classes), (stem, (in_chans, *sides)))


@models.register(task="segmentation")
def lipsegformer_tiny(**kwargs: Any) -> LipSegFormer:
    """1.5 million parameters, three stages."""
    return lipsegformer(**{"embed_dim": 48, "depths": (3, 3, 3), **kwargs})


@models.register(task="segmentation")
def lipsegformer_b0(**kwargs: Any) -> LipSegFormer:
    """SegFormer-B0's four stages, 64 channels at stride 4."""
    return lipsegformer(**{"embed_dim": 64, "depths": (3, 3, 3, 3), **kwargs})


@models.register(task="segmentation")
def lipsegformer_b1(**kwargs: Any) -> LipSegFormer:
    """The same with 128 channels at stride 4."""
    return lipsegformer(**{"embed_dim": 128, "depths": (3, 3, 3, 3), **kwargs})
