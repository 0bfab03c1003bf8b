"""Images with one class for every pixel: the record of a segmentation set, in memory or read file by file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as MapStyle
from typing_extensions import Self

from lipcert.errors import InputError

IGNORE = 255  # the class of a pixel that has none: void, unlabelled, beyond the border
_UNDEFINED = -1


@dataclass(frozen=True)
class SceneFiles(MapStyle[tuple[Tensor, Tensor]]):
    """Map-style: index -> (image (3, h, w), mask (h, w)), both uint8, read when asked for.

    `table` says for each value of a mask file which class it is (`lookup` makes one). With `size` (height, width), the
    image is scaled bilinearly, and every pixel of the mask takes the class at its own centre.
    """

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    table: tuple[int, ...]
    size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Read one pair; a file that cannot be read or doesn't fit raises InputError."""
        image, mask = _open(self.images[index], "RGB"), _open(self.masks[index])
        if image.size != mask.size:
            raise InputError(
                f"{self.masks[index]} has {mask.width}x{mask.height} pixels and its image {self.images[index]} "
                f"{image.width}x{image.height}; they are not a pair"
            )
        if self.size is not None and image.size != self.size[::-1]:
            image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
            mask = mask.resize(self.size[::-1], Image.Resampling.NEAREST)
        pixels = _bytes(image).view(image.height, image.width, 3).permute(2, 0, 1)
        return pixels, self._classes(_bytes(mask), index).view(mask.height, mask.width)

    def mask(self, index: int) -> Tensor:
        """Read one mask (h, w) alone, as large as its file."""
        mask = _open(self.masks[index])
        return self._classes(_bytes(mask), index).view(mask.height, mask.width)

    def _classes(self, values: Tensor, index: int) -> Tensor:
        classes = torch.tensor(self.table, dtype=torch.int16)[values.long()]
        if bool((classes == _UNDEFINED).any()):
            value = int(values[classes == _UNDEFINED][0])
            raise InputError(f"{self.masks[index]} has the value {value}, which is no class of this data set")
        return classes.to(torch.uint8)

    def select(self, indices: Sequence[int]) -> SceneFiles:
        images, masks = (tuple(files[index] for index in indices) for files in (self.images, self.masks))
        return replace(self, images=images, masks=masks)


@dataclass(frozen=True)
class ScenePixels(MapStyle[tuple[Tensor, Tensor]]):
    """Map-style like `SceneFiles`, for pairs that are in memory: images (n, c, h, w), masks (n, h, w), both uint8."""

    images: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.masks[index]

    def select(self, indices: Sequence[int]) -> ScenePixels:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return ScenePixels(self.images[chosen], self.masks[chosen])


@dataclass(frozen=True)
class Scenes:
    """Images with their masks, and what the classes are called."""

    pairs: SceneFiles | ScenePixels
    classes: tuple[str, ...]
    name: str = ""
    split: str = ""
    default_augment: str = "none"

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.pairs)

    def select(self, indices: Tensor) -> Self:  # (m,) int64
        """Return the images at `indices`, in that order."""
        return replace(self, pairs=self.pairs.select(indices.tolist()))

    def first(self, limit: int | None) -> Self:
        """Return the first `limit` images, or all of them for None."""
        return self if limit is None or limit >= len(self) else self.select(torch.arange(limit))

    def in_memory(self) -> Self:
        """Read all files now; images of different sizes raise InputError."""
        if isinstance(self.pairs, ScenePixels):
            return self
        images, masks = zip(*(self.pairs[index] for index in range(len(self))), strict=True)
        return replace(self, pairs=ScenePixels(stack(images), stack(masks)))


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack images or masks; different sizes raise InputError."""
    sizes = sorted({tuple(tensor.shape[-2:]) for tensor in tensors})
    if len(sizes) > 1:
        first, second = (f"{height}x{width}" for height, width in sizes[:2])
        raise InputError(f"images of {first} and {second} pixels do not go into one batch; choose an img_size")
    return torch.stack(tuple(tensors))


def lookup(classes: Mapping[int, int], ignored: Iterable[int] = ()) -> tuple[int, ...]:
    """Return the table of `SceneFiles`: value in the file -> class; 255 and `ignored` are IGNORE, all else undefined.

    >>> lookup({0: 3}, ignored=[1])[:3]
    (3, 255, -1)
    """
    table = [_UNDEFINED] * 256
    for value in (*ignored, IGNORE):
        table[value] = IGNORE
    for value, number in classes.items():
        table[value] = number
    return tuple(table)


def pairs_of(images: Sequence[Path], masks: Sequence[Path], table: tuple[int, ...], size: object) -> SceneFiles:
    """Return the pairs after a look at the names: no image at all or a missing mask raise InputError."""
    if not images:
        raise InputError("there are no images; unpack the data set again")
    missing = next((mask for mask in masks if not mask.is_file()), None)
    if missing is not None:
        raise InputError(f"the mask {missing} is missing; unpack the data set again")
    assert size is None or isinstance(size, tuple)
    return SceneFiles(tuple(images), tuple(masks), table, size)


def _open(path: Path, mode: str | None = None) -> Image.Image:
    """Read an image in `mode`, or a mask as the bytes that its file holds."""
    try:
        with Image.open(path) as opened:
            opened.load()
            image = opened.convert(mode) if mode else opened.copy()
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: what Pillow raises for some damaged PNG files
        raise InputError(f"{path} is not a readable image ({error}); replace it") from error
    if mode is None and image.mode not in ("L", "P"):
        raise InputError(f"{path} is no mask: its pixels are {image.mode}, and a class is one byte; replace it")
    return image


def _bytes(image: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
