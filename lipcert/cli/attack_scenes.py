"""`lipcert attack` where every pixel has a label: an ensemble against all pixels of an image, and against certificates.

What is compared: an attack that moved an image by at most eps may not leave fewer positions right than `certified` at
eps, nor change more than `stable` allows; and the worst choice of attacks for a data set may not bring its mean
intersection over union below the certified one.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lipcert
from lipcert.certificate import CERTIFICATE, SUMMARY
from lipcert.certificate import SCENES as CERTIFIED
from lipcert.cli.options import note, table, write_json
from lipcert.cli.scenes import SceneSubject, load_scene_subject
from lipcert.cli.subject import progress
from lipcert.errors import Finding, InputError
from lipcert.files import append_rows, read_json, read_rows
from lipcert.files import write_json as write_file

if TYPE_CHECKING:
    from lipcert.attacks.segmentation import SceneAttacked

ROWS, RECORD = "scene_attacks.tsv", "scene_attacks.json"
COLUMNS = ("eps", "idx", "attack", "distance", "pixels", "valid", "correct", "changed")
BATCH = 16  # images: as large as fits a small machine


def attack_scenes(
    *,
    eps: tuple[float, ...],
    attacks: str | None,
    steps: int,
    resume: bool,
    batch_size: int,
    json_file: str | None,
    **options: Any,
) -> None:
    """Attack MODEL with the ensemble for segmentation; a refuted certificate is a finding (exit code 3)."""
    from lipcert.attacks.segmentation import ATTACKS, SceneEnsemble

    if resume:
        raise InputError("attacks on segmentation are computed in one go; leave out --resume")
    chosen = ATTACKS if attacks is None else tuple(attacks.replace(" ", "").split(","))
    try:
        ensemble = SceneEnsemble(attacks=chosen, steps=steps, seed=options["seed"])
    except ValueError as error:
        raise InputError(str(error)) from error
    subject = load_scene_subject(**options)
    for name in (ROWS, RECORD):
        if (subject.folder / name).exists():
            raise InputError(f"{subject.folder / name} is there; choose another folder with -o, or move it away")
    stored = _certificate(subject)
    begun = time.perf_counter()
    entries, refuted = [], []
    with progress(0, len(subject.scenes) * len(eps), "attacking") as advance:
        for radius in eps:
            rows = _attack(subject, radius, ensemble, min(batch_size, BATCH), advance)
            entry = summarise(rows, radius) | {"attacks": list(ensemble.attacks), "steps": steps, "seed": ensemble.seed}
            entry |= _compare(subject.folder, rows, radius, entry["worst_miou"], stored)
            refuted += entry["contradictions"] + (["mIoU"] if entry["miou_refuted"] else [])
            entries.append(entry | {"data": subject.scenes.name, "split": subject.scenes.split})
    seconds = time.perf_counter() - begun
    entries = [entry | {"seconds": seconds, "lipcert": lipcert.__version__} for entry in entries]
    write_file(subject.folder / RECORD, entries)
    if json_file is not None:
        write_json(json_file, entries)
    if json_file != "-":
        click.echo(_text(subject, entries))
    note(f"wrote {ROWS} and {RECORD} to {subject.folder} ({seconds:.1f} s)")
    if refuted:
        images = ", ".join(map(str, dict.fromkeys(refuted)))
        what = f"attacks left less than the certificates say of: {images}; please report this"
        raise Finding(click.style(what, fg="red"))
    note(f"next: lipcert report {subject.folder} -o report.html")


def summarise(rows: Sequence[SceneAttacked], eps: float) -> dict[str, Any]:
    """Return accuracies and mean intersection over union, clean and under the worst of the attacks."""
    from lipcert.attacks.segmentation import worst_accuracy, worst_miou

    clean = [row for row in rows if row.attack == "clean"]
    accuracy, per_image = worst_accuracy(clean)
    attacked, attacked_per_image = worst_accuracy(rows)
    return {
        "task": "segmentation",
        "eps": eps,
        "n": len(clean),
        "accuracy": accuracy,
        "accuracy_per_image": per_image,
        "attacked": attacked,
        "attacked_per_image": attacked_per_image,
        "miou": worst_miou(clean),
        "worst_miou": worst_miou(rows),
    }


def contradictions(rows: Sequence[SceneAttacked], certified: Sequence[dict[str, Any]]) -> list[int]:
    """Return the images for which an attack left less than is certified at the least radius that it kept within.

    `certified` are rows of scenes.tsv. Raises InputError if the two disagree on the labelled pixels of an image.
    """
    from lipcert.attacks.segmentation import SceneAttacked as Attacked

    clean: dict[int, Attacked] = {row.idx: row for row in rows if row.attack == "clean"}
    found = set()
    for row in rows:
        reached = [entry for entry in certified if entry["idx"] == row.idx and row.distance <= entry["eps"]]
        for entry in sorted(reached, key=lambda entry: entry["eps"])[:1]:
            if entry["valid"] != row.valid:
                raise InputError(f"certificates and attacks have different labels for image {row.idx}; use equal data")
            same = int((row.predict == clean[row.idx].predict).sum())
            if row.correct < entry["certified"] or same < entry["stable"]:
                found.add(row.idx)
    return sorted(found)


def read_scenes(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of scenes.tsv; a damaged cell raises InputError."""
    from dataclasses import fields

    from lipcert.segment import SceneRow

    names = [field.name for field in fields(SceneRow)]
    try:
        return [
            {name: float(cell) if name == "eps" else int(cell) for name, cell in row.items()}
            for row in read_rows(folder / CERTIFIED, names)
        ]
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{CERTIFIED} is damaged: {error}") from error


def _attack(subject: SceneSubject, eps: float, ensemble: Any, batch_size: int, advance: Any) -> list[SceneAttacked]:
    """Attack all images within one radius, and append a row for each image and attack."""
    from lipcert.attacks.segmentation import attack_scenes as run
    from lipcert.cli.attack import numbered
    from lipcert.data import scene_loader

    batches = scene_loader(subject.scenes, batch_size, mask_stride=subject.stride)
    rows: list[SceneAttacked] = []
    attacked = copy.deepcopy(subject.network).float()
    try:
        for batch in run(attacked, subject.network, numbered(batches, 0), eps, ensemble):
            before = {row.idx: row.predict for row in batch if row.attack == "clean"}
            append_rows(
                subject.folder / ROWS,
                COLUMNS,
                [
                    (row.eps, row.idx, row.attack, row.distance, row.predict.numel(), row.valid, row.correct,
                     int((row.predict != before[row.idx]).sum()))
                    for row in batch
                ],
            )  # fmt: skip
            rows += batch
            advance(len(before))
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(str(error)) from error
    return rows


def _certificate(subject: SceneSubject) -> dict[str, Any] | None:
    """Return what the certificates in the folder are about, if these weights and images."""
    from lipcert.bounds.core import BoundError
    from lipcert.bounds.tracing import trace
    from lipcert.certificate import differences

    path = subject.folder / CERTIFICATE
    if not path.exists() or not (subject.folder / CERTIFIED).exists():
        note("there are no certificates in this folder to compare with (lipcert certify writes them)")
        return None
    try:
        weights = trace(subject.network, subject.shape).weights_sha256()
    except BoundError as error:
        note(f"the model cannot be traced ({error}), so that certificates are not compared")
        return None
    stored: dict[str, Any] = read_json(path)
    facts = {"weights_sha256": weights, "data": subject.scenes.name, "split": subject.scenes.split}
    found = differences(facts | {"input_shape": list(subject.shape), "stride": subject.stride}, stored)
    if found:
        note(f"the certificates in this folder are not compared: {'; '.join(found)}")
        return None
    return stored


def _compare(
    folder: Path, rows: Sequence[SceneAttacked], eps: float, worst_miou: float, stored: dict[str, Any] | None
) -> dict[str, Any]:
    """Return which images are refuted, and whether the certified mean intersection over union is."""
    from lipcert.certify import radius_keys

    if stored is None or max(stored["eps"]) < eps:
        return {"compared": False, "contradictions": [], "miou_refuted": False}
    found = contradictions(rows, read_scenes(folder))
    summary = read_json(folder / SUMMARY) if (folder / SUMMARY).exists() else {}
    n = len({row.idx for row in rows})
    shares = summary.get("certified_miou", {})
    larger = [
        share
        for radius, key in radius_keys(stored["eps"]).items()
        if radius >= eps and (share := shares.get(key)) is not None
    ]
    same = summary.get("n") == n and bool(larger)
    return {
        "compared": True,
        "contradictions": found,
        "miou_refuted": same and worst_miou < larger[0] * (1 - 1e-9),  # sums of floats against a fraction
    }


def _text(subject: SceneSubject, entries: Sequence[dict[str, Any]]) -> str:
    header = ("l2 eps", "accuracy", "attacked", "mIoU", "worst mIoU", "contradictions")
    rows = [
        (
            f"{entry['eps']:.4f}",
            *(f"{100 * entry[name]:.2f} %" for name in ("accuracy", "attacked", "miou", "worst_miou")),
            str(len(entry["contradictions"]) + entry["miou_refuted"]) if entry["compared"] else "not compared",
        )
        for entry in entries
    ]
    what = f"{subject.name} on {entries[0]['n']} images of {subject.scenes.name} {subject.scenes.split}"
    return f"{what}, {', '.join(entries[0]['attacks'])}\n\n{table(rows, header)}"
