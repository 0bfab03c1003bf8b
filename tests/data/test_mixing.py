"""Mixed images are what their labels say, and the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from lipcert.data.mixing import Mix, dominant, smooth

CLASSES = 5


def batch(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images that are constant, each the number of its place, and their labels."""
    return torch.arange(n).float()[:, None, None, None].expand(n, 3, 8, 8).clone(), torch.arange(n) % CLASSES


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_labels_have_the_share_that_the_pixels_have(mixup: float, cutmix: float, seed: int) -> None:
    images, labels = batch()
    mixed, shares = Mix(mixup, cutmix, CLASSES)(images, labels, seed)
    assert shares.shape == (6, CLASSES) and torch.allclose(shares.sum(1), torch.ones(6))
    for i in range(6):  # the mean pixel is the same mean of both numbers as the label is of both classes
        share = shares[i, labels[i]].item()
        partner = (i - 1) % 6
        if labels[i] == labels[partner]:
            continue
        assert shares[i, labels[partner]].item() == pytest.approx(1 - share, abs=1e-6)
        assert mixed[i].mean().item() == pytest.approx(share * i + (1 - share) * partner, abs=1e-4)


def test_both_kinds_are_drawn_and_are_told_apart_by_their_pixels() -> None:
    images, labels = batch()
    kinds = set()
    for seed in range(20):
        mixed, _ = Mix(1.0, 1.0, CLASSES)(images, labels, seed)
        kinds.add("cutmix" if torch.isin(mixed, images).all() else "mixup")
    assert kinds == {"cutmix", "mixup"}


def test_the_seed_decides_and_the_global_generator_stays() -> None:
    images, labels = batch()
    mix = Mix(0.8, 1.0, CLASSES)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = mix(images, labels, 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again, other = mix(images, labels, 7), mix(images, labels, 8)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(images, batch()[0])  # what came in is left alone


def test_without_any_alpha_nothing_changes() -> None:
    images, labels = batch()
    mixed, same = Mix(0.0, 0.0, CLASSES)(images, labels, 0)
    assert mixed is images and same is labels


def test_smoothed_labels_give_the_cross_entropy_of_torch() -> None:
    logits, labels = torch.randn(6, CLASSES), batch()[1]
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
    for given in (labels, torch.nn.functional.one_hot(labels, CLASSES).float()):
        torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, smooth(given, CLASSES, 0.3)), expected)
    assert smooth(labels, CLASSES, 0.0) is labels
    assert torch.equal(dominant(smooth(labels, CLASSES, 0.3)), labels) and dominant(labels) is labels
