"""Bound keeps the weakest kind and rounds outwards; the rule table refuses duplicates and lists all that is missing."""

import doctest
import math
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
