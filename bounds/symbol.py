"""Convolutions as lists of taps, and their symbols on a torus.

A `Correlation` is the linear map

    y[i] = Σ_t K_t x[s·i + δ_t],     0 ≤ i < out (per axis),      K_t a c_out × c_in matrix (per group),

with x either zero outside its grid of n positions or periodic (`wrap`). Dilation, padding and taking the adjoint only
change the integer displacements δ_t, so that everything below is written once.

On a torus of M = s·P positions per axis, split the input into its phases q = s·b + a (0 ≤ a < s): tap t reads phase
δ_t mod s with a shift of ⌊δ_t / s⌋ blocks, and in the Fourier basis of the P output positions the map is block diagonal
with the blocks (the *polyphase symbol*, c_out × c_in·s^d)

    H(ω) = [Σ_{t in phase a} K_t e^{i⟨ω, ⌊δ_t/s⌋⟩}]_a,      ω = 2π j / P,      ‖map‖ = max_j ‖H(ω_j)‖.

H(-ω) is the conjugate of H(ω) for a real kernel: half of the frequencies are enough. Phases that no tap reads are left
out, and a factor e^{i⟨ω,c⟩} on a phase never changes the norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lipcert.bounds.rounding import gamma
from lipcert.bounds.spectral import frobenius


@dataclass(frozen=True)
class Axis:
    """One spatial axis: n input positions, `out` outputs, the stride; `wrap` where reading is periodic in n.

    Where the input is padded by copies of itself, n counts the padded positions, and position q holds the input
    position `source[q]`.
    """

    n: int
    out: int
    stride: int
    wrap: bool = False
    source: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Correlation:
    """The map of the module docstring: taps (T, groups, c_out, c_in) in float64, their displacements, which are all
    different, (T, axes), the axes.
    """

    taps: Tensor
    shifts: Tensor
    axes: tuple[Axis, ...]


def symbol(kernel: Tensor, frequencies: Tensor) -> Tensor:
    """Return K̂(ω) = Σ_t K_t e^{-i⟨ω,t⟩} of a kernel (c_out, c_in, *k) at frequencies (f, axes) in radians.

    Shape (f, c_out, c_in), complex128; each entry errs by a few roundings per tap, which the bounds of
    `lipcert.bounds.convolution` add, and this function does not.

    >>> symbol(torch.ones(1, 1, 3), torch.zeros(1, 1)).real.item()
    3.0
    """
    size = kernel.shape[2:]
    positions = torch.cartesian_prod(*(torch.arange(k, device=kernel.device) for k in size)).reshape(-1, len(size))
    angle = frequencies.to(torch.float64) @ positions.to(torch.float64).T  # (f, T)
    wave = torch.complex(angle.cos(), -angle.sin())
    return torch.einsum("ft,oit->foi", wave, kernel.detach().flatten(2).to(torch.complex128))


def trimmed(correlation: Correlation) -> Correlation:
    """Drop the taps that are zero or never read inside the grid; the map stays exactly the same.

    An axis with a single output reads each tap once: any larger stride is then the same map, and with a stride of more
    than the kernel's extent every tap has a phase of its own.
    """
    taps, shifts = correlation.taps, correlation.shifts
    used = taps.flatten(1).any(1).cpu()
    for j, axis in enumerate(correlation.axes):
        if not axis.wrap:
            first = (-shifts[:, j]).clamp_min(0) + axis.stride - 1
            first = first - first % axis.stride + shifts[:, j]  # the first position read at or after 0
            last = shifts[:, j] + axis.stride * (axis.out - 1)
            used &= (first < axis.n) & (first <= last)
    taps, shifts = taps[used.to(taps.device)], shifts[used]
    axes = tuple(
        replace(axis, stride=int(shifts[:, j].max() - shifts[:, j].min()) + 1)
        if len(shifts) and axis.out == 1 and not axis.wrap
        else axis
        for j, axis in enumerate(correlation.axes)
    )
    return Correlation(taps, shifts, axes)


def untangled(correlation: Correlation) -> Correlation:
    """Turn a kernel with at most one nonzero entry per row and column into c groups of one channel: the same norm.

    Scaled identities, diagonals and permutations of channels, dense as stored, become as cheap as depthwise kernels.
    """
    count, groups, rows, columns = correlation.taps.shape
    support = correlation.taps.ne(0).any(0)  # (g, c_out, c_in)
    if rows == columns == 1 or max(int(support.sum(1).max()), int(support.sum(2).max())) > 1:
        return correlation
    return replace(correlation, taps=correlation.taps[:, support].reshape(count, -1, 1, 1))


def torus(correlation: Correlation) -> tuple[int, ...]:
    """Return, for each axis, the least number P of output positions of a torus that contains the map.

    Let the taps read from q_min = min δ to q_max = s(out - 1) + max δ, and let [a, b] be the part of it inside the
    grid. Place x on the torus of M = s·P positions, zero elsewhere, correlate there, keep the outputs i < out. This is
    the map itself if no position read outside [a, b] meets one of [a, b] modulo M; their distance is at most
    max(b - q_min, q_max - a), so that M > max(b - q_min, q_max - a) and P ≥ out suffice. (For a padding p: M ≥ n + p.)
    Injecting zeros and dropping outputs have norm 1: ‖map‖ ≤ ‖torus map‖. A periodic axis has M = n, exactly.
    """
    sizes = []
    for j, axis in enumerate(correlation.axes):
        lowest = int(correlation.shifts[:, j].min())
        highest = int(correlation.shifts[:, j].max()) + axis.stride * (axis.out - 1)
        inside = max(0, lowest), min(axis.n - 1, highest)
        reach = max(inside[1] - lowest, highest - inside[0]) + 1
        sizes.append(axis.n // axis.stride if axis.wrap else max(axis.out, -(-reach // axis.stride)))
    return tuple(sizes)


def degrees(correlation: Correlation) -> tuple[int, ...]:
    """Return, for each axis, the degree of the symbol: the largest extent, in blocks, of the taps of one phase."""
    phase, block = polyphase(correlation)
    extents = [block[phase == p] for p in phase.unique()]
    return tuple(max(int(e[:, j].max() - e[:, j].min()) for e in extents) for j in range(len(correlation.axes)))


def symbol_error(correlation: Correlation) -> float:
    """Bound ‖computed - exact‖ of each block that `symbols` yields, in the spectral norm, but for underflow.

    An entry is Σ_t w_t (cos θ_t + i sin θ_t). `circle` returns cos and sin, at most 1 in size, with an error of at
    most 8u, and summing T terms errs by γ_T Σ|w_t|, so real and imaginary part err by (γ_T + 8u) Σ|w_t| each, the
    complex entry by √2 times that, below γ_{2T+12} Σ_t|w_t|; the Frobenius norm of these bounds the spectral norm.
    """
    phase, _ = polyphase(correlation)
    magnitude = correlation.taps.abs()
    sums = torch.cat([magnitude[(phase == p).to(magnitude.device)].sum(0) for p in phase.unique()], -1)
    terms = len(correlation.taps)
    return float(frobenius(sums).max()) * gamma(2 * terms + 12) * (1.0 + gamma(terms + 4))


def frequencies(sizes: tuple[int, ...], twisted: bool = False) -> tuple[Tensor, tuple[int, ...]]:
    """Return half of the ω = 2π·j/P for the P of `sizes`, as integers j (f, axes) and denominators P.

    Half are enough: H(-ω) is the conjugate of H(ω). `twisted` takes ω = 2π(j + 1/2)/P on the axes with P > 1, as
    (2j + 1)/2P. These are the frequencies of the torus on which whatever comes round changes its sign; it contains a
    map just as the torus does, since coming round only meets zeros, and bounds it just as well, or better.
    """
    turns = tuple(2 * size if twisted and size > 1 else size for size in sizes)
    ranges = [2 * torch.arange(s) + 1 if t > s else torch.arange(s) for s, t in zip(sizes, turns, strict=True)]
    grid = torch.cartesian_prod(*ranges).reshape(-1, len(sizes))
    places = torch.tensor([math.prod(turns[j + 1 :]) for j in range(len(turns))])
    return grid[grid @ places <= (-grid % torch.tensor(turns)) @ places], turns


def symbols(correlation: Correlation, frequencies: Tensor, turns: tuple[int, ...]) -> Tensor:
    """Return the blocks H(ω) at ω = 2π·frequency/turn, (f, axes) -> (f·groups, c_out, c_in·phases)."""
    phase, block = polyphase(correlation)
    _, groups, rows, columns = correlation.taps.shape
    device, parts = correlation.taps.device, []
    for member in (torch.nonzero(phase == p).flatten() for p in phase.unique()):
        cos, sin = circle(frequencies, block[member], turns)  # (f, T_a)
        taps = correlation.taps[member.to(device)].flatten(1)  # (T_a, g·c_out·c_in)
        part = torch.complex(cos.to(device) @ taps, sin.to(device) @ taps)
        parts.append(part.reshape(len(frequencies) * groups, rows, columns))
    return torch.cat(parts, -1)


def dense(correlation: Correlation) -> Tensor:
    """Return the matrix of the map, (groups, c_out·outputs, c_in·inputs); sums of taps, where pads repeat, are rounded.

    Inputs are counted before padding, so this is the convolution with its padding.
    """
    _, groups, rows, columns = correlation.taps.shape
    device = correlation.taps.device
    inputs = [max(axis.source) + 1 if axis.source is not None else axis.n for axis in correlation.axes]
    outputs = [axis.out for axis in correlation.axes]
    matrix = correlation.taps.new_zeros(math.prod(outputs), math.prod(inputs), groups, rows, columns)
    for tap, shift in zip(correlation.taps, correlation.shifts.tolist(), strict=True):
        to = torch.zeros(1, dtype=torch.int64)
        at = torch.zeros(1, dtype=torch.int64)
        for axis, count, delta in zip(correlation.axes, inputs, shift, strict=True):
            i = torch.arange(axis.out)
            q = axis.stride * i + delta
            q = q % axis.n if axis.wrap else q
            i, q = i[(q >= 0) & (q < axis.n)], q[(q >= 0) & (q < axis.n)]
            if axis.source is not None:
                q = torch.tensor(axis.source)[q]
            to = (to[:, None] * axis.out + i).flatten()
            at = (at[:, None] * count + q).flatten()
        matrix[to.to(device), at.to(device)] += tap  # one output never occurs twice
    matrix = matrix.permute(2, 3, 0, 4, 1)
    return matrix.reshape(groups, rows * math.prod(outputs), columns * math.prod(inputs))


def polyphase(correlation: Correlation, open: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the number of each tap's phase (T,) and its shift in blocks (T, axes); an `open` axis has neither."""
    strides = torch.tensor([axis.stride for axis in correlation.axes])
    block = torch.div(correlation.shifts, strides, rounding_mode="floor")
    rest = correlation.shifts - block * strides
    if open is not None:
        block[:, open] = rest[:, open] = 0
    phase = torch.zeros(len(block), dtype=torch.int64)
    for j, axis in enumerate(correlation.axes):
        phase = phase * axis.stride + rest[:, j]
    return phase, block


def phases(correlation: Correlation, open: int | None = None) -> int:
    """Return how many phases the taps have."""
    return len(polyphase(correlation, open)[0].unique())


def circle(frequencies: Tensor, block: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return cos and sin of θ = Σ_j 2π·frequency_j·block_j/P_j, (f, T) each, in [-1, 1] and with an error below 8u.

    θ is a multiple m/N of a full turn, N the least common multiple of the P_j, reduced in integers to at most an eighth
    of a turn: the angle, below 0.8, errs by three roundings (2.4u), and cos and sin by at most 4 units in the last
    place of numbers below 1 (4u).
    """
    turn = math.lcm(*sizes)
    steps = torch.tensor([turn // size for size in sizes])
    m = (frequencies * steps) @ block.T % turn  # (f, T), 0 ≤ m < N
    octant, rest = 8 * m // turn, 8 * m % turn  # θ = (octant + rest/N)·π/4
    odd = octant % 2 == 1
    angle = torch.where(odd, turn - rest, rest).to(torch.float64) * (math.pi / 4.0) / turn
    cos, sin = angle.cos().clamp(0.0, 1.0), angle.sin().clamp(0.0, 1.0)
    swap = (octant + 1) // 2 % 2 == 1  # octants 1, 2, 5, 6
    cos, sin = torch.where(swap, sin, cos), torch.where(swap, cos, sin)
    return torch.where((octant >= 2) & (octant < 6), -cos, cos), torch.where(octant >= 4, -sin, sin)
