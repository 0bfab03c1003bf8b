"""Images in folders: one folder per class (`folder:PATH`), and Tiny-ImageNet, which has a layout of its own.

`folder:PATH` is PATH/train and PATH/test, each with one folder per class; PATH/val is the validation split where it
exists, and the test split where there is no PATH/test. Or it is PATH itself with one folder per class: then a fifth
of the images, drawn with a fixed seed, are the test split.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from lipcert.data.images import ImageFiles
from lipcert.data.record import Samples, Source
from lipcert.errors import InputError
from lipcert.registry import datasets

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))
_TEST_FRACTION = 0.2


def folder(path: str) -> Source:
    """Return the source of `folder:PATH`. Looks at folders and file names; no image is opened."""
    base = Path(path).expanduser()
    if not base.is_dir():
        raise InputError(f"there is no folder {base}; folder:PATH needs PATH/train/CLASS/IMAGE or PATH/CLASS/IMAGE")
    split = (base / "train").is_dir()
    places = {part: base / part for part in ("train", "val", "test") if (base / part).is_dir()} if split else {}
    if split and "test" not in places:
        if "val" not in places:
            raise InputError(f"{base} has train/ but no test/ and no val/; add one, or leave out train/")
        places["test"] = places.pop("val")

    def read(root: Path, part: str, download: bool, img_size: int) -> Samples:
        if not split:
            return _fifth(read_classes(base, img_size), part)
        return read_classes(places[part], img_size, class_names(places["train"]))

    train, test = (read(base, part, False, 224) for part in ("train", "test"))
    return Source(
        name=f"folder:{path}",
        num_classes=len(train.classes),
        img_size=224,
        in_chans=3,
        sizes=(len(train.labels), len(test.labels)),
        read=read,
        parts=tuple(places) if split else ("train", "test"),
        resizes=True,
        augment="resizedcrop,flip",
    )


@datasets.register("tiny-imagenet")
def tiny_imagenet() -> Source:
    return Source(
        name="tiny-imagenet",
        num_classes=200,
        img_size=64,
        in_chans=3,
        sizes=(100000, 10000),
        read=_read_tiny_imagenet,
        needs=("tiny-imagenet-200/train", "tiny-imagenet-200/val"),
        get="unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip there",
        resizes=True,
        augment="shift4,flip",
    )


def class_names(place: Path) -> tuple[str, ...]:
    """Return the names of the class folders, sorted; no class folder raises InputError."""
    names = sorted(entry.name for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{place} has no class folders; expected are images as {place}/CLASS/IMAGE")
    return tuple(names)


def read_classes(place: Path, img_size: int, classes: tuple[str, ...] | None = None) -> Samples:
    """Read a folder of class folders, everything in sorted order; `classes` numbers them, if not their own order."""
    found = class_names(place)
    classes = classes or found
    extra = sorted(set(found) - set(classes))
    if extra:
        raise InputError(f"{place} has class folders that are not in train: {', '.join(extra[:3])}")
    files: list[Path] = []
    labels: list[int] = []
    for name in found:
        images = [file for file in sorted((place / name).rglob("*")) if file.suffix.lower() in _SUFFIXES]
        files += images
        labels += [classes.index(name)] * len(images)
    if not files:
        kinds = Counter(file.suffix for name in found for file in (place / name).iterdir())
        raise InputError(f"the class folders of {place} hold no images, only {dict(kinds) or 'nothing'}")
    return Samples(ImageFiles(tuple(files), img_size), torch.tensor(labels, dtype=torch.int64), classes)


def _fifth(samples: Samples, part: str) -> Samples:
    """Split one folder: the first fifth of a fixed permutation is for testing, the rest for training; in file order."""
    order = torch.randperm(len(samples.labels), generator=torch.Generator().manual_seed(0))
    cut = max(1, round(_TEST_FRACTION * len(order)))
    return samples.select((order[:cut] if part == "test" else order[cut:]).sort().values)


def _read_tiny_imagenet(root: Path, part: str, download: bool, img_size: int) -> Samples:
    """Read train/CLASS/images/*, and as the test split val/images/* with its classes in val/val_annotations.txt.

    The labels of the real test images are not public. A val folder that was sorted into class folders is read as such.
    """
    base = root / "tiny-imagenet-200"
    if part == "train":
        return read_classes(base / "train", img_size)
    classes = class_names(base / "train")
    annotations = base / "val" / "val_annotations.txt"
    if not (base / "val" / "images").is_dir():
        return read_classes(base / "val", img_size, classes)
    if not annotations.is_file():
        raise InputError(f"{annotations} is missing; unpack tiny-imagenet-200.zip again")
    rows = [line.split("\t") for line in annotations.read_text().splitlines()]
    strangers = sorted({row[1] for row in rows} - set(classes))
    if strangers:
        raise InputError(f"{annotations} names the class {strangers[0]}, which has no folder in {base / 'train'}")
    files = tuple(base / "val" / "images" / row[0] for row in rows)
    labels = torch.tensor([classes.index(row[1]) for row in rows], dtype=torch.int64)
    return Samples(ImageFiles(files, img_size), labels, classes)
