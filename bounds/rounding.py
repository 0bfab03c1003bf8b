"""Directed rounding of Python floats, unit roundoffs and the constants γ_n.

Every function ending in `_up` returns a float that is at least the exact real value of its expression (and is that
value whenever a float can hold it), every function ending in `_down` one that is at most it. The exact value is formed
in rational arithmetic, so nothing rests on the rounding mode, on fused operations or on the C library.

An infinite upper bound means "no bound is known"; 0·∞ is therefore ∞ here, which is never wrong. A NaN raises
ValueError. Source of γ_n and of its rules: Higham, Accuracy and Stability of Numerical Algorithms, chapter 3.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import TypeVar

import torch

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24}

Number = TypeVar("Number", float, torch.Tensor)


def up(x: float) -> float:
    """Return the next float above x; ∞ stays ∞.

    >>> up(1.0)
    1.0000000000000002
    """
    return math.nextafter(_checked(x), math.inf)


def down(x: float) -> float:
    """Return the next float below x; -∞ stays -∞."""
    return math.nextafter(_checked(x), -math.inf)


def add_up(*xs: float) -> float:
    """Return the sum, rounded up.

    >>> add_up(1.0, 2.0**-60)
    1.0000000000000002
    >>> add_up(1.0, 2.0)
    3.0
    """
    infinite = {_checked(x) for x in xs if math.isinf(x)}
    if len(infinite) == 2:
        raise ValueError("∞ - ∞ has no value to bound")
    return infinite.pop() if infinite else _ceiling(sum(map(Fraction, xs), Fraction(0)))


def sub_up(a: float, b: float) -> float:
    """Return a - b, rounded up."""
    return add_up(a, -b)


def mul_up(*xs: float) -> float:
    """Return the product, rounded up; 0·∞ is ∞.

    >>> mul_up(0.1, 0.1)
    0.010000000000000002
    """
    if any(math.isinf(_checked(x)) for x in xs):
        negative = sum(math.copysign(1.0, x) < 0.0 for x in xs) % 2 == 1
        return -math.inf if negative and 0.0 not in xs else math.inf
    return _ceiling(math.prod(map(Fraction, xs), start=Fraction(1)))


def div_up(a: float, b: float) -> float:
    """Return a / b, rounded up; a division by zero and ∞/∞ give ∞.

    >>> div_up(1.0, 4.0), div_up(1.0, 0.0)
    (0.25, inf)
    """
    _checked(a), _checked(b)
    if b == 0.0 or (math.isinf(a) and math.isinf(b)):
        return math.inf
    if math.isinf(a):
        return a if b > 0.0 else -a
    return 0.0 if math.isinf(b) else _ceiling(Fraction(a) / Fraction(b))


def sqrt_up(x: float) -> float:
    """Return the square root of x ≥ 0, rounded up.

    >>> sqrt_up(4.0)
    2.0
    >>> sqrt_up(2.0) ** 2 >= 2.0
    True
    """
    if math.isinf(_checked(x)) and x > 0.0:
        return x
    root = math.sqrt(x)  # raises ValueError below zero
    return root if Fraction(root) ** 2 >= Fraction(x) else up(root)


def add_down(*xs: float) -> float:
    """Return the sum, rounded down."""
    return 0.0 - add_up(*(-x for x in xs))


def sub_down(a: float, b: float) -> float:
    """Return a - b, rounded down.

    >>> sub_down(1.0, 2.0**-60)
    0.9999999999999999
    """
    return 0.0 - sub_up(b, a)


def mul_down(a: float, b: float) -> float:
    """Return a · b, rounded down; 0·∞ is -∞."""
    return 0.0 - mul_up(-a, b)


def div_down(a: float, b: float) -> float:
    """Return a / b, rounded down; a division by zero and ∞/∞ give -∞."""
    return 0.0 - div_up(-a, b)


def scale_up(x: float, exponent: int) -> float:
    """Return x · 2^exponent, rounded up (only an underflow or an overflow rounds).

    >>> scale_up(1.0, -2000)
    5e-324
    """
    if math.isinf(_checked(x)) or x == 0.0:
        return x
    return _ceiling(Fraction(x) * Fraction(2) ** exponent)


@lru_cache(maxsize=4096)
def gamma(n: int, precision: str = "float64") -> float:
    """Return γ_n = n·u / (1 - n·u), rounded up: n roundings change a result by a factor within 1 ± γ_n.

    `precision` names the unit roundoff u in UNIT. Raises ValueError when n·u ≥ 1, where no such bound exists.

    >>> gamma(0), gamma(4) >= 4 * 2.0**-53
    (0.0, True)
    """
    if precision not in UNIT:
        raise ValueError(f"precision is one of {', '.join(UNIT)}, got {precision!r}")
    error = n * Fraction(UNIT[precision])
    if n < 0 or error >= 1:
        raise ValueError(f"γ_n needs 0 ≤ n < 1/u, got n = {n} in {precision}")
    return _ceiling(error / (1 - error))


def enlarge(value: Number, roundings: int) -> Number:
    """Return at least the exact value of a nonnegative float64 quantity that was computed with so many roundings.

    `value` is a float or a float64 tensor (elementwise); each rounding lost at most a factor 1 - u, and the
    multiplication here is counted too: exact ≤ value·(1 - u)^-roundings ≤ fl(value·(1 + γ_{roundings + 1})).
    Underflow is the caller's business.

    >>> enlarge(1.0, 10) > 1.0 + 10 * 2.0**-53
    True
    """
    return value * _factor(roundings + 1)


@lru_cache(maxsize=4096)
def _factor(roundings: int) -> float:
    """Return 1 + γ_roundings, rounded up."""
    return add_up(1.0, gamma(roundings))


def _checked(x: float) -> float:
    """Return x, or raise ValueError if it is NaN."""
    if math.isnan(x):
        raise ValueError("NaN cannot be bounded")
    return x


def _ceiling(exact: Fraction) -> float:
    """Return the smallest float that is at least `exact`."""
    try:
        nearest = float(exact)  # correctly rounded
    except OverflowError:
        return math.inf if exact > 0 else -math.nextafter(math.inf, 0.0)
    if math.isinf(nearest) or Fraction(nearest) >= exact:
        return nearest
    return math.nextafter(nearest, math.inf)
