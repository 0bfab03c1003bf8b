"""Upper bounds of rounding errors, and of lengths with theirs.

u = 2^-53, gamma(n) = nu / (1 - nu). A sum of n products, added in any order, with or without fused multiplication, errs
by at most gamma(n) times the sum of the absolute products (Higham, "Accuracy and Stability of Numerical Algorithms",
ch. 3). Three things are taken for granted: BLAS computes sums of products (no Strassen), libm and NumPy's elementary
functions are right to 4 units in the last place, and numbers are IEEE doubles rounded to nearest.
"""

from __future__ import annotations

import numpy as np

from .reading import Array

UNIT = 2.0**-53
UP = 1.0 + 2.0**-44  # more than 100 roundings of positive numbers


def gamma(n: int) -> float:
    """Return an upper bound of nu / (1 - nu), the relative error of n roundings."""
    return n * UNIT / (1 - n * UNIT) * (1 + 4 * UNIT)


def lengths(batch: Array) -> Array:
    """Return upper bounds of the l2 norms of the entries of a batch; the last term is for squares that underflow."""
    flat = batch.reshape(len(batch), -1)
    return np.sqrt(np.square(flat).sum(1)) * (1 + gamma(flat.shape[1] + 8)) + 1e-150


def frobenius(matrix: Array) -> float:
    """Return an upper bound of the root of the sum of the squares."""
    return float(lengths(matrix[None])[0])
