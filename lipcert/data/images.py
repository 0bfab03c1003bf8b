"""Image files of a set that is too large for memory, as a map-style data set: index -> uint8 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lipcert.errors import InputError

_CUT_FROM = 128  # pixels
_LONGEST = 100  # times the shorter side


@dataclass(frozen=True)
class ImageFiles(Dataset[Tensor]):
    """Map-style: index -> uint8 image (3, size, size), scaled so that the shorter side fits, and cut to its centre.

    From 128 pixels on, the centre is 87.5 % of the shorter side (256 -> 224, the usual ImageNet evaluation); smaller
    images are scaled to the full side. With `whole`, the image keeps its size, because a random crop follows that
    scales it.
    """

    files: tuple[Path, ...]
    size: int
    whole: bool = False

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        file = self.files[index]
        try:
            with Image.open(file) as opened:
                if max(opened.size) > _LONGEST * min(opened.size):  # enlarged, it would not fit into memory
                    raise InputError(f"{file} has {opened.width} x {opened.height} pixels, a stripe; replace it")
                image = opened.convert("RGB")
        except InputError:
            raise
        except Exception as error:  # Pillow raises whatever its decoders trip over
            raise InputError(f"{file} is not a readable image ({error}); replace it") from error
        if not self.whole:
            image = _scale_and_cut(image, self.size)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, 3).permute(2, 0, 1)  # (3, h, w)

    def select(self, indices: Sequence[int]) -> ImageFiles:
        return replace(self, files=tuple(self.files[index] for index in indices))

    def at_full_size(self) -> ImageFiles:
        return replace(self, whole=True)


def _scale_and_cut(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    short = round(size / 0.875) if size >= _CUT_FROM else size
    factor = short / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
