"""The largest norm of a symbol over the frequencies of a torus, proved; which torus to take.

Any torus that contains a map bounds its norm, so the one with the smallest maximum may be chosen freely: the plain one
or the *twisted* one, on which whatever comes round changes its sign (`lipcert.bounds.symbol.frequencies`), and, where
the image is small, one on which an axis is *open*: not on the torus at all (`lipcert.bounds.grams`). For a smooth
kernel on a small image the plain torus is several percent too large, because its frequency 0 is one that no image with
zeros around it attains.
"""

from __future__ import annotations

import math

from lipcert.bounds.grams import Grams, grams, work
from lipcert.bounds.hermitian import largest_eigenvalue
from lipcert.bounds.matrix import MEMORY
from lipcert.bounds.rounding import add_up, sqrt_up
from lipcert.bounds.spectral import TINY, Method, small_gram
from lipcert.bounds.symbol import Correlation, frequencies, phases, symbol_error, symbols

OPEN = 9  # points of a torus up to which an axis is opened
OPEN_SIDE = 4096  # of the matrices that this makes
OPEN_WORK = {"eigenvalue": 2e10, "tight": 4e11, "gram": 0.0}  # floating-point operations for it
SMALL = 2e9  # floating-point operations that do not matter
CACHED = 2**24  # bytes of blocks that are worked on at once, if there are several: more are slower


def largest_symbol(
    correlation: Correlation, sizes: tuple[int, ...], open: int | None, method: Method, twistable: bool
) -> tuple[float, bool]:
    """Bound the largest ‖H(ω)‖ on the torus of these sizes, or, if that seems smaller, on the twisted one; say which.

    The Gram matrices come from products of taps, or from each symbol where the taps are too many. `open` is an axis
    without a torus, whose size is 1 then.
    """
    frequency, turns = frequencies(sizes)
    made = _grams(correlation, sizes, open)
    if made is None:
        chunks = frequency.split(max(1, CACHED // (16 * correlation.taps[0].numel() * phases(correlation))))
        blocks = (small_gram(symbols(correlation, chunk, turns)) for chunk in chunks)
        twisted, extra = False, add_up(symbol_error(correlation), TINY)
    else:
        sums = made.traces(frequency, turns)
        other, other_turns = frequencies(sizes, twisted=True)
        others = made.traces(other, other_turns)
        twisted = twistable and bool(others.max() < 0.999 * sums.max())
        if twisted:
            frequency, turns, sums = other, other_turns, others
        frequency = frequency[sums.argsort(descending=True).cpu()]  # where the largest comes early, the rest is cheap
        blocks = (made.at(chunk, turns) for chunk in frequency.split(max(1, CACHED // (16 * made.even[0].numel()))))
        extra = 0.0
    squared = 0.0
    for gram, error in blocks:
        squared = largest_eigenvalue(gram, error, method, 13, squared)
    return add_up(sqrt_up(squared), extra) if extra else sqrt_up(squared), twisted


def open_axis(correlation: Correlation, sizes: tuple[int, ...], attained: list[bool], method: Method) -> int | None:
    """Return the axis on which the positions of a small map are kept rather than put on a torus, or None."""
    found = None
    for j, axis in enumerate(correlation.axes):
        if not attained[j] and not axis.wrap and sizes[j] <= OPEN and (found is None or sizes[j] < sizes[found]):
            found = j
    if found is None:
        return None
    _, groups, rows, columns = correlation.taps.shape
    axis = correlation.axes[found]
    columns *= phases(correlation, found)
    side = min(rows * axis.out, columns * axis.n)
    reach = int(correlation.shifts[:, found].max() - correlation.shifts[:, found].min()) // axis.stride + 1
    band = min(side, reach * min(rows, columns))
    operations = 4.0 * groups * side * band * band * math.prod(s for j, s in enumerate(sizes) if j != found)
    return found if side <= OPEN_SIDE and operations + work(correlation, found)[0] <= OPEN_WORK[method] else None


def _grams(correlation: Correlation, sizes: tuple[int, ...], open: int | None) -> Grams | None:
    """Return the coefficients of the Gram matrices, or None where forming each symbol is less work."""
    operations, memory = work(correlation, open)
    _, groups, rows, columns = correlation.taps.shape
    columns *= phases(correlation)
    directly = 4.0 * math.prod(sizes) * groups * min(rows, columns) * rows * columns
    if open is None and (memory > 2 * MEMORY or operations > max(directly, SMALL)):
        return None
    return grams(correlation, open)
