"""Better multipliers for a chain by gradient steps: proposals only, `lipcert.bounds.composition.certificate` proves.

For given Λ the smallest L² follows by eliminating z_{K-1}, …, z_1 in turn, largest first. With P_K = W_KᵀW_K and
v = W_k z_{k-1}, maximising z_kᵀP z_k + g_k over z_k gives, when Λ_k ≻ P = P_{k+1},

    z_k = a (Λ_k - P)⁻¹ Λ_k v,      P_k = W_kᵀ(a² Λ_k(Λ_k - P_{k+1})⁻¹Λ_k - αβ Λ_k) W_k,      L² = ‖P_1‖,

a = (α + β)/2. So yᵀP_k y is the maximum over (z_k, …, z_{K-1}) of a function that is linear in the multipliers, and its
derivative with respect to λ_ji, j ≥ k, is what stands beside it at the maximum (the envelope theorem),

    c_ji = -αβ v_ji² + (α + β) v_ji z_ji - z_ji²      along the trajectory that starts at z_{k-1} = y.

No differentiation through factorisations is needed. The constraint Λ_k ≻ P_{k+1} is built in,

    Λ_k = (1 + e^ξ_k)·ρ_k·D_k,      D_k = diag(e^θ_k),      ρ_k = λ_max(D_k^-½ P_{k+1} D_k^-½) = qᵀ D^-½ P D^-½ q,

∂ρ_k/∂θ_ki = -ρ_k q_i² and ∂ρ_k/∂λ_ji as above with y = D^-½ q: any θ, ξ are feasible, and Adam minimises log L².
LipDiff (Wang et al., ICLR 2024) has the solver-free idea; it differs by a trace constraint in place of the elimination,
and by certifying nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy.sparse.linalg
import torch
from torch import Tensor

from lipcert.bounds.composition.chain import Chain

STEPS = 300  # gradient steps for a small chain
WORK = 1e12  # cubes of sizes, summed over layers and steps: what a large chain may cost
_LEAST = 40  # steps of any chain
_RATE = 0.2  # of Adam, decaying to a hundredth
_SMALL = 256  # size up to which an eigendecomposition is as fast as Lanczos
_MARGIN = 1e-9  # relative, by which L² is enlarged, since the eigenvalue of a large matrix is not exact


def optimised(chain: Chain, scalars: list[float]) -> tuple[float, list[Tensor]] | None:
    """Return L² and multipliers (n_k,) found from scalar ones, unproved; None where floating point fails at once."""
    work = sum(float(max(W.shape)) ** 3 for W in chain.matrices)
    steps = max(_LEAST, min(STEPS, int(WORK / work)))
    directions = [torch.zeros_like(W[:, 0]) for W in chain.matrices[:-1]]  # θ
    distances = [W.new_zeros(()) for W in chain.matrices[:-1]]  # ξ
    optimiser = torch.optim.Adam([*directions, *distances], lr=_RATE)
    rates = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.01 ** (1.0 / steps))
    best: tuple[float, list[Tensor]] | None = None
    for step in range(steps):
        found = _eliminated(chain, directions, distances, scalars if step == 0 else None)
        if found is None:
            break
        if best is None or found.square < best[0]:
            best = found.square, found.multipliers
        _differentiate(chain, found, directions, distances)
        optimiser.step()
        rates.step()
    return None if best is None else (best[0] * (1.0 + _MARGIN), best[1])


@dataclass(frozen=True, eq=False)
class _Elimination:
    """L², and for every k = 1, …, K - 1: Λ_k, the Cholesky factor of Λ_k - P_{k+1}, ρ_k, and q; last, u = z_0."""

    square: float
    multipliers: list[Tensor]
    factors: list[Tensor]
    largest: list[float]
    vectors: list[Tensor]
    start: Tensor


def _eliminated(
    chain: Chain, directions: list[Tensor], distances: list[Tensor], scalars: list[float] | None
) -> _Elimination | None:
    """Return what these parameters give, None where floating point fails; `scalars` first set the distances ξ."""
    P = chain.matrices[-1].T @ chain.matrices[-1]
    multipliers: list[Tensor] = []
    factors: list[Tensor] = []
    largest: list[float] = []
    vectors: list[Tensor] = []
    for k in range(chain.depth - 2, -1, -1):
        W, (low, high) = chain.matrices[k], chain.slopes[k]
        half = (0.5 * directions[k]).exp()
        rho, q = _leading(P / half[:, None] / half)
        if not 0.0 < rho < math.inf:
            return None
        if scalars is not None:
            distances[k].fill_(math.log(min(max(scalars[k] * 1.001 / rho - 1.0, 1e-3), 1e6)))
        m = (1.0 + distances[k].exp()) * rho * half.square()
        factor, info = torch.linalg.cholesky_ex(m.diag() - P)
        if int(info):
            return None
        weighted = m[:, None] * W
        image = torch.linalg.solve_triangular(factor, weighted, upper=False)
        P = (0.25 * (low + high) ** 2) * (image.T @ image)
        if low * high != 0.0:
            P = P - (low * high) * (W.T @ weighted)
        multipliers.insert(0, m)
        factors.insert(0, factor)
        largest.insert(0, rho)
        vectors.insert(0, q)
    if not bool(P.isfinite().all()):
        return None
    square, start = _leading(P)
    found = _Elimination(square, multipliers, factors, largest, vectors, start)
    return found if 0.0 < square < math.inf else None


def _differentiate(chain: Chain, at: _Elimination, directions: list[Tensor], distances: list[Tensor]) -> None:
    """Set the gradients of log L² with respect to θ_k and ξ_k."""
    slopes = [c / at.square for c in _constraints(chain, at, 0, at.start)]  # of log L², by Λ_k, indirect ones added
    for k, (direction, distance) in enumerate(zip(directions, distances, strict=True)):
        m, q, rho = at.multipliers[k], at.vectors[k], at.largest[k]
        total = (slopes[k] * m).sum()
        direction.grad = slopes[k] * m - total * q.square()
        distance.grad = total * distance.exp() / (1.0 + distance.exp())
        for j, c in enumerate(_constraints(chain, at, k + 1, q * (-0.5 * direction).exp()), start=k + 1):
            slopes[j] = slopes[j] + total / rho * c


def _constraints(chain: Chain, at: _Elimination, start: int, z: Tensor) -> list[Tensor]:
    """Return c_j for j > start along the trajectory from z_start = z."""
    found = []
    for j in range(start, chain.depth - 1):
        low, high = chain.slopes[j]
        v = chain.matrices[j] @ z
        z = torch.cholesky_solve((0.5 * (low + high) * at.multipliers[j] * v)[:, None], at.factors[j])[:, 0]
        found.append((low + high) * v * z - low * high * v * v - z * z)
    return found


def _leading(P: Tensor) -> tuple[float, Tensor]:
    """Return the largest eigenvalue of a symmetric matrix and its eigenvector."""
    if len(P) > _SMALL:
        matrix = P.numpy(force=True)
        try:
            values, vectors = scipy.sparse.linalg.eigsh(matrix, 1, which="LA", v0=matrix.diagonal().copy(), tol=1e-6)
            return float(values[0]), torch.as_tensor(vectors[:, 0]).to(P)
        except scipy.sparse.linalg.ArpackError:
            pass
    values, vectors = torch.linalg.eigh(P)
    return float(values[-1]), vectors[:, -1]
