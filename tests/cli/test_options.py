from __future__ import annotations

import math

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipcert.cli.options import Domain, Radii, Radius, Shape, table


def convert(kind: click.ParamType, text: str):
    return kind.convert(text, None, None)


def test_values_are_read() -> None:
    assert convert(Radius(), "36/255") == 36 / 255
    assert convert(Radii(), "36/255, 1,0.5") == (36 / 255, 1.0, 0.5)
    assert convert(Shape(), "3,32,32") == (3, 32, 32)
    assert convert(Domain(), "-1,1") == (-1.0, 1.0)


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_every_positive_float_is_a_radius(value: float) -> None:
    assert convert(Radius(), repr(value)) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((Radius(), text) for text in ("abc", "0", "-1", "inf", "nan", "1/0", "", "1/2/3", "36 / ")),
        *((Radii(), text) for text in ("1,,2", "1;2", "")),
        *((Shape(), text) for text in ("3x32x32", "3,0,32", "", "3,3.5")),
        *((Domain(), text) for text in ("1,0", "0", "0,1,2", "0,inf", "a,b", "1,1")),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_with_an_example(kind: click.ParamType, text: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        convert(kind, text)
    assert "is not a" in caught.value.message and "write" in caught.value.message


def test_defaults_pass_through() -> None:
    for kind, value in ((Radii(), (0.5,)), (Shape(), (1, 2)), (Domain(), (0.0, 1.0)), (Radius(), math.pi)):
        assert kind.convert(value, None, None) == value


def test_columns_line_up() -> None:
    assert table([("a", "1"), ("long", "")], ("name", "n")) == "name  n\na     1\nlong"
