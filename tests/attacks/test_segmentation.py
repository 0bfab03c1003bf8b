"""Attacks on segmentation: losses against their definitions, points inside ball and box, and what is attainable."""

from __future__ import annotations

import copy
import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn

from lipcert.attacks.segmentation import (
    ATTACKS,
    IGNORE,
    LOSSES,
    SceneAttacked,
    SceneEnsemble,
    attack_scenes,
    losses,
    worst_accuracy,
    worst_miou,
)
from lipcert.segment import certify_scenes, clearances, count


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_their_definitions(name: str) -> None:
    """Pixel by pixel in numpy, for one image with two void pixels."""
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 3, 5, dtype=torch.float64) * 3
    labels = torch.randint(0, 4, (1, 3, 5))
    labels[0, 0, :2] = IGNORE
    weight, progress = torch.tensor([1.0, 0.5, 0.1, 0.01], dtype=torch.float64), 0.6
    total, valid = 0.0, 0
    for i, j in product(range(3), range(5)):
        y, z = int(labels[0, i, j]), logits[0, :, i, j].numpy()
        if y == IGNORE:
            continue
        p, onehot = np.exp(z) / np.exp(z).sum(), np.eye(4)[y]
        right, ce = z.argmax() == y, -math.log(p[y])
        total += {
            "masked-ce": right * ce,
            "balanced-ce": right * ce * float(weight[y]),
            "js": jensenshannon(p, onehot) ** 2,
            "segpgd": ce * (0.7 if right else 0.3),
            "cospgd": ce * (p @ onehot) / (np.linalg.norm(p) * np.linalg.norm(onehot)),
        }[name]
        valid += 1
    found = losses(name, logits, labels, weight, progress)
    assert valid == 13 and found.item() == pytest.approx(total / valid, rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_for_saturated_pixels(name: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]]).view(1, 3, 1, 1).repeat(1, 1, 1, 3).requires_grad_(True)
    labels = torch.tensor([[[0, 1, IGNORE]]])
    losses(name, logits, labels, torch.ones(3), 0.5).sum().backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad[..., 2] == 0).all()


class PixelByPixel(nn.Module):
    """Logits (0, 4 (x - 1/2), 4 (1/2 - x)) of one grey channel: a 4√2-Lipschitz map whose worst attack is known."""

    def forward(self, x: Tensor) -> Tensor:
        y = 4 * (x[:, 0] - 0.5)
        return torch.stack([torch.full_like(y, -9.0), y, -y], dim=1)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def run(model: nn.Module, images: Tensor, labels: Tensor, eps: float, **settings) -> list[SceneAttacked]:
    double = type(model)().double().eval()
    double.load_state_dict(model.state_dict())
    (rows,) = attack_scenes(model.eval(), double, [(7, images, labels)], eps, SceneEnsemble(**settings))
    return rows


def test_attacks_reach_what_is_possible_and_never_more() -> None:
    """With one budget for pixels of different margins, k* can be turned and no more; certificate and attack meet."""
    torch.manual_seed(0)
    images = torch.rand(2, 1, 8, 8)
    labels = torch.where(images[:, 0] > 0.5, 1, 2)
    with torch.no_grad():
        logits = PixelByPixel()(images.double()).numpy()
    for eps in (0.3, 1.0):
        rows = run(PixelByPixel(), images, labels, eps, attacks=ATTACKS, steps=60)
        assert len(rows) == 2 * (1 + len(ATTACKS))
        for image in range(2):
            possible = count(clearances(logits[image]), labels[image], eps, 4 * math.sqrt(2))
            mine = [row for row in rows if row.idx == 7 + image]
            assert [row.attack for row in mine if row.correct == 64] == ["clean"]
            turned = {row.attack: 64 - row.correct for row in mine}
            assert max(turned.values()) == turned["cheapest"] == 64 - possible.certified
            assert all(0.4 <= turned[loss] / turned["cheapest"] < 1 for loss in LOSSES)


def test_found_points_lie_in_ball_and_box_and_rows_count_their_pixels() -> None:
    torch.manual_seed(1)
    model = Convolutions()
    images = torch.rand(3, 3, 10, 12)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    labels[torch.rand(labels.shape) < 0.2] = 0
    labels[:, 0] = IGNORE
    rows = run(model, images, labels, 0.5, attacks=("masked-ce", "balanced-ce"), steps=20)
    for row in rows:
        label, clean = labels[row.idx - 7], images[row.idx - 7].double()
        assert row.distance <= 0.5 and (row.attack == "clean") == (row.distance == 0)
        assert (row.example - clean).norm() <= row.distance and 0 <= row.example.min() and row.example.max() <= 1
        valid = label != IGNORE
        assert row.valid == valid.sum() == 24 and row.correct == sum(row.hits) == ((row.predict == label) & valid).sum()
        for c in range(3):
            either = ((row.predict == c) | (label == c)) & valid
            assert row.union[c] == either.sum() and row.labelled[c] == ((label == c) & valid).sum()
    attacked = [row.correct for row in rows if row.attack == "masked-ce"]
    assert sum(attacked) < sum(row.correct for row in rows if row.attack == "clean")


def test_certificates_hold_against_the_ensemble() -> None:
    from lipcert.bounds import audit

    torch.manual_seed(2)
    model = Convolutions().eval()
    images = torch.rand(3, 3, 10, 12)
    double = Convolutions().double()
    double.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = double(images.double())
        labels = logits.argmax(dim=1)
    labels[:, 2:4] = 2
    joint = audit(double.eval(), (3, 10, 12)).upper.require_upper()
    eps = 0.05
    rows = run(model, images, labels, eps, attacks=("masked-ce", "js"), steps=30)
    table = certify_scenes([(logits[i].numpy(), labels[i].numpy(), 0.0) for i in range(3)], [eps], joint)
    for row in rows:
        assert row.correct >= table["certified"][row.idx - 7]
    summary = table.attrs["summary"][eps]
    pooled, mean = worst_accuracy(rows)
    assert 0 < summary["certified"] <= pooled and summary["certified_per_image"] <= mean
    assert summary["miou"][1] <= worst_miou(rows) <= summary["miou"][0] + 1e-12


def test_results_depend_on_the_seed_and_not_on_the_global_generator() -> None:
    model, images = Convolutions(), torch.rand(1, 3, 6, 6)
    labels = torch.zeros(1, 3, 3, dtype=torch.int64)
    first, again, other = (
        run(model, images, labels, 0.5, attacks=("js",), steps=10, seed=seed)[1] for seed in (0, 0, 1)
    )
    assert torch.equal(first.example, again.example) and not torch.equal(first.example, other.example)
    double, state = copy.deepcopy(model).double().eval(), torch.get_rng_state()
    list(attack_scenes(model.eval(), double, [(0, images, labels)], 0.5, SceneEnsemble(attacks=("js",), steps=10)))
    assert torch.equal(state, torch.get_rng_state())
    (parameter, *_) = model.parameters()
    assert parameter.grad is None and parameter.requires_grad


def row(idx: int, loss: str, hits: tuple[int, ...], union: tuple[int, ...], labelled: tuple[int, ...]) -> SceneAttacked:
    empty = torch.empty(0)
    return SceneAttacked(0.1, idx, loss, 0.0, sum(labelled), sum(hits), hits, union, labelled, empty, empty)


def test_worst_choice_for_the_mean_is_found_on_small_sets() -> None:
    """Against all choices; greedy may stop early, but not below the minimum, and mostly at it."""
    generator = np.random.default_rng(0)
    reached = 0
    for _ in range(40):
        labelled = generator.integers(1, 9, (4, 3))
        rows = []
        for i, name in product(range(4), ("clean", "js", "segpgd")):
            hits = np.minimum(generator.integers(0, 9, 3), labelled[i])
            union = labelled[i] + generator.integers(0, 5, 3)
            rows.append(row(i, name, *(tuple(part.tolist()) for part in (hits, union, labelled[i]))))
        values = []
        for choice in product(range(3), repeat=4):
            chosen = [rows[3 * i + a] for i, a in enumerate(choice)]
            total = np.array([r.hits for r in chosen]).sum(axis=0) / np.array([r.union for r in chosen]).sum(axis=0)
            values.append(total.mean())
        found = worst_miou(rows)
        assert found >= min(values) - 1e-12
        reached += found <= min(values) + 1e-12
    assert reached >= 30


def test_classes_without_labels_are_left_out_of_the_mean() -> None:
    rows = [row(0, "clean", (3, 0), (4, 5), (4, 0)), row(1, "clean", (0, 0), (0, 0), (0, 0))]
    assert worst_miou(rows) == 0.75 and worst_accuracy(rows) == (0.75, 0.75)
    with pytest.raises(ValueError, match="no labelled pixel"):
        worst_miou(rows[1:])
    with pytest.raises(ValueError, match="no labelled pixel"):
        worst_accuracy(rows[1:])
    with pytest.raises(ValueError, match="one row for every attack"):
        worst_miou([*rows, row(0, "js", (0, 0), (4, 0), (4, 0))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(eps=0.0), "radius must be positive"),
        (dict(images=torch.full((1, 1, 4, 4), 2.0)), r"pixels must lie in \[0, 1\]; the batch from image 7"),
        (dict(labels=torch.zeros(1, 2, 2, dtype=torch.int64)), "are not of the same pixels"),
        (dict(labels=torch.full((1, 4, 4), 3)), "the model has 3 classes, but there is a label 3"),
        (dict(attacks=("ce",)), "unknown attacks"),
        (dict(steps=1), "at least 4 steps"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    usual = dict(images=torch.rand(1, 1, 4, 4), labels=torch.zeros(1, 4, 4, dtype=torch.int64), eps=1.0)
    with pytest.raises(ValueError, match=message):
        run(PixelByPixel(), **{**usual, **change})
    training = PixelByPixel().train()
    with pytest.raises(ValueError, match="training mode"):
        next(attack_scenes(training, training, [(0, usual["images"], usual["labels"])], 1.0))
