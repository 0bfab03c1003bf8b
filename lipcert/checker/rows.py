"""Rows: what is claimed of each image, without images (is it consistent?) and with them (does it follow?)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .reading import Array, Rejected, read_table, require, sha256_of
from .rounding import UNIT, UP, gamma

COLUMNS = dict(
    idx=int, label=int, predict=int, radius=float, correct=int, time=str, margin=float, error=float, image=str
)  # fmt: skip
COUNTS = ("pixels", "stable", "valid", "correct", "certified", "certified_alone")
SCENE_COLUMNS = dict(idx=int, eps=float, **dict.fromkeys(COUNTS, int))
VOID = 255  # the label of a pixel that has none


@dataclass(frozen=True)
class Rows:
    """Classified images: one radius for each."""

    rows: Sequence[Any]
    lipschitz: Array  # (k, k), own bounds of z_i - z_j

    @classmethod
    def read(cls, path: Path, n: int, diameter: float, lipschitz: Array) -> Rows:
        """Read certificates.tsv and check what can be checked without images."""
        apart = lipschitz + np.where(np.eye(len(lipschitz)), math.inf, 0.0)
        rows = read_table(path, COLUMNS, n)
        for i, row in enumerate(rows):
            where = f"row {i}"
            require(row.idx == i, f"{where}: its idx is {row.idx}")
            wrong = f"{where}: the radius {row.radius!r} is negative, no number, or beyond the domain's diameter"
            require(0 <= row.radius <= diameter, wrong)
            right = row.correct == int(row.predict == row.label)
            require(right, f"{where}: correct is {row.correct}, with label {row.label} and prediction {row.predict}")
            require(bool(re.fullmatch("[0-9a-f]{64}", row.image)), f"{where}: the SHA-256 of the image is malformed")
            if row.radius > 0:
                sound = 0 <= row.predict < len(apart) and row.margin > 0 and 0 <= row.error < math.inf
                require(sound, f"{where}: a radius without a prediction, a margin or an error")
                possible = row.radius * float(apart[row.predict].min()) <= row.margin * UP
                require(possible, f"{where}: the radius {row.radius!r} is above its margin over any constant")
        return cls(rows, lipschitz)

    def sha256(self, i: int) -> str:
        return self.rows[i].image

    def confirm(self, i: int, z: Array, error: float, doubts: Array, labels: Array | None) -> None:
        """Confirm a row with its own logits (k,), an l2 bound of their errors, and bounds (k, k) of differences."""
        row, where = self.rows[i], f"row {i}"
        p = row.predict
        if row.radius == 0:
            return
        finite = bool(np.isfinite(z).all() and np.isfinite(error))
        require(finite, f"{where}: the logits or their errors are not finite")
        require(int(np.argmax(z)) == p, f"{where}: the prediction is {int(np.argmax(z))}, not {p}")
        gaps = z[p] - z - doubts[p] - 4 * UNIT * (np.abs(z) + abs(z[p]))
        others = np.arange(len(z)) != p
        require(bool((gaps[others] > 0).all()), f"{where}: the margin is not above the rounding error")
        ordinary = others & (self.lipschitz[p] > 0)
        radius = float((gaps[ordinary] / self.lipschitz[p][ordinary]).min(initial=math.inf)) * (1 - 2.0**-50)
        proved = row.radius <= radius
        require(proved, f"{where}: the radius {row.radius!r} is above {radius!r}, which is what can be proved")
        margin = float((z[p] - z)[others].min())
        near = abs(row.margin - margin) <= 2 * (row.error + error) * UP + 1e-15 * abs(margin)
        require(near, f"{where}: the margin {row.margin!r} is not {margin!r}")


@dataclass(frozen=True)
class Scenes:
    """Segmented images: counts of positions for each image and radius."""

    rows: Sequence[Any]
    hashes: Sequence[tuple[str, str]]  # of each image and of its labels
    apart: Array  # (k, k), the distances of the classes' rows, which multiply the channels of a head
    lipschitz: float  # own bound of that head
    position: float  # own bound of its channels at any one position

    @classmethod
    def read(
        cls, path: Path, radii: Sequence[float], hashes: Sequence[tuple[str, str]], shape: Sequence[int], apart: Array,
        lipschitz: float, position: float,
    ) -> Scenes:  # fmt: skip
        """Read scenes.tsv and check what can be checked without images; `shape` is that of the logits."""
        require(len(shape) == 4, "the output is not a map of logits")
        k, pixels = len(radii), math.prod(shape[2:])
        rows = read_table(path, SCENE_COLUMNS, len(hashes) * k)
        for i, row in enumerate(rows):
            expected = i // k, radii[i % k]
            require((row.idx, row.eps) == expected, f"row {i}: it is image {row.idx} at {row.eps!r}, not {expected}")
            ordered = 0 <= row.certified_alone <= row.correct <= row.valid <= row.pixels == pixels
            ordered &= 0 <= row.stable <= pixels and 0 <= row.certified <= row.correct
            require(ordered, f"row {i}: its counts contradict each other or the {pixels} pixels")
        return cls(rows, hashes, apart, lipschitz, position)

    def sha256(self, i: int) -> str:
        return self.hashes[i][0]

    def confirm(self, i: int, z: Array, error: float, doubts: Array, labels: Array | None) -> None:
        """Confirm the rows of one image with its own logits (k, h, w), doubts (k, k), and labels (h, w).

        Pixel i, of class a, becomes b only if what the logits are made of moves there by (z_a - z_b - E_ab) / N_ab; d_i
        is the least of these. All of it together moves by L eps, and pixels are disjoint parts of it: the pixels that
        change satisfy Σ d_i² ≤ (L eps)², whichever they are, so no more change than there are of the cheapest ones. By
        itself each moves by l eps, l the constant of a position: those with d_i > l eps do not change.
        """
        if labels is None:
            raise Rejected("the labels of the positions of each image are needed as well")
        require(sha256_of(labels, "<i8") == self.hashes[i][1], f"row of image {i}: its labels have another SHA-256")
        require(labels.shape == z.shape[1:], f"row of image {i}: its labels are of another size")
        z, label = z.reshape(len(z), -1), labels.ravel()
        predict = np.argmax(z, axis=0)
        own = np.take_along_axis(z, predict[None], 0)
        with np.errstate(all="ignore"):
            gaps = own - z - doubts[:, predict] - 4 * UNIT * (np.abs(z) + np.abs(own))
            distance = np.where(gaps > 0, gaps / self.apart[:, predict], 0.0)  # infinite where classes have equal rows
        distance[predict, np.arange(len(predict))] = math.inf
        certain = np.isfinite(z).all(0) & np.isfinite(doubts).all()
        least = np.where(certain, distance.min(0), 0.0) * (1 - 2.0**-48)
        right = (label == predict) & (label != VOID)
        counts = int(np.count_nonzero(label != VOID)), int(np.count_nonzero(right))
        radii = len(self.rows) // len(self.hashes)
        for row in self.rows[i * radii : (i + 1) * radii]:
            where, claimed = f"row of image {row.idx} at {row.eps}", (row.valid, row.correct)
            require(claimed == counts, f"{where}: valid and correct are {claimed}, not {counts}")
            budget, reach = self.lipschitz * row.eps * UP, self.position * row.eps * UP
            most = {"stable": _kept(least, budget, reach), "certified": _kept(least[right], budget, reach)}
            most["certified_alone"] = int(np.count_nonzero(least[right] > reach))
            for name, proved in most.items():
                claim = getattr(row, name)
                require(claim <= proved, f"{where}: {name} {claim} is above {proved}, which is what can be proved")


def _kept(distances: Array, budget: float, reach: float) -> int:
    """Return how many pixels stay even if the cheapest ones within reach change, as many as the budget pays for."""
    near = np.sort(distances[distances <= reach])
    costs = np.cumsum(np.square(near)) * (1 - gamma(2 * len(near) + 8)) - 1e-290
    return len(distances) - int(np.count_nonzero(costs <= budget**2 * UP))
