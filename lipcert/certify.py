"""From margins and bounds to certified l2 radii, image by image.

With logits z, a bound L_yj of the Lipschitz constant of z_y − z_j and a bound E_yj of the rounding error of z_y − z_j
(at most 2E with E for the logit vector), the prediction y cannot change within

    r = min over j ≠ y of (z_y − z_j − E_yj) / L_yj

(Tsuzuku et al. 2018; pairwise constants as in Leino et al. 2021, GloRo, where L_yj = L_h‖w_y − w_j‖). What differs from
the published evaluations: every operation is rounded towards a smaller radius; ties, NaN and infinities certify
nothing; the logits come with a proved rounding error; and L is proved for the exported graph that computes these very
logits.

An image counts at radius r if it is classified rightly and its own radius is *greater* than r.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lipcert.errors import InputError
from lipcert.numerics import exact
from lipcert.proof import require_finite

if TYPE_CHECKING:
    from lipcert.bounds.audit import Audit
    from lipcert.bounds.program import Errors

RADII = (36 / 255, 72 / 255, 108 / 255, 1.0)
# What a certificate can be about, and the arithmetic of the program, None for real arithmetic.
PRECISIONS: dict[str, str | None] = {"float64": None, "float64 program": "float64", "float32": "float32"}


@dataclass(frozen=True)
class Row:
    """The certificate of one image, in the columns and the order of certificates.tsv."""

    idx: int
    label: int
    predict: int  # -1 if a logit is not a number
    radius: float  # l2, in pixels of [0, 1]; 0 where nothing is certified
    correct: int  # predict == label
    time: float  # seconds
    margin: float  # largest logit less the second largest, as computed
    error: float  # l2 bound of the rounding error of the logits
    image: str = ""  # SHA-256 of the pixels, as little-endian float64

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """Return the names of the columns."""
        return tuple(field.name for field in fields(cls))


def radii_from_margins(
    logits: Tensor,
    error: Tensor,
    pairwise: Tensor,
    *,
    largest: float = math.inf,
    parts: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return (predict, radius, margin) of each image, the radius rounded down.

    Args:
        logits: (n, k), float64 or exactly representable there.
        error: (n,), l2 bounds of the rounding errors of the logit vectors.
        pairwise: (k, k), upper bounds of the Lipschitz constants of z_i − z_j.
        parts: (before (n,), distances (k, k), since (n,)): the difference z_i − z_j errs by before·distances_ij +
            √2·since at most, which is taken where it is less than 2·error.
        largest: No radius is greater; certificates take the diameter of the input domain. A pair of logits whose
            difference is constant (L = 0) never changes its order: this, or the largest float, is its finite statement.

    Radius 0 means that nothing is certified: a tie, a logit or an error that is not finite, an infinite L, or a margin
    that does not exceed 2E. Raises ValueError for shapes that do not fit, and for negative or NaN entries of `pairwise`
    and negative ones of `error`.

    >>> radii_from_margins(torch.tensor([[3.0, 1.0]]), torch.zeros(1), torch.full((2, 2), 4.0))[1].round(12)
    array([0.5])
    """
    z, e, lipschitz = (t.detach().to("cpu", torch.float64).numpy() for t in (logits, error, pairwise))
    if z.ndim != 2 or z.shape[1] < 2 or e.shape != z.shape[:1] or lipschitz.shape != (z.shape[1], z.shape[1]):
        shapes = f"logits {z.shape}, error {e.shape}, pairwise {lipschitz.shape}"
        raise ValueError(f"{shapes}: these must be (n, k) with k ≥ 2, (n,) and (k, k)")
    if not (lipschitz >= 0).all() or (e < 0).any() or not largest > 0:
        raise ValueError("Lipschitz constants, errors and the largest radius must not be negative or NaN")
    images = np.arange(len(z))
    is_number = ~np.isnan(z).any(axis=1)
    first = np.where(is_number, np.argmax(np.nan_to_num(z, nan=-np.inf), axis=1), -1)
    others = z.copy()
    others[images, first] = -np.inf
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        own = z[images, first]
        margin = np.where(is_number, own - others.max(axis=1), np.nan)
        doubt = np.repeat(2 * e[:, None], z.shape[1], axis=1)  # (n, k)
        if parts is not None:
            before, distances, since = (t.detach().to("cpu", torch.float64).numpy() for t in parts)
            finer = before[:, None] * distances[first] + math.sqrt(2) * since[:, None]
            doubt = np.fmin(doubt, finer * (1 + 2.0**-48))  # more than its four roundings
        # (n, k): a difference, a difference and a quotient, each at most half a unit above the exact value
        gap = np.nextafter(np.nextafter(own[:, None] - z, -np.inf) - doubt, -np.inf)
        radius = np.nextafter(gap / lipschitz[first], -np.inf)
    radius[lipschitz[first] == 0] = min(largest, sys.float_info.max)
    radius[~(gap > 0)] = 0.0  # also NaN
    radius[images, first] = np.inf
    least = np.minimum(radius.min(axis=1), min(largest, sys.float_info.max))
    certain = is_number & np.isfinite(z).all(axis=1) & np.isfinite(e) & (least > 0)
    return first, np.where(certain, least, 0.0), margin


def rows_of_batches(
    audit: Audit, batches: Iterable[tuple[Tensor, Tensor]], *, precision: str = "float64", first: int = 0,
    pairwise: Tensor | None = None,
) -> Iterator[list[Row]]:  # fmt: skip
    """Certify batch by batch and yield the rows of each; see `certify` for the arguments and errors.

    `pairwise`: bounds of z_i - z_j to use, such as those of a written proof; default: those of the audit.
    """
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}; certificates are about {' or '.join(PRECISIONS)}")
    arithmetic = PRECISIONS[precision]
    require_finite(audit)
    pairwise = audit.pairwise() if pairwise is None else pairwise
    distances = None if audit.head is None else audit.head.distances()
    largest = diameter(audit.domain, audit.input_shape)
    for images, labels in batches:
        start = time.perf_counter()
        _check(images, audit)
        with exact():
            logits, errors = audit.evaluate(images.double())
            predict, radius, margin = _radii(logits, errors, pairwise, distances, largest)
            if arithmetic is not None:
                # What the program may be off grows with the distance from the image. Taken at the radius that holds in
                # real arithmetic, it bounds the error in every smaller ball, and the radius of the program is smaller:
                # so one step is a proof. The smallest positive reach asks for the program where nothing holds.
                reach = max(float(radius.max(initial=0.0)), 2.0**-1022)
                logits, errors = audit.evaluate(images.double(), precision=arithmetic, radius=reach)
                predict, radius, margin = _radii(logits, errors, pairwise, distances, largest)
        if int(labels.max()) >= len(pairwise):
            raise InputError(f"there is a label {int(labels.max())}, but the network has {len(pairwise)} classes")
        seconds = (time.perf_counter() - start) / len(labels)
        hashes = [image_sha256(image) for image in images.cpu().numpy()]
        columns = (labels.tolist(), predict.tolist(), radius.tolist(), margin.tolist(), errors.whole.tolist(), hashes)
        yield [
            Row(first + i, label, y, r, int(label == y), seconds, m, e, h)
            for i, (label, y, r, m, e, h) in enumerate(zip(*columns, strict=True))
        ]
        first += len(labels)


def _radii(
    logits: Tensor, errors: Errors, pairwise: Tensor, distances: Tensor | None, largest: float
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    parts = None if distances is None else (errors.before, distances, errors.since)
    return radii_from_margins(logits, errors.whole, pairwise, largest=largest, parts=parts)


def image_sha256(image: NDArray[Any]) -> str:
    """Return the SHA-256 of an image (c, h, w) as little-endian float64, row by row."""
    return hashlib.sha256(np.ascontiguousarray(image, dtype="<f8").tobytes()).hexdigest()


def labels_sha256(labels: NDArray[Any]) -> str:
    """Return the SHA-256 of a map of labels (h, w) as little-endian int64, row by row."""
    return hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8").tobytes()).hexdigest()


def certify(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    audit: Audit | None = None,
    radii: Sequence[float] = RADII,
    precision: str = "float64",
    domain: tuple[float, float] = (0.0, 1.0),
) -> pd.DataFrame:
    """Certify every image of a loader of (images (n, c, h, w) in the domain, labels (n,)).

    Returns one row per image with the columns of `Row`; `rows.attrs["summary"]` is what `summarise` says at `radii`.
    Within its radius no input changes the prediction: with "float64", of the network in real arithmetic; with
    "float64 program" and "float32", of the program that runs in this precision, at each of these inputs
    (docs/soundness.md). An `audit` that was made before saves the proof of the bound; otherwise the model is exported
    and audited here, for inputs like those of the first batch.

    Raises InputError for images outside the domain or of another shape, and for a network without a finite bound;
    lipcert.bounds.BoundError for a network that cannot be bounded at all, or a program that is not its operators.
    """
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    batches: Iterator[tuple[Tensor, Tensor]] = ((images.to(device), labels) for images, labels in loader)
    if audit is None:
        from lipcert.bounds.audit import audit as prove
        from lipcert.export import export

        head = next(batches, None)
        if head is None:
            raise InputError("there are no images to certify")
        batches = chain([head], batches)
        audit = prove(export(model), tuple(head[0].shape[1:]), domain=domain)
    rows = frame(row for batch in rows_of_batches(audit, batches, precision=precision) for row in batch)
    rows.attrs["summary"] = summarise(rows, radii)
    return rows


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Return rows as a table with the columns of certificates.tsv."""
    return pd.DataFrame([astuple(row) for row in rows], columns=list(Row.columns()))


def summarise(rows: pd.DataFrame, radii: Sequence[float] = RADII) -> dict[str, Any]:
    """Return {n, clean, certified: {radius: share}, acr}; radius 0 is always among the radii.

    An image is certified at r if it is correct and its radius is strictly greater than r; `acr` is the mean of
    radius · correct over all images.
    """
    if len(rows) == 0:
        raise InputError("there are no images to certify")
    correct = rows["correct"] == 1
    certified = {
        key: float((correct & (rows["radius"] > radius)).mean()) for radius, key in radius_keys({0.0, *radii}).items()
    }
    return {
        "n": len(rows),
        "clean": float(correct.mean()),
        "certified": certified,
        "acr": float(rows["radius"].where(correct, 0.0).mean()),
    }


def radius_keys(radii: Iterable[float]) -> dict[float, str]:
    """Return the key of each radius in summary.json, smallest first: four decimals, all of them where two would meet.

    >>> radius_keys([0.5, 0.50001])
    {0.5: '0.5000', 0.50001: '0.50001'}
    """
    keys: dict[float, str] = {}
    for radius in sorted(set(radii)):
        short = f"{radius:.4f}"
        keys[radius] = repr(radius) if short in keys.values() else short
    return keys


def contradictions(certificates: pd.DataFrame, attacks: pd.DataFrame) -> list[int]:
    """Return the images whose certificate is refuted: an adversarial example lies strictly within the radius.

    `attacks` has the columns of attacks.tsv, with one row per image and eps. Either table may hold images that the
    other does not. Raises InputError if the two disagree on the label of an image: they are about different data.
    """
    both = certificates.merge(attacks, on="idx", suffixes=("", "_attacked"))
    different = both.loc[both["label"] != both["label_attacked"], "idx"]
    if len(different):
        idx = int(different.iloc[0])
        raise InputError(f"certificates and attacks have different labels for image {idx}; use the same data for both")
    refuted = (both["correct"] == 1) & (both["success"] == 1) & (both["distance"] < both["radius"])
    return sorted({int(idx) for idx in both.loc[refuted, "idx"]})


def diameter(domain: tuple[float, float], shape: Sequence[int]) -> float:
    """Return the l2 diameter of a box of inputs, rounded up: no radius needs to be larger."""
    low, high = domain
    return (high - low) * math.sqrt(math.prod(shape)) * (1 + 2.0**-50)


def _check(images: Tensor, audit: Audit) -> None:
    if tuple(images.shape[1:]) != tuple(audit.input_shape):
        raise InputError(
            f"the bound is for inputs {tuple(audit.input_shape)}; the images are {tuple(images.shape[1:])}"
        )
    if audit.box is not None:
        raise InputError("the bound holds around one input only; audit the model on the domain of all images")
    low, high = audit.domain
    if not ((images >= low) & (images <= high)).all():
        raise InputError(f"the bound holds for inputs in [{low}, {high}], and some images lie outside; scale them")
