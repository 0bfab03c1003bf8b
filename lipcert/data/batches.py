"""Batches of images, the same ones for the same (seed, epoch), whatever came before: a run resumes at any batch.

The order comes from (seed, epoch), the augmentation of a batch from (seed, epoch, batch), that of a single image file
from (seed, epoch, place in the epoch). Processes of a distributed run draw the same global batch and keep their share
of it, so that the images and their changes do not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapStyle

from lipcert.data.augment import Augment, Transform, draw, parse, shift_and_flip
from lipcert.data.images import ImageFiles
from lipcert.data.record import Dataset
from lipcert.errors import InputError


def loader(
    dataset: Dataset,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    augment: str = "none",
    drop_last: bool = False,
    rank: int = 0,
    world: int = 1,
    start_batch: int = 0,
    workers: int | None = None,
) -> Batches:
    """Return an iterable of (images, labels): float32 (n, c, h, w) in [0, 1], int64 (n,).

    `batch_size` counts the images of one process; of the `world * batch_size` images of a step, this one gets every
    `world`-th from `rank` on. `augment` is read by `lipcert.data.augment.parse`. `start_batch` leaves out the first
    batches of the epoch and changes nothing about the others. `workers` are processes that read files or augment
    image by image (None: as many as there are cores, at most 8); images in memory without such augmentation need
    none.

    >>> from lipcert.data import load
    >>> images, labels = next(iter(loader(load("digits", split="test"), batch_size=32)))
    >>> images.shape, images.dtype, labels.dtype
    (torch.Size([32, 1, 8, 8]), torch.float32, torch.int64)
    """
    check(batch_size, rank, world)
    change = parse(augment, dataset.default_augment)
    if change.resized_crop and not isinstance(dataset.images, ImageFiles):
        raise InputError(f"resizedcrop needs image files, and {dataset.name} has none; use shift4 instead")
    if workers is None:
        workers = cores()
    return Batches(dataset, batch_size, shuffle, seed, epoch, drop_last, rank, world, start_batch, workers, change)


@dataclass(frozen=True)
class Order:
    """Which items of a set make which batch; `len` counts the batches that come, `total` also those before them."""

    dataset: Sized
    batch_size: int
    shuffle: bool
    seed: int
    epoch: int
    drop_last: bool
    rank: int
    world: int
    start_batch: int
    workers: int

    @property
    def total(self) -> int:
        whole, rest = divmod(len(self.dataset), self.world * self.batch_size)
        return whole + (rest > self.rank and not self.drop_last)

    def __len__(self) -> int:
        return max(0, self.total - self.start_batch)

    def steps(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of each step and the indices of its items in all processes."""
        n, step = len(self.dataset), self.world * self.batch_size
        order = torch.randperm(n, generator=generator_of(self.seed, self.epoch)) if self.shuffle else torch.arange(n)
        for batch in range(self.start_batch, self.total):
            yield batch, order[batch * step : (batch + 1) * step]

    def read(self, items: MapStyle[tuple[Tensor, Tensor]], **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's batches of `items`, a map from (index, seed), with the workers of a DataLoader."""
        step = self.world * self.batch_size
        batches = [
            [
                (int(indices[place]), seed_of(self.seed, self.epoch, batch * step + place))
                for place in range(self.rank, len(indices), self.world)
            ]
            for batch, indices in self.steps()
        ]
        reader = DataLoader(
            items,
            batch_sampler=batches,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=generator_of(self.seed, self.epoch),  # else it would draw from the global one
            **options,
        )
        try:
            yield from reader
        except InputError as error:  # from a worker it comes with a traceback in its text
            raise InputError(str(error).strip().splitlines()[-1].removeprefix("lipcert.errors.InputError: ")) from error


@dataclass(frozen=True)
class Batches(Order):
    """What `loader` returns."""

    dataset: Dataset
    augment: Augment

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.dataset.images, Tensor) and self.augment.batched:
            return self._at_once(self.dataset.images)
        pairs = self.read(_Drawn(self.dataset, self.augment))
        return ((to_pixels(images), labels) for images, labels in pairs)

    def _at_once(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        mine = slice(self.rank, None, self.world)
        for batch, indices in self.steps():
            draws = draw(self.augment, len(indices), generator_of(self.seed, self.epoch, batch))[:, mine]
            chosen = indices[mine].to(images.device)
            yield to_pixels(shift_and_flip(images[chosen], self.augment, draws)), self.dataset.labels[chosen]


def check(batch_size: int, rank: int, world: int) -> None:
    """Refuse a rank outside the world (ValueError) and an empty batch (InputError)."""
    if not 0 <= rank < world:
        raise ValueError(f"rank must be 0 … world-1, got rank {rank} of {world}")
    if batch_size < 1:
        raise InputError(f"the batch size must be at least 1, got {batch_size}")


class _Drawn(MapStyle[tuple[Tensor, Tensor]]):
    """Map-style: (index, seed) -> (changed image, label)."""

    def __init__(self, dataset: Dataset, augment: Augment) -> None:
        self.images, self.labels = dataset.images, dataset.labels
        if augment.resized_crop and isinstance(self.images, ImageFiles):
            self.images = self.images.at_full_size()
        self.transform = None if augment == Augment() else Transform(augment, dataset.img_size)

    def __getitem__(self, drawn: tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, seed = drawn
        image = self.images[index]
        return (image if self.transform is None else self.transform(image, seed)), self.labels[index]


def cores() -> int:
    """Return how many worker processes are worth having: one a core that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)


def to_pixels(images: Tensor) -> Tensor:
    """Return float32 in [0, 1]: bytes are divided by 255, floats are that already."""
    return images.to(torch.float32) if images.is_floating_point() else images.to(torch.float32).div_(255)


def seed_of(*numbers: int) -> int:
    """Hash a tuple of numbers to a seed, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1


def generator_of(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*numbers))
