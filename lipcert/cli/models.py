"""`lipcert models`: the names that MODEL may be."""

from __future__ import annotations

import click

from lipcert.cli.options import json_option, note, table, write_json


@click.command(
    epilog="""\b
Examples:
  lipcert models
  lipcert models 'lipshift_*'
  lipcert models --json -"""
)
@click.argument("pattern", default="*")
@json_option
def command(pattern: str, json_file: str | None) -> None:
    """List the models, or those whose name matches the glob PATTERN."""
    from lipcert.errors import InputError
    from lipcert.registry import models

    names = models.list(pattern)
    if not names:
        raise InputError(f"no model matches {pattern!r}; the models are {', '.join(models.list())}")
    rows = [(name, _first_line(models.get(name).__doc__)) for name in names]
    if json_file:
        write_json(json_file, [{"name": name, "about": about} for name, about in rows])
    if json_file != "-":
        click.echo(table(rows, ("model", "about")))
        note(f"next: lipcert bound {names[0]} --input-shape 3,32,32")


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
