"""`lipcert train`: train a model with a Lipschitz-margin loss into a run folder."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from math import nan
from pathlib import Path
from typing import Any

import click

from lipcert.cli.options import Radius, data_root_option, device_option, json_option, note, write_json
from lipcert.errors import InputError


@click.command(
    epilog="""\b
Examples:
  lipcert train --preset digits -o runs/digits
  lipcert train --model lipshift_tiny --data cifar10 --epochs 10 -o runs/cifar10
  lipcert train my.yaml --set lr=1e-3 --set model_args.embed_dim=64 -o runs/mine
  lipcert train --preset camvid -o runs/camvid
  lipcert train --resume -o runs/cifar10
  torchrun --nproc-per-node 8 -m lipcert train --preset cifar10 -o runs/cifar10"""
)
@click.argument("config", required=False, type=click.Path(dir_okay=False))
@click.option("--preset", metavar="NAME", help="Start from a shipped configuration (lipcert presets).")
@click.option("--model", metavar="NAME", help="Model to train (lipcert models).")
@click.option("--data", metavar="NAME", help="Data set (lipcert data), or folder:PATH.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the training images.")
@click.option("--eps", type=Radius(), help="l2 radius to train for, like 36/255.")
@click.option(
    "--loss",
    metavar="NAME",
    help="emma, gloro, trades, offset_cross_entropy, tau_cross_entropy or cross_entropy.  [default: emma]",
)
@click.option("--seed", type=click.IntRange(0), help="Seed of everything random.  [default: 0]")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set any key of the configuration.")
@click.option(
    "-o", "--output", "run", required=True, type=click.Path(file_okay=False, path_type=Path), help="Run folder."
)
@click.option("--resume", is_flag=True, help="Continue the run in this folder where it stopped.")
@click.option("--download", is_flag=True, help="Fetch the data set if it is missing.")
@device_option
@data_root_option
@json_option
def command(
    config: str | None,
    preset: str | None,
    settings: tuple[str, ...],
    run: Path,
    resume: bool,
    download: bool,
    device: str,
    data_root: str | None,
    json_file: str | None,
    **given: Any,
) -> None:
    """Train a model; CONFIG is a YAML file of `key: value` lines (default values: lipcert presets)."""
    from lipcert.config import find_preset, load_config, parse_settings
    from lipcert.errors import unknown
    from lipcert.registry import losses, models

    if config and preset:
        raise InputError("give a configuration file or --preset, not both")
    changes = {**{key: value for key, value in given.items() if value is not None}, **parse_settings(settings)}
    file = find_preset(preset) if preset else config
    if resume:
        resolved = load_config(run / "config.yaml")
        if file or changes:
            wanted = load_config(file or run / "config.yaml", changes)
            if wanted != resolved:
                raise InputError(f"--resume continues {run} with its own configuration; leave out the other options")
    else:
        resolved = load_config(file, changes)
    for registry, name in ((models, resolved.model), (losses, resolved.loss)):
        if name not in registry:
            raise unknown(registry.kind, name, registry.list())

    from lipcert.train import train

    row = train(
        resolved,
        run,
        data_root=data_root,
        download=download,
        device=device,
        resume=resume,
        progress=_bar if sys.stderr.isatty() else _silent,
    )
    if row["lipschitz_upper"] is None:  # one of several processes, and not the first: that one speaks
        return
    if json_file != "-":
        overlap = "" if row["val_miou"] is None else f"mean IoU {100 * row['val_miou']:.2f} %, "
        click.echo(
            f"validation: clean {100 * row['val_clean']:.2f} %, {overlap}certified at {resolved.eps:.4f} by the "
            f"estimate {100 * row['val_certified']:.2f} %; L of the features: estimated "
            f"{row['lipschitz_estimate'] or nan:.6g}, proved {row['lipschitz_upper']:.6g}"
        )
    if json_file:
        write_json(json_file, row)
    note(f"wrote {run}\nnext: lipcert bound {run}; lipcert certify {run} --data {resolved.data}")


def _bar(batches: Iterable, length: int, label: str) -> Iterable:
    with click.progressbar(batches, length=length, label=label, file=sys.stderr) as bar:
        yield from bar


def _silent(batches: Iterable, length: int, label: str) -> Iterable:
    return batches
