"""Directed rounding against exact rational arithmetic."""

import doctest
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipcert.bounds import rounding
from lipcert.bounds.rounding import (
    UNIT,
    add_down,
    add_up,
    div_down,
    div_up,
    down,
    enlarge,
    gamma,
    mul_down,
    mul_up,
    scale_up,
    sqrt_up,
    sub_down,
    sub_up,
    up,
)

finite = st.floats(allow_nan=False, allow_infinity=False)
LARGEST = math.nextafter(math.inf, 0.0)


def is_ceiling(value: float, exact: Fraction) -> bool:
    """The smallest float at least `exact`."""
    if math.isinf(value):
        return value > 0 and exact > LARGEST
    below = math.nextafter(value, -math.inf)
    return Fraction(value) >= exact and (math.isinf(below) or Fraction(below) < exact)


def is_floor(value: float, exact: Fraction) -> bool:
    return is_ceiling(-value, -exact)


@given(st.lists(finite, max_size=5))
def test_sum(xs):
    exact = sum(map(Fraction, xs), Fraction(0))
    assert is_ceiling(add_up(*xs), exact) and is_floor(add_down(*xs), exact)


@given(finite, finite)
def test_difference(a, b):
    exact = Fraction(a) - Fraction(b)
    assert is_ceiling(sub_up(a, b), exact) and is_floor(sub_down(a, b), exact)


@given(st.lists(finite, min_size=2, max_size=4))
def test_product(xs):
    exact = math.prod(map(Fraction, xs), start=Fraction(1))
    assert is_ceiling(mul_up(*xs), exact)
    assert is_floor(mul_down(xs[0], xs[1]), Fraction(xs[0]) * Fraction(xs[1]))


@given(finite, finite.filter(bool))
def test_quotient(a, b):
    exact = Fraction(a) / Fraction(b)
    assert is_ceiling(div_up(a, b), exact) and is_floor(div_down(a, b), exact)


@given(st.floats(min_value=0.0, allow_infinity=False))
def test_root(x):
    root = sqrt_up(x)
    assert Fraction(root) ** 2 >= Fraction(x)
    assert root == 0.0 or Fraction(down(root)) ** 2 < Fraction(x)


@given(finite, st.integers(-2500, 2500))
def test_scaling(x, exponent):
    assert is_ceiling(scale_up(x, exponent), Fraction(x) * Fraction(2) ** exponent)


def test_exact_results_stay_exact():
    assert (add_up(1.0, 2.0), mul_up(1.0, 1.0, 3.0), div_up(1.0, 4.0), sqrt_up(9.0)) == (3.0, 3.0, 0.25, 3.0)
    assert math.copysign(1.0, sub_down(1.0, 1.0)) == 1.0  # no negative zeros


def test_infinity_means_no_bound():
    assert mul_up(0.0, math.inf) == mul_up(math.inf, -0.0) == div_up(math.inf, math.inf) == div_up(0.0, 0.0) == math.inf
    assert add_up(1.0, math.inf) == mul_up(2.0, math.inf) == sqrt_up(math.inf) == up(LARGEST) == math.inf
    assert mul_up(-2.0, math.inf) == div_up(math.inf, -2.0) == -math.inf
    assert div_up(1.0, math.inf) == 0.0 and mul_down(0.0, math.inf) == div_down(1.0, 0.0) == -math.inf
    assert add_up(LARGEST, LARGEST) == math.inf and add_up(-LARGEST, -LARGEST) == -LARGEST


@pytest.mark.parametrize("function", [up, down, add_up, sqrt_up, lambda x: mul_up(x, 0.0), lambda x: div_up(1.0, x)])
def test_nan_raises(function):
    with pytest.raises(ValueError, match="NaN"):
        function(math.nan)


def test_examples():
    assert doctest.testmod(rounding).failed == 0


def test_undefined_raises():
    with pytest.raises(ValueError):
        add_up(math.inf, -math.inf)
    with pytest.raises(ValueError):
        sqrt_up(-1.0)


@given(st.integers(0, 2**40), st.sampled_from(sorted(UNIT)))
def test_gamma(n, precision):
    error = n * Fraction(UNIT[precision])
    if error >= 1:
        with pytest.raises(ValueError, match="γ_n needs"):
            gamma(n, precision)
    else:
        assert is_ceiling(gamma(n, precision), error / (1 - error))


def test_gamma_of_an_unknown_precision():
    with pytest.raises(ValueError, match="float64"):
        gamma(3, "tf32")


@settings(max_examples=50)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=200))
def test_enlarge_covers_a_sum(xs):
    total = 0.0
    for x in xs:
        total += x
    exact = sum(map(Fraction, xs))
    assert Fraction(enlarge(total, len(xs) - 1)) >= exact
    as_tensor = enlarge(torch.tensor([total], dtype=torch.float64), len(xs) - 1)
    assert as_tensor.item() == enlarge(total, len(xs) - 1) <= total * (1.0 + 1e-13)


def test_enlarge_covers_the_worst_case():
    value, exact = 1.0, Fraction(1)
    for _ in range(100):  # each step loses almost a whole unit roundoff of a number just above 1
        value, exact = value * (1.0 + 2.0**-52), exact * (1 + Fraction(2) ** -52)
    assert Fraction(value) < exact <= Fraction(enlarge(value, 100))
