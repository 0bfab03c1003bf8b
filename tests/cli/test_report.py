"""`lipcert report`: exit codes, what goes where, which files are left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report.synthetic import write_run, write_smoothing_log

from lipcert.cli import main


def lipcert(*args: object) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    return stop.value.code


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run without metrics and audit, so that there is little to draw."""
    folder = write_run(tmp_path / "a", n=120, attacked=60, blocks=1, epochs=3)
    (folder / "metrics.csv").unlink()
    (folder / "bound.json").unlink()
    return folder


def test_report_in_the_run_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lipcert("report", run) == 0
    out, err = capsys.readouterr()
    header, row = out.splitlines()
    assert header.split() == ["run", "n", "clean", "ACR", "L", "proved", "contradictions"]
    assert row.split()[:2] == ["a", "120"] and row.endswith("none in 60")
    assert f"wrote {run / 'report.html'} and 6 figures and tables beside it" in err and "next: open" in err
    assert (run / "report.html").is_file() and (run / "report_certified.png").is_file()


def test_the_first_run_folder_is_the_default_also_behind_a_log(run: Path, tmp_path: Path) -> None:
    log = write_smoothing_log(tmp_path / "logs.tsv", n=30)
    assert lipcert("report", log, run) == 0
    assert (run / "report.html").is_file()
    assert lipcert("report", log) == 0
    assert (tmp_path / "report.html").is_file()


def test_output_may_be_a_folder(run: Path, tmp_path: Path) -> None:
    assert lipcert("report", run, "-o", tmp_path / "new" / "folder") == 0
    assert (tmp_path / "new" / "folder" / "report.html").is_file()
    assert lipcert("report", run, "-o", tmp_path / "other" / "page.html") == 0
    assert (tmp_path / "other" / "page_curve.csv").is_file()


def test_json_is_the_headline(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lipcert("report", run, "--json", "-") == 0
    (record,) = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert record["run"] == "a" and record["certified@0.1412"] == summary["certified"]["0.1412"]


def test_a_contradiction_is_a_finding_and_the_page_is_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = json.loads((run / "attacks.json").read_text())
    entries[0]["contradictions"] = [3]
    (run / "attacks.json").write_text(json.dumps(entries))
    assert lipcert("report", run) == 3
    err = capsys.readouterr().err
    assert "Finding: a: an attack found an adversarial example inside the certified radius of 1 image, idx 3." in err
    assert (run / "report.html").is_file()


def test_bad_input_is_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lipcert("report") == 2
    assert lipcert("report", tmp_path / "nothing") == 2
    (run / "summary.json").write_text("{")
    capsys.readouterr()
    assert lipcert("report", run) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"Error: {run / 'summary.json'} is not a JSON file") and err.count("\n") == 1
    assert not (run / "report.html").exists()


def test_the_next_command_fills_the_gap(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "attacks.tsv").unlink()
    (run / "attacks.json").unlink()
    assert lipcert("report", run) == 0
    assert f"lipcert attack {run} --data cifar10 --eps 36/255" in capsys.readouterr().err
    for name in ("certificates.tsv", "certificate.json", "summary.json"):
        (run / name).unlink()
    assert lipcert("report", run) == 0
    assert f"then lipcert certify {run} --data cifar10" in capsys.readouterr().err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert lipcert("report", "--help") == 0
    assert "lipcert report runs/a runs/b -o comparison/report.html" in capsys.readouterr().out
