"""ShiftViT, LipShiFT as published, and LipShiFT corrected: one network, three sets of parts.

- `shiftvit_*`: Wang et al., "When Shift Operation Meets Vision Transformer", AAAI 2022, arXiv 2201.10801. GroupNorm,
  GELU MLP; no Lipschitz bound worth having. The speed baseline.
- `lipshift_paper`: Menon, Franco, Günnemann, "LipShiFT", arXiv 2503.14751, sizes and details as in its released
  code: CenterNorm, one LiResConv per block, MaxMin, normalised head; patch convolutions padded by one, so that grids
  are odd and the last pooling leaves out a border (`padding_quirk`).
- `lipshift_*`: ours. Differences: the residual is linear (`MaxMin(x + s K x)`, bounded as one operator), the shift
  is circular, so the skip path loses nothing, nothing is padded at patch borders, and a dense layer over the last
  map replaces average pooling. `benchmarks/ablation.py` measures what each of these is worth.

Inputs are pixels in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.errors import InputError
from lipcert.layers import AvgPool2d, CenterNorm, Dropout, L2Pool2d, MaxMin, NormalizedLinear
from lipcert.models.network import PartNetwork
from lipcert.models.parts import Affine, LinearShiftBlock, LipShiFTBlock, Part, ShiftBlock, ShiftMix
from lipcert.registry import models


class Center(Part):
    """Subtract the middle of the pixel range: a translation."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5


class Activation(Part):
    def __init__(self) -> None:
        super().__init__()
        self.activation = MaxMin()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x)


class L2Pool(Part):
    """Euclidean pooling over the whole map; 1-Lipschitz."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.pool = L2Pool2d(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


def shiftvit(
    *,
    num_classes: int,
    img_size: int,
    in_chans: int,
    embed_dim: int,
    depths: Sequence[int],
    mlp_ratio: float,
    drop_path: float,
    divisor: int,
    patch_size: int = 4,
) -> PartNetwork:
    """Build the original ShiftViT."""
    rates = _rising(drop_path, sum(depths))
    parts: list[Part | nn.Module] = [
        nn.Sequential(patch_convolution(in_chans, embed_dim, patch_size, img_size), nn.GroupNorm(1, embed_dim))
    ]
    dim, grid = embed_dim, img_size // patch_size
    for stage, depth in enumerate(depths):
        if stage:
            parts.append(nn.Sequential(nn.GroupNorm(1, dim), patch_convolution(dim, 2 * dim, 2, grid, bias=False)))
            dim, grid = 2 * dim, grid // 2
        parts += [ShiftBlock(dim, mlp_ratio=mlp_ratio, drop_path=rates.pop(0), divisor=divisor) for _ in range(depth)]
    parts.append(nn.Sequential(nn.GroupNorm(1, dim), nn.AdaptiveAvgPool2d(1)))
    network = PartNetwork(parts, nn.Linear(dim, num_classes))
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def patch_convolution(
    in_dim: int, out_dim: int, size: int, grid: int, *, bias: bool = True, padding: int = 0
) -> nn.Conv2d:
    """A patch convolution: kernel = stride = `size`; orthogonal at the start."""
    if grid < size:
        raise InputError(
            f"patches of {size}x{size} do not fit a {grid}x{grid} map; use larger images or a smaller patch_size"
        )
    conv = nn.Conv2d(in_dim, out_dim, size, stride=size, padding=padding, bias=bias)
    nn.init.orthogonal_(conv.weight.view(out_dim, -1))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class LipShiFTPaper(PartNetwork):
    """LipShiFT as published, with the constant that its authors' formula gives at evaluation."""

    published_slow = True  # 200 convolutions for each block, on a grid of 32 x 32 whatever the width

    def __init__(self, parts: Sequence[Part | nn.Module], head: NormalizedLinear, dropout: float) -> None:
        super().__init__(parts, head)
        self.dropout = dropout

    def published_bound(self) -> dict[str, Any]:
        """Evaluate the released code's formula: a product of power iterations with dropout factors that inference
        does not have.

        Each convolution counts with 100 power iterations from a constant start on a fixed 32 x 32 grid; each block with
        `1 + (1 - drop_path) * s2 * c * (1 + s1 * norm)`; the whole with `1 - dropout`. The last two make it too small.
        """
        value = 1.0 - self.dropout
        with torch.no_grad():
            for part in self._parts():
                if isinstance(part, LipShiFTBlock):
                    inner = 1 + part.residual.scale.abs().max().item() * _published_norm(part.residual.branch, 1, 1)
                    branch = part.scale.abs().max().item() * _published_center(part.norm) * inner
                    value *= 1 + (1 - part.drop_path.rate) * branch
                elif isinstance(part, Affine):
                    for module in part.map:
                        if isinstance(module, CenterNorm):
                            value *= _published_center(module)
                        elif isinstance(module, nn.Conv2d):
                            value *= _published_norm(module.weight, module.stride[0], int(module.padding[0]))
                        elif isinstance(module, AvgPool2d):
                            value *= module.factor
        return {
            "value": value,
            "formula": "(1 - dropout) * prod [1 + (1 - drop_path) s2 c (1 + s1 sigma)] * ..., sigma by power iteration",
            "note": "The factors 1 - dropout and 1 - drop_path belong to no network at inference, and power iteration "
            "approaches a norm from below: this value is not a bound.",
        }


def _published_center(norm: CenterNorm) -> float:
    return norm.factor * norm.weight.abs().max().item()


def _published_norm(weight: Tensor, stride: int, padding: int, iterations: int = 100) -> float:
    x = weight.new_ones(1, weight.shape[1], 32, 32)
    for _ in range(iterations):
        x = x / torch.linalg.vector_norm(x).clamp_min(1e-12)
        y = F.conv2d(x, weight, stride=stride, padding=padding)
        size = 32 - ((y.shape[2] - 1) * stride - 2 * padding + weight.shape[2])
        x = F.conv_transpose2d(y, weight, stride=stride, padding=padding, output_padding=size)
    x = x / torch.linalg.vector_norm(x).clamp_min(1e-12)
    return torch.linalg.vector_norm(F.conv2d(x, weight, stride=stride, padding=padding)).item()


def lipshift_published(
    *,
    num_classes: int,
    img_size: int,
    in_chans: int,
    embed_dim: int = 96,
    depths: Sequence[int] = (6, 6, 10, 6),
    scale: float = 0.2,
    dropout: float = 0.4,
    drop_path: float = 0.2,
    divisor: int = 12,
    padding_quirk: bool = True,
) -> LipShiFTPaper:
    """Build LipShiFT as released. `padding_quirk` pads every patch convolution by one, as its code does by accident."""
    padding = 1 if padding_quirk else 0
    rates = _rising(drop_path, sum(depths))
    dim, grid = embed_dim, (img_size + 2 * padding) // 2
    parts: list[Part | nn.Module] = [
        Affine(
            (in_chans, img_size, img_size),
            patch_convolution(in_chans, dim, 2, img_size, padding=padding),
            CenterNorm(dim),
        ),
        Dropout(dropout),
    ]
    for stage, depth in enumerate(depths):
        if stage:
            merge = patch_convolution(dim, 2 * dim, 2, grid, bias=False, padding=padding)
            parts.append(Affine((dim, grid, grid), CenterNorm(dim), merge))
            dim, grid = 2 * dim, (grid + 2 * padding) // 2
        parts += [
            LipShiFTBlock((dim, grid, grid), scale=scale, drop_path=rates.pop(0), divisor=divisor, circular_shift=False)
            for _ in range(depth)
        ]
    pool = {32: 2, 64: 4, 224: 8}.get(img_size, grid)  # the released configurations; elsewhere the whole map
    pool = min(pool, grid)
    parts.append(Affine((dim, grid, grid), CenterNorm(dim), AvgPool2d(pool)))
    features = dim * (grid // pool) ** 2
    return LipShiFTPaper(parts, NormalizedLinear(features, num_classes), dropout)


def lipshift(
    *,
    num_classes: int,
    img_size: int,
    in_chans: int,
    embed_dim: int,
    depths: Sequence[int],
    patch_size: int | None = None,
    residual: str = "linear",
    kernel_size: int = 3,
    shift: str = "circular",
    center: bool = True,
    circular: bool = False,
    scale: float = 0.2,
    divisor: int = 12,
    neck: int = 512,
    neck_depth: int = 0,
    pool: str = "l2",
) -> PartNetwork:
    """Build our LipShiFT.

    Args:
        depths: blocks per stage; between two stages 2x2 patches merge and the width doubles.
        patch_size: side of the first patches; None chooses the largest power of two that leaves the last stage a
        grid of at
            least 4 (7 if there is one stage): 4 for 28 and 32 pixels, 8 for 64, 32 for 224.
        residual: "linear" (`LinearShiftBlock`) or "published" (`LipShiFTBlock`).
        shift: "circular", "branch" or "zero", see `ShiftMix`.
        neck: width of the dense layer over the last map; 0 pools instead (`pool`: "l2" or "avg").
        neck_depth: linear residual dense blocks after the neck.
    """
    stages = len(depths)
    patch = fitting_patch(img_size, stages, patch_size)
    dim, grid = embed_dim, img_size // patch
    parts: list[Part | nn.Module] = [
        Center(),
        Affine((in_chans, img_size, img_size), patch_convolution(in_chans, dim, patch, img_size)),
    ]
    for stage, depth in enumerate(depths):
        if stage:
            parts.append(Affine((dim, grid, grid), patch_convolution(dim, 2 * dim, 2, grid)))
            dim, grid = 2 * dim, grid // 2
        for _ in range(depth):
            shape = (dim, grid, grid)
            if residual == "linear":
                mix = ShiftMix(
                    dim, kernel_size, scale=scale, shift=shift, divisor=divisor, center=center, circular=circular
                )
                parts.append(LinearShiftBlock(shape, mix))
            elif residual == "published":
                parts.append(
                    LipShiFTBlock(shape, scale=scale, drop_path=0.0, divisor=divisor, circular_shift=shift != "zero")
                )
            else:
                raise InputError(f"residual must be linear or published, not {residual!r}")
    if neck:
        parts += [Affine((dim, grid, grid), patch_convolution(dim, neck, grid, grid)), Activation()]
        dim = neck
        for _ in range(neck_depth):
            mix = ShiftMix(dim, 1, scale=scale, shift="circular", divisor=divisor, center=False, circular=False)
            parts.append(LinearShiftBlock((dim, 1, 1), mix))
    elif pool == "avg":
        parts.append(Affine((dim, grid, grid), AvgPool2d(grid)))
    elif pool == "l2":
        parts.append(L2Pool(grid))
    else:
        raise InputError(f"pool must be avg or l2, not {pool!r}")
    return PartNetwork(parts, NormalizedLinear(dim, num_classes))


def _rising(last: float, count: int) -> list[float]:
    """Return `count` rates from 0 to `last` in equal steps."""
    return [last * i / max(1, count - 1) for i in range(count)]


def fitting_patch(img_size: int, stages: int, patch_size: int | None) -> int:
    """Return the side of the first patches, chosen if None; images that it does not cut evenly raise InputError."""
    patch = patch_size or _largest_patch(img_size, stages)
    if img_size % (patch * 2 ** (stages - 1)):
        raise InputError(
            f"img_size {img_size} is not a multiple of {patch * 2 ** (stages - 1)} "
            f"(patch_size {patch}, {stages} stages); choose another patch_size or fewer stages"
        )
    return patch


def _largest_patch(img_size: int, stages: int) -> int:
    least = 7 if stages == 1 else 4  # one stage has to look at the picture in some detail by itself
    last = img_size // 2 ** (stages - 1)  # grid of the last stage with patches of 1
    patch = 1
    while last % (2 * patch) == 0 and last // (2 * patch) >= least:
        patch *= 2
    return patch


@models.register()
def shiftvit_tiny(**kwargs: Any) -> nn.Module:
    """ShiftViT-T: 96 wide, 6-8-18-6 blocks."""
    return shiftvit(**{**dict(embed_dim=96, depths=(6, 8, 18, 6), mlp_ratio=2, drop_path=0.2, divisor=12), **kwargs})


@models.register()
def shiftvit_small(**kwargs: Any) -> nn.Module:
    """ShiftViT-S: 96 wide, 10-18-36-10 blocks."""
    return shiftvit(**{**dict(embed_dim=96, depths=(10, 18, 36, 10), mlp_ratio=2, drop_path=0.4, divisor=12), **kwargs})


@models.register()
def shiftvit_base(**kwargs: Any) -> nn.Module:
    """ShiftViT-B: 128 wide, 10-18-36-10 blocks."""
    return shiftvit(
        **{**dict(embed_dim=128, depths=(10, 18, 36, 10), mlp_ratio=2, drop_path=0.6, divisor=16), **kwargs}
    )


@models.register()
def lipshift_paper(**kwargs: Any) -> nn.Module:
    """LipShiFT as published: 96 wide, 6-6-10-6 blocks, scale 0.2."""
    return lipshift_published(**kwargs)


@models.register()
def lipshift_tiny(**kwargs: Any) -> nn.Module:
    """Our LipShiFT for small images and small budgets: 128 wide, 4 blocks, one stage, a dense layer of 512."""
    return lipshift(**{**dict(embed_dim=128, depths=(4,)), **kwargs})


@models.register()
def lipshift_small(**kwargs: Any) -> nn.Module:
    """Our LipShiFT, two stages: 128 and 256 wide, 4 and 6 blocks, a dense layer of 1024 and two after it."""
    return lipshift(**{**dict(embed_dim=128, depths=(4, 6), neck=1024, neck_depth=2), **kwargs})


@models.register()
def lipshift_base(**kwargs: Any) -> nn.Module:
    """Our LipShiFT, three stages: 128, 256 and 512 wide, 4-6-10 blocks, a dense layer of 2048 and four after it."""
    return lipshift(**{**dict(embed_dim=128, depths=(4, 6, 10), neck=2048, neck_depth=4), **kwargs})
