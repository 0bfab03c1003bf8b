"""Run folders as a small CIFAR-10 model would leave them, and a log of randomized smoothing; from a seed, no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

CERTIFICATES = "idx label predict radius correct time margin error".split()
ATTACKS = "eps idx label predict adversarial distance success".split()
METRICS = (
    "epoch,step,lr,eps,train_loss,train_clean,val_loss,val_clean,val_certified,lipschitz_estimate,lipschitz_upper,"
    "images_per_second,seconds"
).split(",")
EPS = 36 / 255


def write_tsv(path: Path, header: list[str], rows: list[list[Any]], separator: str = "\t") -> None:
    path.write_text("".join(separator.join(map(str, row)) + "\n" for row in [header, *rows]))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))


def certificates(seed: int, n: int, clean: float, scale: float) -> list[list[Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for idx in range(n):
        label = int(rng.integers(10))
        correct = rng.random() < clean
        predict = label if correct else (label + 1 + int(rng.integers(9))) % 10
        radius = float(rng.gamma(1.6, scale)) * (1.0 if correct else 0.4)
        rows.append([idx, label, predict, radius, int(correct), 0.0004, radius * 30, 1e-12])
    return rows


def summary(rows: list[list[Any]], upper: float = 26.690000000000012) -> dict[str, Any]:
    radius, correct = (np.array([row[i] for row in rows], dtype=float) for i in (3, 4))
    return {
        "n": len(rows),
        "clean": correct.mean(),
        "certified": {
            f"{r:.4f}": float(np.mean((correct == 1) & (radius > r))) for r in (0, EPS, 2 * EPS, 3 * EPS, 1.0)
        },
        "acr": float(np.mean(radius * correct)),
        "upper": upper,
        "lower": upper * 0.71,
        "precision": "float64",
        "tf32": False,
        "seconds": 41.2,
    }


def attacks(seed: int, rows: list[list[Any]], eps: float, limit: int) -> list[list[Any]]:
    """Attack the first `limit` images; the true radius is drawn between 1.3 and 4 times the certified one."""
    rng = np.random.default_rng(seed)
    found = []
    for idx, label, predict, radius, correct, *_ in rows[:limit]:
        true = radius * rng.uniform(1.3, 4) + 0.02
        success = int(correct and true <= eps)
        found.append(
            [eps, idx, label, predict, (label + 1) % 10 if success else predict, true if success else 0.0, success]
        )
    return found


def attack_summary(rows: list[list[Any]], contradictions: tuple[int, ...] = ()) -> dict[str, Any]:
    right = [row for row in rows if row[2] == row[3]]
    return {
        "n": len(rows),
        "eps": rows[0][0],
        "version": "standard",
        "clean": len(right) / len(rows),
        "robust": sum(not row[6] for row in right) / len(rows),
        "contradictions": list(contradictions),
        "seconds": 1912.0,
    }


def layers(seed: int, blocks: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    cumulative = 1.0

    def add(
        name: str, op: str, shape: list[int], upper: float, method: str, note: str = "", lower: float | None = None
    ) -> None:
        nonlocal cumulative
        cumulative *= upper
        rows.append({"name": name, "op": op, "shape": shape, "upper": upper, "lower": lower, "method": method,
                     "cumulative": cumulative, "note": note})  # fmt: skip

    add("stem", "aten.conv2d.default", [96, 16, 16], 1.73, "eigenvalue")
    for stage, (width, size) in enumerate([(96, 16), (192, 8)]):
        for block in range(blocks):
            upper = 1 + float(rng.gamma(2, 0.06))
            add(f"stages.{stage}.blocks.{block}.mix", "segment: shift + conv + add", [width, size, size], upper,
                f"torus {size + 2}×{size + 2}", lower=upper * 0.97)  # fmt: skip
            add(f"stages.{stage}.blocks.{block}.act", "aten.maximum.default", [width, size, size], 1.0, "1-Lipschitz")
        if stage == 0:
            add("stages.0.downsample", "aten.conv2d.default", [192, 8, 8], 1.21, "non-overlapping, eigenvalue")
    add("pool", "aten.avg_pool2d.default", [192, 1, 1], 0.125, "1/√(k·k)")
    add("head", "aten.linear.default", [10], 1.93, "eigenvalue", "pairwise bounds are used for margins")
    return rows


def metrics(seed: int, epochs: int) -> list[list[Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for epoch in range(1, epochs + 1):
        t = epoch / epochs
        noise = rng.normal(0, 0.006, 4)
        clean, certified = 0.3 + 0.42 * t**0.4 + noise[0], 0.15 + 0.43 * t**0.5 + noise[1]
        rows.append(
            [
                epoch,
                390 * epoch,
                1e-3 * (1 - t),
                EPS,
                2.2 * np.exp(-1.6 * t) + 0.5 + noise[2],
                clean + 0.02,
                2.1 * np.exp(-1.2 * t) + 0.55 + noise[3],
                clean,
                certified,
                40 * np.exp(-0.5 * t) + 2,
                "",
                3050.0,
                16.4 * epoch,
            ]
        )
    rows[-1][METRICS.index("lipschitz_upper")] = 26.69
    return [[f"{cell:.9g}" if isinstance(cell, float) else cell for cell in row] for row in rows]


def write_run(
    folder: Path, *, seed: int = 0, n: int = 2000, attacked: int = 2000, eps: tuple[float, ...] = (EPS, 2 * EPS),
    clean: float = 0.72, scale: float = 0.17, blocks: int = 4, epochs: int = 30, model: str = "lipshift_tiny",
) -> Path:  # fmt: skip
    """Write a complete run folder."""
    (folder / "model").mkdir(parents=True)
    rows = certificates(seed, n, clean, scale)
    write_tsv(folder / "certificates.tsv", CERTIFICATES, rows)
    chain = layers(seed, blocks)
    upper = chain[-1]["cumulative"]
    write_json(folder / "summary.json", summary(rows, upper))
    sha256 = f"{seed:02x}9f2c71d4e8b60a35" * 4
    write_json(folder / "certificate.json", {
        "lipcert": "0.1.0", "weights_sha256": sha256[:64], "norm": "l2", "precision": "float64",
        "input": {"shape": [3, 32, 32], "domain": [0.0, 1.0]}, "data": "cifar10", "split": "test",
        "graph": [{"op": "x"}] * 20,
    })  # fmt: skip
    write_json(folder / "bound.json", {
        "lipcert": "0.1.0", "model": model, "weights_sha256": sha256[:64], "norm": "l2", "upper": upper,
        "lower": upper * 0.74,
        "input": {"shape": [3, 32, 32], "domain": [0.0, 1.0]}, "seconds": 3.4, "features": chain[-2]["cumulative"],
        "estimate": chain[-2]["cumulative"] * 0.93,
        "layers": chain, "unbounded": [],
        "lower_witness": {"x": [0.5] * 12, "y": [0.25] * 12},
        "published": {"value": chain[-2]["cumulative"] * 0.6, "formula": "(1 − p) · Π (1 + (1 − d_i) · α_i · σ_i)",
                      "note": "Its dropout factors 1 − p and 1 − d_i do not exist in evaluation mode."},
    })  # fmt: skip
    if eps:
        tried = [attacks(seed, rows, size, attacked) for size in eps]
        write_tsv(folder / "attacks.tsv", ATTACKS, [row for part in tried for row in part])
        write_json(folder / "attacks.json", [attack_summary(part) for part in tried])
    write_tsv(folder / "metrics.csv", METRICS, metrics(seed, epochs), ",")
    (folder / "config.yaml").write_text(
        f"model: {model}\ndata: cifar10\nimg_size: 32\nepochs: {epochs}\nbatch_size: 128\nlr: 0.001\neps: {EPS}\n"
        f"loss: margin\nseed: {seed}\n"
    )
    write_json(folder / "env.json", {
        "lipcert": "0.1.0", "python": "3.11.7", "torch": "2.15.0", "device": "NVIDIA H200", "threads": 16,
        "command": ["lipcert", "train", "--model", model, "--data", "cifar10", "-o", "runs/a"],
    })  # fmt: skip
    write_json(folder / "model" / "config.json", {
        "model": model, "kwargs": {"depths": [blocks, blocks], "width": 96}, "num_classes": 10, "img_size": 32,
        "in_chans": 3,
        "data": "cifar10", "lipcert": "0.1.0",
    })  # fmt: skip
    return folder


def write_smoothing_log(path: Path, *, seed: int = 5, n: int = 500, sigma: float = 0.25) -> Path:
    """Write a log in the format of Cohen et al.: every 20th image of a test set, some abstentions, capped radii."""
    rng = np.random.default_rng(seed)
    rows: list[list[Any]] = []
    for idx in range(n):
        label, drawn = int(rng.integers(10)), rng.random()
        predict = label if drawn < 0.76 else -1 if drawn < 0.86 else (label + 3) % 10
        radius = 0.0 if predict == -1 else round(float(min(rng.gamma(3.2, 0.15), 3.8 * sigma)), 3)
        rows.append([20 * idx, label, predict, radius, int(predict == label), "0:00:17.284301"])
    write_tsv(path, ["idx", "label", "predict", "radius", "correct", "time"], rows)
    return path
