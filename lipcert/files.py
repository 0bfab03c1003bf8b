"""Files that survive a crash: written beside themselves and renamed, or appended to in whole, synced rows."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lipcert.errors import InputError


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file completely or not at all: the bytes go to a file beside it, are synced, and renamed over it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # still there only if something went wrong
    return path


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text completely or not at all."""
    return write_bytes(path, text.encode())


def to_json(value: Any) -> str:
    """Return `value` as indented JSON that every parser reads: infinities become the string "inf", NaN becomes null.

    >>> print(to_json({"upper": float("inf")}))
    {
      "upper": "inf"
    }
    """
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `to_json(value)` and a line end, completely or not at all."""
    return write_text(path, to_json(value) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; one that is missing or not JSON raises InputError."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a JSON file: {error}") from error


def append_rows(path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Append tab-separated rows to a file, with the header first if the file is new, and sync them to disk.

    What a killed process left of a last row (no line end) is cut off before. A file whose header differs raises
    InputError. Floats are written so that reading them gives the same float.
    """
    path = Path(path)
    repair_rows(path, header)
    lines = ["\t".join(_cell(value) for value in row) for row in rows]
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        if file.tell() == 0:
            lines.insert(0, "\t".join(header))
        file.write("".join(line + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: str | os.PathLike[str], header: Sequence[str]) -> list[dict[str, str]]:
    """Return the complete rows of a file that `append_rows` wrote, as text by column; no file is no rows.

    A last row without line end (its process was killed while writing) is left out. Another header, or a row with
    another number of cells, raises InputError.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    if not lines:
        return []
    _check_header(path, lines[0], header)
    rows = [line.split("\t") for line in lines[1:]]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise InputError(f"{path}, line {number}: {len(row)} cells instead of {len(header)}; the file is damaged")
    return [dict(zip(header, row, strict=True)) for row in rows]


def repair_rows(path: str | os.PathLike[str], header: Sequence[str]) -> None:
    """Cut off a torn last row, if there is one; a file with another header raises InputError."""
    path = Path(path)
    if not path.exists():
        return
    with open(path, "rb+") as file:
        first = file.readline()
        if first.endswith(b"\n"):
            _check_header(path, first[:-1].decode(), header)
        end = file.seek(0, os.SEEK_END)
        while end > 0:  # back to behind the last line end, usually at once
            start = max(0, end - 4096)
            file.seek(start)
            cut = file.read(end - start).rfind(b"\n") + 1
            end = start + cut
            if cut:
                break
        file.truncate(end)


def require_writable(folder: str | os.PathLike[str]) -> Path:
    """Make `folder` if needed and prove by a trial file that it can be written; otherwise raise InputError."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable."):
            pass
    except OSError as error:
        raise InputError(f"cannot write to the folder {folder}: {error.strerror or error}; name another one") from error
    return folder


def _check_header(path: Path, line: str, header: Sequence[str]) -> None:
    if line != "\t".join(header):
        raise InputError(
            f"{path} has the columns {', '.join(line.split())} instead of {', '.join(header)}; move it away first"
        )


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    text = repr(float(value)) if isinstance(value, float) else str(value)
    if "\t" in text or "\n" in text:
        raise ValueError(f"a cell cannot hold a tab or a line end: {text!r}")
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
