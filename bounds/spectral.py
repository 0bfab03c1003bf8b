"""Proved upper bounds of spectral norms in float64, elementwise over a batch of blocks, by norms that are easily had.

Everything here is a tensor of upper bounds, one per block; `lipcert.bounds.matrix` is the public face, and
`lipcert.bounds.hermitian` makes of these sharper ones.

Arithmetic. u = 2^-53. An inner product of length n, in any order, with or without fused multiply-add, has an error of
at most γ_n Σ|a_i||b_i|; a complex one of at most √2·γ_2n Σ|a_i||b_i| ≤ γ_4n Σ|a_i||b_i|, since its real and imaginary
part are real inner products of length 2n whose terms sum to at most |a_i||b_i| each. So for a product of matrices

    ‖fl(AB) - AB‖ ≤ ‖fl(AB) - AB‖_F ≤ γ ‖|A||B|‖_F ≤ γ ‖A‖_F ‖B‖_F.                                             (1)

This is true of conventional products, not of Strassen's, nor of products in TF32 or emulated precision: float64
products are conventional by default on every backend of torch. A sum of k nonnegative numbers loses at most a factor
(1 - u)^(k - 1), which `enlarge` gives back.

Underflow. Callers scale their blocks by one power of two so that the largest entry of all is in [1/2, 2^100]. An
operation that underflows (gradually, or flushed to zero) then errs by at most 2^-1022, the modulus of a complex number
and the root of a sum of squares by 2^-510 per term; with fewer than 2^40 entries the sum of it all is below TINY, which
`raised` adds. (A product of two roots, in `mixed`, is safe too: if the largest entry is above 2^-420 the loss is below
one rounding, and otherwise the whole norm is below TINY.)

Norms. For any square or rectangular A, ‖A‖ ≤ √(‖A‖₁‖A‖_∞) and ‖A‖ ≤ ‖A‖_F; no step assumes that a computed Gram matrix
is exactly Hermitian.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lipcert.bounds.rounding import enlarge, gamma

Method = Literal["eigenvalue", "tight", "gram"]

TINY = 2.0**-400  # more than all underflows together can matter, far below the rounding of a norm of 1/2


def product_gamma(blocks: Tensor, length: int) -> float:
    """Return the γ of (1) for inner products of this length in the arithmetic of `blocks`."""
    return gamma(4 * length if blocks.is_complex() else length)


def raised(value: Tensor, roundings: int) -> Tensor:
    """Return at least the exact value of what was computed with so many roundings and any number of underflows."""
    return enlarge(value, roundings + 1) + TINY  # one more for this addition


def frobenius(blocks: Tensor) -> Tensor:
    """Return the Frobenius norm of each block (..., m, n) -> (...), rounded up but for underflow."""
    count = blocks.shape[-2] * blocks.shape[-1]
    entries = torch.view_as_real(blocks.resolve_conj()) if blocks.is_complex() else blocks
    dims = tuple(range(blocks.ndim - 2, entries.ndim))
    # at most 2·count squares and sums, of which the root halves the number, and the root itself
    return enlarge(torch.linalg.vector_norm(entries, dim=dims), count + 4)


def mixed(blocks: Tensor) -> Tensor:
    """Return √(‖A‖₁‖A‖_∞) ≥ ‖A‖ of each block (..., m, n) -> (...), rounded up but for underflow."""
    # three times faster than torch.abs of complex numbers, and 3 roundings with the root's
    magnitude = (blocks.real.square() + blocks.imag.square()).sqrt() if blocks.is_complex() else blocks.abs()
    columns = magnitude.sum(-2).amax(-1)
    rows = magnitude.sum(-1).amax(-1)
    return enlarge(columns.sqrt() * rows.sqrt(), sum(blocks.shape[-2:]) + 12)


def cheap(blocks: Tensor) -> Tensor:
    """Return the smaller of Frobenius and √(‖A‖₁‖A‖_∞) of each block (..., m, n) -> (...), but for underflow."""
    return torch.minimum(frobenius(blocks), mixed(blocks))


def small_gram(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return G = fl(A*A) or fl(AA*), whichever is smaller, and a bound of its error in the spectral norm, by (1)."""
    error = raised(product_gamma(blocks, max(blocks.shape[-2:])) * frobenius(blocks).square(), 2)
    return blocks.mH @ blocks if blocks.shape[-1] < blocks.shape[-2] else blocks @ blocks.mH, error


def gram_iteration(blocks: Tensor, iterations: int) -> Tensor:
    """Bound each ‖A‖ by Gram iteration (Delattre et al. 2023, arXiv 2305.16173), (b, m, n) -> (b,).

    G_0 = A; Ĝ_t = G_t / f_t for a power of two f_t near ‖G_t‖_F, so that dividing is exact; G_{t+1} = fl(Ĝ_t* Ĝ_t).
    By (1) and ‖Ĝ_t‖² = ‖Ĝ_t* Ĝ_t‖ the norms s_t = ‖G_t‖ satisfy

        s_t ≤ f_t √(s_{t+1} + γ ‖Ĝ_t‖_F²),     and s_t ≤ min(‖G_t‖_F, √(‖G_t‖₁‖G_t‖_∞)) for every t,

    which is unrolled from the last t to the first. In exact arithmetic the slack is at most a factor
    rank^(2^-(iterations + 1)). Differs from the paper by the rounding terms and by taking the cheap bound at every t.
    """
    if blocks.shape[-1] > blocks.shape[-2]:
        blocks = blocks.mH
    steps = []
    for _ in range(iterations):
        norm = frobenius(blocks)
        scale = _power_of_two_above(norm)
        blocks = blocks * scale.reciprocal()[:, None, None]
        error = raised(product_gamma(blocks, blocks.shape[-2]) * (norm / scale).square(), 2)
        steps.append((scale, error, raised(torch.minimum(norm, mixed(blocks) * scale), 0)))
        blocks = blocks.mH @ blocks
    bound = raised(cheap(blocks), 0)
    for scale, error, simple in reversed(steps):
        bound = torch.minimum(enlarge(scale * (bound + error).sqrt(), 3), simple)
    return bound


def _power_of_two_above(norm: Tensor) -> Tensor:
    """Return the power of two in (norm, 2·norm] for each norm; 1 where it is zero or outside 2^±1000."""
    exponent = torch.frexp(norm)[1].to(torch.int64)
    exponent = torch.where((norm > 0.0) & (norm < torch.inf) & (exponent.abs() < 1000), exponent, 0)
    return ((exponent + 1023) << 52).view(torch.float64)  # built from its bits: exp2 is not promised to be exact
