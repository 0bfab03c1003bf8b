"""The 8x8 handwritten digits that come with scikit-learn (UCI ML hand-written digits, test part): offline, 1797 images.

There is no official split. 360 images are the test set, drawn once per class in proportion with a fixed seed, so that
every run and every certificate speaks of the same images. Pixels are 0 … 16 and are divided by 16.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lipcert.data.record import Samples, Source
from lipcert.registry import datasets

_TEST = 360


@datasets.register()
def digits() -> Source:
    """The digits: 8x8, one channel, no default augmentation (they fill the image; "shift1" is available)."""
    return Source(
        name="digits",
        num_classes=10,
        img_size=8,
        in_chans=1,
        sizes=(1797 - _TEST, _TEST),
        read=_read,
        get="comes with scikit-learn",
        val_fraction=0.15,
    )


def _read(root: Path, part: str, download: bool, img_size: int) -> Samples:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32).div_(16).unsqueeze(1)  # (1797, 1, 8, 8)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    parts = train_test_split(range(len(labels)), test_size=_TEST, stratify=bunch.target, random_state=0)
    indices = torch.tensor(sorted(parts[0 if part == "train" else 1]))
    return Samples(images[indices], labels[indices], tuple(str(digit) for digit in range(10)))
