"""Certified accuracy from rows: the only place of the report that aggregates them.

`rows` is a frame with `idx, predict, radius, correct` (and `label`), one row per image. An image counts as certified at
r if it is classified correctly and its radius is *greater* than r; the randomized-smoothing literature counts
radius ≥ r, which differs only where a radius equals r exactly.
"""

from __future__ import annotations

import numpy as np
import pandas
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def clean_accuracy(rows: pandas.DataFrame) -> float:
    """Return the share of images that are classified correctly; an abstention (predict = -1) is not."""
    return float(rows["correct"].mean())


def certified_accuracy(rows: pandas.DataFrame, radius: float) -> float:
    """Return the share of images that are correct with a radius strictly greater than `radius`."""
    return float(((rows["correct"] == 1) & (rows["radius"] > radius)).mean())


def average_certified_radius(rows: pandas.DataFrame) -> float:
    """Return the mean over all images of the radius, counted as 0 where the prediction is wrong."""
    return float(rows["radius"].where(rows["correct"] == 1, 0.0).mean())


def curve(rows: pandas.DataFrame) -> tuple[Floats, Floats]:
    """Return the exact step function: from `radii[i]` on (included), up to `radii[i + 1]`, it is `accuracy[i]`.

    `radii` starts at 0 and ends at the largest finite radius of a correct image.
    """
    certified = np.sort(rows.loc[rows["correct"] == 1, "radius"].to_numpy(dtype=np.float64))
    radii = np.unique(np.concatenate([[0.0], certified[np.isfinite(certified)]]))
    left = certified.size - np.searchsorted(certified, radii, side="right")  # number of radii > radii[i]
    return radii, left / len(rows)


def contradictions(rows: pandas.DataFrame, attacked: pandas.DataFrame) -> tuple[int, ...]:
    """Return the images whose certificate an attack refutes: an adversarial example lies within the radius, strictly.

    `attacked` has `idx, distance, success` (and `eps`), one row per image and perturbation size.
    """
    found = attacked.loc[attacked["success"] == 1, ["idx", "distance"]]
    joined = rows.loc[rows["correct"] == 1, ["idx", "radius"]].merge(found, on="idx")
    return tuple(sorted({int(idx) for idx in joined.loc[joined["distance"] < joined["radius"], "idx"]}))
