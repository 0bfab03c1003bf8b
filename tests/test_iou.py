"""Intersection over union: the exact minimum over a data set, against every attack on small ones."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lipcert.iou import Frontier, certified_iou, certified_recall, clean_iou, frontier

PIXELS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 5), st.integers(0, 5)), max_size=5)


def outcomes(pixels: list[tuple[int, int, int, int]], budget: int) -> set[tuple[int, int]]:
    """Return all (intersection, union) of class 1 that an adversary can make of pixels (label, predict, leave, enter).

    He may do anything to any pixel: turn it into class 1 or out of it, whether that helps him or not. Labels and
    predictions 0 and 2 stand for other classes.
    """
    found = set()
    for change in product((False, True), repeat=len(pixels)):
        cost = intersection = union = 0
        for (label, predict, leave, enter), changed in zip(pixels, change, strict=True):
            is_class = (predict == 1) != changed
            cost += (leave**2 if predict == 1 else enter**2) if changed else 0
            intersection += label == 1 and is_class
            union += label == 1 or is_class
        if cost <= budget**2:
            found.add((intersection, union))
    return found


def of(pixels: list[tuple[int, int, int, int]], eps: int) -> Frontier:
    label, predict, leave, enter = (np.array(column, dtype=float) for column in zip(*pixels, strict=True))
    return frontier(
        leave[(label == 1) & (predict == 1)],
        enter[(label != 1) & (predict != 1)],
        union=int(((label == 1) | (predict == 1)).sum()),
        labelled=int((label == 1).sum()),
        eps=eps,
        joint=1.0,
    )


@settings(max_examples=300)
@given(st.lists(PIXELS.filter(bool), min_size=1, max_size=3), st.integers(0, 7))
def test_pooled_minimum_is_that_of_all_attacks(images: list[list[tuple[int, int, int, int]]], eps: int) -> None:
    best: Fraction | None = None
    for choice in product(*(outcomes(pixels, eps) for pixels in images)):
        union = sum(u for _, u in choice)
        if union:
            ratio = Fraction(sum(i for i, _ in choice), union)
            best = ratio if best is None else min(best, ratio)
    frontiers = [of(pixels, eps) for pixels in images]
    assert certified_iou(frontiers) == best
    clean = clean_iou(frontiers)
    assert clean is None or best is None or best <= clean


@given(st.lists(PIXELS.filter(bool), min_size=1, max_size=3), st.integers(0, 7))
def test_recall_is_that_of_all_attacks(images: list[list[tuple[int, int, int, int]]], eps: int) -> None:
    labelled = sum(label == 1 for pixels in images for label, *_ in pixels)
    least = sum(min(i for i, _ in outcomes(pixels, eps)) for pixels in images)
    found = certified_recall([of(pixels, eps) for pixels in images])
    assert found == (Fraction(least, labelled) if labelled else None)


def pair(intersection: int, union: int, lost: list[int], created: list[int]) -> Frontier:
    return Frontier(intersection, union, intersection, np.array(lost), np.array(created))


def test_the_least_ratio_of_each_image_is_not_the_least_of_all() -> None:
    """One image offers 90/100 or 100/112; the other stays 50/100. By itself the first should take 100/112 = .893."""
    images = [pair(100, 100, [0, 10], [12, 0]), pair(50, 100, [0], [0])]
    assert certified_iou(images) == Fraction(140, 200) < Fraction(150, 212)
    assert Fraction(100, 112) < Fraction(90, 100)


def test_an_image_without_the_class_counts_with_its_false_positives() -> None:
    images = [pair(10, 10, [0], [0]), pair(0, 0, [0], [5])]
    assert clean_iou(images) == 1 and certified_iou(images) == Fraction(10, 15)


def test_a_class_that_is_nowhere_has_no_ratio() -> None:
    assert certified_iou([pair(0, 0, [0], [0])]) is None is clean_iou([pair(0, 0, [0], [0])])
    assert certified_iou([pair(0, 0, [0], [3])]) == 0
    assert certified_iou([]) is None and certified_recall([]) is None


def test_frontier_keeps_only_choices_that_may_be_best() -> None:
    """Losing is cheap here: the first true positives cost nothing, and giving one up makes room for no false one."""
    found = frontier(np.array([0.0, 0.0, 3.0]), np.array([4.0, 0.0]), union=3, labelled=3, eps=5.0, joint=1.0)
    assert list(zip(found.lost.tolist(), found.created.tolist(), strict=True)) == [(3, 2)]
    found = frontier(np.array([0.0, 0.0, 3.0]), np.array([4.0, 0.0]), union=3, labelled=3, eps=4.0, joint=1.0)
    assert list(zip(found.lost.tolist(), found.created.tolist(), strict=True)) == [(2, 2), (3, 1)]
    # either constant can rule pixels out
    found = frontier(np.array([2.0]), np.array([3.0]), union=1, labelled=1, eps=1.0, joint=9.0, pixel=2.0)
    assert (found.lost.tolist(), found.created.tolist()) == ([1], [0])


def test_counts_beyond_64_bits_stay_exact() -> None:
    large = 10**12
    images = [pair(large, large + 1, [0, large - 1], [large, 0]), pair(large // 3, large, [0], [0])]
    choices = [(large, large + 1 + large), (1, large + 1)]
    expected = min(Fraction(i + large // 3, u + large) for i, u in choices)
    assert certified_iou(images) == expected


def test_random_large_sets_against_bisection() -> None:
    """An independent method: λ is below the minimum if no choice makes Σ(intersection) - λ Σ(union) negative."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        images = []
        for _ in range(30):
            leave, enter = generator.exponential(size=(2, 300))
            images.append(frontier(leave, enter, union=400, labelled=350, eps=generator.exponential() * 3, joint=1.0))
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            least = sum(float(np.min(f.intersection - f.lost - middle * (f.union + f.created))) for f in images)
            low, high = (middle, high) if least >= 0 else (low, middle)
        found = certified_iou(images)
        assert found is not None and abs(float(found) - low) < 1e-9
