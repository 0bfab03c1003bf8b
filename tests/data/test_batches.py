from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lipcert.data import Dataset, loader
from lipcert.data.augment import Augment, draw, parse, shift_and_flip
from lipcert.errors import InputError


def numbered(n: int, size: int = 6, dtype: torch.dtype = torch.uint8) -> Dataset:
    """Image i has the label i, and its pixels tell it from all others."""
    images = torch.arange(n * 3 * size * size).reshape(n, 3, size, size).remainder(251).to(dtype)
    if dtype == torch.float32:
        images /= 255
    return Dataset(
        images=images, labels=torch.arange(n), classes=tuple(map(str, range(n))), name="numbered", split="train",
        img_size=size, in_chans=3, default_augment="shift2,flip",
    )


def collect(dataset: Dataset, size: int, **options) -> list[tuple[Tensor, Tensor]]:
    return list(loader(dataset, size, workers=0, **options))


def equal(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in zip(a, b, strict=True)
    )


def test_evaluation_batches_are_the_images_in_order() -> None:
    data = numbered(10)
    batches = loader(data, 4)
    assert len(batches) == len(list(batches)) == 3
    images = torch.cat([x for x, _ in batches])
    assert images.dtype == torch.float32
    assert torch.equal(images, data.images.float() / 255)
    assert torch.equal(torch.cat([y for _, y in batches]), torch.arange(10))
    assert [len(y) for _, y in loader(data, 4, drop_last=True)] == [4, 4]
    floats = numbered(10, dtype=torch.float32)
    assert torch.equal(collect(floats, 10)[0][0], floats.images)


@given(
    n=st.integers(1, 30), size=st.integers(1, 9), start=st.integers(0, 5), epoch=st.integers(0, 3),
    drop=st.booleans(), augment=st.sampled_from(["none", "default", "shift1", "flip"]),
)
def test_a_run_that_resumes_sees_the_batches_of_an_undisturbed_one(n, size, start, epoch, drop, augment) -> None:
    options = dict(shuffle=True, seed=3, epoch=epoch, drop_last=drop, augment=augment)
    whole = collect(numbered(n), size, **options)
    torch.rand(3)  # the global generator must not matter
    rest = loader(numbered(n), size, start_batch=start, **options)
    assert len(rest) == len(list(rest))
    assert equal(whole[start:], list(rest))


def test_epochs_and_seeds_differ_in_order_and_in_augmentation() -> None:
    data = numbered(40)
    base = collect(data, 40, shuffle=True, augment="default")
    for other in ({"epoch": 1}, {"seed": 1}):
        (x, y), (x2, y2) = base[0], collect(data, 40, shuffle=True, augment="default", **other)[0]
        assert not torch.equal(y, y2) and torch.equal(y.sort().values, y2.sort().values)
        assert not torch.equal(x[y.argsort()], x2[y2.argsort()])


def test_each_batch_is_augmented_by_draws_of_its_own() -> None:
    data = numbered(2).select(torch.zeros(64, dtype=torch.int64))  # one image, 64 times
    (first, _), (second, _) = collect(data, 32, augment="shift2")
    assert len(first.unique(dim=0)) > 10
    assert not torch.equal(first, second)


@given(world=st.integers(1, 4), n=st.integers(1, 40), drop=st.booleans())
def test_processes_share_the_batches_of_a_single_one(world: int, n: int, drop: bool) -> None:
    options = dict(shuffle=True, augment="default", drop_last=drop)
    alone = collect(numbered(n), 3 * world, **options)
    shares = [collect(numbered(n), 3, rank=rank, world=world, **options) for rank in range(world)]
    for step, (x, y) in enumerate(alone):
        for rank in range(min(world, len(y))):
            assert torch.equal(shares[rank][step][0], x[rank::world])
            assert torch.equal(shares[rank][step][1], y[rank::world])
    assert sum(len(y) for share in shares for _, y in share) == sum(len(y) for _, y in alone)
    for rank, share in enumerate(shares):
        assert len(share) == len(loader(numbered(n), 3, rank=rank, world=world, drop_last=drop))


def test_shift_moves_each_image_and_zeros_come_in() -> None:
    images = torch.arange(1, 10).reshape(1, 1, 3, 3).repeat(3, 1, 1, 1)
    draws = torch.tensor([[0, 1, 2], [1, 1, 0], [0, 0, 0]])  # top, left, mirror
    moved = shift_and_flip(images, Augment(shift=1), draws)
    assert moved[0, 0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert moved[1, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert moved[2, 0].tolist() == [[0, 4, 5], [0, 7, 8], [0, 0, 0]]


def test_flip_mirrors_left_and_right() -> None:
    images = torch.arange(6).reshape(1, 1, 2, 3).repeat(2, 1, 1, 1)
    flipped = shift_and_flip(images, Augment(flip=True), torch.tensor([[0, 0], [0, 0], [1, 0]]))
    assert flipped[0, 0].tolist() == [[2, 1, 0], [5, 4, 3]] and torch.equal(flipped[1], images[1])


def test_draws_cover_every_shift_and_both_sides() -> None:
    top, left, mirror = draw(Augment(shift=2, flip=True), 1000, torch.Generator().manual_seed(0))
    assert top.unique().tolist() == left.unique().tolist() == [0, 1, 2, 3, 4]
    assert 400 < int(mirror.sum()) < 600
    assert (top != left).float().mean() > 0.7  # drawn apart: equal in one of five


@pytest.mark.parametrize("name", ["randaugment", "trivialaugment", "autoaugment", "erasing"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_torchvision_augmentation_is_reproducible_image_by_image(name: str, dtype: torch.dtype, torchvision) -> None:
    data = numbered(12, size=16, dtype=dtype)
    before = torch.get_rng_state()
    whole = collect(data, 4, shuffle=True, augment=f"default,{name}")
    assert torch.equal(before, torch.get_rng_state())
    assert equal(whole[1:], collect(data, 4, shuffle=True, augment=f"default,{name}", start_batch=1))
    plain = collect(data, 4, shuffle=True, augment="default")
    assert all(torch.equal(y, y2) for (_, y), (_, y2) in zip(whole, plain, strict=True))
    assert not equal(whole, plain)
    assert all(x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1 for x, _ in whole)


def test_names_are_read_and_wrong_ones_refused() -> None:
    assert parse("none") == Augment()
    assert parse("default, erasing", default="shift4,flip") == Augment(shift=4, flip=True, extra=("erasing",))
    for wrong, near in (("randaug", "randaugment"), ("default,flop", "flip"), ("shift-1", "shift4")):
        with pytest.raises(InputError, match=f"did you mean '{near}'"):
            parse(wrong)


def test_arguments_that_cannot_be() -> None:
    with pytest.raises(InputError, match="batch size must be at least 1"):
        loader(numbered(3), 0)
    with pytest.raises(InputError, match="resizedcrop needs image files"):
        loader(numbered(3), 1, augment="resizedcrop")
    with pytest.raises(ValueError, match="rank 2 of 2"):
        loader(numbered(3), 1, rank=2, world=2)
