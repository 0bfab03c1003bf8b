"""Numbers as text: bounds stay true, and every rounding can be read back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipcert.report import wording

POSITIVE = st.floats(1e-300, 1e300)


def value(text: str) -> float:
    return float(text.replace("−", "-"))


@given(POSITIVE)
def test_bounds_are_rounded_away_from_what_is_not_proved(x: float) -> None:
    assert x * (1 - 2e-9) <= value(wording.upper(x)) <= x * 1.0011
    assert x * 0.9989 <= value(wording.lower(x)) <= x * (1 + 2e-9)


def test_bounds_beyond_the_slack_are_rounded_away() -> None:
    assert (wording.upper(1 + 2**-52), wording.upper(1 + 3e-9), wording.upper(math.inf)) == ("1.000", "1.001", "∞")
    assert (wording.lower(1 - 2**-53), wording.lower(1 - 3e-9), wording.lower(0.0)) == ("1.000", "0.9999", "0")


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.0, "0"), (-0.5, "−0.5000"), (1.0, "1.000"), (99999.0, "100000"), (1e-5, "1.000e-5"), (1234567.0, "1.235e+6"),
        (math.inf, "∞"), (-math.inf, "−∞"), (None, "–"), (math.nan, "–"),
    ],
)  # fmt: skip
def test_significant(x: float | None, text: str) -> None:
    assert wording.significant(x) == text


@pytest.mark.parametrize("k", [0, 1, 36, 72, 108, 254, 255, 510])
def test_keys_of_the_summary_mean_fractions_of_255(k: int) -> None:
    assert wording.exact_radius(f"{k / 255:.4f}") == k / 255


def test_a_radius_that_is_no_fraction_of_255_stays() -> None:
    assert wording.exact_radius("0.2500") == 0.25
    assert wording.radius(0.25) == "0.25"
    assert wording.radius(2.0) == "2"
    assert wording.radius(0.1412) == "0.1412"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.5, "0.5 s"), (59.9, "59.9 s"), (61, "1 min"), (3599, "1 h 0 min"), (90000, "25 h 0 min"),
        (math.inf, wording.MISSING),
    ],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


def test_counts_do_not_break_between_their_digits() -> None:
    assert wording.count(10000.0) == "10\N{NARROW NO-BREAK SPACE}000"
    assert wording.count(None) == "–"
