"""The spectral norm of a matrix: proved from above, estimated from below.

Power iteration converges from below: ‖Wv‖/‖v‖ ≤ ‖W‖ at every step, so it is an estimate. Two methods prove an upper
bound in float64 with every rounding counted (proofs: `lipcert.bounds.spectral` and `lipcert.bounds.hermitian`):

- "gram": Gram iteration (Delattre et al. 2023), matrix products only, the default on an accelerator;
- "eigenvalue": a verified eigendecomposition of the smaller Gram matrix, or for a large one a Lanczos value verified by
  a factorisation, the default on a CPU; relative slack about 1e-11 at n = 200 and 3e-9 at n = 2048.

Both take √(‖W‖₁‖W‖_∞) and the Frobenius norm where these are smaller, and hold for weights of any scale: W is first
scaled by a power of two. A tensor of more than two dimensions is a batch, of which the largest norm counts.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from lipcert.bounds.core import Bound, BoundError
from lipcert.bounds.hermitian import largest_eigenvalue
from lipcert.bounds.rounding import add_up, scale_up, sqrt_up
from lipcert.bounds.spectral import TINY, Method, cheap, raised, small_gram

METHODS: tuple[Method, ...] = get_args(Method)
MEMORY = 2**28  # bytes of one chunk of blocks with all its temporary copies; a single block may need more


def spectral_norm_upper(W: Tensor, method: str = "auto") -> Bound:
    """Bound the spectral norm of W (..., m, n) from above; the largest over leading dimensions.

    `method` is "eigenvalue", "gram" or "auto", which is "eigenvalue" on a CPU and "gram" on an accelerator; "tight" is
    "eigenvalue", and takes more time for convolutions of small images (`lipcert.bounds.torus`). Weights in
    float16, bfloat16 or float32 (real or complex) are taken at their exact values. Raises BoundError for other types,
    fewer than two dimensions, NaN and ∞.

    >>> bound = spectral_norm_upper(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    >>> bound.kind, 4.0 <= bound.value < 4.0 + 1e-12
    ('upper', True)
    """
    return norm_upper(W, resolve(method, W))


def eigenvalue_upper(W: Tensor) -> Bound:
    """Bound ‖W‖ of W (..., m, n) by verified eigenvalues; see `lipcert.bounds.hermitian.eigenvalue` for the proof.

    >>> eigenvalue_upper(torch.ones(2, 3)).value >= math.sqrt(6)
    True
    """
    return norm_upper(W, "eigenvalue")


def gram_upper(W: Tensor, iterations: int = 14) -> Bound:
    """Bound ‖W‖ of W (..., m, n) by Gram iteration; see `lipcert.bounds.spectral.gram_iteration` for the proof.

    >>> gram_upper(torch.ones(2, 3)).value >= math.sqrt(6)
    True
    """
    if iterations < 1:
        raise BoundError(f"Gram iteration needs at least 1 iteration, got {iterations}")
    return norm_upper(W, "gram", iterations)


@torch.no_grad()
def norm_upper(W: Tensor, method: Method, iterations: int = 14) -> Bound:
    """Bound ‖W‖ by the named method; the work of the three functions above."""
    blocks, exponent = scaled(W)
    if not blocks.numel() or not blocks.any():
        return Bound(0.0, "upper", "zero")
    blocks = blocks.flatten(0, -3) if blocks.ndim > 2 else blocks[None]  # (b, m, n)
    squared, simple = 0.0, 0.0
    for chunk in blocks.split(chunk_length(blocks)):
        squared = largest_eigenvalue(*small_gram(chunk), method, iterations - 1, squared)
        simple = max(simple, float(raised(cheap(chunk), 0).max()))
    # the scaling may have flushed entries below 2^-1022, which TINY covers as well
    return Bound(scale_up(add_up(min(sqrt_up(squared), simple), TINY), exponent), "upper", method)


@torch.no_grad()
def spectral_norm_estimate(W: Tensor, steps: int = 50) -> Bound:
    """Estimate ‖W‖ of W (..., m, n) by power iteration from a random start: never above ‖W‖ but for rounding.

    The start is drawn from a generator of its own with a fixed seed; the result is at least the largest norm of a
    column of W, hence positive unless W is zero.

    >>> spectral_norm_estimate(torch.eye(3), steps=5).kind
    'estimate'
    """
    if steps < 1:
        raise BoundError(f"power iteration needs at least 1 step, got {steps}")
    blocks, exponent = scaled(W)
    if not blocks.numel():
        return Bound(0.0, "estimate", "power iteration")
    generator = torch.Generator().manual_seed(0)
    shape = (*blocks.shape[:-2], blocks.shape[-1], 1)
    vector = torch.randn(shape, dtype=blocks.dtype, generator=generator).to(blocks.device)
    value = torch.linalg.vector_norm(blocks, dim=-2).max()
    for _ in range(steps):
        vector = vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True).clamp_min(TINY)
        image = blocks @ vector
        value = torch.maximum(value, torch.linalg.vector_norm(image, dim=-2).max())
        vector = blocks.mH @ image
    return Bound(scale_up(float(value), exponent), "estimate", "power iteration")


def resolve(method: str, W: Tensor) -> Method:
    """Return the method that "auto" stands for on the device of W; raise BoundError for an unknown one."""
    if method == "auto":
        return "eigenvalue" if W.device.type == "cpu" else "gram"
    for known in METHODS:
        if method == known:
            return known
    raise BoundError(f"method is 'auto', {', '.join(map(repr, METHODS))}, got {method!r}")


def scaled(W: Tensor) -> tuple[Tensor, int]:
    """Return W·2^-e in float64 or complex128, its largest entry in [1/2, 1) or all zero, and e.

    Raises BoundError unless W is a floating-point or complex tensor of at least two dimensions, all of it finite. The
    scaling is exact but for entries that fall below the smallest normal float, far under the largest.
    """
    if not isinstance(W, Tensor) or not (W.is_floating_point() or W.is_complex()):
        given = W.dtype if isinstance(W, Tensor) else type(W).__name__
        raise BoundError(f"a spectral norm needs a floating-point or complex tensor, got {given}; convert it first")
    if W.ndim < 2:
        raise BoundError(f"a spectral norm needs a matrix (..., m, n), got the shape {tuple(W.shape)}")
    W = W.detach().to(torch.complex128 if W.is_complex() else torch.float64).resolve_conj()
    if not W.numel():
        return W, 0
    parts = torch.view_as_real(W) if W.is_complex() else W
    if not parts.isfinite().all():
        raise BoundError(f"weights of shape {tuple(W.shape)} contain NaN or ∞: no bound holds for them")
    exponent = math.frexp(float(parts.abs().max()))[1]
    half = exponent // 2  # in two steps, because 2^-e alone can overflow
    return W * math.ldexp(1.0, -half) * math.ldexp(1.0, half - exponent), exponent


def chunk_length(blocks: Tensor) -> int:
    """Return how many blocks (…, m, n) fit into one chunk: the blocks, and eight copies of the smaller Gram matrix."""
    rows, columns = blocks.shape[-2:]
    entries = 3 * rows * columns + 8 * min(rows, columns) ** 2
    return max(1, MEMORY // (entries * blocks.element_size()))
