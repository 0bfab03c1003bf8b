"""Counting rows: exact, strict at ties, and the same as what `lipcert certify` counts."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipcert.report.accuracy import (
    average_certified_radius,
    certified_accuracy,
    clean_accuracy,
    contradictions,
    curve,
)

RADII = st.sampled_from([0.0, 0.1, 36 / 255, 0.5, 0.5000000000000001, 1.0, math.inf])
ROWS = st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 2), RADII), min_size=1, max_size=12).map(
    lambda rows: frame([(i, label, predict, radius) for i, (label, predict, radius) in enumerate(rows)])
)


def frame(rows: list[tuple[int, int, int, float]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["idx", "label", "predict", "radius"])
    return table.assign(correct=(table["label"] == table["predict"]).astype(int))


def test_known_values() -> None:
    rows = frame([(0, 1, 1, 0.5), (1, 1, 1, 0.25), (2, 1, 0, 9.0), (3, 1, -1, 0.0)])
    assert clean_accuracy(rows) == 0.5
    assert [certified_accuracy(rows, r) for r in (0.0, 0.25, 0.4999, 0.5)] == [0.5, 0.25, 0.25, 0.0]
    assert average_certified_radius(rows) == 0.1875
    radii, accuracy = curve(rows)
    assert radii.tolist() == [0.0, 0.25, 0.5]
    assert accuracy.tolist() == [0.5, 0.25, 0.0]


@given(ROWS, st.lists(RADII, max_size=4))
def test_the_curve_is_the_strict_count_everywhere(rows: pd.DataFrame, more: list[float]) -> None:
    radii, accuracy = curve(rows)
    triples = rows["label"], rows["predict"], rows["radius"]
    assert (np.diff(radii) > 0).all() and radii[0] == 0.0
    for r in [*radii, *np.nextafter(radii, -1)[1:], *np.nextafter(radii, 9), *filter(math.isfinite, more)]:
        counted = sum(y == p and radius > r for y, p, radius in zip(*triples, strict=True))
        assert accuracy[np.searchsorted(radii, r, side="right") - 1] == counted / len(rows)
        assert certified_accuracy(rows, r) == pytest.approx(counted / len(rows), abs=1e-15)


@given(ROWS)
def test_counts_as_certify_does(rows: pd.DataFrame) -> None:
    from lipcert.certify import summarise

    summary = summarise(rows, (36 / 255, 0.5))
    assert summary["clean"] == clean_accuracy(rows)
    assert summary["acr"] == average_certified_radius(rows)
    assert list(summary["certified"].values()) == [certified_accuracy(rows, r) for r in (0.0, 36 / 255, 0.5)]


def test_a_contradiction_is_strictly_within_the_radius_of_a_correct_image() -> None:
    rows = frame([(7, 1, 1, 0.5), (8, 1, 1, 0.5), (9, 1, 0, 0.5), (10, 1, 1, 0.5), (11, 1, 1, 0.5)])
    tried = pd.DataFrame(
        [(7, 0.5, 1), (8, 0.49999999999999994, 1), (9, 0.1, 1), (10, 0.1, 0), (99, 0.1, 1), (8, 0.3, 1)],
        columns=["idx", "distance", "success"],
    )
    assert contradictions(rows, tried) == (8,)
