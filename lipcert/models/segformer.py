"""SegFormer as published: a hierarchical transformer without positional codes, and a decoder of linear layers.

Xie, Wang, Yu, Anandkumar, Alvarez, Luo, "SegFormer", NeurIPS 2021, arXiv 2105.15203. Sizes are those that the authors'
code runs and that give the published numbers of parameters: expansion 4 everywhere and four blocks in the second stage
of B2 and B3, where the paper's table 6 prints 8 and three. `segformer_b0_course` is the printed variant of B0.

What differs: inputs are pixels in [0, 1], and the normalisation is the network's first layer; queries, keys and values
have a linear layer each (`lipcert.models.segformer_official` splits the published ones); nothing happens to the logits
after stride 4. Layer normalisation and dot-product attention leave this network without a Lipschitz bound worth having:
it is the baseline of the segmentation experiments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.errors import InputError
from lipcert.layers import Dropout, DropPath
from lipcert.models.network import Estimated
from lipcert.registry import models

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in [0, 1]


class Normalize(nn.Module):
    """Take the mean of each channel away and divide by its standard deviation; with other than three channels, 1/2."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        mean, std = (MEAN, STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:  # (n, c, h, w) -> (n, c, h, w)
        return (x - self.mean) / self.std


class OverlapPatchMerging(nn.Module):
    """Merge overlapping patches to tokens: a strided convolution that sees its neighbours' pixels, then LayerNorm."""

    def __init__(self, in_dim: int, dim: int, *, size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, size, stride=stride, padding=size // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:  # (n, in_dim, h, w) -> (n, h' w', dim), h', w'
        x = self.proj(x)
        return self.norm(tokens(x)), x.shape[2], x.shape[3]


class EfficientSelfAttention(nn.Module):
    """Multi-head attention whose keys and values come from fewer tokens, equation 2.

    `reduction` r merges r x r tokens by a convolution and LayerNorm; with r = 1 there is neither. What is left over at
    the right and lower border when r doesn't divide the map is not attended to, as in the published code.
    """

    def __init__(self, dim: int, *, heads: int, reduction: int) -> None:
        super().__init__()
        if dim % heads:
            raise InputError(f"{heads} heads do not divide {dim} channels; choose another num_heads or embed_dims")
        self.heads, self.reduction = heads, reduction
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)
        if reduction > 1:
            self.reduce = nn.Conv2d(dim, dim, reduction, stride=reduction)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # (n, height width, dim) -> the same
        few = x if self.reduction == 1 else self.norm(tokens(self.reduce(image(x, height, width))))
        q, k, v = self._split(self.q(x)), self._split(self.k(few)), self._split(self.v(few))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:  # (n, tokens, dim) -> (n, heads, tokens, dim / heads)
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class MixFFN(nn.Module):
    """`MLP(GELU(Conv3x3(MLP(x))))`, equation 3; the depthwise convolution's zero padding is what knows of positions."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # (n, height width, dim) -> the same
        x = self.conv(image(self.fc1(x), height, width))
        return self.fc2(F.gelu(tokens(x)))


class SegFormerBlock(nn.Module):
    """`x <- x + attention(norm(x)); x <- x + ffn(norm(x))`, with stochastic depth on both branches."""

    def __init__(
        self, dim: int, *, heads: int, reduction: int, mlp_ratio: int, drop_path: float, norm_eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = EfficientSelfAttention(dim, heads=heads, reduction=reduction)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.ffn = MixFFN(dim, dim * mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # (n, height width, dim) -> the same
        x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        return x + self.drop_path(self.ffn(self.norm2(x), height, width))


class Stage(nn.Module):
    """Merge patches, mix them in some blocks, normalise."""

    def __init__(self, merge: OverlapPatchMerging, blocks: Sequence[SegFormerBlock], norm: nn.LayerNorm) -> None:
        super().__init__()
        self.merge, self.blocks, self.norm = merge, nn.ModuleList(blocks), norm

    def forward(self, x: Tensor) -> Tensor:  # (n, in_dim, h, w) -> (n, dim, h', w')
        x, height, width = self.merge(x)
        for block in self.blocks:
            x = block(x, height, width)
        return image(self.norm(x), height, width)


class MLPDecoder(nn.Module):
    """Bring all stages to one width and to the first one's size, fuse them, classify each position; equation 4."""

    def __init__(self, dims: Sequence[int], dim: int, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, dim) for width in dims)
        self.fuse = nn.Conv2d(len(dims) * dim, dim, 1, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.dropout = Dropout(dropout)
        self.classifier = nn.Conv2d(dim, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:  # (n, dims[i], h_i, w_i) -> (n, num_classes, h_0, w_0)
        size = maps[0].shape[2:]
        unified = [
            F.interpolate(image(linear(tokens(x)), *x.shape[2:]), size=size, mode="bilinear", align_corners=False)
            for linear, x in zip(self.linears, maps, strict=True)
        ]
        x = self.fuse(torch.cat(unified[::-1], dim=1))  # the published weights have the last stage first
        return self.classifier(self.dropout(F.relu(self.norm(x))))


class SegFormer(Estimated):
    """The network: pixels (n, c, h, w) in [0, 1] -> logits (n, num_classes, ⌈h/4⌉, ⌈w/4⌉). Any size of image."""

    def __init__(self, channels: int, stages: Sequence[Stage], decoder: MLPDecoder) -> None:
        super().__init__()
        self.normalize = Normalize(channels)
        self.stages = nn.ModuleList(stages)
        self.decoder = decoder

    @property
    def head(self) -> nn.Module:  # type: ignore[override]  # the decoder owns it
        return self.decoder.classifier

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the maps of the stages, at strides 4, 8, 16 and 32."""
        x, maps = self.normalize(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.features(x))


def tokens(x: Tensor) -> Tensor:
    """Return a map (n, c, h, w) as tokens (n, h w, c)."""
    return x.flatten(2).transpose(1, 2)


def image(x: Tensor, height: int, width: int) -> Tensor:
    """Return tokens (n, h w, c) as a map (n, c, h, w)."""
    return x.transpose(1, 2).unflatten(2, (height, width))


def segformer(
    *,
    num_classes: int,
    img_size: int,
    in_chans: int,
    embed_dims: Sequence[int],
    depths: Sequence[int],
    decoder_dim: int,
    num_heads: Sequence[int] = (1, 2, 5, 8),
    reductions: Sequence[int] = (8, 4, 2, 1),
    mlp_ratios: Sequence[int] = (4, 4, 4, 4),
    drop_path: float = 0.1,
    dropout: float = 0.1,
    norm_eps: float = 1e-6,
    height: int | None = None,
) -> SegFormer:
    """Build a SegFormer.

    Args:
        img_size, height: sides of the images (None: square); used only to refuse sizes at which a stage has too few
            tokens.
        norm_eps: of the LayerNorms of blocks and stages. 1e-6 as published; transformers runs the same weights with
            1e-5. The LayerNorms after convolutions have 1e-5 everywhere.
    """
    sequences = (embed_dims, depths, num_heads, reductions, mlp_ratios)
    if len({len(values) for values in sequences}) != 1:
        raise InputError("embed_dims, depths, num_heads, reductions and mlp_ratios need one number for each stage")
    side = min(img_size, height or img_size)
    for stage, reduction in enumerate(reductions):
        side = math.ceil(side / (2 if stage else 4))
        if side < reduction:
            raise InputError(
                f"images of {img_size} pixels leave {side} tokens a side in stage {stage + 1}, which reduces by "
                f"{reduction}; use larger images or smaller reductions"
            )
    rates = [drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
    stages = []
    for stage, (before, dim) in enumerate(pairwise((in_chans, *embed_dims))):
        size, stride = (3, 2) if stage else (7, 4)
        blocks = [
            SegFormerBlock(
                dim,
                heads=num_heads[stage],
                reduction=reductions[stage],
                mlp_ratio=mlp_ratios[stage],
                drop_path=rates.pop(0),
                norm_eps=norm_eps,
            )
            for _ in range(depths[stage])
        ]
        merge = OverlapPatchMerging(before, dim, size=size, stride=stride)
        stages.append(Stage(merge, blocks, nn.LayerNorm(dim, eps=norm_eps)))
    network = SegFormer(in_chans, stages, MLPDecoder(embed_dims, decoder_dim, num_classes, dropout=dropout))
    network.apply(_initialise)
    return network


def _initialise(module: nn.Module) -> None:
    """Draw weights as published: linear layers of deviation 0.02, convolutions sqrt(2 / fan out)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


_WIDE = dict(embed_dims=(64, 128, 320, 512), decoder_dim=768)


@models.register(task="segmentation")
def segformer_b0(**kwargs: Any) -> nn.Module:
    """SegFormer-B0: 32 to 256 wide, 2-2-2-2 blocks; 3.7 M parameters."""
    return segformer(**{**dict(embed_dims=(32, 64, 160, 256), depths=(2, 2, 2, 2), decoder_dim=256), **kwargs})


@models.register(task="segmentation")
def segformer_b0_course(**kwargs: Any) -> nn.Module:
    """SegFormer-B0 with the expansions that the paper's table 6 prints, 8-8-4-4; 3.8 M parameters.

    As set in courses: four classes (background, plant, person or animal, vehicle), images of 256 pixels, maps of 64.
    """
    return segformer_b0(**{**dict(mlp_ratios=(8, 8, 4, 4)), **kwargs})


@models.register(task="segmentation")
def segformer_b1(**kwargs: Any) -> nn.Module:
    """SegFormer-B1: 64 to 512 wide, 2-2-2-2 blocks; 13.7 M parameters."""
    return segformer(**{**dict(_WIDE, depths=(2, 2, 2, 2), decoder_dim=256), **kwargs})


@models.register(task="segmentation")
def segformer_b2(**kwargs: Any) -> nn.Module:
    """SegFormer-B2: 64 to 512 wide, 3-4-6-3 blocks; 27.5 M parameters."""
    return segformer(**{**dict(_WIDE, depths=(3, 4, 6, 3)), **kwargs})


@models.register(task="segmentation")
def segformer_b3(**kwargs: Any) -> nn.Module:
    """SegFormer-B3: 64 to 512 wide, 3-4-18-3 blocks; 47.3 M parameters."""
    return segformer(**{**dict(_WIDE, depths=(3, 4, 18, 3)), **kwargs})


@models.register(task="segmentation")
def segformer_b4(**kwargs: Any) -> nn.Module:
    """SegFormer-B4: 64 to 512 wide, 3-8-27-3 blocks; 64.1 M parameters."""
    return segformer(**{**dict(_WIDE, depths=(3, 8, 27, 3)), **kwargs})


@models.register(task="segmentation")
def segformer_b5(**kwargs: Any) -> nn.Module:
    """SegFormer-B5: 64 to 512 wide, 3-6-40-3 blocks; 84.7 M parameters."""
    return segformer(**{**dict(_WIDE, depths=(3, 6, 40, 3)), **kwargs})
