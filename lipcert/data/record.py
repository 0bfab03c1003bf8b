"""What the package knows about a data set before reading it (`Source`), and what a read one is (`Dataset`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lipcert.data.images import ImageFiles


@dataclass(frozen=True)
class Samples:
    """One part of a data set as its files hold it."""

    images: Tensor | ImageFiles  # (n, c, h, w), uint8 or float in [0, 1]
    labels: Tensor  # (n,) int64
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> Self:  # (m,) int64
        """Return the images at `indices`, in that order."""
        if isinstance(self.images, Tensor):
            return replace(self, images=self.images[indices], labels=self.labels[indices])
        return replace(self, images=self.images.select(indices.tolist()), labels=self.labels[indices])


@dataclass(frozen=True)
class Source:
    """A data set that can be loaded by name: `lipcert.registry.datasets` holds functions that return one.

    `read(root, part, download, img_size)` reads one of `parts` as `Samples`, or as `lipcert.data.scenes.Scenes` where
    the set is for segmentation and img_size a pair (height, width) or None; where "val" is none of the parts, the
    validation images are taken from "train". `needs` are the paths below the root that must exist; `get` says where the
    files come from.
    """

    name: str
    num_classes: int
    img_size: int
    in_chans: int
    sizes: tuple[int, int]  # images for training and validation, images for testing
    read: Callable[[Path, str, bool, Any], Any]
    parts: tuple[str, ...] = ("train", "test")
    needs: tuple[str, ...] = ()
    get: str = ""
    downloads: bool = False
    resizes: bool = False  # whether img_size can be chosen
    augment: str = "none"  # what "default" stands for
    val_fraction: float = 0.1
    height: int | None = None  # where the images are not square; then img_size is their width

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.in_chans, self.height or self.img_size, self.img_size)

    def missing(self, root: Path) -> Path | None:
        """Return the first path that must exist below `root` and doesn't."""
        return next((root / path for path in self.needs if not (root / path).exists()), None)


@dataclass(frozen=True)
class Dataset(Samples):
    """Images with labels: `images` is a tensor for sets that fit into memory, image files for the others.

    Pixels are in [0, 1] once they come out of `lipcert.data.loader`; the tensor itself may be uint8 (0 … 255).
    """

    name: str
    split: str
    img_size: int
    in_chans: int
    default_augment: str = "none"

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def first(self, limit: int | None) -> Self:
        """Return the first `limit` images, or all of them for None."""
        return self if limit is None or limit >= len(self) else self.select(torch.arange(limit))

    def to(self, device: torch.device | str) -> Self:
        """Return the data set on `device` if it is in memory; image files stay where they are."""
        if not isinstance(self.images, Tensor):
            return self
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))
