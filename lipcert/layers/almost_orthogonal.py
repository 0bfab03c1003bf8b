"""Linear layers of norm at most 1 by construction: almost-orthogonal (Prach, Lampert, ECCV 2022, arXiv 2208.03160).

With D = diag(Σ_j |WᵀW|_ij)^(-1/2), `W D` has norm at most 1 for every W: Σ_ij |WᵀW|_ij (x_i d_i - x_j d_j)² ≥ 0 is
what that says. Orthogonal columns stay as they are. Differences from the paper: dense layers only, and rows may be
split into blocks, each with a rescaling of its own, as a joint projection to queries, keys and values needs.
"""

from __future__ import annotations

from torch import Tensor, nn

from lipcert.layers.derived import DerivedLinear
from lipcert.layers.precision import own_precision


class AOLLinear(DerivedLinear):
    """Linear layer whose `blocks` equal groups of rows have norm at most 1 each, on the last axis of its input.

    The raw parameter is `raw` (out, in), orthogonal at the start, the effective one the property `weight`.

    >>> import torch
    >>> layer = AOLLinear(4, 4)
    >>> bool(torch.linalg.matrix_norm(layer.weight, 2) <= 1 + 1e-5)
    True
    """

    def __init__(
        self, in_features: int, out_features: int, *, blocks: int = 1, bias: bool = True, device=None, dtype=None
    ) -> None:
        if blocks < 1 or out_features % blocks:
            raise ValueError(f"{blocks} blocks do not divide {out_features} rows")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.blocks = blocks
        for block in self.raw.detach().chunk(blocks):
            nn.init.orthogonal_(block)

    @property
    def weight(self) -> Tensor:  # (out, in)
        with own_precision(self.raw):
            raw = self.raw.unflatten(0, (self.blocks, -1))  # (blocks, out / blocks, in)
            sums = (raw.mT @ raw).abs().sum(1, keepdim=True)  # (blocks, 1, in)
            return (raw * sums.clamp_min(1e-12).rsqrt()).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocks={self.blocks}"
