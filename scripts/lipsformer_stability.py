"""Whether LipsFormer trains without warm-up where Swin does not: both, small, at a sweep of learning rates.

Command: python scripts/lipsformer_stability.py [--data fashion-mnist] [--steps 120] -o runs/stability
Cost: about 5 minutes on one core. Result: benchmarks/RESULTS.md, "LipsFormer's stability".

Plain AdamW from the first step on, no warm-up, no clipping, gradients in float32, no stochastic depth; the same batches
for all. The proved Lipschitz constant of the exported network is written along the way, as a power of ten: what is said
to be kept small by the architecture. A run that is not finite ends there.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pandas
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from lipcert import data
from lipcert.bounds import audit
from lipcert.export import export
from lipcert.files import require_writable, write_bytes, write_text
from lipcert.models.swin import WindowNetwork, swin
from lipcert.report.drawing import COLOURS, settings, settle, svg
from lipcert.report.shares import magnitude

RATES = (1e-3, 8e-3, 6.4e-2)
SHAPE = dict(embed_dim=32, depths=(2, 2), num_heads=(2, 4), window_size=7, patch_size=2, drop_path=0.0)
Row = tuple[str, float, int, float, float | None]  # model, learning rate, step, loss, log10 of the bound


def build(name: str, channels: int, size: int) -> WindowNetwork:
    torch.manual_seed(0)
    return swin(num_classes=10, img_size=size, in_chans=channels, lipschitz=name == "LipsFormer", **SHAPE)


def train(name: str, rate: float, arguments: argparse.Namespace) -> list[Row]:
    images = data.load(arguments.data, arguments.data_root, "train")
    model = build(name, images.in_chans, images.img_size)
    shape = (images.in_chans, images.img_size, images.img_size)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    rows: list[Row] = []
    batches = (batch for epoch in range(10**6) for batch in data.loader(images, 32, shuffle=True, epoch=epoch))
    for step in range(arguments.steps + 1):
        pixels, labels = next(batches)
        loss = F.cross_entropy(model(pixels), labels)
        bound = None
        if step % (arguments.steps // 4) == 0 and math.isfinite(loss.item()):
            bound = magnitude(audit(export(model), shape).upper.written)
        rows.append((name, rate, step, loss.item(), bound))
        if not math.isfinite(loss.item()):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = [row[3] for row in rows[-20:]]
    bounds = ", ".join(f"{row[4]:.0f}" for row in rows if row[4] is not None)
    mean = sum(last) / len(last)
    print(f"{name:10} lr {rate:g}: mean loss of the last 20 steps {mean:.3f}; log10 L {bounds}", flush=True)
    return rows


def draw(rows: list[Row]) -> Figure:
    with settings():
        figure = Figure(figsize=(9.6, 5.2), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True, sharey="row")
        for column, name in enumerate(("Swin", "LipsFormer")):
            for rate, colour in zip(RATES, COLOURS, strict=False):
                mine = [row for row in rows if row[0] == name and row[1] == rate]
                losses = pandas.Series([row[3] for row in mine]).rolling(10, min_periods=1).mean()
                axes[0][column].plot([row[2] for row in mine], losses, color=colour, label=f"lr {rate:g}")
                known = [(row[2], row[4]) for row in mine if row[4] is not None]
                axes[1][column].plot([k[0] for k in known], [k[1] for k in known], "o-", color=colour, markersize=3.5)
            axes[0][column].set(title=f"{name}, no warm-up", ylim=(0, 4))
            axes[1][column].set(xlabel="step")
        axes[0][0].set_ylabel("training loss, mean of 10 steps")
        axes[1][0].set_ylabel("log10 of the proved L")
        axes[0][1].legend(loc="upper right")
        return settle(figure)


def main(arguments: argparse.Namespace) -> None:
    folder = require_writable(arguments.output)
    rows = [row for name in ("Swin", "LipsFormer") for rate in RATES for row in train(name, rate, arguments)]
    lines = ["model,lr,step,loss,log10_upper", *(",".join("" if x is None else str(x) for x in row) for row in rows)]
    write_text(folder / "stability.csv", "\n".join(lines) + "\n")
    write_bytes(folder / "stability.svg", svg(draw(rows)))
    print(f"wrote {folder / 'stability.csv'} and {folder / 'stability.svg'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--data-root")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("-o", "--output", type=Path, required=True)
    main(parser.parse_args())
