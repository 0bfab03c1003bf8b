"""`lipcert certify`: the radius within which no input changes the prediction, for every image of a split."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lipcert
from lipcert.cli.options import Radii, note, table, write_json
from lipcert.cli.subject import Subject, load_subject, progress, subject_options
from lipcert.files import read_json
from lipcert.files import write_json as write_file

if TYPE_CHECKING:
    from lipcert.bounds.audit import Audit
    from lipcert.certificate import Certificate
    from lipcert.proof import Proof


@click.command(
    epilog="""\b
Examples:
  lipcert certify runs/digits
  lipcert certify runs/cifar10 --limit 1000 --radii 36/255,72/255,108/255
  lipcert certify runs/cifar10 --deployed float64 -o runs/cifar10-float64
  lipcert certify runs/cifar10 --deployed float32 -o runs/cifar10-float32
  lipcert certify path/to/file.py:factory --data folder:photos -o certified

Certified accuracy at r is the share of all images that are classified rightly and whose radius is greater than r."""
)
@subject_options
@click.option(
    "--radii",
    type=Radii(),
    help="Radii of the table, in l2.  [default: 36/255,72/255,108/255,1; for segmentation: 0.1,0.25,0.5,1]",
)
@click.option(
    "--deployed",
    type=click.Choice(["float64", "float32"]),
    help="Certify the program that runs in this precision, rounding errors in the whole ball included, instead of the "
    "network in real arithmetic.",
)
def command(
    *,
    radii: tuple[float, ...] | None,
    deployed: str | None,
    resume: bool,
    batch_size: int,
    json_file: str | None,
    **options: Any,
) -> None:
    """Certify l2 radii of MODEL on the images of a data set.

    Results go to certificates.tsv, certificate.json with program.safetensors, and summary.json in the run folder, or in
    the folder given with -o. `lipcert verify` checks them.

    Where every pixel has a label, radii of single pixels and counts of all pixels of an image go to scenes.tsv, and the
    first maps to maps.safetensors.
    """
    from lipcert.cli.scenes import is_segmentation

    # "float64" alone has always been real arithmetic, evaluated in float64; readers of certificates rely on it
    precision = {None: "float64", "float64": "float64 program", "float32": "float32"}[deployed]
    if is_segmentation(options["model"], options["data"]):
        from lipcert.cli.certify_scenes import certify_scenes

        certify_scenes(
            radii=radii,
            deployed=deployed and precision,
            resume=resume,
            batch_size=batch_size,
            json_file=json_file,
            **options,
        )
        return
    from lipcert.certificate import CERTIFICATE, PROGRAM, ROWS, SUMMARY, begin, read
    from lipcert.certify import RADII, summarise

    subject = load_subject(**options)
    start = time.perf_counter()
    audit, proof, certificate = _prove(subject, precision)
    first = begin(subject.folder, certificate, batch_size=batch_size, resume=resume, tensors=proof.file)
    if first == certificate.n:
        note(f"{subject.folder / ROWS} holds these certificates already; nothing was computed")
    _certify(subject, audit, proof, certificate, first, batch_size)
    rows = read(subject.folder)
    summary = summarise(rows, RADII if radii is None else radii) | {
        "upper": audit.upper.value,
        "lower": _lower(subject.folder, certificate.weights_sha256),
        "precision": certificate.precision,
        "tf32": certificate.arithmetic["tf32"],
        "seconds": float(rows["time"].sum()),
    }
    write_file(subject.folder / SUMMARY, summary)
    if json_file is not None:
        write_json(json_file, summary)
    if json_file != "-":
        click.echo(_text(subject, summary))
    seconds = time.perf_counter() - start
    note(f"wrote {ROWS}, {CERTIFICATE}, {PROGRAM} and {SUMMARY} to {subject.folder} ({seconds:.1f} s)")
    note(f"next: lipcert attack {options['model']} --eps 36/255 tries to break them")


def _prove(subject: Subject, precision: str) -> tuple[Audit, Proof, Certificate]:
    """Bound the network, write down why, and describe the certificate that follows."""
    from lipcert.bounds.audit import audit
    from lipcert.certificate import Certificate
    from lipcert.numerics import exact
    from lipcert.proof import Proof
    from lipcert.runtime import environment

    found = audit(subject.network, subject.shape)
    proof = Proof.of(found)
    with exact() as facts:
        arithmetic = {**facts, **environment(subject.device)}
    return (
        found,
        proof,
        Certificate(
            model=subject.name,
            weights_sha256=found.weights_sha256,
            data=subject.dataset.name,
            split=subject.dataset.split,
            n=len(subject.dataset),
            precision=precision,
            input_shape=tuple(found.input_shape),
            domain=found.domain,
            audit=found.to_json(),
            arithmetic=arithmetic,
            lipcert=lipcert.__version__,
            **proof.to_json(),
        ),
    )


def _certify(
    subject: Subject, audit: Audit, proof: Proof, certificate: Certificate, first: int, batch_size: int
) -> None:
    from lipcert.certificate import write
    from lipcert.certify import rows_of_batches
    from lipcert.data import loader

    batches = loader(subject.dataset, batch_size, start_batch=first // batch_size)
    placed = ((images.to(subject.device), labels) for images, labels in batches)
    with progress(first, certificate.n, "certifying") as advance:
        if first == certificate.n:
            return
        found = rows_of_batches(audit, placed, precision=certificate.precision, first=first, pairwise=proof.pairwise)
        for rows in found:
            write(subject.folder, rows)
            advance(len(rows))


def _lower(folder: Path, weights_sha256: str) -> float | None:
    """Return the lower bound that `lipcert bound` found for these weights, if it was asked."""
    path = folder / "bound.json"
    bound = read_json(path) if path.is_file() else {}
    return bound.get("lower") if bound.get("weights_sha256") == weights_sha256 else None


def _text(subject: Subject, summary: dict[str, Any]) -> str:
    accuracies = [("clean", f"{summary['clean']:.2%}")]
    accuracies += [(f"l2 {radius}", f"{share:.2%}") for radius, share in summary["certified"].items()]
    what = f"{subject.name} on {summary['n']} images of {subject.dataset.name} {subject.dataset.split}"
    about = {"float64": "real arithmetic"}.get(summary["precision"], f"the {summary['precision'].split()[0]} program")
    bound = f"Lipschitz bound {summary['upper']:.6g}, certified for {about}"
    return f"{what}, {bound}\n\n{table(accuracies, ('', 'accuracy'))}\n\nmean certified radius {summary['acr']:.4f}"
