"""Linear residual convolutions: LiResConv (Hu et al., NeurIPS 2023, arXiv 2301.12549) and the two residual forms of
LipShiFT.

A residual branch without a nonlinearity is one linear operator together with its shortcut. Its norm is that of `I +
sW`, which is close to 1 for small `s`, and not `1 + s||W||`. Differences from the paper: the scale is learned per
channel (as in LipShiFT), and a CenterNorm in front belongs to the same operator.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.layers.precision import own_precision


class LiResConv(nn.Module):
    """`x + scale * conv(x)`, computed as one convolution with the kernel `I + scale * W`.

    Args:
        kernel_size: odd, so that the shortcut has a centre tap.
        scale: initial value of the learned scale, one per channel.
        circular: wrap at the border instead of padding with zeros.
    """

    def __init__(
        self, dim: int, kernel_size: int = 3, *, scale: float = 0.2, circular: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"LiResConv needs an odd kernel size, not {kernel_size}")
        self.dim, self.kernel_size, self.circular = dim, kernel_size, circular
        factory = {"device": device, "dtype": dtype}
        self.branch = nn.Parameter(torch.empty(dim, dim, kernel_size, kernel_size, **factory))
        self.scale = nn.Parameter(torch.full((dim,), scale, **factory))
        self.bias = nn.Parameter(torch.zeros(dim, **factory))
        nn.init.orthogonal_(self.branch.view(dim, -1))

    @property
    def weight(self) -> Tensor:  # (dim, dim, k, k)
        with own_precision(self.branch):
            eye = torch.eye(self.dim, device=self.branch.device, dtype=self.branch.dtype)
            pad = self.kernel_size // 2
            return F.pad(eye[:, :, None, None], (pad, pad, pad, pad)) + self.scale.view(-1, 1, 1, 1) * self.branch

    def forward(self, x: Tensor) -> Tensor:  # (n, dim, h, w) -> (n, dim, h, w)
        return convolve(x, self.weight, self.bias, self.circular)

    def export(self) -> nn.Module:
        pad = self.kernel_size // 2
        conv = nn.Conv2d(
            self.dim,
            self.dim,
            self.kernel_size,
            padding=pad,
            device="meta",
            padding_mode="circular" if self.circular else "zeros",
        )
        conv.weight = nn.Parameter(self.weight.detach().clone())
        conv.bias = nn.Parameter(self.bias.detach().clone())
        return conv

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.kernel_size}, circular={self.circular}"


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, circular: bool) -> Tensor:
    """Convolve at stride 1 so that the output has the input's size, wrapping or padding with zeros."""
    pad = weight.shape[-1] // 2
    if circular and pad:
        return F.conv2d(F.pad(x, (pad, pad, pad, pad), mode="circular"), weight, bias)
    return F.conv2d(x, weight, bias, padding=pad)
