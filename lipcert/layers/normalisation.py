"""CenterNorm: layer normalisation without the division that makes LayerNorm steep.

LipsFormer (Qi et al., ICLR 2023, arXiv 2304.09856). The published form multiplies by D/(D-1), which costs that much in
the Lipschitz constant; `correction=False` leaves it out: centring alone is an orthogonal projection, of norm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CenterNorm(nn.Module):
    """Subtract the mean over the channels and apply a learned scale and shift per channel.

    `weight * D/(D-1) * (x - mean) + bias` for inputs (n, D, ...), or (n, ..., D) with `axis=-1`, D >= 2. Affine, of
    norm at most `max|weight| * D/(D-1)`.

    >>> CenterNorm(4)(torch.ones(1, 4, 2, 2)).abs().max().item()
    0.0
    """

    def __init__(self, dim: int, *, correction: bool = True, axis: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        if axis not in (1, -1):
            raise ValueError(f"CenterNorm works along axis 1 or -1, not {axis}")
        if dim < 2:
            raise ValueError(f"CenterNorm needs at least 2 channels, not {dim}: centring one channel leaves nothing")
        self.dim, self.correction, self.axis = dim, correction, axis
        self.factor = dim / (dim - 1) if correction else 1.0
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:  # (n, dim, ...) or (n, ..., dim) -> the same
        shape = (1, self.dim) + (1,) * (x.ndim - 2) if self.axis == 1 else (self.dim,)
        centred = x - x.mean(self.axis, keepdim=True)
        return centred * (self.factor * self.weight).view(shape) + self.bias.view(shape)

    def matrix(self) -> Tensor:
        """Return the linear part as a (dim, dim) matrix, differentiable in the weights."""
        eye = torch.eye(self.dim, device=self.weight.device, dtype=self.weight.dtype)
        return (self.factor * self.weight)[:, None] * (eye - 1 / self.dim)

    def extra_repr(self) -> str:
        return f"{self.dim}, correction={self.correction}" + ("" if self.axis == 1 else f", axis={self.axis}")
