"""CSwin Transformer, and LipsFormer-CSwin: attention in stripes that cross.

- `cswin_*`: Dong et al., CVPR 2022, arXiv 2107.00652, sizes of its code: half of the heads attend in vertical stripes,
  half in horizontal ones, the last stage to the whole map; values pass a depthwise convolution inside their stripe
  (LePE), which is added. LayerNorm before each branch.
- `lipsformer_cswin_*`: Qi et al., ICLR 2023, arXiv 2304.09856. `lipsformer_cswin_tiny` has the sizes of its code (one
  early version, removed later): patches of 4 and merges of 2 x 2 without overlap, no norm at the end, one CenterNorm a
  block, branches weighted by 0.2 at the start, scale 12, the stripes' output divided by the root of the number of
  heads. No sizes were released for small and base: they are CSwin's. `released=True` leaves values as they are and
  divides rows by max(‖row‖, 1e-12). Otherwise rows are divided by √(‖row‖² + ε), values as well; LePE sees them before.

Left out of the released variant: the first norm of each block, a parameter that its code makes and never uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lipcert.errors import InputError
from lipcert.layers import CenterNorm, DotProductAttention, ScaledCosineAttention
from lipcert.layers.windows import Size, merge, partition
from lipcert.models.lipsformer import LipsFormerBlock, initialise_spectral
from lipcert.models.swin import Stage, SwinBlock, ToLast, WindowNetwork, initialise, rising
from lipcert.registry import models


class Stripes(nn.Module):
    """Cross-shaped window attention on maps (n, h, w, dim).

    Args:
        attention: owns the projections; its heads are shared out evenly.
        windows: of each share of the channels: vertical and horizontal stripes, or one whole map.
        divide: divide the output by the root of the heads of a share, as LipsFormer's code does.
    """

    def __init__(self, attention: DotProductAttention, windows: Sequence[Size], *, divide: bool = False) -> None:
        super().__init__()
        self.attention, self.windows = attention, tuple(windows)
        width, self.heads = attention.dim // len(windows), attention.heads // len(windows)
        self.lepe = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in windows)
        self.factor = self.heads**-0.5 if divide else 1.0

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2])
        shares = [part.chunk(len(self.windows), -1) for part in self.attention.qkv(x).chunk(3, -1)]
        outs = [self._share(i, torch.cat([part[i] for part in shares], -1), size) for i in range(len(self.windows))]
        return self.attention.proj(self.factor * torch.cat(outs, -1))

    def _share(self, i: int, qkv: Tensor, size: Size) -> Tensor:  # (n, h, w, 3 width) -> (n, h, w, width)
        windows = partition(qkv, self.windows[i])  # (n, windows, tokens, 3 width)
        q, k, v = self.attention.rows(windows, heads=self.heads)
        out = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.attention.temperature)
        out = self.attention.weigh(out).transpose(-3, -2).flatten(-2)
        raw = windows.chunk(3, -1)[2]
        image = raw.flatten(0, 1).unflatten(1, self.windows[i]).permute(0, 3, 1, 2)  # (n windows, width, a, b)
        lepe = self.lepe[i](image).permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, raw.shape[:2])
        return merge(out + lepe, self.windows[i], size)

    def extra_repr(self) -> str:
        return f"{self.windows}"


class ConvMerge(nn.Module):
    """A strided convolution to twice the width, then a norm: (n, h, w, c) -> (n, h/2, w/2, 2c)."""

    def __init__(self, dim: int, norm: nn.Module, size: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(dim, 2 * dim, size, stride=2, padding=size // 2 if size % 2 else 0), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def cswin(
    *, num_classes: int, img_size: int, in_chans: int, embed_dim: int = 64, depths: Sequence[int] = (1, 2, 21, 1),
    num_heads: Sequence[int] = (2, 4, 8, 16), splits: Sequence[int] = (1, 2, 7, 7), patch_size: int = 4,
    mlp_ratio: float = 4.0, drop_path: float = 0.2, lipschitz: bool = False, released: bool = False,
    tau: float = 12.0, nu: float = 1.0, eps: float = 1e-6,
) -> WindowNetwork:  # fmt: skip
    """Build CSwin, or LipsFormer-CSwin with `lipschitz`.

    Args:
        splits: width of the stripes in each stage, no more than the map; the last stage, and one whose map is no wider,
            attends to the whole map.
        tau, nu, eps, released: as in `swin`.
    """
    if not len(depths) == len(num_heads) == len(splits):
        raise InputError("depths, num_heads and splits need one number for each stage")
    if img_size % (patch_size * 2 ** (len(depths) - 1)):
        raise InputError(
            f"img_size {img_size} is not a multiple of {patch_size * 2 ** (len(depths) - 1)} "
            f"(patch_size {patch_size}, {len(depths)} stages); choose another patch_size or fewer stages"
        )
    rates = rising(drop_path, sum(depths))
    norm = partial(CenterNorm, axis=-1) if lipschitz else nn.LayerNorm
    if lipschitz:
        patches = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
    else:  # overlapping: 7 x 7 with stride 4, and so on
        patches = nn.Conv2d(in_chans, embed_dim, 2 * patch_size - 1, stride=patch_size, padding=patch_size // 2)
    embed = nn.Sequential(patches, ToLast(), norm(embed_dim))
    stages, sizes, dim, grid = [], [], embed_dim, img_size // patch_size
    for number, (depth, heads, split) in enumerate(zip(depths, num_heads, splits, strict=True)):
        joined = ConvMerge(dim // 2, norm(dim), 2 if lipschitz else 3) if number else None
        whole = split >= grid or number == len(depths) - 1
        windows = [(grid, grid)] if whole else [(grid, split), (split, grid)]
        if dim % heads or heads % len(windows):
            raise InputError(f"{heads} heads do not divide {dim} channels in {len(windows)} kinds of stripes evenly")
        if not whole and grid % split:
            raise InputError(f"stripes {split} wide do not divide a map of {grid}x{grid}; choose other splits")
        blocks: list[nn.Module] = []
        for _ in range(depth):
            rate = rates.pop(0)
            if lipschitz:
                mix = Stripes(_cosine(dim, heads, released, tau, nu, eps), windows, divide=True)
                blocks.append(
                    LipsFormerBlock(
                        dim, mix, alpha=0.2, drop_path=rate, mlp_ratio=mlp_ratio, norm_after_attention=False
                    )
                )
            else:
                mix = Stripes(DotProductAttention(dim, heads), windows)
                blocks.append(SwinBlock(dim, mix, drop_path=rate, mlp_ratio=mlp_ratio))
        stages.append(Stage(joined, blocks))
        sizes.append((grid, windows[0][0] * windows[0][1]))
        if number + 1 < len(depths):
            grid, dim = grid // 2, 2 * dim
    last = nn.Identity() if lipschitz else norm(dim)
    network = WindowNetwork(in_chans, embed, stages, last, nn.Linear(dim, num_classes), sizes)
    network.apply(initialise_spectral if lipschitz else initialise)
    return network


def _cosine(dim: int, heads: int, released: bool, tau: float, nu: float, eps: float) -> ScaledCosineAttention:
    if released:
        return ScaledCosineAttention(dim, heads, tau=12.0, eps=1e-12, clamp=True, values=False)
    return ScaledCosineAttention(dim, heads, tau=tau, nu=nu, eps=eps)


_SMALL = dict(depths=(2, 4, 32, 2), drop_path=0.4)
_BASE = dict(embed_dim=96, depths=(2, 4, 32, 2), num_heads=(4, 8, 16, 32), drop_path=0.5)


@models.register()
def cswin_tiny(**kwargs: Any) -> nn.Module:
    """CSwin-T: 64 wide, 1-2-21-1 blocks."""
    return cswin(**kwargs)


@models.register()
def cswin_small(**kwargs: Any) -> nn.Module:
    """CSwin-S: 64 wide, 2-4-32-2 blocks."""
    return cswin(**{**_SMALL, **kwargs})


@models.register()
def cswin_base(**kwargs: Any) -> nn.Module:
    """CSwin-B: 96 wide, 2-4-32-2 blocks."""
    return cswin(**{**_BASE, **kwargs})


@models.register()
def lipsformer_cswin_tiny(**kwargs: Any) -> nn.Module:
    """LipsFormer-CSwin-T: 64 wide, 1-2-21-1 blocks; 24 M parameters."""
    return cswin(lipschitz=True, **kwargs)


@models.register()
def lipsformer_cswin_small(**kwargs: Any) -> nn.Module:
    """LipsFormer's blocks in the sizes of CSwin-S."""
    return cswin(lipschitz=True, **{**_SMALL, **kwargs})


@models.register()
def lipsformer_cswin_base(**kwargs: Any) -> nn.Module:
    """LipsFormer's blocks in the sizes of CSwin-B."""
    return cswin(lipschitz=True, **{**_BASE, **kwargs})
