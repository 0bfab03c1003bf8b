"""Models of transformers: image classifiers and semantic segmentation, from a folder, the hub, or random.

Weights are read from safetensors files only, and no code that lies beside a model is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from lipcert.errors import InputError, missing_extra, unknown
from lipcert.foreign import Normalised, Picked
from lipcert.quiet import quiet


def huggingface_model(spec: str) -> tuple[nn.Module, tuple[int, ...] | None]:
    """Return the network that `PATH_OR_NAME` or `PATH_OR_NAME:random` means, and its input shape if that is known.

    A folder holds config.json, model.safetensors and, for the normalisation, preprocessor_config.json, as
    `save_pretrained` writes them; a name with a slash is one of the hub (read from its cache, or fetched). With
    `:random` the weights are random, and NAME may also be a kind of model, such as `segformer`, as its configuration
    class builds it. The output is `.logits`. What cannot be loaded raises InputError.
    """
    try:
        import transformers
        from transformers.models.auto import modeling_auto as auto
    except ImportError as error:
        raise missing_extra("transformers", "transformers") from error
    name, wanted = spec.removesuffix(":random"), spec.endswith(":random")
    folder = Path(name)
    kinds = {
        "ForSemanticSegmentation": auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
        "ForImageClassification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{name} holds no config.json; name a folder that save_pretrained wrote")
    try:
        with quiet("huggingface_hub", "transformers"):
            config, network = _load(transformers, name, wanted, kinds)
    except InputError:
        raise
    except Exception as error:  # OSError for files and the hub, ValueError for configurations, and more
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        hint = "" if wanted else f"; hf:{name}:random takes random weights"
        raise InputError(f"transformers cannot load {name}: {reason.rstrip('.')}{hint}") from error
    picked: nn.Module = Picked(network.eval(), "logits")
    settings = _preprocessing(folder)
    if settings.get("do_normalize", False) and settings.get("image_mean") and settings.get("image_std"):
        picked = Normalised(picked, settings["image_mean"], settings["image_std"])
    return picked, _shape(config, settings)


def _load(transformers: Any, name: str, random: bool, kinds: dict[str, Any]) -> tuple[Any, nn.Module]:
    """Return the configuration and the network."""
    if Path(name).is_dir() or "/" in name:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    elif random and any(name in table for table in kinds.values()):
        config = transformers.AutoConfig.for_model(name)
    else:
        known = {kind for table in kinds.values() for kind in table}
        if name in known:
            raise InputError(f"there is no folder {name}; hf:{name}:random builds that model with random weights")
        raise unknown("folder or kind of model of transformers", name, known)
    build = _builder(transformers, config, kinds)
    if random:
        return config, build.from_config(config)
    return config, build.from_pretrained(name, config=config, use_safetensors=True, trust_remote_code=False)


def _builder(transformers: Any, config: Any, kinds: dict[str, Any]) -> Any:
    builders = {
        "ForSemanticSegmentation": transformers.AutoModelForSemanticSegmentation,
        "ForImageClassification": transformers.AutoModelForImageClassification,
    }
    for named in config.architectures or ():
        for ending, builder in builders.items():
            if str(named).endswith(ending):
                return builder
    ending = "ForImageClassification"
    if config.model_type not in kinds[ending]:
        ending = "ForSemanticSegmentation"
    if config.model_type not in kinds[ending]:
        raise InputError(f"{config.model_type} neither classifies nor segments images; a bound needs logits")
    return builders[ending]


def _preprocessing(folder: Path) -> dict[str, Any]:
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{file} is not a JSON object; the file is damaged") from error


def _shape(config: Any, settings: dict[str, Any]) -> tuple[int, ...] | None:
    """Return (channels, height, width) from the configuration, else from how images are prepared, else None."""
    size = getattr(config, "image_size", None)
    for key in ("crop_size", "size"):
        size = size or settings.get(key)
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        size = (size.get("height", edge), size.get("width", edge))
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        return None
    return (int(getattr(config, "num_channels", 3)), *sides)
