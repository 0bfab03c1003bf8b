"""An audit as text for the terminal: layer by layer, with each factor's part of the growth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lipcert.report import wording
from lipcert.report.advice import advice
from lipcert.report.shares import shares

_WIDEST = 44
_TITLES = ("layer", "operators", "shape", "bound", "log10", "share", "up to here", "method")
_RIGHT = (3, 4, 5, 6)


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table, what has no bound, the bracket, and the advice; the bounds are rounded up."""
    rows = [_TITLES, *map(_row, record["layers"], shares(record["layers"]))]
    widths = [min(_WIDEST, max(len(row[k]) for row in rows)) for k in range(len(_TITLES))]
    for row in rows:
        cells = (_fit(cell, widths[k], k in _RIGHT) for k, cell in enumerate(row))
        yield "  ".join(cells).rstrip()
    for entry in record["unbounded"]:
        yield f"no bound: {entry['name']} ({entry['op']}): {entry['reason']}"
    for entry in advice(record["layers"], record["unbounded"])[:3]:
        part = "no bound" if entry.part is None else f"{100 * entry.part:.0f} % of the growth"
        more = f" and {entry.layers - len(entry.names)} more" if entry.layers > len(entry.names) else ""
        yield f"{part}: {entry.counterpart.title} ({', '.join(entry.names)}{more}). Use {entry.counterpart.instead}"
    proved = "no finite bound" if record["upper"] == "inf" else wording.upper(record["upper"], 8)
    place = record["input"]
    near = f" where no value is further than {place['radius']:.6g} from {place['around']}" if "around" in place else ""
    yield f"Lipschitz constant (l2, image to outputs){near}: at most {proved}"
    if record.get("position") not in (None, "inf"):
        yield f"of the outputs at one position: at most {wording.upper(record['position'], 8)}"


def _row(row: Mapping[str, Any], share: Any) -> tuple[str, ...]:
    log = "" if share.log10 is None else f"{share.log10:+.3f}"
    part = "" if share.part is None else f"{100 * share.part:.1f} %"
    upper, cumulative = (wording.upper(row[key], 6) for key in ("upper", "cumulative"))
    shape = "×".join(map(str, row["shape"]))
    return (row["name"], row["op"], shape, upper, log, part, cumulative, row["method"])


def _fit(cell: str, width: int, right: bool) -> str:
    if len(cell) > width:
        return cell[: width - 1] + "…"
    return cell.rjust(width) if right else cell.ljust(width)
