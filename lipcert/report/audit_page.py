"""The page about one audit: where the bound comes from, what is unbounded and why, and what would make it smaller.

It is made of the JSON that `lipcert bound` writes, and of nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas
from markupsafe import Markup
from matplotlib.figure import Figure

from lipcert.report import drawing, tables, views, wording
from lipcert.report.advice import advice
from lipcert.report.audit_figure import through_depth
from lipcert.report.page import template
from lipcert.report.read import Run
from lipcert.report.shares import number, path

_DESCRIPTION = "Proved Lipschitz bound from the input up to each layer, on a logarithmic axis."
_ANSWERS = {
    "proved": "proved: no pair of inputs exceeds it",
    "refuted": "refuted: a pair of inputs exceeds it",
    "open": "open: it lies between what is attained and what is proved",
}


def build(record: Mapping[str, Any]) -> str:
    """Return the page of an audit as `lipcert bound --json` writes it; equal records give equal bytes."""
    layers = record["layers"]
    frame = _frame(record)
    figure = through_depth(layers, number(record.get("lower")), number((record.get("claim") or {}).get("claimed")))
    found = advice(layers, record["unbounded"])
    return template("audit.html").render(
        record=record,
        shape=" × ".join(map(str, record["input"]["shape"])),
        domain=", ".join(f"{end:g}" for end in record["input"]["domain"]),
        near=_near(record["input"]),
        findings=_findings(record),
        summary=_summary(record),
        attained=record.get("lower") is not None,
        figure=figure and _inline(figure),
        layers=views.layers(frame) if len(frame) else None,
        off_path=len(path(layers)) not in (0, len(layers)),
        unbounded=record["unbounded"],
        advice=[(entry, _part(entry.part)) for entry in found],
        pair=(record.get("lower_witness") or {}).get("file"),
        colours=drawing.COLOURS,
    )


def _near(place: Mapping[str, Any]) -> str:
    return f", no value further than {place['radius']:.6g} from {place['around']}" if "around" in place else ""


def _inline(figure: Figure) -> Markup:
    return Markup(drawing.inline_svg(figure, "depth", _DESCRIPTION))


def _frame(record: Mapping[str, Any]) -> pandas.DataFrame:
    return tables.layers(Run(path=Path(), label="", bound={"layers": record["layers"]}))


def _part(part: float | None) -> str:
    return "no bound" if part is None else f"{100 * part:.0f} % of the growth"


def _summary(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (what, value, note) of the bracket, the claim and the time."""
    upper, lower = number(record["upper"]), number(record.get("lower"))
    exact = "no finite bound is known; the reasons are below" if record["upper"] == "inf" else str(record["upper"])
    rows = [("Proved: the constant is at most", wording.upper(record["upper"]), exact)]
    if record.get("position") not in (None, "inf"):
        rows.append(("At one position: at most", wording.upper(record["position"]), str(record["position"])))
    if not math.isnan(lower):
        how = "rounding of the outputs proved" if record.get("lower_proved") else "rounding allowed for, not proved"
        rows.append(("Attained: it is at least", wording.lower(lower), f"by two inputs; {how}"))
        if 0 < lower and math.isfinite(upper):
            rows.append(("Between them", f"a factor of {wording.significant(upper / lower, 3)}", ""))
    if claim := record.get("claim"):
        rows.append(("Claimed", repr(claim["claimed"]), _ANSWERS[claim["answer"]]))
    rows.append(("Time", wording.duration(number(record.get("seconds"))), ""))
    return rows


def _findings(record: Mapping[str, Any]) -> list[str]:
    found = []
    upper, lower = number(record["upper"]), number(record.get("lower"))
    if lower > upper:
        found.append(f"A pair of inputs attains {lower!r}, above the bound {upper!r} that is called proved.")
    claim = record.get("claim") or {}
    if claim.get("answer") == "refuted":
        how = "" if record.get("lower_proved") else " (rounding is allowed for, not proved)"
        found.append(f"The claimed constant {claim['claimed']!r} is refuted: a pair of inputs attains {lower!r}{how}.")
    return found
