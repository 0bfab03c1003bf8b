"""What is on disk: rows that come back unchanged, resuming at whole batches, and refusing to mix different proofs."""

import dataclasses

import pandas as pd
import pytest

from lipcert.certificate import CERTIFICATE, ROWS, Certificate, begin, differences, read, write
from lipcert.certify import Row
from lipcert.errors import InputError
from lipcert.files import read_json

CERTIFIED = Certificate(
    model="lipshift_tiny",
    weights_sha256="a" * 64,
    data="digits",
    split="test",
    n=10,
    precision="float64",
    input_shape=(1, 8, 8),
    domain=(0.0, 1.0),
    audit={"upper": 2.5},
    arithmetic={"tf32": False},
    lipcert="0.1.0",
)


def rows(first, last):
    return [Row(i, 1, i % 2, 0.1 / (i + 1), i % 2, 1e-5, 1.5 + i, 2e-13, "c" * 64) for i in range(first, last)]


def other(**changes):
    return dataclasses.replace(CERTIFIED, **changes)


def test_rows_come_back_bit_for_bit(tmp_path):
    assert begin(tmp_path, CERTIFIED, batch_size=4, resume=False) == 0
    write(tmp_path, rows(0, 4))
    write(tmp_path, rows(4, 10))
    table = read(tmp_path)
    expected = pd.DataFrame([dataclasses.asdict(row) for row in rows(0, 10)])
    pd.testing.assert_frame_equal(table, expected, check_exact=True)
    header, first = (tmp_path / ROWS).read_text().splitlines()[:2]
    assert header == "idx\tlabel\tpredict\tradius\tcorrect\ttime\tmargin\terror\timage"
    assert first == "0\t1\t0\t0.1\t0\t1e-05\t1.5\t2e-13\t" + "c" * 64


def test_certificate_says_what_it_promises(tmp_path):
    begin(tmp_path, CERTIFIED, batch_size=4, resume=False)
    stored = read_json(tmp_path / CERTIFICATE)
    assert stored["weights_sha256"] == "a" * 64 and stored["domain"] == [0.0, 1.0] and stored["audit"] == {"upper": 2.5}
    assert "less than `radius`" in stored["statement"] and "real arithmetic" in stored["statement"]
    assert "float32" in other(precision="float32").statement
    assert not CERTIFIED.differences(stored)


@pytest.mark.parametrize("present", range(11))
def test_a_stopped_run_continues_at_whole_batches(tmp_path, present):
    begin(tmp_path, CERTIFIED, batch_size=4, resume=False)
    write(tmp_path, rows(0, present))
    with open(tmp_path / ROWS, "a") as file:
        file.write("7\t1\t0.3")  # torn by the kill
    first = begin(tmp_path, CERTIFIED, batch_size=4, resume=True)
    assert first == (10 if present == 10 else present // 4 * 4)
    if first < 10:
        assert len(read(tmp_path)) == first
    write(tmp_path, rows(first, 10))
    assert read(tmp_path)["margin"].tolist() == [row.margin for row in rows(0, 10)]


def test_more_images_extend_and_fewer_reuse(tmp_path):
    begin(tmp_path, CERTIFIED, batch_size=4, resume=False)
    write(tmp_path, rows(0, 10))
    assert begin(tmp_path, CERTIFIED, batch_size=4, resume=False) == 10  # finished: nothing to resume
    assert begin(tmp_path, other(n=6), batch_size=4, resume=False) == 6
    assert len(read(tmp_path)) == 10
    with pytest.raises(InputError, match="10 of 20 images; continue with --resume"):
        begin(tmp_path, other(n=20), batch_size=4, resume=False)
    assert begin(tmp_path, other(n=20), batch_size=4, resume=True) == 8
    assert read_json(tmp_path / CERTIFICATE)["n"] == 20


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"weights_sha256": "b" * 64}, "weights_sha256: aaaaaaaaaaaa… there, bbbbbbbbbbbb… now"),
        ({"data": "mnist"}, "data: digits there, mnist now"),
        ({"split": "val"}, "split"),
        ({"precision": "float32"}, "precision"),
        ({"domain": (0.0, 2.0)}, "domain"),
        ({"audit": {"upper": 2.6}}, "bound: 2.5 there, 2.6 now"),
        ({"audit": {"upper": "inf"}}, "bound: 2.5 there, inf now"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_rows_about_something_else_are_never_continued_or_overwritten(tmp_path, changes, match, resume):
    begin(tmp_path, CERTIFIED, batch_size=4, resume=False)
    assert begin(tmp_path, other(**changes), batch_size=4, resume=False) == 0  # no rows yet: nothing to lose
    begin(tmp_path, CERTIFIED, batch_size=4, resume=False)
    write(tmp_path, rows(0, 10))
    before = (tmp_path / ROWS).read_bytes(), (tmp_path / CERTIFICATE).read_bytes()
    with pytest.raises(InputError, match=match) as error:
        begin(tmp_path, other(**changes), batch_size=4, resume=resume)
    assert "-o" in str(error.value)
    assert before == ((tmp_path / ROWS).read_bytes(), (tmp_path / CERTIFICATE).read_bytes())


def test_what_does_not_decide_a_row_may_change(tmp_path):
    same = other(
        model="other name", arithmetic={"tf32": False, "threads": 3}, lipcert="9", audit={"upper": 2.5 * (1 + 1e-14)}
    )
    begin(tmp_path, CERTIFIED, batch_size=4, resume=False)
    write(tmp_path, rows(0, 4))
    assert begin(tmp_path, same, batch_size=4, resume=True) == 4


def test_rows_without_a_certificate_and_damaged_rows_are_refused(tmp_path):
    begin(tmp_path, CERTIFIED, batch_size=4, resume=False)
    write(tmp_path, rows(0, 4))
    (tmp_path / CERTIFICATE).unlink()
    with pytest.raises(InputError, match="but not certificate.json"):
        begin(tmp_path, CERTIFIED, batch_size=4, resume=True)
    write(tmp_path, rows(5, 6))
    with pytest.raises(InputError, match="not the images 0, 1, 2"):
        read(tmp_path)
    (tmp_path / ROWS).write_text((tmp_path / ROWS).read_text().replace("0.1", "x"))
    with pytest.raises(InputError, match="damaged"):
        read(tmp_path)
    assert len(read(tmp_path / "nothing")) == 0


def test_an_unknown_fact_differs_from_everything():
    assert differences({"weights_sha256": None}, {"weights_sha256": None}) == [
        "weights_sha256: unknown there, unknown now"
    ]
    assert differences({"radii": [0.5]}, {"radii": [0.5], "more": 1}) == []


def test_certificates_of_another_task_are_not_overwritten(tmp_path):
    (tmp_path / "scenes.tsv").write_text("idx\n")
    (tmp_path / CERTIFICATE).write_text("{}")
    with pytest.raises(InputError, match="a certificate of segmentation"):
        begin(tmp_path, CERTIFIED, batch_size=4, resume=False)
    assert (tmp_path / CERTIFICATE).read_text() == "{}"
