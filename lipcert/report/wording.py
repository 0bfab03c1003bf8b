"""Numbers as text. A proved upper bound is rounded up and a lower bound down, so that what is read is still true.

But for one part in 10⁹: an isometry whose bound is a few roundoffs above 1 reads 1.000, not 1.001.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal

MISSING = "–"
_SLACK = 1e-9


def significant(value: float | Decimal | None, digits: int = 4, rounding: str = ROUND_HALF_EVEN) -> str:
    """Write a number with `digits` significant digits, in plain notation unless it is very large or small.

    >>> significant(12.3456), significant(1.23456e9), significant(float("inf"))
    ('12.35', '1.235e+9', '∞')
    """
    exact = Decimal("NaN") if value is None else Decimal(value)
    if exact.is_nan():
        return MISSING
    if exact.is_infinite():
        return "∞" if exact > 0 else "−∞"
    if exact == 0:
        return "0"
    rounded = exact.quantize(Decimal(1).scaleb(exact.adjusted() - digits + 1), rounding)
    rounded = rounded.quantize(Decimal(1).scaleb(rounded.adjusted() - digits + 1))  # 0.99996 became 1.0000
    plain = -4 <= rounded.adjusted() < 6
    return format(rounded, "f" if plain else f".{digits - 1}e").replace("-", "−", 1 if exact < 0 else 0)


def upper(value: float | str | None, digits: int = 4) -> str:
    """Write an upper bound, rounded up; it may be the text of a number above the largest float.

    >>> upper(26.690001), upper(1.0000000000000002), upper("2.00001e+400")
    ('26.70', '1.000', '2.001e+400')
    """
    if isinstance(value, str) and value != "inf":  # above the largest float
        return significant(Decimal(value), digits, ROUND_CEILING)
    return significant(None if value is None else float(value) * (1 - _SLACK), digits, ROUND_CEILING)


def lower(value: float | None, digits: int = 4) -> str:
    """Write a lower bound, rounded down.

    >>> lower(26.699999)
    '26.69'
    """
    return significant(None if value is None else value * (1 + _SLACK), digits, ROUND_FLOOR)


def percent(value: float | None) -> str:
    """Write a share with two decimals of a percent, which is exact for up to 10 000 images.

    >>> percent(0.6315)
    '63.15'
    """
    return MISSING if value is None or math.isnan(value) else f"{100 * value:.2f}"


def count(value: float | None) -> str:
    """Write a whole number with narrow no-break spaces between thousands."""
    return MISSING if value is None or math.isnan(value) else f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def duration(seconds: float | None) -> str:
    """Write a time in the unit that suits it.

    >>> duration(42.3), duration(5000)
    ('42.3 s', '1 h 23 min')
    """
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def exact_radius(key: str) -> float:
    """Return the radius that a key of summary.json, rounded to four digits, stands for: k/255 if that rounds to it.

    >>> exact_radius("0.1412") == 36 / 255, exact_radius("0.5001")
    (True, 0.5001)
    """
    steps = round(255 * float(key))
    return steps / 255 if f"{steps / 255:.4f}" == key else float(key)


def radius(value: float) -> str:
    """Write a radius as the fraction of 255 that the literature uses where it is one.

    >>> radius(36 / 255), radius(0.25), radius(1.0)
    ('36/255', '0.25', '1')
    """
    steps = round(255 * value)
    if steps % 255 and math.isclose(value, steps / 255, rel_tol=1e-9):
        return f"{steps}/255"
    return f"{value:.4g}"
