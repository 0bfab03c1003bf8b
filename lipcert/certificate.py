"""The files of a certificate: what it is about (certificate.json), one row per image (certificates.tsv), their summary.

Rows are appended in whole batches and synced, so that a run that was killed continues where it stopped and ends with
the same rows as an undisturbed one (but for the `time` column). Rows of different weights, data or bounds never mix:
what a file of rows is about is written before its first row and compared before the next one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd

from lipcert.certify import Row, frame
from lipcert.errors import InputError
from lipcert.files import append_rows, read_json, read_rows, repair_rows, write_bytes, write_json, write_text

ROWS, CERTIFICATE, SUMMARY = "certificates.tsv", "certificate.json", "summary.json"
PROGRAM = "program.safetensors"
SCENES = "scenes.tsv"  # the rows of a certificate of segmentation, which has a certificate.json too
_STATEMENTS = {
    "float64": "the network, evaluated in real arithmetic,",
    "float64 program": "the program, run in float64,",
    "float32": "the network, evaluated in float32 without TF32 or lower precision,",
}


@dataclass(frozen=True)
class Certificate:
    """What the rows of a folder are about. Two of them may share rows if `differences` finds nothing."""

    model: str
    weights_sha256: str  # of the exported network
    data: str
    split: str
    n: int  # images asked for
    precision: str  # the arithmetic that the certificate is about
    input_shape: tuple[int, ...]
    domain: tuple[float, float]
    audit: Mapping[str, Any]  # the proof of the bound, layer by layer
    arithmetic: Mapping[str, Any]  # settings and software with which the logits were computed
    lipcert: str
    program: Mapping[str, Any] = field(default_factory=dict)  # the network as a list of operators: docs/certificate.md
    proof: Mapping[str, Any] = field(default_factory=dict)  # why its bound holds, step by step
    norm: str = "l2"

    @property
    def statement(self) -> str:
        """Say in one sentence what each row promises."""
        low, high = self.domain
        return (
            f"For every row and every input x' with pixels in [{low:g}, {high:g}] whose {self.norm} distance from the "
            f"image is less than `radius`, {_STATEMENTS[self.precision]} predicts the class `predict`."
        )

    def to_json(self) -> dict[str, Any]:
        """Return what certificate.json holds."""
        return {"statement": self.statement} | {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """Say in which of the facts that decide a row a stored certificate.json differs, for humans."""
        found = differences(
            {name: getattr(self, name) for name in ("weights_sha256", "data", "split", "precision")}
            | {"domain": list(self.domain), "input_shape": list(self.input_shape)},
            stored,
        )
        ours, theirs = (_number(audit.get("upper")) for audit in (self.audit, stored.get("audit") or {}))
        if not math.isclose(ours, theirs, rel_tol=1e-9):  # proofs on another machine may differ in the last digits
            found.append(f"bound: {theirs:.6g} there, {ours:.6g} now")
        return found


def differences(wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Say for each wanted fact that it is stored otherwise; None is an unknown fact and differs from everything."""
    return [
        f"{name}: {_short(stored.get(name))} there, {_short(value)} now"
        for name, value in wanted.items()
        if value is None or stored.get(name) != value
    ]


def begin(folder: Path, certificate: Certificate, *, batch_size: int, resume: bool, tensors: bytes = b"") -> int:
    """Prepare a folder for the rows of `certificate` and return the first image whose row is missing.

    `tensors` are the bytes of program.safetensors, which the proof is about. The image returned is `certificate.n` if
    nothing is left to do. Raises InputError if the folder holds rows about something else, or unfinished ones and
    `resume` is not set.
    """
    path = folder / CERTIFICATE
    if (folder / SCENES).exists():
        raise InputError(f"{folder} holds a certificate of segmentation; choose another folder with -o")
    stored = read_json(path) if path.exists() else None
    present = read_rows(folder / ROWS, Row.columns())
    if present:
        refuse_other(folder / ROWS, path, None if stored is None else certificate.differences(stored))
    if present and len(present) >= certificate.n:
        return certificate.n
    first = keep_whole_batches(folder / ROWS, Row.columns(), len(present), certificate.n, batch_size, resume=resume)
    write_bytes(folder / PROGRAM, tensors)
    write_json(path, certificate.to_json())
    return first


def write(folder: Path, rows: Iterable[Row]) -> None:
    """Append the rows of one batch."""
    append_rows(folder / ROWS, Row.columns(), [[getattr(row, name) for name in Row.columns()] for row in rows])


def read(folder: Path) -> pd.DataFrame:
    """Return the certificates of a folder in the columns of `Row`, without rows if there is no file.

    A damaged file (a cell that is no number, an image that is missing or appears twice) raises InputError.
    """
    path = folder / ROWS
    try:
        rows = frame(
            Row(
                int(row["idx"]), int(row["label"]), int(row["predict"]), float(row["radius"]), int(row["correct"]),
                float(row["time"]), float(row["margin"]), float(row["error"]), row["image"],
            )
            for row in read_rows(path, Row.columns())
        )  # fmt: skip
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{path} is damaged: {error}") from error
    if rows["idx"].tolist() != list(range(len(rows))):
        raise InputError(f"{path} is damaged: its rows are not the images 0, 1, 2, …; move it away and certify again")
    return rows


def refuse_other(rows: Path, record: Path, found: Sequence[str] | None) -> None:
    """Raise InputError if rows that are there are about something else (`found`), or nobody knows about what (None)."""
    remedy = f"choose another folder with -o, or move {rows.name} away"
    if found is None:
        raise InputError(f"{rows} is there, but not {record.name}, which says what its rows are about; {remedy}")
    if found:
        raise InputError(f"{rows} is about something else ({'; '.join(found)}); {remedy}")


def keep_whole_batches(
    path: Path, header: Sequence[str], present: int, n: int, batch_size: int, *, resume: bool, rows_per_image: int = 1
) -> int:
    """Cut a file of rows back to whole batches and return the first image that is missing.

    Whatever follows is computed in the same batches as in an undisturbed run. Raises InputError if there are rows and
    `resume` is not set.
    """
    if present and not resume:
        done = present // rows_per_image
        raise InputError(f"{path} holds {done} of {n} images; continue with --resume, or choose another folder with -o")
    first = present // (batch_size * rows_per_image) * batch_size
    repair_rows(path, header)
    if first * rows_per_image < present:
        lines = path.read_text(encoding="utf-8").split("\n")
        write_text(path, "\n".join(lines[: 1 + first * rows_per_image]) + "\n")
    return first


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _short(value: Any) -> str:
    text = "unknown" if value is None else str(value)
    return text[:12] + "…" if len(text) == 64 else text  # hashes
