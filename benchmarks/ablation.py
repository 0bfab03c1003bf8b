"""What each choice of an architecture is worth: one change at a time, several seeds, validation split only.

    python benchmarks/ablation.py --model lipshift --data-root DIR [--record]       CIFAR-10, about 30 core-minutes
    python benchmarks/ablation.py --model lipsformer --data-root DIR [--record]     about an hour of one core
    python benchmarks/ablation.py --part 0/2 &                   this half of the runs; finished runs are not repeated

Every run has the same budget (epochs over the 45 000 training images), width (48, 3 blocks, dense layer 256),
optimiser and loss; the figures are certified and clean accuracy on the 5 000 validation images at 36/255, by the
training-time estimate, mean and range over the seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from results import record

from lipcert.config import TrainConfig
from lipcert.files import read_json, write_json
from lipcert.train import train

LIPSHIFT: dict[str, dict] = {
    "lipshift_tiny": {},
    "published residual": {"residual": "published"},
    "published residual, zero-fill shift": {"residual": "published", "shift": "zero"},
    "zero-fill shift": {"shift": "zero"},
    "shift in the branch, circular convolution": {"shift": "branch", "circular": True},
    "without centring": {"center": False},
    "average pooling instead of the dense layer": {"neck": 0, "pool": "avg"},
}
BASE = {
    "attention": [3], "channel_mix": [3], "tau": 1.0, "eps": 1.0, "window_size": 4, "num_heads": 4,
    "residual": "convex", "start": 0.2, "orthogonal": True,
}  # fmt: skip
LIPSFORMER: dict[str, dict] = {
    "three blocks attend: 4 x 4 windows, 4 heads, tau 1, eps 1, convex from 0.2, orthogonal": BASE,
    "attention off": {**BASE, "attention": [0]},
    "attention and channel mix off": {**BASE, "attention": [0], "channel_mix": [0]},
    "one block attends, convex from 0.05": {**BASE, "attention": [1], "start": 0.05},
    "one block attends": {**BASE, "attention": [1]},
    "tau 0.25": {**BASE, "tau": 0.25},
    "convex from 0.05": {**BASE, "start": 0.05},
    "weighted residual": {**BASE, "residual": "weighted"},
    "2 x 2 windows": {**BASE, "window_size": 2},
    "8 x 8 windows": {**BASE, "window_size": 8},
    "free projections": {**BASE, "orthogonal": False},
    "one head": {**BASE, "num_heads": 1},
    "convex from 0.5": {**BASE, "start": 0.5},
}
STUDIES = {
    "lipshift": ("lipshift_tiny", "LipShiFT ablation", LIPSHIFT),
    "lipsformer": ("lipsformer_swin_tiny_1lip", "LipsFormer ablation", LIPSFORMER),
}


def main() -> None:
    part, parts = map(int, args.part.split("/"))
    model, section, variants = STUDIES[args.model]
    output = Path(args.output or f"runs/ablation-{args.model}")
    if unknown := set(args.only or ()) - set(variants):
        raise SystemExit(f"unknown variants {sorted(unknown)}; the variants of {args.model} are {list(variants)}")
    chosen = {name: change for name, change in variants.items() if not args.only or name in args.only}
    jobs = [(name, change, seed) for seed in range(args.seeds) for name, change in chosen.items()]
    for number, (name, change, seed) in enumerate(jobs):
        if number % parts != part:
            continue
        folder = output / f"{name.replace(' ', '-').replace(',', '').replace(':', '')}-{seed}"
        if not (folder / "row.json").exists():
            config = TrainConfig(
                model=model,
                model_args={"embed_dim": 48, "depths": [3], "neck": 256, **change},
                data=args.data,
                epochs=args.epochs,
                seed=seed,
                lr=3e-3,
                batch_size=128,
            )
            row = train(config, folder, data_root=args.data_root, resume=(folder / "state.pt").exists())
            write_json(folder / "row.json", {**row, "variant": name, "seed": seed})
        row = read_json(folder / "row.json")
        print(
            f"{name}, seed {seed}: certified {100 * row['val_certified']:.2f} %, clean {100 * row['val_clean']:.2f} %, "
            f"L {row['lipschitz_upper']:.3g}",
            flush=True,
        )
    if args.record:
        rows = pd.DataFrame([read_json(path) for path in output.glob("*/row.json")])
        for name in variants:
            if (group := rows[rows.variant == name]).empty:
                continue
            certified, clean = 100 * group.val_certified, 100 * group.val_clean
            record(
                section,
                (
                    f"{name} | {certified.mean():.1f} ({certified.min():.1f} to {certified.max():.1f}) | "
                    f"{clean.mean():.1f} ({clean.min():.1f} to {clean.max():.1f}) | "
                    f"{group.lipschitz_upper.median():.2f} | "
                    f"{args.data}, {args.epochs} epochs, {len(group)} seeds"
                ),
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=STUDIES, default="lipshift")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-root")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants; all")
    parser.add_argument("--part", default="0/1", help="K/N: run every N-th job from the K-th on")
    parser.add_argument("-o", "--output", help="runs/ablation-MODEL")
    parser.add_argument("--record", action="store_true", help="add rows to RESULTS.md")
    args = parser.parse_args()
    main()
