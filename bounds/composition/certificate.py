"""Proof of a bound of a chain from multipliers that anybody may have proposed, by one verified factorisation.

Let z_0 = Δx', v_k = W_k z_{k-1}, z_k = Δφ_k(v_k) with slopes in [α, β] = [α_k, β_k], y = W_K z_{K-1}. Entry by entry
(z - αv)(βv - z) ≥ 0. For any nonnegative diagonal Λ_k the sum of Λ_k-weighted inequalities is a quadratic form

    g_k = Σ_i λ_ki (-αβ v_ki² + (α + β) v_ki z_ki - z_ki²) ≥ 0,

so if the symmetric block tridiagonal matrix Q of the form

    wᵀQw = L²‖z_0‖² - ‖W_K z_{K-1}‖² - Σ_k g_k,          w = (z_0, …, z_{K-1}),

    Q_00 = L² + αβ W_1ᵀΛ_1W_1,     Q_kk = Λ_k + αβ W_{k+1}ᵀΛ_{k+1}W_{k+1},     Q_{K-1,K-1} = Λ_{K-1} - W_Kᵀ W_K,
    Q_{k-1,k} = -(α + β)/2 · W_kᵀΛ_k

has Q ⪰ -δ, then ‖y‖² ≤ L²‖z_0‖² + δ‖w‖². A chain in normal form has ‖z_k‖ ≤ ‖x‖ for all k, so ‖w‖² ≤ K‖x‖², and

    ‖y‖² ≤ (L² + Kδ)·‖x‖².                                                                                          (1)

This is LipSDP-Neuron (Fazlyab et al. 2019, arXiv 1906.04893) in the difference form, which needs no semidefinite
program: whatever L and Λ are proposed, δ is proved. (1) also absorbs everything that floating point does:

*Factorisation.* Let R be block upper bidiagonal with blocks R_kk, R_{k-1,k}, here from a Cholesky factorisation that
LAPACK proposes. If Q + shift = RᵀR + E then Q ⪰ -shift - ‖E‖, since RᵀR ⪰ 0. The norm of a symmetric block tridiagonal
matrix is at most the sum of the norms of its diagonal blocks and of its upper blocks, since ‖(0 B; Bᵀ 0)‖ = ‖B‖; those
of E are residuals, multiplied out, with a rounding of γ_n‖R_kk‖_F² + γ_n‖R_{k-1,k}‖_F², γ_n‖R_{k-1,k-1}‖_F‖R_{k-1,k}‖_F
and one unit roundoff of every difference that was formed.
*Forming Q.* Its blocks are products of stored matrices: γ_{n+4}|αβ|‖Λ^½W‖_F², γ_n‖W_K‖_F², γ_4‖Q_{k-1,k}‖_F.
*Stored matrices.* The exact v_k differ from the stored ones by η_k, ‖η_k‖ ≤ ε_k‖x‖, which changes g_k by at most
max_i λ_ki·(|αβ|(2‖v_k‖ + ε_k)ε_k + |α + β|ε_k)‖x‖²; the exact y by ε_K‖x‖. A compressed input
has ‖z_0‖ ≤ ‖x‖.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipcert.bounds.composition.chain import Chain
from lipcert.bounds.rounding import UNIT, add_up, enlarge, gamma, mul_up, scale_up, sqrt_up
from lipcert.bounds.spectral import TINY, frobenius, raised

_SHIFTS = (4.0, 64.0, 2.0**12, 2.0**18)  # in units of the roundoff of the largest entry; the first that works
_UNIT = UNIT["float64"]


def proved(chain: Chain, square: float, multipliers: Sequence[Tensor]) -> float | None:
    """Return a proved upper bound of the Lipschitz constant, near √square if the multipliers Λ_k (n_k,) prove that.

    `chain` is in normal form and has an activation. None where Q is not positive semidefinite up to rounding: then the
    proposal proves nothing.
    """
    if not chain.norms or chain.depth < 2:
        raise ValueError("a certificate needs a chain in normal form with at least one activation")
    if any(tuple(m.shape) != W.shape[:1] for m, W in zip(multipliers, chain.matrices[:-1], strict=True)):
        raise ValueError("every entry of every activation needs one multiplier")
    if not 0.0 < square < 2.0**200 or any(not bool((m > 0.0).all() and (m < 2.0**200).all()) for m in multipliers):
        return None
    diagonal, upper, forming = _form(chain, square, multipliers)
    scale = max(float(block.diagonal().abs().amax()) for block in diagonal)
    width = max(len(block) for block in diagonal)
    for step in _SHIFTS:
        shift = step * _UNIT * width * scale
        defect = _defect(diagonal, upper, shift)
        if defect is not None:
            break
    else:
        return None
    delta = add_up(shift, defect, forming)
    total = add_up(square, mul_up(float(chain.depth), delta), _stored(chain, multipliers))
    value = add_up(sqrt_up(total), chain.errors[-1])
    return scale_up(value, chain.exponent)


def _form(chain: Chain, square: float, multipliers: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], float]:
    """Return the diagonal blocks of Q, the blocks above them, and a bound of the norm of what rounding changed."""
    first, last = chain.matrices[0], chain.matrices[-1]
    diagonal = [torch.full_like(first[0], square).diag(), *(m.diag() for m in multipliers)]
    upper, errors = [], [TINY]
    for k, (W, m, (low, high)) in enumerate(zip(chain.matrices[:-1], multipliers, chain.slopes, strict=True)):
        block = W.T * (m * (-0.5 * (low + high)))
        errors.append(_up(gamma(4) * frobenius(block), 4))
        upper.append(block)
        if low != 0.0 and high != 0.0:
            weight = m * (low * high)
            inner = W.T @ (weight[:, None] * W)
            errors.append(_up(gamma(W.shape[0] + 4) * frobenius(weight.abs().sqrt()[:, None] * W).square(), 12))
            diagonal[k] = diagonal[k] + inner
            errors.append(_up(_UNIT * diagonal[k].diagonal().abs().amax(), 2))
    inner = last.T @ last
    errors.append(_up(gamma(last.shape[0]) * frobenius(last).square(), 4))
    diagonal[-1] = diagonal[-1] - inner
    errors.append(_up(_UNIT * diagonal[-1].diagonal().abs().amax(), 2))
    return diagonal, upper, add_up(*errors)


def _defect(diagonal: Sequence[Tensor], upper: Sequence[Tensor], shift: float) -> float | None:
    """Return a bound of ‖Q + shift - RᵀR‖ for a factor R proposed block by block, None where there is none."""
    errors = [TINY]
    above: Tensor | None = None  # R_{k-1,k}
    for k, block in enumerate(diagonal):
        shifted = block.clone()
        shifted.diagonal().add_(shift)
        errors.append(_up(_UNIT * shifted.diagonal().abs().amax(), 2))
        inner = torch.zeros_like(block) if above is None else above.T @ above
        factor, info = torch.linalg.cholesky_ex(shifted - inner, upper=True)
        if int(info) or not bool(factor.isfinite().all()):
            return None
        step = shifted - factor.T @ factor
        rest = step - inner
        lengths = frobenius(factor).square() + (0.0 if above is None else frobenius(above).square())
        rounding = gamma(max(len(block), 1 if above is None else len(above))) * lengths
        errors.append(_up(frobenius(rest) + _UNIT * (frobenius(step) + frobenius(rest)) + rounding, 10))
        if k < len(upper):
            above = torch.linalg.solve_triangular(factor.T, upper[k], upper=False)
            rest = upper[k] - factor.T @ above
            rounding = gamma(len(factor)) * frobenius(factor) * frobenius(above)
            errors.append(_up(frobenius(rest) * (1.0 + 2.0 * _UNIT) + rounding, 10))
    return add_up(*errors) if all(map(math.isfinite, errors)) else None


def _stored(chain: Chain, multipliers: Sequence[Tensor]) -> float:
    """Return how much the errors of the stored matrices can change the sum of all g_k, relative to ‖x‖²."""
    parts = []
    for m, error, norm, (low, high) in zip(multipliers, chain.errors, chain.norms, chain.slopes, strict=False):
        product, total = mul_up(abs(low), abs(high)), add_up(abs(low), abs(high))
        change = add_up(mul_up(product, add_up(norm, norm, error)), total)
        parts.append(mul_up(float(m.amax()), error, change))
    return add_up(*parts)


def _up(value: Tensor, roundings: int) -> float:
    return float(raised(enlarge(value, 2), roundings))
