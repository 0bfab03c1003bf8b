"""Softmax attention on bounded rows: how far the output can move for given moves of queries, keys and values.

O = P V with P = softmax(s Q Kᵀ + B) row by row, for N_q queries and N_k keys, B constant. With the rows of K and V in
balls of radius R_k and R_v (whatever the centres, the same for all keys of one head) and the rows of Q of norm at most
R_q,

    ‖dO‖_F ≤ |s| R_v R_k ‖dQ‖_F + |s| R_v R_q √c' ‖dK‖_F + √c ‖dV‖_F,                                           (1)

where c bounds every column sum of P, and c' every sum Σ_i p_ij V_i / R_v² with V_i the variance below; c' ≤ c. *Proof.*
dO_i = Σ_j p_ij (v_j - v̄_i) dS_ij + Σ_j p_ij dv_j with dS_ij = s(⟨dq_i, k_j⟩ + ⟨q_i, dk_j⟩) and v̄_i = Σ_j p_ij v_j;
the first sum does not change when a number that does not depend on j is added to dS_ij, so k_j may be replaced by
k_j - k_0 for the centre k_0. By Cauchy-Schwarz for the probabilities p_i· it is at most V_i^½ (Σ_j p_ij dS_ij²)^½ with
V_i = Σ_j p_ij ‖v_j - v̄_i‖². The part of dq gives at most |s| R_v R_k ‖dq_i‖. The part of dk, squared and summed over i,
is at most s² R_q² Σ_j (Σ_i p_ij V_i) ‖dk_j‖² ≤ s² R_q² R_v² c' ‖dK‖². Last, ‖P‖² ≤ ‖P‖₁ ‖P‖_∞ ≤ c. ∎

*Variance.* Points in a ball of radius R (around 0, say) have V ≤ R² - ‖v̄‖² ≤ R². If one has the probability p ≥ 1/2
and length ρ, then V ≤ pρ² + (1-p)R² - max(0, pρ - (1-p)R)². Where the maximum is 0 that is at most (1-p)R²/p ≤
4p(1-p)R², elsewhere it increases with ρ up to 4p(1-p)R² at ρ = R. So p_ij V_i ≤ h(p_ij) R² with h(p) = p up to 1/2 and
4p²(1-p) above, which is greatest at 2/3: h ≤ 16/27. A row that sees one key alone has V_i = 0.

*Column sums.* The scores of one row differ by at most D = 2|s| R_q R_k + osc(B), so p_ij ≤ q_i = e^D / (e^D + M_i - 1)
with M_i the keys that row i may see; c ≤ max over j of the sum of q_i over the rows that see j, and c' of that of
max h over [0, q_i]. So c ≤ N_q, and c tends to N_q/N_k where scores are nearly equal: (1) is at most of order √N, and
independent of N for small s R_q R_k.

Several heads and windows act on disjoint parts: the coefficients are the largest, the norms those of all parts
together (Minkowski). Against LipsFormer's theorem (arXiv 2304.09856), whose terms grow as N², (1) has √N; for
dot-product attention on a bounded set Castin et al. (2024, arXiv 2312.14820) have the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lipcert.bounds.graph import Node, Ref
from lipcert.bounds.origin import origin

SAFE = 1.0 + 2.0**-40  # more than the rounding of the few operations below


@dataclass(frozen=True)
class Rows:
    """Bound the rows of one head: each has norm at most `norm`, and all lie in one ball of this `radius`."""

    norm: float
    radius: float


@dataclass(frozen=True)
class Columns:
    """Bound the sums over the queries, for each key, of its probabilities, and of these times V_i / R_v²."""

    plain: float
    varying: float


def coefficients(queries: Rows, keys: Rows, values: Rows, scale: float, columns: Columns) -> tuple[float, float, float]:
    """Return the coefficients of (1) for dQ, dK and dV, rounded up.

    >>> one = Rows(1.0, 1.0)
    >>> [round(c, 9) for c in coefficients(one, one, one, 0.5, Columns(4.0, 1.0))]
    [0.5, 0.5, 2.0]
    """
    scale = abs(scale) * SAFE
    across = scale * values.radius * queries.norm * math.sqrt(columns.varying) * SAFE * SAFE
    along = 0.0 if columns.varying == 0.0 else scale * values.radius * keys.radius * SAFE
    return along, across, math.sqrt(columns.plain) * SAFE


def column_sums(spread: float, bias: Tensor | None, queries: int, keys: int) -> Columns:
    """Bound the column sums of a softmax over rows of scores whose products differ by at most `spread`.

    `bias`: constants added to the scores, (..., queries, keys), -∞ where a key is not seen; None for none. Raises
    ValueError where a row sees no key at all, as its softmax is not a number.

    >>> [round(column_sums(spread, None, 6, 3).plain, 9) for spread in (0.0, math.inf)]
    [2.0, 6.0]
    >>> round(column_sums(math.inf, None, 27, 3).varying, 9)
    16.0
    """
    if bias is None:  # all rows are alike, and all columns
        rows = _largest(torch.tensor(spread, dtype=torch.float64), torch.tensor(keys))
        return Columns(*(float(row) * queries * SAFE for row in rows))
    seen = (bias > -math.inf).expand(*bias.shape[:-2], queries, keys)
    count = seen.sum(-1)  # (..., queries)
    if bool((count == 0).any()):
        raise ValueError("a row of the attention sees no key")
    bias = bias.expand(seen.shape)
    low = torch.where(seen, bias, math.inf).amin(-1)
    high = torch.where(seen, bias, -math.inf).amax(-1)
    plain, varying = (
        float(torch.where(seen, row[..., None], 0.0).sum(-2).max()) * SAFE * (1.0 + queries * 2.0**-52)
        for row in _largest((high - low) * SAFE + spread, count)
    )
    return Columns(plain, varying)


def _largest(spread: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and max h over [0, q] for rows whose scores differ by so much, of so many keys; rounded up.

    h is p, then 4p²(1-p) from 1/2 to 2/3, then 16/27; 0 where there is one key.
    """
    power = spread.clamp_max(700.0).exp() * SAFE
    q = torch.where(spread > 699.0, torch.ones_like(power), power / (power + (count - 1)) * SAFE).clamp_max(1.0)
    p = q.clamp_max(2.0 / 3.0)
    varying = torch.where(q <= 0.5, q, 4.0 * p.square() * (1.0 - p)) * SAFE
    return q, torch.where(count == 1, 0.0, varying)


def sources(nodes: Mapping[str, Node]) -> frozenset[str]:
    """Return the names of the values that the rules of attention ask for after their last consumer."""
    wanted: set[str] = set()
    for node in nodes.values():
        names: list[str] = []
        if node.op == "aten.scaled_dot_product_attention.default":
            names = [node[k].name for k in ("query", "key", "value") if isinstance(node[k], Ref)]
        elif node.op in ("aten.matmul.default", "aten.bmm.default") and len(node.inputs) == 2:
            names = [*node.inputs]
        for name in names:
            wanted.add(name)
            layer = nodes[origin(nodes, name, places=False).source]
            if layer.op == "aten.linear.default" and isinstance(layer["input"], Ref):
                wanted.add(layer["input"].name)
    return frozenset(wanted)
