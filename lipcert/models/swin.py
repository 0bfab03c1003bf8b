"""Swin Transformer, and LipsFormer-Swin as published: one network, two blocks.

- `swin_*`: Liu et al., ICCV 2021, arXiv 2103.14030, as in torchvision: LayerNorm before each branch, dot-product
  attention in windows that every second block shifts. No Lipschitz bound worth having.
- `lipsformer_swin_*`: Qi et al., ICLR 2023, arXiv 2304.09856: `LipsFormerBlock`, CenterNorm, scaled cosine similarity
  attention, branches weighted by 1/blocks at the start, spectral initialisation.

`released=True` builds what the authors' code computes and their checkpoint fits: values not normalised, ν = 1, τ = 10
fixed, rows divided by max(‖row‖, 1e-12), windows never shifted. Its attention has no global constant. Without it,
values are normalised, rows are divided by √(‖row‖² + ε), and windows shift. From the released code either way: sizes,
the order of branches and norms, numbers of heads, GELU, drop-path rates. Ours, because the paper's text was not at
hand: τ = 10, ν = 1 and ε = 1e-6 of the published form, all of them arguments.

Maps have their channels last. Inputs are pixels in [0, 1]; the normalisation of ImageNet is the first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lipcert.errors import InputError
from lipcert.layers import CenterNorm, DotProductAttention, DropPath, ScaledCosineAttention, WindowMix
from lipcert.models.lipsformer import MLP, LipsFormerBlock, initialise_spectral, matrix_norm, published_bound
from lipcert.models.network import Estimated
from lipcert.models.segformer import Normalize
from lipcert.registry import models


class ToLast(nn.Module):
    """(n, c, h, w) -> (n, h, w, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class PatchMerging(nn.Module):
    """Concatenate 2 x 2 neighbours (down first), normalise, map to twice the width: (n, h, w, c) -> (n, h/2, w/2, 2c).

    Odd sides are padded with zeros.
    """

    def __init__(self, dim: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.reduction = norm, nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        if h % 2 or w % 2:
            x = nn.functional.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class SwinBlock(nn.Module):
    """`x += attention(norm(x)); x += mlp(norm(x))` on maps (n, h, w, dim), with stochastic depth."""

    def __init__(self, dim: int, attention: nn.Module, *, drop_path: float, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = attention, MLP(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """What changes the size of the map (first stage: nothing), then blocks."""

    def __init__(self, merge: nn.Module | None, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.merge, self.blocks = merge, nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x if self.merge is None else self.merge(x))


class WindowNetwork(Estimated):
    """Pixels (n, c, h, w) in [0, 1] -> logits: normalise, patches, stages, norm, mean over the map, linear head.

    Args:
        windows: (side of the map, tokens that see each other) of each stage, for `published_bound`.
    """

    published_slow = False

    def __init__(
        self, channels: int, embed: nn.Module, stages: Sequence[Stage], norm: nn.Module, head: nn.Linear,
        windows: Sequence[tuple[int, int]],
    ) -> None:  # fmt: skip
        super().__init__()
        self.normalize, self.embed, self.stages = Normalize(channels), embed, nn.ModuleList(stages)
        self.norm, self.head = norm, head
        self.windows = tuple(windows)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(self.normalize(x))
        for stage in self.stages:
            x = stage(x)
        return self.head(self.norm(x).mean((1, 2)))

    def published_bound(self) -> dict[str, Any] | None:
        """Return what LipsFormer's theorem says of the features, pixels to head input; None for other blocks."""
        stages = [stage for stage in self.stages if isinstance(stage, Stage)]
        blocks = [[block for block in stage.blocks if isinstance(block, LipsFormerBlock)] for stage in stages]
        if not any(blocks):
            return None
        outer = float(self.normalize.std.min()) ** -1 / self.windows[-1][0]  # the mean over s x s positions: 1/s
        for module in [*self.embed.modules(), self.norm]:
            if isinstance(module, CenterNorm):
                outer *= module.factor * float(module.weight.detach().abs().max())
            elif isinstance(module, nn.Conv2d):
                outer *= matrix_norm(module.weight.detach().flatten(1))
        rows = zip(stages, blocks, self.windows, strict=True)
        return published_bound([(stage.merge, inner, *sizes) for stage, inner, sizes in rows], outer)


def rising(last: float, count: int) -> list[float]:
    """Return `count` rates of stochastic depth from 0 to `last` in equal steps."""
    return [last * i / max(1, count - 1) for i in range(count)]


def initialise(module: nn.Module) -> None:
    """Draw the weights of a linear layer or convolution with deviation 0.02; no biases."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def swin(
    *, num_classes: int, img_size: int, in_chans: int, embed_dim: int = 96, depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (3, 6, 12, 24), window_size: int = 7, patch_size: int = 4, mlp_ratio: float = 4.0,
    drop_path: float = 0.2, lipschitz: bool = False, released: bool = False, tau: float = 10.0, nu: float = 1.0,
    eps: float = 1e-6,
) -> WindowNetwork:  # fmt: skip
    """Build Swin, or LipsFormer-Swin with `lipschitz`.

    Args:
        window_size: side of the windows; LipsFormer's are no larger than the map.
        released: as LipsFormer's code rather than its paper, see above.
        tau, nu, eps: of LipsFormer's attention as published.
    """
    if len(depths) != len(num_heads):
        raise InputError(f"{len(depths)} depths and {len(num_heads)} num_heads; each stage needs one of both")
    grid = img_size // patch_size
    if grid < 2 ** (len(depths) - 1):
        raise InputError(
            f"images of {img_size} pixels in patches of {patch_size} leave nothing for {len(depths)} stages; "
            "use larger images, a smaller patch_size or fewer depths"
        )
    rates, total = rising(drop_path, sum(depths)), sum(depths)
    norm = partial(CenterNorm, axis=-1) if lipschitz else nn.LayerNorm
    embed = nn.Sequential(nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size), ToLast(), norm(embed_dim))
    stages, windows, dim = [], [], embed_dim
    for number, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
        if dim % heads:
            raise InputError(f"{heads} heads do not divide {dim} channels; choose another num_heads or embed_dim")
        merge = PatchMerging(dim // 2, norm(2 * dim)) if number else None
        side = min(window_size, grid) if lipschitz else window_size
        blocks: list[nn.Module] = []
        for i in range(depth):
            shift = i % 2 == 1 and not (lipschitz and released)
            rate = rates.pop(0)
            if lipschitz:
                mix = WindowMix(_cosine(dim, heads, side, released, tau, nu, eps), (side, side), shift=shift)
                blocks.append(LipsFormerBlock(dim, mix, alpha=1 / total, drop_path=rate, mlp_ratio=mlp_ratio))
            else:
                mix = WindowMix(DotProductAttention(dim, heads, window=(side, side)), (side, side), shift=shift)
                blocks.append(SwinBlock(dim, mix, drop_path=rate, mlp_ratio=mlp_ratio))
        stages.append(Stage(merge, blocks))
        windows.append((grid, side * side))
        if number + 1 < len(depths):
            grid, dim = (grid + 1) // 2, 2 * dim
    network = WindowNetwork(in_chans, embed, stages, norm(dim), nn.Linear(dim, num_classes), windows)
    network.apply(initialise_spectral if lipschitz else initialise)
    return network


def _cosine(
    dim: int, heads: int, side: int, released: bool, tau: float, nu: float, eps: float
) -> ScaledCosineAttention:
    window = (side, side)
    if released:
        return ScaledCosineAttention(dim, heads, tau=10.0, eps=1e-12, clamp=True, values=False, window=window)
    return ScaledCosineAttention(dim, heads, tau=tau, nu=nu, eps=eps, window=window)


_SMALL = dict(depths=(2, 2, 18, 2), drop_path=0.3)
_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path=0.5)


@models.register()
def swin_tiny(**kwargs: Any) -> nn.Module:
    """Swin-T: 96 wide, 2-2-6-2 blocks; 28.3 M parameters."""
    return swin(**kwargs)


@models.register()
def swin_small(**kwargs: Any) -> nn.Module:
    """Swin-S: 96 wide, 2-2-18-2 blocks; 49.6 M parameters."""
    return swin(**{**_SMALL, **kwargs})


@models.register()
def swin_base(**kwargs: Any) -> nn.Module:
    """Swin-B: 128 wide, 2-2-18-2 blocks; 87.8 M parameters."""
    return swin(**{**_BASE, **kwargs})


@models.register()
def lipsformer_swin_tiny(**kwargs: Any) -> nn.Module:
    """LipsFormer-Swin-T: 96 wide, 2-2-6-2 blocks; 30.9 M parameters."""
    return swin(lipschitz=True, **kwargs)


@models.register()
def lipsformer_swin_small(**kwargs: Any) -> nn.Module:
    """LipsFormer-Swin-S: 96 wide, 2-2-18-2 blocks; 54.5 M parameters."""
    return swin(lipschitz=True, **{**_SMALL, **kwargs})


@models.register()
def lipsformer_swin_base(**kwargs: Any) -> nn.Module:
    """LipsFormer-Swin-B: 128 wide, 2-2-18-2 blocks; 96.0 M parameters."""
    return swin(lipschitz=True, **{**_BASE, **kwargs})
