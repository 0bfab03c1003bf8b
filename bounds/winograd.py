"""3x3 convolutions in float64 with a quarter of the products, and what their rounding may be: Winograd's F(4x4, 3x3).

The output is cut into tiles Y of 4x4, each a function of a tile d of 6x6 of the padded image that overlaps its
neighbours by 2. With constant matrices A, B, G (Winograd 1980; Lavin and Gray, "Fast algorithms for convolutional
neural networks", CVPR 2016; points 0, ±1, ±2, ∞),

    Y_o = Aᵀ [ Σ_c (G w_oc Gᵀ) ⊙ (Bᵀ d_c B) ] A,

so that a tile takes 36 products for each pair of channels instead of 144. Written with A⊗A and its like and with one
index ξ for the 36 entries: Y = Σ_ξ a_ξ U_ξ (b_ξ d), with U_ξ (c_out, c_in) made of the weights once.

*Rounding* (`rounding`). A, B and 24 G are integers below 2^10, so what is rounded are products and sums, in any order:
on the way of a weight into U 9 products, 8 sums of which lie on one path, and the division by 576; 16 nonzero terms in
Bᵀ d B, c_in in the sum over channels, 25 in Aᵀ M A. Each path has at most n = c_in + 51 roundings, so entry by entry

    |computed - exact| ≤ γ_n Σ_ξ |a_ξ| Û_ξ (|b_ξ| |d|),      Û_ξ = (|G|⊗|G|)_ξ |w|.

In l2 over all tiles, Σ_ξ ‖a_ξ‖ ‖Û_ξ‖ ‖b_ξ‖ √(Σ ‖d‖²) bounds the sum, and each entry of the image lies in at most two
tiles an axis: Σ ‖d‖² ≤ 4 ‖x‖². ‖Û_ξ‖ is bounded by its row and column sums. The error is larger than that of inner
products, and of no account in float64.

*Underflow.* Where something is lost below the smallest normal number τ = 2^-1022: fewer than 100 such losses in an
entry of d or w transformed, as if the argument or the weights were off by that much; at most 2 c_in in an entry of
M, which enter an entry of Y with factors of 361 in all: AMPLIFIED.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipcert.bounds.rounding import enlarge, mul_up

TILE, WINDOW = 4, 6
LEAST = 16  # channels on either side from which it is faster
CACHED = 2**20  # bytes of windows that are transformed at once: more are slower
LOST = 2.0**-900  # times the size: far more than a hundred times 2^-1022 in each of 2^40 entries
AMPLIFIED = 361

_FROM = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0],
         [0, 4, 0, -5, 0, 1]]  # fmt: skip
_OF_KERNEL = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]  # 24 G
_TO = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


def _square(matrix: Sequence[Sequence[int]]) -> Tensor:
    """Return M ⊗ M, exactly; in memory, also where this file is first read while a network is built without."""
    made = torch.tensor(matrix, dtype=torch.float64, device="cpu")
    return torch.kron(made, made)


BEFORE, KERNEL, AFTER = _square(_FROM), _square(_OF_KERNEL), _square(_TO)  # (36, 36), (36, 9), (16, 36)


def applies(
    weight: Tensor, out: Sequence[int], *, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> bool:
    """Return whether a convolution is of this kind, and is faster so: out is the height and width of its result."""
    if tuple(weight.shape[2:]) != (3, 3) or groups != 1 or min(weight.shape[:2]) < LEAST:
        return False
    tiles = math.prod(-(-n // TILE) for n in out)
    return {*stride, *dilation} == {1} and 6 * tiles <= math.prod(out)


def transformed(weight: Tensor) -> Tensor:
    """Return U (36, c_in, c_out) of weights (c_out, c_in, 3, 3)."""
    taps = weight.flatten(2).permute(2, 1, 0)
    return (KERNEL.to(weight) @ taps.flatten(1)).view(-1, *taps.shape[1:]) / 576


def convolve(x: Tensor, kernel: Tensor, padding: Sequence[int], out: Sequence[int]) -> Tensor:
    """Return the convolution of x (n, c_in, h, w) by `transformed` weights, channels last: (n, *out, c_out)."""
    (n, channels, height, width), (rows, columns) = x.shape, (-(-size // TILE) for size in out)
    below, beside = rows * TILE + 2 - height - padding[0], columns * TILE + 2 - width - padding[1]
    image = x.permute(0, 2, 3, 1)
    padded = torch.nn.functional.pad(image, (0, 0, padding[1], beside, padding[0], below)).contiguous()
    each, row, column, _ = padded.stride()
    result = x.new_empty(n, rows, TILE, columns, TILE, kernel.shape[2])
    count = max(1, CACHED // (8 * WINDOW**2 * rows * columns * channels))
    for part, tiles in zip(padded.split(count), result.split(count), strict=True):
        sizes = (WINDOW, WINDOW, len(part), rows, columns, channels)
        windows = part.as_strided(sizes, (row, column, each, TILE * row, TILE * column, 1)).reshape(WINDOW**2, -1)
        products = torch.bmm((BEFORE @ windows).view(WINDOW**2, -1, channels), kernel)
        found = (AFTER @ products.flatten(1)).view(TILE, TILE, len(part), rows, columns, -1)
        tiles.copy_(found.permute(2, 3, 0, 4, 1, 5))
    return result.view(n, rows * TILE, columns * TILE, -1)[:, : out[0], : out[1]]


def rounding(weight: Tensor) -> tuple[int, float]:
    """Return (n, S): the rounding of `convolve` is at most γ_n · S · ‖x‖ in l2."""
    absolute = weight.abs().flatten(2)
    majorant = KERNEL.abs().to(weight)
    rows, columns = (majorant @ absolute.sum(axis).T for axis in (1, 0))  # (36, c_out) and (36, c_in)
    norms = (rows.max(1).values.sqrt() * columns.max(1).values.sqrt()).cpu()  # their product might underflow
    weights = torch.linalg.vector_norm(AFTER, dim=0) * torch.linalg.vector_norm(BEFORE, dim=1)
    size = enlarge(float((weights * norms).sum()), weight.shape[0] + weight.shape[1] + 128)
    return weight.shape[1] + 51, mul_up(2.0, size / 576, 1.0 + 2.0**-50)
