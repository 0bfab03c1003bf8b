"""Configurations: typed, layered, and strict about keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest

from lipcert.config import PRESETS, TrainConfig, find_preset, load_config, parse_settings, to_yaml
from lipcert.errors import InputError


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = TrainConfig(model_args={"depths": [2, 2]}, eps=0.3, val_fraction=0.2, ema=0.99)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_settings_win_over_the_file_and_texts_become_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lr: 1e-3\neps: 36/255\nepochs: 7\n")  # YAML reads 1e-3 as a text
    config = load_config(
        tmp_path / "a.yaml", parse_settings(["epochs=9", "model_args.neck=0", "model_args.scale=1e-1"])
    )
    assert (config.lr, config.eps, config.epochs) == (1e-3, 36 / 255, 9)
    assert config.model_args == {"neck": 0, "scale": 0.1}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"learning_rate": 1}, "unknown key 'learning_rate'"),
        ({"epoch": 1}, "did you mean 'epochs'"),
        ({"lr": "fast", "epochs": 1.5}, "lr: 'fast' is not a number; epochs: 1.5 is not a whole number"),
        ({"lr": -1.0, "ema": 1.0}, "lr must be positive and finite, not -1.0; ema is a decay"),
        ({"eps": "0"}, "eps must be positive"),
        ({"eps": "nan"}, "eps must be positive"),
        ({"optimizer": "adam"}, "optimizer must be one of"),
        ({"mixup": -0.1, "loss": "cross_entropy"}, "mixup must be finite and not negative, not -0.1"),
        ({"cutmix": "inf", "loss": "cross_entropy"}, "cutmix must be finite and not negative"),
        ({"label_smoothing": 1.0, "loss": "cross_entropy"}, "label_smoothing is a share of a label, in [0, 1)"),
        ({"mixup": 0.8, "label_smoothing": 0.1}, "mixup and label_smoothing need loss cross_entropy"),
        ({"model_args": 3}, "model_args: 3 is not a mapping"),
        ({"epochs": True}, "not a whole number"),
    ],
)
def test_wrong_values_are_all_named_in_one_sentence(settings: dict, words: str) -> None:
    with pytest.raises(InputError) as error:
        load_config(None, settings)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00"])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError, match="bad.yaml"):
        load_config(tmp_path / "bad.yaml")
    with pytest.raises(InputError, match="cannot read"):
        load_config(tmp_path / "missing.yaml")


@pytest.mark.parametrize("pair", ["lr", "=3", "lr=[1"])
def test_settings_need_key_and_value(pair: str) -> None:
    with pytest.raises(InputError, match="--set"):
        parse_settings([pair])


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_load_and_say_their_command(path: Path) -> None:
    assert load_config(find_preset(path.stem)).data
    assert path.read_text().startswith(f"# lipcert train --preset {path.stem} ")


def test_unknown_preset_gets_its_near_match() -> None:
    with pytest.raises(InputError, match="did you mean 'digits'"):
        find_preset("digit")
