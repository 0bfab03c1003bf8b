"""Attention, whose rows have a bound because they are normalised first.

Queries, keys and values come directly out of `normalize`. Exact ones have norm below 1, and computed ones, whatever
they are computed from, are within a few roundings of such: everything between the two has norm at most R = `WIDE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from .operators import Operation, Value
from .reading import ENTRIES, Array, require
from .rounding import UP, gamma, lengths

WIDE = 1.0 + 2.0**-10


def normalize(shape: Sequence[int], x: Value, dim: int, eps: float, kind: str) -> Operation:
    """x/√(‖x‖² + ε) by rows, of norm below 1; its derivative (I - yy*)/√(‖x‖² + ε) is at most 1/√ε."""
    require(kind == "squares" and type(dim) is int and dim == len(shape) - 1, "another normalisation than of rows")
    require(type(eps) in (int, float) and 2.0**-60 < eps < 2.0**60, "eps")

    def run(array: Array) -> tuple[Array, Array]:
        squares = np.square(array).sum(-1, keepdims=True) + eps
        result = array / np.sqrt(squares)
        finite = np.isfinite(squares).reshape(len(array), -1).all(1)
        return result, np.where(finite, gamma(shape[-1] + 16) * lengths(result), math.inf)

    return Operation([x.name], [1.0 / math.sqrt(eps) * UP], run)


def attention(
    shape: Sequence[int], query: Value, key: Value, value: Value, attn_mask: Array | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Operation:  # fmt: skip
    """softmax(s QKᵀ + B) V, window by window and head by head, with all rows of norm at most R.

    dO_i = Σ_j p_ij (v_j - v̄_i) dS_ij + Σ_j p_ij dv_j, dS_ij = s(⟨dq_i, k_j⟩ + ⟨q_i, dk_j⟩). With V_i = Σ_j p_ij ‖v_j -
    v̄_i‖², Cauchy-Schwarz for the probabilities p_i· gives at most |s|R²‖dq_i‖ for the part of dq, and (Σ_i p_ij V_i)
    s²R²‖dk_j‖², summed over j, for the square of that of dk; the part of dv is at most √(largest column sum) ‖dV‖, as
    ‖P‖² ≤ ‖P‖₁‖P‖_∞. Scores of one row differ by at most D = 2|s|R² + osc(B), so p_ij ≤ q = e^D/(e^D + M - 1) for M
    keys. V_i ≤ R²; and if p_ij ≥ 1/2 for a v_j of length ρ, V_i ≤ pρ² + (1-p)R² - max(0, pρ - (1-p)R)² ≤ 4p(1-p)R²
    (where the maximum is 0, pρ² + (1-p)R² ≤ (1-p)R²/p; elsewhere it increases with ρ). So p_ij V_i ≤ h(p_ij) R² with
    h(p) = p, from 1/2 on 4p²(1-p), which is at most 16/27, at p = 2/3. docs/bounds.md 3.
    """
    require(enable_gqa is False and is_causal is False and dropout_p == 0.0, "another attention")
    require(query.unit and key.unit and value.unit, "rows without a bound: queries, keys and values are normalised")
    (*lead, n, d), (*others, m, _) = query.shape, key.shape
    require(key.shape == value.shape and lead == others and key.shape[-1] == d and len(lead) > 0, "its shapes")
    require(math.prod(lead) * n * m <= ENTRIES, "too many scores")
    factor = 1.0 / math.sqrt(d) if scale is None else scale
    require(type(factor) in (int, float) and abs(factor) < 1e6, "scale")
    bias = np.zeros((1, 1)) if attn_mask is None else attn_mask
    require(np.broadcast_shapes(bias.shape, (*lead, n, m)) == (*lead, n, m), "the shape of attn_mask")
    bias = np.broadcast_to(bias, (*bias.shape[:-2], n, m))
    s = abs(factor) * UP
    spread = min((2 * s * WIDE**2 + float((bias.max(-1) - bias.min(-1)).max())) * UP, 600.0)
    q = min(1.0, math.exp(spread) / (math.exp(spread) + m - 1) * UP) if spread < 600.0 else 1.0
    p = min(q, 2 / 3)
    varying = 0.0 if m == 1 else (q if q <= 0.5 else 4 * p * p * (1 - p)) * UP
    along = s * WIDE**2 * (m > 1)
    factors = [along * UP, s * WIDE**2 * math.sqrt(n * varying) * UP, math.sqrt(n * q) * UP]

    def run(queries: Array, keys: Array, values: Array) -> tuple[Array, Array]:
        scores = factor * (queries @ keys.swapaxes(-1, -2)) + bias
        largest = np.abs(queries) @ np.abs(keys).swapaxes(-1, -2) * s + np.abs(bias)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        # scores within δ change probabilities by a factor e^±2δ; the difference to the largest is rounded once more
        delta = (gamma(d + 8) * largest.reshape(len(queries), -1).max(1) + 1e-300) * 2
        relative = np.expm1(np.minimum(2 * delta, 1.0)) + gamma(m + 64)
        error = np.where(delta < 2.0**-10, 2 * relative, math.inf)
        return weights @ values, error * lengths(weights @ np.abs(values))

    return Operation([query.name, key.name, value.name], factors, run)


ATTENTION: dict[str, Callable[..., Operation]] = {
    "lipcert.normalize": normalize,
    "aten.scaled_dot_product_attention.default": attention,
}
