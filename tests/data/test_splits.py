from __future__ import annotations

from collections import Counter

import pytest
import torch
from sklearn.datasets import load_digits

from lipcert.data import data_root, info, load
from lipcert.errors import InputError


def digits(split: str, **options):
    return load("digits", split=split, **options)


def test_digits_are_the_ones_of_scikit_learn_each_once() -> None:
    parts = [digits(split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1221, 216, 360]
    ours = torch.cat([torch.cat((part.images.flatten(1), part.labels[:, None]), 1) for part in parts])
    bunch = load_digits()
    theirs = torch.cat((torch.from_numpy(bunch.data) / 16, torch.from_numpy(bunch.target)[:, None]), 1)
    assert Counter(map(tuple, ours.tolist())) == Counter(map(tuple, theirs.tolist()))


def test_digits_test_images_do_not_depend_on_anything() -> None:
    test = digits("test", seed=5, val_fraction=0.5)
    assert torch.equal(test.images, digits("test").images)
    # in proportion: 174 to 183 of the 1797 images are of each class
    assert set(test.labels.bincount().tolist()) <= {34, 35, 36, 37}
    assert test.labels[:12].tolist() == load_digits().target[_first_test_indices(12)].tolist()


def _first_test_indices(n: int) -> list[int]:
    """Find the first test images in the whole set again, by their pixels."""
    whole = torch.from_numpy(load_digits().images).float().div(16).unsqueeze(1)
    return [int((whole == image).all(dim=(1, 2, 3)).nonzero()[0]) for image in digits("test").images[:n]]


def test_record_of_digits() -> None:
    train = digits("train")
    assert (train.name, train.split, train.img_size, train.in_chans, train.num_classes) == ("digits", "train", 8, 1, 10)
    assert train.images.dtype == torch.float32 and train.images.min() == 0.0 and train.images.max() == 1.0
    assert list(train.classes) == [str(i) for i in range(10)]
    source = info("digits")
    assert source.sizes == (1437, 360) and (source.img_size, source.in_chans, source.num_classes) == (8, 1, 10)


def test_validation_split_depends_on_the_seed_and_nothing_else() -> None:
    assert torch.equal(digits("val", seed=1).images, digits("val", seed=1).images)
    assert not torch.equal(digits("val", seed=1).images, digits("val", seed=2).images)
    torch.manual_seed(7)
    assert torch.equal(digits("val").images, digits("val", seed=0).images)


def test_validation_fraction() -> None:
    assert len(digits("val", val_fraction=0.1)) == 144 and len(digits("train", val_fraction=0.1)) == 1437 - 144
    assert len(digits("train", val_fraction=0)) == 1437
    with pytest.raises(InputError, match="leaves none of 1437 images"):
        digits("val", val_fraction=0)
    with pytest.raises(InputError, match="at least 0 and below 1, got 1.0"):
        digits("train", val_fraction=1.0)


def test_select_and_first_keep_images_with_their_labels() -> None:
    test = digits("test")
    some = test.select(torch.tensor([5, 2]))
    assert torch.equal(some.images[1], test.images[2]) and some.labels.tolist() == test.labels[[5, 2]].tolist()
    assert len(test.first(7)) == 7 and len(test.first(None)) == 360 and len(test.first(10**6)) == 360
    assert torch.equal(test.first(7).to("cpu").images, test.images[:7])


def test_wrong_names_and_sizes() -> None:
    with pytest.raises(InputError, match="unknown dataset 'digts'; did you mean 'digits'?"):
        load("digts")
    with pytest.raises(InputError, match="unknown split 'valid'; the splits are train, val, test"):
        load("digits", split="valid")
    with pytest.raises(InputError, match="images of 8 pixels a side; leave out img_size 32"):
        load("digits", img_size=32)


def test_root_comes_from_the_argument_the_environment_or_the_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("LIPCERT_DATA", str(tmp_path))
    assert data_root("/else").as_posix() == "/else" and data_root() == tmp_path
    monkeypatch.delenv("LIPCERT_DATA")
    assert data_root().parts[-2:] == (".cache", "lipcert") and data_root().is_absolute()


@pytest.mark.parametrize(
    ("name", "place", "remedy"),
    [
        ("cifar10", "cifar-10-batches-py", "fetch it with --download"),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte", "fetch it with --download"),
        ("tiny-imagenet", "tiny-imagenet-200/train", "tiny-imagenet-200.zip"),
        ("imagenet", "imagenet/train", "image-net.org"),
    ],
)
def test_missing_data_say_where_they_belong_and_how_to_get_them(tmp_path, name, place, remedy) -> None:
    with pytest.raises(InputError) as caught:
        load(name, tmp_path)
    message = str(caught.value)
    assert f"{tmp_path / place} is missing" in message and remedy in message and "--data-root" in message
    assert "\n" not in message
