"""Bound keeps the weakest kind and rounds outwards; the rule table refuses duplicates and lists all that is missing."""

import doctest
import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lipcert.bounds.core
from lipcert.bounds import Bound, BoundError, rule
from lipcert.bounds.core import RULES, unknown_operators

values = st.floats(min_value=0.0, max_value=1e300, allow_nan=False)


@given(values, values)
def test_upper_bounds_round_up_and_lower_bounds_round_down(a, b):
    upper = Bound(a, "upper", "a"), Bound(b, "upper", "b")
    lower = Bound(a, "lower", "a"), Bound(b, "lower", "b")
    for combine, exact in (
        (lambda p: p[0] * p[1], Fraction(a) * Fraction(b)),
        (lambda p: p[0] + p[1], Fraction(a) + Fraction(b)),
    ):
        up, down = combine(upper), combine(lower)
        assert up.kind == "upper" and down.kind == "lower"
        assert math.isinf(up.value) or Fraction(up.value) >= exact
        assert math.isinf(down.value) or Fraction(down.value) <= exact
        if not math.isinf(up.value):
            assert up.value <= float(exact) * (1 + 1e-15) + 1e-322


@pytest.mark.parametrize("kinds", [("upper", "lower"), ("upper", "estimate"), ("lower", "estimate")])
def test_mixed_kinds_prove_nothing(kinds):
    a, b = (Bound(2.0, kind, kind) for kind in kinds)
    for mixed in (a * b, a + b, b * a):
        assert mixed.kind == "estimate"
        with pytest.raises(BoundError, match="proved upper bound"):
            mixed.require_upper()


def test_require_upper_names_what_is_wrong():
    with pytest.raises(BoundError, match="0.5 .attack. is a lower bound"):
        Bound(0.5, "lower", "attack").require_upper()


def test_precision_and_methods_are_joined():
    product = Bound(2.0, "upper", "gram, torus", "float32") * Bound(3.0, "upper", "gram")
    assert (product.precision, product.method) == ("float32", "gram, torus")


def test_infinity_means_no_bound():
    nothing = Bound(math.inf, "upper", "none")
    assert (nothing * Bound(0.0, "upper", "zero")).value == math.inf
    assert (nothing + Bound(1.0, "upper", "one")).value == math.inf


def test_one_and_zero_are_exact():
    third = Bound(1 / 3, "upper", "x")
    assert (third * Bound(1.0, "upper", "isometry")).value == 1 / 3
    assert (third + Bound(0.0, "upper", "zero")).value == 1 / 3


@pytest.mark.parametrize("value, kind, precision", [
    (-1.0, "upper", "float64"), (math.nan, "upper", "float64"), (1.0, "exactly", "float64"), (1.0, "upper", "float8"),
])  # fmt: skip
def test_bad_bounds_are_refused(value, kind, precision):
    with pytest.raises(BoundError):
        Bound(value, kind, "test", precision)


def test_a_second_rule_for_one_operator_is_refused():
    with pytest.raises(ValueError, match="already has the rule .*entrywise"):
        rule("aten.relu.default")(lambda node, context: None)
    assert RULES["aten.relu.default"].__name__ == "entrywise"


def test_unknown_operators_are_listed_together_with_a_near_name():
    rows = [("aten.relu.default", "a", ""), ("aten.reluu.default", "net.act", "m.py:3"), ("aten.fft.default", "", "")]
    error = unknown_operators([*rows, ("aten.fft.default", "other", "")])
    text = str(error)
    assert isinstance(error, BoundError)
    assert (
        "2 operators" in text and "aten.reluu.default: net.act at m.py:3; a rule exists for aten.relu.default" in text
    )
    assert "aten.fft.default: top level and 1 more" in text
    assert unknown_operators(rows[:1]) is None


def test_examples():
    assert doctest.testmod(lipcert.bounds.core).failed == 0


@given(st.lists(st.floats(1e-50, 1e300), min_size=2, max_size=6), st.sampled_from("*+/"))  # nothing underflows
def test_arithmetic_beyond_the_largest_float_is_an_upper_bound(factors: list[float], last: str) -> None:
    """Products of many factors, one more operation and the root: at least the exact value, and not much more."""
    bound, exact = Bound(1.0, "upper", ""), Fraction(1)
    for factor in factors[:-1]:
        bound, exact = bound * Bound(factor, "upper", ""), exact * Fraction(factor)
    end, other = Bound(factors[-1], "upper", ""), Fraction(factors[-1])
    if last == "*":
        bound, exact = bound * end, exact * other
    elif last == "+":
        bound, exact = bound + end, exact + other
    else:
        bound, exact = bound / end, exact / other
    assert bound.finite and (bound.beyond is None) == math.isfinite(bound.value)
    found = Fraction(Decimal(bound.written))
    assert exact <= found
    assert found <= exact * (1 + Fraction(1, 2**45)) + Fraction(1, 2**1000)
    square = Fraction(Decimal(bound.root().written)) ** 2
    assert found * (1 - Fraction(1, 10**14)) <= square <= found * (1 + Fraction(1, 2**45)) + Fraction(1, 2**1000)


def test_bounds_beyond_the_largest_float_compare_and_come_back() -> None:
    huge = Bound(1e200, "upper", "")
    one, two = huge * huge, huge * huge * huge
    none = Bound(math.inf, "upper", "")
    assert one.value == two.value == math.inf
    assert Bound(3.0, "upper", "").order < one.order < two.order < none.order
    assert not none.finite and not (none * one).finite and not (none + one).finite
    back = two * Bound(1e-300, "upper", "") * Bound(1e-299, "upper", "")
    assert 10.0 < back.value < 10.0 * (1 + 1e-14) and back.beyond is None
    assert (one * Bound(0.0, "upper", "")).value == 0.0
    assert (one * Bound(2.0, "estimate", "")).beyond is None
    lower = Bound(1e200, "lower", "") * Bound(1e200, "lower", "")
    assert lower.value < math.inf  # ∞ would claim too much
