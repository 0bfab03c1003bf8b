"""Frames as tables for the page: what a cell says, how it is sorted, how it looks. Escaping is left to the template."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas

from lipcert.report import wording
from lipcert.report.read import PROBABILISTIC, Run

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """Hold a cell: text, the value it is sorted by, CSS classes, a tooltip, a bar from -1 to 1, its run's number."""

    text: str
    value: float | str = ""
    css: str = ""
    title: str = ""
    bar: float | None = None
    series: int | None = None


@dataclass(frozen=True)
class View:
    """Hold a table: column titles with their CSS class, and rows of cells."""

    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]


Column = tuple[str, Callable[[Row], Cell]]


def accuracies(frame: pandas.DataFrame, runs: Sequence[Run]) -> View:
    """Show who was certified how well: model, data, n, clean and certified accuracy, mean radius."""
    columns: list[Column] = [
        ("Run", lambda row: _run(row, runs)),
        ("Model", _text("model")),
        ("Data", _text("data")),
        ("n", _number("n", wording.count)),
    ]
    if (frame["abstained"] > 0).any():
        columns.append(("Abstained", _number("abstained", wording.percent)))
    columns.append(("Clean", _number("clean", wording.percent)))
    for name in frame.columns:
        if name.startswith("certified@"):
            radius = wording.exact_radius(name.removeprefix("certified@"))
            columns.append((f"Certified {wording.radius(radius)}", _number(name, wording.percent)))
    columns.append(("ACR", _number("acr", wording.significant)))
    return _view(frame, columns)


def bounds(frame: pandas.DataFrame, runs: Sequence[Run]) -> View:
    """Show how far the proof is from what is attained: Lipschitz bounds, robust accuracy, contradictions."""
    columns: list[Column] = [
        ("Run", lambda row: _run(row, runs)),
        ("Proved L\N{NO-BREAK SPACE}≤", _number("upper", wording.upper)),
        ("Attained L\N{NO-BREAK SPACE}≥", _lower),
        ("Features, proved\N{NO-BREAK SPACE}≤", _number("features", wording.upper)),
        ("Features, estimate", _number("estimate", wording.significant)),
        ("Proved / estimate", _number("ratio", wording.significant)),
    ]
    for name in frame.columns:
        if name.startswith("robust@"):
            eps = wording.radius(wording.exact_radius(name.removeprefix("robust@")))
            columns.append((f"AutoAttack {eps}", _number(name, wording.percent)))
    columns.append(("Contradictions", _contradictions))
    return _view(frame[frame["mark"] != PROBABILISTIC], columns)


def attacks(frame: pandas.DataFrame, runs: Sequence[Run]) -> View:
    """Show robust accuracy beside the certified accuracy of the same images."""
    columns: list[Column] = [
        ("Run", lambda row: _run(row, runs)),
        ("ε", lambda row: Cell(wording.radius(row["eps"]), row["eps"], "number", repr(row["eps"]))),
        ("n", _number("n", wording.count)),
        ("Clean", _number("clean", wording.percent)),
        ("Robust", _number("robust", wording.percent)),
        ("Certified, same images", _number("certified", wording.percent)),
        ("Undecided", _number("gap", wording.percent)),
        ("Contradictions", _contradictions),
        ("Version", _text("version")),
        ("Time", _number("seconds", wording.duration)),
    ]
    return _view(frame, columns)


def layers(frame: pandas.DataFrame) -> View:
    """Show the bound of each layer; columns that are empty in every row are left out."""
    largest = max((abs(share) for share in frame["share"] if not math.isnan(share)), default=0.0)

    def share(row: Row) -> Cell:
        value = row["share"]
        if value is None:
            return Cell(wording.MISSING, css="number")
        text = f"{100 * value:+.1f} %".replace("-", "−") if abs(value) >= 0.0005 else "0 %"
        return Cell(text, value, "number share", bar=value / largest if largest else 0.0)

    columns: list[Column] = [
        ("Layer", lambda row: Cell(row["name"] or wording.MISSING, row["name"], "name")),
        ("Operator", lambda row: Cell(row["op"] or wording.MISSING, row["op"], "op")),
        ("Shape", _text("shape")),
        ("Bound", _bound("upper", "log10")),
        ("log\N{SUBSCRIPT ONE}\N{SUBSCRIPT ZERO}", _logarithm),
        ("Attained", _number("lower", wording.lower)),
        ("Share of growth", share),
        ("Up to here", _bound("cumulative", "height")),
        ("Method", _text("method")),
        ("Note", lambda row: Cell(row["note"], row["note"], "note")),
    ]
    empty = {title for title, key in (("Note", "note"), ("Shape", "shape")) if (frame[key] == "").all()}
    if frame["lower"].isna().all():
        empty.add("Attained")
    return _view(frame, [column for column in columns if column[0] not in empty])


def records(frame: pandas.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a frame, with None for what is missing."""
    known = frame.astype(object).where(frame.notna(), None)
    return [dict(zip(known.columns, row, strict=True)) for row in known.itertuples(index=False, name=None)]


def _view(frame: pandas.DataFrame, columns: Sequence[Column]) -> View:
    rows = tuple(tuple(cell(record) for _, cell in columns) for record in records(frame))
    classes = ["number" if rows and all("number" in row[i].css for row in rows) else "" for i in range(len(columns))]
    return View(tuple(zip((title for title, _ in columns), classes, strict=True)), rows)


def _run(row: Row, runs: Iterable[Run]) -> Cell:
    position = next(i for i, run in enumerate(runs) if run.label == row["run"])
    mark = next(run.mark for run in runs if run.label == row["run"])
    return Cell(row["run"], row["run"], "run" + (" marked" if mark else ""), mark, series=position)


def _text(key: str) -> Callable[[Row], Cell]:
    return lambda row: Cell(str(row[key] or wording.MISSING), str(row[key] or ""))


def _number(key: str, write: Callable[[float | None], str]) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        value = row[key]
        if value is None or math.isnan(value):
            return Cell(wording.MISSING, css="number")
        return Cell(write(value), float(value), "number", f"{value:.17g}")

    return cell


def _bound(key: str, log: str) -> Callable[[Row], Cell]:
    """Write an upper bound, one above the largest float by its logarithm."""

    def cell(row: Row) -> Cell:
        value, size = row[key], row[log]
        if value == math.inf and size is not None and math.isfinite(size):
            power = f"10^{math.ceil(10 * size) / 10:.1f}"
            return Cell(power, size, "number", power)
        return _number(key, wording.upper)(row)

    return cell


def _lower(row: Row) -> Cell:
    cell = _number("lower", wording.lower)(row)
    if row["lower"] is not None and row["upper"] is not None and row["lower"] > row["upper"]:
        return Cell(cell.text, cell.value, "number bad", f"above the proved bound: {cell.title} > {row['upper']:.17g}")
    return cell


def _logarithm(row: Row) -> Cell:
    value = row["log10"]
    if value is None:
        return Cell(wording.MISSING, css="number")
    return Cell(f"{value:+.3f}".replace("-", "\N{MINUS SIGN}"), value, "number", f"{value:.17g}")


def _contradictions(row: Row) -> Cell:
    found = row["contradictions"]
    if not found and not row["checked"]:
        return Cell("not checked", -1.0, "quiet")
    if not found:
        return Cell(f"none in {wording.count(row['checked'])} attacked", 0.0, "good")
    images = row["idx"].split()
    listed = ", ".join(images[:12]) + (f" and {len(images) - 12} more" if len(images) > 12 else "")
    return Cell(f"{wording.count(found)}: idx {listed}", float(found), "bad", " ".join(images))
