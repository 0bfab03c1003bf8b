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

from results import record
from variants import Change, add_options, groups, run_all, spread

from lipcert.config import TrainConfig
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
    model, section, variants = STUDIES[args.model]
    output = Path(args.output or f"runs/ablation-{args.model}")

    def run(folder: Path, change: Change, seed: int) -> dict:
        config = TrainConfig(
            model=model,
            model_args={"embed_dim": 48, "depths": [3], "neck": 256, **change},
            data=args.data,
            epochs=args.epochs,
            seed=seed,
            lr=3e-3,
            batch_size=128,
        )
        return train(config, folder, data_root=args.data_root, resume=(folder / "state.pt").exists())

    def say(row: dict) -> str:
        certified, clean = 100 * row["val_certified"], 100 * row["val_clean"]
        return f"certified {certified:.2f} %, clean {clean:.2f} %, L {row['lipschitz_upper']:.3g}"

    run_all(variants, output, args, run, say)
    for name, group in groups(variants, output) if args.record else ():
        record(
            section,
            f"{name} | {spread(group.val_certified)} | {spread(group.val_clean)} | "
            f"{group.lipschitz_upper.median():.2f} | {args.data}, {args.epochs} epochs, {len(group)} seeds",
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=STUDIES, default="lipshift")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("-o", "--output", help="runs/ablation-MODEL")
    add_options(parser, epochs=1)
    args = parser.parse_args()
    main()
