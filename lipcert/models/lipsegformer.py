"""Lip-SegFormer: SegFormer's hierarchy with Lipschitz parts, the encoder and decoder of certified segmentation.

What Lipschitz continuity changes of SegFormer (arXiv 2105.15203, `segformer.py`):

- patches are merged without overlap: by one convolution at the start, between stages by pixel-unshuffle, an isometry,
  or by convolutions that start orthogonal, as the decoder wants it;
- each channel's mean over the image is taken away, a projection, so that brightness counts for nothing; and a learned
  map of constants is added behind the first convolution, which makes nothing steeper and says where in the image a
  pixel is, as the zero padding of SegFormer's depthwise convolutions does;
- stages mix by LipShiFT's blocks, `MaxMin(x + s K center(shift(x)))`, one operator near the identity, in place of
  attention and Mix-FFN (`mixers=("shift", …)`); or, like SegFormer, attend before it: with scaled cosine similarities
  in windows ("window") or to a reduced map ("reduced"), whose constants are known, and which grow with the number of
  tokens, so that attention belongs into stages of small maps. `ffn="mix"` has a Lipschitz Mix-FFN behind attention;
- the decoder does not enlarge all stages to one size, which multiplies the constant of a map by the factor of
  enlargement: see `lipsegformer_decoders.py`.

The estimate composes as the proof does; certificates use `lipcert.bounds` alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipcert.errors import InputError
from lipcert.layers import PowerIteration
from lipcert.layers.power import Segment
from lipcert.models.lipsegformer_decoders import (
    Decoder,
    Grid,
    MLPDecoder,
    ShuffleDecoder,
    SplitDecoder,
    orthogonal,
    pointwise,
    product,
    segments,
)
from lipcert.models.lipsformer_certified import AttentionBlock
from lipcert.models.mix_ffn import LipschitzMixFFN
from lipcert.models.network import Estimated
from lipcert.models.parts import Affine, LinearShiftBlock, Part, ShiftMix
from lipcert.models.reduced_attention import ReducedAttentionBlock
from lipcert.models.shiftvit import patch_convolution
from lipcert.registry import models

MIXERS = ("shift", "window", "reduced")
DECODERS = ("split", "mlp", "pixelshuffle")


class LipSegFormer(Estimated):
    """Pixels (n, c, h, w) in [0, 1] -> logits (n, num_classes, h/4, w/4)."""

    def __init__(
        self, stem: nn.Conv2d, stages: Sequence[Sequence[Part]], decoder: Decoder, head: nn.Conv2d,
        stem_segment: Segment,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stem, self.head, self.decoder = stem, head, decoder
        self.positions = nn.Parameter(torch.zeros(stem.out_channels, *(side // 4 for side in stem_segment[1][1:])))
        self.stages = nn.ModuleList(nn.Sequential(*parts) for parts in stages)
        self.power = PowerIteration([stem_segment, *segments(self.stages), *decoder.segments()])

    def forward(self, x: Tensor) -> Tensor:
        x, kept = self.stem(x - x.mean((2, 3), keepdim=True)) + self.positions, []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i + 1 < len(self.stages):
                part, x = self.decoder.split(x)
                kept.append(part)
        return self.head(self.decoder([*kept, x]))

    def lipschitz_estimate(self, iterations: int = 1) -> Tensor:
        """Run the power iterations and return the estimate of the features' constant, differentiable in all weights."""
        norms = iter(self.power(iterations))
        stem = next(norms)
        stages = [product(stem.new_ones(()), stage, norms) for stage in self.stages]
        return stem * self.decoder.compose(stages, norms)


def lipsegformer(
    *, num_classes: int, img_size: int, in_chans: int, embed_dim: int, depths: Sequence[int],
    mixers: Sequence[str] | str = "shift", decoder_depths: Sequence[int] = (), height: int | None = None,
    decoder: str = "split", decoder_dim: int = 128, kernel_size: int = 3, scale: float = 0.2, divisor: int = 12,
    num_heads: int = 4, window_size: int = 4, reduction: int = 2, tau: float = 1.0, eps: float = 1.0,
    start: float = 0.2, ffn: str = "linear", ffn_ratio: int = 2,
) -> LipSegFormer:  # fmt: skip
    """Build a Lip-SegFormer for images of `height` x `img_size` pixels (None: square).

    Args:
        mixers: "shift", "window" or "reduced", one for all stages or one for each.
        decoder: "split", "mlp" or "pixelshuffle".
        decoder_depths: blocks of the split decoder from the smallest map up; none: two each.
        decoder_dim: channels of the features with the other two.
        kernel_size, scale, divisor: of the shift blocks.
        num_heads, tau, eps, start: of attention; `start` is also that of Mix-FFN.
        window_size: the largest side of windows; along an axis it is the largest such number that divides the map.
        reduction: the largest side of the patches of one key of a "reduced" mixer; it is the largest such number that
            divides both sides of the map.
        ffn: behind attention: "linear" for a shift block, "mix" for a Mix-FFN with `ffn_ratio` times the channels.

    Sides that 4·2^(stages - 1) does not divide, channels that 4 does not divide, and names that are unknown raise
    InputError.
    """
    sides = (height or img_size, img_size)
    chosen = (mixers,) * len(depths) if isinstance(mixers, str) else tuple(mixers)
    _check(sides, embed_dim, depths, chosen, decoder, ffn)
    grid = sides[0] // 4, sides[1] // 4
    dims = [embed_dim * 2**i for i in range(len(depths))]
    grids = [(grid[0] >> i, grid[1] >> i) for i in range(len(depths))]

    def shift(shape: tuple[int, int, int]) -> Part:
        return LinearShiftBlock(
            shape,
            ShiftMix(
                shape[0], kernel_size, scale=scale, shift="circular", divisor=divisor, center=True, circular=False
            ),
        )

    def attend(shape: tuple[int, int, int], mixer: str, number: int) -> Part:
        if mixer == "reduced":
            side = _divisor(math.gcd(*shape[1:]), reduction)
            return ReducedAttentionBlock(shape, heads=num_heads, reduction=side, tau=tau, eps=eps, start=start)
        window = _divisor(shape[1], window_size), _divisor(shape[2], window_size)
        return AttentionBlock(
            shape, heads=num_heads, window=window, shift=number % 2 == 1, tau=tau, eps=eps, residual="convex",
            start=start,
        )  # fmt: skip

    def blocks(dim: int, grid: Grid, depth: int, mixer: str = "shift") -> list[Part]:
        shape, parts = (dim, *grid), []
        for i in range(depth):
            if mixer != "shift":
                parts.append(attend(shape, mixer, i))
            mixed = mixer != "shift" and ffn == "mix"
            parts.append(LipschitzMixFFN(shape, ratio=ffn_ratio, start=start) if mixed else shift(shape))
        return parts

    stages = [blocks(*row) for row in zip(dims, grids, depths, chosen, strict=True)]
    stem = orthogonal(nn.Conv2d(in_chans, embed_dim, 4, stride=4))
    part: Decoder
    if decoder == "split":
        deep = decoder_depths or (2,) * (len(depths) - 1)
        if len(deep) != len(depths) - 1:
            raise InputError(f"decoder_depths names {len(deep)} levels, and {len(depths)} stages have one fewer")
        part = SplitDecoder([blocks(*row) for row in zip(dims[-2::-1], grids[-2::-1], deep, strict=True)])
        width = embed_dim
    else:
        for before, after, side, stage in zip(dims, dims[1:], grids, stages[1:], strict=False):
            stage.insert(0, Affine((before, *side), patch_convolution(before, after, 2, min(side))))
        part = (MLPDecoder if decoder == "mlp" else ShuffleDecoder)(dims, decoder_dim, grid)
        width = decoder_dim
    return LipSegFormer(stem, stages, part, pointwise(width, num_classes), (stem, (in_chans, *sides)))


def _check(
    sides: Grid, embed_dim: int, depths: Sequence[int], mixers: Sequence[str], decoder: str, ffn: str
) -> None:  # fmt: skip
    smallest = 4 * 2 ** (len(depths) - 1)
    problems = []
    if any(side % smallest for side in sides):
        problems.append(f"images of {sides[0]}x{sides[1]} pixels: both sides must be multiples of {smallest}")
    if embed_dim % 4:
        problems.append(f"embed_dim must be a multiple of 4, not {embed_dim}")
    if decoder not in DECODERS:
        problems.append(f"decoder must be one of {', '.join(DECODERS)}, not {decoder!r}")
    if unknown := [mixer for mixer in mixers if mixer not in MIXERS]:
        problems.append(f"mixers must be of {', '.join(MIXERS)}, not {', '.join(map(repr, unknown))}")
    if len(mixers) != len(depths):
        problems.append(f"mixers names {len(mixers)} stages, and depths {len(depths)}")
    if ffn not in ("linear", "mix"):
        problems.append(f"ffn must be linear or mix, not {ffn!r}")
    if problems:
        raise InputError("; ".join(problems))


def _divisor(side: int, most: int) -> int:
    """Return the largest divisor of a side that is at most `most`."""
    return max(width for width in range(1, max(1, most) + 1) if side % width == 0)


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
