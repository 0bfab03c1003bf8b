"""Data sets by name, their splits, and batches for training and certification.

`load` reads; `info` says what there is to read; `loader` makes batches. A new data set is one file with a function
that returns a `Source`, registered with `lipcert.registry.datasets`, and one line in the imports below.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lipcert.data import digits as digits
from lipcert.data import folders as folders
from lipcert.data import torchvision as torchvision
from lipcert.data.batches import Batches as Batches
from lipcert.data.batches import loader as loader
from lipcert.data.record import Dataset as Dataset
from lipcert.data.record import Samples as Samples
from lipcert.data.record import Source as Source
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
    source = info(name)
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    if img_size not in (None, source.img_size) and not source.resizes:
        raise InputError(f"{name} has images of {source.img_size} pixels a side; leave out img_size {img_size}")
    size = img_size or source.img_size
    place = data_root(root)
    missing = source.missing(place)
    if missing is not None and not (download and source.downloads):
        raise InputError(f"{name} is not there: {missing} is missing; {_remedy(source)}")
    part = "val" if split == "val" and "val" in source.parts else "test" if split == "test" else "train"
    samples = source.read(place, part, download and missing is not None, size)
    if part == "train" and "val" not in source.parts:
        fraction = source.val_fraction if val_fraction is None else val_fraction
        samples = samples.select(_part_of_training(len(samples.labels), split, fraction, seed))
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
