"""Random changes of training images, written as a comma list: "shift4,flip", "default,randaugment", "none".

    shiftN       move by up to N pixels in each direction, zeros come in (the random crop after padding by N)
    flip         mirror left and right, every second image
    resizedcrop  a random part of 8 … 100 % of the image, scaled to the full size (image files only)
    randaugment, trivialaugment, autoaugment, erasing   torchvision's, image by image
    default      what the data set's source names

shiftN and flip run on whole batches, so that training small networks on a processor does not wait for its images. All
draws come from generators that the caller seeds; torch's global generator is left as it was found.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lipcert.data.torchvision import import_torchvision
from lipcert.errors import unknown

_TORCHVISION = {
    "randaugment": "RandAugment",
    "trivialaugment": "TrivialAugmentWide",
    "autoaugment": "AutoAugment",
    "erasing": "RandomErasing",
}


@dataclass(frozen=True)
class Augment:
    """What to do with training images: `shift` in pixels, `extra` are names of torchvision's transforms."""

    shift: int = 0
    flip: bool = False
    resized_crop: bool = False
    extra: tuple[str, ...] = ()

    @property
    def batched(self) -> bool:
        """Whether whole batches can be changed at once."""
        return not (self.extra or self.resized_crop)


def parse(text: str, default: str = "none") -> Augment:
    """Read a comma list of names; `default` is what "default" stands for. An unknown name raises InputError.

    >>> parse("default,randaugment", default="shift4,flip")
    Augment(shift=4, flip=True, resized_crop=False, extra=('randaugment',))
    """
    names: list[str] = []
    for name in text.replace(" ", "").split(","):
        names += default.split(",") if name == "default" else [name]
    shifts = [int(match[1]) for name in names if (match := re.fullmatch(r"shift(\d{1,3})", name))]
    known = ("default", "none", "flip", "resizedcrop", *_TORCHVISION)
    for name in names:
        if name not in known and not re.fullmatch(r"shift\d{1,3}", name):
            raise unknown("augmentation", name, (*known, "shift4"))
    return Augment(
        shift=max(shifts, default=0),
        flip="flip" in names,
        resized_crop="resizedcrop" in names,
        extra=tuple(dict.fromkeys(name for name in names if name in _TORCHVISION)),
    )


def draw(augment: Augment, n: int, generator: torch.Generator) -> Tensor:
    """Draw what `shift_and_flip` does to n images, on the processor, so the same for every device: (3, n)."""
    top, left = torch.randint(2 * augment.shift + 1, (2, n), generator=generator)
    return torch.stack((top, left, torch.randint(2, (n,), generator=generator)))


def shift_and_flip(images: Tensor, augment: Augment, draws: Tensor) -> Tensor:
    """Move and mirror each image by its own column of `draws` (3, n), (n, c, h, w) -> the same."""
    n, _, h, w = images.shape
    top, left, mirror = draws.to(images.device)
    if augment.shift:
        windows = F.pad(images, (augment.shift,) * 4).unfold(2, h, 1).unfold(3, w, 1)  # (n, c, 2s+1, 2s+1, h, w)
        images = windows[torch.arange(n, device=images.device), :, top, left]  # (n, c, h, w)
    if augment.flip:
        images = torch.where(mirror.bool()[:, None, None, None], images.flip(3), images)
    return images


class Transform:
    """Changes image by image, for what is not `batched`: (image (c, h, w), seed) -> image (c, img_size, img_size).

    A class, because worker processes need to pickle it.
    """

    def __init__(self, augment: Augment, img_size: int) -> None:
        self.augment = augment
        self.steps: list[Callable[[Tensor], Tensor]] = []
        if augment.resized_crop:
            self.steps.append(import_torchvision("transforms.v2").RandomResizedCrop(img_size))
        for name in augment.extra:
            self.steps.append(getattr(import_torchvision("transforms.v2"), _TORCHVISION[name])())

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        if image.is_floating_point() and self.steps:  # some of torchvision's transforms want bytes
            image = image.mul(255).round().to(torch.uint8)
        generator = torch.default_generator  # torchvision draws from the global one, which is restored after the image
        with torch.random.fork_rng(devices=[]):
            generator.manual_seed(seed)
            for step in self.steps:
                image = step(image)
            return shift_and_flip(image[None], self.augment, draw(self.augment, 1, generator))[0]
