"""Norms: proved upper bounds of the norms of maps. Eigenvalues are proposals only, Cholesky factorisations prove."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .maps import Kernel, Map, Pair, joined, opened, phases
from .reading import Array, Rejected, require
from .rounding import UNIT, UP, gamma

DENSE_SIDE, DENSE_ENTRIES = 2048, 1 << 25  # the matrices of whole maps that are formed
OPEN, OPEN_SIDE = 9, 4096  # positions of an axis that is opened, and the blocks that this may make
MATRIX_SIDE, TORUS_ROWS = 8192, 1 << 24  # of one matrix that is factorised, and of all of a torus


@dataclass(frozen=True)
class Aim:
    """What decides how much is tried, and nothing else: which bound is enough, and how it is said to be found.

    The words "open" and "twisted" in the method name the torus that is tried first, so that numbers can be compared.
    """

    enough: float = 0.0
    method: str = ""

    def over(self, factor: float) -> Aim:
        return replace(self, enough=self.enough / factor)


LEAST = Aim()


def norm(m: Map, aim: Aim = LEAST) -> float:
    """Bound the norm of a map.

    out_i = s_i k_{w(i)} has ‖out‖² = Σ_j (Σ_{i: w(i) = j} s_i²) k_j²: for moved entries, the largest sum is the square
    of the norm itself; behind a kernel, its channel c counts with the root of the largest sum over its entries j.
    """
    live = m.where >= 0
    entries = math.prod(m.source if m.kernel is None else m.kernel.target)
    sums = np.bincount(m.where[live], np.square(m.scale[live]), entries)
    if m.kernel is None and sums.max() <= 1 and np.isin(m.scale, (-1, 0, 1)).all():
        return float(sums.max())  # exactly 0 or 1
    rounding = gamma(8 + int(np.bincount(m.where[live]).max(initial=0)))
    factors = np.sqrt(sums) * (1 + rounding) * UP
    if m.kernel is None:
        return float(factors.max())
    factors = factors.reshape(m.kernel.target[0], -1).max(1)[:, None]
    kernel = replace(m.kernel, taps={t: factors * tap for t, tap in m.kernel.taps.items()})
    size = m.kernel.size
    error = (m.kernel.error + gamma(1) * size) * float(factors.max()) + (1e-300 if size else 0.0)
    before = 1.0 if m.before is None else m.before
    if before == 0.0:
        return 0.0
    return kernel_norm(replace(kernel, error=error * UP), aim.over(before)) * before * UP


def joint_norm(maps: Sequence[Map], aim: Aim = LEAST) -> float:
    """Bound the norm of the map to several values together."""
    try:
        return norm(joined(maps, None), aim)
    except Rejected:
        return math.sqrt(sum(norm(m) ** 2 for m in maps)) * UP


def kernel_norm(kernel: Kernel, aim: Aim = LEAST) -> float:
    """Bound the norm of a kernel: from the matrix of the whole map if it is small, from a torus otherwise.

    A periodic kernel is a part of the convolution on its own torus: all of it, or some of the outputs.
    """
    kernel = phases(kernel)
    largest = max((float(np.abs(tap).max(initial=0.0)) for tap in kernel.taps.values()), default=0.0)
    require(math.isfinite(largest + kernel.error), "the numbers are too large to be rechecked")
    if largest == 0.0:
        return kernel.error
    scale = 2.0 ** math.ceil(math.log2(largest))  # entries of at most 1: what underflows does not matter
    unit = replace(kernel, taps={t: tap / scale for t, tap in kernel.taps.items() if tap.any()}, error=0.0)
    rows, columns = math.prod(kernel.target), math.prod(kernel.source)
    reaches = zip(unit.reaches(), unit.source[1:], strict=True)
    if len(unit.taps) == 1 and all(low >= 0 and high < n for (low, high), n in reaches):
        found = proved_norm(unit.taps.values())  # one matrix, at every position
    elif not unit.periodic and min(rows, columns) <= DENSE_SIDE and rows * columns <= DENSE_ENTRIES:
        found = proved_norm(opened(opened(unit, 0), 1).taps.values())
    else:
        found = torus_norm(unit, replace(aim, enough=(aim.enough / UP - kernel.error) / scale))
    return (found * scale + kernel.error) * UP


def torus_norm(kernel: Kernel, aim: Aim = LEAST) -> float:
    """Bound the norm of a kernel of stride 1 with entries of at most 1 by those of tori that contain it.

    The map is a part of the convolution on a torus of m positions per axis, if outputs are different positions there,
    h ≤ m, and if, with the image on positions 0 … n-1, every read outside of it is a position outside of it: m ≥ n -
    (first read) and m ≥ (last read) + 1. Then inserting zeros, the torus, keeping h outputs is the map. As what comes
    round meets zeros, its sign does not matter: the torus on which it changes (twisted) contains the map as well.
    Torus maps are block diagonal in a Fourier basis. If the shorter axis is opened, no torus is needed along it. The
    torus of a periodic kernel is its grid, and plain: what comes round is the image.
    """
    sides = zip(kernel.source[1:], kernel.target[1:], kernel.reaches(), strict=True)
    torus = [n if kernel.periodic else max(n - min(low, 0), high + 1, h) for n, h, (low, high) in sides]
    short = 0 if torus[0] <= torus[1] else 1
    side = min(k[0] * k[1 + short] for k in (kernel.source, kernel.target))
    found = math.inf
    both = (False,) if kernel.periodic else (False, True)
    ways = [(open, twisted) for open in both for twisted in both]
    said = ("open" in aim.method, "twisted" in aim.method)
    for open, twisted in sorted(ways, key=lambda way: way != said):
        if found <= aim.enough or (open and (torus[short] > OPEN or side > OPEN_SIDE)):
            continue
        k = opened(kernel, short) if open else kernel
        sizes = [1 if open and axis == short else m for axis, m in enumerate(torus)]
        require(math.prod(sizes) * max(k.source[0], k.target[0]) < TORUS_ROWS, "the map is too large")
        error = 2 * gamma(len(k.taps) + 40) * k.size  # of a block: see `symbols`
        found = min(found, (proved_norm(symbols(k.taps, sizes, twisted)) + error) * UP)
    return found


def symbols(taps: Mapping[Pair, Array], torus: Sequence[int], twisted: bool) -> Iterator[Array]:
    """Yield the blocks Σ_t K_t e^(-2πi⟨j, t⟩/m) of a convolution on a torus, one of each conjugate pair.

    On the twisted torus j + 1/2 stands for j. Angles 2πk/N with exact integers k < N have three roundings below 2π,
    cosine and sine 4 units: each factor is within 32u. With T taps, real and imaginary part err by gamma(T + 40) Σ|K_t|
    each, so a block by at most twice that times Σ_t ‖K_t‖_F.
    """
    half, turn = int(twisted), 2 * math.lcm(*torus)
    offsets = np.array(list(taps), dtype=np.int64)
    flat = np.stack(list(taps.values())).reshape(len(taps), -1)
    shape = next(iter(taps.values())).shape
    for j in np.ndindex(*torus):
        if j <= tuple((-i - half) % m for i, m in zip(j, torus, strict=True)):
            steps = [(2 * i + half) * (turn // (2 * m)) for i, m in zip(j, torus, strict=True)]
            angles = 2 * np.pi * (offsets @ np.array(steps, dtype=np.int64) % turn / turn)
            yield (np.cos(angles) @ flat - 1j * (np.sin(angles) @ flat)).reshape(shape)


def proved_norm(blocks: Iterable[Array]) -> float:
    """Bound max ‖A‖ over matrices A with entries of moderate size.

    An eigenvalue solver proposes τ, a little above max ‖A‖²; nothing rests on it. For A of m rows (the smaller side)
    and n columns, with n' = n products of real numbers per entry of AA*, n' = 2n in its real and imaginary part if A is
    complex, and G = fl(AA*):

      1. ‖G - AA*‖ ≤ 2 gamma(n') ‖A‖_F², for the Hermitian matrix that its lower triangle defines.
      2. B = fl(τI - G) differs from τI - G on the diagonal only, by at most u·max|B_ii|.
      3. If the Cholesky factorisation of B runs to its end, computed C satisfies CC* = B + D with
         |D_ij| ≤ g/(1-g)·√(B_ii B_jj), g = gamma(m+1) (Demmel 1989; Rump, "Verification of positive definiteness",
         BIT 46, 2006; here g = gamma(4m+16), for complex entries and for divisions done as products with a reciprocal),
         so ‖D‖ ≤ g/(1-g)·tr B and B ≥ -g/(1-g)·tr B.

    Together ‖A‖² ≤ τ + 2g·tr B + u·max B_ii + 2 gamma(n')‖A‖_F², with 2g for g/(1-g) and the rounding of the trace.
    """
    tau = best = 0.0
    for block in blocks:
        a = block if block.shape[0] <= block.shape[1] else block.conj().T
        require(len(a) <= MATRIX_SIDE, "a matrix is too large to be factorised here")
        gram = a @ a.conj().T
        mass = float(np.sum(np.square(a.real)) + np.sum(np.square(a.imag))) * (1 + gamma(2 * a.size + 8))
        square = _confirmed(gram, tau) if tau else None
        if square is None and mass:
            top = float(np.linalg.eigvalsh(gram)[-1])
            proposals = (top * (1 + slack) for slack in (1e-11, 1e-10, 1e-9, 4e-9))
            square, tau = next(((s, t) for t in proposals if (s := _confirmed(gram, t))), (None, 0.0))
            require(square is not None, "no factorisation proves the norm")
        best = max(best, (square or 0.0) + 2 * gamma(2 * a.shape[1]) * mass + 2.0**-900)
    return math.sqrt(best) * UP


def _confirmed(gram: Array, tau: float) -> float | None:
    """Return an upper bound of the largest eigenvalue if τ exceeds it."""
    shifted = -gram
    diagonal = np.arange(len(gram))
    shifted[diagonal, diagonal] += tau
    entries = shifted[diagonal, diagonal].real.copy()
    try:
        factor = np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return None
    if not np.isfinite(factor[diagonal, diagonal]).all():
        return None
    return (tau + 2 * gamma(4 * len(gram) + 16) * float(entries.sum()) + UNIT * float(entries.max())) * UP
