"""Segmentation sets: tiny folders in the layout of each distribution, what is read, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lipcert.cli import main
from lipcert.data import info, load, load_scenes, require_task, scene_loader
from lipcert.data.ade20k import ADE20K, with_foreground
from lipcert.data.scene_batches import PairTransform, at_stride
from lipcert.data.scenes import IGNORE, SceneFiles, ScenePixels, Scenes, lookup
from lipcert.errors import InputError
from lipcert.registry import datasets


def put(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def scene(image: Path, mask: Path, classes: np.ndarray, red: int = 0) -> None:
    """Write a pair; the green of a pixel is the value of its mask."""
    pixels = np.zeros((*classes.shape, 3))
    pixels[..., 0], pixels[..., 1] = red, classes
    put(image, pixels)
    put(mask, classes)


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    for part, n in (("train", 3), ("val", 2), ("test", 2)):
        for i in range(n):
            classes = (np.arange(12).reshape(3, 4) + i) % 12
            base = tmp_path / "camvid"
            scene(base / part / f"{i}.png", base / f"{part}annot" / f"{i}.png", classes, red=i)
    return tmp_path


def test_camvid_has_eleven_classes_and_void(camvid: Path) -> None:
    sizes = [len(load_scenes("camvid", camvid, split=split)) for split in ("train", "val", "test")]
    assert sizes == [3, 2, 2]
    scenes = load_scenes("camvid", camvid, split="train")
    image, mask = scenes.pairs[1]
    assert image.dtype == mask.dtype == torch.uint8 and image.shape == (3, 3, 4)
    assert image[0].unique().tolist() == [1]
    assert torch.equal(mask, torch.where(image[1] == 11, IGNORE, image[1]))
    assert (
        scenes.num_classes == 11 and scenes.classes[8] == "car" and (scenes.name, scenes.split) == ("camvid", "train")
    )


def test_camvid_with_four_classes(camvid: Path) -> None:
    scenes = load_scenes("camvid-four", camvid, split="test")
    assert scenes.classes == ("background", "plant", "person", "vehicle")
    assert scenes.pairs[0][1].tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [3, 2, 2, IGNORE]]


def test_cityscapes_maps_its_ids_to_nineteen_classes(tmp_path: Path) -> None:
    base = tmp_path / "cityscapes"
    for part, city, n in (("train", "aachen", 20), ("val", "lindau", 1)):
        for i in range(n):
            stem = f"{city}_00000{i:02d}_000019"
            classes = np.array([[7, 33, 0, 255], [19, 20, 29, 1]])
            image = base / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png"
            scene(image, base / "gtFine" / part / city / f"{stem}_gtFine_labelIds.png", classes)
    test = load_scenes("cityscapes", tmp_path, split="test")
    assert test.pairs[0][1].tolist() == [[0, 18, IGNORE, IGNORE], [6, 7, IGNORE, IGNORE]]
    assert (test.classes[0], test.classes[6], test.classes[18]) == ("road", "traffic light", "bicycle")
    train, val = (load_scenes("cityscapes", tmp_path, split=split) for split in ("train", "val"))
    assert (len(train), len(val)) == (18, 2) and not set(train.pairs.images) & set(val.pairs.images)


@pytest.fixture
def ade20k(tmp_path: Path) -> Path:
    base = tmp_path / "ADEChallengeData2016"
    for part in ("training", "validation"):
        for i, foreground in enumerate((0, 1, 2, 200)):
            classes = np.ones(200)
            classes[:foreground] = 13  # person
            classes[199] = 0
            name = f"ADE_{part}_{i}"
            # 99 percent background and 1 percent foreground is not enough: it must be more
            scene(base / "images" / part / f"{name}.jpg", base / "annotations" / part / f"{name}.png",
                  np.tile(classes.reshape(10, 20), (1, 1)), red=i)  # fmt: skip
    return tmp_path


def test_ade20k_counts_from_zero_and_ignores_what_is_unlabelled(ade20k: Path) -> None:
    test = load_scenes("ade20k", ade20k, split="test")
    assert len(test) == 4 and test.num_classes == 150
    mask = test.pairs[2][1].flatten()
    assert mask[:3].tolist() == [12, 12, 0] and mask[199] == IGNORE
    assert ADE20K[12] == "person" and ADE20K[149] == "flag" and len(set(ADE20K)) == 150
    assert [ADE20K.index(name) + 1 for name in ("tree", "grass", "plant", "flower", "animal", "bicycle", "ship")] == [
        5, 10, 18, 67, 127, 128, 104]  # fmt: skip


def test_four_classes_of_ade20k_leave_out_images_without_foreground(ade20k: Path) -> None:
    test = load_scenes("ade20k-four", ade20k, split="test")
    assert [file.stem[-1] for file in test.pairs.images] == ["3"]
    mask = test.pairs[0][1].flatten()
    assert mask[:199].unique().tolist() == [2] and mask[199] == 0
    kept = with_foreground(load_scenes("ade20k-four", ade20k, split="test").pairs, 0.5)
    assert len(kept) == 1
    with pytest.raises(InputError, match="no image has more than 100% of foreground"):
        with_foreground(kept, 1.0)


def test_oxford_pet_reads_its_lists(tmp_path: Path) -> None:
    base = tmp_path / "oxford-iiit-pet"
    for name in ("Abyssinian_1", "boxer_2", "boxer_3"):
        trimap = base / "annotations" / "trimaps" / f"{name}.png"
        scene(base / "images" / f"{name}.jpg", trimap, np.array([[1, 2], [3, 2]]))
    (base / "annotations" / "trainval.txt").write_text(
        "#Image CLASS-ID SPECIES BREED ID\nboxer_3 9 2 1\nboxer_2 9 2 1\n"
    )
    (base / "annotations" / "test.txt").write_text("Abyssinian_1 1 1 1\n")
    train = load_scenes("oxford-pet", tmp_path, val_fraction=0)
    assert [file.stem for file in train.pairs.images] == ["boxer_3", "boxer_2"]
    assert train.pairs[0][1].tolist() == [[0, 1], [2, 1]] and train.classes == ("pet", "background", "border")
    (base / "annotations" / "test.txt").unlink()
    with pytest.raises(InputError, match="test.txt is missing; unpack annotations.tar.gz again"):
        load_scenes("oxford-pet", tmp_path, split="test")


def _remove_a_mask(base: Path) -> None:
    (base / "testannot" / "1.png").unlink()


def _crop_a_mask(base: Path) -> None:
    put(base / "testannot" / "1.png", np.zeros((3, 5)))


def _damage(base: Path) -> None:
    file = base / "testannot" / "1.png"
    file.write_bytes(file.read_bytes()[:-30])


def _replace_by_text(base: Path) -> None:
    (base / "test" / "1.png").write_text("no image")


def _use_an_unknown_value(base: Path) -> None:
    put(base / "testannot" / "1.png", np.full((3, 4), 12))


def _save_colours(base: Path) -> None:
    put(base / "testannot" / "1.png", np.zeros((3, 4, 3)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_remove_a_mask, r"the mask \S*testannot/1.png is missing; unpack the data set again$"),
        (_crop_a_mask, r"testannot/1.png has 5x3 pixels and its image \S*test/1.png 4x3; they are not a pair$"),
        (_damage, r"testannot/1.png is not a readable image \(.*\); replace it$"),
        (_replace_by_text, r"test/1.png is not a readable image \(.*\); replace it$"),
        (_use_an_unknown_value, r"testannot/1.png has the value 12, which is no class of this data set$"),
        (_save_colours, r"testannot/1.png is no mask: its pixels are RGB, and a class is one byte; replace it$"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_pairs_that_are_none(camvid: Path, spoil: Callable[[Path], None], message: str, workers: int) -> None:
    spoil(camvid / "camvid")
    with pytest.raises(InputError, match=message) as error:
        list(scene_loader(load_scenes("camvid", camvid, split="test"), 2, workers=workers))
    assert "\n" not in str(error.value)


def test_scaling_keeps_image_and_mask_together(tmp_path: Path) -> None:
    """Halves of 60 x 80: scaled to any size, the border stays in the middle and no class is made up."""
    classes = np.repeat([[3, 9]], 40, axis=1).repeat(60, axis=0)
    scene(tmp_path / "0.png", tmp_path / "m.png", classes * 10)
    table = lookup({30: 3, 90: 9})
    for size in ((30, 40), (15, 100), (77, 20)):
        image, mask = SceneFiles((tmp_path / "0.png",), (tmp_path / "m.png",), table, size)[0]
        half = size[1] // 2
        assert image.shape[1:] == mask.shape == size and sorted(mask.unique().tolist()) == [3, 9]
        assert mask[:, :half].eq(3).all() and mask[:, half:].eq(9).all()
        assert image[1, :, : half - 2].eq(30).all() and image[1, :, half + 2 :].eq(90).all()


@given(st.integers(1, 23), st.integers(1, 23), st.integers(1, 9))
def test_masks_at_a_stride_take_the_class_in_the_middle(height: int, width: int, stride: int) -> None:
    masks = torch.arange(2 * height * width).view(2, height, width)
    small = at_stride(masks, stride)
    assert small.shape == (2, -(-height // stride), -(-width // stride))
    rows, columns = (
        [min(i * stride + stride // 2, side - 1) for i in range(-(-side // stride))] for side in (height, width)
    )
    assert small[1].tolist() == [[height * width + i * width + j for j in columns] for i in rows]


@pytest.fixture
def pixels() -> Scenes:
    """Pairs in which each pixel's red is its class, so that a change of one without the other shows."""
    masks = torch.randint(1, 12, (10, 12, 16), dtype=torch.uint8)
    images = torch.stack([masks, masks, masks], dim=1)
    return Scenes(ScenePixels(images, masks), ("a",) * 12, "synthetic", "train", "crop,flip")


@pytest.mark.parametrize("augment", ["flip", "crop", "crop,flip", "default"])
def test_images_and_masks_change_together(pixels: Scenes, torchvision, augment: str) -> None:
    (images, masks), *_ = scene_loader(pixels, 10, augment=augment, seed=3, workers=0)
    assert images.shape == (10, 3, 12, 16) and masks.shape == (10, 12, 16)
    assert images.dtype == torch.float32 and masks.dtype == torch.int64
    red = (images[:, 0] * 255).round().long()
    outside = masks == IGNORE
    assert (red[outside] == 0).all()
    if augment == "flip":
        assert torch.equal(red, masks) and not torch.equal(masks, pixels.pairs.masks.long())
        mirrored = [
            not torch.equal(mask, before) for mask, before in zip(masks, pixels.pairs.masks.long(), strict=True)
        ]
        assert 0 < sum(mirrored) < 10
    else:
        assert outside.any() and set(masks.unique().tolist()) <= {*range(1, 12), IGNORE}


def test_crops_keep_image_and_mask_aligned(torchvision) -> None:
    """Large constant areas: away from their borders, the scaled image still shows its class."""
    mask = torch.arange(4, dtype=torch.uint8).repeat_interleave(32).expand(96, 128).contiguous()
    image = (mask * 60).expand(3, -1, -1).contiguous()
    for seed in range(8):
        moved, classes = PairTransform(("crop", "flip"))(image, mask, seed)
        inside = classes != IGNORE
        assert inside.any() and moved.shape[1:] == classes.shape == mask.shape
        agree = (moved[0].float() / 60).round()[inside] == classes[inside]
        assert agree.float().mean() > 0.9


def test_colour_changes_the_image_only(pixels: Scenes, torchvision) -> None:
    (images, masks), *_ = scene_loader(pixels, 10, augment="color", workers=0)
    assert torch.equal(masks, pixels.pairs.masks.long())
    assert not torch.equal((images[:, 0] * 255).round().long(), masks)


def test_batches_depend_on_seed_and_epoch_only(camvid: Path, torchvision) -> None:
    train = load_scenes("camvid", camvid, img_size=(24, 32))

    def batches(**options):
        return list(scene_loader(train, 2, shuffle=True, augment="default", epoch=1, **options))

    state = torch.get_rng_state()
    alone, helped, late = batches(workers=0), batches(workers=2), batches(workers=0, start_batch=1)
    assert torch.equal(torch.get_rng_state(), state)
    for (x, y), (x2, y2) in [*zip(alone, helped, strict=True), *zip(alone[1:], late, strict=True)]:
        assert torch.equal(x, x2) and torch.equal(y, y2)
    in_memory = list(scene_loader(train.in_memory(), 2, shuffle=True, augment="default", epoch=1, workers=0))
    assert all(torch.equal(y, y2) for (_, y), (_, y2) in zip(alone, in_memory, strict=True))
    shares = [list(scene_loader(train, 1, shuffle=True, augment="flip", epoch=1, rank=r, world=2, workers=0))
              for r in (0, 1)]  # fmt: skip
    whole = list(scene_loader(train, 2, shuffle=True, augment="flip", epoch=1, workers=0))
    assert torch.equal(torch.cat([shares[0][0][0], shares[1][0][0]]), whole[0][0])
    assert [len(share) for share in shares] == [2, 1] and len(whole) == 2


def test_masks_come_at_the_stride_of_the_logits(camvid: Path) -> None:
    scenes = load_scenes("camvid", camvid, split="test", img_size=8)
    (images, masks), *_ = scene_loader(scenes, 2, mask_stride=4, workers=0)
    (_, full), *_ = scene_loader(scenes, 2, workers=0)
    assert images.shape == (2, 3, 8, 8) and torch.equal(masks, full[:, 2::4, 2::4])


def test_images_of_two_sizes_need_one(camvid: Path) -> None:
    scene(camvid / "camvid/test/2.png", camvid / "camvid/testannot/2.png", np.zeros((5, 4)))
    scenes = load_scenes("camvid", camvid, split="test")
    with pytest.raises(InputError, match="images of 3x4 and 5x4 pixels do not go into one batch; choose an img_size"):
        list(scene_loader(scenes, 3, workers=0))
    with pytest.raises(InputError, match="do not go into one batch"):
        scenes.in_memory()
    assert len(scenes.first(2).in_memory()) == 2


def test_wrong_arguments_are_refused(camvid: Path) -> None:
    scenes = load_scenes("camvid", camvid, split="test")
    with pytest.raises(InputError, match="unknown augmentation of segmentation 'flop'; did you mean 'flip'"):
        scene_loader(scenes, 1, augment="flop")
    with pytest.raises(InputError, match="mask stride must be at least 1"):
        scene_loader(scenes, 1, mask_stride=0)
    with pytest.raises(InputError, match="img_size must be a side or"):
        load_scenes("camvid", camvid, img_size=(0, 4))
    with pytest.raises(InputError, match="camvid is not there: .*camvid/train is missing; put the folders of CamVid/"):
        load_scenes("camvid", camvid / "elsewhere")


@pytest.mark.parametrize("name", datasets.list())
def test_sources_describe_themselves(name: str) -> None:
    source = info(name)
    assert source.name == name and len(source.shape) == 3 and source.get


def test_tasks_are_kept_apart(camvid: Path) -> None:
    with pytest.raises(
        InputError, match=r"^dataset camvid is for segmentation, and this is classification; choose one"
    ):
        load("camvid", camvid)
    with pytest.raises(InputError, match=r"^dataset digits is for classification, and this is segmentation; .*camvid"):
        load_scenes("digits")
    with pytest.raises(InputError, match="has one label an image"):
        require_task("folder:x", "segmentation")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--model", "lipshift_tiny", "--data", "camvid", "-o", "RUN"],
        ["certify", "lipshift_tiny", "--data", "camvid", "-o", "RUN"],
        ["attack", "lipshift_tiny", "--data", "camvid", "--eps", "0.1", "-o", "RUN"],
        ["train", "--model", "segformer_b0", "--data", "digits", "-o", "RUN"],
    ],
)
def test_commands_refuse_data_of_another_task(
    camvid: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIPCERT_DATA", str(camvid))
    with pytest.raises(SystemExit) as code:
        main([str(camvid / "run") if word == "RUN" else word for word in arguments])
    assert code.value.code == 2
    said = capsys.readouterr().err
    assert re.search(r"is for (\w+), and this is (?!\1)\w+; choose one of", said) and "Traceback" not in said
    assert not (camvid / "run" / "config.yaml").exists()
