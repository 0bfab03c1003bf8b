"""Data sets by name, their splits, and batches for training and certification.

`load` reads; `info` says what there is to read; `loader` makes batches. `load_scenes` and `scene_loader` are the same
for segmentation, where every pixel has a label. A new data set is one file with a function that returns a `Source`,
registered with `lipcert.registry.datasets`, and one line in the imports below.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lipcert.data import ade20k as ade20k
from lipcert.data import digits as digits
from lipcert.data import folders as folders
from lipcert.data import segmentation as segmentation
from lipcert.data import torchvision as torchvision
from lipcert.data.batches import Batches as Batches
from lipcert.data.batches import loader as loader
from lipcert.data.record import Dataset as Dataset
from lipcert.data.record import Samples as Samples
from lipcert.data.record import Source as Source
from lipcert.data.scene_batches import scene_loader as scene_loader
from lipcert.data.scenes import Scenes as Scenes
from lipcert.errors import InputError
from lipcert.registry import datasets

SPLITS = ("train", "val", "test")


def info(name: str) -> Source:
    """Return what is known about the data set `name`, or `folder:PATH`, without reading an image."""
    if name.startswith("folder:"):
        return folders.folder(name.removeprefix("folder:"))
    source: Source = datasets.get(name)()
    return source


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Return where data sets lie: `root` if given, else the variable LIPCERT_DATA, else ~/.cache/lipcert."""
    return Path(root or os.environ.get("LIPCERT_DATA") or "~/.cache/lipcert").expanduser()


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    split: str = "train",
    download: bool = False,
    val_fraction: float | None = None,
    seed: int = 0,
    img_size: int | None = None,
) -> Dataset:
    """Read one split of the data set `name` ("digits", "cifar10", …, `folder:PATH`) from below `root`.

    "train" and "val" divide the training images by a permutation that depends on `seed` only: the first
    `val_fraction` of it is "val" (None: the data set's own choice, 10 % mostly); with 0, "train" is all of them. The
    test images are never touched by this. `img_size` applies to image files; sets in memory have one size. Missing
    files, an unknown name or size raise InputError.

    >>> load("digits", split="test").images.shape
    torch.Size([360, 1, 8, 8])
    """
    require_task(name, "classification")
    source = info(name)
    if img_size not in (None, source.img_size) and not source.resizes:
        raise InputError(f"{name} has images of {source.img_size} pixels a side; leave out img_size {img_size}")
    size = img_size or source.img_size
    samples = _read(source, root, split, download, val_fraction, seed, size)
    return Dataset(
        images=samples.images,
        labels=samples.labels,
        classes=samples.classes,
        name=name,
        split=split,
        img_size=size,
        in_chans=source.in_chans,
        default_augment=source.augment,
    )


def load_scenes(
    name: str,
    root: str | os.PathLike[str] | None = None,
    split: str = "train",
    download: bool = False,
    val_fraction: float | None = None,
    seed: int = 0,
    img_size: int | tuple[int, int] | None = None,
) -> Scenes:
    """Read one split of the segmentation set `name` ("camvid", "ade20k", …): see `load` for the other arguments.

    `img_size` is a side or (height, width) that all images and masks are scaled to; None leaves them as they are.
    Classes are numbers from 0 on, and `lipcert.data.scenes.IGNORE` wherever a pixel has none.
    """
    require_task(name, "segmentation")
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    if sides is not None and (len(sides) != 2 or min(sides) < 1):
        raise InputError(f"img_size must be a side or (height, width) of at least 1, got {img_size}")
    source = info(name)
    scenes: Scenes = _read(source, root, split, download, val_fraction, seed, sides)
    return replace(scenes, name=name, split=split, default_augment=source.augment)


def require_task(name: str, task: str) -> None:
    """Raise InputError, saying what else there is, unless the data set `name` is for `task` (folders: one label each).

    >>> require_task("camvid", "classification")
    Traceback (most recent call last):
        ...
    lipcert.errors.InputError: dataset camvid is for segmentation, and this is classification; choose one of cifar10, \
cifar100, digits, fashion-mnist, imagenet, mnist, tiny-imagenet
    """
    if not name.startswith("folder:"):
        datasets.require_task(name, task)
    elif task != "classification":
        raise InputError(f"{name} has one label an image, and this is {task}; choose one of the sets for {task}")


def _read(
    source: Source,
    root: str | os.PathLike[str] | None,
    split: str,
    download: bool,
    val_fraction: float | None,
    seed: int,
    size: Any,
) -> Any:
    """Read one split as the source's kind of record."""
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    place = data_root(root)
    missing = source.missing(place)
    if missing is not None and not (download and source.downloads):
        raise InputError(f"{source.name} is not there: {missing} is missing; {_remedy(source)}")
    part = "val" if split == "val" and "val" in source.parts else "test" if split == "test" else "train"
    samples = source.read(place, part, download and missing is not None, size)
    if part == "train" and "val" not in source.parts:
        fraction = source.val_fraction if val_fraction is None else val_fraction
        samples = samples.select(_part_of_training(len(samples), split, fraction, seed))
    return samples


def _part_of_training(n: int, split: str, fraction: float, seed: int) -> torch.Tensor:
    """Return the indices of the training or validation images, in the order of the files."""
    if not 0.0 <= fraction < 1.0:
        raise InputError(f"the validation fraction must be at least 0 and below 1, got {fraction}")
    count = round(fraction * n)
    if split == "val" and count == 0:
        raise InputError(f"a validation fraction of {fraction} leaves none of {n} images; choose a larger one")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return (order[:count] if split == "val" else order[count:]).sort().values


def _remedy(source: Source) -> str:
    elsewhere = "or name the folder of your data with --data-root (LIPCERT_DATA)"
    if source.downloads:
        return f"fetch it with --download, {elsewhere}"
    return f"{source.get}, {elsewhere}"
