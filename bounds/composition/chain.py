"""Chains y = W_K φ_{K-1}(W_{K-1} ⋯ φ_1(W_1 x)): what tighter methods take, in the normal form that they take it in.

Every φ_k acts entry by entry with slopes in [α_k, β_k]; biases do not matter. With z_0 = Δx, v_k = W_k z_{k-1} and
z_k = Δφ_k, all that is known is α_k ≤ z_ki / v_ki ≤ β_k, and that is scale invariant: φ(s·v)/s has the slopes of φ. The
normal form uses this freedom, without changing the Lipschitz constant but for a power of two that is remembered.

1. *Linear activations* (α = β) are multiplied out: W_{k+1} α W_k becomes one matrix, its rounding an error.
2. *Wide inputs.* With M Mᵀ ⪰ W_1 W_1ᵀ some contraction C has W_1 = M C (Douglas), so W_1 x = M x' with ‖x'‖ ≤ ‖x‖: a
   square M replaces W_1 where n_0 > n_1. M is a Cholesky factor L of G + shift·I, G = fl(W_1 W_1ᵀ), and

       L Lᵀ - W_1 W_1ᵀ ⪰ shift - ‖L Lᵀ - (G + shift·I)‖ - ‖G - W_1 W_1ᵀ‖,

   is nonnegative when the shift exceeds both residuals, which are bounded with every rounding.
3. *Scale.* Powers of two make every ‖z_k‖ ≤ ‖x‖ by the product of norms, and that product at least 2^-K.

`errors` bound what the stored matrices leave out, ‖exact - stored‖ in the operator norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lipcert.bounds.core import BoundError
from lipcert.bounds.matrix import scaled, spectral_norm_upper
from lipcert.bounds.rounding import UNIT, add_up, enlarge, gamma, mul_up, scale_up
from lipcert.bounds.spectral import TINY, cheap, frobenius, raised

Slopes = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Chain:
    """Hold W_1, …, W_K as float64 matrices (n_k, n_{k-1}), the K - 1 slope ranges between them, and their errors.

    `norms`, where known, bound the exact ‖W_k‖. The Lipschitz constant meant is 2^exponent times that of the
    matrices.

    >>> Chain((torch.eye(2), torch.eye(2)), ((0.0, 1.0),)).depth
    2
    """

    matrices: tuple[Tensor, ...]
    slopes: tuple[Slopes, ...]
    errors: tuple[float, ...] = ()
    norms: tuple[float, ...] = field(default=(), repr=False)
    exponent: int = 0

    def __post_init__(self) -> None:
        if not self.errors:
            object.__setattr__(self, "errors", (0.0,) * len(self.matrices))
        sizes = [tuple(W.shape) for W in self.matrices]
        if any(len(size) != 2 for size in sizes) or any(b[1] != a[0] for a, b in zip(sizes, sizes[1:], strict=False)):
            raise BoundError(f"the matrices of a chain follow each other as (n_k, n_(k-1)), got the shapes {sizes}")
        if len(self.slopes) != len(sizes) - 1 or len(self.errors) != len(sizes):
            raise BoundError(
                f"{len(sizes)} matrices need {len(sizes) - 1} slope ranges and as many errors as matrices, "
                f"got {len(self.slopes)} and {len(self.errors)}"
            )
        for low, high in self.slopes:
            if not -math.inf < low <= high < math.inf:
                raise BoundError(f"slopes are a finite range low ≤ high, got {(low, high)}")

    @property
    def depth(self) -> int:
        """Return the number of matrices."""
        return len(self.matrices)

    @property
    def steepest(self) -> tuple[float, ...]:
        """Return max(|α|, |β|) of every activation."""
        return tuple(max(abs(low), abs(high)) for low, high in self.slopes)

    def measured(self, method: str = "auto") -> Chain:
        """Return the chain with the norms of its matrices; `method` as in `lipcert.bounds.matrix`."""
        if self.norms:
            return self
        pairs = zip(self.matrices, self.errors, strict=True)
        return replace(self, norms=tuple(add_up(spectral_norm_upper(W, method).value, e) for W, e in pairs))

    def normal(self, method: str = "auto", compress: bool = True) -> Chain | None:
        """Return the normal form, or None if the chain is zero or its numbers are too far apart to be scaled.

        Without `compress` a wide input is left as it is.
        """
        chain = self.measured(method)._balanced()._merged(method)
        if any(not bool(W.isfinite().all() and W.any()) for W in chain.matrices) or not all(chain.steepest):
            return None
        matrices, exponent = [*chain.matrices], chain.exponent
        wide = compress and matrices[0].shape[1] > matrices[0].shape[0]
        if wide and (square := _compressed(matrices[0])) is not None:
            matrices[0] = square
        norms, errors = [], []
        for k, (W, error, norm) in enumerate(zip(matrices, chain.errors, chain.norms, strict=True)):
            reached = norm if k == chain.depth - 1 else mul_up(norm, chain.steepest[k])
            shift = math.frexp(reached)[1]  # reached ≤ 2^shift
            if not math.isfinite(reached) or abs(shift) > 400:
                return None
            exponent += shift
            matrices[k] = W * math.ldexp(1.0, -shift)
            norms.append(scale_up(norm, -shift))
            errors.append(add_up(scale_up(error, -shift), TINY))  # entries that fell below the smallest normal float
        return Chain(tuple(matrices), chain.slopes, tuple(errors), tuple(norms), exponent)

    def _balanced(self) -> Chain:
        """Return the chain with the largest entry of every matrix in [1/2, 1)."""
        pairs = [scaled(W) for W in self.matrices]
        errors = tuple(add_up(scale_up(e, -shift), TINY) for e, (_, shift) in zip(self.errors, pairs, strict=True))
        norms = tuple(scale_up(norm, -shift) for norm, (_, shift) in zip(self.norms, pairs, strict=True))
        exponent = self.exponent + sum(shift for _, shift in pairs)
        return Chain(tuple(W for W, _ in pairs), self.slopes, errors, norms, exponent)

    def _merged(self, method: str) -> Chain:
        """Return the chain without activations of one slope.

        ‖W₂aW₁ - fl(W₂(aW₁))‖ ≤ |a|·(γ_{n+1}‖W₂‖_F‖W₁‖_F + S(W₂)ε₁ + ε₂(S(W₁) + ε₁)), S ≥ the operator norm.
        """
        matrices, errors, norms, slopes = [self.matrices[0]], [self.errors[0]], [self.norms[0]], []
        for k, (low, high) in enumerate(self.slopes, start=1):
            W, error = self.matrices[k], self.errors[k]
            if low < high:
                matrices.append(W)
                errors.append(error)
                norms.append(self.norms[k])
                slopes.append((low, high))
                continue
            first, before, size = matrices.pop(), errors.pop(), norms.pop()
            lengths = [float(raised(frobenius(M), 0)) for M in (W, first)]
            sizes = [float(raised(cheap(M), 0)) for M in (W, first)]
            rounding = mul_up(gamma(W.shape[1] + 1), *lengths)
            parts = (rounding, mul_up(sizes[0], before), mul_up(error, add_up(sizes[1], before)))
            matrices.append(W @ (low * first))
            errors.append(add_up(mul_up(abs(low), add_up(*parts)), TINY))
            size = mul_up(size, abs(low), self.norms[k])
            if bool(matrices[-1].isfinite().all()):
                size = min(size, add_up(spectral_norm_upper(matrices[-1], method).value, errors[-1]))
            norms.append(size)
        return Chain(tuple(matrices), tuple(slopes), tuple(errors), tuple(norms), self.exponent)


def _compressed(W: Tensor) -> Tensor | None:
    """Return a square M with M Mᵀ ⪰ W Wᵀ, nearly equal, or None if none was found; see the module."""
    gram = W @ W.T
    n = gram.shape[0]
    product = float(raised(gamma(W.shape[1]) * frobenius(W).square(), 2))
    for step in (8.0, 64.0, 512.0):
        shift = step * UNIT["float64"] * (n + 8.0) * float(gram.diagonal().amax()) + 2.0 * product
        shifted = gram.clone()
        shifted.diagonal().add_(shift)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info):
            continue
        residual = raised(frobenius(shifted - factor @ factor.T) + gamma(n) * frobenius(factor).square(), 6)
        diagonal = enlarge(2.0 * UNIT["float64"] * float(shifted.diagonal().abs().amax()), 2)
        if add_up(float(residual), product, diagonal) <= shift:
            return factor
    return None
