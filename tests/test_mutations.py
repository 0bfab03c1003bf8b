"""A certificate that was changed after it had been written is rejected, and for the right reason."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tampering import KINDS, Files, matches, pick

from lipcert import checker, data
from lipcert.bounds import audit
from lipcert.certificate import Certificate, begin, write
from lipcert.certify import rows_of_batches
from lipcert.export import export
from lipcert.models.shiftvit import lipshift
from lipcert.proof import Proof

N = 6


def certify(model: torch.nn.Module, images: torch.Tensor, folder: Path) -> None:
    """Write a certificate of a network for images, with predictions as labels."""
    found = audit(export(model), tuple(images.shape[1:]))
    proof = Proof.of(found)
    facts = dict(model="small", data="digits", split="test", n=len(images), precision="float64", lipcert="0")
    certificate = Certificate(
        **facts, weights_sha256=found.weights_sha256, input_shape=found.input_shape, domain=found.domain,
        audit=found.to_json(), arithmetic={}, **proof.to_json(),
    )  # fmt: skip
    begin(folder, certificate, batch_size=len(images), resume=False, tensors=proof.file)
    labels = torch.zeros(len(images), dtype=torch.int64)
    for rows in rows_of_batches(found, [(images, labels)], pairwise=proof.pairwise):
        write(folder, rows)


def small(folder: Path, **options: Any) -> Files:
    torch.manual_seed(0)
    sizes = dict(num_classes=3, img_size=8, in_chans=1, embed_dim=12, depths=(2, 1), patch_size=2, neck=16)
    model = lipshift(**{**sizes, **options})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        if name == "head.raw":  # rows with much in common, which the pairs of classes do not pay for
            parameter.data.add_(0.5)
    images = data.load("digits", split="test").first(N)
    batch, _ = next(iter(data.loader(images, N)))
    certify(model.eval(), batch, folder)
    return Files.read(folder, batch.double().numpy())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return small(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """With sums of two values: the published block."""
    return small(tmp_path_factory.mktemp("residual"), residual="published", shift="zero")


def verdict(files: Files, folder: Path) -> checker.Report:
    files.write(folder)
    return checker.check(folder / "certificate.json", images=files.images)


def test_what_was_written_is_accepted(written: Files, residual: Files, tmp_path: Path) -> None:
    for files in (written, residual):
        assert all(float(row[3]) > 0 for row in files.rows[1:])
        report = verdict(files.copy(), tmp_path)
        assert report.accepted and report.images == N and not report.reason, report.reason
        assert report.upper <= report.claimed <= report.upper * (1 + 1e-5)
        for value, own, claimed in report.own:
            assert own <= claimed <= own * (1 + 2.5e-7), value


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_rejected_for_its_reason(kind: str, written: Files, tmp_path: Path) -> None:
    for seed in range(2):
        files = written.copy()
        rng = np.random.default_rng([zlib.crc32(kind.encode()), seed])
        expected = KINDS[kind](files, rng)
        report = verdict(files, tmp_path)
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
        checker.check(tmp_path / "certificate.json")
    assert checker.check(tmp_path / "certificate.json", weights=elsewhere / "program.safetensors").accepted


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
