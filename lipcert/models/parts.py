"""The blocks of ShiftViT and of its Lipschitz relatives: same place in the network, other parts.

A block tells the training-time estimate about itself in two methods: `segments()`, its affine pieces whose norms
power iteration estimates, and `lipschitz(norms)`, how these norms compose to an estimate of the whole block.
Certificates use neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.errors import InputError
from lipcert.layers import CenterNorm, DropPath, LiResConv, MaxMin, Shift, convolve
from lipcert.layers.power import Segment
from lipcert.layers.precision import own_precision


class Part(nn.Module):
    """A piece of a network with a training-time Lipschitz estimate. The default: no segment, nonexpansive."""

    def segments(self) -> list[Segment]:
        return []

    def lipschitz(self, norms: Sequence[Tensor]) -> Tensor | float:
        return 1.0


class Affine(Part):
    """A part that is one affine map, made of the given modules in order; its estimate is its norm."""

    def __init__(self, in_shape: tuple[int, ...], *modules: nn.Module) -> None:
        super().__init__()
        self.in_shape = in_shape
        self.map = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)

    def segments(self) -> list[Segment]:
        return [(self.map, self.in_shape)]

    def lipschitz(self, norms: Sequence[Tensor]) -> Tensor:
        return norms[0]


class MeanPart(Part):
    """A part `(1 - a) x + a f(x)` with a learned in (0, 1): no steeper than the steeper of both.

    Args:
        start: a before training.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        if not 0 < start < 1:
            raise InputError(f"the weight of a {type(self).__name__} must start in (0, 1), not at {start}")
        self.weight = nn.Parameter(torch.tensor(math.log(start / (1 - start))))

    @property
    def share(self) -> Tensor:
        """Return a, the weight of the branch."""
        return torch.sigmoid(self.weight)

    def mean(self, x: Tensor | float, y: Tensor) -> Tensor:
        """Return `(1 - a) x + a y`: of values, or of the constants 1 and that of f."""
        return (1 - self.share) * x + self.share * y


class Chunk(nn.Module):
    """One of several equal parts of a joint projection, as an affine module of its own for the power iteration."""

    def __init__(self, linear: nn.Module, count: int, number: int) -> None:
        super().__init__()
        self.linear, self.count, self.number = linear, count, number

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.linear.weight
        return F.linear(x, weight.chunk(self.count)[self.number])

    def extra_repr(self) -> str:
        return f"{self.number} of {self.count}"


class ShiftBlock(Part):
    """ShiftViT's block: `x <- shift(x); x <- x + drop_path(mlp(norm(x)))`, with GroupNorm and a GELU MLP of 1x1
    convolutions."""

    def __init__(self, dim: int, *, mlp_ratio: float, drop_path: float, divisor: int) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.shift = Shift(dim, divisor=divisor, circular=False)
        self.norm = nn.GroupNorm(1, dim)
        self.mlp = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (n, dim, h, w) -> (n, dim, h, w)
        x = self.shift(x)
        return x + self.drop_path(self.mlp(self.norm(x)))

    def lipschitz(self, norms: Sequence[Tensor]) -> Tensor:
        raise InputError("a ShiftViT block has no useful Lipschitz estimate; train it with --loss cross_entropy")


class LipShiFTBlock(Part):
    """LipShiFT's block as published: `x <- shift(x); x <- x + drop_path(s2 * MaxMin((I + s1 W) CenterNorm(x)))`.

    Estimate: `1 + max|s2| * ||(I + s1 W) CenterNorm||`, the branch bounded as one operator. No drop-path factor: at
    inference there is none.
    """

    def __init__(
        self, in_shape: tuple[int, int, int], *, scale: float, drop_path: float, divisor: int, circular_shift: bool
    ) -> None:
        super().__init__()
        dim = in_shape[0]
        self.in_shape = in_shape
        self.shift = Shift(dim, divisor=divisor, circular=circular_shift)
        self.norm = CenterNorm(dim)
        self.residual = LiResConv(dim, scale=scale)
        self.activation = MaxMin()
        self.scale = nn.Parameter(torch.full((dim,), scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (n, dim, h, w) -> (n, dim, h, w)
        x = self.shift(x)
        return x + self.drop_path(self.scale.view(1, -1, 1, 1) * self.activation(self.residual(self.norm(x))))

    def segments(self) -> list[Segment]:
        return [(nn.Sequential(self.norm, self.residual), self.in_shape)]

    def lipschitz(self, norms: Sequence[Tensor]) -> Tensor:
        return 1 + self.scale.abs().amax() * norms[0]


class ShiftMix(nn.Module):
    """The affine half of our block, `x + s * conv(center(shift(x)))`, computed as few operations as possible.

    Centring over the input channels is a projection applied to the kernel, once per step instead of once per pixel;
    the scale and, where the shift stands before the shortcut, the identity are folded into the kernel as well.

    Args:
        shift: "circular" (whole input, an isometry), "branch" (circular, inside the branch only) or "zero" (whole
        input,
            zero-filled, as published).
        circular: wrap the convolution at the border instead of padding with zeros.
    """

    def __init__(
        self, dim: int, kernel_size: int, *, scale: float, shift: str, divisor: int, center: bool, circular: bool
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise InputError(f"kernel_size must be odd, not {kernel_size}")
        if shift not in ("circular", "branch", "zero"):
            raise InputError(f"shift must be circular, branch or zero, not {shift!r}")
        self.dim, self.kernel_size, self.mode = dim, kernel_size, shift
        self.center, self.circular = center, circular
        self.shift = Shift(dim, divisor=divisor, circular=shift != "zero")
        self.branch = nn.Parameter(torch.empty(dim, dim, kernel_size, kernel_size))
        self.scale = nn.Parameter(torch.full((dim,), scale))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.orthogonal_(self.branch.view(dim, -1))

    @property
    def weight(self) -> Tensor:  # (dim, dim, k, k)
        with own_precision(self.branch):
            weight = self.scale.view(-1, 1, 1, 1) * self.branch
            if self.center:
                weight = weight - weight.mean(1, keepdim=True)
            if self.mode == "branch":
                return weight
            pad = self.kernel_size // 2
            eye = torch.eye(self.dim, device=weight.device, dtype=weight.dtype)
            return weight + F.pad(eye[:, :, None, None], (pad, pad, pad, pad))

    def forward(self, x: Tensor) -> Tensor:  # (n, dim, h, w) -> (n, dim, h, w)
        mixed = convolve(self.shift(x), self.weight, self.bias, self.circular)
        return x + mixed if self.mode == "branch" else mixed

    def export(self) -> nn.Module:
        return _PlainShiftMix(self)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.kernel_size}, {self.mode}, center={self.center}, circular={self.circular}"


class _PlainShiftMix(nn.Module):
    """`ShiftMix` with its kernel computed once."""

    def __init__(self, source: ShiftMix) -> None:
        super().__init__()
        self.shortcut = source.mode == "branch"
        self.shift = source.shift
        self.conv = nn.Conv2d(
            source.dim,
            source.dim,
            source.kernel_size,
            padding=source.kernel_size // 2,
            padding_mode="circular" if source.circular else "zeros",
            device="meta",
        )
        self.conv.weight = nn.Parameter(source.weight.detach().clone())
        self.conv.bias = nn.Parameter(source.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.conv(self.shift(x))
        return x + mixed if self.shortcut else mixed


class LinearShiftBlock(Part):
    """Our block: a linear residual and then the activation, `x <- MaxMin(x + s * conv(center(shift(x))))`.

    The shortcut and the branch are one operator `I + sK`, bounded as one: near 1, where the published block pays 1 +
    s||K||.
    """

    def __init__(self, in_shape: tuple[int, int, int], mix: ShiftMix) -> None:
        super().__init__()
        self.in_shape = in_shape
        self.mix = mix
        self.activation = MaxMin()

    def forward(self, x: Tensor) -> Tensor:  # (n, dim, h, w) -> (n, dim, h, w)
        return self.activation(self.mix(x))

    def segments(self) -> list[Segment]:
        return [(self.mix, self.in_shape)]

    def lipschitz(self, norms: Sequence[Tensor]) -> Tensor:
        return norms[0]
