"""What `certify` and `attack` work on where every pixel has a label: a network, images with masks, their stride."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lipcert.cli.subject import find
from lipcert.errors import InputError
from lipcert.files import read_json, require_writable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lipcert.data import Scenes

BATCH = 4  # images: maps of all layers are kept for the bound of the rounding error


@dataclass(frozen=True)
class SceneSubject:
    """The network in plain float64 torch on its device, the images, and where results go."""

    network: nn.Module
    name: str
    scenes: Scenes
    shape: tuple[int, ...]  # of one image
    stride: int  # pixels between two logits
    folder: Path
    device: torch.device


def is_segmentation(model: str, data: str | None) -> bool:
    """Whether the data set, the run folder or the name of the model is about one label a pixel."""
    from lipcert.registry import datasets, models

    if data is not None and data in datasets and datasets.task(data) == "segmentation":
        return True
    known = _model_of(Path(model)) if Path(model).is_dir() else model
    return known in models and models.task(known) == "segmentation"


def _model_of(folder: Path) -> str:
    """Return the model that a run folder names; nothing where it is damaged, which loading it will say."""
    from lipcert.checkpoint import model_folder

    try:
        return str(read_json(model_folder(folder) / "config.json")["model"])
    except (InputError, KeyError, TypeError):
        return ""


def load_scene_subject(
    model: str,
    *,
    data: str | None,
    split: str,
    limit: int | None,
    output: Path | None,
    device: str,
    seed: int,
    data_root: str | None,
) -> SceneSubject:
    """Resolve the model, export it, find the images, and check that they fit together; else raise InputError.

    Images are scaled to the size that the run was trained on.
    """
    from lipcert import data as datasets
    from lipcert.export import export
    from lipcert.runtime import select_device

    place = select_device(device)
    resolved, data, folder, val_fraction = find("segmentation", model, data, output, seed)
    source = datasets.info(data)
    shape = resolved.input_shape or source.shape
    if len(shape) != 3 or shape[0] != source.in_chans:
        raise InputError(
            f"{resolved.name} takes inputs of {shape}, the images of {data} have {source.in_chans} colours"
        )
    sides = shape[1], shape[2]
    scenes = datasets.load_scenes(data, data_root, split, val_fraction=val_fraction, img_size=sides)
    network = export(resolved.model).to(place)
    stride = _stride(network, resolved.name, shape, scenes, place)
    return SceneSubject(network, resolved.name, scenes.first(limit), shape, stride, require_writable(folder), place)


def _stride(network: nn.Module, name: str, shape: tuple[int, ...], scenes: Scenes, device: torch.device) -> int:
    """Return how many pixels lie between two logits; maps of another form or number of classes raise InputError."""
    import torch

    from lipcert.numerics import exact

    with exact():
        found = tuple(network(torch.zeros(1, *shape, dtype=torch.float64, device=device)).shape[1:])
    if len(found) != 3:
        raise InputError(f"{name} does not give logits for every pixel but {found}; {scenes.name} needs a map of them")
    if found[0] != scenes.num_classes:
        raise InputError(f"{name} has {found[0]} classes, {scenes.name} has {scenes.num_classes}; use other data")
    strides = {side / cells for side, cells in zip(shape[1:], found[1:], strict=True)}
    stride = strides.pop()
    if strides or stride != int(stride):
        raise InputError(f"{name} gives {found[1:]} logits for images of {shape[1:]}, which is no whole stride")
    return int(stride)
