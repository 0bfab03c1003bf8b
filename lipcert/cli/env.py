"""`lipcert env`: the facts a bug report or a result needs."""

from __future__ import annotations

from importlib import metadata

import click

from lipcert.cli.options import device_option, json_option, write_json

_PACKAGES = ("torchvision", "scipy", "pandas", "safetensors", "scikit-learn", "autoattack", "pyautoattack", "timm")


@click.command(
    epilog="""\b
Examples:
  lipcert env
  lipcert env --json -"""
)
@device_option
@json_option
def command(device: str, json_file: str | None) -> None:
    """Print versions, device and arithmetic settings."""
    import torch

    from lipcert.numerics import exact
    from lipcert.runtime import environment, select_device

    facts = environment(select_device(device))
    facts |= {package: _version(package) for package in _PACKAGES}
    facts["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    with exact() as arithmetic:
        facts["certification"] = dict(arithmetic)
    if json_file:
        write_json(json_file, facts)
    if json_file != "-":
        width = max(map(len, facts))
        for key, value in facts.items():
            click.echo(f"{key.ljust(width)}  {'not installed' if value is None else value or 'none'}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
