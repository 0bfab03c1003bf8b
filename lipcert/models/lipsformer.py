"""The block of LipsFormer, its initialisation, and what its theorem says of a network.

Qi, Wang, Chen, Shi, Zhang, "LipsFormer", ICLR 2023, arXiv 2304.09856. Made for training without warm-up, not for
certificates: every part is Lipschitz, and nothing holds the constants small. Swin and CSwin share the block, with other
attentions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.layers import CenterNorm, DropPath, ScaledCosineAttention

GELU = 1.1289041499  # the largest slope, rounded up


class MLP(nn.Module):
    """Two linear layers with GELU between, on the last axis."""

    def __init__(self, dim: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, int(dim * ratio)), nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ConvBranch(nn.Module):
    """`gelu(DW7x7(x))`, or `gelu(conv1x1(gelu(DW7x7(x))))` with `mix`; maps have their channels last."""

    def __init__(self, dim: int, *, mix: bool, size: int = 7) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim)
        self.pointwise = nn.Conv2d(dim, dim, 1) if mix else None

    def forward(self, x: Tensor) -> Tensor:  # (n, h, w, dim) -> the same
        x = F.gelu(self.depthwise(x.permute(0, 3, 1, 2)))
        if self.pointwise is not None:
            x = F.gelu(self.pointwise(x))
        return x.permute(0, 2, 3, 1)


class Scale(nn.Module):
    """Weight a residual branch by a learned number per channel."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:  # (..., dim) -> the same
        return self.alpha * x


class LipsFormerBlock(nn.Module):
    """Four weighted residual branches on maps (n, h, w, dim): two of convolutions, attention, MLP; no pre-norm.

    `x += a0 conv(x); x += a1 conv'(x); x += a2 attention(x); x = CN(x); x += a3 mlp(x); x = CN(x)`, each branch with
    stochastic depth. `norm_after_attention=False` leaves out the first CN, as the released CSwin variant does.
    """

    def __init__(
        self, dim: int, attention: nn.Module, *, alpha: float, drop_path: float, mlp_ratio: float = 4.0,
        norm_after_attention: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.convs = nn.ModuleList([ConvBranch(dim, mix=True), ConvBranch(dim, mix=False)])
        self.attn, self.mlp = attention, MLP(dim, mlp_ratio)
        self.norm1 = CenterNorm(dim, axis=-1) if norm_after_attention else nn.Identity()
        self.norm2 = CenterNorm(dim, axis=-1)
        self.scales = nn.ModuleList(Scale(dim, alpha) for _ in range(4))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        for scale, branch in zip(self.scales, [*self.convs, self.attn, self.mlp], strict=True):
            x = x + self.drop_path(scale(branch(x)))
            if branch is self.attn:
                x = self.norm1(x)
        return self.norm2(x)


@torch.no_grad()
def initialise_spectral(module: nn.Module) -> None:
    """Draw the weights of a linear layer or convolution (Xavier) and divide by the norm of the matrix; no biases.

    The matrix of a convolution is (out, in k²): only for 1x1 and patch convolutions its norm is the operator's.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_normal_(module.weight)
        if not module.weight.is_meta:
            matrix = module.weight.flatten(1).double()
            module.weight /= matrix_norm(matrix)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def matrix_norm(matrix: Tensor) -> float:
    """Return the spectral norm of a matrix, computed from the smaller Gram matrix: an estimate, not a bound."""
    matrix = matrix.double()
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram)[-1])))


@torch.no_grad()
def published_bound(
    stages: list[tuple[nn.Module | None, list[LipsFormerBlock], int, int]], outer: float
) -> dict[str, Any]:
    """Evaluate LipsFormer's theorem: ∏ (1 + max|α| Lip(branch)) over all branches, times what is around them.

    The attention of a head counts with theorem 1, `2 ν ε^(-1/2) (N(N-1) τ ‖W_K‖ + (N-1) τ ‖W_Q‖ + N ‖W_V‖)`, and with
    the refinement of arXiv 2510.23012, `ν ε^(-1/2) (N² τ ‖W_K‖ + N τ ‖W_Q‖ + 2N ‖W_V‖)`; heads together with the root
    of the sum of squares and the norm of the projection. Biases of positions do not enter either.

    Args:
        stages: (what comes before, its blocks, side of the map, tokens of a window).
        outer: the product of all other norms.
    """
    values = [outer, outer]
    for before, blocks, side, tokens in stages:
        factor = 1.0 if before is None else _product(before.modules(), side)
        for block in blocks:
            factor *= _product(module for module in (block.norm1, block.norm2))
            for scale, branch in zip(block.scales, [*block.convs, block.attn, block.mlp], strict=True):
                alpha = float(scale.get_parameter("alpha").abs().max())
                if branch is block.attn:
                    attention = next(m for m in branch.modules() if isinstance(m, ScaledCosineAttention))
                    found = attention_theorems(attention, tokens)
                else:
                    gelus = 2 if isinstance(branch, ConvBranch) and branch.pointwise is not None else 1
                    found = (_product(branch.modules(), side) * GELU**gelus,) * 2
                values = [value * (1 + alpha * each) for value, each in zip(values, found, strict=True)]
        values = [value * factor for value in values]
    return {
        "value": values[0],
        "refined": values[1],
        "formula": "prod (1 + max|alpha| Lip(branch)), attention by theorem 1 of arXiv 2304.09856",
        "note": "'refined' has the attention's constant of arXiv 2510.23012. Norms have no error bounds. The"
        "  theorem has normalised values: for the released code, which has none, both are infinite.",
    }


def attention_theorems(attention: ScaledCosineAttention, tokens: int) -> tuple[float, float]:
    """Return LipsFormer's constant of one attention layer with its projection, and the refined one."""
    if not attention.values:
        return math.inf, math.inf
    n, width, squares = tokens, attention.dim // attention.heads, [0.0, 0.0]
    for head in range(attention.heads):
        part = slice(head * width, (head + 1) * width)
        q, k, v = (matrix_norm(third[part]) for third in attention.qkv.weight.chunk(3))
        factor = attention.nu * attention.slope
        published = 2 * factor * (n * (n - 1) * attention.tau * k + (n - 1) * attention.tau * q + n * v)
        refined = factor * (n**2 * attention.tau * k + n * attention.tau * q + 2 * n * v)
        squares = [squares[0] + published**2, squares[1] + refined**2]
    out = matrix_norm(attention.proj.weight)
    return out * math.sqrt(squares[0]), out * math.sqrt(squares[1])


def _product(modules: Iterator[nn.Module], side: int = 1) -> float:
    """Multiply the norms of affine layers: matrices, depthwise convolutions on the torus that holds the map, CN."""
    value = 1.0
    for module in modules:
        if isinstance(module, CenterNorm):
            value *= module.factor * float(module.weight.abs().max())
        elif isinstance(module, nn.Conv2d) and module.groups > 1:
            grid = side + module.kernel_size[0] - 1
            value *= float(torch.fft.fft2(module.weight.double(), s=(grid, grid)).abs().max())
        elif isinstance(module, nn.Conv2d | nn.Linear):
            value *= matrix_norm(module.weight.flatten(1))
    return value
