"""Operators that change the number of positions: bilinear interpolation, and pooling by Euclidean norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from .maps import grid_of
from .norms import proved_norm
from .operators import Operation, Value
from .reading import ENTRIES, Array, require
from .rounding import UNIT, UP, gamma, lengths


def interpolation(
    shape: Sequence[int], input: Value, output_size: Any, align_corners: bool, scale_factors: Any = None
) -> Operation:
    """Bilinear interpolation to another size, by the matrix A of one axis and B of the other: X -> A X Bᵀ.

    Its norm is ‖A‖ ‖B‖, as it is the Kronecker product of both, on every channel. Entries of A and B are not negative
    and rounded once, so the exact matrices are entry by entry at most 1 + 2u times them, and so are their norms; in the
    same way rounding adds at most gamma(n) A |X| Bᵀ for n roundings: two of each entry, those of products of two terms
    (the others are zero), and some to spare. Rows of A and B have the sum 1: each position is a mean of others.
    """
    c, *sides = grid_of(input.shape)
    require(len(input.shape) == 4 and align_corners is False and scale_factors is None, "options")
    require(list(shape) == [1, c, *output_size], f"its result is of another size than {output_size}")
    a, b = (_hats(n, m) for n, m in zip(sides, shape[2:], strict=True))
    size = proved_norm([a]) * proved_norm([b]) * (1 + 8 * UNIT) * UP

    def run(array: Array) -> tuple[Array, Array]:
        return a @ array @ b.T, gamma(16) * size * lengths(array)

    return Operation([input.name], [size], run, place="mean")


def _hats(n: int, m: int) -> Array:
    """Return the matrix (m, n) of linear interpolation from n positions to m, each entry rounded once.

    Output i lies at t = (i + 1/2) n/m - 1/2, or at 0 if that is negative, and takes its neighbours floor(t) and
    floor(t) + 1 with the weights 1 - f and f for t = floor(t) + f; a neighbour beyond the end is the last position.
    """
    require(m < 1 << 14 and n * m <= ENTRIES, "its size")
    matrix = np.zeros((m, n))
    for i in range(m):
        t = max(Fraction(0), Fraction((2 * i + 1) * n - m, 2 * m))
        first = math.floor(t)
        second = min(first + 1, n - 1)
        matrix[i, first] = float(1 - (t - first)) if second > first else 1.0
        if second > first:
            matrix[i, second] = float(t - first)
    return matrix


def length(
    shape: Sequence[int], self: Value, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Operation:
    """Euclidean norms over some dimensions: ‖x‖ - ‖y‖ is at most ‖x - y‖, piece by piece.

    Squares that underflow are below 2^-1021, and there are at most 2^26 of them.
    """
    require(type(ord) in (int, float) and ord == 2 and dtype is None and type(keepdim) is bool, "another norm")
    require(isinstance(dim, list) and all(type(d) is int and 0 < d < len(self.shape) for d in dim), "dim")
    require(0 < len(dim) == len({*dim}), "dim")
    axes, count = tuple(d + 1 for d in dim), math.prod(self.shape[d] for d in dim)

    def run(array: Array) -> tuple[Array, Array]:
        result = np.sqrt(np.square(array).sum(axes, keepdims=keepdim))
        return result, gamma(count + 8) * lengths(result) + 1e-140

    return Operation([self.name], [1.0], run)


RESAMPLING: dict[str, Callable[..., Operation]] = {
    "aten.upsample_bilinear2d.vec": interpolation,
    "aten.linalg_vector_norm.default": length,
}
