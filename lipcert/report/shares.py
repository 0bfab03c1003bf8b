"""Who makes a bound large: the factors along the path that decides it, on a logarithmic scale.

Where branches are added, the bound is that of the largest branch times a factor, in which the others count; the rows of
these do not multiply into the result. So the rows are followed backwards from the result, each to the row whose bound
it multiplied, which `upper` and `cumulative` tell. Along this path the logarithms sum to that of the bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SAME = 1e-9  # rounding outward moves a bound by far less


@dataclass(frozen=True)
class Share:
    """Hold log10 of a row's factor, and its part of the growth along the path: None off the path.

    The growth is the sum of all positive logarithms on the path; a row that shrinks distances has a negative part.
    """

    log10: float | None
    part: float | None


def number(value: Any) -> float:
    """Read a number of bound.json: infinity is the string "inf", what is not there is NaN.

    >>> number("inf"), number(2)
    (inf, 2.0)
    """
    return math.nan if value is None else float(value)


def shares(layers: Sequence[Mapping[str, Any]]) -> list[Share]:
    """Return one share per row of an audit's layers, in their order.

    >>> rows = [{"upper": 10.0, "cumulative": 10.0}, {"upper": 1.0, "cumulative": 10.0}]
    >>> [share.part for share in shares(rows)]
    [1.0, 0.0]
    """
    on_path = path(layers)
    logs = [_log10(number(row["upper"])) for row in layers]
    growth = math.fsum(logs[i] or 0.0 for i in on_path if (logs[i] or 0.0) > 0.0)
    parts = {i: (logs[i] or 0.0) / growth for i in on_path} if growth > 0.0 else {}
    return [Share(log, parts.get(i)) for i, log in enumerate(logs)]


def path(layers: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the rows that the bound of the last one is the product of, first to last; none if that is infinite."""
    found: list[int] = []
    wanted, end = (number(layers[-1]["cumulative"]), len(layers)) if layers else (math.nan, 0)
    while 0.0 < wanted < math.inf:
        index = next((i for i in reversed(range(end)) if _same(number(layers[i]["cumulative"]), wanted)), None)
        if index is None:
            break
        found.append(index)
        factor = number(layers[index]["upper"])
        wanted, end = (wanted / factor if factor > 0.0 else math.nan), index
    return found[::-1]


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_SAME)


def _log10(value: float) -> float | None:
    return math.log10(value) if 0.0 < value < math.inf else None
