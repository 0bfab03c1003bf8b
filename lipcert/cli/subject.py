"""What `certify` and `attack` work on: an exported network, the images of one split, and the folder for the results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lipcert.cli.model import Resolved, resolve_model
from lipcert.cli.options import data_root_option, device_option, json_option, seed_option
from lipcert.errors import InputError
from lipcert.files import require_writable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lipcert.data import Dataset

_OPTIONS: tuple[Callable[..., Any], ...] = (
    click.argument("model"),
    click.option("--data", metavar="NAME", help="Data set (lipcert data), or folder:PATH; a run folder knows its own."),
    click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True),
    click.option("--limit", type=click.IntRange(1), help="Only the first N images.", metavar="N"),
    click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="Folder for the results."),
    click.option("--resume", is_flag=True, help="Continue after an interruption, or with a larger --limit."),
    click.option("--batch-size", type=click.IntRange(1), default=100, show_default=True),
    device_option,
    seed_option,
    data_root_option,
    json_option,
)


@dataclass(frozen=True)
class Subject:
    """The network in plain float64 torch on its device, the images, and where results go."""

    network: nn.Module
    name: str
    dataset: Dataset
    shape: tuple[int, ...]  # of one image
    folder: Path
    device: torch.device


def subject_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what a command works on, and `json_file`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def load_subject(
    model: str,
    *,
    data: str | None,
    split: str,
    limit: int | None,
    output: Path | None,
    device: str,
    seed: int,
    data_root: str | None,
) -> Subject:
    """Resolve the model, export it, read the images, and check that they fit together; else raise InputError."""
    from lipcert import data as datasets
    from lipcert.export import export
    from lipcert.runtime import select_device

    place = select_device(device)
    resolved, data, folder, val_fraction = find("classification", model, data, output, seed)
    source = datasets.info(data)
    shape = source.shape
    wanted = resolved.input_shape or shape
    if wanted != shape and not (source.resizes and wanted[0] == shape[0] and wanted[1] == wanted[2]):
        raise InputError(f"{resolved.name} takes inputs of {wanted}, the images of {data} are {shape}; use other data")
    classes = resolved.config.get("num_classes", source.num_classes)
    if classes != source.num_classes:
        raise InputError(f"{resolved.name} has {classes} classes, {data} has {source.num_classes}; use other data")
    size = wanted[-1] if source.resizes else None
    images = datasets.load(data, data_root, split, val_fraction=val_fraction, img_size=size).first(limit)
    network = export(resolved.model).to(place)
    return Subject(network, resolved.name, images, wanted, require_writable(folder), place)


def find(
    task: str, model: str, data: str | None, output: Path | None, seed: int
) -> tuple[Resolved, str, Path, float | None]:
    """Return the model, the name of its data set, the folder for results, and the run's share of validation images.

    InputError says what is missing, or which of the two is for another task.
    """
    from lipcert import data as datasets
    from lipcert.config import load_config
    from lipcert.registry import models

    if data is None:
        resolved = resolve_model(model, seed=seed)
    else:
        datasets.require_task(data, task)
        source = datasets.info(data)
        square = (source.in_chans, source.img_size, source.img_size)
        resolved = resolve_model(model, num_classes=source.num_classes, input_shape=square, seed=seed)
    known = resolved.config.get("model")
    if isinstance(known, str) and known in models:
        models.require_task(known, task)
    name = data or resolved.config.get("data")
    if name is None:
        raise InputError(f"nothing says which images to use with {model}; name a data set with --data")
    datasets.require_task(name, task)
    folder = output or resolved.run
    if folder is None:
        raise InputError(f"{model} is not a run folder; say with -o where the results shall go")
    # The validation images of a run are those that its training left out.
    recipe = None if resolved.run is None else resolved.run / "config.yaml"
    config = load_config(recipe) if recipe is not None and recipe.is_file() else None
    return resolved, name, folder, None if config is None else config.val_fraction


@contextmanager
def progress(done: int, total: int, label: str) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr if that is a terminal, and yield what to call with each number of finished images."""
    with click.progressbar(length=total, label=label, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        bar.update(done)
        yield bar.update
