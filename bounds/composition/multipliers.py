"""Better multipliers for a chain by gradient steps: proposals only, `lipcert.bounds.composition.certificate` proves.

For given Λ the smallest L² follows by eliminating z_{K-1}, …, z_1 in turn, largest first. With P_K = W_KᵀW_K and
v = W_k z_{k-1}, maximising z_kᵀP z_k + g_k over z_k gives, when Λ_k ≻ P = P_{k+1},

    vᵀ(a² Λ_k (Λ_k - P)⁻¹ Λ_k - αβ Λ_k) v,      P_k = W_kᵀ(a² Λ_k(Λ_k - P_{k+1})⁻¹Λ_k - αβ Λ_k) W_k,      L² = ‖P_1‖.

The constraint Λ_k ≻ P_{k+1} is built in: Λ_k = (1 + e^ξ_k)·λ_max(D^-½ P_{k+1} D^-½)·D with D = diag(e^θ_k), so any
θ_k, ξ_k are feasible, and Adam minimises log L² over them. LipDiff (Wang et al., ICLR 2024) has the solver-free idea;
it differs by a trace constraint in place of the elimination, and by certifying nothing.
"""

from __future__ import annotations

import math

import scipy.sparse.linalg
import torch
from torch import Tensor

from lipcert.bounds.composition.chain import Chain

STEPS = 200  # gradient steps for a small chain
WORK = 5e11  # cubes of sizes, summed over layers and steps: what a large chain may cost
_RATE = 0.2  # of Adam, decaying to a hundredth
_SMALL = 256  # size up to which an eigendecomposition is as fast as Lanczos
_MARGIN = 1e-9  # relative, by which L² is enlarged so that the last step need not be exact


def optimised(chain: Chain, square: float, scalars: list[float]) -> tuple[float, list[Tensor]] | None:
    """Return L² and multipliers (n_k,) found from scalar ones, unproved; None if no step was finite."""
    with torch.enable_grad():
        return _search(chain, square, scalars)


def _search(chain: Chain, square: float, scalars: list[float]) -> tuple[float, list[Tensor]] | None:
    work = sum(float(max(W.shape)) ** 3 for W in chain.matrices)
    steps = max(16, min(STEPS, int(WORK / work)))
    directions = [torch.zeros_like(W[:, 0]).requires_grad_() for W in chain.matrices[:-1]]
    distances = _start(chain, scalars)
    if distances is None:
        return None
    optimiser = torch.optim.Adam([*directions, *distances], lr=_RATE)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.01 ** (1.0 / steps))
    best: tuple[float, list[Tensor]] | None = None
    for _ in range(steps):
        optimiser.zero_grad()
        try:
            value, multipliers = _eliminated(chain, directions, distances)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            break
        if not bool(value.isfinite()):
            break
        if best is None or value.item() < best[0]:
            best = value.item(), [m.detach().clone() for m in multipliers]
        value.log().backward()
        if any(p.grad is None or not bool(p.grad.isfinite().all()) for p in [*directions, *distances]):
            break
        optimiser.step()
        schedule.step()
    return None if best is None else (best[0] * (1.0 + _MARGIN), best[1])


def _start(chain: Chain, scalars: list[float]) -> list[Tensor] | None:
    """Return ξ_k for which the multipliers are the given scalars, slightly enlarged."""
    P = chain.matrices[-1].T @ chain.matrices[-1]
    found: list[Tensor] = []
    for k in range(chain.depth - 2, -1, -1):
        largest = _largest(P).item()
        scalar = scalars[k] * (1.0 + 1e-3)
        ratio = scalar / largest - 1.0 if largest > 0.0 else 1.0
        ratio = min(max(ratio, 1e-3), 1e6) if math.isfinite(ratio) else 1.0
        found.append(P.new_tensor(math.log(ratio)).requires_grad_())
        P = _previous(chain, k, P.new_full((len(P),), (1.0 + ratio) * largest), P).detach()
    return found[::-1] if bool(P.isfinite().all()) else None


def _eliminated(chain: Chain, directions: list[Tensor], distances: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return L² and the multipliers of these parameters."""
    P = chain.matrices[-1].T @ chain.matrices[-1]
    multipliers: list[Tensor] = []
    for k in range(chain.depth - 2, -1, -1):
        half = (0.5 * directions[k]).exp()
        largest = _largest(P / half[:, None] / half)
        m = (1.0 + distances[k].exp()) * largest * half.square()
        multipliers.append(m)
        P = _previous(chain, k, m, P)
    return _largest(P), multipliers[::-1]


def _largest(P: Tensor) -> Tensor:
    """Return λ_max of a symmetric matrix, with its gradient; of a large one vᵀPv with v from Lanczos."""
    if len(P) <= _SMALL:
        return torch.linalg.eigvalsh(P)[-1]
    given = P.detach()
    try:
        start = given.diagonal().numpy(force=True).copy()
        vector = scipy.sparse.linalg.eigsh(given.numpy(force=True), 1, which="LA", v0=start, tol=1e-5)[1][:, 0]
    except scipy.sparse.linalg.ArpackError as error:
        raise torch.linalg.LinAlgError(str(error)) from error  # type: ignore[attr-defined]
    v = torch.as_tensor(vector).to(given)
    return v @ P @ v


def _previous(chain: Chain, k: int, m: Tensor, P: Tensor) -> Tensor:
    """Return P_k from Λ_k and P_{k+1}; raise LinAlgError where their difference is not positive definite."""
    W, (low, high) = chain.matrices[k], chain.slopes[k]
    a = 0.5 * (low + high)
    scaled = m[:, None] * W
    factor = torch.linalg.cholesky(m.diag() - P)
    image = torch.linalg.solve_triangular(factor, scaled, upper=False)
    previous = a * a * (image.T @ image) - low * high * (W.T @ scaled)
    return 0.5 * (previous + previous.T)
