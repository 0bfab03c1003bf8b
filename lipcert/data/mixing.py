"""Training images mixed in pairs, with labels that are shares of classes.

- mixup (Zhang et al., ICLR 2018, arXiv 1710.09412): both images weighted, by shares from Beta(α, α);
- CutMix (Yun et al., ICCV 2019, arXiv 1905.04899): a rectangle of one image in the other.

The transforms are torchvision's: a batch draws one of the two kinds and one share for all of its images, and the
partner of each image is the one before it. What differs: the draws depend on a seed and on nothing else, so that a
resumed run mixes as an undisturbed one, and processes given the same seed draw the same share. Partners are of one
process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lipcert.data.torchvision import import_torchvision


class Mix:
    """Mix images (n, c, h, w) with labels (n,) of a batch, or leave both as they are where no α is positive.

    Args:
        mixup, cutmix: α of the two kinds; 0 is without.
        classes: how many there are.
    """

    def __init__(self, mixup: float, cutmix: float, classes: int) -> None:
        kinds: list[Callable[..., Any]] = []
        if mixup or cutmix:
            transforms = import_torchvision("transforms.v2")
            if mixup:
                kinds.append(transforms.MixUp(alpha=mixup, num_classes=classes))
            if cutmix:
                kinds.append(transforms.CutMix(alpha=cutmix, num_classes=classes))
        self.kinds = kinds

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the images and labels; mixed labels are (n, classes), each row of sum 1."""
        if not self.kinds:
            return images, labels
        generator = torch.default_generator  # torchvision draws from the global one, which is restored afterwards
        with torch.random.fork_rng(devices=[]):
            generator.manual_seed(seed)
            kind = self.kinds[int(torch.randint(len(self.kinds), ()))]
            mixed: tuple[Tensor, Tensor] = kind(images, labels)
        return mixed


def smooth(labels: Tensor, classes: int, share: float) -> Tensor:
    """Spread a `share` of each label evenly over all classes (Szegedy et al., CVPR 2016, arXiv 1512.00567).

    Labels are numbers (n,) or shares (n, classes). With a share of 0 they stay what they are.

    >>> smooth(torch.tensor([1]), 4, 0.2)
    tensor([[0.0500, 0.8500, 0.0500, 0.0500]])
    """
    if share == 0:
        return labels
    if labels.dim() == 1:
        labels = F.one_hot(labels, classes)
    return (1 - share) * labels + share / classes


def dominant(labels: Tensor) -> Tensor:
    """Return the class with the largest share of each label: (n, classes) or (n,) -> (n,).

    >>> dominant(torch.tensor([[0.3, 0.7], [0.6, 0.4]]))
    tensor([1, 0])
    """
    return labels.argmax(1) if labels.is_floating_point() else labels
