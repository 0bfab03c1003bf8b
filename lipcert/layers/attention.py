"""Softmax attention over tokens: of dot products, and of scaled cosine similarities.

LipsFormer (Qi et al., ICLR 2023, arXiv 2304.09856): rows of queries, keys and values are divided by √(‖row‖² + ε), and

    ν softmax(τ Q Kᵀ + B) V.

With ε > 0 this is Lipschitz everywhere. Its bound is proved by `lipcert.bounds.attention`; `estimate` here is the same
formula for training. Options reach what the paper's released code does instead: values as they are (`values=False`; no
global constant then), rows divided by max(‖row‖, ε) with ε = 1e-12 (`clamp=True`), ν = 1. Dot-product attention has no
Lipschitz constant on an unbounded set.

A whole map is one window. B are learned biases by relative position, if a window is named; masks are added to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.layers.almost_orthogonal import AOLLinear
from lipcert.layers.precision import own_precision
from lipcert.layers.windows import Size, relative_index


class DotProductAttention(nn.Module):
    """Multi-head attention `softmax(Q Kᵀ / √d + B) V`, then a projection: tokens (n, ..., tokens, dim) -> the same.

    Args:
        window: high and wide; gives the table of position biases, (relative positions, heads). None: no biases.
        bias: of queries, keys and values.

    >>> DotProductAttention(8, 2, window=(2, 2))(torch.ones(1, 3, 4, 8)).shape
    torch.Size([1, 3, 4, 8])
    """

    index: Tensor

    def __init__(self, dim: int, heads: int, *, window: Size | None = None, bias: bool = True) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{heads} heads do not divide {dim} channels")
        self.dim, self.heads, self.window = dim, heads, window
        self.qkv: nn.Linear | AOLLinear = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj: nn.Linear | AOLLinear = nn.Linear(dim, dim)
        self.table: nn.Parameter | None = None
        if window is not None:
            self.table = nn.Parameter(torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1), heads))
            nn.init.trunc_normal_(self.table, std=0.02)
            self.register_buffer("index", relative_index(window), persistent=False)

    @property
    def positions(self) -> Tensor | None:  # (heads, tokens, tokens)
        return None if self.table is None else self.table[self.index].permute(2, 0, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend; `mask` (windows, tokens, tokens) is added to the scores of every head."""
        q, k, v = self.rows(self.qkv(x))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._added(mask, q.dtype), scale=self.temperature)
        return self.proj(self.weigh(out).transpose(-3, -2).flatten(-2))

    @property
    def temperature(self) -> float:
        return (self.dim // self.heads) ** -0.5

    def rows(self, qkv: Tensor, heads: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (..., heads, tokens, width) each, from (..., tokens, 3 heads width)."""
        q, k, v = (part.unflatten(-1, (heads or self.heads, -1)).transpose(-3, -2) for part in qkv.chunk(3, -1))
        return q, k, v

    def weigh(self, out: Tensor) -> Tensor:
        return out

    def _added(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        positions = self.positions
        if mask is not None:
            mask = mask[:, None]  # (windows, 1, tokens, tokens)
        added = mask if positions is None else positions if mask is None else positions + mask
        return None if added is None else added.to(dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.heads}, window={self.window}"


class ScaledCosineAttention(DotProductAttention):
    """Multi-head scaled cosine similarity attention, then a projection: tokens (n, ..., tokens, dim) -> the same.

    Args:
        tau: scale of the cosines.
        nu: scale of the output.
        eps: under the root; positive. A constant grows as 1/√eps: of order 1 for a certificate.
        values: normalise the rows of V as well. Without, there is no global constant.
        clamp: divide by max(‖row‖, eps) instead, with the constant 1/eps.
        orthogonal: projections of norm at most 1 by construction (`AOLLinear`).

    >>> layer = ScaledCosineAttention(8, 2, tau=1.0, eps=1.0)
    >>> layer(100 * torch.ones(1, 4, 8)).shape
    torch.Size([1, 4, 8])
    """

    def __init__(
        self, dim: int, heads: int, *, tau: float, nu: float = 1.0, eps: float = 1.0, values: bool = True,
        clamp: bool = False, orthogonal: bool = False, window: Size | None = None, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, window=window, bias=bias)
        for name, number in (("tau", tau), ("nu", nu), ("eps", eps)):
            if not number > 0:
                raise ValueError(f"{name} of scaled cosine attention must be positive, not {number}")
        self.tau, self.nu, self.eps, self.values, self.clamp = tau, nu, eps, values, clamp
        if orthogonal:
            self.qkv, self.proj = AOLLinear(dim, 3 * dim, blocks=3, bias=bias), AOLLinear(dim, dim)

    @property
    def temperature(self) -> float:
        return self.tau

    @property
    def slope(self) -> float:
        """The Lipschitz constant of the normalisation of a row."""
        return 1 / self.eps if self.clamp else self.eps**-0.5

    def rows(self, qkv: Tensor, heads: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().rows(qkv, heads)
        return self._normalise(q), self._normalise(k), self._normalise(v) if self.values else v

    def weigh(self, out: Tensor) -> Tensor:
        return out if self.nu == 1.0 else self.nu * out

    def estimate(self, tokens: int, norms: Sequence[Tensor]) -> Tensor:
        """Return ν/√ε (τ‖W_Q‖ + τ√c'‖W_K‖ + √c‖W_V‖)·‖W_O‖ for `norms` of W_Q, W_K, W_V, W_O, differentiable.

        c and c' bound the column sums of the softmax, for all tokens seeing each other; see `lipcert.bounds.attention`.
        Without normalised values there is no constant: ValueError.
        """
        if not self.values:
            raise ValueError("attention whose values are not normalised has no Lipschitz constant; use values=True")
        with own_precision(norms[0]):
            spread = norms[0].new_tensor(2 * self.tau)
            if (positions := self.positions) is not None:
                spread = spread + (positions.amax(-1) - positions.amin(-1)).amax()
            largest = 1 / (1 + (tokens - 1) * torch.exp(-spread))
            capped = largest.clamp_max(2 / 3)
            varying = torch.where(largest <= 0.5, largest, 4 * capped**2 * (1 - capped))
            plain, varying = (tokens * largest).sqrt(), (tokens * varying).sqrt()
            q, k, v, out = norms
            inner = q + varying * k if tokens > 1 else 0.0 * q  # one token sees itself only: no scores to move
            return self.nu * self.slope * (self.tau * inner + plain * v) * out

    def _normalise(self, x: Tensor) -> Tensor:
        if self.clamp:
            return F.normalize(x, dim=-1, eps=self.eps)
        return x / torch.sqrt(x.square().sum(-1, keepdim=True) + self.eps)

    def extra_repr(self) -> str:
        options = f"tau={self.tau:g}, nu={self.nu:g}, eps={self.eps:g}, values={self.values}, clamp={self.clamp}"
        return f"{super().extra_repr()}, {options}"
