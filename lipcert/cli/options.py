"""Options and value types that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from lipcert.files import require_writable, to_json, write_text


class Radius(click.ParamType):
    """An l2 radius in pixels of [0, 1]: `36/255` or `0.141`, positive and finite."""

    name = "radius"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = _number(value)
        if not (0.0 < number < math.inf):
            self.fail(f"{value!r} is not a radius; write a positive number like 0.141 or 36/255", param, ctx)
        return number


class Radii(click.ParamType):
    """A comma list of radii: `36/255,72/255,1`."""

    name = "radii"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(Radius().convert(part, param, ctx) for part in value.split(","))


class Shape(click.ParamType):
    """The shape of one input, without the batch: `3,32,32`."""

    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            shape = tuple(int(part) for part in value.split(","))
        except ValueError:
            shape = (0,)
        if min(shape) < 1:
            self.fail(f"{value!r} is not a shape; write the channels and sides of one input, like 3,32,32", param, ctx)
        return shape


class Domain(click.ParamType):
    """The box that inputs lie in: `0,1`."""

    name = "low,high"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        ends = tuple(_number(part) for part in value.split(","))
        if len(ends) != 2 or not all(map(math.isfinite, ends)) or not ends[0] < ends[1]:
            self.fail(f"{value!r} is not a domain; write the lowest and the highest pixel, like 0,1", param, ctx)
        return ends[0], ends[1]


class Constant(click.ParamType):
    """A Lipschitz constant: a number that is not negative, `1.5` or `1/255`."""

    name = "constant"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = _number(value)
        if not (0.0 <= number < math.inf):
            self.fail(f"{value!r} is not a Lipschitz constant; write a number like 1.5", param, ctx)
        return number


def _number(text: Any) -> float:
    """Return the number in `0.141` or `36/255`, NaN where there is none."""
    numerator, slash, denominator = str(text).partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        return math.nan


def _writable_target(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse before any work is done what could not be written after it."""
    if value is not None and value != "-":
        if Path(value).is_dir():
            raise click.BadParameter(f"{value} is a folder; name a file or - for stdout", ctx, param)
        require_writable(Path(value).parent)
    return value


def _page_target(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value == "-":
        raise click.BadParameter("the page goes into a file; write --html page.html", ctx, param)
    return _writable_target(ctx, param, value)


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

device_option: Decorator = click.option(
    "--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda or cuda:1."
)
seed_option: Decorator = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of everything random."
)
data_root_option: Decorator = click.option(
    "--data-root",
    envvar="LIPCERT_DATA",
    show_envvar=True,
    type=click.Path(file_okay=False),
    help="Folder of the data sets.  [default: ~/.cache/lipcert]",
)
json_option: Decorator = click.option(
    "--json", "json_file", metavar="FILE", callback=_writable_target, help="Write the result as JSON; - is stdout."
)
html_option: Decorator = click.option(
    "--html", "html_file", metavar="FILE", callback=_page_target, help="Write the result as one self-contained page."
)


def write_json(target: str, value: Any) -> None:
    """Write `value` as JSON to the file `target`, or to stdout for "-"."""
    if target == "-":
        click.echo(to_json(value))
    else:
        write_text(target, to_json(value) + "\n")


def note(text: str) -> None:
    """Tell the user something that is not the result: stderr."""
    click.echo(text, err=True)


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """Lay out text cells in columns.

    >>> print(table([("cifar10", "32")], ("name", "pixels")))
    name     pixels
    cifar10  32
    """
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows])
    return "\n".join(line.rstrip() for line in lines)
