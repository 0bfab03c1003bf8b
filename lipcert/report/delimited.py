"""Typed columns from the delimited text files of a run; whatever is damaged is named by file, line and column."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas

from lipcert.errors import InputError


def integer(cell: str) -> int:
    """Read a whole number that a float holds exactly."""
    value = int(cell)
    if abs(value) > 2**53:
        raise ValueError
    return value


def flag(cell: str) -> int:
    """Read 0 or 1."""
    if cell not in ("0", "1"):
        raise ValueError
    return int(cell)


def length(cell: str) -> float:
    """Read a number that is not negative; infinity is one, NaN is not."""
    value = float(cell)
    if not value >= 0.0:  # also refuses NaN
        raise ValueError
    return value


def number(cell: str) -> float:
    """Read any float; an empty cell, None or NaN is a value that was not measured: NaN."""
    return float("nan") if cell in ("", "None") else float(cell)


Parse = Callable[[str], float]
_EXPECTED: dict[Parse, str] = {
    integer: "a whole number",
    flag: "0 or 1",
    length: "a number that is not negative",
    number: "a number",
}


def damaged(path: Path, line: int, column: str, what: str) -> InputError:
    """Return the error for a cell, a column of a table or a key, that cannot be right."""
    return InputError(f"{path}, line {line}, column {column!r}: {what}; the file is damaged")


def read_text(path: Path) -> str:
    """Read a UTF-8 file (a byte order mark is dropped); one that is missing or binary raises InputError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file (byte {error.start} is not UTF-8); name another one") from error


def read_columns(
    path: Path, separator: str, required: Mapping[str, Parse], optional: Mapping[str, Parse] | None = None
) -> pandas.DataFrame:
    """Return the required columns, and those of the optional ones that the file has, with a `line` column.

    The first line is the header; other columns are ignored. A last row without line end whose cells are incomplete is
    left out: its process was killed, or is still writing. Everything else that does not fit raises InputError.
    """
    text = read_text(path)
    file = io.StringIO(text, newline="")
    reader = csv.reader(file) if separator == "," else csv.reader(file, delimiter=separator, quoting=csv.QUOTE_NONE)
    try:
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}; the file is damaged") from error
    if not lines:
        raise InputError(f"{path} is empty; it should start with the columns {', '.join(required)}")
    header = [name.strip() for name in lines[0][1]]
    missing = [name for name in required if name not in header]
    if missing:
        raise InputError(
            f"{path}, line 1: column {', '.join(map(repr, missing))} is missing; the file has {', '.join(header)[:200]}"
        )
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise InputError(f"{path}, line 1: column {doubled[0]!r} appears twice")
    if len(lines) > 1 and len(lines[-1][1]) < len(header) and not text.endswith("\n"):
        lines.pop()
    wanted = {**required, **{name: parse for name, parse in (optional or {}).items() if name in header}}
    columns: dict[str, list[float]] = {"line": [], **{name: [] for name in wanted}}
    places = [(name, header.index(name), parse) for name, parse in wanted.items()]
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise InputError(f"{path}, line {line}: {len(cells)} cells instead of {len(header)}; the file is damaged")
        columns["line"].append(line)
        for name, place, parse in places:
            try:
                columns[name].append(parse(cells[place].strip()))
            except ValueError:
                raise damaged(path, line, name, f"{cells[place]!r} is not {_EXPECTED[parse]}") from None
    return pandas.DataFrame(columns)
