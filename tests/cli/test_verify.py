"""`lipcert verify`: what is confirmed, what is a finding, and what is bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lipcert import data
from lipcert.cli import main


def run(*args: object) -> int | str | None:
    with pytest.raises(SystemExit) as exit:
        main([str(arg) for arg in args])
    return exit.value.code


@pytest.fixture(scope="session")
def _certified_run(_untrained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(_untrained_run, tmp_path_factory.mktemp("verify") / "run")
    assert run("certify", folder, "--limit", "5", "--device", "cpu") == 0
    return Path(folder)


@pytest.fixture
def certified(_certified_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_certified_run, tmp_path / "run"))


def change(folder: Path, **facts: object) -> None:
    path = folder / "certificate.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def test_a_run_is_confirmed_with_its_images_and_its_model(certified, capsys, tmp_path) -> None:
    report = tmp_path / "report.json"
    assert run("verify", certified, "--json", report) == 0
    out = capsys.readouterr().out
    assert "steps confirmed" in out and "5 of 5 confirmed" in out and "exactly this program" in out
    found = json.loads(report.read_text())
    assert found["accepted"] and found["images"] == 5 and found["upper"] <= found["claimed"]
    assert run("verify", certified / "certificate.json", "--limit", "2") == 0
    assert "2 of 5 confirmed" in capsys.readouterr().out


def test_images_of_a_file_and_no_images(certified, capsys, tmp_path) -> None:
    images = data.load("digits", split="test").first(3)
    batch, _ = next(iter(data.loader(images, 3)))
    save_file({"images": batch.double()}, tmp_path / "images.safetensors")
    assert run("verify", certified, "--images", tmp_path / "images.safetensors") == 0
    assert "3 of 5 confirmed" in capsys.readouterr().out
    change(certified, data="mnist")  # is not there
    assert run("verify", certified) == 0
    out = capsys.readouterr().out
    assert "0 of 5 confirmed" in out and "without images, only the proof" in out and "mnist is not there" in out
    assert run("verify", certified, "--data", "mnist") == 2
    save_file({"a": batch, "b": batch.clone()}, tmp_path / "two.safetensors")
    assert run("verify", certified, "--images", tmp_path / "two.safetensors") == 2
    assert run("verify", certified, "--images", tmp_path / "two.safetensors", "--data", "digits") == 2


def test_what_does_not_hold_is_a_finding_of_one_sentence(certified, capsys, tmp_path) -> None:
    rows = certified / "certificates.tsv"
    lines = [line.split("\t") for line in rows.read_text().splitlines()]
    lines[2][1] = "9" if lines[2][1] != "9" else "8"
    lines[2][4] = str(int(lines[2][1] == lines[2][2]))
    rows.write_text("".join("\t".join(line) + "\n" for line in lines))
    assert run("verify", certified) == 3
    assert "row 1: the label is" in capsys.readouterr().err
    assert run("verify", certified, "--data", "digits", "--limit", "1") == 0  # that row was not looked at
    change(certified, domain=[0, 0.25])
    report = tmp_path / "report.json"
    assert run("verify", certified, "--json", report) == 3
    err = capsys.readouterr().err
    assert err.startswith("Finding: ") and "does not verify: row 0" in err and "domain" in err and err.count("\n") == 1
    assert not json.loads(report.read_text())["accepted"]


def test_a_model_that_is_another_is_a_finding(certified, capsys) -> None:
    path = certified / "model" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("bias"))
    weights[name] = weights[name] + torch.eye(len(weights[name]))[0] * 1e-3
    save_file(weights, path)
    assert run("verify", certified) == 3
    assert "model beside it" in capsys.readouterr().err


def test_missing_files_are_bad_input(certified, capsys, tmp_path) -> None:
    assert run("verify", tmp_path / "nothing") == 2
    weights = (certified / "program.safetensors").rename(tmp_path / "weights.safetensors")
    assert run("verify", certified) == 2
    assert "program.safetensors is not there" in capsys.readouterr().err
    assert run("verify", certified, "--weights", weights) == 0
    (certified / "certificate.json").write_text("{")
    assert run("verify", certified, "--weights", weights) == 3
    assert "is not JSON" in capsys.readouterr().err
