"""Bound: a number that knows what it proves. The rule table: what is known about each ATen operator.

A `Bound` is an `estimate` (nothing is proved), a `lower` bound (attained by an explicit input) or an `upper` bound
(proved, every rounding error included). Arithmetic keeps the weakest kind, so that an estimate can never slip into a
certificate: whatever certifies calls `Bound.require_upper()`.

This module knows neither torch nor the other modules of the package; everything imports it.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from decimal import ROUND_CEILING, Context
from fractions import Fraction
from typing import Any, Literal, TypeVar

Kind = Literal["estimate", "lower", "upper"]
_KINDS = ("estimate", "lower", "upper")
_LAST = 2**62  # an exponent above all others
_PRECISIONS = ("bfloat16", "float16", "float32", "float64", "exact")  # weakest first


class BoundError(ValueError):
    """Nothing can be proved about this model or number; the message names the place and what to do about it."""


@dataclass(frozen=True)
class Bound:
    """Hold a nonnegative number together with what it proves.

    `value` may be infinite; `method` names how it was found ("eigenvalue", "gram", "torus 18×18", …); `precision` is
    the arithmetic that it was computed in. A finite upper bound above the largest float has the value ∞, which is
    sound wherever it is used, and `beyond` says what it is: (m, e) for m·2^e with 1/2 ≤ m < 1.

    >>> Bound(2.0, "upper", "eigenvalue") * Bound(3.0, "estimate", "power iteration")
    Bound(value=6.0, kind='estimate', method='eigenvalue, power iteration', precision='float64')
    """

    value: float
    kind: Kind
    method: str
    precision: str = "float64"
    beyond: tuple[float, int] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", float(self.value))
        if not self.value >= 0.0:  # also catches NaN
            raise BoundError(f"a bound is a nonnegative number, got {self.value!r} from {self.method!r}")
        if self.kind not in _KINDS:
            raise BoundError(f"the kind of a bound is one of {', '.join(_KINDS)}, got {self.kind!r}")
        if self.precision not in _PRECISIONS:
            raise BoundError(f"the precision of a bound is one of {', '.join(_PRECISIONS)}, got {self.precision!r}")
        if self.beyond is not None and (self.kind != "upper" or not math.isinf(self.value)):
            raise BoundError("only an upper bound above the largest float has a second form")

    @property
    def finite(self) -> bool:
        """Return whether there is a bound at all, which may be above the largest float."""
        return self.beyond is not None or not math.isinf(self.value)

    @property
    def order(self) -> tuple[float, int, float]:
        """Return what bounds are compared by: their size, also above the largest float."""
        mantissa, exponent = self.beyond or (0.0, 0 if self.finite else _LAST)
        return self.value, exponent, mantissa

    @property
    def written(self) -> float | str:
        """Return the number as JSON holds it: a float, "1.0413e+712" (rounded up) above the floats, or "inf".

        >>> (Bound(1e300, "upper", "") * Bound(1e300, "upper", "")).written
        '1.0000000000000004e+600'
        """
        if not math.isinf(self.value):
            return self.value
        if self.beyond is None:
            return "inf"
        mantissa, exponent = self.beyond
        exact = int(math.ldexp(mantissa, 53)) << (exponent - 53)
        return f"{Context(prec=17, rounding=ROUND_CEILING).create_decimal(exact).normalize():e}"

    def __mul__(self, other: Bound) -> Bound:
        """Multiply, rounding away from what would be unproved; 0·∞ stays ∞."""
        if not isinstance(other, Bound):
            return NotImplemented
        if not (self.finite and other.finite):
            return _combine(self, other, math.inf, exact=True)
        exact = self.value in (0.0, 1.0) or other.value in (0.0, 1.0)
        value = 0.0 if 0.0 in (self.value, other.value) else self.value * other.value
        if math.isfinite(value):
            return _combine(self, other, value, exact=exact)
        (a, b), (c, d) = self._parts(), other._parts()
        return _combine(self, other, *_normal(math.nextafter(a * c, math.inf), b + d), exact=True)

    def __add__(self, other: Bound) -> Bound:
        """Add, rounding away from what would be unproved."""
        if not isinstance(other, Bound):
            return NotImplemented
        exact = self.value == 0.0 or other.value == 0.0
        value = self.value + other.value
        if math.isfinite(value) or not (self.finite and other.finite):
            return _combine(self, other, value, exact=exact)
        (a, b), (c, d) = self._parts(), other._parts()
        top = max(b, d)
        small = math.nextafter(math.ldexp(a, b - top), math.inf) + math.nextafter(math.ldexp(c, d - top), math.inf)
        return _combine(self, other, *_normal(math.nextafter(small, math.inf), top), exact=True)

    def __truediv__(self, other: Bound) -> Bound:
        """Divide by a positive number, rounding up: at most so many times `other` is this upper bound."""
        if not isinstance(other, Bound):
            return NotImplemented
        if not (self.finite and other.finite) or other.value == 0.0:
            return _combine(self, other, math.inf, exact=True)
        (a, b), (c, d) = self._parts(), other._parts()
        return _combine(self, other, *_normal(math.nextafter(a / c, math.inf), b - d), exact=True)

    def root(self) -> Bound:
        """Return the square root, rounded up for an upper bound."""
        if self.kind != "upper" or not self.finite:
            return replace(self, value=math.sqrt(self.value))
        mantissa, exponent = self._parts()
        half, odd = divmod(exponent, 2)
        found = math.sqrt(mantissa * 2**odd)
        if Fraction(found) ** 2 < Fraction(mantissa) * 2**odd:
            found = math.nextafter(found, math.inf)
        value, beyond = _normal(found, half)
        return replace(self, value=value, beyond=beyond)

    def _parts(self) -> tuple[float, int]:
        """Return (m, e) with m·2^e exactly the number."""
        return self.beyond or math.frexp(self.value)

    def require_upper(self) -> float:
        """Return the value if it is a proved upper bound, else raise BoundError.

        >>> Bound(1.5, "upper", "gram").require_upper()
        1.5
        """
        if self.kind != "upper":
            raise BoundError(
                f"a proved upper bound is needed here, but {self.value:.6g} ({self.method}) is "
                f"{'an estimate' if self.kind == 'estimate' else 'a lower bound'}; audit the exported model instead"
            )
        return self.value


def _normal(mantissa: float, exponent: int) -> tuple[float, tuple[float, int] | None]:
    """Return m·2^e as a float, rounded up, and as (m, e) where it is above the largest float."""
    mantissa, shift = math.frexp(mantissa)
    exponent += shift
    if exponent > 1024:
        return math.inf, (mantissa, exponent)
    value = math.ldexp(mantissa, exponent)
    return (value if exponent > -1000 else math.nextafter(value, math.inf)), None


def _combine(a: Bound, b: Bound, value: float, beyond: tuple[float, int] | None = None, *, exact: bool) -> Bound:
    """Join two bounds of the same kind into that kind, of different kinds into an estimate."""
    kind: Kind = a.kind if a.kind == b.kind else "estimate"
    if kind != "upper":
        value, beyond = (sys.float_info.max if kind == "lower" and math.isinf(value) else value), None
    if not exact and kind == "upper":
        value = math.nextafter(value, math.inf)
    if not exact and kind == "lower":
        value = max(0.0, math.nextafter(value, 0.0))
    parts = dict.fromkeys(part for bound in (a, b) for part in bound.method.split(", ") if part)
    precision = min(a.precision, b.precision, key=_PRECISIONS.index)
    return Bound(value, kind, ", ".join(parts), precision, beyond)


# ---------------------------------------------------------------------------------------------------- the rule table

RuleFunction = TypeVar("RuleFunction", bound=Callable[..., Any])
RULES: dict[str, Callable[..., Any]] = {}


def rule(*names: str) -> Callable[[RuleFunction], RuleFunction]:
    """Register the decorated function as the rule of the named ATen operators ("aten.relu.default").

    A rule is called as `rule(node, context)` during propagation and returns the `Value` of the node; see
    `lipcert.bounds.graph`. Its docstring states the inequality and where it comes from. Registering a second rule for
    one operator raises ValueError: two proofs for one operator are a mistake, whichever is right.
    """

    def register(function: RuleFunction) -> RuleFunction:
        for name in names:
            if name in RULES:
                raise ValueError(
                    f"operator {name} already has the rule {RULES[name].__module__}.{RULES[name].__name__}; "
                    f"{function.__module__}.{function.__name__} cannot be a second one"
                )
            RULES[name] = function
        return function

    return register


def unknown_operators(operators: Iterable[tuple[str, str, str]]) -> BoundError | None:
    """Return one error that lists every operator without a rule, or None; rows are (name, module path, source line)."""
    missing: dict[str, list[str]] = {}
    for name, module, source in operators:
        if name not in RULES:
            missing.setdefault(name, []).append(" at ".join(part for part in (module, source) if part) or "top level")
    if not missing:
        return None
    lines = []
    for name, places in sorted(missing.items()):
        near = difflib.get_close_matches(name, RULES, n=1, cutoff=0.7)
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        hint = f"; a rule exists for {near[0]}" if near else ""
        lines.append(f"  {name}: {places[0]}{more}{hint}")
    count = f"{len(missing)} operator{'s' if len(missing) > 1 else ''}"
    return BoundError(
        f"no rule for {count}; nothing is assumed about an unknown operator. Replace it in the model, or register its "
        "proof with lipcert.bounds.rule:\n" + "\n".join(lines)
    )
