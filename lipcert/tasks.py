"""What training does differently for one label an image and for one a pixel; everything else is the same.

A task reads splits, makes batches, and turns logits and labels into rows: (m, K) logits and (m,) labels, one row for
each thing that is classified. Losses and accuracies are those of rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lipcert import data
from lipcert.config import TrainConfig
from lipcert.data import Dataset, Scenes
from lipcert.data.scenes import IGNORE
from lipcert.errors import InputError
from lipcert.registry import models

STRIDE = 4  # pixels between two logits of a segmentation network


@dataclass(frozen=True)
class Split:
    """Images with labels on their device, and what a model must know of them; `height` is None for square images."""

    items: Any
    num_classes: int
    in_chans: int
    img_size: int
    height: int | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.in_chans, self.height or self.img_size, self.img_size)


class Task(Protocol):
    name: str

    def load(self, config: TrainConfig, root: str | None, split: str, download: bool, device: torch.device) -> Split:
        """Read one split."""
        ...

    def check_augmentation(self, text: str) -> None:
        """Raise InputError for a name that does not exist."""

    def batches(self, split: Split, batch_size: int, **options: Any) -> Iterable[tuple[Tensor, Tensor]]: ...

    def rows(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]: ...


class Classification:
    name = "classification"

    def load(self, config: TrainConfig, root: str | None, split: str, download: bool, device: torch.device) -> Split:
        # The split has a seed of its own: runs that differ in their seed share it, and never train on each other's
        # choices.
        found = data.load(config.data, root, split, download, config.val_fraction, img_size=config.img_size).to(device)
        return Split(found, found.num_classes, found.in_chans, found.img_size)

    def check_augmentation(self, text: str) -> None:
        from lipcert.data.augment import parse

        parse(text)

    def batches(self, split: Split, batch_size: int, **options: Any) -> Iterable[tuple[Tensor, Tensor]]:
        items: Dataset = split.items
        return data.loader(items, batch_size, **options)

    def rows(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits, labels


class Segmentation:
    """Images in memory, scaled to `img_size` pixels of width, labels at the stride of the logits."""

    name = "segmentation"

    def load(self, config: TrainConfig, root: str | None, split: str, download: bool, device: torch.device) -> Split:
        source = data.info(config.data)
        sides = scene_size(config.data, config.img_size)
        scenes = data.load_scenes(config.data, root, split, download, config.val_fraction, img_size=sides)
        return Split(scenes.in_memory(), scenes.num_classes, source.in_chans, sides[1], sides[0])

    def check_augmentation(self, text: str) -> None:
        from lipcert.data.scene_batches import parse

        parse(text)

    def batches(self, split: Split, batch_size: int, **options: Any) -> Iterable[tuple[Tensor, Tensor]]:
        scenes: Scenes = split.items
        return data.scene_loader(scenes, batch_size, mask_stride=STRIDE, **options)

    def rows(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # (n, K, h, w), (n, h, w)
        labelled = labels != IGNORE
        return logits.movedim(1, -1)[labelled], labels[labelled]


def scene_size(name: str, img_size: int | None) -> tuple[int, int]:
    """Return (height, width) of the images of a segmentation set that are `img_size` wide and keep their proportions.

    >>> scene_size("camvid", 128)
    (96, 128)
    """
    source = data.info(name)
    width = img_size or source.img_size
    return round((source.height or source.img_size) * width / source.img_size), width


def task_of(config: TrainConfig) -> Task:
    """Return the task of the model, which must be that of the data set; else InputError says what would fit."""
    name = models.task(config.model)
    data.require_task(config.data, name)
    tasks: dict[str, Task] = {task.name: task for task in (Classification(), Segmentation())}
    if name not in tasks:
        raise InputError(f"model {config.model} is for {name}, which cannot be trained")
    return tasks[name]


def mean_iou(confusion: Tensor) -> float:
    """Return the mean over classes of intersection over union, from counts (label, prediction) of a whole split.

    Classes that are neither labelled nor predicted have none.

    >>> round(mean_iou(torch.tensor([[2.0, 0.0], [1.0, 1.0]])), 6)
    0.583333
    """
    hits = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hits
    return float((hits / union)[union > 0].mean())
