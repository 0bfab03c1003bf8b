"""ADE20K as its scene parsing challenge distributes it: 150 classes, and a reduction to four.

Masks hold 1 … 150, and 0 where nothing is labelled. "test" is the published validation part; the test labels are not
public.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from lipcert.data.record import Source
from lipcert.data.scenes import IGNORE, SceneFiles, Scenes, lookup, pairs_of
from lipcert.data.segmentation import FOUR
from lipcert.errors import InputError
from lipcert.registry import datasets

ADE20K = tuple(
    name.strip()
    for name in """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop,
stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
chandelier, awning, streetlight, booth, television, airplane, dirt track, apparel, pole, land, bannister, escalator,
ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool,
stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot,
animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan,
pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
""".split(",")
)
_FOUR = {
    **dict.fromkeys(("tree", "grass", "plant", "flower"), 1),
    **dict.fromkeys(("person", "animal"), 2),
    **dict.fromkeys(("car", "boat", "truck", "airplane", "van", "ship", "bicycle"), 3),
}
_FOREGROUND = 0.01


@datasets.register(task="segmentation")
def ade20k() -> Source:
    """ADE20K, 150 classes; unlabelled pixels don't count."""
    numbers = {value + 1: value for value in range(len(ADE20K))}
    return _source("ade20k", ADE20K, partial(_read, numbers, None))


@datasets.register("ade20k-four", task="segmentation")
def ade20k_four() -> Source:
    """ADE20K with four classes: background, plant, person or animal, vehicle; only images with over 1 % foreground.

    Unlabelled pixels are background here, as in the course exercise that this reduction comes from. To find the images,
    every mask is read once when the set is loaded.
    """
    numbers = {0: 0} | {value + 1: _FOUR.get(name, 0) for value, name in enumerate(ADE20K)}
    return _source("ade20k-four", FOUR, partial(_read, numbers, _FOREGROUND))


def _source(name: str, classes: tuple[str, ...], read: partial[Scenes]) -> Source:
    base = "ADEChallengeData2016"
    parts = ("training", "validation")
    return Source(
        name=name,
        num_classes=len(classes),
        img_size=512,
        in_chans=3,
        sizes=(20210, 2000),
        read=partial(read, classes),
        needs=tuple(f"{base}/{kind}/{part}" for kind in ("images", "annotations") for part in parts),
        get="unpack http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip there",
        resizes=True,
        augment="crop,flip,color",
        val_fraction=0.05,
    )


def _read(
    numbers: Mapping[int, int],
    least: float | None,
    classes: tuple[str, ...],
    root: Path,
    part: str,
    download: bool,
    size: tuple[int, int] | None,
) -> Scenes:
    base, folder = root / "ADEChallengeData2016", "training" if part == "train" else "validation"
    images = sorted((base / "images" / folder).glob("*.jpg"))
    masks = [base / "annotations" / folder / f"{image.stem}.png" for image in images]
    pairs = pairs_of(images, masks, lookup(numbers, ignored=[0]), size)
    return Scenes(pairs if least is None else with_foreground(pairs, least), classes)


def with_foreground(pairs: SceneFiles, least: float) -> SceneFiles:
    """Return the pairs of whose pixels a share greater than `least` is of another class than 0; none raises InputError.

    The masks are taken as the files hold them, before they are scaled.
    """

    def enough(index: int) -> bool:
        mask = pairs.mask(index)
        return int(((mask != 0) & (mask != IGNORE)).sum()) > least * mask.numel()

    with ThreadPoolExecutor() as threads:
        kept = torch.tensor(list(threads.map(enough, range(len(pairs)))))
    if not bool(kept.any()):
        raise InputError(f"no image has more than {least:.0%} of foreground; choose the set with all classes")
    return pairs.select(kept.nonzero()[:, 0].tolist())
