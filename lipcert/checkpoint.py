"""Model folders: `config.json` (how to build it), `model.safetensors` (its weights), `README.md`. No pickle
anywhere."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

import lipcert
from lipcert.errors import InputError
from lipcert.files import read_json, write_bytes, write_json, write_text
from lipcert.registry import create_model

LARGEST, LARGEST_IN_LIST = 2**20, 2**12  # numbers in the arguments of a model: widths, sizes; depths, widths of stages
REQUIRED = ("model", "num_classes", "img_size", "in_chans")


def save_model(model: nn.Module, folder: str | Path, config: Mapping[str, Any]) -> None:
    """Write a model folder; `config` holds `model` (registry name), `kwargs`, `num_classes`, `img_size`, `in_chans`,
    `data`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Clones: safetensors refuses tensors that share memory, and views would drag their whole storage along.
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(folder / "model.safetensors", safetensors.torch.save(state))
    write_json(folder / "config.json", {**config, "lipcert": lipcert.__version__})
    write_text(folder / "README.md", _card(config))


def load_model(folder: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model of a model folder (or of a run folder) in evaluation mode and return it with its config.

    Raises InputError if a file is missing or damaged, if weights do not fit the model, or if they hold NaN or
    infinities.
    """
    folder = model_folder(folder)
    path = folder / "config.json"
    config = _read_config(path)
    arguments = {key: config[key] for key in REQUIRED[1:]} | config.get("kwargs", {})
    try:
        # First without memory: what a damaged file asks for may be larger than the machine, and its weights are not.
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # weights are not copied there, only compared
            load_weights(create_model(config["model"], **arguments), folder / "model.safetensors")
        model = create_model(config["model"], **arguments)
    except InputError:
        raise
    except Exception as error:  # whatever a model trips over that is given the wrong things
        raise InputError(f"{path}: model {config['model']!r} does not take these arguments: {error}") from error
    load_weights(model, folder / "model.safetensors")
    return model.eval(), config


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("kwargs", {}), dict):
        raise InputError(f"{path} does not describe a model; it was not written by `lipcert train`")
    missing = [key for key in REQUIRED if key not in config]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; it was not written by `lipcert train`")
    if not isinstance(config["model"], str):
        raise InputError(f"{path}: the model is named by a text, not by {str(config['model'])[:40]}")
    values = [value for value in config.get("kwargs", {}).values() if not isinstance(value, list)]
    inner = [item for value in config.get("kwargs", {}).values() if isinstance(value, list) for item in value]
    for number, most in [*((value, LARGEST) for value in values), *((item, LARGEST_IN_LIST) for item in inner)]:
        if isinstance(number, int) and abs(number) > most:
            raise InputError(f"{path}: {str(number)[:20]} is no size of a model; the file is damaged")
    return config


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into a model, strictly; see `load_model` for the errors."""
    try:
        state = safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} is not a complete safetensors file ({error}); copy it again or train again"
        ) from error
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise InputError(f"{path}: {', '.join(bad[:3])} has NaN or infinite entries; use another checkpoint")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise InputError(f"{path} does not fit the model: {first.strip()}") from error


def model_folder(folder: str | Path) -> Path:
    """Return the model folder inside a run folder, or the folder itself if it is one; neither raises InputError."""
    folder = Path(folder)
    for candidate in (folder / "model", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise InputError(
        f"{folder} holds no model: there is no {folder / 'model' / 'config.json'}, which `lipcert train` would write"
    )


def weights_sha256(folder: str | Path) -> str:
    """Return the SHA-256 of the weights file of a model or run folder."""
    return hashlib.sha256((model_folder(folder) / "model.safetensors").read_bytes()).hexdigest()


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a training state atomically; tensors, numbers, texts, lists and dicts only."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_bytes(path, buffer.getvalue())


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state without executing anything in it (`weights_only`); a damaged one raises InputError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing, so there is nothing to resume; train without --resume") from error
    except Exception as error:  # torch raises whatever its reader trips over
        raise InputError(f"{path} is damaged ({type(error).__name__}); train again into another folder") from error


def _card(config: Mapping[str, Any]) -> str:
    height = config.get("kwargs", {}).get("height") or config["img_size"]
    return (
        f"---\nlibrary_name: lipcert\n---\n# {config['model']}\n\n"
        f"{config['num_classes']} classes, inputs {config['in_chans']} x {height} x {config['img_size']} "
        f"in [0, 1]"
        f"{', trained on ' + str(config['data']) if config.get('data') else ''}.\n\n"
        "Load with `lipcert.checkpoint.load_model(folder)`; see also `lipcert bound` and `lipcert certify`.\n"
    )
