"""`lipcert report`: one page about one or several runs, and its figures and tables as files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lipcert.cli.options import json_option, note, table, write_json
from lipcert.errors import Finding, InputError

if TYPE_CHECKING:
    from lipcert.report.read import Run

_TITLES = ("run", "n", "clean", "ACR", "L proved", "contradictions")


@click.command(
    epilog="""\b
Examples:
  lipcert report runs/digits
  lipcert report runs/a runs/b -o comparison/report.html
  lipcert report runs/a smoothing/sigma_0.25.tsv -o report.html

Beside report.html come report_certified.svg and .png (the curve), report_curve.csv, report_headline.csv and so on.
The page is also written if an attack contradicts a certificate or a lower bound exceeds a proved one; then the
exit code is 3."""
)
@click.argument("paths", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The page, or a folder for it.  [default: report.html in the first run folder]",
)
@json_option
def command(paths: tuple[Path, ...], output: Path | None, json_file: str | None) -> None:
    """Report on runs in one self-contained HTML page.

    DIR is a run folder, or a tab-separated log of another tool (or a folder that holds one) whose columns start with
    idx label predict radius correct, as randomized smoothing writes them; such rows are drawn dashed. Files are read
    and counted, nothing else: a page takes seconds and needs no model.
    """
    from lipcert.report import views
    from lipcert.report.page import build
    from lipcert.report.read import read_all
    from lipcert.report.scenes import is_scene_run

    scenes = [is_scene_run(path) for path in paths]
    if any(scenes):
        _scenes(paths, all(scenes), output, json_file)
        return
    runs = read_all(paths)
    report = build(runs)
    written = report.write(_target(output, [run.path for run in runs if not run.is_log] or [runs[0].path]))
    records = views.records(report.headline)
    if json_file:
        write_json(json_file, records)
    if json_file != "-":
        click.echo(table([_summary(record) for record in records], _TITLES))
    note(f"wrote {written[0]}" + (f" and {len(written) - 1} figures and tables beside it" if len(written) > 1 else ""))
    if report.findings:
        raise Finding(" ".join(report.findings))
    note(f"next: open {written[0]} in a browser" + _next(records, runs))


def _scenes(paths: tuple[Path, ...], pure: bool, output: Path | None, json_file: str | None) -> None:
    from lipcert.report import views
    from lipcert.report.scenes import build_scenes, read_scene_run

    if not pure:
        raise InputError("segmentation and classification do not go into one report; name folders of one kind")
    report = build_scenes([read_scene_run(path) for path in paths])
    written = report.write(_target(output, list(paths)))
    records = views.records(report.headline)
    if json_file:
        write_json(json_file, records)
    if json_file != "-":
        names = ("certified", "certified_alone", "attacked", "certified_miou", "worst_miou")
        cells = [
            (row["run"], f"{row['eps']:g}", *("-" if row[n] is None else f"{100 * row[n]:.2f} %" for n in names))
            for row in records
        ]
        click.echo(table(cells, ("run", "eps", "certified", "alone", "attacked", "certified mIoU", "worst mIoU")))
    note(f"wrote {written[0]} and {len(written) - 1} figures and tables beside it")
    if report.findings:
        raise Finding(" ".join(report.findings))
    note(f"next: open {written[0]} in a browser")


def _target(output: Path | None, folders: list[Path]) -> Path:
    if output is None:
        return (folders[0] if folders[0].is_dir() else folders[0].parent) / "report.html"
    return output if output.suffix in (".html", ".htm") and not output.is_dir() else output / "report.html"


def _summary(record: dict[str, Any]) -> tuple[str, ...]:
    from lipcert.report import wording

    found = record["contradictions"]
    return (
        record["run"] + (f" ({record['mark']})" if record["mark"] else ""),
        "-" if record["n"] is None else f"{record['n']:.0f}",
        "-" if record["clean"] is None else f"{100 * record['clean']:.2f} %",
        "-" if record["acr"] is None else f"{record['acr']:.4f}",
        "-" if record["upper"] is None else wording.upper(record["upper"]),
        "not checked" if found is None else f"{found:.0f}" if found else f"none in {record['checked']:.0f}",
    )


def _next(records: list[dict[str, Any]], runs: tuple[Run, ...]) -> str:
    """Return the command that the first run lacks certificates or an attack of, if there is one."""
    for record, run in zip(records, runs, strict=True):
        command = f"{run.path} --data {run.data_name or 'NAME'}"
        if not run.is_log and record["n"] is None:
            return f"; then lipcert certify {command}"
        if not run.is_log and record["contradictions"] is None:
            return f"; then try to refute it: lipcert attack {command} --eps 36/255"
    return ""
