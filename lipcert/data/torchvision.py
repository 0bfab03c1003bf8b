"""Data sets that torchvision reads: MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 in memory, ImageNet from its folders.

torchvision's own integrity checks stay on: CIFAR is stored as pickles, which are opened only if their MD5 is the
published one. ImageNet is read as two folders of classes, without the development kit that torchvision's class asks
for.
"""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lipcert.data.folders import class_names, read_classes
from lipcert.data.record import Samples, Source
from lipcert.errors import InputError
from lipcert.registry import datasets

_IDX = ("images-idx3-ubyte", "labels-idx1-ubyte")


@datasets.register()
def mnist() -> Source:
    return _mnist_like("mnist", "MNIST", augment="shift2")


@datasets.register("fashion-mnist")
def fashion_mnist() -> Source:
    return _mnist_like("fashion-mnist", "FashionMNIST", augment="shift2")


@datasets.register()
def cifar10() -> Source:
    return _cifar("cifar10", "CIFAR10", 10, "cifar-10-batches-py")


@datasets.register()
def cifar100() -> Source:
    return _cifar("cifar100", "CIFAR100", 100, "cifar-100-python")


@datasets.register()
def imagenet() -> Source:
    def read(root: Path, part: str, download: bool, img_size: int) -> Samples:
        classes = class_names(root / "imagenet" / "train")
        return read_classes(root / "imagenet" / ("train" if part == "train" else "val"), img_size, classes)

    return Source(
        name="imagenet",
        num_classes=1000,
        img_size=224,
        in_chans=3,
        sizes=(1281167, 50000),
        read=read,
        needs=("imagenet/train", "imagenet/val"),
        get="get ILSVRC2012 from https://image-net.org and unpack train/ and val/ there, a folder per class in each",
        resizes=True,
        augment="resizedcrop,flip",
        val_fraction=0.01,
    )


def _mnist_like(name: str, kind: str, augment: str) -> Source:
    return Source(
        name=name,
        num_classes=10,
        img_size=28,
        in_chans=1,
        sizes=(60000, 10000),
        read=partial(_in_memory, kind),
        needs=tuple(f"{kind}/raw/{part}-{what}" for part in ("train", "t10k") for what in _IDX),
        get=f"put the four unpacked files of {kind} there",
        downloads=True,
        augment=augment,
    )


def _cifar(name: str, kind: str, num_classes: int, place: str) -> Source:
    return Source(
        name=name,
        num_classes=num_classes,
        img_size=32,
        in_chans=3,
        sizes=(50000, 10000),
        read=partial(_in_memory, kind),
        needs=(place,),
        get="unpack the Python version from https://www.cs.toronto.edu/~kriz/cifar.html there",
        downloads=True,
        augment="shift4,flip",
    )


def _in_memory(kind: str, root: Path, part: str, download: bool, img_size: int) -> Samples:
    """Read one of torchvision's in-memory classes as a uint8 tensor (n, c, h, w)."""
    classes = import_torchvision("datasets")
    try:
        read = getattr(classes, kind)(root=str(root), train=part == "train", download=download)
        images = torch.as_tensor(read.data)  # (n, h, w) or (n, h, w, 3)
    except (RuntimeError, OSError, ValueError, AssertionError, EOFError) as error:
        done = "fetched to" if download else "read below"
        raise InputError(f"{kind} could not be {done} {root}: {error or 'its files are damaged'}") from error
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(read.targets, dtype=torch.int64)
    return Samples(images, labels, tuple(str(name) for name in read.classes))


def import_torchvision(module: str) -> Any:
    """Import a module of torchvision when it is needed; one that does not fit the installed torch raises InputError."""
    try:
        return importlib.import_module(f"torchvision.{module}")
    except (ImportError, RuntimeError) as error:  # RuntimeError: a build for another version of torch
        raise InputError(
            f"torchvision cannot be imported ({error}); install the build that belongs to torch {torch.__version__}"
        ) from error
