"""Proved upper bounds of the largest eigenvalue of Hermitian matrices in float64, and of the largest in a batch.

The matrices are Gram matrices as computed: `gram` stands for any exact Hermitian G with |G - gram| ≤ M entry by entry
for a symmetric M, ‖M‖_F ≤ `error`. Nothing here trusts an eigenvalue solver, a factorisation or an iteration to have
converged: they only propose, the proof multiplies out and adds every rounding error (`lipcert.bounds.spectral` has the
arithmetic), so that a wrong proposal makes a bound larger, never false.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lipcert.bounds.rounding import UNIT, enlarge
from lipcert.bounds.spectral import TINY, Method, cheap, frobenius, gram_iteration, mixed, product_gamma, raised

# relative distances above a proposed eigenvalue, the next where one fails; a cost in tightness
MARGINS = (2.0**-34, 2.0**-28)
COARSE = (2.0**-20, 2.0**-14)  # the same for more than HUGE rows
STEPS = 8  # power iterations that choose the next block to verify; only speed depends on them
LANCZOS = 2.0**-20  # relative residual asked of a Lanczos value, whose error is about the square; also for clusters
KRYLOV = 240  # dimensions after which a full eigendecomposition is faster
LARGE = 256  # size from which a Lanczos value and a factorisation are tried before an eigendecomposition
BLOCK = 64  # columns that are factorised at once; the rest is matrix products
SPARSE = 1024  # size from which entries that are zero are looked for
HUGE = 2048  # size above which eigenvalues are proposed in single precision


def eigenvalue(gram: Tensor, error: Tensor) -> Tensor:
    """Bound λ_max(G) by a verified eigendecomposition, (b, n, n) and (b,) -> (b,).

    Let Ĝ be `gram` and V any square matrix, here the eigenvectors that `eigh` proposes. With B = V*ĜV and R = I - V*V,

        ‖Ĝ‖ = ‖V^-* B V^-1‖ ≤ ‖B‖ ‖V^-1‖² = ‖B‖ ‖(V*V)^-1‖ ≤ ‖B‖ / (1 - ‖R‖)      whenever ‖R‖ < 1.

    Computed are P = fl(V*Ĝ), B̂ = fl(PV) and R̂ = fl(I - fl(V*V)). With γ for length n and ‖V‖² ≤ 1 + ‖R‖,

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
    """Bound λ_max(G) by factorising A = shift·I - Ĝ as LL*, (b, n, n) and (b,) -> (b,); ∞ where no factor was found.

    Ĝ takes its blocks on and below the diagonal from `gram` and is Hermitian beside them; by the symmetry of the
    entrywise bound it is within `error` of G as well. Whatever L is, A = LL* + E with LL* positive semidefinite, so for
    every unit vector x

        x*Gx ≤ Re x*Ĝx + error = shift - ‖L*x‖² - Re x*Ex + error ≤ shift + ‖E‖_F + error.

    L is made column by column of blocks, and E beside it: with the columns L_j of L and those to their left L_<, S =
    fl(A_j - L_< L_<*), L_j = S L_jj^-* and R = fl(S - L_j L_jj*). How L_jj and its inverse were found does not matter.
    Let M = |L||L|* and ε = γ of (1) for length n + 2. Products that are added to A or S, in any order, err by at most
    ε(|A| + M) and ε(|S| + M); with |S| ≤ (1 + ε)(|A| + M) and |A| ≤ M + |E| this gives

        |E| ≤ |R| + ε(1 + ε)(2|A| + 3M),      ‖E‖_F ≤ (1 + 4ε)(‖R‖_F + 6ε ‖L‖_F²).

    The rounding of the diagonal of A adds 2u max|A_ii|. All of it costs n³/3 products, the tenth part of an
    eigendecomposition, and unlike the usual theorem (Rump 2006) assumes nothing of the factorisation. What lies outside
    the envelope of a banded Ĝ is zero in A, L and E.
    """
    size, rounding = gram.shape[-1], product_gamma(gram, gram.shape[-1] + 2)
    factor = torch.empty_like(gram) if size < SPARSE else torch.zeros_like(gram)  # outside of the envelope: zero
    failed = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
    residuals, lengths, diagonals = [], [], []
    reach = _envelope(gram)
    for number, first in enumerate(range(0, size, BLOCK)):
        last, end = min(first + BLOCK, size), reach[number]
        left = BLOCK * next(i for i, row in enumerate(reach) if row > first)  # L is zero before it in these rows
        block = gram[:, first:end, first:last].neg()
        block[:, : last - first].diagonal(dim1=-2, dim2=-1).add_(shift)
        diagonals.append(block.diagonal(dim1=-2, dim2=-1).abs().amax(-1))
        if left < first:
            block = torch.baddbmm(
                block, factor[:, first:end, left:first], factor[:, first:last, left:first].mH, alpha=-1
            )
        corner, info = torch.linalg.cholesky_ex(block[:, : last - first])
        identity = torch.eye(last - first, dtype=gram.dtype, device=gram.device)
        failed |= info != 0
        if failed.all():
            break
        corner = torch.where(failed[:, None, None], identity, corner)
        factor[:, first:last, first:last] = corner
        if last < end:
            inverse = torch.linalg.solve_triangular(corner, identity, upper=False)
            torch.matmul(block[:, last - first :], inverse.mH, out=factor[:, last:end, first:last])
        block = torch.baddbmm(block, factor[:, first:end, first:last], corner.mH, alpha=-1)
        lengths.append(frobenius(factor[:, first:end, first:last]))
        below = frobenius(block[:, last - first :])
        residuals += [frobenius(block[:, : last - first]), below, below]  # the blocks above the diagonal mirror these
    if failed.all():
        return torch.full_like(error, torch.inf)
    residual, length = (torch.linalg.vector_norm(torch.stack(parts), dim=0) for parts in (residuals, lengths))
    residual, length = enlarge(residual, len(residuals) + 4), enlarge(length, len(lengths) + 4)
    defect = (residual + 6.0 * rounding * length.square()) * (1.0 + 4.0 * rounding)
    diagonal = 2.0 * UNIT["float64"] * torch.stack(diagonals).amax(0)
    proved = raised(shift + defect + diagonal + error, 10)
    return torch.where(~failed & (proved < torch.inf), proved, torch.inf)


def largest_eigenvalue(gram: Tensor, error: Tensor, method: Method, iterations: int, found: float = 0.0) -> float:
    """Return an upper bound of max(found, max λ_max(G)) over the blocks (b, n, n).

    Blocks whose Frobenius norm is below what is found are dismissed. Of the rest, the largest eigenvalue of a promising
    one is found, and all are shown to lie below it (by `factorised`); those that do not, come again.
    """
    simple = raised(frobenius(gram) + error, 1)
    attained = gram.diagonal(dim1=-2, dim2=-1).real.amax()  # at most the largest norm, up to rounding
    largest = float(simple.max())
    if largest <= max(found, float(attained) * (1.0 + MARGINS[0])):
        return max(found, largest)  # of rank one, where the cheap bound is the norm, or smaller than what is found
    pending = torch.nonzero(simple > found).flatten()
    if method == "gram":
        proved = raised(gram_iteration(_rows(gram, pending), iterations) + error[pending], 1)
        return max(found, float(torch.minimum(proved, simple[pending]).max()))
    tolerance = 2.0 * MARGINS[0] + 16.0 * product_gamma(gram, gram.shape[-1]) * gram.shape[-1]
    best, value, margins, threshold = -1, 0.0, list[float](), found * (1.0 + MARGINS[0])
    while len(pending):
        if threshold > 0.0:
            below = factorised(_rows(gram, pending), error[pending], threshold)
            passed = below <= threshold * (1.0 + tolerance)
            found = max(found, float(torch.where(passed, below, 0.0).max()))
            pending = pending[~passed]
        if best not in pending:
            if not len(pending):
                break
            best = int(pending[rayleigh(_rows(gram, pending)).argmax()])
            value = _lanczos(gram[best]) if gram.shape[-1] >= LARGE else 0.0
            margins = list(COARSE if gram.shape[-1] > HUGE else MARGINS)
        if value > 0.0 and margins:
            threshold = max(found, value) * (1.0 + margins.pop(0))
        else:  # nothing proposed, or nothing near enough to the truth
            exact = torch.minimum(eigenvalue(gram[best][None], error[best]), simple[best])
            found, pending, best = max(found, float(exact)), pending[pending != best], -1
            threshold = found * (1.0 + MARGINS[0])
    return found


def _envelope(gram: Tensor) -> list[int]:
    """Return, for each block of columns, the row after the last one that it or a block before it reaches."""
    size = gram.shape[-1]
    starts = range(0, size, BLOCK)
    if size < SPARSE:
        return [size] * len(starts)
    reach, last = [], 0
    for first in starts:
        rows = gram[:, :, first : first + BLOCK].ne(0).any(-1).any(0).nonzero()
        last = max(last, min(first + BLOCK, size), *(rows[-1] + 1).tolist())
        reach.append(last)
    return reach


def _lanczos(matrix: Tensor) -> float:
    """Return λ_max of a Hermitian matrix up to a relative residual of LANCZOS, 0 where it takes too long.

    Lanczos with full reorthogonalisation, which proves nothing. ARPACK is ten times slower here. A matrix of more than
    HUGE rows is read in single precision, half the time, for a value that is raised by what this may cost.
    """
    if len(matrix) > HUGE:
        single = _lanczos_value(matrix.to(torch.complex64 if matrix.is_complex() else torch.float32), 2.0**-10)
        return single * (1.0 + 2.0**-20)
    return _lanczos_value(matrix, LANCZOS)


def _product(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """Return x -> matrix @ x; for complex numbers by real products, which are five times faster on processors."""
    if not matrix.is_complex():
        return lambda x: matrix @ x
    real, imaginary = matrix.real.contiguous(), matrix.imag.contiguous()

    def product(x: Tensor) -> Tensor:
        parts = torch.view_as_real(x.resolve_conj())
        a, b = real @ parts, imaginary @ parts
        return torch.complex(a[:, 0] - b[:, 1], a[:, 1] + b[:, 0])

    return product


def _lanczos_value(matrix: Tensor, tolerance: float) -> float:
    size, product = min(KRYLOV, len(matrix)), _product(matrix)
    basis = matrix.new_zeros(size + 1, len(matrix))
    diagonal, above = torch.zeros(2, size, dtype=torch.float64)
    start = matrix.diagonal() + 0.0
    basis[0] = start / torch.linalg.vector_norm(start)
    for k in range(size):
        image = product(basis[k])
        diagonal[k] = float((basis[k].conj() @ image).real)
        for _ in range(2):
            image = image - basis[: k + 1].mT @ (basis[: k + 1] @ image.conj()).conj()
        above[k] = float(torch.linalg.vector_norm(image))
        if not 0.0 < float(above[k]) < torch.inf:
            break
        basis[k + 1] = image / above[k]
        if k % 8 == 7 or k == size - 1:
            small = torch.diag(diagonal[: k + 1]) + torch.diag(above[:k], 1)
            values, vectors = torch.linalg.eigh(small, UPLO="U")
            if float(above[k] * vectors[-1, -1].abs()) <= tolerance * float(values[-1]):
                return float(values[-1])
    return 0.0


def _rows(blocks: Tensor, index: Tensor) -> Tensor:
    """Return the blocks of this index, without a copy where these are all."""
    return blocks if len(index) == len(blocks) else blocks[index]


def rayleigh(gram: Tensor) -> Tensor:
    """Return rough lower estimates of λ_max of each block, from a few power iterations, (b,)."""
    vector = gram.diagonal(dim1=-2, dim2=-1)[..., None] + 0.0
    for _ in range(STEPS):
        vector = gram @ vector
        vector = vector / torch.linalg.vector_norm(vector, dim=(-2, -1), keepdim=True).clamp_min(TINY)
    return torch.linalg.vector_norm(gram @ vector, dim=(-2, -1))
