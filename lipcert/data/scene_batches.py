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
from torch.utils.data import Dataset as MapStyle

from lipcert.data.batches import Order, check, cores, to_pixels
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
    check(batch_size, rank, world)
    if mask_stride < 1:
        raise InputError(f"the mask stride must be at least 1, got {mask_stride}")
    names = parse(augment, scenes.default_augment)
    if workers is None:
        workers = 0 if isinstance(scenes.pairs, ScenePixels) and not names else cores()
    return SceneBatches(
        scenes, batch_size, shuffle, seed, epoch, drop_last, rank, world, start_batch, workers, names, mask_stride
    )


@dataclass(frozen=True)
class SceneBatches(Order):
    """What `scene_loader` returns."""

    dataset: Scenes
    augment: tuple[str, ...]
    mask_stride: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        pairs = self.read(_Drawn(self.dataset, self.augment), collate_fn=_collate)
        return ((to_pixels(images), at_stride(masks, self.mask_stride).long()) for images, masks in pairs)


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
