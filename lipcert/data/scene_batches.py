"""Batches of images and masks, in the order and with the seeds of `lipcert.data.batches`, changed in pairs.

Augmentations, as a comma list; all are torchvision's, applied to image and mask together:

    flip     mirror left and right, every second pair
    crop     scale by 0.5 … 2, then cut out the full size at random; what lies outside is black, its class IGNORE
             (SegFormer's recipe, without its limit on how much of a crop may be one class)
    color    brightness, contrast, saturation and hue of the image
    default  what the data set's source names
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapStyle

from lipcert.data.batches import cores, generator_of, seed_of, to_pixels
from lipcert.data.scenes import IGNORE, ScenePixels, Scenes, stack
from lipcert.data.torchvision import import_torchvision
from lipcert.errors import InputError, unknown

NAMES = ("flip", "crop", "color")


def scene_loader(
    scenes: Scenes,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    augment: str = "none",
    mask_stride: int = 1,
    drop_last: bool = False,
    rank: int = 0,
    world: int = 1,
    start_batch: int = 0,
    workers: int | None = None,
) -> SceneBatches:
    """Return an iterable of (images, masks): float32 (n, c, h, w) in [0, 1], int64 (n, ⌈h/s⌉, ⌈w/s⌉).

    `mask_stride` s takes the class at the middle of every s x s pixels: the labels at the stride of a network's logits.
    The other arguments are those of `lipcert.data.loader`. Images of different sizes in one batch, unreadable files and
    unknown augmentations raise InputError.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be 0 … world-1, got rank {rank} of {world}")
    if batch_size < 1 or mask_stride < 1:
        raise InputError(f"batch size and mask stride must be at least 1, got {batch_size} and {mask_stride}")
    names = parse(augment, scenes.default_augment)
    if workers is None:
        workers = 0 if isinstance(scenes.pairs, ScenePixels) and not names else cores()
    return SceneBatches(
        scenes, batch_size, shuffle, seed, epoch, names, mask_stride, drop_last, rank, world, start_batch, workers
    )


@dataclass(frozen=True)
class SceneBatches:
    """What `scene_loader` returns; `len` counts the batches that come, `total` also those before `start_batch`."""

    scenes: Scenes
    batch_size: int
    shuffle: bool
    seed: int
    epoch: int
    augment: tuple[str, ...]
    mask_stride: int
    drop_last: bool
    rank: int
    world: int
    start_batch: int
    workers: int

    @property
    def total(self) -> int:
        whole, rest = divmod(len(self.scenes), self.world * self.batch_size)
        return whole + (rest > self.rank and not self.drop_last)

    def __len__(self) -> int:
        return max(0, self.total - self.start_batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, step = len(self.scenes), self.world * self.batch_size
        order = torch.randperm(n, generator=generator_of(self.seed, self.epoch)) if self.shuffle else torch.arange(n)
        batches = [
            [(int(order[place]), seed_of(self.seed, self.epoch, place)) for place in self._places(batch, step, n)]
            for batch in range(self.start_batch, self.total)
        ]
        reader = DataLoader(
            _Drawn(self.scenes, self.augment),
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            generator=generator_of(self.seed, self.epoch),  # else it would draw from the global one
        )
        try:
            for images, masks in reader:
                yield to_pixels(images), at_stride(masks, self.mask_stride).long()
        except InputError as error:  # from a worker it comes with a traceback in its text
            raise InputError(str(error).strip().splitlines()[-1].removeprefix("lipcert.errors.InputError: ")) from error

    def _places(self, batch: int, step: int, n: int) -> range:
        return range(batch * step + self.rank, min(n, (batch + 1) * step), self.world)


def at_stride(masks: Tensor, stride: int) -> Tensor:
    """Return the class in the middle of every stride x stride pixels: (n, h, w) -> (n, ⌈h/stride⌉, ⌈w/stride⌉).

    >>> at_stride(torch.arange(16).view(1, 4, 4), 2)
    tensor([[[ 5,  7],
             [13, 15]]])
    """
    if stride == 1:
        return masks
    height, width = masks.shape[1:]
    rows, columns = (
        ((torch.arange(-(-side // stride), device=masks.device) + 0.5) * stride).long().clamp(max=side - 1)
        for side in (height, width)
    )
    return masks[:, rows[:, None], columns]


def parse(text: str, default: str = "none") -> tuple[str, ...]:
    """Read a comma list of names; `default` is what "default" stands for. An unknown name raises InputError.

    >>> parse("default,color", default="flip")
    ('flip', 'color')
    """
    found: list[str] = []
    for name in text.replace(" ", "").split(","):
        found += default.split(",") if name == "default" else [name]
    for name in found:
        if name not in (*NAMES, "none"):
            raise unknown("augmentation of segmentation", name, (*NAMES, "none", "default"))
    return tuple(name for name in NAMES if name in found)


class PairTransform:
    """Change an image and its mask together: (image (c, h, w), mask (h, w), seed) -> both, of the same size.

    A class, because worker processes need to pickle it.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, image: Tensor, mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        tv_tensors = import_torchvision("tv_tensors")
        height, width = mask.shape
        steps = self._steps(import_torchvision("transforms.v2"), tv_tensors, (height, width))
        pair = tv_tensors.Image(image), tv_tensors.Mask(mask)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(seed)
            for step in steps:
                pair = step(*pair)
        return pair[0].as_subclass(Tensor), pair[1].as_subclass(Tensor)

    def _steps(self, v2: Any, tv_tensors: Any, size: tuple[int, int]) -> list[Any]:
        steps = []
        if "crop" in self.names:
            outside = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE}
            steps += [
                v2.ScaleJitter(size, scale_range=(0.5, 2.0), antialias=True),
                v2.RandomCrop(size, pad_if_needed=True, fill=outside),
            ]
        if "flip" in self.names:
            steps.append(v2.RandomHorizontalFlip())
        if "color" in self.names:
            steps.append(v2.RandomPhotometricDistort())
        return steps


class _Drawn(MapStyle[tuple[Tensor, Tensor]]):
    """Map-style: (index, seed) -> (changed image, changed mask)."""

    def __init__(self, scenes: Scenes, names: tuple[str, ...]) -> None:
        self.pairs = scenes.pairs
        self.transform = PairTransform(names) if names else None

    def __getitem__(self, drawn: tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, seed = drawn
        image, mask = self.pairs[index]
        return (image, mask) if self.transform is None else self.transform(image, mask, seed)


def _collate(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, masks = zip(*pairs, strict=True)
    return stack(images), stack(masks)
