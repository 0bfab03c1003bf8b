"""What MODEL on the command line may be, and the network that it stands for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipcert.cli.options import note
from lipcert.errors import InputError, unknown

if TYPE_CHECKING:
    from torch import nn

KINDS = (
    "a run folder, a name that `lipcert models` lists, torchvision:NAME, timm:NAME, hf:PATH, a .pt2 or .onnx file, "
    "or path/to/file.py:factory"
)


@dataclass(frozen=True)
class Resolved:
    """A network in evaluation mode with what is known about it; `run` is the run folder that it comes from, if any."""

    model: nn.Module
    name: str
    input_shape: tuple[int, ...] | None
    run: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)


def resolve_model(
    spec: str, *, num_classes: int = 10, input_shape: tuple[int, ...] | None = None, seed: int = 0
) -> Resolved:
    """Load or build what MODEL names.

    `num_classes`, `input_shape` and `seed` are for the names of models, which are built with random weights. Whatever
    cannot be resolved raises InputError.
    """
    zoo, _, name = spec.partition(":")
    if zoo in ("torchvision", "timm", "hf") and name:
        return _from_zoo(zoo, name, seed)
    if spec.endswith(".pt2"):
        from lipcert.programs import ProgramNetwork, load_program
        from lipcert.programs import input_shape as shape_of

        program = load_program(Path(spec))
        shape = shape_of(program, Path(spec))
        return Resolved(ProgramNetwork(program, shape), spec, shape)
    if spec.endswith(".onnx"):
        from lipcert.onnx import load_onnx

        onnx_network = load_onnx(Path(spec), input_shape)
        return Resolved(onnx_network, spec, onnx_network.shape)
    if match := re.fullmatch(r"(.+\.py):(\w+)", spec):
        import torch

        from lipcert.foreign import from_file

        note(f"running {match[1]} to build the model")
        torch.manual_seed(seed)
        return Resolved(from_file(match[1], match[2]).eval(), spec, None)
    if Path(spec).is_dir():
        return _from_folder(Path(spec))
    return _from_name(spec, num_classes, input_shape, seed)


def _from_zoo(zoo: str, name: str, seed: int) -> Resolved:
    import torch

    from lipcert.foreign import timm_model, torchvision_model

    torch.manual_seed(seed)
    if zoo == "hf":
        from lipcert.huggingface import huggingface_model

        network, shape = huggingface_model(name)
    else:
        network, shape = (timm_model if zoo == "timm" else torchvision_model)(name)
    if name.endswith(":random"):
        note(f"{zoo}:{name} is untrained: random weights of seed {seed}")
    return Resolved(network.eval(), f"{zoo}:{name}", shape)


def _from_folder(folder: Path) -> Resolved:
    from lipcert.checkpoint import load_model

    model, config = load_model(folder)
    height = config.get("kwargs", {}).get("height") or config["img_size"]
    shape = (config["in_chans"], height, config["img_size"])
    return Resolved(model, config["model"], shape, folder if (folder / "model").is_dir() else None, config)


def _from_name(name: str, num_classes: int, input_shape: tuple[int, ...] | None, seed: int) -> Resolved:
    from lipcert.registry import create_model, models

    if name not in models:
        if "/" in name or name.endswith(".py"):
            raise InputError(f"there is no folder {name}; MODEL is {KINDS}")
        raise unknown("model", name, models.list())
    import torch

    shape = input_shape or (3, 32, 32)
    if len(shape) != 3 or shape[1] != shape[2]:
        raise InputError(f"model {name} takes square images, not inputs of {shape}; give --input-shape like 3,32,32")
    note(f"{name} is untrained: random weights of seed {seed}")
    torch.manual_seed(seed)
    model = create_model(name, num_classes=num_classes, img_size=shape[1], in_chans=shape[0])
    config = {"model": name, "kwargs": {}, "num_classes": num_classes, "img_size": shape[1], "in_chans": shape[0]}
    return Resolved(model.eval(), name, shape, None, config)
