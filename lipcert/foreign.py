"""Networks that are not ours: torchvision's models, and factories in the user's own files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from lipcert.data.torchvision import import_torchvision
from lipcert.errors import InputError, unknown


class Normalised(nn.Module):
    """A network for pixels in [0, 1] around one that expects `(x - mean) / std`, so that radii are in pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:  # (n, c, h, w) in [0, 1]
        return self.network((x - self.mean) / self.std)


def torchvision_model(spec: str) -> tuple[nn.Module, tuple[int, ...] | None]:
    """Return the classifier `NAME` or `NAME:WEIGHTS` of torchvision with its normalisation, and its input shape.

    The weights are torchvision's default ones, read from torch's cache or fetched; "random" builds without any, and
    then nothing is known about the input shape. Unknown names raise InputError, and so do weights that cannot be
    fetched.
    """
    name, _, wanted = spec.partition(":")
    zoo = import_torchvision("models")
    names = zoo.list_models(zoo)
    if name not in names:
        raise unknown("torchvision model", name, names)
    if wanted == "random":
        return zoo.get_model(name, weights=None), None
    choices = zoo.get_model_weights(name)
    if wanted and wanted not in choices.__members__:
        raise unknown(f"weights of {name}", wanted, [*choices.__members__, "random"])
    weights = choices[wanted or "DEFAULT"]
    try:
        network = zoo.get_model(name, weights=weights)
    except OSError as error:  # also URLError and HTTPError
        raise InputError(
            f"the weights of {name} could not be fetched from {weights.url} ({error}); "
            f"use torchvision:{name}:random, or put the file into {torch.hub.get_dir()}/checkpoints"
        ) from error
    preprocessing = weights.transforms()
    size = preprocessing.crop_size[0]
    return Normalised(network, list(preprocessing.mean), list(preprocessing.std)), (3, size, size)


def from_file(path: str | Path, factory: str) -> nn.Module:
    """Run a Python file and return what its function `factory` returns, called without arguments.

    This runs the user's code. A missing file or function, an exception in it, or another result than a module raise
    InputError.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}; write path/to/file.py:factory")
    sys.path.insert(0, str(path.parent))  # as for a script: the files beside it can be imported
    try:
        build = getattr(_run(path), factory, None)
        if not callable(build):
            raise InputError(f"{path} has no function {factory}; write path/to/file.py:factory")
        network = build()
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}:{factory} failed with {reason} (--debug shows where)") from error
    finally:
        sys.path.remove(str(path.parent))
    if not isinstance(network, nn.Module):
        raise InputError(f"{path}:{factory} returned a {type(network).__name__}; it must return a torch.nn.Module")
    return network


def _run(path: Path) -> ModuleType:
    name = f"lipcert_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module
