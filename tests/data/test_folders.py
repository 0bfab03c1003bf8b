from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from lipcert.data import info, load, loader
from lipcert.errors import InputError


def write(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_tiny_imagenet_reads_its_validation_classes_from_the_list(tmp_path: Path) -> None:
    base = tmp_path / "tiny-imagenet-200"
    for number, name in enumerate(("n01", "n02", "n03")):
        for i in range(10):
            write(base / "train" / name / "images" / f"{name}_{i}.png", (number, i, 0))
        (base / "train" / name / f"{name}_boxes.txt").write_text("")
    for i, name in enumerate(("n03", "n01")):
        write(base / "val" / "images" / f"val_{i}.png", (100 + i, 0, 0))
        with open(base / "val" / "val_annotations.txt", "a") as file:
            file.write(f"val_{i}.png\t{name}\t0\t0\t62\t62\n")
    test = load("tiny-imagenet", tmp_path, split="test")
    assert test.labels.tolist() == [2, 0] and test.num_classes == 3
    assert [image[0, 0, 0].item() for image in test.images] == [100, 101]
    train = load("tiny-imagenet", tmp_path, val_fraction=0)
    assert len(train) == 30 and train.images[12].shape == (3, 64, 64)
    assert train.images[12][:, 5, 5].tolist() == [1, 2, 0] and train.labels[12] == 1
    (base / "val" / "val_annotations.txt").write_text("val_0.png\tn99\t0\t0\t62\t62\n")
    with pytest.raises(InputError, match="names the class n99, which has no folder"):
        load("tiny-imagenet", tmp_path, split="test")


def test_folder_with_train_and_test(tmp_path: Path) -> None:
    for part, n in (("train", 10), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(n):
                write(tmp_path / part / name / f"{i}.png", (label, i, 0))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    name = f"folder:{tmp_path}"
    assert info(name).sizes == (20, 6) and info(name).num_classes == 2
    test = load(name, split="test", img_size=64)
    assert test.labels.tolist() == [0] * 3 + [1] * 3 and list(test.classes) == ["cat", "dog"] and test.img_size == 64
    assert (len(load(name)), len(load(name, split="val"))) == (18, 2)


def test_folder_with_its_own_validation_part(tmp_path: Path) -> None:
    for part, n in (("train", 4), ("val", 3), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(n):
                write(tmp_path / part / name / f"{i}.png", (i, 0, 0))
    sizes = [len(load(f"folder:{tmp_path}", split=split)) for split in ("train", "val", "test")]
    assert sizes == [8, 6, 4]


def test_without_test_the_validation_folder_is_the_test_split(tmp_path: Path) -> None:
    for part, n in (("train", 10), ("val", 3)):
        for name in ("cat", "dog"):
            for i in range(n):
                write(tmp_path / part / name / f"{i}.png", (i, 0, 0))
    sizes = [len(load(f"folder:{tmp_path}", split=split)) for split in ("train", "val", "test")]
    assert sizes == [18, 2, 6]


def test_one_folder_is_split_the_same_way_every_time(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for i in range(10):
            write(tmp_path / name / f"{i}.png", (i, 0, 0))
    name = f"folder:{tmp_path}"
    files = {split: set(load(name, split=split, seed=3).images.files) for split in ("train", "val", "test")}
    assert [len(files[split]) for split in ("train", "val", "test")] == [14, 2, 4]
    assert len(files["train"] | files["val"] | files["test"]) == 20
    assert set(load(name, split="test", seed=4).images.files) == files["test"]
    assert set(load(name, split="val", seed=4).images.files) != files["val"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ([], "there is no folder"),
        (["train/cat/0.png"], "has train/ but no test/ and no val/"),
        (["notes.txt"], "has no class folders; expected are images as"),
        (["cat/notes.txt"], "hold no images, only"),
        (["train/cat/0.png", "test/cow/0.png"], "class folders that are not in train: cow"),
    ],
)
def test_folders_that_cannot_be_read(tmp_path: Path, make: list[str], message: str) -> None:
    for name in make:
        if name.endswith(".png"):
            write(tmp_path / "images" / name, (0, 0, 0))
        else:
            (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "images" / name).write_text("")
    with pytest.raises(InputError, match=message):
        load(f"folder:{tmp_path / 'images'}", split="test")


def test_images_are_scaled_by_the_shorter_side_and_cut_to_the_centre(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), (0, 0, 0))
    image.paste((255, 0, 0), (100, 0, 200, 100))  # the middle third is red
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "0.png")
    write(tmp_path / "b" / "0.png", (9, 9, 9), size=(50, 70))
    files = [load(f"folder:{tmp_path}", split=split, val_fraction=0, img_size=50).images for split in ("train", "test")]
    images = {file.parent.name: part[i] for part in files for i, file in enumerate(part.files)}
    assert images["a"].shape == images["b"].shape == (3, 50, 50)
    assert images["a"][0, :, 2:48].min() > 240 and images["a"][1].max() < 10
    assert images["b"].unique().tolist() == [9]
    large = load(f"folder:{tmp_path}", split="test", img_size=224).images[0]
    assert large.shape == (3, 224, 224)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"^\S*0.png is not a readable image \(.*\); replace it$"):
            next(iter(loader(load(f"folder:{tmp_path}", split="test"), batch_size=1, workers=workers)))


def test_batches_of_files_are_the_same_with_any_number_of_workers(tmp_path: Path, torchvision) -> None:
    for name in ("a", "b"):
        for i in range(8):
            write(tmp_path / name / f"{i}.png", (i * 30, 255 - i * 30, 7), size=(40 + i, 50))
    train = load(f"folder:{tmp_path}", val_fraction=0, img_size=32)

    def batches(**options):
        return list(loader(train, 5, shuffle=True, augment="default", epoch=2, **options))

    alone, helped, late = batches(workers=0), batches(workers=2), batches(workers=0, start_batch=1)
    assert [len(labels) for _, labels in alone] == [5, 5, 3]
    for (x, y), (x2, y2) in zip(alone, helped, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    for (x, y), (x2, y2) in zip(alone[1:], late, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    images, _ = alone[0]
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1
