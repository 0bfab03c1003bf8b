"""A certificate that was changed after it had been written is rejected, and for the right reason."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from issuing import N, certify_masks, lipsformer, small
from tampering import KINDS, OF, Files, matches, pick

from lipcert.checker import Report, check


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return small(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """With sums of two values: the published block."""
    return small(tmp_path_factory.mktemp("residual"), residual="published", shift="zero")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """With attention, of masks, and with what few networks have."""
    masks = certify_masks(tmp_path_factory.mktemp("masks"))
    return {
        "enlarged": certify_masks(tmp_path_factory.mktemp("enlarged"), decoder="mlp"),
        "torus": small(tmp_path_factory.mktemp("torus"), circular=True),
        "pooled": small(tmp_path_factory.mktemp("pooled"), neck=0),
        "attention": lipsformer(tmp_path_factory.mktemp("attention")),
        "masks": masks,
        "branches": masks,
    }


def verdict(files: Files, folder: Path) -> Report:
    files.write(folder)
    return check(folder / "certificate.json", images=files.images, labels=files.labels)


def test_what_was_written_is_accepted(written: Files, residual: Files, tmp_path: Path) -> None:
    for files in (written, residual):
        assert all(float(row[3]) > 0 for row in files.rows[1:])
        report = verdict(files.copy(), tmp_path)
        assert report.accepted and report.images == N and not report.reason, report.reason
        assert report.upper <= report.claimed <= report.upper * (1 + 1e-5)
        for value, own, claimed in report.own:
            assert own <= claimed <= own * (1 + 2.5e-7), value


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "images" in OF[kind]])
def test_a_change_is_rejected_for_its_reason(kind: str, written: Files, tmp_path: Path) -> None:
    for seed in range(2):
        assert_rejected(kind, seed, written, tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "images" not in OF[kind]])  # all: benchmarks/mutations.py
def test_a_change_of_others_is_rejected(kind: str, others: dict[str, Files], tmp_path: Path) -> None:
    assert_rejected(kind, 0, others[OF[kind][0]], tmp_path)


@pytest.mark.parametrize("kind", ["stable_raised", "certified_raised", "certified_alone_raised", "all_eps_raised"])
def test_counts_of_enlarged_maps_are_rejected(kind: str, others: dict[str, Files], tmp_path: Path) -> None:
    for seed in range(3):
        assert_rejected(kind, seed, others["enlarged"], tmp_path)


def test_others_are_accepted(others: dict[str, Files], tmp_path: Path) -> None:
    for files in others.values():
        report = verdict(files.copy(), tmp_path)
        assert report.accepted and report.images == len(files.images), report.reason


def assert_rejected(kind: str, seed: int, original: Files, folder: Path) -> None:
    files = original.copy()
    expected = KINDS[kind](files, np.random.default_rng([zlib.crc32(kind.encode()), seed]))
    report = verdict(files, folder)
    assert matches(expected, report.reason), f"{report.reason or 'accepted'}; expected {expected!r}"
    assert report.accepted == (expected == "")


def test_sums_are_not_joint(residual: Files, tmp_path: Path) -> None:
    files = residual.copy()
    step = next(step for step in files.steps if len(step["sources"]) == 2)
    step["joint"] = True
    assert "counts jointly" in verdict(files, tmp_path).reason
    files = residual.copy()
    step = next(step for step in files.steps if len(step["sources"]) == 2)
    step["sources"] = step["sources"][::-1]
    assert "not its arguments in order" in verdict(files, tmp_path).reason


def test_float32_is_said_to_be_unchecked(written: Files, tmp_path: Path) -> None:
    files = written.copy()
    files.record["precision"] = "float32"
    report = verdict(files, tmp_path)
    assert report.accepted and report.images == 0 and "not rechecked" in str(report)


def test_a_certificate_is_found_where_it_lies_only(written: Files, tmp_path: Path) -> None:
    written.copy().write(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "program.safetensors").rename(elsewhere / "program.safetensors")
    with pytest.raises(FileNotFoundError):
        check(tmp_path / "certificate.json")
    assert check(tmp_path / "certificate.json", weights=elsewhere / "program.safetensors").accepted


JUNK = (None, True, -1, 0, 2, 0.5, 1e300, 10**18, "", "x", [], {}, [0, 0], {"value": "x"}, {"tensor": "head.bias"})


def test_junk_anywhere_ends_in_a_sentence(written: Files, tmp_path: Path) -> None:
    """Whatever stands at any place: a report, never another exception."""

    def places(record: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        for key, value in record.items() if isinstance(record, dict) else enumerate(record):
            yield (*path, key)
            if isinstance(value, dict | list):
                yield from places(value, (*path, key))

    rng = np.random.default_rng(0)
    known = list(places({key: written.record[key] for key in ("program", "proof", "input_shape", "domain", "n")}))
    for _ in range(200):
        files = written.copy()
        *path, last = pick(rng, known)
        record: Any = files.record
        for key in path:
            record = record[key]
        record[last] = pick(rng, list(JUNK))
        files.hashed = isinstance(files.record["program"], dict)
        report = verdict(files, tmp_path)
        assert report.accepted or report.reason
