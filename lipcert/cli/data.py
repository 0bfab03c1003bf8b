"""`lipcert data`: the data sets, and whether their files are there."""

from __future__ import annotations

import click

from lipcert.cli.options import data_root_option, json_option, note, table, write_json


@click.command(
    epilog="""\b
Examples:
  lipcert data
  lipcert data --data-root /data --json -
  lipcert data --download cifar10

Your own images: --data folder:PATH, where PATH holds train/CLASS/IMAGE and test/CLASS/IMAGE, or just CLASS/IMAGE."""
)
@data_root_option
@click.option("--download", metavar="NAME", help="Fetch this data set first.")
@json_option
def command(data_root: str | None, download: str | None, json_file: str | None) -> None:
    """List the data sets: size, and where their files are or should be."""
    from lipcert import data
    from lipcert.registry import datasets

    if download is not None:
        read = data.load if datasets.task(download) == "classification" else data.load_scenes
        read(download, data_root, "test", download=True)
    place = data.data_root(data_root)
    sources = [data.info(name) for name in datasets.list()]
    if json_file:
        write_json(json_file, [_record(source, place) for source in sources])
    if json_file != "-":
        header = ("data", "images", "test", "classes", "shape", "augment", "files")
        click.echo(table([_row(source, place) for source in sources], header))
        note("next: lipcert train --data NAME --model NAME -o RUN")


def _record(source, place) -> dict:
    from lipcert.registry import datasets

    missing = source.missing(place)
    return {
        "name": source.name,
        "train": source.sizes[0],
        "test": source.sizes[1],
        "classes": source.num_classes,
        "task": datasets.task(source.name),
        "shape": list(source.shape),
        "augment": source.augment,
        "present": missing is None,
        "missing": None if missing is None else str(missing),
        "download": source.downloads,
        "get": source.get,
    }


def _row(source, place) -> tuple[str, ...]:
    missing = source.missing(place)
    if missing is not None:
        files = f"missing: {missing}" + (f" (lipcert data --download {source.name})" if source.downloads else "")
    else:
        files = source.get if not source.needs else str(place / source.needs[0])
    sizes = (str(source.sizes[0]), str(source.sizes[1]), str(source.num_classes))
    return (source.name, *sizes, ",".join(map(str, source.shape)), source.augment, files)
