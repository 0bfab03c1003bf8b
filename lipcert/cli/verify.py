"""`lipcert verify`: re-prove a certificate with a checker that shares nothing with what wrote it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lipcert.cli.options import data_root_option, json_option, write_json
from lipcert.cli.subject import progress
from lipcert.errors import Finding, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from lipcert.checker import Report


@click.command(
    epilog="""\b
Examples:
  lipcert verify runs/digits
  lipcert verify certified/certificate.json --limit 100
  lipcert verify certificate.json --data folder:photos
  lipcert verify certificate.json --images images.safetensors

The checker is a folder that needs NumPy and safetensors alone: lipcert/checker. Exit code 3: the sentence says what
does not hold, or what this checker cannot judge."""
)
@click.argument("certificate", type=click.Path(path_type=Path))
@click.option(
    "--weights",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The tensors of the program.  [default: program.safetensors beside the certificate]",
)
@click.option("--data", metavar="NAME", help="Data set, or folder:PATH.  [default: the one that the certificate names]")
@click.option("--limit", type=click.IntRange(0), metavar="N", help="Only the first N images; 0: the proof alone.")
@click.option(
    "--images",
    "images_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Images 0, 1, 2, … from a safetensors file: one tensor (n, c, h, w), or `images` and `labels` (n, h, w).",
)
@data_root_option
@json_option
def command(
    certificate: Path,
    weights: Path | None,
    data: str | None,
    limit: int | None,
    images_file: Path | None,
    data_root: str | None,
    json_file: str | None,
) -> None:
    """Check CERTIFICATE (a certificate.json, or the folder that holds one) from its files and the images.

    Every step of the proof is confirmed by another method, every radius by another evaluation of the network. If the
    folder is a run, its model is exported again and compared with the program of the certificate.
    """
    from lipcert.certificate import CERTIFICATE, PROGRAM, ROWS, SCENES
    from lipcert.checker import check

    path = certificate / CERTIFICATE if certificate.is_dir() else certificate
    facts = _facts(path) if path.is_file() else {}
    scenes = facts.get("task") == "segmentation"
    for needed in (path, weights or path.with_name(PROGRAM), path.with_name(SCENES if scenes else ROWS)):
        if not needed.is_file():
            raise InputError(f"{needed} is not there; `lipcert certify` writes it")
    if images_file is not None and data is not None:
        raise InputError("give --images or --data, not both")
    images, labels, why = _images(path.parent, facts, data, limit, images_file, data_root)
    total = 0 if images is None else len(images)
    with progress(0, total, "verifying") as advance:
        report = check(path, weights=weights, images=images, labels=labels if scenes else None, progress=advance)
    if json_file is not None:
        write_json(json_file, {key: value for key, value in asdict(report).items() if key != "own"})
    if not report.accepted:
        raise Finding(f"{path} does not verify: {report.reason}")
    if not scenes:
        _compare_labels(path, labels)
    model = _compare_model(path)
    if json_file != "-":
        click.echo(_text(path, report, why, model))


def _facts(path: Path) -> dict[str, Any]:
    """Return what a certificate says about itself, or nothing if it is damaged: the checker says how."""
    from lipcert.checker import Rejected
    from lipcert.checker.reading import read_json

    try:
        facts = read_json(path)
    except Rejected:
        return {}
    return facts if isinstance(facts, dict) else {}


def _images(
    folder: Path, facts: dict[str, Any], data: str | None, limit: int | None, file: Path | None, root: str | None
) -> tuple[NDArray[Any] | None, NDArray[Any] | None, str]:
    """Return images as float64, labels if there are any, and why there are no images."""
    if limit == 0:
        return None, None, "--limit 0"
    if file is not None:
        images, labels = _from_file(file)
        return images[:limit], None if labels is None else labels[:limit], ""
    name, n = data or facts.get("data"), facts.get("n")
    if not isinstance(name, str) or not isinstance(n, int):
        return None, None, "the certificate names no data set"
    try:
        return *_from_data(name, folder, facts, min(n, limit or n), root), ""
    except InputError as error:
        if data is not None:
            raise
        return None, None, str(error)


def _from_file(file: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(file)
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{file} cannot be read as safetensors: {error}") from error
    labels = tensors.pop("labels", None)
    shapes = [list(tensor.shape) for tensor in tensors.values()]
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise InputError(f"{file} must hold one tensor (n, c, h, w) beside `labels`, not {shapes}")
    if labels is not None and len(labels) != shapes[0][0]:
        raise InputError(f"{file} holds {shapes[0][0]} images and {len(labels)} labels")
    return next(iter(tensors.values())).astype("float64"), labels


def _from_data(
    name: str, folder: Path, facts: dict[str, Any], n: int, root: str | None
) -> tuple[NDArray[Any], NDArray[Any]]:
    import numpy as np

    from lipcert import data as datasets
    from lipcert.config import load_config

    source = datasets.info(name)
    recipe = folder / "config.yaml"  # the validation images of a run are those that its training left out
    fraction = load_config(recipe).val_fraction if recipe.is_file() else None
    size = tuple(facts["input_shape"][1:]) if facts.get("input_shape") else None
    split = facts.get("split")
    if split not in ("train", "val", "test"):
        raise InputError(f"the certificate names no split of {name}, but {split!r}")
    batches: Iterable[tuple[Tensor, Tensor]]
    if facts.get("task") == "segmentation":
        scenes = datasets.load_scenes(name, root, split, val_fraction=fraction, img_size=size).first(n)
        batches = datasets.scene_loader(scenes, 8, mask_stride=facts.get("stride", 1))
    else:
        side = size[-1] if source.resizes and size else None
        dataset = datasets.load(name, root, split, val_fraction=fraction, img_size=side).first(n)
        batches = datasets.loader(dataset, 100)
    read = [(images.double().numpy(), labels.numpy()) for images, labels in batches]
    return np.concatenate([images for images, _ in read]), np.concatenate([labels for _, labels in read])


def _compare_labels(path: Path, labels: NDArray[Any] | None) -> None:
    """Raise a Finding if rows have other labels than the data set."""
    from lipcert.certificate import read

    if labels is None:
        return
    stored = read(path.parent)["label"].tolist()
    for idx, label in enumerate(labels.tolist()):
        if stored[idx] != label:
            raise Finding(f"{path} does not verify: row {idx}: the label is {label}, not {stored[idx]}")


def _compare_model(path: Path) -> str:
    """Export the model of a run folder again and compare; return what was found, or raise a Finding."""
    if not (path.parent / "model" / "model.safetensors").is_file():
        return "there is no model beside the certificate that it could be compared with"
    import hashlib

    from lipcert.cli.model import resolve_model
    from lipcert.export import export
    from lipcert.files import read_json
    from lipcert.proof import program_of

    facts = read_json(path)
    stored = facts["program"]
    nodes, file = program_of(export(resolve_model(str(path.parent)).model), facts["input_shape"])
    if hashlib.sha256(file).hexdigest() != stored["sha256"]:
        raise Finding(f"{path} does not verify: the tensors of the model beside it are others than the certificate's")
    if nodes != {key: value for key, value in stored.items() if key != "sha256"}:
        raise Finding(f"{path} does not verify: the model beside it exports to another list of operators")
    return "the model beside the certificate exports to exactly this program"


def _text(path: Path, report: Report, why: str, model: str) -> str:
    lines = [
        f"{path} verifies",
        f"proof   {report.steps} steps confirmed; Lipschitz bound {report.upper:.9g}, claimed {report.claimed:.9g}",
        f"rows    {report.images} of {report.rows} confirmed with their images",
    ]
    if report.note:
        lines.append(f"        {report.note}" + (f" ({why})" if why else ""))
    return "\n".join([*lines, f"model   {model}"])
