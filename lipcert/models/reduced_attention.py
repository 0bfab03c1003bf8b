"""Spatially reduced scaled cosine attention: queries from all positions, keys and values from a smaller map.

SegFormer's efficient attention (arXiv 2105.15203, equation 2) reduces keys and values by a convolution of kernel =
stride; here with cosine similarities (LipsFormer, arXiv 2304.09856), normalised values, and projections and reduction
of norm at most 1 by construction. For N queries and M keys the inequality of `lipcert.bounds.attention` gives

    L = ν/√ε (τ‖W_Q‖ + (τ√c' ‖W_K‖ + √c ‖W_V‖) ‖R‖) ‖W_O‖,

where c bounds the column sums of the N x M softmax: of order N/M, so that reduction costs what it saves. ν is chosen so
that norms of 1 give L = 1, and is smaller for larger maps: attend where maps are small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.bounds.attention import Rows, coefficients, column_sums
from lipcert.errors import InputError
from lipcert.layers.almost_orthogonal import AOLLinear
from lipcert.layers.power import Segment
from lipcert.models.parts import Chunk, MeanPart


class ReducedAttentionBlock(MeanPart):
    """`(1 - a) x + a f(x)`, f the attention and a learned in (0, 1): maps (n, dim, h, w) -> the same.

    Estimate: `1 - a + a L`, see above.

    Args:
        reduction: side of the patches that become one key and one value; it must divide the map. 1: no reduction.
        tau: scale of the cosines.
        eps: under the root of the normalisation x / √(‖x‖² + ε).
        start: a before training.
    """

    def __init__(
        self, in_shape: tuple[int, int, int], *, heads: int, reduction: int, tau: float = 1.0, eps: float = 1.0,
        start: float = 0.2,
    ) -> None:  # fmt: skip
        super().__init__(start)
        dim, height, width = in_shape
        if reduction < 1 or height % reduction or width % reduction:
            raise InputError(f"patches of {reduction} do not divide a map of {height}x{width}; change the reduction")
        if heads < 1 or dim % heads:
            raise InputError(f"{heads} heads do not divide {dim} channels; choose another num_heads or embed_dim")
        if not (tau > 0 and eps > 0):
            raise InputError(f"tau and eps of the attention must be positive, not {tau} and {eps}")
        self.in_shape, self.heads, self.tau, self.eps = in_shape, heads, tau, eps
        tokens = height * width
        row = Rows(1.0, 1.0)  # what the normalisation makes of every row
        with torch.device("cpu"):  # a number, also where the network is built without memory
            columns = column_sums(2 * tau, None, tokens, tokens // reduction**2)
        self.coefficients = coefficients(row, row, row, tau, columns)  # of queries, keys and values
        self.nu = math.sqrt(eps) / sum(self.coefficients)
        self.reduce = OrthogonalPatches(dim, reduction) if reduction > 1 else None
        self.q, self.kv = AOLLinear(dim, dim), AOLLinear(dim, 2 * dim, blocks=2)
        self.proj = AOLLinear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT  # (n, h w, dim)
        few = tokens if self.reduce is None else self.reduce(x).flatten(2).mT
        q, k, v = (self._rows(projected) for projected in (self.q(tokens), *self.kv(few).chunk(2, -1)))
        out = self.nu * F.scaled_dot_product_attention(q, k, v, scale=self.tau)  # (n, heads, h w, dim / heads)
        y = self.proj(out.transpose(1, 2).flatten(2)).mT.unflatten(2, x.shape[2:])
        return self.mean(x, y)

    def segments(self) -> list[Segment]:
        dim = self.in_shape[0]
        parts: list[Segment] = [(self.q, (dim,)), (Chunk(self.kv, 2, 0), (dim,)), (Chunk(self.kv, 2, 1), (dim,))]
        parts.append((self.proj, (dim,)))
        return parts if self.reduce is None else [*parts, (self.reduce, self.in_shape)]

    def lipschitz(self, norms: Sequence[Tensor]) -> Tensor:
        q, k, v, out = norms[:4]
        few = norms[4] if self.reduce is not None else 1.0
        along, across, plain = self.coefficients
        branch = self.nu / math.sqrt(self.eps) * (along * q + (across * k + plain * v) * few) * out
        return self.mean(1.0, branch)

    def _rows(self, x: Tensor) -> Tensor:  # (n, tokens, dim) -> (n, heads, tokens, dim / heads), of norms below 1
        x = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return x / torch.sqrt(x.square().sum(-1, keepdim=True) + self.eps)

    def extra_repr(self) -> str:
        return f"{self.in_shape}, heads={self.heads}, tau={self.tau:g}, eps={self.eps:g}"


class OrthogonalPatches(nn.Module):
    """A convolution of kernel = stride = `size` with norm at most 1, (n, dim, h, w) -> (n, dim, h/size, w/size).

    Its matrix on one patch is the transpose of an almost-orthogonal one: fewer rows than columns, so that the rows are
    what can be orthogonal.
    """

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.dim, self.size = dim, size
        self.transposed = AOLLinear(dim, dim * size * size, bias=False)
        self.bias = nn.Parameter(torch.zeros(dim))

    @property
    def weight(self) -> Tensor:  # (dim, dim, size, size)
        return self.transposed.weight.mT.unflatten(1, (self.dim, self.size, self.size))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, stride=self.size)

    def export(self) -> nn.Conv2d:
        conv = nn.Conv2d(self.dim, self.dim, self.size, stride=self.size, device="meta")
        conv.weight = nn.Parameter(self.weight.detach().clone())
        conv.bias = nn.Parameter(self.bias.detach().clone())
        return conv

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.size}"
