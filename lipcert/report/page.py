"""The report: one HTML page that needs no network, and beside it its figures as PNG and SVG and its tables as CSV."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from lipcert.files import require_writable, write_bytes, write_text
from lipcert.report import drawing, figures, tables, views, wording
from lipcert.report.consistency import disagreements, summary_agrees
from lipcert.report.read import Run


@dataclass(frozen=True, eq=False)
class Report:
    """Hold the page, and the figures and tables that `write` puts beside it.

    `findings` are what contradicts a certificate or a bound, one sentence each; `headline` is the first table.
    """

    html: str
    figures: Mapping[str, Figure]
    tables: Mapping[str, pandas.DataFrame]
    findings: tuple[str, ...]

    @property
    def headline(self) -> pandas.DataFrame:
        """One row per run, see `tables.headline`."""
        return self.tables["headline"]

    def beside(self) -> Iterator[tuple[str, bytes]]:
        """Render the files beside the page: what comes behind its stem in their names, and their bytes."""
        for name, figure in self.figures.items():
            yield f"_{name}.svg", drawing.svg(figure)
            yield f"_{name}.png", drawing.png(figure)
        for name, frame in self.tables.items():
            yield f"_{name}.csv", tables.csv(frame)

    def write(self, path: Path) -> tuple[Path, ...]:
        """Write the page to `path` and the other files beside it; return all paths, the page first."""
        require_writable(path.parent)
        beside = [write_bytes(path.with_name(path.stem + suffix), data) for suffix, data in self.beside()]
        return write_text(path, self.html), *beside


def build(runs: Sequence[Run]) -> Report:
    """Make the report of these runs; equal run folders give equal bytes."""
    headline, attacks, curves = tables.headline(runs), tables.attacks(runs), tables.curves(runs)
    layers = [tables.layers(run) for run in runs]
    facts = tables.facts([run for run in runs if not run.is_log])
    radii = [wording.exact_radius(key) for key in tables.radius_keys(runs)]
    drawn = {
        "certified": figures.certified_curves(runs, curves, attacks, radii) if len(curves) or len(attacks) else None,
        "depth": figures.depth(runs, layers),
        "training": figures.training(runs),
    }
    shown = {name: figure for name, figure in drawn.items() if figure is not None}
    frames = {
        "headline": headline,
        "curve": curves,
        "attacks": attacks,
        "layers": pandas.concat(layers),
        "facts": facts,
    }
    findings = tuple(_findings(runs, headline))
    html = template("page.html").render(
        runs=runs,
        folders=[run for run in runs if not run.is_log],
        findings=findings,
        stale=[(run.label, sentence) for run in runs for sentence in disagreements(run)],
        accuracies=views.accuracies(headline, runs),
        bounds=views.bounds(headline, runs) if any(not run.is_log for run in runs) else None,
        attacks=views.attacks(attacks, runs) if len(attacks) else None,
        layers=[
            (position, run, views.layers(frame), _published(run))
            for position, (run, frame) in enumerate(zip(runs, layers, strict=True))
            if len(frame)
        ],
        unbounded=[(run.label, entry) for run in runs for entry in run.bound.get("unbounded", [])],
        facts=_grouped(facts),
        figures={
            name: Markup(drawing.inline_svg(shown[name], name, description)) if name in shown else None
            for name, description in _DESCRIPTIONS.items()
        },
        guarantee=_guarantee(runs),
        todo=_todo(runs),
        colours=drawing.COLOURS,
        notes=sorted({note for run in runs for entry in run.attacks for note in _notes(entry)}),
        tail=_tail(curves, figures.right_end(curves, attacks)),
    )
    return Report(html, shown, {name: frame for name, frame in frames.items() if len(frame)}, findings)


_DESCRIPTIONS = {
    "certified": "Certified accuracy against the l2 radius, one step curve per run; points: accuracy under attack.",
    "depth": "Lipschitz bound from the input up to each layer, on a logarithmic axis.",
    "training": "Loss, validation accuracy and Lipschitz estimate over the epochs of training.",
}


def template(name: str) -> jinja2.Template:
    """Return a template of this folder; what it is given is escaped, and what is missing is an error."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template(name)


def _breakable(text: str) -> Markup:
    """Let a browser break a module path behind each dot, and a chain of operators behind each plus."""
    return Markup(re.sub(r"([.+])(?=.)", r"\1<wbr>", str(escape(text))))


def _findings(runs: Sequence[Run], headline: pandas.DataFrame) -> list[str]:
    found = []
    for run, row in zip(runs, (row for _, row in headline.iterrows()), strict=True):
        if row["contradictions"] > 0:
            images = row["idx"].split()
            found.append(
                f"{run.label}: an attack found an adversarial example inside the certified radius of {len(images)} "
                f"image{'s' * (len(images) > 1)}, idx {', '.join(images)}."
            )
        if row["lower"] > row["upper"]:
            found.append(
                f"{run.label}: a pair of inputs attains the Lipschitz quotient {row['lower']:.17g}, above the bound "
                f"{row['upper']:.17g} that is called proved."
            )
    return found


def _notes(attack: Mapping[str, Any]) -> list[str]:
    notes = attack.get("notes")
    return [str(note) for note in notes] if isinstance(notes, list) else []


def _published(run: Run) -> dict[str, Any] | None:
    """Put the value of a published formula beside the proved bound of the same: features, or logits without a head."""
    published = run.bound.get("published")
    if not published or published["value"] is None:
        return None
    features = run.bound.get("features")
    proved = run.bound["upper"] if features is None else features
    return {
        "value": wording.significant(published["value"]),
        "proved": wording.upper(proved),
        "of": "for the logits" if features is None else "for the features before the head",
        "ratio": wording.significant(proved / published["value"], 3) if proved and published["value"] else "",
        "formula": published.get("formula") or "",
        "note": published.get("note") or "",
    }


def _guarantee(runs: Sequence[Run]) -> dict[str, str]:
    """Return the domain and the arithmetic that all runs share, else what is said instead."""
    domains = set()
    for run in (run for run in runs if not run.is_log):
        described = (run.certificate.get("input"), run.bound.get("input"), run.certificate)
        given = [entry["domain"] for entry in described if isinstance(entry, dict) and entry.get("domain")]
        domain = given[0] if given and isinstance(given[0], list) else [0, 1]
        domains.add(f"[{', '.join(f'{end:g}' if isinstance(end, (int, float)) else str(end) for end in domain)}]")
    precisions = {str(run.summary["precision"]) for run in runs if run.summary.get("precision")}
    return {
        "domain": domains.pop() if len(domains) == 1 else "the domain named below" if domains else "[0, 1]",
        "precision": precisions.pop() if len(precisions) == 1 else "mixed" if precisions else "float64",
    }


def _todo(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return, for each section, the commands that make what is missing in a run folder."""
    commands: dict[str, list[str]] = {"certify": [], "attack": [], "bound": [], "train": []}
    for run in (run for run in runs if not run.is_log):
        folder, data = shlex.quote(str(run.path)), shlex.quote(run.data_name or "NAME")
        asked = run.certificate.get("n")
        if run.rows is None or run.mark or not summary_agrees(run) or len(run.rows) != (asked or len(run.rows)):
            resume = " --resume" if run.rows is not None else ""
            commands["certify"].append(f"lipcert certify {folder} --data {data}{resume}")
        if run.attacked is None and not run.attacks:
            commands["attack"].append(f"lipcert attack {folder} --data {data} --eps 36/255")
        if not run.bound.get("layers"):
            commands["bound"].append(f"lipcert bound {folder}")
        if run.metrics is None:
            model = shlex.quote(run.model_name or "NAME")
            commands["train"].append(f"lipcert train --model {model} --data {data} -o {folder}")
    return commands


def _grouped(facts: pandas.DataFrame) -> list[tuple[str, list[tuple[str, list[str], bool]]]]:
    """Return (section, rows); a row is the fact, one text per run, and whether the runs differ in it."""
    groups = []
    for section, frame in facts.groupby("section", sort=False):
        rows = [(row[1], list(row[2:]), len(set(row[2:])) > 1) for row in frame.itertuples(index=False, name=None)]
        groups.append((str(section), rows))
    return groups


def _tail(curves: pandas.DataFrame, right: float) -> str:
    """Say which curves go on beyond the right end of the figure."""
    cut = [
        f"{label} ({wording.percent(float(frame.loc[frame['radius'] <= right, 'certified'].iloc[-1]))} %)"
        for label, frame in curves.groupby("run", sort=False)
        if frame.loc[frame["radius"] <= right, "certified"].iloc[-1] > 0
    ]
    return f"At its right end these are not yet zero: {', '.join(cut)}." if cut else ""
