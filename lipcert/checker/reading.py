"""Files that may be hostile: nothing in them is run or followed, and sizes, depths and types are limited."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

Array = NDArray[Any]

JSON_BYTES, JSON_DEPTH, TENSOR_BYTES, TEXT_BYTES = 64 << 20, 64, 4 << 30, 1 << 30
ENTRIES = 1 << 26  # of one array that is formed


class Rejected(Exception):
    """Something of a certificate does not hold, or cannot be confirmed: one sentence that says what and where."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Rejected(what)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; refuse huge and deep ones, keys that appear twice, and numbers that are not."""
    text = _bytes(path, JSON_BYTES)
    depth = 0
    for token in re.finditer(rb'"(?:\\.|[^"\\])*"|[\[{\]}]', text):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token.group(), 0)
        require(depth <= JSON_DEPTH, f"{path.name} is nested deeper than {JSON_DEPTH}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record: dict[str, Any] = {}
        for key, value in pairs:
            require(key not in record, f"{path.name}: the key {key!r} appears twice")
            record[key] = value
        return record

    def number(digits: str) -> float:
        require(math.isfinite(float(digits)), f"{path.name}: {digits[:40]} is not a finite number")
        return float(digits)

    def integer(digits: str) -> int:
        require(len(digits) <= 20, f"{path.name}: the number {digits[:20]}… is too long")
        return int(digits)

    try:
        return json.loads(
            text.decode(), object_pairs_hook=once, parse_float=number, parse_int=integer, parse_constant=number
        )
    except ValueError as error:
        raise Rejected(f"{path.name} is not JSON: {error}") from error


def read_tensors(path: Path, sha256: str) -> dict[str, Array]:
    """Return the tensors of a safetensors file with this hash, which must be float64 or int64 and finite."""
    data = _bytes(path, TENSOR_BYTES)
    require(hashlib.sha256(data).hexdigest() == sha256, f"{path.name} has another SHA-256 than program.sha256")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise Rejected(f"{path.name} is not a safetensors file: {error}") from error
    for name, tensor in tensors.items():
        known = tensor.dtype in (np.float64, np.int64)
        require(known, f"{path.name}: tensor {name!r} is {tensor.dtype}, not float64 or int64")
        require(bool(np.isfinite(tensor).all()), f"{path.name}: tensor {name!r} has entries that are not finite")
    return tensors


def read_table(path: Path, columns: Mapping[str, Callable[[str], Any]], count: int) -> list[Any]:
    """Return the rows of a tab-separated file with these columns, as records."""
    header, *lines = _bytes(path, TEXT_BYTES).decode("utf-8", "replace").split("\n")
    intact = header == "\t".join(columns) and lines[-1:] == [""]
    require(intact, f"{path.name}: the header or the last line is damaged")
    whole = len(lines) - 1 == count
    require(whole, f"{path.name}: there are {len(lines) - 1} rows, not {count} as certificate.json says")
    rows = []
    for i, line in enumerate(lines[:-1]):
        try:
            cells = zip(columns.items(), line.split("\t"), strict=True)
            rows.append(SimpleNamespace(**{name: kind(cell) for (name, kind), cell in cells}))
        except ValueError as error:
            raise Rejected(f"row {i}: malformed ({error})") from error
    return rows


def _bytes(path: Path, most: int) -> bytes:
    require(path.stat().st_size <= most, f"{path.name} is larger than {most} bytes")
    return path.read_bytes()


def take(record: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return record[key] if it is of this kind (a bool is no number)."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Rejected(f"{where}: {key!r} is missing or malformed")
    return value


def number_of(record: Any, key: str, where: str) -> float:
    value = take(record, key, (int, float), where)
    require(0 <= value < math.inf, f"{where}: {key} {value!r} is not a finite number from 0")
    return float(value)


def only(record: Any, keys: Sequence[str], where: str) -> None:
    """Refuse keys that this checker does not know: they might change what is meant."""
    require(isinstance(record, dict), f"{where}: it is no record")
    for unknown in sorted(set(record) - set(keys)):
        raise Rejected(f"{where}: unknown key {unknown!r}")


def sha256_of(array: Array, kind: str) -> str:
    """Return the SHA-256 of an array as little-endian numbers in order."""
    return hashlib.sha256(np.ascontiguousarray(array, dtype=kind).tobytes()).hexdigest()
