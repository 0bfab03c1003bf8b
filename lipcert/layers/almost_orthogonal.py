"""Linear layers of norm at most 1 by construction: almost-orthogonal (Prach, Lampert, ECCV 2022, arXiv 2208.03160).

With D = diag(Σ_j |WᵀW|_ij)^(-1/2), `W D` has norm at most 1 for every W: Σ_ij |WᵀW|_ij (x_i d_i - x_j d_j)² ≥ 0 is
what that says. Orthogonal columns stay as they are. Differences from the paper: dense layers only, and rows may be
split into blocks, each with a rescaling of its own, as a joint projection to queries, keys and values needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.layers.precision import own_precision


class AOLLinear(nn.Module):
    """Linear layer whose `blocks` equal groups of rows have norm at most 1 each, on the last axis of its input.

    The raw parameter is `raw` (out, in), orthogonal at the start, the effective one the property `weight`.

    >>> layer = AOLLinear(4, 4)
    >>> bool(torch.linalg.matrix_norm(layer.weight, 2) <= 1 + 1e-5)
    True
    """

    def __init__(
        self, in_features: int, out_features: int, *, blocks: int = 1, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        if blocks < 1 or out_features % blocks:
            raise ValueError(f"{blocks} blocks do not divide {out_features} rows")
        self.in_features, self.out_features, self.blocks = in_features, out_features, blocks
        self.raw = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        for block in self.raw.detach().chunk(blocks):
            nn.init.orthogonal_(block)

    @property
    def weight(self) -> Tensor:  # (out, in)
        with own_precision(self.raw):
            raw = self.raw.unflatten(0, (self.blocks, -1))  # (blocks, out / blocks, in)
            sums = (raw.mT @ raw).abs().sum(1, keepdim=True)  # (blocks, 1, in)
            return (raw * sums.clamp_min(1e-12).rsqrt()).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return F.linear(x, self.weight, self.bias)

    def export(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.detach().clone())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, blocks={self.blocks}, bias={self.bias is not None}"
