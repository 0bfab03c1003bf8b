"""The page: everything escaped, nothing fetched, what is missing named with the command that makes it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report.synthetic import EPS, write_run, write_smoothing_log
from report.test_read import update

from lipcert.errors import InputError
from lipcert.report.page import Report, build
from lipcert.report.read import read_all

VOID = {"meta", "br", "wbr", "img", "link", "input", "hr"}


class Outline(HTMLParser):
    """Checks that tags close in order; collects text, tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def outline(report: Report) -> tuple[str, Outline]:
    """Return the visible text, spaces collapsed, and the parsed page."""
    page = Outline()
    page.feed(report.html)
    page.close()
    assert page.open == []
    return " ".join(" ".join(page.text).split()), page


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of a complete run, one with fewer attacks, and a log; tests only look at it."""
    folder = tmp_path_factory.mktemp("complete")
    first = write_run(folder / "a", n=300, attacked=300, blocks=2, epochs=5)
    second = write_run(folder / "b", seed=4, n=1200, attacked=10, blocks=1, epochs=2)
    return build(read_all([first, second, write_smoothing_log(folder / "sigma_0.25.tsv", n=100)]))


def test_complete_runs(complete: Report) -> None:
    text, page = outline(complete)
    assert complete.findings == ()
    assert "none in 300 attacked" in text
    assert "the class is right and the certified radius is greater than r" in text
    assert "Work on randomized smoothing counts radius ≥ r" in text
    assert "every input within l2 distance less than R of the image, strictly, with pixels in [0, 1]" in text
    assert "in real arithmetic; margins are evaluated in float64" in text
    assert "is an empirical upper end" in text
    assert "(1 − p) · Π" in text and "do not exist in evaluation mode" in text and "1.67 times as much" in text
    assert "such radii hold with a probability that the log does not say" in text
    assert "lipcert certify" not in text and "lipcert attack" not in text and "lipcert bound" not in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 3


def test_it_fetches_nothing(complete: Report) -> None:
    html = complete.html
    for tag, attributes in outline(complete)[1].tags:
        assert tag not in ("link", "img", "iframe", "object", "base"), tag
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    addresses = set(re.findall(r"https?://[^\"' <]*", html))
    assert addresses <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }  # names of languages, not addresses
    assert "@import" not in html and not re.search(r"url\((?!#)", html)


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&"
    run = write_run(tmp_path / "a<b>&'c", n=40, attacked=40, blocks=1, epochs=2, eps=(EPS,))
    config = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(json.dumps({**config, "model": evil, evil: evil}))
    (run / "config.yaml").write_text(json.dumps({evil: evil, "data": evil}))
    bound = json.loads((run / "bound.json").read_text())
    layers = [{**layer, "name": evil, "note": evil, "method": evil, "op": evil} for layer in bound["layers"]]
    update(run / "bound.json", layers=layers, unbounded=[{"name": evil, "op": evil, "reason": evil}])
    update(run / "bound.json", published={"value": 1.0, "formula": evil, "note": evil})
    (run / "metrics.csv").unlink()
    text, page = outline(build(read_all([run])))
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert text.count(evil) > 8
    assert "a<b>&'c" in text


def test_unfinished_runs_name_the_commands(run: Path) -> None:
    for name in ("certificates.tsv", "certificate.json", "summary.json", "attacks.tsv", "attacks.json", "bound.json"):
        (run / name).unlink()
    (run / "metrics.csv").unlink()
    report = build(read_all([run]))
    text, page = outline(report)
    for command in (
        f"lipcert certify {run} --data cifar10",
        f"lipcert attack {run} --data cifar10 --eps 36/255",
        f"lipcert bound {run}",
        f"lipcert train --model lipshift_tiny --data cifar10 -o {run}",
    ):
        assert command in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 0
    assert [suffix for suffix, _ in report.beside()] == ["_headline.csv", "_facts.csv"]


def test_commands_quote_odd_folders(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my run", n=20, eps=(), blocks=1, epochs=2)
    assert f"lipcert attack '{run}' --data cifar10" in outline(build(read_all([run])))[0]


def test_interrupted_certification_is_resumed(certified: Path) -> None:
    (certified / "certificate.json").unlink()
    text, _ = outline(build(read_all([certified])))
    assert f"lipcert certify {certified} --data cifar10 --resume" in text
    assert "no certificate.json" in text and "Dashed: no certificate backs these rows" in text


def test_contradictions_are_findings(certified: Path) -> None:
    entries = json.loads((certified / "attacks.json").read_text())
    entries[0]["contradictions"] = [17, 214]
    (certified / "attacks.json").write_text(json.dumps(entries))
    report = build(read_all([certified]))
    text, page = outline(report)
    assert len(report.findings) == 1 and "2 images, idx 17, 214" in report.findings[0]
    assert report.findings[0] in text and "2: idx 17, 214" in text
    assert any("bad" in (attributes.get("class") or "").split() for tag, attributes in page.tags if tag == "td")
    assert any(attributes.get("role") == "alert" for _, attributes in page.tags)


def test_a_lower_bound_above_the_proved_one_is_a_finding(certified: Path) -> None:
    upper = json.loads((certified / "summary.json").read_text())["upper"]
    update(certified / "bound.json", lower=upper * (1 + 1e-12))
    assert "above the bound" in build(read_all([certified])).findings[0]
    update(certified / "bound.json", lower=upper)
    assert build(read_all([certified])).findings == ()


def test_files_that_disagree_are_named(certified: Path) -> None:
    update(certified / "certificate.json", weights_sha256="0" * 64)
    assert (
        "certificate.json and bound.json are not all about the same weights" in outline(build(read_all([certified])))[0]
    )


def test_only_logs(log: Path) -> None:
    text, page = outline(build(read_all([log])))
    assert "(probabilistic)" in text and "Abstained" in text
    assert "None of this is known of rows marked probabilistic" in text
    assert "real arithmetic" not in text and "lipcert " not in text and "Facts" not in text


def test_other_arithmetic_and_domain_are_said(certified: Path) -> None:
    update(certified / "summary.json", precision="float32")
    update(certified / "certificate.json", input={"shape": [3, 32, 32], "domain": [-1, 1]})
    text, _ = outline(build(read_all([certified])))
    assert "as the program computes it in float32" in text and "with pixels in [-1, 1]" in text


def test_unbounded_layers_are_listed(certified: Path) -> None:
    update(
        certified / "bound.json",
        upper="inf",
        unbounded=[{"name": "attn", "op": "aten.softmax.int", "reason": "no domain"}],
    )
    update(certified / "summary.json", upper=None)
    text, _ = outline(build(read_all([certified])))
    assert "no bound for attn ( aten.softmax.int" in text.replace("(aten", "( aten") and "∞" in text


def test_cells_sort_by_value(complete: Report) -> None:
    _, page = outline(complete)
    cells = [attributes for tag, attributes in page.tags if tag == "td" and "data-value" in attributes]
    assert {"300.0", "1200.0"} <= {cell["data-value"] for cell in cells}
    acr = float(complete.headline["acr"][0])
    assert any(cell.get("title") == f"{acr:.17g}" and float(cell["data-value"] or 0) == acr for cell in cells)
    assert sum(tag == "button" for tag, _ in page.tags) >= 30


def test_write_leaves_the_page_and_its_parts(run: Path, tmp_path: Path) -> None:
    report = build(read_all([run]))
    written = report.write(tmp_path / "new" / "folder" / "page.html")
    assert written[0].read_text() == report.html
    names = {path.name for path in written}
    assert {f"page_{name}.{end}" for name in ("certified", "depth", "training") for end in ("svg", "png")} <= names
    assert {f"page_{name}.csv" for name in ("headline", "curve", "attacks", "layers", "facts")} <= names
    assert len(names) == 12 and all(path.stat().st_size > 100 for path in written)
    assert (tmp_path / "new" / "folder" / "page_certified.png").read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(tmp_path / "new" / "folder" / "page_certified.svg")
    assert build(read_all([run])).html == report.html


def test_an_unwritable_folder_is_an_input_error(certified: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        build(read_all([certified])).write(tmp_path / "file" / "report.html")


def test_light_dark_and_print_are_styled(complete: Report) -> None:
    html = complete.html
    for colour in re.findall(r"var\((--[a-z0-9-]+)\)", html):
        assert html.count(f"{colour}:") >= 1, colour
    assert "prefers-color-scheme: dark" in html and "@media print" in html
