"""Certificates of all pixels of an image: distances against projections, tightness, attacks, shares of a data set."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import nn

from lipcert.bounds import audit
from lipcert.errors import InputError
from lipcert.segment import IGNORE, SQRT2, certify_scenes, certify_segmentation, clearances, count, frontiers, radii

LOGITS = st.integers(2, 6).flatmap(
    lambda k: st.lists(st.lists(st.integers(-8, 8), min_size=k, max_size=k), min_size=1, max_size=4)
)


def pairwise(weight: np.ndarray) -> np.ndarray:
    return np.linalg.norm(weight[:, None] - weight[None], axis=2) * (1 + 1e-14)


@given(LOGITS)
def test_leaving_costs_what_the_nearest_other_class_does(rows: list[list[int]]) -> None:
    z = np.array(rows, dtype=float).T
    found = clearances(z)
    ordered = np.sort(z, axis=0)
    margin = ordered[-1] - ordered[-2]
    assert (found.predict == z.argmax(axis=0)).all()
    np.testing.assert_allclose(found.leave, margin / math.sqrt(2), rtol=1e-14, atol=1e-300)
    for distance, gap in zip(found.leave, margin, strict=True):
        assert 2 * Fraction(distance) ** 2 <= Fraction(gap) ** 2  # rounded down


def nearest(z: np.ndarray, number: int, weight: np.ndarray) -> float:
    """Return how far features must move before `number` wins: min ‖d‖ with (w_number - w_j)·d ≥ z_j - z_number.

    Solved as its dual, a nonnegative least squares problem, by an active-set method of scipy's.
    """
    others = [j for j in range(len(z)) if j != number]
    rows = weight[number] - weight[others]
    gaps = z[others] - z[number]
    # min ‖d‖ s.t. A d ≥ g: with E = [A g]ᵀ, f = e_last, the residual of nnls(E, f) is (d, -1) scaled
    stacked = np.vstack([rows.T, gaps])
    target = np.zeros(len(stacked))
    target[-1] = 1.0
    solution, _ = nnls(stacked, target)
    residual = stacked @ solution - target
    if np.linalg.norm(residual) < 1e-9:
        return math.inf
    return float(np.linalg.norm(-residual[:-1] / residual[-1]))


@settings(max_examples=150)
@given(LOGITS)
def test_entering_costs_the_projection(rows: list[list[int]]) -> None:
    z = np.array(rows, dtype=float).T
    found = clearances(z)
    for number in range(len(z)):
        for i, column in enumerate(z.T):
            if found.predict[i] == number:
                assert found.enter[number, i] == 0
                continue
            exact = nearest(column, number, np.eye(len(z)))
            assert found.enter[number, i] <= exact * (1 + 1e-12) + 1e-12
            assert found.enter[number, i] >= exact * (1 - 1e-9) - 1e-9
    simple = clearances(z, within=0.0)
    assert (simple.enter <= found.enter).all() and (simple.leave == found.leave).all()


@settings(max_examples=50)
@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_a_head_measures_distances_by_its_rows(k: int, dim: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weight, features = generator.standard_normal((k, dim)), generator.standard_normal((dim, 6))
    z = weight @ features
    found = clearances(z, pairs=pairwise(weight))
    for i, column in enumerate(z.T):
        exact = [nearest(column, number, weight) for number in range(k) if number != found.predict[i]]
        # the first border to be crossed is the nearest of the half spaces, and no class is entered sooner
        assert found.leave[i] <= min(exact) * (1 + 1e-9)
        for number in range(k):
            if number != found.predict[i]:
                assert found.enter[number, i] <= nearest(column, number, weight) * (1 + 1e-9)
    if k == 2:
        np.testing.assert_allclose(found.leave, abs(z[0] - z[1]) / np.linalg.norm(weight[0] - weight[1]), rtol=1e-12)


def test_errors_come_off_every_margin() -> None:
    z = np.array([[3.0], [1.0], [0.5]])
    plain, noisy = clearances(z), clearances(z, error=0.25)
    assert noisy.leave[0] == pytest.approx((2 - 0.5) / math.sqrt(2), rel=1e-14)
    assert noisy.enter[1, 0] == pytest.approx((2 - 0.5) / math.sqrt(2), rel=1e-14)
    assert (noisy.enter <= plain.enter).all()
    assert clearances(z, error=1.0).leave[0] == 0 == clearances(z, error=math.inf).leave[0]
    generator = np.random.default_rng(0)
    for _ in range(50):  # any logits that the error allows are at least as far away
        z, e = generator.standard_normal((5, 7)), 0.1
        found = clearances(z, error=e)
        move = generator.standard_normal(z.shape)
        true = z + move * e / np.linalg.norm(move, axis=0)
        moved = clearances(true)
        same = moved.predict == found.predict
        assert (found.leave[same] <= moved.leave[same] + 1e-12).all() and (found.leave[~same] == 0).all()
        assert (found.enter <= moved.enter + 1e-12)[:, same].all()


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_certify_nothing(strange: float) -> None:
    z = np.array([[5.0, 5.0], [1.0, strange], [0.0, 0.0]])
    found = clearances(z)
    assert found.leave[1] == 0 and (found.enter[:, 1] == 0).all() and found.leave[0] > 0
    assert (found.predict[1] == -1) == math.isnan(strange)
    row = count(found, [0, 0], 0.0, 1.0)
    assert row.certified == 1 and row.stable == 1


def test_ties_certify_nothing_and_equality_is_no_certificate() -> None:
    found = clearances([[1.0, 4.0], [1.0, 2.0]])
    assert found.leave.tolist()[0] == 0
    assert radii(found.leave, 1.0)[0] == 0 and radii(found.leave, 0.0, largest=7.0).tolist() == [0, 7]
    at = float(found.leave[1])
    row = count(found, [0, 0], at, 1.0)
    assert row.certified == row.certified_alone == 0 and count(found, [0, 0], at * (1 - 1e-9), 1.0).certified == 1
    assert radii(found.leave, math.inf).tolist() == [0, 0]


def test_a_pair_of_classes_that_cannot_change_order_is_never_crossed() -> None:
    pairs = np.array([[0.0, 0.0], [0.0, 0.0]])
    found = clearances([[2.0, 1.0], [1.0, 1.0]], pairs=pairs)
    assert found.leave.tolist() == [math.inf, 0] and found.enter[1].tolist() == [math.inf, 0]


def test_the_identity_attains_the_count_of_flips() -> None:
    """Moving the two first logits of the cheapest pixels to each other changes exactly as many as the bound says."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        z = generator.standard_normal((4, 30))
        found, eps = clearances(z), generator.exponential() * 2
        k = len(found.leave) - count(found, np.zeros(30), eps, 1.0).stable
        attacked = z.copy()
        for i in np.argsort(found.leave)[:k]:
            second, first = np.argsort(z[:, i])[-2:]
            half = (z[first, i] - z[second, i]) / 2 * (1 + 1e-12)
            attacked[first, i] -= half
            attacked[second, i] += half
        assert np.linalg.norm(attacked - z) <= eps * (1 + 1e-9)
        assert (attacked.argmax(axis=0) != z.argmax(axis=0)).sum() == k


class Small(nn.Module):
    """Two convolutions and a smooth activation; logits at stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 2, stride=2)
        self.second = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture(scope="module")
def attacked() -> dict:
    """A random network on random images, its proved bound, and predictions after gradient attacks of several norms."""
    torch.manual_seed(0)
    model = Small().double().eval()
    joint = audit(model, (3, 12, 12)).upper.require_upper()
    x = torch.rand(3, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        z = model(x)
        labels = z.argmax(dim=1)
        labels[torch.rand(labels.shape) < 0.2] = 1
        labels[torch.rand(labels.shape) < 0.1] = IGNORE
    predictions = {}
    for eps in (0.05, 0.2, 0.8):
        delta = torch.zeros_like(x)
        for _ in range(30):
            delta.requires_grad_(True)
            out = model(x + delta)
            top = out.topk(2, dim=1).values
            soft = ((top[:, 0] - top[:, 1]) * (out.argmax(1) == z.argmax(1))).clamp(max=0.3).sum()
            (gradient,) = torch.autograd.grad(soft, delta)
            with torch.no_grad():
                delta = delta - eps * 0.3 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
                norm = delta.flatten(1).norm(dim=1)[:, None, None, None]
                delta = delta * torch.clamp(eps / norm, max=1.0)
        with torch.no_grad():
            predictions[eps] = model(x + delta).argmax(dim=1).numpy()
    return dict(joint=joint, logits=z.numpy(), labels=labels.numpy(), predictions=predictions)


def iou(predict: np.ndarray, labels: np.ndarray, number: int) -> float:
    valid = labels != IGNORE
    both = (predict == number) & (labels == number) & valid
    any_of = ((predict == number) | (labels == number)) & valid
    return both.sum() / any_of.sum()


def test_certified_is_at_most_attacked_is_at_most_clean(attacked: dict) -> None:
    z, labels, joint = attacked["logits"], attacked["labels"], attacked["joint"]
    eps = list(attacked["predictions"])
    rows = certify_scenes(((z[i], labels[i], 0.0) for i in range(3)), eps, joint)
    assert len(rows) == 9
    flipped_somewhere = False
    for radius, predict in attacked["predictions"].items():
        summary = rows.attrs["summary"][radius]
        valid = labels != IGNORE
        robust = ((predict == labels) & valid).sum() / valid.sum()
        clean = ((z.argmax(1) == labels) & valid).sum() / valid.sum()
        assert summary["certified"] <= robust <= summary["accuracy"] == pytest.approx(clean)
        assert summary["certified_alone"] <= summary["certified"]
        for i, row in enumerate(rows[rows["eps"] == radius].itertuples()):
            assert row.stable <= (predict[i] == z[i].argmax(0)).sum()
            assert row.certified <= ((predict[i] == labels[i]) & valid[i]).sum()
            flipped_somewhere |= bool((predict[i] != z[i].argmax(0)).any())
        for number in range(4):
            before, after = summary["iou"][str(number)]
            assert after <= iou(predict, labels, number) + 1e-12 and after <= before
            assert before == pytest.approx(iou(z.argmax(1), labels, number))
            assert summary["recall"][str(number)][1] <= summary["recall"][str(number)][0]
    assert flipped_somewhere and summary["miou"][1] < summary["miou"][0]


def test_shares_pool_pixels_and_average_images() -> None:
    """Two images: 1 of 4 pixels right, and 2 of 2; the second has two void pixels and one class is nowhere."""
    z = np.zeros((3, 2, 4))
    z[0] = 9.0
    labels = np.array([[0, 1, 1, 1], [0, 0, IGNORE, IGNORE]])
    rows = certify_scenes([(z[:, i], labels[i], 0.0) for i in range(2)], [1.0], 1.0, classes=("a", "b", "c"))
    summary = rows.attrs["summary"][1.0]
    assert summary["accuracy"] == 3 / 6 and summary["accuracy_per_image"] == (1 / 4 + 1) / 2
    assert summary["certified"] == 3 / 6 and summary["stable"] == 1
    assert summary["iou"] == {"a": (3 / 6, 3 / 6), "b": (0, 0), "c": None}
    assert summary["miou"] == (1 / 4, 1 / 4) and summary["recall"]["a"] == (1, 1)
    unlabelled = certify_scenes([(z[:, 0], np.full(4, IGNORE), 0.0)], [1.0], 1.0).attrs["summary"][1.0]
    assert unlabelled["accuracy"] is None is unlabelled["miou"] and unlabelled["stable"] == 1
    assert isinstance(rows, pd.DataFrame) and rows["valid"].tolist() == [4, 2]


@given(st.integers(0, 10**6), st.floats(0.1, 1.0))
@settings(max_examples=30)
def test_more_eps_certifies_less_and_a_smaller_pixel_constant_more(seed: int, pixel: float) -> None:
    generator = np.random.default_rng(seed)
    z, labels = generator.standard_normal((4, 25)), generator.integers(0, 4, 25)
    found = clearances(z)
    rows = [count(found, labels, eps, 1.0, pixel) for eps in (0.0, 0.1, 0.3, 1.0, 3.0)]
    assert rows[0].certified == rows[0].correct and rows[0].stable == 25
    for small, large in zip(rows, rows[1:], strict=False):
        assert large.certified <= small.certified and large.stable <= small.stable
    for row in rows:
        assert row.certified >= max(row.certified_alone, count(found, labels, row.eps, 1.0).certified)
    for eps in (0.1, 0.3, 1.0):
        wide, narrow = (frontiers(found, labels, eps, 1.0, constant) for constant in (None, pixel))
        assert all(a.most_lost >= b.most_lost for a, b in zip(wide, narrow, strict=True))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: clearances(np.zeros((1, 5))), ValueError, "k ≥ 2"),
        (lambda: clearances(np.zeros((2, 5)), pairs=np.zeros((3, 3))), ValueError, r"and \(k, k\)"),
        (lambda: clearances(np.zeros((2, 5)), error=-1.0), ValueError, "must not be negative"),
        (
            lambda: count(clearances(np.zeros((2, 5))), [0, 1], 1.0, 1.0),
            InputError,
            "5 pixels with logits and 2 labels",
        ),
        (lambda: count(clearances(np.zeros((2, 2))), [0, 2], 1.0, 1.0), InputError, "label 2, but the network has 2"),
        (lambda: certify_scenes([], [1.0], 1.0), InputError, "no images to certify"),
        (lambda: radii(np.ones(2), math.nan), ValueError, "NaN"),
    ],
)
def test_what_does_not_fit_is_refused(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_root_of_two_is_rounded_up() -> None:
    assert Fraction(SQRT2) ** 2 > 2 > Fraction(math.nextafter(SQRT2, 0)) ** 2


class Enlarged(nn.Module):
    """Logits at stride 4, then at the size of the image: each position is as steep as before, all together are not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 4, stride=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(self.conv(x), scale_factor=4, mode="bilinear")


def test_an_audit_brings_both_constants() -> None:
    """Upsampling by 4 makes `joint` four times `pixel`; all pixels of 4 x 4 cells pay for that only once."""
    torch.manual_seed(0)
    model = Enlarged().double().eval()
    with torch.no_grad():
        model.conv.weight *= 3
    images, labels = torch.rand(2, 1, 16, 16), torch.randint(0, 3, (2, 16, 16))
    found = audit(model, (1, 16, 16))
    assert found.position is not None
    joint, pixel = found.upper.require_upper(), found.position.require_upper()
    assert 3.5 < joint / pixel < 4 + 1e-9
    eps = [0.01, 0.05]
    rows = certify_segmentation(found, [(images, labels)], eps, classes=("a", "b", "c"))
    with torch.no_grad():
        logits = model(images.double()).numpy()
    expected = certify_scenes([(logits[i], labels[i].numpy(), 1e-9) for i in range(2)], eps, joint, pixel)
    alone = certify_scenes([(logits[i], labels[i].numpy(), 1e-9) for i in range(2)], eps, joint)
    columns = ["pixels", "stable", "valid", "correct", "certified", "certified_alone"]
    assert (rows[columns] == expected[columns]).all().all() and list(rows.attrs["summary"][0.01]["iou"]) == [
        "a",
        "b",
        "c",
    ]
    assert (rows["stable"] >= alone["stable"]).all() and rows["stable"].sum() > alone["stable"].sum()
    deployed = certify_segmentation(found, [(images, labels)], eps, precision="float32")
    assert (deployed["certified"] <= rows["certified"]).all() and deployed["certified"].sum() > 0
    with pytest.raises(InputError, match=r"the bound is for inputs \(1, 16, 16\)"):
        certify_segmentation(found, [(images[:, :, :8], labels[:, :8])], eps)
    with pytest.raises(InputError, match="and some lie outside; scale them"):
        certify_segmentation(found, [(images * 2, labels)], eps)
    with pytest.raises(InputError, match="no eps to certify"):
        certify_segmentation(found, [(images, labels)], [])


def test_counts_do_not_pay_for_what_only_intersections_need() -> None:
    found = clearances([[3.0, 0.0], [1.0, 0.5], [0.0, 0.5]])
    count(found, [0, 1], 0.1, 1.0)
    assert "enter" not in vars(found)
    assert frontiers(found, [0, 1], 0.1, 1.0) and "enter" in vars(found)
