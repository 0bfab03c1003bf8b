"""Certificates for segmentation: from logits and bounds to what one perturbation can do to all pixels of an image.

With logits z_i at pixel i, a bound E of the l2 rounding error of all logits of the image, and the norms N_ab of the
difference of rows a and b of the last linear layer (√2 where the logits themselves are what is bounded), a pixel of
class a becomes b only if its features move by at least (z_a - z_b - 2E) / N_ab. From there on,

- alone, the pixel is safe within distance / pixel: its radius;
- together, all pixels of an image share one budget (joint · eps)²: `lipcert.flips`;
- over a data set, every image has its own budget, and totals add up exactly: accuracy here, intersection over union in
  `lipcert.iou`.

`joint` bounds the Lipschitz constant of the whole map of features, image pixels in, all positions out; `pixel` bounds
that of the features at any one position (at most `joint`: upsampling makes the first larger and not the second). What
differs from published evaluations (Massena et al. 2025, arXiv 2512.06010): rounding on the safe side, strict
inequalities, the two constants together, and an intersection over union that is a lower bound for the data set.
docs/segmentation.md has the statements and their proofs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lipcert.bounds.rounding import gamma, sqrt_up
from lipcert.certify import PRECISIONS
from lipcert.data.scenes import IGNORE as IGNORE
from lipcert.errors import InputError
from lipcert.flips import Floats, down, most_flips
from lipcert.iou import Frontier, certified_iou, certified_recall, clean_iou, frontier
from lipcert.numerics import exact
from lipcert.proof import require_finite

if TYPE_CHECKING:
    from lipcert.bounds.audit import Audit

SQRT2 = sqrt_up(2.0)

_Pair = tuple[Fraction | None, Fraction | None] | None


@dataclass(frozen=True)
class Clearances:
    """How far the features of each pixel must move, in l2 and rounded down: of p pixels and k classes."""

    predict: NDArray[np.int64]  # (p,), -1 where a logit is not a number
    leave: Floats  # (p,) before the class can change
    classes: int
    into: Callable[[], Floats]  # makes `enter`

    @cached_property
    def enter(self) -> Floats:
        """Before it can become this class: (k, p); 0 where it is. Made when asked for, as counts alone need no more."""
        return self.into()


@dataclass(frozen=True)
class SceneRow:
    """The certificate of one image at one eps; counts of pixels."""

    idx: int
    eps: float
    pixels: int
    stable: int  # keep their class, whatever it is, in every perturbation of norm eps: at least so many
    valid: int  # have a label
    correct: int
    certified: int  # stay correct: at least so many, together
    certified_alone: int  # by their radius, one by one


@dataclass(frozen=True)
class Constants:
    """Of what distances are measured in: the features before the last layer, with its rows, or the logits."""

    joint: float
    pixel: float
    pairs: Floats | None = None  # (k, k); None: of the logits

    @property
    def of(self) -> str:
        return "logits" if self.pairs is None else "features"


def constants(audit: Audit) -> Constants:
    """Return the constants that certificates use: of the features where the last layer is a pointwise convolution.

    Both forms are proofs. That of the features is the tighter one, as ‖w_a - w_b‖ ≤ √2‖W‖, unless the proof bounds the
    logits by less than ‖W‖ times the features: then the form with the shorter way between most classes is taken.
    """
    joint = audit.upper.require_upper()
    pixel = joint if audit.position is None else min(joint, audit.position.require_upper())
    logits, head = Constants(joint, pixel), audit.pixel_head
    if head is None:
        return logits
    pairs = head.distances().cpu().numpy()
    features = Constants(head.joint.require_upper(), head.pixel.require_upper(), pairs)
    apart = pairs[~np.eye(len(pairs), dtype=bool)]
    return features if float(np.median(apart)) * features.joint <= SQRT2 * joint else logits


def clearances(
    logits: ArrayLike, error: float = 0.0, pairs: ArrayLike | None = None, *, within: float = math.inf
) -> Clearances:
    """Return how far the features of each pixel of one image must move before its class can change.

    Args:
        logits: (k, …) float64 or exactly representable there, k ≥ 2; the pixels are flattened.
        error: bounds the l2 norm of the rounding error of the logits of any one pixel; that of the whole map does.
        pairs: (k, k) upper bounds of ‖w_a - w_b‖ over the rows of the last linear layer; then the constants used with
            the result are those of the features before this layer. None: √2, and those of the logits.
        within: distances above this need not be as large as could be proved.

    A pixel with a logit that is not finite has distance 0, and so has every pixel if the error isn't. Ties are 0.
    Raises ValueError for shapes that do not fit, and for negative or NaN entries of `pairs` and a negative error.

    >>> found = clearances([[3.0, 0.0], [1.0, 0.5], [0.0, 0.5]])
    >>> found.predict, found.leave.round(3)
    (array([0, 1]), array([1.414, 0.   ]))
    """
    z = np.asarray(logits, dtype=np.float64)
    z = z.reshape(len(z), -1) if z.ndim > 1 else z
    norms = np.full((len(z), len(z)), SQRT2) if pairs is None else np.asarray(pairs, dtype=np.float64)
    if z.ndim != 2 or len(z) < 2 or norms.shape != (len(z), len(z)):
        raise ValueError(f"logits {z.shape} and pairs {norms.shape} must be (k, p) with k ≥ 2, and (k, k)")
    if not (norms >= 0).all() or error < 0:
        raise ValueError("norms and errors must not be negative or NaN")
    numbers = ~np.isnan(z).any(axis=0)
    predict = np.where(numbers, np.argmax(np.nan_to_num(z, nan=-np.inf), axis=0), -1)
    certain = np.isfinite(z).all(axis=0) & math.isfinite(error)
    leave = np.zeros(z.shape[1])
    leave[certain] = _leave(z[:, certain], predict[certain], error, norms)

    def into() -> Floats:
        enter = np.zeros_like(z)
        for number in range(len(z)):
            others = certain & (predict != number)
            enter[number, others] = _enter(z[:, others], number, error, norms, None if pairs is not None else within)
        return enter

    return Clearances(predict, leave, len(z), into)


def radii(distance: Floats, pixel: float, *, largest: float = math.inf) -> Floats:
    """Return the l2 radius within which each pixel keeps its class, whatever happens to the others; rounded down.

    `largest` caps them: certificates take the diameter of the input domain.
    """
    if not pixel >= 0 or not largest > 0:
        raise ValueError(f"the constant and the largest radius must not be negative or NaN, got {pixel}, {largest}")
    largest = min(largest, float(np.finfo(np.float64).max))
    with np.errstate(divide="ignore", invalid="ignore"):
        radius = down(distance / pixel) if pixel > 0 else np.full(np.shape(distance), np.inf)
    return np.where((distance > 0) & (radius > 0), np.minimum(radius, largest), 0.0)


def count(
    found: Clearances, labels: ArrayLike, eps: float, joint: float, pixel: float | None = None, *, idx: int = 0
) -> SceneRow:
    """Count what no perturbation of norm `eps` can change in one image.

    `labels` are class numbers of the p pixels, IGNORE where there is none; a number that is no class raises InputError.
    """
    label = _labels(found, labels)
    valid = label != IGNORE
    correct = valid & (label == found.predict)
    alone = radii(found.leave, joint if pixel is None else pixel) > eps
    return SceneRow(
        idx=idx,
        eps=eps,
        pixels=len(label),
        stable=len(label) - most_flips(found.leave, eps, joint, pixel),
        valid=int(valid.sum()),
        correct=int(correct.sum()),
        certified=int(correct.sum()) - most_flips(found.leave[correct], eps, joint, pixel),
        certified_alone=int((correct & alone).sum()),
    )


def frontiers(
    found: Clearances, labels: ArrayLike, eps: float, joint: float, pixel: float | None = None
) -> list[Frontier]:
    """Return for every class what one image can lose; `lipcert.iou` makes bounds for a data set of them."""
    label = _labels(found, labels)
    valid = label != IGNORE
    result = []
    for number, enter in enumerate(found.enter):
        labelled, predicted = valid & (label == number), valid & (found.predict == number)
        result.append(
            frontier(
                found.leave[labelled & predicted],
                enter[valid & ~labelled & ~predicted],
                union=int((labelled | predicted).sum()),
                labelled=int(labelled.sum()),
                eps=eps,
                joint=joint,
                pixel=pixel,
            )
        )
    return result


def certify_scenes(
    scenes: Iterable[tuple[ArrayLike, ArrayLike, float]],
    eps: Sequence[float],
    joint: float,
    pixel: float | None = None,
    *,
    pairs: ArrayLike | None = None,
    classes: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Certify a data set of (logits (k, h, w), labels (h, w), rounding error), each image against its own perturbation.

    Returns one row per image and eps with the fields of `SceneRow`; `rows.attrs["summary"]` is {eps: what
    `summarise` says}. Raises InputError if there is no image.
    """
    rows: list[SceneRow] = []
    eps = sorted(set(eps))
    images: dict[float, list[list[Frontier]]] = {radius: [] for radius in eps}
    reach = max(eps, default=0.0) * (joint if pixel is None else pixel) * (1 + 1e-9)  # only saves work
    for idx, (logits, labels, error) in enumerate(scenes):
        found = clearances(logits, error, pairs, within=reach)
        for radius in eps:
            rows.append(count(found, labels, radius, joint, pixel, idx=idx))
            images[radius].append(frontiers(found, labels, radius, joint, pixel))
    if not rows:
        raise InputError("there are no images to certify")
    table = pd.DataFrame([asdict(row) for row in rows])
    table.attrs["summary"] = {
        radius: summarise(table[table["eps"] == radius], images[radius], classes) for radius in images
    }
    return table


def certify_segmentation(
    audit: Audit,
    batches: Iterable[tuple[Tensor, Tensor]],
    eps: Sequence[float],
    *,
    precision: str = "float64",
    classes: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Certify an audited network on batches of images (n, c, h', w') in its domain and labels (n, h, w).

    The labels are those of the logits' positions: `lipcert.data.scene_loader(..., mask_stride=…)`. `constants` takes
    the constants from the audit. With "float32" the statements are about the float32 program, as in `lipcert.certify`:
    its error is bounded in the largest of the balls. Returns what `certify_scenes` does. Raises InputError for a
    network without a finite bound, and for images of another shape or outside the domain.
    """
    used = constants(audit)
    scenes = evaluate_scenes(audit, batches, eps, precision=precision)
    return certify_scenes(scenes, eps, used.joint, used.pixel, pairs=used.pairs, classes=classes)


def evaluate_scenes(
    audit: Audit, batches: Iterable[tuple[Tensor, Tensor]], eps: Sequence[float], *, precision: str = "float64"
) -> Iterator[tuple[Floats, NDArray[np.int64], float]]:
    """Yield logits (k, h, w), labels (h, w) and a bound of the rounding error for each image of the batches.

    Raises what `certify_segmentation` does.
    """
    require_finite(audit)
    if not eps:
        raise InputError("there is no eps to certify; give at least one")
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}; certificates are about {' or '.join(PRECISIONS)}")
    arithmetic = PRECISIONS[precision]
    radius = 0.0 if arithmetic is None else max(eps)
    low, high = audit.domain
    for images, labels in batches:
        if tuple(images.shape[1:]) != tuple(audit.input_shape) or audit.box is not None:
            raise InputError(f"the bound is for inputs {tuple(audit.input_shape)}; audit the model for these images")
        if not ((images >= low) & (images <= high)).all():
            raise InputError(f"the bound holds for inputs in [{low}, {high}], and some lie outside; scale them")
        with exact():
            logits, errors = audit.program.evaluate(images.double(), precision=arithmetic or "float64", radius=radius)
        yield from zip(logits.cpu().numpy(), labels.cpu().numpy(), errors.tolist(), strict=True)


def summarise(
    rows: pd.DataFrame, images: Sequence[Sequence[Frontier]], classes: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return shares for a data set from its rows at one eps and its frontiers, image by image and class by class.

    accuracy, certified, certified_alone and stable pool all pixels; the same with `_per_image` average over the images
    that have a labelled pixel. `iou` and `recall` are (clean, certified) by class, None for a class nobody labelled;
    `miou` and `mean_recall` average over the others, the certified one with each class attacked by itself.
    """
    share = {"accuracy": "correct", "certified": "certified", "certified_alone": "certified_alone"}
    valid = rows["valid"].sum()
    some = rows[rows["valid"] > 0]
    summary: dict[str, Any] = {"n": len(rows), "stable": float(rows["stable"].sum() / rows["pixels"].sum())}
    for name, column in share.items():
        summary[name] = float(rows[column].sum() / valid) if valid else None
        summary[f"{name}_per_image"] = float((some[column] / some["valid"]).mean()) if len(some) else None
    iou: dict[str, _Pair] = {}
    recall: dict[str, _Pair] = {}
    for number, of_class in enumerate(zip(*images, strict=True)):
        name = str(number) if classes is None else classes[number]
        labelled = sum(image.labelled for image in of_class)
        hits = sum(image.intersection for image in of_class)
        known = labelled > 0
        iou[name] = (clean_iou(of_class), certified_iou(of_class)) if known else None
        recall[name] = (Fraction(hits, labelled), certified_recall(of_class)) if known else None
    for name, pairs, mean in (("iou", iou, "miou"), ("recall", recall, "mean_recall")):
        present = [pair for pair in pairs.values() if pair is not None]
        average = tuple(sum(side) / Fraction(len(present)) for side in zip(*present, strict=True))
        summary[name] = {key: None if pair is None else _floats(pair) for key, pair in pairs.items()}
        summary[mean] = _floats(average) if present else None
    return summary


def _leave(z: Floats, predict: NDArray[np.int64], error: float, norms: Floats) -> Floats:
    """Return the least of (z_a - z_b - 2E) / N_ab over b, for the predicted a: (k, p) -> (p,)."""
    own = np.take_along_axis(z, predict[None], axis=0)
    distance = _distance(own - z, error, norms[predict].T)
    np.put_along_axis(distance, predict[None], np.inf, axis=0)
    return np.asarray(np.maximum(distance.min(axis=0), 0.0))


def _enter(z: Floats, number: int, error: float, norms: Floats, within: float | None) -> Floats:
    """Return how far pixels must move to become `number`: (k, p) -> (p,); it has to overtake every other class.

    The furthest of them is a bound. With norms √2 (`within` is given), so is what `_overtake` proves.
    """
    most = _distance(z - z[number], error, norms[:, number, None]).max(axis=0)
    if within is not None:
        near = (most <= within) & (most > 0)
        most[near] = np.maximum(most[near], _overtake(z[:, near], z[number, near], error))
    return most


def _distance(gap: Floats, error: float, norm: Floats) -> Floats:
    """Return (gap - 2E) / norm rounded down, for gaps that were rounded once; ∞ for a norm of 0 and a positive gap."""
    gap = down(down(gap) - 2 * error)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        distance = np.where(norm > 0, down(gap / norm), np.inf)
    return np.where(gap > 0, distance, 0.0)


def _overtake(z: Floats, own: Floats, error: float) -> Floats:
    """Return how far logits must move before `own` is the largest, rounded down: (k, p), (p,) -> (p,).

    Any λ ≥ 0 proves ‖d‖ ≥ Σ_j λ_j (z_j - own) / √((Σλ)² + Σλ²): the change d must satisfy d_own - d_j ≥ z_j - own for
    all j. λ_j = (z_j - c)₊ is the best one if c is the level at which `own` meets all that were above.
    """
    k, p = z.shape
    ordered = -np.sort(-z, axis=0)
    members = np.arange(2, k + 2)[:, None]
    level = (own + np.cumsum(ordered, axis=0)) / members  # if the first 1, 2, … logits come down to it
    following = np.vstack([ordered[1:], np.full((1, p), -np.inf)])
    at = np.argmax(following <= level, axis=0)
    weight = np.maximum(ordered - np.take_along_axis(level, at[None], axis=0), 0.0)
    top = weight.max(axis=0)
    weight = weight / np.where(top > 0, top, 1.0)  # the largest is 1: nothing that counts underflows
    terms = weight * down(down(ordered - own) - 2 * error)
    # the terms of one sum are rounded k + 2 times at most, and its bound below as often again
    above = down(terms.sum(axis=0) - gamma(2 * k + 8) * np.abs(terms).sum(axis=0)) - 1e-290
    square = weight.sum(axis=0) ** 2 + (weight**2).sum(axis=0)
    below = np.sqrt(square) * (1 + gamma(2 * k + 8))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((above > 0) & (below > 0), down(above / below), 0.0)


def _labels(found: Clearances, labels: ArrayLike) -> NDArray[np.int64]:
    label = np.asarray(labels).astype(np.int64).ravel()
    if label.shape != found.predict.shape:
        raise InputError(f"there are {len(found.predict)} pixels with logits and {len(label)} labels; they must match")
    strange = label[(label != IGNORE) & ((label < 0) | (label >= found.classes))]
    if len(strange):
        raise InputError(f"there is a label {strange[0]}, but the network has {found.classes} classes")
    return label


def _floats(ratios: Sequence[Any]) -> tuple[float, ...]:
    """Return fractions as floats, rounded down."""
    nearest = [float(ratio) for ratio in ratios]
    return tuple(x if x <= r else math.nextafter(x, -math.inf) for x, r in zip(nearest, ratios, strict=True))
