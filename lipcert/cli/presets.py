"""`lipcert presets`: the training recipes that ship with lipcert."""

from __future__ import annotations

import click

from lipcert.cli.options import note


@click.command(
    epilog="""\b
Examples:
  lipcert presets
  lipcert presets digits > mine.yaml"""
)
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List the presets with what they cost and give, or print the one called NAME as a file to start from."""
    from lipcert.config import PRESETS, find_preset

    if name is not None:
        click.echo(find_preset(name).read_text(), nl=False)
        note("next: save it, change it, and run: lipcert train FILE -o RUN")
        return
    for path in sorted(PRESETS.glob("*.yaml")):
        click.echo(path.stem)
        for line in _header(path.read_text()):
            click.echo(f"    {line}")
    note("next: lipcert train --preset NAME -o RUN")


def _header(text: str) -> list[str]:
    """Return the comment lines that a file begins with, without their sign."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return lines
