"""A whole certificate: what it is about, its proof, its rows, and the report of what was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .evaluation import evaluate
from .maps import Grid
from .program import Program
from .reading import Array, Rejected, number_of, only, read_json, read_tensors, require, sha256_of, take
from .rounding import UP
from .rows import Rows, Scenes
from .steps import Step, pairwise, position, prove

PROGRAM, ROWS, SCENES = "program.safetensors", "certificates.tsv", "scenes.tsv"


@dataclass(frozen=True)
class Report:
    """What was found. `reason` is empty if everything that was looked at holds."""

    accepted: bool
    reason: str
    steps: int = 0  # confirmed
    rows: int = 0  # images that there are rows of, consistent in themselves
    images: int = 0  # whose rows were confirmed
    upper: float = math.nan  # own bound of the output
    claimed: float = math.nan
    note: str = ""
    own: Sequence[tuple[str, float, float]] = ()  # value, own factor, claimed factor

    def __str__(self) -> str:
        if not self.accepted:
            return self.reason
        bound = f"{self.steps} steps confirmed: L = {self.upper:.9g} (claimed {self.claimed:.9g})"
        return f"{bound}; the rows of {self.images} images confirmed" + (f"; {self.note}" if self.note else "")


def check(
    certificate: Path, *, weights: Path | None = None, images: Array | None = None, labels: Array | None = None,
    batch_size: int = 50, progress: Callable[[int], None] = lambda done: None,
) -> Report:  # fmt: skip
    """Check a certificate, and the rows of `images` 0 … n-1 (n, c, h, w) as far as they are given.

    `labels` (n, h', w') are those of the positions of segmented images. `weights` is program.safetensors, by default
    the one beside the certificate; no path in the files is followed. Raises OSError for files that are not there. What
    does not hold, or cannot be judged, is the `reason` of the report.
    """
    try:
        record = read_json(certificate)
        facts = Facts.of(record)
        proof = Proof.of(record, facts, weights or certificate.parent / PROGRAM)
        rows = _rows(certificate.parent, facts, proof)
        checked, note = 0, ""
        if facts.precision != "float64":
            note = f"rows about {facts.precision} programs are not rechecked yet"
        elif images is None:
            note = "without images, only the proof and the arithmetic of the rows were checked"
        else:
            fits = images.ndim == 4 and images.shape[1:] == facts.shape
            require(fits, f"the images are {list(images.shape[1:])}, not {list(facts.shape)}")
            require(len(images) <= facts.n, f"there are {len(images)} images, but {facts.n} rows")
            require(labels is None or len(labels) == len(images), "there are not as many labels as images")
            for start in range(0, len(images), batch_size):
                part = images[start : start + batch_size].astype(np.float64)
                _confirm(rows, facts, proof, start, part, labels)
                checked += len(part)
                progress(len(part))
    except Rejected as error:
        return Report(False, str(error))
    except (RecursionError, MemoryError, OverflowError, np.linalg.LinAlgError) as error:
        return Report(False, f"the certificate is too large to be rechecked ({type(error).__name__})")
    steps = _flat(proof.steps)
    own = [(s.value, f, c) for s in steps for f, c in zip(s.factors, s.claimed, strict=True)]
    return Report(True, "", len(steps), facts.n, checked, proof.bounds[proof.program.output], proof.upper, note, own)


@dataclass(frozen=True)
class Facts:
    """What a certificate says that it is about; `radii` and `scenes` (SHA-256 of image and labels) if it has masks."""

    shape: Grid
    domain: tuple[float, float]
    n: int
    precision: str
    radii: Sequence[float] = ()
    scenes: Sequence[tuple[str, str]] = ()

    @classmethod
    def of(cls, record: Any) -> Facts:
        shape, domain = (take(record, key, list, "certificate") for key in ("input_shape", "domain"))
        sides = len(shape) == 3 and all(type(side) is int and 0 < side < 1 << 16 for side in shape)
        require(sides, f"certificate: input_shape {shape} is no shape of an image")
        interval = len(domain) == 2 and all(type(x) in (int, float) for x in domain) and domain[0] < domain[1]
        require(interval, f"certificate: domain {domain} is no interval")
        precision = take(record, "precision", str, "certificate")
        known = precision in ("float64", "float64 program", "float32")
        known &= take(record, "norm", str, "certificate") == "l2"
        require(known, "certificate: precision or norm is not one that this checker knows")
        n, task = take(record, "n", int, "certificate"), record.get("task", "classification")
        require(task in ("classification", "segmentation"), f"certificate: task {task!r} is not known here")
        radii, scenes = [], []
        if task == "segmentation":
            radii, scenes = (take(record, key, list, "certificate") for key in ("eps", "scenes"))
            require(0 < len(radii) and all(type(r) in (int, float) and r >= 0 for r in radii), "certificate: eps")
            hashes = all(isinstance(s, list) and len(s) == 2 and all(isinstance(h, str) for h in s) for s in scenes)
            require(hashes and len(scenes) == n, "certificate: 'scenes' is not one pair of SHA-256 for each image")
        interval = float(domain[0]), float(domain[1])
        return cls((*shape,), interval, n, precision, [float(r) for r in radii], [(s[0], s[1]) for s in scenes])


@dataclass(frozen=True)
class Proof:
    """The program and its proof, confirmed."""

    program: Program
    steps: Sequence[Step]
    bounds: Mapping[str, float]  # own ones of the values that have a step
    upper: float  # as claimed
    heads: Sequence[str]
    lipschitz: Array  # (k, k), own bounds of differences of logits
    distances: Mapping[str, Array]  # of the classes' rows, for every head

    @classmethod
    def of(cls, record: Any, facts: Facts, weights: Path) -> Proof:
        """Read the program and confirm every step."""
        written, proof = (take(record, key, dict, "certificate") for key in ("program", "proof"))
        program = Program(written, read_tensors(weights, take(written, "sha256", str, "program")))
        fits = program.shape(program.input) == [1, *facts.shape]
        require(fits, f"the input of the program is not an image {list(facts.shape)}, as input_shape says")
        only(proof, ("steps", "upper", "heads"), "proof")
        steps, bounds = prove(program, take(proof, "steps", list, "proof"), program.input)
        require(program.output in bounds, "proof: no step bounds the output")
        upper = number_of(proof, "upper", "proof")
        last = next((s["bound"] for s in proof["steps"] if s["value"] == program.output), 1.0)
        require(upper >= last, f"proof: upper {upper!r} is below the bound of the output")
        heads = take(proof, "heads", list, "proof")
        for head in heads:
            require(isinstance(head, str) and head in bounds, f"proof: the head {head!r} has no step")
        return cls(program, steps, bounds, upper, heads, *pairwise(program, bounds, heads))


def _rows(folder: Path, facts: Facts, proof: Proof) -> Rows | Scenes:
    if not facts.radii:
        diameter = (facts.domain[1] - facts.domain[0]) * math.sqrt(math.prod(facts.shape)) * UP
        return Rows.read(folder / ROWS, facts.n, diameter, proof.lipschitz)
    head = proof.heads[0] if proof.heads else proof.program.output
    apart = proof.distances.get(head, np.full(proof.lipschitz.shape, math.sqrt(2) * UP))
    logits = proof.program.shape(proof.program.output)
    alone = position(proof.program, proof.steps, proof.bounds, head)
    return Scenes.read(folder / SCENES, facts.radii, facts.scenes, logits, apart, proof.bounds[head], alone)


def _confirm(rows: Rows | Scenes, facts: Facts, proof: Proof, start: int, images: Array, labels: Array | None) -> None:
    """Confirm the rows of a batch, of which `start` is the first."""
    for i, image in enumerate(images, start):
        require(sha256_of(image, "<f8") == rows.sha256(i), f"row {i}: the image has another SHA-256")
        inside = bool(((image >= facts.domain[0]) & (image <= facts.domain[1])).all())
        require(inside, f"row {i}: the image is outside the domain {list(facts.domain)}")
    with np.errstate(all="ignore"):
        found = evaluate(proof.program, proof.steps, proof.distances, images)
    for i, (z, error, doubts) in enumerate(zip(*found, strict=True), start):
        rows.confirm(i, z, error, doubts, None if labels is None else labels[i])


def _flat(steps: Sequence[Step]) -> list[Step]:
    """Return steps and those of their branches."""
    return [inner for step in steps for inner in (*(s for *_, b in step.branches for s in _flat(b)), step)]
