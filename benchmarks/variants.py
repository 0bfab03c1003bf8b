"""What ablations share: variants of a model are trained with several seeds, in parts if wanted; no run is repeated."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lipcert.files import read_json, write_json

Change = Mapping[str, Any]  # arguments of the model


def add_options(parser: argparse.ArgumentParser, *, epochs: int) -> None:
    parser.add_argument("--data-root")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants; all")
    parser.add_argument("--part", default="0/1", help="K/N: run every N-th job from the K-th on")
    parser.add_argument("--record", action="store_true", help="add rows to RESULTS.md")


def run_all(
    variants: Mapping[str, Change], output: Path, args: argparse.Namespace,
    run: Callable[[Path, Change, int], dict[str, Any]], say: Callable[[dict[str, Any]], str],
) -> None:  # fmt: skip
    """Run each variant with each seed in a folder of its own, which `run` may find begun, and print a line for each."""
    if unknown := {*(args.only or ())} - {*variants}:
        raise SystemExit(f"unknown variants {sorted(unknown)}; the variants are {list(variants)}")
    part, parts = map(int, args.part.split("/"))
    jobs = [(name, seed) for seed in range(args.seeds) for name in variants if name in (args.only or variants)]
    for name, seed in jobs[part::parts]:
        folder = output / f"{name.replace(' ', '-').replace(',', '').replace(':', '')}-{seed}"
        if not (folder / "row.json").exists():
            row = run(folder, variants[name], seed)
            write_json(folder / "row.json", {**row, "variant": name, "seed": seed})
        print(f"{name}, seed {seed}: {say(read_json(folder / 'row.json'))}", flush=True)


def groups(variants: Mapping[str, Change], output: Path) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the rows of the finished runs of each variant that has some."""
    rows = pd.DataFrame([read_json(path) for path in sorted(output.glob("*/row.json"))])
    for name in variants:
        if len(group := rows[rows.variant == name]):
            yield name, group


def spread(shares: pd.Series) -> str:
    """Return mean and range in percent."""
    return f"{100 * shares.mean():.1f} ({100 * shares.min():.1f} to {100 * shares.max():.1f})"
