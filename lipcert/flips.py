"""How many pixels one perturbation of the whole image can change.

The setting (docs/segmentation.md has the proofs): pixel i changes its class only if its own features move by at least
`distance[i]`; all features together move by at most `joint · eps`, those of any one pixel by at most `pixel · eps`,
when the image moves by eps in l2. Pixels own disjoint coordinates, so the set A of pixels that change satisfies

    Σ_{i in A} distance_i² ≤ (joint · eps)²   and   distance_i ≤ pixel · eps for i in A,

and the worst A takes the cheapest pixels. (Massena et al. 2025, arXiv 2512.06010, have the first part; the second and
the weighted form are additions.) Nothing better follows from distances and `joint` alone: the identity attains it.

Everything is float64, rounded so that counts come out too large, never too small; a sum that equals the budget is
affordable. A distance of 0 (a tie, a logit that is not a number) is free at any eps, also at 0.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lipcert.bounds.rounding import gamma, mul_up

Floats = NDArray[np.float64]

_TINY = 1e-150  # below, a square may underflow


def most_flips(distance: Floats, eps: float, joint: float, pixel: float | None = None) -> int:
    """Return how many pixels can change at most, for a perturbation of l2 norm `eps`.

    Args:
        distance: (p,) lower bounds of how far the features of each pixel must move, at least 0; +∞: never.
        joint: upper bound of the Lipschitz constant of the whole map of features.
        pixel: upper bound of that of any single pixel's features; None: `joint`, which is one.

    NaN or negative arguments raise ValueError.

    >>> most_flips(np.array([3.0, 4.0, 12.0]), eps=5.0, joint=1.0)
    2
    """
    sums = prefix(reachable(distance, eps, joint, pixel))
    return int(np.searchsorted(sums, budget(eps, joint), side="right"))


def flip_radii(distance: Floats, joint: float, pixel: float | None = None) -> Floats:
    """Return (p,): entry k-1 is a radius within which fewer than k pixels change, rounded down.

    A perturbation of norm eps can change k pixels only if eps ≥ √(Σ of the k smallest distance²) / joint and eps ≥ the
    k-th smallest distance / pixel.

    >>> flip_radii(np.array([4.0, 3.0]), joint=1.0).round(9)
    array([3., 5.])
    """
    _check(distance, 0.0, joint, pixel)
    near = np.sort(distance)
    pixel = joint if pixel is None else pixel
    with np.errstate(divide="ignore", invalid="ignore"):
        together = down(down(np.sqrt(prefix(near))) / joint) if joint > 0 else np.full(near.shape, np.inf)
        alone = down(near / pixel) if pixel > 0 else np.full(near.shape, np.inf)
    radius = np.maximum(together, alone)
    return np.where((near > 0) & ~np.isnan(radius), np.maximum(radius, 0.0), 0.0)


def most_lost(distance: Floats, value: Floats, eps: float, joint: float, pixel: float | None = None) -> float:
    """Return an upper bound of the total `value` (p,) ≥ 0 of the pixels that change.

    For regions that matter more than others, and for cells of several pixels that change together. Choosing pixels of
    unequal value for one budget is a knapsack problem; its linear relaxation is solved by taking them in the order of
    value per cost, and any multiplier λ ≥ 0 proves: lost ≤ λ·budget + Σ (value - λ·cost)₊. The λ comes from the order,
    the bound from this inequality, so no rounding can make it too small.

    >>> round(most_lost(np.array([3.0, 4.0]), np.array([1.0, 8.0]), eps=4.0, joint=1.0), 9)
    8.0
    """
    value = np.asarray(value, dtype=np.float64)
    if value.shape != np.shape(distance) or not (value >= 0).all():
        raise ValueError(f"values must be (p,) like the distances, and at least 0; got {value.shape}")
    chosen = can_move(distance, eps, joint, pixel)
    cost, value = np.maximum(down(_squares(np.asarray(distance, dtype=np.float64)[chosen])), 0.0), value[chosen]
    limit = budget(eps, joint)
    everything = _sum_up(value)
    if not np.isfinite(limit) or len(value) == 0:
        return everything
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(cost > 0, value / cost, np.inf)
        order = np.argsort(-ratio, kind="stable")
        split = int(np.searchsorted(np.cumsum(cost[order]), limit, side="right"))
        if split == len(order):
            return everything
        multiplier = float(ratio[order[split]])
        if not np.isfinite(multiplier):
            return everything
        kept = np.where(np.isfinite(cost), up(value - down(multiplier * cost)), 0.0)
    return min(everything, _sum_up(np.append(np.maximum(kept, 0.0), mul_up(multiplier, limit))))


def can_move(distance: Floats, eps: float, joint: float, pixel: float | None) -> NDArray[np.bool_]:
    """Return (p,): which pixels may change by the bound of one pixel alone."""
    _check(distance, eps, joint, pixel)
    return np.asarray(distance) <= mul_up(joint if pixel is None else pixel, eps)


def reachable(distance: Floats, eps: float, joint: float, pixel: float | None) -> Floats:
    """Return, sorted, the distances of the pixels that may change by the bound of one pixel alone."""
    return np.sort(np.asarray(distance, dtype=np.float64)[can_move(distance, eps, joint, pixel)])


def budget(eps: float, joint: float) -> float:
    """Return (joint · eps)², rounded up."""
    return mul_up(joint, joint, eps, eps)


def prefix(ordered: Floats) -> Floats:
    """Return (p,): lower bounds of the sums of the first 1, 2, … squares."""
    # each square is rounded once, each sum once more for every term, and the product here once
    shrink = math.nextafter(1.0 - gamma(len(ordered) + 3), 0.0)
    return np.cumsum(_squares(ordered)) * shrink


def down(x: Floats) -> Floats:
    """Return the next floats below."""
    return np.nextafter(x, -np.inf)


def up(x: Floats) -> Floats:
    """Return the next floats above."""
    return np.nextafter(x, np.inf)


def _squares(distance: Floats) -> Floats:
    """Return the squares, to nearest; those that could underflow are 0."""
    with np.errstate(over="ignore"):
        return np.where(distance < _TINY, 0.0, distance * distance)


def _sum_up(terms: Floats) -> float:
    """Return the sum of nonnegative terms, rounded up."""
    return mul_up(float(np.sum(terms)), 1.0 + 2 * gamma(len(terms) + 2))


def _check(distance: Floats, eps: float, joint: float, pixel: float | None) -> None:
    if np.ndim(distance) != 1 or not (np.asarray(distance) >= 0).all():
        raise ValueError("distances must be (p,), at least 0 and numbers")
    for name, number in (("eps", eps), ("joint", joint), ("pixel", pixel)):
        if number is not None and not number >= 0:
            raise ValueError(f"{name} must be at least 0, got {number}")
