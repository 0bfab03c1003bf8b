"""Files of one run that cannot belong together: found by counting the rows again, reported, never repaired."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lipcert.report import accuracy
from lipcert.report.read import Run

_TIE = 1e-3  # nearer than this to another class, float32 may decide otherwise than float64


def disagreements(run: Run) -> tuple[str, ...]:
    """Return one sentence for each pair of files that contradict each other."""
    return (*_summary(run), *_unfinished(run), *_images(run), *_attacks(run), *_weights(run))


def _summary(run: Run) -> Iterator[str]:
    if run.rows is not None and run.summary.get("n") is not None and not summary_agrees(run):
        yield "summary.json does not agree with certificates.tsv; the report counts the rows (lipcert certify --resume)"


def _unfinished(run: Run) -> Iterator[str]:
    asked = run.certificate.get("n")
    if run.rows is not None and isinstance(asked, int) and len(run.rows) < asked:
        yield f"certificates.tsv has the first {len(run.rows)} of {asked} images (lipcert certify --resume)"


def _images(run: Run) -> Iterator[str]:
    if run.rows is None or run.attacked is None:
        return
    both = run.rows.merge(run.attacked.drop_duplicates("idx"), on="idx", suffixes=("", "_attacked"))
    labels = both["label"] != both["label_attacked"]
    predictions = (both["predict"] != both["predict_attacked"]) & (both["radius"] > _TIE)
    different = int((labels | predictions).sum())
    if different:
        yield (
            f"attacks.tsv and certificates.tsv have other labels or predictions for {different} of {len(both)} images; "
            "they come from different weights or data"
        )


def _attacks(run: Run) -> Iterator[str]:
    if run.attacked is None:
        return
    for entry in run.attacks:
        rows = run.attacked[(run.attacked["eps"] - entry["eps"]).abs() <= 1e-6 * entry["eps"]]
        robust = ((rows["label"] == rows["predict"]) & (rows["success"] == 0)).mean()
        if len(rows) and (len(rows) != entry["n"] or abs(robust - entry["robust"]) > 1e-6):
            yield (
                f"attacks.json does not agree with attacks.tsv at ε {entry['eps']:.4g}; the report counts the rows "
                "(lipcert attack --resume)"
            )


def _weights(run: Run) -> Iterator[str]:
    files = {"certificate.json": run.certificate, "bound.json": run.bound}
    if run.attacks:
        files["attacks.json"] = run.attacks[0]
    hashes = {name: str(entry["weights_sha256"]) for name, entry in files.items() if entry.get("weights_sha256")}
    if len(set(hashes.values())) > 1:
        yield f"{' and '.join(hashes)} are not all about the same weights (weights_sha256)"


def summary_agrees(run: Run) -> bool:
    """Say whether summary.json is what certificates.tsv gives, as far as its rounded radii tell."""
    if run.rows is None or run.summary.get("n") != len(run.rows):
        return False
    clean, mean = run.summary.get("clean"), run.summary.get("acr")
    if clean is None or abs(clean - accuracy.clean_accuracy(run.rows)) > 1e-6:
        return False
    ours = accuracy.average_certified_radius(run.rows)
    if mean is not None and not math.isclose(mean, ours, rel_tol=1e-6, abs_tol=1e-6):
        return False
    for key, value in run.summary["certified"].items():
        low, high = (accuracy.certified_accuracy(run.rows, float(key) + step) for step in (6e-5, -6e-5))
        if not low - 1e-6 <= value <= high + 1e-6:
            return False
    return True
