"""From a chain to a bound: every method proves one, or returns None; the smallest is the bound of the chain.

A method takes a chain in normal form. To add one, write it and put it into `METHODS`. Proposals are made in floating
point and may be arbitrarily bad; what is returned was proved by `lipcert.bounds.composition.certificate`, or by proved
norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipcert.bounds.composition.certificate import proved
from lipcert.bounds.composition.chain import Chain
from lipcert.bounds.composition.multipliers import optimised
from lipcert.bounds.core import Bound
from lipcert.bounds.matrix import spectral_norm_upper
from lipcert.bounds.rounding import add_up, gamma, mul_up, scale_up
from lipcert.bounds.spectral import TINY, frobenius, raised

Method = Callable[[Chain], Bound | None]


def chain_bound(chain: Chain, tightness: str = "fast", method: str = "auto") -> Bound:
    """Return the smallest proved bound of the Lipschitz constant of a chain; `method` names how it was found.

    `tightness` is a key of METHODS, `method` how spectral norms are bounded.

    >>> W = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    >>> chain = Chain((W, W), ((0.0, 1.0),))
    >>> bound = chain_bound(chain)  # the product of the norms is 2
    >>> bound.kind, bound.value <= 2.0 + 1e-9
    ('upper', True)
    """
    chain = chain.measured(method)
    best = product(chain)
    if best.value == 0.0 or math.isinf(best.value):
        return best
    small = max(len(W) for W in chain.matrices[:-1] or chain.matrices) <= FACTORISED[tightness]
    normal = chain.normal(method, compress=small)
    if normal is None:
        return best
    runs = [run for run in METHODS[tightness] if small or run not in CUBIC]
    found = [best, *(bound for run in runs if (bound := run(normal)) is not None)]
    return min(found, key=lambda bound: bound.value)


def product(chain: Chain) -> Bound:
    """Bound a chain by ∏‖W_k‖·∏max(|α_k|, |β_k|), for a chain that need not be normal."""
    value = mul_up(*chain.measured().norms, *chain.steepest)
    return Bound(scale_up(value, chain.exponent), "upper", "product of norms")


def norm_of_product(chain: Chain) -> Bound | None:
    """Bound a chain whose activations were all linear, hence are gone, by the norm of its one matrix."""
    if chain.depth > 1:
        return None
    return Bound(scale_up(chain.norms[0], chain.exponent), "upper", "norm of the product")


def eclipse_fast(chain: Chain) -> Bound | None:
    """Bound a chain by ECLipsE-Fast (Xu and Sivaranjani, NeurIPS 2024, arXiv 2404.04375), for any slopes.

    Write φ(v) = a v + b ψ(v) with a = (α + β)/2, b = (β - α)/2: then z = a v + e with ‖e‖ ≤ b‖v‖. Carry a matrix P with

        z_{k-1} = P^½ u  for some ‖u‖ ≤ ‖x‖,      P_0 = I.

    Let A = W_k P^½, s = ‖A‖, v = A u, and t > 0 with G = I - t AᵀA ≻ 0. For every vector w, by Cauchy and Schwarz,

        |wᵀz| ≤ |a wᵀA u| + b‖w‖‖A u‖ ≤ |a|‖G^-½Aᵀw‖·‖G^½u‖ + (b/√t)‖w‖·√t‖A u‖
              ≤ √(wᵀ P' w) · √(uᵀG u + t‖A u‖²) = √(wᵀ P' w)·‖u‖,        P' = a² A G⁻¹ Aᵀ + (b²/t) I,

    so z lies in the ellipsoid of P', and L = ‖W_K P_{K-1}^½‖ at the end. Along the largest singular direction of A the
    axis of P' is s²(a²/(1 - τ) + b²/τ) with τ = t s², least for τ = b/(|a| + b), where it is s²(|a| + b)² as in the
    product of norms; along all others it is smaller. For slopes [0, 1], τ = 1/2: the recursion of the paper.

    The inequality with scalar multipliers λ_k = t_k/b_k² that this rests on is (1) of `certificate`, with the
    multipliers scaled by L²; that proves L, so that the recursion may be in floating point. Differs from the paper by
    the slopes, and by being proved.
    """
    found = _closed_form(chain)
    if found is None:
        return None
    square, scalars = found
    multipliers = [torch.full_like(W[:, 0], scalar) for W, scalar in zip(chain.matrices, scalars, strict=False)]
    return _bound(proved(chain, square, multipliers), "ECLipsE-Fast")


def liplt(chain: Chain) -> Bound | None:
    """Bound a chain by LipLT (Fazlyab et al., NeurIPS 2023, arXiv 2310.00116), for any slopes.

    With z_k = a_k v_k + b_k ψ_k and ‖ψ_k‖ ≤ ‖v_k‖, v_i = W_i z_{i-1} unrolls to

        v_i = (a_{i-1} ⋯ a_1) W_i ⋯ W_1 x + Σ_{j<i} (a_{i-1} ⋯ a_{j+1}) b_j W_i ⋯ W_{j+1} ψ_j,

    so m_i = ‖v_i‖/‖x‖ satisfies m_i ≤ |a_{i-1} ⋯ a_1|‖W_i ⋯ W_1‖ + Σ_j |a_{i-1} ⋯ a_{j+1}| b_j ‖W_i ⋯ W_{j+1}‖ m_j. The
    products of matrices are formed in floating point, ‖W M - fl(W M)‖ ≤ γ_n‖W‖_F‖M‖_F.
    """
    halves = [(mul_up(0.5, abs(add_up(low, high))), mul_up(0.5, add_up(high, -low))) for low, high in chain.slopes]
    halves = [(max(a, abs(0.5 * (low + high))), b) for (a, b), (low, high) in zip(halves, chain.slopes, strict=True)]
    products: list[tuple[Tensor, float]] = []  # W_i ⋯ W_{j+1} for j < i, and its error
    sizes: list[float] = []  # m_1, m_2, …
    for i, W in enumerate(chain.matrices):
        products = [_times(chain, i, M, error) for M, error in products] + [(W, chain.errors[i])]
        total, path = [], 1.0
        for j in range(i, -1, -1):  # from the latest start to the input
            norm = chain.norms[i] if j == i else add_up(spectral_norm_upper(products[j][0]).value, products[j][1])
            end = 1.0 if j == 0 else mul_up(halves[j - 1][1], sizes[j - 1])
            total.append(mul_up(path, norm, end))
            path = mul_up(path, halves[j - 1][0]) if j else path
        sizes.append(add_up(*total))
    return _bound(scale_up(sizes[-1], chain.exponent), "LipLT") if chain.depth > 1 else None


def lipsdp(chain: Chain) -> Bound | None:
    """Bound a chain by LipSDP-Neuron: one multiplier for every entry, improved by gradient steps, then proved."""
    start = _closed_form(chain)
    found = optimised(chain, start[1]) if start is not None else None
    return None if found is None else _bound(proved(chain, *found), "LipSDP-Neuron")


METHODS: dict[str, tuple[Method, ...]] = {
    "fast": (norm_of_product, liplt, eclipse_fast),
    "tight": (norm_of_product, liplt, eclipse_fast, lipsdp),
}
CUBIC = (eclipse_fast, lipsdp)  # factorise matrices as large as an activation, so have a limit for its size
FACTORISED = {"fast": 1024, "tight": 4608}


def _closed_form(chain: Chain) -> tuple[float, list[float]] | None:
    """Return L² and the multipliers of ECLipsE-Fast, unproved, or None if floating point fails."""
    if chain.depth < 2:
        return None
    shape = torch.eye(chain.matrices[0].shape[1], dtype=torch.float64, device=chain.matrices[0].device)  # P
    scalars = []
    for W, (low, high) in zip(chain.matrices[:-1], chain.slopes, strict=True):
        a, b = 0.5 * (low + high), 0.5 * (high - low)
        gram = W @ shape @ W.T
        gram = 0.5 * (gram + gram.T)
        largest = float(torch.linalg.eigvalsh(gram)[-1])
        if not 0.0 < largest < math.inf or not b > 0.0:
            return None
        t = b / (abs(a) + b) / largest
        scalars.append(t / b / b)
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        shape = (b * b / t) * identity
        if a != 0.0:
            shape = shape + a * a * torch.linalg.solve(identity - t * gram, gram)
    last = chain.matrices[-1] @ shape @ chain.matrices[-1].T
    square = float(torch.linalg.eigvalsh(0.5 * (last + last.T))[-1])
    if not 0.0 < square < math.inf or not all(map(math.isfinite, scalars)):
        return None
    return square, [square * scalar for scalar in scalars]


def _times(chain: Chain, i: int, M: Tensor, error: float) -> tuple[Tensor, float]:
    """Return fl(W_i M) and a bound of its distance from the exact product."""
    W = chain.matrices[i]
    rounding = float(raised(gamma(W.shape[1]) * frobenius(W) * frobenius(M), 3))
    inner = add_up(float(raised(frobenius(M), 0)), error)
    return W @ M, add_up(rounding, mul_up(chain.norms[i], error), mul_up(chain.errors[i], inner), TINY)


def _bound(value: float | None, name: str) -> Bound | None:
    return None if value is None or not math.isfinite(value) else Bound(value, "upper", name)
