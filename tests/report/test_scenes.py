"""The report of segmentation, from files that are written here: numbers, maps, alarms, damaged folders."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from lipcert.cli import main
from lipcert.errors import InputError
from lipcert.report.scenes import build_scenes, is_scene_run, read_scene_run, shares


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of 8 x 12 pixels, logits at stride 4, two radii, one of which was attacked."""
    path = tmp_path / "scenes"
    path.mkdir()
    by_radius = {"0.1000": 0.5, "0.2500": 0.25}
    summary = {
        "task": "segmentation", "n": 2, "accuracy": 0.75, "miou": 0.6, "certified": by_radius,
        "certified_alone": {key: share / 2 for key, share in by_radius.items()},
        "certified_miou": {"0.1000": 0.4, "0.2500": 0.125}, "stable": by_radius,
        "iou": {"sky": {"clean": 0.6, "certified": {"0.1000": 0.4, "0.2500": 0.125}}, "a<b": None},
    }  # fmt: skip
    certificate = {
        "statement": "For every row", "model": "some_net", "data": "camvid", "split": "test", "stride": 4,
        "precision": "float64", "input_shape": [3, 8, 12], "weights_sha256": "ab" * 32, "classes": ["sky", "a<b"],
        "constants": {"of": "features", "joint": 3.00001, "pixel": 1.5},
    }  # fmt: skip
    attack = {"eps": 0.1, "n": 2, "attacked": 0.7, "worst_miou": 0.5, "contradictions": [], "miou_refuted": False,
              "compared": True}  # fmt: skip
    for name, content in (("summary", summary), ("certificate", certificate), ("scene_attacks", [attack])):
        (path / f"{name}.json").write_text(json.dumps(content))
    maps = {
        "image": np.arange(2 * 3 * 8 * 12, dtype=np.uint8).reshape(2, 3, 8, 12) % 251,
        "label": np.array([[[0, 1, 255], [0, 0, 1]]] * 2),
        "predict": np.array([[[0, 1, 1], [0, 0, 0]]] * 2),
        "radius": np.array([[[0, 0.1, 0.2], [0.3, 0.2, 0.1]]] * 2, dtype=np.float32),
    }
    save_file(maps, path / "maps.safetensors")
    return path


def change(folder: Path, name: str, edit) -> None:
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


def test_the_page_shows_the_numbers_and_the_maps(folder: Path) -> None:
    run = read_scene_run(folder)
    frame = shares(run)
    assert frame["eps"].tolist() == [0, 0.1, 0.25] and frame["certified"].tolist() == [0.75, 0.5, 0.25]
    assert frame["attacked"].tolist()[1] == 0.7 and np.isnan(frame["attacked"].tolist()[2])
    report = build_scenes([run])
    assert report.findings == () and "a&lt;b" in report.html and "a<b" not in report.html
    assert "3.001 for all positions together" in report.html and "1.500 for any one" in report.html
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
        for text in re.findall(r"data:image/png;base64,([^\"]+)", report.html)
    ]
    assert len(pictures) == 8 and {picture.shape for picture in pictures} == {(24, 36, 3)}
    assert (pictures[0][::3, ::3] == run.maps["image"][0].transpose(1, 2, 0)).all()
    label, predict, radius = (picture[::12, ::12].astype(int) for picture in pictures[1:4])
    assert (label == predict).all(axis=2).tolist() == [[True, True, False], [True, True, False]]
    assert label[0, 2].tolist() == [150, 150, 150]
    assert radius[1, 0].sum() > radius[0, 2].sum() > radius[0, 0].sum()  # brighter where the radius is larger
    assert build_scenes([read_scene_run(folder)]).html == report.html


def test_an_alarm_is_shown_and_ends_with_three(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder, "scene_attacks.json", lambda entries: entries[0].update(contradictions=[1]))
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(folder)])
    assert stopped.value.code == 3 and "idx 1." in capsys.readouterr().err
    assert 'role="alert"' in (folder / "report.html").read_text()


def test_what_is_damaged_or_mixed_is_refused(folder: Path, run_folder: Path) -> None:
    assert is_scene_run(folder) and not is_scene_run(run_folder) and not is_scene_run(folder / "summary.json")
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(folder), str(run_folder)])
    assert stopped.value.code == 2
    with pytest.raises(InputError, match="the same name"):
        build_scenes([read_scene_run(folder)] * 2)
    change(folder, "summary.json", lambda summary: summary.pop("stable"))
    with pytest.raises(InputError, match="lacks 'stable'"):
        read_scene_run(folder)
    (folder / "maps.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be read"):
        read_scene_run(folder)
