from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipcert import files
from lipcert.errors import InputError

HEADER = ("idx", "radius")


def test_write_replaces_the_whole_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "a long first version")
    files.write_text(path, "zwei: ü")
    assert path.read_text(encoding="utf-8") == "zwei: ü"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.write_text(tmp_path / "a.txt", "old")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_keeps_every_float_and_names_infinities(tmp_path: Path) -> None:
    path = files.write_json(tmp_path / "a.json", {"a": [1 / 3, math.inf, -math.inf, math.nan], "b": ("x",)})
    assert files.read_json(path) == {"a": [1 / 3, "inf", "-inf", None], "b": ["x"]}


def test_read_json_names_the_file_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"a": ')
    for name, reason in (("broken.json", "is not a JSON file"), ("none.json", "No such file")):
        with pytest.raises(InputError, match=reason) as caught:
            files.read_json(tmp_path / name)
        assert name in str(caught.value)


def test_rows_are_appended_under_one_header(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    files.append_rows(path, HEADER, [(0, 0.1)])
    files.append_rows(path, HEADER, [(1, True), (2, "x")])
    assert path.read_text() == "idx\tradius\n0\t0.1\n1\t1\n2\tx\n"
    assert files.read_rows(path, HEADER)[1] == {"idx": "1", "radius": "1"}


@given(st.lists(st.floats(allow_nan=False), max_size=5))
def test_floats_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    path = tmp_path_factory.mktemp("floats") / "rows.tsv"
    files.append_rows(path, HEADER, list(enumerate(values)))
    assert [float(row["radius"]) for row in files.read_rows(path, HEADER)] == values


@given(st.integers(0, 200))
def test_a_file_cut_anywhere_loses_only_the_torn_row(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "rows.tsv"
    files.append_rows(path, HEADER, [(i, i / 7) for i in range(9)])
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    kept = max(0, whole[:cut].count(b"\n") - 1)
    assert [row["idx"] for row in files.read_rows(path, HEADER)] == [str(i) for i in range(kept)]
    files.append_rows(path, HEADER, [(i, i / 7) for i in range(kept, 9)])
    assert path.read_bytes() == whole


def test_a_torn_row_longer_than_a_block_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("idx\tradius\n0\t1\n1\t" + "9" * 10000)
    files.repair_rows(path, HEADER)
    assert path.read_text() == "idx\tradius\n0\t1\n"


def test_a_killed_writer_leaves_rows_that_can_be_continued(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    program = (
        "import sys; from lipcert.files import append_rows\n"
        "for i in range(10**6): append_rows(sys.argv[1], ('idx', 'radius'), [(i, i / 7)] * 50)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=Path(__file__).parents[1]) as writer:
        while not (path.exists() and path.stat().st_size > 20_000):
            time.sleep(0.01)
            assert writer.poll() is None
        writer.send_signal(signal.SIGKILL)
    rows = files.read_rows(path, HEADER)
    assert len(rows) > 100 and all(float(row["radius"]) == int(row["idx"]) / 7 for row in rows)
    files.append_rows(path, HEADER, [(-1, 0.0)])
    assert [row["idx"] for row in files.read_rows(path, HEADER)] == [*(row["idx"] for row in rows), "-1"]


def test_another_header_is_refused_and_the_file_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    files.append_rows(path, ("a", "b"), [(1, 2)])
    before = path.read_bytes()
    for call in (lambda: files.append_rows(path, HEADER, [(1, 2)]), lambda: files.read_rows(path, HEADER)):
        with pytest.raises(InputError, match="has the columns a, b instead of idx, radius"):
            call()
    assert path.read_bytes() == before


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("idx\tradius\n0\t1\n7\n")
    with pytest.raises(InputError, match=r"line 3: 1 cells instead of 2"):
        files.read_rows(path, HEADER)


def test_cells_cannot_break_the_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot hold a tab"):
        files.append_rows(tmp_path / "rows.tsv", HEADER, [(1, "a\tb")])
    assert not (tmp_path / "rows.tsv").exists()


def test_require_writable_makes_the_folder_or_says_why_not(tmp_path: Path) -> None:
    assert files.require_writable(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to the folder .*file/sub.*; name another one"):
        files.require_writable(tmp_path / "file" / "sub")


def test_to_json_is_json_for_other_readers() -> None:
    assert json.loads(files.to_json({1: 0.1, "µ": None})) == {"1": 0.1, "µ": None}
