"""What mixers and decoders of Lip-SegFormer are worth on CamVid: several seeds, validation split only.

    python benchmarks/scene_ablation.py --data-root DIR [--record]     about 20 minutes of one core
    python benchmarks/scene_ablation.py --part 0/2 &     this half of the runs; finished runs are not repeated

Every run has the same budget of epochs, width (24 channels at stride 4, two blocks a stage), optimiser and loss. Shares
are of the labelled pixels of the validation images, certified by the proved bound, one perturbation for all pixels of
an image: mean and range over the seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from results import record

import lipcert
from lipcert.checkpoint import load_model
from lipcert.config import TrainConfig
from lipcert.data import load_scenes, scene_loader
from lipcert.files import read_json, write_json
from lipcert.segment import certify_segmentation, constants
from lipcert.tasks import STRIDE, scene_size
from lipcert.train import train

VARIANTS: dict[str, dict] = {
    "shift, split decoder": {},
    "attention in windows of 3 x 4, last stage": {"mixers": ["shift", "shift", "window"]},
    "attention in windows of 3 x 4 and Mix-FFN, last stage": {"mixers": ["shift", "shift", "window"], "ffn": "mix"},
    "attention to a map reduced by 2 x 2, last stage": {"mixers": ["shift", "shift", "reduced"]},
    "shift, mlp decoder": {"decoder": "mlp"},
    "shift, pixelshuffle decoder": {"decoder": "pixelshuffle"},
}
WIDTH, RADII = 128, (0.25, 1.0)


def main() -> None:
    part, parts = map(int, args.part.split("/"))
    output = Path(args.output)
    jobs = [(name, change, seed) for seed in range(args.seeds) for name, change in VARIANTS.items()]
    for number, (name, change, seed) in enumerate(jobs):
        if number % parts != part:
            continue
        folder = output / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
        if not (folder / "row.json").exists():
            write_json(folder / "row.json", {**run(folder, change, seed), "variant": name, "seed": seed})
        row = read_json(folder / "row.json")
        print(
            f"{name}, seed {seed}: clean {100 * row['clean']:.2f} %, certified {100 * row['0.25']:.2f} % and "
            f"{100 * row['1.0']:.2f} %, L {row['proved']:.3g}, estimated {row['estimated']:.3g}",
            flush=True,
        )
    if args.record:
        rows = pd.DataFrame([read_json(path) for path in output.glob("*/row.json")])
        for name in VARIANTS:
            group = rows[rows.variant == name]
            shares = [_range(100 * group[key]) for key in ("clean", "0.25", "1.0")]
            ratio = (group.proved / group.estimated).median()
            record(
                "Lip-SegFormer ablation",
                f"{name} | {' | '.join(shares)} | {group.proved.median():.2f} | {ratio:.2f} | "
                f"{group.parameters.iloc[0] / 1e6:.2f} M | {args.epochs} epochs, {len(group)} seeds",
            )


def run(folder: Path, change: dict, seed: int) -> dict:
    """Train one variant (or go on with it) and certify the validation images."""
    config = TrainConfig(
        model="lipsegformer_tiny",
        model_args={"embed_dim": 24, "depths": [2, 2, 2], "decoder_dim": 48, **change},
        data="camvid",
        img_size=WIDTH,
        augment="flip,color",
        epochs=args.epochs,
        batch_size=8,
        eps=0.04,
        eps_start=0.2,
        eps_end=1.5,
        seed=seed,
    )
    row = train(config, folder, data_root=args.data_root, resume=(folder / "state.pt").exists())
    model = load_model(folder)[0]
    size = scene_size("camvid", WIDTH)
    audit = lipcert.audit(lipcert.export(model), input_shape=(3, *size))
    scenes = load_scenes("camvid", args.data_root, "val", img_size=size)
    found = certify_segmentation(audit, scene_loader(scenes, 8, mask_stride=STRIDE), eps=RADII).attrs["summary"]
    return {
        "clean": found[RADII[0]]["accuracy"],
        **{str(radius): found[radius]["certified"] for radius in RADII},
        "proved": constants(audit).joint,
        "estimated": row["lipschitz_estimate"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _range(shares: pd.Series) -> str:
    return f"{shares.mean():.1f} ({shares.min():.1f} to {shares.max():.1f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", default="0/1", help="K/N: run every N-th job from the K-th on")
    parser.add_argument("-o", "--output", default="runs/scene-ablation")
    parser.add_argument("--record", action="store_true", help="add rows to RESULTS.md")
    args = parser.parse_args()
    main()
