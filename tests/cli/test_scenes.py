"""`lipcert certify` and `lipcert attack` where every pixel has a label, on a small Lip-SegFormer and 5 small images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from lipcert import audit, export
from lipcert.checkpoint import save_model
from lipcert.cli import main
from lipcert.data import load_scenes, scene_loader
from lipcert.registry import create_model
from lipcert.segment import Constants, certify_segmentation, constants

SIZES = {"embed_dim": 12, "depths": [1, 1], "height": 16}
SHAPE = {"num_classes": 11, "img_size": 24, "in_chans": 3}
EPS = (0.02, 0.1, 0.5)


def run(*args: object) -> int:
    return run_without_device(*args, "--device", "cpu")


def run_without_device(*args: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def table(path: Path) -> list[dict[str, str]]:
    head, *lines = [line.split("\t") for line in path.read_text().splitlines()]
    return [dict(zip(head, line, strict=True)) for line in lines]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run folder and a data root: images that are no noise, labelled mostly as the network sees them."""
    base = tmp_path_factory.mktemp("scenes")
    torch.manual_seed(0)
    model = create_model("lipsegformer_tiny", **SHAPE, **SIZES)
    torch.nn.init.normal_(model.head.weight, std=0.4)  # orthogonal rows are all √2 apart
    recipe = {"model": "lipsegformer_tiny", "data": "camvid", "kwargs": SIZES, **SHAPE}
    save_model(model, base / "run" / "model", recipe)
    generator = np.random.default_rng(0)
    images = torch.nn.functional.interpolate(torch.rand(5, 3, 4, 6), size=(16, 24), mode="bilinear")
    pixels = (images * 255).round().to(torch.uint8)
    with torch.no_grad():
        labels = model.eval()(pixels / 255).argmax(1).numpy()
    labels[generator.random(labels.shape) < 0.15] = 3
    labels[generator.random(labels.shape) < 0.1] = 11  # void
    for part in ("train", "val", "test"):
        for i in range(5):
            image, mask = base / "data/camvid" / part / f"{i}.png", base / "data/camvid" / f"{part}annot" / f"{i}.png"
            for path in (image, mask):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i].permute(1, 2, 0).numpy()).save(image)
            Image.fromarray(labels[i].repeat(4, 0).repeat(4, 1).astype(np.uint8)).save(mask)
    return base / "run", base / "data"


def certify(scenes: tuple[Path, Path], folder: Path, *more: object) -> int:
    radii = ",".join(map(str, EPS))
    return run("certify", scenes[0], "--data-root", scenes[1], "--radii", radii, "-o", folder, *more)


def attack(scenes: tuple[Path, Path], folder: Path, *more: object) -> int:
    return run("attack", scenes[0], "--data-root", scenes[1], "--steps", 24, "-o", folder, *more)


@pytest.fixture(scope="session")
def _certified(scenes: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certified-scenes") / "out"
    assert certify(scenes, folder) == 0
    return folder


@pytest.fixture
def certified(_certified: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_certified, tmp_path / "out"))


def test_the_files_say_what_the_library_does(scenes: tuple[Path, Path], certified: Path) -> None:
    from lipcert.checkpoint import load_model

    model, _ = load_model(scenes[0])
    proof = audit(export(model), input_shape=(3, 16, 24))
    loaded = load_scenes("camvid", scenes[1], split="test")
    expected = certify_segmentation(proof, scene_loader(loaded, 5, mask_stride=4), EPS, classes=loaded.classes)
    rows = table(certified / "scenes.tsv")
    assert [{name: float(cell) for name, cell in row.items()} for row in rows] == expected.to_dict("records")
    assert len(rows) == 15 and 0 < sum(int(row["certified"]) for row in rows) < sum(int(row["valid"]) for row in rows)
    summary = json.loads((certified / "summary.json").read_text())
    wanted = expected.attrs["summary"]
    assert summary["n"] == 5 and summary["accuracy"] == wanted[0.1]["accuracy"]
    assert summary["miou"] == wanted[0.1]["miou"][0] and summary["certified_miou"]["0.1000"] == wanted[0.1]["miou"][1]
    assert summary["certified"]["0.5000"] == wanted[0.5]["certified"] <= summary["certified"]["0.0200"]
    record = json.loads((certified / "certificate.json").read_text())
    assert record["weights_sha256"] == proof.weights_sha256 and record["stride"] == 4 and record["constants"]["pairs"]
    assert "at most `eps`" in record["statement"]
    maps = load_file(certified / "maps.safetensors")
    assert maps["image"].shape == (5, 3, 16, 24) and maps["image"].dtype == np.uint8
    with torch.no_grad():
        logits = export(model)(torch.from_numpy(maps["image"]).double() / 255)
    assert (maps["predict"] == logits.argmax(1).numpy()).all()
    for row in rows:  # the map of radii and the counts are the same certificate
        i, eps = int(row["idx"]), float(row["eps"])
        right = (maps["predict"][i] == maps["label"][i]) & (maps["label"][i] != 255)
        assert int(row["correct"]) == right.sum()
        assert int(row["certified_alone"]) == (right & (maps["radius"][i] > eps)).sum() <= int(row["certified"])


def test_the_checker_confirms_the_counts(
    scenes: tuple[Path, Path], certified: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    capsys.readouterr()
    assert run_without_device("verify", certified, "--data-root", scenes[1], "--limit", 3) == 0
    assert "3 of 5 confirmed" in capsys.readouterr().out
    shutil.copytree(scenes[0] / "model", certified / "model")
    assert run_without_device("verify", certified, "--data-root", scenes[1]) == 0
    assert "exactly this program" in capsys.readouterr().out
    path = certified / "scenes.tsv"
    lines = path.read_text().splitlines(keepends=True)
    cells = lines[1].split("\t")
    for column, word in ((3, "stable"), (6, "certified"), (7, "certified_alone")):
        changed = [*cells]
        changed[column] = str(int(cells[column]) + 1)
        path.write_text("".join([lines[0], "\t".join(changed).rstrip("\n") + "\n", *lines[2:]]))
        assert run_without_device("verify", certified, "--data-root", scenes[1]) == 3
        assert f"{word} {changed[column]}".rstrip() in capsys.readouterr().err
    path.write_text("".join(lines))
    mask = scenes[1] / "camvid/testannot/0.png"
    before = mask.read_bytes()
    Image.fromarray(np.zeros((16, 24), dtype=np.uint8)).save(mask)
    assert run_without_device("verify", certified, "--data-root", scenes[1]) == 3
    assert "labels have another SHA-256" in capsys.readouterr().err
    mask.write_bytes(before)


def test_features_certify_more_than_logits(scenes: tuple[Path, Path]) -> None:
    from lipcert.checkpoint import load_model
    from lipcert.segment import certify_scenes, clearances, evaluate_scenes

    proof = audit(export(load_model(scenes[0])[0]), input_shape=(3, 16, 24))
    used = constants(proof)
    assert used.of == "features" and used.pairs is not None and used.pixel <= used.joint
    loaded = load_scenes("camvid", scenes[1], split="test")
    found = list(evaluate_scenes(proof, scene_loader(loaded, 5, mask_stride=4), EPS))
    joint = proof.upper.require_upper()
    by_logits = certify_scenes(found, EPS, joint)
    by_features = certify_scenes(found, EPS, used.joint, used.pixel, pairs=used.pairs)
    assert by_features["stable"].sum() >= by_logits["stable"].sum()
    logits, _, error = found[0]
    alone = clearances(logits, error).leave / joint, clearances(logits, error, used.pairs).leave / used.pixel
    assert (alone[1] >= alone[0] * (1 - 1e-6)).all() and alone[1].sum() > 1.001 * alone[0].sum()


def test_attacks_stay_above_the_certificates(scenes: tuple[Path, Path], certified: Path) -> None:
    assert attack(scenes, certified, "--eps", "0.1,0.5") == 0
    entries = json.loads((certified / "scene_attacks.json").read_text())
    summary = json.loads((certified / "summary.json").read_text())
    for entry, key in zip(entries, ("0.1000", "0.5000"), strict=True):
        assert entry["compared"] and not entry["contradictions"] and not entry["miou_refuted"]
        assert summary["certified"][key] <= entry["attacked"] <= entry["accuracy"] == summary["accuracy"]
        assert summary["certified_miou"][key] <= entry["worst_miou"] <= entry["miou"] == pytest.approx(summary["miou"])
    assert entries[1]["attacked"] < entries[1]["accuracy"]
    rows = table(certified / "scene_attacks.tsv")
    assert len(rows) == 2 * 5 * 7 and all(float(row["distance"]) <= float(row["eps"]) for row in rows)
    assert attack(scenes, certified, "--eps", "0.1") == 2  # rows are not overwritten


def test_a_bound_that_is_too_small_is_found_out(
    scenes: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def optimistic(proof: object) -> Constants:
        true = constants(proof)  # type: ignore[arg-type]
        return Constants(true.joint / 1000, true.pixel / 1000, true.pairs)

    with monkeypatch.context() as patch:
        patch.setattr("lipcert.segment.constants", optimistic)
        assert certify(scenes, tmp_path) == 0
    assert attack(scenes, tmp_path, "--eps", "0.5", "--attacks", "cheapest") == 3
    assert "please report this" in capsys.readouterr().err
    (entry,) = json.loads((tmp_path / "scene_attacks.json").read_text())
    assert entry["contradictions"] and entry["miou_refuted"]


@pytest.mark.parametrize("column", ["certified", "stable"])
def test_one_count_that_is_too_large_is_found_out(scenes: tuple[Path, Path], certified: Path, column: str) -> None:
    path = certified / "scenes.tsv"
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    number = lines[0].index(column)
    for line in lines[1:]:
        if line[:2] == ["2", "0.5"]:
            line[number] = line[lines[0].index("correct" if column == "certified" else "pixels")]
    path.write_text("".join("\t".join(line) + "\n" for line in lines))
    assert attack(scenes, certified, "--eps", "0.5", "--attacks", "cheapest") == 3
    (entry,) = json.loads((certified / "scene_attacks.json").read_text())
    assert entry["contradictions"] == [2] and not entry["miou_refuted"]


def test_what_does_not_fit_is_refused(
    scenes: tuple[Path, Path], certified: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(code: int) -> str:
        assert code == 2
        return capsys.readouterr().err

    assert "move it away" in refused(certify(scenes, certified))
    assert "leave out --resume" in refused(certify(scenes, tmp_path / "a", "--resume"))
    assert "digits is for classification" in refused(certify(scenes, tmp_path / "a", "--data", "digits"))
    assert "has 11 classes, camvid-four has 4" in refused(certify(scenes, tmp_path / "a", "--data", "camvid-four"))
    code = run("certify", "lipshift_tiny", "--data", "camvid", "--data-root", scenes[1], "-o", tmp_path / "a")
    assert "lipshift_tiny is for classification" in refused(code)
    assert "unknown attacks" in refused(attack(scenes, tmp_path / "a", "--eps", "0.1", "--attacks", "fab"))


@pytest.mark.parametrize("radius", [0.1, 0.3, 1 / 3, 1e-46, 0.0, 2.0])
def test_radii_of_maps_are_rounded_down(radius: float) -> None:
    from lipcert.cli.certify_scenes import _single

    (single,) = _single(np.array([radius]))
    assert single.dtype == np.float32 and 0 <= float(single) <= radius < float(np.nextafter(single, np.float32(9)))
