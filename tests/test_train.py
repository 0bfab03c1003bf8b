"""Training: it learns, resumes to the same weights after any interruption, and stops when the loss is not finite."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import lipcert.train
from lipcert.checkpoint import load_model
from lipcert.config import TrainConfig, load_config, to_yaml
from lipcert.errors import InputError
from lipcert.train import METRICS, Diverged, train

TINY: dict[str, Any] = dict(
    model="lipshift_tiny",
    model_args={"embed_dim": 16, "depths": [1], "neck": 32, "patch_size": 2},
    data="digits",
    epochs=2,
    batch_size=64,
    lr=5e-3,
)
LAUNCH_TWO = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lipcert"]


class Killed(Exception):
    pass


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder)[0].state_dict()


def assert_same_weights(first: Path, second: Path) -> None:
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def killed_after(batches: int):
    """Return a progress wrapper that raises once this many batches have been handed out."""
    left = [batches]

    def progress(items: Iterable, length: int, label: str) -> Iterable:
        for item in items:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            yield item

    return progress


def test_training_learns_and_leaves_a_run_folder(tmp_path: Path) -> None:
    row = train(TrainConfig(**{**TINY, "epochs": 6}), tmp_path / "run", device="cpu")
    assert row["val_clean"] > 0.8 and row["val_certified"] > 0.4  # chance is 0.1
    assert row["lipschitz_upper"] <= 1.25 * row["lipschitz_estimate"]
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert tuple(table.columns) == METRICS and len(table) == 6
    assert table.train_loss.iloc[-1] < table.train_loss.iloc[0]
    assert table.lipschitz_upper.notna().tolist() == [False] * 5 + [True]
    assert table.eps.is_monotonic_increasing and table.eps.iloc[-1] == pytest.approx(2 * 36 / 255)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "env.json", "metrics.csv", "model", "state.pt"} <= names


SOFT: dict[str, Any] = dict(loss="cross_entropy", mixup=0.8, cutmix=1.0, label_smoothing=0.1)


@pytest.mark.parametrize(
    "changes", [{}, {"ema": 0.9, "optimizer": "nadam"}, SOFT], ids=["plain", "average", "mixed images"]
)
@pytest.mark.parametrize("batches", [0, 7, 19, 30])
def test_a_run_killed_anywhere_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int, changes: dict[str, Any]
) -> None:
    config = TrainConfig(**{**TINY, **changes})
    train(config, tmp_path / "undisturbed", device="cpu")
    monkeypatch.setattr(lipcert.train, "SAVE_EVERY", 0.0)
    with pytest.raises(Killed):
        train(config, tmp_path / "killed", device="cpu", progress=killed_after(batches))
    monkeypatch.setattr(lipcert.train, "SAVE_EVERY", 60.0)
    torch.manual_seed(12345)  # nothing may depend on the state of the process that resumes
    if batches == 0:  # before the first state was written there is nothing to continue
        with pytest.raises(InputError, match="nothing to resume"):
            train(config, tmp_path / "killed", device="cpu", resume=True)
        return
    train(config, tmp_path / "killed", device="cpu", resume=True)
    assert_same_weights(tmp_path / "undisturbed", tmp_path / "killed")
    columns = [name for name in METRICS if name not in ("images_per_second", "seconds")]
    tables = [pd.read_csv(tmp_path / name / "metrics.csv")[columns] for name in ("undisturbed", "killed")]
    pd.testing.assert_frame_equal(*tables)


def test_a_process_killed_by_the_system_resumes_to_the_same_weights(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(TrainConfig(**{**TINY, "epochs": 8})))
    command = [sys.executable, "-m", "lipcert", "train", str(tmp_path / "config.yaml"), "--device", "cpu", "-o"]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(
        [*command, str(tmp_path / "killed")], cwd=root, env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # anywhere in a later epoch
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it ended before it was killed"
    resume = [sys.executable, "-m", "lipcert", "train", "--resume", "--device", "cpu", "-o", str(tmp_path / "killed")]
    subprocess.run(resume, cwd=root, env=environment, check=True, capture_output=True)
    subprocess.run([*command, str(tmp_path / "whole")], cwd=root, env=environment, check=True, capture_output=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(TrainConfig(**{**TINY, "epochs": 1})))
    arguments = ["-m", "lipcert", "train", str(tmp_path / "config.yaml"), "--device", "cpu", "-o"]
    root, environment = Path(__file__).parents[1], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCH_TWO, *arguments[2:], str(tmp_path / "two")],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    train(TrainConfig(**{**TINY, "epochs": 1}), tmp_path / "one", device="cpu")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        if not name.startswith("power."):
            torch.testing.assert_close(two[name], tensor, rtol=1e-2, atol=2e-3)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, calls = TrainConfig(**TINY), [0]
    emma = lipcert.train.losses.get("emma")

    def breaks_in_the_second_epoch(*arguments):
        calls[0] += 1
        return emma(*arguments) * (float("nan") if calls[0] > 25 else 1.0)

    monkeypatch.setattr(lipcert.train.losses, "get", lambda name: breaks_in_the_second_epoch)
    with pytest.raises(Diverged, match="smaller lr"):
        train(config, tmp_path / "run", device="cpu")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(tmp_path / "run").values())
    assert len(pd.read_csv(tmp_path / "run" / "metrics.csv")) == 1


def test_a_finished_or_started_run_is_never_overwritten(tmp_path: Path) -> None:
    config = TrainConfig(**{**TINY, "epochs": 1})
    row = train(config, tmp_path / "run", device="cpu")
    with pytest.raises(InputError, match="already holds a run"):
        train(config, tmp_path / "run", device="cpu")
    assert train(config, tmp_path / "run", device="cpu", resume=True) == row
    with pytest.raises(InputError, match="another configuration"):
        train(TrainConfig(**{**TINY, "lr": 1.0, "epochs": 1}), tmp_path / "run", device="cpu", resume=True)


@pytest.mark.parametrize("content", [b"", b"not a state", b"PK\x03\x04"])
def test_a_damaged_state_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        train(TrainConfig(**TINY), tmp_path, device="cpu", resume=True)


def test_shiftvit_trains_with_cross_entropy_only(tmp_path: Path) -> None:
    small = dict(
        model="shiftvit_tiny",
        model_args={"embed_dim": 16, "depths": [1], "patch_size": 2},
        data="digits",
        epochs=6,
        batch_size=32,
    )
    with pytest.raises(InputError, match="cross_entropy"):
        train(TrainConfig(**small), tmp_path / "margin", device="cpu")
    row = train(TrainConfig(**small, loss="cross_entropy"), tmp_path / "plain", device="cpu")
    assert row["train_clean"] > 0.2 and row["lipschitz_estimate"] is None


def test_bfloat16_trains(tmp_path: Path) -> None:
    # 32 channels: with 16, oneDNN's bfloat16 convolution 16 -> 32, kernel = stride = 4, is wrong on processors with AMX
    wide = {"model_args": {**TINY["model_args"], "embed_dim": 32}, "precision": "bfloat16"}
    row = train(TrainConfig(**{**TINY, **wide}), tmp_path / "run", device="cpu")
    assert row["val_clean"] > 0.5


def test_mixed_images_reach_the_loss_with_their_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = lipcert.train.losses.get("cross_entropy"), []

    def watched(logits, labels, pairwise, eps):
        seen.append(labels)
        return plain(logits, labels, pairwise, eps)

    monkeypatch.setattr(lipcert.train.losses, "get", lambda name: watched)
    row = train(TrainConfig(**{**TINY, **SOFT, "epochs": 6}), tmp_path / "run", device="cpu")
    assert row["val_clean"] > 0.8
    training = [labels for labels in seen if labels.is_floating_point()]
    assert len(training) == 6 * 19 and len(seen) > len(training)  # validation has whole labels
    for labels in training:
        torch.testing.assert_close(labels.sum(1), torch.ones(64))
        assert labels.min() == pytest.approx(0.01) and labels.max() <= 0.91 + 1e-6
    assert any(labels.amax(1).mean() < 0.8 for labels in training)


def digits_folder(root: Path) -> Path:
    """Write scikit-learn's zeros and ones as JPEG files of several sizes, one folder a class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in (0, 1):
        (root / str(label)).mkdir(parents=True)
        for number, pixels in enumerate(digits.images[digits.target == label][:80]):
            image = Image.fromarray((pixels * 15.9).astype("uint8")).convert("RGB")
            image.resize((40 + number % 3, 44), Image.Resampling.BICUBIC).save(root / str(label) / f"{number}.jpeg")
    return root


@pytest.mark.parametrize("world", [1, 2])
def test_the_recipe_for_imagenet_trains_on_a_folder(tmp_path: Path, world: int) -> None:
    images = digits_folder(tmp_path / "images")
    launch = [sys.executable, "-m", *(["lipcert"] if world == 1 else LAUNCH_TWO)]
    small = dict(embed_dim=32, depths=[1, 1], num_heads=[2, 4], drop_path=0.1, mlp_ratio=2)
    settings = [f"model_args.{key}={value}" for key, value in small.items()]
    settings += ["img_size=32", "batch_size=8", "ema=0.5", "lr=2e-2"]
    command = [*launch, "train", "--preset", "imagenet-lipsformer", "--data", f"folder:{images}", "--epochs", "6"]
    command += [argument for setting in settings for argument in ("--set", setting)]
    done = subprocess.run(
        [*command, "--device", "cpu", "-o", str(tmp_path / "run")], cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert len(table) == 6 and table.lr.iloc[0] > table.lr.iloc[-1]
    assert (table.iloc[-1] < table.iloc[0])[["train_loss", "val_loss"]].all()
    assert table.lipschitz_upper.iloc[-1] > 0  # proved, and of no use: this network is made for accuracy
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.precision, config.warmup, config.mixup, config.cutmix) == ("bfloat16", 0.0, 0.8, 1.0)


def scenes_root(root: Path) -> Path:
    """Write CamVid's folders with images whose halves have classes 0 and 3, told by their brightness."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 16), ("val", 4), ("test", 4)):
        for folder in (part, f"{part}annot"):
            (root / "camvid" / folder).mkdir(parents=True)
        for number in range(count):
            mask = torch.zeros(12, 16, dtype=torch.uint8)
            mask[:, int(torch.randint(4, 12, (1,), generator=generator)) :] = 3
            mask[0, 0] = 11  # void
            image = (mask == 3).float()[..., None].expand(-1, -1, 3) * 150 + 50
            image = (image + 10 * torch.randn(12, 16, 3, generator=generator)).clamp(0, 255).to(torch.uint8)
            Image.fromarray(image.numpy()).save(root / "camvid" / part / f"{number}.png")
            Image.fromarray(mask.numpy()).save(root / "camvid" / f"{part}annot" / f"{number}.png")
    return root


@pytest.mark.parametrize("model", ["lipsegformer_tiny", "segformer_b0"])
def test_one_label_a_pixel(model: str, tmp_path: Path) -> None:
    lip = model.startswith("lip")
    small = dict(embed_dims=[8, 16], depths=[1, 1], num_heads=[1, 2], reductions=[1, 1], mlp_ratios=[2, 2])
    arguments = dict(embed_dim=12, depths=[1], decoder_depths=[]) if lip else {**small, "decoder_dim": 8}
    config = TrainConfig(
        model=model, model_args=arguments, data="camvid", img_size=16, epochs=8, batch_size=4, augment="flip", lr=1e-2,
        loss="tau_cross_entropy" if lip else "cross_entropy", eps=0.05, head_lr=2.0, schedule="poly",
    )  # fmt: skip
    root = scenes_root(tmp_path / "data")
    row = train(config, tmp_path / "run", data_root=str(root), device="cpu")
    assert row["val_clean"] > 0.8 and 0.5 < row["val_miou"] <= 1.0  # half of all pixels are of one class
    assert (row["lipschitz_estimate"] is not None) == lip
    recipe = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert recipe["kwargs"]["height"] == 12 and recipe["img_size"] == 16 and recipe["num_classes"] == 11
    with pytest.raises(InputError, match="is for segmentation, and this is classification"):
        train(TrainConfig(model="lipshift_tiny", data="camvid"), tmp_path / "other", data_root=str(root))
    with pytest.raises(InputError, match="one label an image"):
        mixed = TrainConfig(model="segformer_b0", data="camvid", loss="cross_entropy", mixup=0.2)
        train(mixed, tmp_path / "mixed", data_root=str(root))
