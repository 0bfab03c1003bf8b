"""`lipcert certify` where every pixel has a label: what no perturbation of an image can change in its map."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click
import numpy as np

import lipcert
from lipcert.certificate import CERTIFICATE, PROGRAM, SUMMARY
from lipcert.certificate import SCENES as ROWS
from lipcert.cli.options import note, table, write_json
from lipcert.cli.scenes import BATCH, SceneSubject, load_scene_subject
from lipcert.cli.subject import progress
from lipcert.errors import InputError
from lipcert.files import append_rows, write_bytes
from lipcert.files import write_json as write_file

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from lipcert.bounds.audit import Audit
    from lipcert.segment import Constants

MAPS = "maps.safetensors"
RADII = (0.1, 0.25, 0.5, 1.0)
SHOWN = 8  # images whose maps are kept for figures
_STATEMENT = (
    "For every row and every input x' with pixels in [{low:g}, {high:g}] whose l2 distance from the image is at most "
    "`eps`, the network, evaluated in {arithmetic}, gives at least `stable` of the positions the class that it gives "
    "them at the image, and at least `certified` of the labelled positions their label."
)
_ARITHMETIC = {
    "float64": "real arithmetic",
    "float64 program": "float64",
    "float32": "float32 without TF32 or lower precision",
}


def certify_scenes(
    *,
    radii: tuple[float, ...] | None,
    deployed: str | None,
    resume: bool,
    batch_size: int,
    json_file: str | None,
    **options: Any,
) -> None:
    """Certify MODEL on the images of a segmentation set and write rows, certificate, summary and maps.

    A folder that holds such rows, or certificates of another kind, raises InputError: nothing is continued, because
    the intersection over union is a matter of all images together.
    """
    from lipcert.bounds.audit import audit
    from lipcert.proof import Proof
    from lipcert.segment import SceneRow, constants

    if resume:
        raise InputError("certificates of segmentation are computed in one go; leave out --resume")
    subject = load_scene_subject(**options)
    for name in (ROWS, CERTIFICATE):
        if (subject.folder / name).exists():
            raise InputError(f"{subject.folder / name} is there; choose another folder with -o, or move it away")
    eps, precision = tuple(sorted(set(radii or RADII))), deployed or "float64"
    begun = time.perf_counter()
    found = audit(subject.network, subject.shape)
    proof = Proof.of(found)
    used = constants(proof.audit)
    rows, maps, hashes = _certify(subject, found, used, eps, precision, min(batch_size, BATCH))
    summary = summarise(rows.attrs["summary"], eps) | {
        "upper": found.upper.value,
        "position": None if found.position is None else found.position.value,
        "precision": precision,
        "seconds": time.perf_counter() - begun,
    }
    names = [field.name for field in fields(SceneRow)]
    facts = _facts(subject, found, used, eps, precision)
    write_bytes(subject.folder / PROGRAM, proof.file)
    write_file(subject.folder / CERTIFICATE, {**facts, "scenes": hashes, **proof.to_json()})
    append_rows(subject.folder / ROWS, names, rows[names].itertuples(index=False, name=None))
    write_bytes(subject.folder / MAPS, maps)
    write_file(subject.folder / SUMMARY, summary)
    if json_file is not None:
        write_json(json_file, summary)
    if json_file != "-":
        click.echo(_text(subject, summary, used))
    written = f"{ROWS}, {CERTIFICATE}, {PROGRAM}, {SUMMARY} and {MAPS}"
    note(f"wrote {written} to {subject.folder} ({summary['seconds']:.1f} s)")
    note(f"next: lipcert attack {options['model']} --eps {eps[0]:g} tries to break them")


def summarise(found: dict[float, dict[str, Any]], eps: Sequence[float]) -> dict[str, Any]:
    """Return summary.json from the summaries of `lipcert.segment`: certified numbers by radius."""
    from lipcert.certify import radius_keys

    keys = radius_keys(eps)
    first = found[eps[0]]

    def by_radius(name: str) -> dict[str, Any]:
        return {keys[radius]: found[radius][name] for radius in eps}

    return {
        "task": "segmentation",
        "n": first["n"],
        "accuracy": first["accuracy"],
        "accuracy_per_image": first["accuracy_per_image"],
        "miou": None if first["miou"] is None else first["miou"][0],
        "certified": by_radius("certified"),
        "certified_per_image": by_radius("certified_per_image"),
        "certified_alone": by_radius("certified_alone"),
        "certified_miou": {keys[radius]: (found[radius]["miou"] or (None, None))[1] for radius in eps},
        "stable": by_radius("stable"),
        "iou": {
            name: None
            if pair is None
            else {"clean": pair[0], "certified": {keys[radius]: found[radius]["iou"][name][1] for radius in eps}}
            for name, pair in first["iou"].items()
        },
    }


def _certify(
    subject: SceneSubject, audit: Audit, used: Constants, eps: Sequence[float], precision: str, batch_size: int
) -> tuple[pd.DataFrame, bytes, list[tuple[str, str]]]:
    """Return the rows, the maps of the first images as the bytes of a safetensors file, and SHA-256 of all images.

    These are pairs: of the image, and of its labels at the positions of the logits.
    """
    from safetensors.numpy import save

    from lipcert.certify import diameter, image_sha256, labels_sha256
    from lipcert.data import scene_loader
    from lipcert.segment import certify_scenes, clearances, evaluate_scenes
    from lipcert.segment import radii as radii_of

    shown: list[Tensor] = []
    hashes: list[tuple[str, str]] = []
    maps: dict[str, list[Any]] = {"image": [], "label": [], "predict": [], "radius": []}
    largest = diameter(audit.domain, audit.input_shape)

    def placed() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in scene_loader(subject.scenes, batch_size, mask_stride=subject.stride):
            shown.extend(images[: SHOWN - len(shown)])
            pairs = zip(images.numpy(), labels.numpy(), strict=True)
            hashes.extend((image_sha256(image), labels_sha256(label)) for image, label in pairs)
            yield images.to(subject.device), labels

    def kept(scenes: Iterable[tuple[Any, Any, float]]) -> Iterator[tuple[Any, Any, float]]:
        for logits, labels, error in scenes:
            if len(maps["label"]) < SHOWN:
                found = clearances(logits, error, used.pairs, within=0.0)
                radius = _single(radii_of(found.leave, used.pixel, largest=largest))
                image = shown[len(maps["label"])].numpy()
                maps["image"].append((image * 255).round().astype(np.uint8))
                maps["label"].append(labels.astype(np.int64))
                maps["predict"].append(found.predict.reshape(labels.shape))
                maps["radius"].append(radius.reshape(labels.shape))
            yield logits, labels, error
            advance(1)

    with progress(0, len(subject.scenes), "certifying") as advance:
        scenes = kept(evaluate_scenes(audit, placed(), eps, precision=precision))
        rows = certify_scenes(scenes, eps, used.joint, used.pixel, pairs=used.pairs, classes=subject.scenes.classes)
    return rows, save({name: np.stack(values) for name, values in maps.items()}), hashes


def _facts(
    subject: SceneSubject, audit: Audit, used: Constants, eps: Sequence[float], precision: str
) -> dict[str, Any]:
    """Return certificate.json: what each row states, about which network and images, and by which constants."""
    from lipcert.numerics import exact
    from lipcert.runtime import environment

    with exact() as facts:
        arithmetic = {**facts, **environment(subject.device)}
    low, high = audit.domain
    pairs = None if used.pairs is None else used.pairs.tolist()
    return {
        "statement": _STATEMENT.format(low=low, high=high, arithmetic=_ARITHMETIC[precision]),
        "task": "segmentation",
        "model": subject.name,
        "weights_sha256": audit.weights_sha256,
        "data": subject.scenes.name,
        "split": subject.scenes.split,
        "n": len(subject.scenes),
        "precision": precision,
        "input_shape": list(audit.input_shape),
        "stride": subject.stride,
        "domain": [low, high],
        "norm": "l2",
        "eps": list(eps),
        "classes": list(subject.scenes.classes),
        "constants": {"of": used.of, "joint": used.joint, "pixel": used.pixel, "pairs": pairs},
        "audit": audit.to_json(),
        "arithmetic": arithmetic,
        "lipcert": lipcert.__version__,
    }


def _single(radius: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return radii as float32, rounded down."""
    single = radius.astype(np.float32)
    return np.where(single > radius, np.nextafter(single, np.float32(0)), single)


def _text(subject: SceneSubject, summary: dict[str, Any], used: Constants) -> str:
    from lipcert.report import wording

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.2f} %"

    header = ("l2 eps", "certified", "alone", "certified mIoU", "stable")
    rows = [("clean", percent(summary["accuracy"]), percent(summary["accuracy"]), percent(summary["miou"]), "")]
    rows += [
        (key, *(percent(summary[name][key]) for name in ("certified", "certified_alone", "certified_miou", "stable")))
        for key in summary["certified"]
    ]
    sides = "x".join(map(str, subject.shape[1:]))
    what = f"{subject.name} on {summary['n']} images ({sides}) of {subject.scenes.name} {subject.scenes.split}"
    joint, pixel = (wording.upper(constant, 6) for constant in (used.joint, used.pixel))
    bound = f"Lipschitz bounds of the {used.of}: {joint} all positions, {pixel} one"
    return f"{what}; {bound}; certified for {summary['precision']}\n\n{table(rows, header)}"
