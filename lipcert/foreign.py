"""Networks that are not ours: the models of torchvision and timm, and factories in the user's own files.

Each comes with the normalisation that it was trained with as a layer, so that inputs are pixels in [0, 1], and with the
shape of its inputs where its library says it.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lipcert.data.torchvision import import_torchvision
from lipcert.errors import InputError, missing_extra, unknown
from lipcert.quiet import quiet


class Normalised(nn.Module):
    """A network for pixels in [0, 1] around one that expects `(x - mean) / std`, so that radii are in pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor([*mean])[:, None, None])
        self.register_buffer("std", torch.tensor([*std])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:  # (n, c, h, w) in [0, 1]
        return self.network((x - self.mean) / self.std)


class Picked(nn.Module):
    """The one output of a network that returns several by name."""

    def __init__(self, network: nn.Module, key: str) -> None:
        super().__init__()
        self.network, self.key = network, key

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[self.key]


@contextmanager
def restricted_unpickling() -> Iterator[None]:
    """Make torch.load read tensors only, whoever calls it: torchvision asks for unrestricted unpickling."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def torchvision_model(spec: str) -> tuple[nn.Module, tuple[int, ...] | None]:
    """Return the network `NAME` or `NAME:WEIGHTS` of torchvision with its normalisation, and its input shape.

    NAME is a classifier or a segmentation model, of which the output "out" is taken. The weights are torchvision's
    default ones, read from torch's cache or fetched; "random" builds without any, and then nothing is known about the
    input shape. Unknown names raise InputError, and so do weights that cannot be fetched.
    """
    name, _, wanted = spec.partition(":")
    zoo = import_torchvision("models")
    segmentation = zoo.list_models(zoo.segmentation)
    names = [*zoo.list_models(zoo), *segmentation]
    if name not in names:
        if name in zoo.list_models():
            raise InputError(f"torchvision:{name} neither classifies nor segments images; a bound needs logits")
        raise unknown("torchvision model", name, names)
    more = {"weights_backbone": None} if name in segmentation else {}
    if wanted == "random":
        network = zoo.get_model(name, weights=None, **more)
        return (Picked(network, "out") if name in segmentation else network), None
    choices = zoo.get_model_weights(name)
    if wanted and wanted not in choices.__members__:
        raise unknown(f"weights of {name}", wanted, [*choices.__members__, "random"])
    weights = choices[wanted or "DEFAULT"]
    try:
        with restricted_unpickling():
            network = zoo.get_model(name, weights=weights, **more)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the weights of {name} in {torch.hub.get_dir()} are no plain tensors: {reason}") from error
    except OSError as error:  # also URLError and HTTPError
        raise InputError(
            f"the weights of {name} could not be fetched from {weights.url} ({error}); "
            f"use torchvision:{name}:random, or put the file into {torch.hub.get_dir()}/checkpoints"
        ) from error
    preprocessing = weights.transforms()
    mean, std = list(preprocessing.mean), list(preprocessing.std)
    if name in segmentation:
        return Normalised(Picked(network, "out"), mean, std), None  # images of any size
    size = preprocessing.crop_size[0]
    return Normalised(network, mean, std), (3, size, size)


def timm_model(spec: str) -> tuple[nn.Module, tuple[int, ...] | None]:
    """Return the network `NAME` or `NAME.TAG` of timm with its normalisation, and its input shape.

    The weights are those of the name, read from the cache of the Hugging Face hub or fetched; `NAME:random` builds
    without any. Raises InputError where timm is missing, the name is unknown, or the weights cannot be fetched.
    """
    try:
        import timm
    except ImportError as error:
        raise missing_extra("timm", "timm") from error
    name, _, wanted = spec.partition(":")
    if wanted not in ("", "random"):
        raise InputError(f"timm:{name}:{wanted} is not understood; write timm:NAME, timm:NAME.TAG or timm:NAME:random")
    known = {*timm.list_models(), *timm.list_models(pretrained=True)}
    if name not in known:
        raise unknown("timm model", name, known)
    try:
        with quiet("huggingface_hub", "timm"), restricted_unpickling():
            network = timm.create_model(name, pretrained=not wanted)
    except Exception as error:  # of the hub, of urllib, or of timm where a model has no weights
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"timm cannot load {name} ({reason}); timm:{name}:random takes random weights") from error
    known_of: Any = network.pretrained_cfg
    shape, mean, std = (known_of.get(key) for key in ("input_size", "mean", "std"))
    return (Normalised(network, mean, std) if mean and std else network), None if shape is None else tuple(shape)


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
