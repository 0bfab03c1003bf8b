"""The intersection over union that is left of a class in a whole data set, after every image was attacked.

Each image has its own perturbation of norm eps. For class c, the adversary gains by turning true positives into
something else (the intersection loses one, the union keeps the pixel) and true negatives into c (the union gains one);
what he does elsewhere only helps us. With the costs of both in one budget, image b offers him a frontier of pairs
(m_b, n_b), and the intersection over union of the set is at least

    min over all choices of  Σ_b (t_b - m_b) / Σ_b (u_b + n_b),

t and u counted on the clean predictions. Minimising the ratio image by image and adding up afterwards, as published
code does, is not that minimum. Dinkelbach's method is (1967): for a ratio λ, every image by itself maximises m + λ n;
the ratio of these choices is the next λ; when it does not change any more, it is the minimum. All of it is in integers.
Proofs: docs/segmentation.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from lipcert.flips import Floats, budget, prefix, reachable, up

Integers = NDArray[np.int64]

_SAFE = 2**62


@dataclass(frozen=True)
class Frontier:
    """What one image can lose for one class: `lost` true positives together with `created` false positives."""

    intersection: int  # true positives of the clean prediction
    union: int  # true positives, false positives and false negatives
    labelled: int  # pixels of the class
    lost: Integers  # (q,) increasing from 0
    created: Integers  # (q,) the most that goes with it

    @property
    def most_lost(self) -> int:
        """The most true positives that can be lost, if all of the budget goes there."""
        return int(self.lost[-1])


def frontier(
    leave: Floats, enter: Floats, *, union: int, labelled: int, eps: float, joint: float, pixel: float | None = None
) -> Frontier:
    """Return what an image can lose for a class.

    Args:
        leave: (t,) of each true positive, how far its features must move to become another class.
        enter: (s,) of each true negative, how far they must move to become this class.
        eps, joint, pixel: as in `lipcert.flips.most_flips`.
    """
    limit = budget(eps, joint)
    spent = np.append(0.0, prefix(reachable(leave, eps, joint, pixel)))
    spent = spent[spent <= limit]
    with np.errstate(invalid="ignore"):
        rest = np.where(np.isinf(limit), np.inf, up(limit - spent))
    created = np.searchsorted(prefix(reachable(enter, eps, joint, pixel)), rest, side="right")
    lost = np.arange(len(spent))
    # where one more false positive is not given up, losing one more true positive is free: only that pair counts
    last = np.append(created[1:] < created[:-1], True)
    return Frontier(len(leave), union, labelled, lost[last], created[last])


def clean_iou(frontiers: Sequence[Frontier]) -> Fraction | None:
    """Return the ratio without an attack; None for a class that nobody labelled and nothing was predicted to be."""
    union = sum(image.union for image in frontiers)
    return Fraction(sum(image.intersection for image in frontiers), union) if union else None


def certified_iou(frontiers: Sequence[Frontier]) -> Fraction | None:
    """Return the exact minimum of the pooled ratio over all choices, one pair of each image's frontier.

    None for a class that is neither labelled nor predicted nor within the adversary's reach.
    """
    ratio = clean_iou(frontiers)
    if ratio is None:  # a false positive alone makes the ratio 0
        return Fraction(0) if any(image.created.max() > 0 for image in frontiers) else None
    while True:
        intersection, union = 0, 0
        for image in frontiers:
            m, n = _best(image, ratio)
            intersection += image.intersection - m
            union += image.union + n
        found = Fraction(intersection, union)
        if found >= ratio:
            return ratio
        ratio = found


def certified_recall(frontiers: Sequence[Frontier]) -> Fraction | None:
    """Return the least share of a class's pixels that is still found; None where none is labelled."""
    labelled = sum(image.labelled for image in frontiers)
    found = sum(image.intersection - image.most_lost for image in frontiers)
    return Fraction(found, labelled) if labelled else None


def _best(image: Frontier, ratio: Fraction) -> tuple[int, int]:
    """Return the pair (m, n) of the frontier that maximises m + ratio · n, without rounding."""
    p, q = ratio.numerator, ratio.denominator
    lost, created = image.lost, image.created
    if q * int(lost[-1]) + p * int(created[0]) >= _SAFE:
        lost, created = lost.astype(object), created.astype(object)
    at = int(np.argmax(q * lost + p * created))
    return int(image.lost[at]), int(image.created[at])
