"""`lipcert attack`: AutoAttack on every image of a split, and whether what it finds contradicts a certificate."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lipcert
from lipcert.cli.options import Radii, note, table, write_json
from lipcert.cli.subject import Subject, load_subject, progress, subject_options
from lipcert.errors import Finding, InputError
from lipcert.files import append_rows, read_json, read_rows
from lipcert.files import write_json as write_file

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from lipcert.attacks import Ensemble

ROWS, RECORD = "attacks.tsv", "attacks.json"
COLUMNS = ("eps", "idx", "label", "predict", "adversarial", "distance", "success")


@dataclass
class _Record:
    """What attacks.json says of all radii; it is written anew after every batch."""

    path: Path
    eps: tuple[float, ...]
    facts: dict[str, Any]  # what decides the rows
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Keep a note once, and show it."""
        if text not in self.notes:
            self.notes.append(text)
            note(text)

    def write(self, rows: pd.DataFrame, contradictions: dict[float, list[int]] | None = None) -> list[dict[str, Any]]:
        """Write one entry per radius and return them; `contradictions` is None while nothing was compared."""
        entries = []
        for eps in self.eps:
            these = rows[rows["eps"] == eps]
            right = these["predict"] == these["label"]
            entries.append(
                {
                    "n": len(these),
                    "eps": eps,
                    "version": self.facts["version"],
                    "clean": float(right.mean()) if len(these) else 0.0,
                    "robust": float((right & (these["success"] == 0)).mean()) if len(these) else 0.0,
                    "contradictions": [] if contradictions is None else contradictions[eps],
                    "compared": contradictions is not None,
                    "seconds": self.seconds,
                    **{key: value for key, value in self.facts.items() if key != "version"},
                    "notes": self.notes,
                    "lipcert": lipcert.__version__,
                }
            )
        write_file(self.path, entries)
        return entries


@click.command(
    epilog="""\b
Examples:
  lipcert attack runs/digits --eps 36/255
  lipcert attack runs/cifar10 --eps 36/255,72/255 --limit 128
  lipcert attack runs/cifar10 --eps 0.5 --attacks apgd-ce,fab-t

An image counts as robust at eps if it is classified rightly and no attack finds an adversarial example within eps."""
)
@subject_options
@click.option(
    "--eps", type=Radii(), multiple=True, required=True, help="l2 radius of the attack, like 36/255; or several."
)
@click.option("--version", default="standard", show_default=True, help="AutoAttack version: standard or plus.")
@click.option(
    "--attacks",
    metavar="LIST",
    help="Only these attacks of apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square; for segmentation of masked-ce, "
    "balanced-ce, js, segpgd, cospgd, cheapest.",
)
@click.option(
    "--steps", type=click.IntRange(4), default=300, show_default=True, help="Gradients of an attack on segmentation."
)
def command(
    *,
    eps: tuple[tuple[float, ...], ...],
    version: str,
    attacks: str | None,
    steps: int,
    resume: bool,
    batch_size: int,
    json_file: str | None,
    **options: Any,
) -> None:
    """Attack MODEL with AutoAttack in l2 and compare with its certificates.

    Results go to attacks.tsv and attacks.json in the run folder, or in the folder given with -o. If certificates.tsv is
    there, an adversarial example within a certified radius is a contradiction: exit code 3.

    Where every pixel has a label, an ensemble for segmentation attacks all pixels of an image at once; results go to
    scene_attacks.tsv and scene_attacks.json and are compared with scenes.tsv.
    """
    from lipcert.attacks import Ensemble
    from lipcert.cli.scenes import is_segmentation

    radii = tuple(sorted({radius for group in eps for radius in group}))
    if is_segmentation(options["model"], options["data"]):
        from lipcert.cli.attack_scenes import attack_scenes

        attack_scenes(
            eps=radii, attacks=attacks, steps=steps, resume=resume, batch_size=batch_size, json_file=json_file,
            **options,
        )  # fmt: skip
        return
    chosen = None if attacks is None else tuple(attacks.replace(" ", "").split(","))
    with _input_errors():
        ensemble = Ensemble(version=version, attacks=chosen, seed=options["seed"])
    subject = load_subject(**options)
    record = _Record(subject.folder / RECORD, radii, _facts(subject, ensemble, radii, batch_size))
    done = _attack(subject, ensemble, record, batch_size, resume)
    compared = _contradictions(subject, record, done)
    entries = record.write(done, compared)
    if json_file is not None:
        write_json(json_file, entries)
    if json_file != "-":
        click.echo(_text(subject, entries))
    note(f"wrote {ROWS} and {RECORD} to {subject.folder}")
    refuted = sorted({idx for found in (compared or {}).values() for idx in found})
    if refuted:
        what = f"adversarial examples within the certified radius of image{'s' if len(refuted) > 1 else ''} "
        raise Finding(click.style(f"{what}{', '.join(map(str, refuted))}; please report this", fg="red"))
    note(f"next: lipcert report {subject.folder} -o report.html")


def _facts(subject: Subject, ensemble: Ensemble, radii: Sequence[float], batch_size: int) -> dict[str, Any]:
    """Return all that decides a row: two runs with equal facts give equal rows."""
    from lipcert.bounds.core import BoundError
    from lipcert.bounds.tracing import trace

    try:
        weights = trace(subject.network, subject.shape).weights_sha256()
    except BoundError as error:
        note(f"the model cannot be traced ({error}); the attack runs, but is not compared and cannot be resumed")
        weights = None
    return {
        "version": ensemble.version if ensemble.attacks is None else "custom",
        "attacks": list(ensemble.attacks or ()),
        "radii": list(radii),
        "weights_sha256": weights,
        "data": subject.dataset.name,
        "split": subject.dataset.split,
        "seed": ensemble.seed,
        "batch_size": batch_size,
    }


def _attack(subject: Subject, ensemble: Ensemble, record: _Record, batch_size: int, resume: bool) -> pd.DataFrame:
    """Attack what is not attacked yet and return all rows."""
    from lipcert.attacks import autoattack
    from lipcert.certificate import differences, keep_whole_batches, refuse_other
    from lipcert.data import loader

    path, n = subject.folder / ROWS, len(subject.dataset)
    present = len(read_rows(path, COLUMNS))
    if present:
        stored = read_json(record.path)[0] if record.path.exists() else {}
        refuse_other(path, record.path, differences(record.facts, stored) if stored else None)
        record.seconds, record.notes = stored["seconds"], stored["notes"]
    if present >= n * len(record.eps):
        note(f"{path} holds these attacks already; nothing was computed")
        return _read(path)
    first = keep_whole_batches(path, COLUMNS, present, n, batch_size, resume=resume, rows_per_image=len(record.eps))
    rows = _read(path)
    record.write(rows)
    batches = numbered(loader(subject.dataset, batch_size, start_batch=first // batch_size), first)
    attacked = copy.deepcopy(subject.network).float()
    start, before = time.perf_counter(), record.seconds
    with progress(first, n, "attacking") as advance, _input_errors():
        for batch in autoattack(attacked, subject.network, batches, record.eps, ensemble, note=record.note):
            append_rows(path, COLUMNS, [[getattr(row, name) for name in COLUMNS] for row in batch])
            record.seconds = before + time.perf_counter() - start
            record.write(_read(path))
            advance(len(batch) // len(record.eps))
    return _read(path)


def _contradictions(subject: Subject, record: _Record, rows: pd.DataFrame) -> dict[float, list[int]] | None:
    """Return the refuted images for each radius, or None without certificates of these weights and images."""
    from lipcert.certificate import CERTIFICATE, differences, read
    from lipcert.certify import contradictions

    path = subject.folder / CERTIFICATE
    if not path.exists():
        note("there are no certificates in this folder to compare with (lipcert certify writes them)")
        return None
    facts = {name: record.facts[name] for name in ("weights_sha256", "data", "split")}
    found = differences(facts, read_json(path))
    if found:
        note(f"the certificates in this folder are not compared: {'; '.join(found)}")
        return None
    certificates = read(subject.folder)
    return {eps: contradictions(certificates, rows[rows["eps"] == eps]) for eps in record.eps}


def _read(path: Path) -> pd.DataFrame:
    """Return the rows of attacks.tsv; a damaged cell raises InputError."""
    import pandas as pd

    types = {name: float if name in ("eps", "distance") else int for name in COLUMNS}
    try:
        rows = [{name: types[name](cell) for name, cell in row.items()} for row in read_rows(path, COLUMNS)]
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{path} is damaged: {error}") from error
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(types)


def numbered(batches: Iterable[tuple[Tensor, Tensor]], first: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    for images, labels in batches:
        yield first, images, labels
        first += len(labels)


@contextmanager
def _input_errors() -> Iterator[None]:
    """Turn what lipcert.attacks says of its input into an error of the command line."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


def _text(subject: Subject, entries: Sequence[dict[str, Any]]) -> str:
    n = entries[0]["n"]
    what = f"{subject.name} on {n} images of {subject.dataset.name} {subject.dataset.split}, AutoAttack "
    rows = [
        (
            f"{entry['eps']:.4f}",
            f"{entry['clean']:.2%}",
            f"{entry['robust']:.2%}",
            str(len(entry["contradictions"])) if entry["compared"] else "not compared",
        )
        for entry in entries
    ]
    attacks = ",".join(entries[0]["attacks"]) or entries[0]["version"]
    return f"{what}{attacks}\n\n{table(rows, ('l2 eps', 'clean', 'robust', 'contradictions'))}"
