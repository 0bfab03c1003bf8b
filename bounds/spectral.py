"""Proved upper bounds of spectral norms in float64, elementwise over a batch of blocks, and of the largest in a batch.

Everything here is a tensor of upper bounds, one per block; `lipcert.bounds.matrix` is the public face. Nothing below
trusts an eigenvalue solver, a Cholesky factorisation or an iteration to have converged: they only propose a matrix, the
proof multiplies it out and adds every rounding error, so that a wrong proposal makes a bound larger, never false.

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

from lipcert.bounds.rounding import UNIT, enlarge, gamma

Method = Literal["eigenvalue", "gram"]

TINY = 2.0**-400  # more than all underflows together can matter, far below the rounding of a norm of 1/2
MARGIN = 2.0**-36  # relative distance above the best value at which the other blocks are tested; a cost in tightness
STEPS = 4  # power iterations that choose the next block to verify; only speed depends on them
LANCZOS = 2.0**-24  # relative residual asked of a Lanczos value, whose error is about the square; also for clusters
KRYLOV = 240  # dimensions after which a full eigendecomposition is faster
LARGE = 256  # size from which a Lanczos value and a factorisation are tried before an eigendecomposition


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


def eigenvalue(gram: Tensor, error: Tensor) -> Tensor:
    """Bound λ_max(G) for each exact G within `error` of a computed `gram`, by a verified eigendecomposition, (b,).

    Let Ĝ be `gram` and V any square matrix, here the eigenvectors that `eigh` proposes. With B = V*ĜV and R = I - V*V,

        ‖Ĝ‖ = ‖V^-* B V^-1‖ ≤ ‖B‖ ‖V^-1‖² = ‖B‖ ‖(V*V)^-1‖ ≤ ‖B‖ / (1 - ‖R‖)      whenever ‖R‖ < 1.

    Computed are P = fl(V*Ĝ), B̂ = fl(PV) and R̂ = fl(I - fl(V*V)). By (1), with γ for length n and ‖V‖² ≤ 1 + ‖R‖,

        ‖B‖ ≤ ‖B̂‖ + γ‖V‖_F (‖P‖_F + ‖Ĝ‖_F ‖V‖)      ‖R‖ ≤ ‖R̂‖(1 + 2u) + γ‖V‖_F²

    (the subtraction from I errs by at most u per entry of R̂, relatively). ‖B̂‖ is taken as √(‖B̂‖₁‖B̂‖_∞), sharp for a
    nearly diagonal matrix, and ‖R̂‖ as its Frobenius norm. Where V fails, ‖R‖ ≥ 1 or not a number, the block gets Gram
    iteration on Ĝ instead; the cheap bounds of Ĝ are taken where they are smaller.
    """
    size = gram.shape[-1]
    g = product_gamma(gram, size)
    simple = cheap(gram)
    try:
        vectors = torch.linalg.eigh(gram)[1]
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # LAPACK gave up: nothing proposed
        vectors = torch.zeros_like(gram)
    left = vectors.mH @ gram
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    length = frobenius(vectors)
    defect = raised(frobenius(identity - vectors.mH @ vectors) + g * length.square(), 5)
    excess = g * length * (frobenius(left) + frobenius(gram) * (1.0 + defect).sqrt())
    image = raised(mixed(left @ vectors) + excess, 8)
    proved = enlarge(image / (1.0 - defect), 2)
    failed = ~((defect < 1.0) & (proved < torch.inf))  # also catches NaN
    if failed.any():
        proved[failed] = gram_iteration(gram[failed], 14)
    return raised(torch.minimum(proved, simple) + error, 1)


def factorised(gram: Tensor, error: Tensor, shift: float) -> Tensor:
    """Bound λ_max(G) for each exact Hermitian G within `error` of `gram`, by factorising shift·I - gram, (b,).

    Let Ĝ be `gram`, A = fl(shift·I - Ĝ) and U any matrix, here the Cholesky factor that LAPACK proposes. Write
    A = U*U + E. U*U is positive semidefinite, so for every unit vector x

        x*Gx ≤ Re x*Ĝx + error ≤ shift - ‖Ux‖² - Re x*(E + D)x + error ≤ shift + ‖E‖ + ‖D‖ + error,

    where D, the rounding of the diagonal of A, has ‖D‖ ≤ 2u max|A_ii|; and by (1)
    ‖E‖ ≤ ‖fl(A - fl(U*U))‖_F (1 + 2u) + γ‖U‖_F². The result is ∞ where no factor was found. It costs a tenth of an
    eigendecomposition, and unlike the usual theorem on Cholesky (Rump 2006) needs no assumption on the factorisation.
    """
    shifted = -gram
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
    factor, info = torch.linalg.cholesky_ex(shifted, upper=True)  # upper saves torch a transposition
    if info.all():
        return torch.full_like(error, torch.inf)
    residual = frobenius(shifted - factor.mH @ factor)
    rounding = product_gamma(gram, gram.shape[-1]) * frobenius(factor).square()
    diagonal = 2.0 * UNIT["float64"] * shifted.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
    proved = raised(shift + residual + rounding + diagonal + error, 8)
    return torch.where((info == 0) & (proved < torch.inf), proved, torch.inf)


def verified(gram: Tensor, error: Tensor) -> Tensor:
    """Bound λ_max(G) as `eigenvalue` does; faster for one large block (1, n, n): `factorised` near a Lanczos value."""
    if gram.shape[-1] >= LARGE:
        value = _lanczos(gram[0])
        if value is None:  # nothing proposed
            return eigenvalue(gram, error)
        for margin in (4.0 * MARGIN, 32.0 * MARGIN):
            proved = factorised(gram, error, value * (1.0 + margin))
            if proved.isfinite().all():
                return proved
    return eigenvalue(gram, error)


def _lanczos(matrix: Tensor) -> float | None:
    """Return λ_max of a Hermitian matrix up to a relative residual of LANCZOS, None where it takes too long.

    Lanczos with full reorthogonalisation, which proves nothing. ARPACK is ten times slower here.
    """
    size = min(KRYLOV, len(matrix))
    basis = matrix.new_zeros(size + 1, len(matrix))
    diagonal, above = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    start = matrix.diagonal() + 0.0
    basis[0] = start / torch.linalg.vector_norm(start)
    for k in range(size):
        image = matrix @ basis[k]
        diagonal[k] = float((basis[k].conj() @ image).real)
        for _ in range(2):
            image = image - basis[: k + 1].mT @ (basis[: k + 1].conj() @ image)
        above[k] = float(torch.linalg.vector_norm(image))
        if not 0.0 < float(above[k]) < torch.inf:
            break
        basis[k + 1] = image / above[k]
        if k % 8 == 7 or k == size - 1:
            small = torch.diag(diagonal[: k + 1]) + torch.diag(above[:k], 1)
            values, vectors = torch.linalg.eigh(small, UPLO="U")
            if float(above[k] * vectors[-1, -1].abs()) <= LANCZOS * float(values[-1]):
                return float(values[-1])
    return None


def largest_squared(blocks: Tensor, method: Method, iterations: int = 14, found: float = 0.0) -> float:
    """Return an upper bound of max(found, max ‖A‖²) over the blocks (b, m, n).

    Most blocks are dismissed by a cheap bound below what is already found. Of the rest, one with a large norm is
    verified fully, the others are only shown to lie below it (by `factorised`); those that do not, come again.
    """
    gram, error = small_gram(blocks)
    simple = raised(frobenius(gram) + error, 1)
    attained = gram.diagonal(dim1=-2, dim2=-1).real.amax()  # at most the largest norm, up to rounding
    largest = float(simple.max())
    if largest <= max(found, float(attained) * (1.0 + MARGIN)):
        return max(found, largest)  # of rank one, where the cheap bound is the norm, or smaller than what is found
    pending = torch.nonzero(simple > found).flatten()
    if method == "gram":
        proved = torch.minimum(gram_iteration(_rows(blocks, pending), iterations).square(), simple[pending])
        return max(found, float(enlarge(proved, 1).max()))
    tolerance = 2.0 * MARGIN + 2.0 * product_gamma(gram, max(blocks.shape[-2:])) * gram.shape[-1]
    while len(pending):
        best = pending[_rayleigh(_rows(gram, pending)).argmax()][None]
        proved = torch.minimum(verified(gram[best], error[best]), simple[best])
        found = max(found, float(proved))
        pending = pending[(pending != best) & (simple[pending] > found)]
        if len(pending):
            below = factorised(_rows(gram, pending), error[pending], found * (1.0 + MARGIN))
            passed = below <= found * (1.0 + tolerance)
            found = max(found, float(torch.where(passed, below, 0.0).max()))
            pending = pending[~passed]
    return found


def _rows(blocks: Tensor, index: Tensor) -> Tensor:
    """Return the blocks of this index, without a copy where these are all."""
    return blocks if len(index) == len(blocks) else blocks[index]


def _rayleigh(gram: Tensor) -> Tensor:
    """Return rough lower estimates of λ_max of each block, from a few power iterations, (b,)."""
    vector = gram.diagonal(dim1=-2, dim2=-1)[..., None] + 0.0
    for _ in range(STEPS):
        vector = gram @ vector
        vector = vector / torch.linalg.vector_norm(vector, dim=(-2, -1), keepdim=True).clamp_min(TINY)
    return torch.linalg.vector_norm(gram @ vector, dim=(-2, -1))


def _power_of_two_above(norm: Tensor) -> Tensor:
    """Return the power of two in (norm, 2·norm] for each norm; 1 where it is zero or outside 2^±1000."""
    exponent = torch.frexp(norm)[1].to(torch.int64)
    exponent = torch.where((norm > 0.0) & (norm < torch.inf) & (exponent.abs() < 1000), exponent, 0)
    return ((exponent + 1023) << 52).view(torch.float64)  # built from its bits: exp2 is not promised to be exact
