"""Run folders and logs: whole ones are read, unfinished ones too, damaged ones are named to the cell."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from report.synthetic import write_run, write_smoothing_log

from lipcert.errors import InputError
from lipcert.report import tables
from lipcert.report.consistency import disagreements
from lipcert.report.read import PROBABILISTIC, UNPROVED, read, read_all


def change(path: Path, line: int, cell: int, text: str, separator: str = "\t") -> None:
    lines = path.read_text().split("\n")
    cells = lines[line - 1].split(separator)
    cells[cell] = text
    lines[line - 1] = separator.join(cells)
    path.write_text("\n".join(lines))


def update(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_a_complete_run(run: Path) -> None:
    record = read(run)
    assert (record.label, record.mark, record.model_name, record.data_name) == ("a", "", "lipshift_tiny", "cifar10")
    assert record.rows is not None and len(record.rows) == 300
    assert record.attacked is not None and len(record.attacked) == 600
    assert record.metrics is not None and record.metrics["lipschitz_upper"].isna().tolist() == [True] * 4 + [False]
    assert disagreements(record) == ()


def test_a_log_is_probabilistic_as_file_or_as_only_log_of_a_folder(log: Path) -> None:
    for path in (log, log.parent):
        record = read(path)
        assert record.mark == PROBABILISTIC and record.is_log
        assert record.rows is not None and (record.rows["predict"] == -1).any()


def test_the_rows_of_a_certified_run_stand_for_the_run(run: Path) -> None:
    assert [record.path for record in read_all([run / "certificates.tsv", run])] == [run]


def test_rows_without_their_certificate_are_marked(run: Path) -> None:
    (run / "certificate.json").unlink()
    assert read(run).mark == UNPROVED


def test_a_run_may_be_unfinished(run: Path) -> None:
    for name in ("certificates.tsv", "certificate.json", "summary.json", "attacks.tsv", "attacks.json", "bound.json"):
        (run / name).unlink()
    (run / "metrics.csv").write_text("")
    (run / "config.yaml").write_text("")
    record = read(run)
    assert record.rows is None and record.attacked is None and record.metrics is None and record.mark == ""


def test_a_torn_last_row_is_left_out(run: Path) -> None:
    path = run / "certificates.tsv"
    path.write_text(path.read_text()[:-1].rsplit("\t", 3)[0])
    record = read(run)
    assert record.rows is not None and len(record.rows) == 299


def test_windows_line_ends_and_byte_order_mark(log: Path) -> None:
    log.write_bytes(b"\xef\xbb\xbf" + log.read_bytes().replace(b"\n", b"\r\n"))
    record = read(log)
    assert record.rows is not None and len(record.rows) == 100


def test_infinities_are_strings_in_json(run: Path) -> None:
    update(run / "bound.json", upper="inf", layers=[{"name": "x", "upper": "inf", "cumulative": "inf"}])
    bound = read(run).bound
    assert bound["upper"] == math.inf and bound["layers"][0]["upper"] == math.inf


def test_bounds_above_the_largest_float_are_texts_in_json(run: Path) -> None:
    layer = {"name": "x", "upper": "1.5e+400", "cumulative": "1.5e+400"}
    update(run / "bound.json", upper="1.5e+400", features="1e+399", layers=[layer])
    record = read(run)
    assert record.bound["upper"] == math.inf
    rows = tables.layers(record)
    assert rows["upper"].tolist() == [math.inf] and rows["height"].tolist() == [pytest.approx(400 + math.log10(1.5))]
    update(run / "bound.json", upper="much")
    with pytest.raises(InputError, match="not a number"):
        read(run)


def test_the_audit_of_the_certificate_stands_in_for_bound_json(run: Path) -> None:
    audit = json.loads((run / "bound.json").read_text())
    (run / "bound.json").unlink()
    update(run / "certificate.json", audit={**audit, "upper": "inf"}, n=1000)
    record = read(run)
    assert record.bound["upper"] == math.inf and len(record.bound["layers"]) == len(audit["layers"])
    assert disagreements(record) == ("certificates.tsv has the first 300 of 1000 images (lipcert certify --resume)",)
    update(run / "certificate.json", audit=[1])
    with pytest.raises(InputError, match="certificate.json: 'audit' is not an object"):
        read(run)


def test_labels_tell_equal_names_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "seed0", n=20, eps=(), blocks=1) for name in ("small", "large")]
    log = write_smoothing_log(tmp_path / "sigma_0.25.tsv", n=20)
    assert [record.label for record in read_all(runs)] == ["small/seed0", "large/seed0"]
    assert [record.label for record in read_all([runs[0], log, runs[0]])] == ["seed0", "sigma_0.25"]


@pytest.mark.parametrize(
    ("line", "cell", "text", "column", "reason"),
    [
        (4, 3, "-0.1", "radius", "'-0.1' is not a number that is not negative"),
        (5, 3, "nan", "radius", "'nan'"),
        (6, 3, "", "radius", "''"),
        (2, 0, "1.5", "idx", "'1.5' is not a whole number"),
        (3, 2, "cat", "predict", "'cat' is not a whole number"),
        (3, 4, "2", "correct", "'2' is not 0 or 1"),
        (7, 0, "0", "idx", "appears twice"),
    ],
)
def test_damaged_certificates(run: Path, line: int, cell: int, text: str, column: str, reason: str) -> None:
    path = run / "certificates.tsv"
    change(path, line, cell, text)
    with pytest.raises(InputError) as error:
        read(run)
    for part in (str(path), f"line {line},", f"column {column!r}", reason):
        assert part in str(error.value)


def test_correct_must_be_what_it_says(run: Path) -> None:
    path = run / "certificates.tsv"
    correct = path.read_text().split("\n")[8].split("\t")[4]
    change(path, 9, 4, "1" if correct == "0" else "0")
    with pytest.raises(InputError, match="line 9, column 'correct'"):
        read(run)


def test_other_damage_to_tables(run: Path) -> None:
    for name, line, cell, text, separator, expected in [
        ("metrics.csv", 3, 4, "x", ",", "line 3, column 'train_loss': 'x' is not a number"),
        ("attacks.tsv", 2, 0, "-1", "\t", "line 2, column 'eps'"),
        ("attacks.tsv", 1, 5, "far", "\t", "line 1: column 'distance' is missing"),
        ("certificates.tsv", 1, 3, "idx", "\t", "line 1: column 'radius' is missing"),
        ("certificates.tsv", 5, 7, "0\t0", "\t", "line 5: 9 cells instead of 8"),
    ]:
        before = (run / name).read_text()
        change(run / name, line, cell, text, separator)
        with pytest.raises(InputError) as error:
            read(run)
        assert str(run / name) in str(error.value) and expected in str(error.value)
        (run / name).write_text(before)
    read(run)


def test_an_attack_cannot_succeed_beyond_eps(run: Path) -> None:
    path = run / "attacks.tsv"
    lines = path.read_text().split("\n")
    line = next(i for i, text in enumerate(lines) if text.endswith("\t1")) + 1
    change(path, line, 5, "0.9")
    with pytest.raises(InputError, match=f"line {line}, column 'distance'"):
        read(run)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("summary.json", "{", "is not a JSON file"),
        ("summary.json", "[]", "is not a JSON object"),
        ("summary.json", '{"n": "many"}', "key 'n': 'many' is not a number"),
        ("summary.json", '{"n": 1, "certified": {"far": 0.5}}', "'far', which is not a radius"),
        ("summary.json", '{"n": 1, "certified": {"0.1": null, "0.2": true}}', "key 'certified.0.2': True"),
        ("attacks.json", '{"n": 1}', "is not a JSON list"),
        ("attacks.json", '[{"n": 1}]', "is not an object with 'eps', 'n' and 'robust'"),
        ("attacks.json", '[{"n": 1, "eps": 1, "robust": 1, "contradictions": 3}]', "not a list of image numbers"),
        ("bound.json", '{"upper": 1, "layers": [{"upper": "big"}]}', "key 'layers[0].upper': 'big'"),
        ("bound.json", '{"upper": 1, "layers": 4}', "'layers' is not a list"),
        ("bound.json", '{"upper": 1, "published": 4}', "'published' is not an object"),
        ("config.yaml", "a: 1\nb: [1\nc: 2\n", "config.yaml, line 3, column 2: not YAML"),
        ("config.yaml", "- 1\n", "does not hold keys and values"),
        ("env.json", "\x00", "is not a JSON file"),
    ],
)
def test_damaged_objects(run: Path, name: str, text: str, expected: str) -> None:
    (run / name).write_text(text)
    with pytest.raises(InputError) as error:
        read(run)
    assert name in str(error.value) and expected in str(error.value)


def test_what_is_no_run(tmp_path: Path, log: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds neither a run nor a log"):
        read(tmp_path / "empty")
    write_smoothing_log(tmp_path / "sigma_0.5.tsv", n=10)
    with pytest.raises(InputError, match="several logs"):
        read(tmp_path)
    log.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not a text file"):
        read(log)
    log.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n")
    with pytest.raises(InputError, match="has no rows"):
        read(log)
    log.write_text("")
    with pytest.raises(InputError, match="is empty"):
        read(log)
    with pytest.raises(InputError, match="nothing to report"):
        read_all([])


def test_files_that_do_not_belong_together(run: Path) -> None:
    update(run / "summary.json", clean=0.99)
    update(run / "certificate.json", weights_sha256="0" * 64)
    path = run / "attacks.tsv"
    lines = path.read_text().split("\n")
    path.write_text("\n".join(["\t".join([*line.split("\t")[:2], "77", *line.split("\t")[3:]]) if i == 5 else line
                               for i, line in enumerate(lines)]))  # fmt: skip
    sentences = " ".join(disagreements(read(run)))
    assert "summary.json does not agree" in sentences
    assert "not all about the same weights" in sentences
    assert "for 1 of 300 images" in sentences
