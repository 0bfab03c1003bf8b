"""Who makes a bound large: the factors along the path that decides it, on a logarithmic scale.

Where branches are added, the bound is that of the largest branch times a factor, in which the others count; the rows of
these do not multiply into the result. So the rows are followed backwards from the result, each to the row whose bound
it multiplied, which `upper` and `cumulative` tell. Along this path the logarithms sum to that of the bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

_SAME = 1e-9  # of a logarithm; rounding outward moves a bound by far less


@dataclass(frozen=True)
class Share:
    """Hold log10 of a row's factor, and its part of the growth along the path: None off the path.

    The growth is the sum of all positive logarithms on the path; a row that shrinks distances has a negative part.
    """

    log10: float | None
    part: float | None


def number(value: Any) -> float:
    """Read a number of bound.json: infinity is the string "inf", what is not there is NaN.

    Bounds above the largest float are texts such as "1.04e+712", whose float is ∞; `magnitude` tells them apart.

    >>> number("inf"), number(2)
    (inf, 2.0)
    """
    return math.nan if value is None else float(value)


def magnitude(value: Any) -> float:
    """Return log10 of a number of bound.json: ∞ only without a bound, -∞ for 0, NaN for what is not there.

    >>> magnitude("1e+712"), magnitude(100.0), magnitude("inf")
    (712.0, 2.0, inf)
    """
    exact = Decimal("NaN" if value is None else value)
    return math.nan if exact.is_nan() else float(exact.log10())


def shares(layers: Sequence[Mapping[str, Any]]) -> list[Share]:
    """Return one share per row of an audit's layers, in their order.

    >>> rows = [{"upper": 10.0, "cumulative": 10.0}, {"upper": 1.0, "cumulative": 10.0}]
    >>> [share.part for share in shares(rows)]
    [1.0, 0.0]
    """
    on_path = path(layers)
    sizes = [magnitude(row.get("upper")) for row in layers]
    logs = [size if math.isfinite(size) else None for size in sizes]
    growth = math.fsum(logs[i] or 0.0 for i in on_path if (logs[i] or 0.0) > 0.0)
    parts = {i: (logs[i] or 0.0) / growth for i in on_path} if growth > 0.0 else {}
    return [Share(log, parts.get(i)) for i, log in enumerate(logs)]


def path(layers: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the rows that the bound of the last one is the product of, first to last; none if that is infinite."""
    found: list[int] = []
    wanted, end = (magnitude(layers[-1].get("cumulative")), len(layers)) if layers else (math.nan, 0)
    while math.isfinite(wanted):
        index = next((i for i in reversed(range(end)) if _same(magnitude(layers[i].get("cumulative")), wanted)), None)
        if index is None:
            break
        found.append(index)
        wanted, end = wanted - magnitude(layers[index].get("upper")), index
    return found[::-1]


def _same(a: float, b: float) -> bool:
    """Return whether two logarithms are those of one number; a difference of 1e-9 in it is rounding."""
    return abs(a - b) <= _SAME * max(1.0, abs(a) * 1e-3)
