"""The configuration of a training run: defaults < preset or file < `key=value` settings, typed, unknown keys
refused."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lipcert.errors import InputError, unknown

PRESETS = Path(__file__).with_name("presets")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the outcome of a run. Radii are l2, in [0, 1]-pixel units; the `eps_*` are multiples
    of `eps`."""

    model: str = "lipshift_tiny"
    model_args: Mapping[str, Any] = field(default_factory=dict)  # further keyword arguments of the model
    data: str = "digits"
    img_size: int | None = None  # None: the size of the data
    val_fraction: float | None = None  # None: the default of the data
    augment: str = "default"
    mixup: float = 0.0  # α of the Beta distribution that the share of two mixed images comes from; 0 mixes none
    cutmix: float = 0.0  # the same, for rectangles of one image in another; with both, each batch draws one
    label_smoothing: float = 0.0  # share of each label that is spread over all classes
    epochs: int = 20
    batch_size: int = 128  # over all processes
    optimizer: str = "adamw"
    lr: float = 3e-3
    weight_decay: float = 0.0
    head_lr: float = 1.0  # how many times faster head and decoder learn; 10 in SegFormer's recipe
    schedule: str = "cosine"  # or poly: linear to zero, as SegFormer has it
    warmup: float = 0.1  # share of all steps
    clip: float = 3.0  # gradient norm; 0 leaves gradients alone
    loss: str = "emma"
    eps: float = 36 / 255
    eps_start: float = 0.1
    eps_end: float = 2.0
    eps_ramp: float = 0.5  # share of all steps in which eps grows from eps_start to eps_end
    power_iterations: int = 1
    ema: float = 0.0  # decay of the weight average; 0 trains without
    precision: str = "float32"  # or bfloat16: autocast of the network, never of norms or losses
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        for name, allowed in (
            ("optimizer", ("adamw", "nadam", "sgd")),
            ("precision", ("float32", "bfloat16")),
            ("schedule", ("cosine", "poly")),
        ):
            if getattr(self, name) not in allowed:
                problems.append(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name in ("epochs", "batch_size", "power_iterations"):
            if getattr(self, name) < 1:
                problems.append(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "eps", "head_lr"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                problems.append(f"{name} must be positive and finite, not {getattr(self, name)}")
        for name in ("weight_decay", "clip", "eps_start", "eps_end", "mixup", "cutmix"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                problems.append(f"{name} must be finite and not negative, not {getattr(self, name)}")
        for name in ("warmup", "eps_ramp"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name} is a share of the steps, in [0, 1], not {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            problems.append(f"ema is a decay in [0, 1), not {self.ema}")
        if not 0 <= self.label_smoothing < 1:
            problems.append(f"label_smoothing is a share of a label, in [0, 1), not {self.label_smoothing}")
        soft = [name for name in ("mixup", "cutmix", "label_smoothing") if getattr(self, name)]
        if soft and self.loss != "cross_entropy":
            problems.append(f"{' and '.join(soft)} need loss cross_entropy: the margins of {self.loss} have one label")
        if problems:
            raise InputError("; ".join(problems))


def load_config(file: str | Path | None = None, settings: Mapping[str, Any] | None = None) -> TrainConfig:
    """Build a configuration from a YAML file (path, or None) and overriding settings.

    Values may be text ("36/255", "1e-3"): they are converted by the type of the field. Raises InputError for a file
    that cannot be read, and for unknown keys and values that do not fit, all of them in one message.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values.update(_read(Path(file)))
    values.update(settings or {})
    return TrainConfig(**_typed(values))


def find_preset(name: str) -> Path:
    """Return the file of a preset that ships with lipcert; an unknown name raises InputError with the near match."""
    known = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}
    if name not in known:
        raise unknown("preset", name, known)
    return known[name]


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """Turn `key=value` texts into settings; `model_args.key=value` sets one argument of the model.

    >>> parse_settings(["lr=1e-3", "model_args.depths=[2, 2]"])
    {'lr': 0.001, 'model_args': {'depths': [2, 2]}}
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--set {pair!r}: write key=value, for example --set lr=1e-3")
        try:
            value = _number(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise InputError(f"--set {pair!r}: {text!r} is not a YAML value") from error
        head, dot, tail = key.partition(".")
        if dot:
            settings.setdefault(head, {})[tail] = value
        else:
            settings[head] = value
    return settings


def to_yaml(config: TrainConfig) -> str:
    """Return the configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also no UTF-8, and dates that do not exist
        raise InputError(f"{path} is not a YAML file") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold `key: value` lines")
    return values


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(TrainConfig)
    problems, typed = [], {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            problems.append(f"unknown key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
            continue
        try:
            typed[key] = _convert(value, hints[key])
        except (TypeError, ValueError, OverflowError):
            problems.append(f"{key}: {value!r} is not {_describe(hints[key])}")
    if problems:
        raise InputError("configuration: " + "; ".join(problems))
    return typed


def _convert(value: Any, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):  # X | None
        return None if value is None else _convert(value, typing.get_args(hint)[0])
    if hint is float:
        number = _number(value)
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise ValueError
        return float(number)
    if hint is int:
        number = _number(value)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or number != int(number):
            raise ValueError
        return int(number)
    if hint is str:
        if not isinstance(value, str):
            raise ValueError
        return value
    if not isinstance(value, Mapping):
        raise ValueError
    return {str(key): _number(item) for key, item in value.items()}


def _number(value: Any) -> Any:
    """Read "36/255" and "1e-3" (text for YAML) as numbers; everything else stays as it is."""
    if not isinstance(value, str):
        return value
    numerator, slash, denominator = value.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(value)
    except (ValueError, ZeroDivisionError):
        return value


def _describe(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        hint = typing.get_args(hint)[0]
    return {float: "a number", int: "a whole number", str: "a text"}.get(hint, "a mapping")
