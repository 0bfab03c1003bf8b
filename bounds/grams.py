"""Gram matrices of the symbols of a convolution, from products of its taps.

With H(ω) = Σ_t K_t e^{i⟨ω,b_t⟩} (`lipcert.bounds.symbol`; phases aside) both Gram matrices are trigonometric
polynomials,

    H*H = Σ_{t,t'} K_t^T K_t' e^{i⟨ω, b_t' - b_t⟩}        HH* = Σ_{t,t'} K_t K_t'^T e^{i⟨ω, b_t - b_t'⟩},

so that a few real products, one for each pair of taps with a difference d ≥ 0 (in lexicographic order: the coefficient
of -d is the transpose of that of d), serve all frequencies: G(ω) = G_0 + Σ_{d>0} cos⟨ω,d⟩ (G_d + G_d^T) + i sin⟨ω,d⟩
(G_d - G_d^T). For a 3 x 3 kernel these are 45 products of real matrices, whatever the image.

One axis may stay as it is, `open`: its positions become channels, so that there is no torus on it and nothing is lost.
The blocks are then larger, and banded. Where the torus of a small image is a few percent too large, this is not.

Rounding. An entry of a coefficient sums at most cT products of weights (T taps at different places, inner products
over c channels), an entry of G(ω) at most 2D + 1 of those, with cosines and sines that err by 8u and differences that
were rounded. Real and imaginary part err by γ_k Σ|products|, k = cT + 2D + 12, the complex entry by √2 γ_k, below
γ_2k. The sum of all absolute products is an entry of B*B or BB*, symmetric, with B the map of which each phase has the
one tap Σ|K_t|; so the error is entrywise below a symmetric matrix of Frobenius norm at most γ_2k ‖B‖_F².
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from lipcert.bounds.rounding import gamma
from lipcert.bounds.spectral import frobenius
from lipcert.bounds.symbol import Correlation, circle, phases, polyphase


@dataclass(frozen=True)
class Grams:
    """G(ω) of one correlation: differences (D, axes) with 0 first, and the coefficients for cos and sin.

    `even` (D, g, N, N) holds G_0 and the G_d + G_d^T, `odd` (D - 1, g, N, N) the G_d - G_d^T; `error` bounds what each
    block errs by, as `lipcert.bounds.hermitian` wants it.
    """

    differences: Tensor
    even: Tensor
    odd: Tensor
    error: float

    def at(self, frequencies: Tensor, turns: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the blocks at ω = 2π·frequency/turn, (f, axes) -> (f·g, N, N), and their errors (f·g,).

        They are real if nothing depends on ω.
        """
        count = len(frequencies) * self.even.shape[1]
        error = torch.full((count,), self.error, dtype=torch.float64, device=self.even.device)
        if len(self.differences) == 1:
            return self.even[0].repeat(len(frequencies), 1, 1), error
        cos, sin = (part.to(self.even.device) for part in circle(frequencies, self.differences, turns))
        blocks = torch.complex(cos @ self.even.flatten(1), sin[:, 1:] @ self.odd.flatten(1))
        return blocks.reshape(count, *self.even.shape[2:]), error

    def traces(self, frequencies: Tensor, turns: tuple[int, ...]) -> Tensor:
        """Return the trace of each block, roughly, the largest over the groups of channels: (f,)."""
        cos, _ = circle(frequencies, self.differences, turns)
        return (cos.to(self.even.device) @ self.even.diagonal(dim1=-2, dim2=-1).sum(-1)).amax(-1)


def grams(correlation: Correlation, open: int | None = None) -> Grams:
    """Form the coefficients of the smaller Gram matrix; `open` is an axis (not periodic) that keeps its positions."""
    taps, groups = correlation.taps, correlation.taps.shape[1]
    outputs, channels, places = _side(correlation, open)
    coefficients: dict[tuple[int, ...], Tensor] = {}
    for (difference, first, second), (left, right) in _pairs(correlation, open, outputs).items():
        product = _product(taps[left], taps[right], outputs)
        if open is None and places == 1 and difference not in coefficients:
            coefficients[difference] = product[:, None, :, None]
            continue
        if difference not in coefficients:
            coefficients[difference] = taps.new_zeros(groups, places, channels, places, channels)
        for row, column in _places(correlation, open, outputs, first, second):
            coefficients[difference][:, row, :, column] += product
    zero = (0,) * len(correlation.axes)
    order = [zero, *(d for d in coefficients if d != zero)]
    stacked = torch.stack([coefficients[d].reshape(groups, places * channels, places * channels) for d in order])
    even = torch.cat([stacked[:1], stacked[1:] + stacked[1:].mT])
    shared = taps.shape[3] if outputs else taps.shape[2]
    terms = shared * len(taps) + 2 * len(order) + 12
    error = gamma(2 * terms) * _magnitude(correlation, open) * (1.0 + gamma(terms))
    return Grams(torch.tensor(order), even, stacked[1:] - stacked[1:].mT, error)


def work(correlation: Correlation, open: int | None = None) -> tuple[float, float]:
    """Estimate the floating-point operations of `grams`, and the bytes of its coefficients."""
    count, groups, rows, columns = correlation.taps.shape
    outputs, channels, places = _side(correlation, open)
    operations = count**2 * (groups * channels * rows * columns + 2e4)  # a pair costs some microseconds, however small
    reach = correlation.shifts.amax(0) - correlation.shifts.amin(0)
    differences = 1
    for j, axis in enumerate(correlation.axes):
        differences *= 1 if j == open else 2 * (int(reach[j]) // axis.stride + 1) - 1
    return operations, 8.0 * differences * groups * (channels * places) ** 2


def _side(correlation: Correlation, open: int | None) -> tuple[bool, int, int]:
    """Return whether HH* is the smaller one, its channels per place, and its places (phases, open positions)."""
    _, _, rows, columns = correlation.taps.shape
    above = correlation.axes[open].out if open is not None else 1
    below = correlation.axes[open].n if open is not None else 1
    below *= phases(correlation, open)
    return (True, rows, above) if rows * above <= columns * below else (False, columns, below)


def _pairs(
    correlation: Correlation, open: int | None, outputs: bool
) -> dict[tuple[tuple[int, ...], tuple[int, int], tuple[int, int]], tuple[list[int], list[int]]]:
    """Group the pairs of taps by their difference ≥ 0 and by phase and open displacement of each of them."""
    phase, block = polyphase(correlation, open)
    numbers = phase.unique(return_inverse=True)[1].tolist()
    moves = correlation.shifts[:, open].tolist() if open is not None else [0] * len(numbers)
    kinds, blocks = list(zip(numbers, moves, strict=True)), block.tolist()
    found: dict[tuple[tuple[int, ...], tuple[int, int], tuple[int, int]], tuple[list[int], list[int]]]
    found = defaultdict(lambda: ([], []))
    for t, here in enumerate(blocks):
        for other, there in enumerate(blocks):
            if outputs and numbers[t] != numbers[other]:
                continue
            difference = tuple((a - b if outputs else b - a) for a, b in zip(here, there, strict=True))
            if difference >= (0,) * len(difference):
                left, right = found[difference, kinds[t], kinds[other]]
                left.append(t)
                right.append(other)
    return found


def _product(left: Tensor, right: Tensor, outputs: bool) -> Tensor:
    """Return Σ K_t K_t'^T or Σ K_t^T K_t' over the taps (m, g, c_out, c_in) of each, (g, c, c)."""
    if outputs:
        return left.permute(1, 2, 0, 3).flatten(2) @ right.permute(1, 2, 0, 3).flatten(2).mT
    return left.transpose(0, 1).flatten(1, 2).mT @ right.transpose(0, 1).flatten(1, 2)


def _places(
    correlation: Correlation, open: int | None, outputs: bool, first: tuple[int, int], second: tuple[int, int]
) -> list[tuple[int, int]]:
    """Return the blocks (row, column) of the Gram matrix to which a product of two kinds of taps belongs."""
    if open is None:
        return [(0, 0)] if outputs else [(first[0], second[0])]
    axis, found = correlation.axes[open], []
    for i in range(axis.out):
        position = axis.stride * i + first[1]  # what the first tap reads for output i
        if not 0 <= position < axis.n:
            continue
        if outputs:  # the output for which the second tap reads the same
            other, rest = divmod(position - second[1], axis.stride)
            if not rest and 0 <= other < axis.out:
                found.append((i, other))
        else:
            other = axis.stride * i + second[1]
            if 0 <= other < axis.n:
                found.append((first[0] * axis.n + position, second[0] * axis.n + other))
    return found


def _magnitude(correlation: Correlation, open: int | None) -> float:
    """Return at least ‖B‖_F² of the module docstring, for the group of channels where it is largest."""
    phase, _ = polyphase(correlation, open)
    moves = correlation.shifts[:, open] if open is not None else torch.zeros_like(phase)
    times = correlation.axes[open].out if open is not None else 1
    kinds = torch.stack([phase, moves], 1).unique(dim=0, return_inverse=True)[1]
    squares = [
        frobenius(correlation.taps[(kinds == kind).to(correlation.taps.device)].abs().sum(0)).square()
        for kind in range(int(kinds.max()) + 1)
    ]
    return float(torch.stack(squares).sum(0).max()) * times * (1.0 + gamma(2 * len(correlation.taps) + 8))
