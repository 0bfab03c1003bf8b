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

from results import record
from variants import Change, add_options, groups, run_all, spread

import lipcert
from lipcert.checkpoint import load_model
from lipcert.config import TrainConfig
from lipcert.data import load_scenes, scene_loader
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
    output = Path(args.output)
    run_all(VARIANTS, output, args, run, say)
    for name, group in groups(VARIANTS, output) if args.record else ():
        record(
            "Lip-SegFormer ablation",
            f"{name} | {' | '.join(spread(group[key]) for key in ('clean', '0.25', '1.0'))} | "
            f"{group.proved.median():.2f} | {(group.proved / group.estimated).median():.2f} | "
            f"{group.parameters.iloc[0] / 1e6:.2f} M | {args.epochs} epochs, {len(group)} seeds",
        )


def run(folder: Path, change: Change, seed: int) -> dict:
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


def say(row: dict) -> str:
    return (
        f"clean {100 * row['clean']:.2f} %, certified {100 * row['0.25']:.2f} % and {100 * row['1.0']:.2f} %, "
        f"L {row['proved']:.3g}, estimated {row['estimated']:.3g}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", default="runs/scene-ablation")
    add_options(parser, epochs=10)
    args = parser.parse_args()
    main()
