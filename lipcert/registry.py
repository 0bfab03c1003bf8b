"""Registries: name -> function. One per kind of thing that is looked up by name; duplicates are refused.

A registry knows the package whose import fills it and imports it on the first look-up, so registering needs no list of
files anywhere and importing this module costs nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, TypeVar

from lipcert.errors import InputError, unknown

if TYPE_CHECKING:
    from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])


class Registry:
    """Map names to functions of one kind ("model"); `source` is the package that registers them when it is imported.

    >>> shapes = Registry("shape")
    >>> @shapes.register()
    ... def square(side): return side * side
    >>> shapes.get("square")(3)
    9
    """

    def __init__(self, kind: str, source: str | None = None) -> None:
        self.kind = kind
        self._source = source
        self._entries: dict[str, Callable[..., Any]] = {}
        self._tasks: dict[str, str] = {}

    def register(self, name: str | None = None, *, task: str = "classification") -> Callable[[Function], Function]:
        """Return a decorator that registers a function under `name` (its own name if none is given).

        `task` says what the thing is for: "classification" (one label an image) or "segmentation" (one a pixel). A name
        that is already taken raises ValueError.
        """

        def decorate(function: Function) -> Function:
            key = name or function.__name__
            if key in self._entries:
                old = self._entries[key]
                raise ValueError(
                    f"{self.kind} {key!r} is already registered by {old.__module__}.{old.__qualname__}; "
                    f"{function.__module__}.{function.__qualname__} needs another name"
                )
            self._entries[key] = function
            self._tasks[key] = task
            return function

        return decorate

    def get(self, name: str) -> Callable[..., Any]:
        """Return the function registered under `name`; an unknown name raises InputError with the near matches."""
        self._fill()
        try:
            return self._entries[name]
        except KeyError:
            raise unknown(self.kind, name, self._entries) from None

    def task(self, name: str) -> str:
        """Return what `name` is for: "classification" or "segmentation"; an unknown name raises InputError."""
        self.get(name)
        return self._tasks[name]

    def require_task(self, name: str, task: str) -> None:
        """Raise InputError, saying which names would do, unless `name` is for `task`."""
        found = self.task(name)
        if found != task:
            others = ", ".join(other for other in self.list() if self._tasks[other] == task)
            raise InputError(f"{self.kind} {name} is for {found}, and this is {task}; choose one of {others}")

    def list(self, pattern: str = "*") -> list[str]:
        """Return the registered names that match the glob `pattern`, sorted."""
        self._fill()
        return sorted(name for name in self._entries if fnmatch(name, pattern))

    def __contains__(self, name: object) -> bool:
        self._fill()
        return name in self._entries

    def _fill(self) -> None:
        if self._source is not None:
            importlib.import_module(self._source)


models = Registry("model", "lipcert.models")
datasets = Registry("dataset", "lipcert.data")
losses = Registry("loss", "lipcert.losses")


def create_model(name: str, num_classes: int = 10, img_size: int = 32, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """Build the registered model `name` for inputs (n, in_chans, img_size, img_size) in [0, 1].

    Further keyword arguments go to the model's function; one that it does not take, an unknown name or a number below 1
    raises InputError.

    >>> model = create_model("lipshift_tiny", num_classes=10, img_size=32)
    """
    build = models.get(name)
    for key, value in (("num_classes", num_classes), ("img_size", img_size), ("in_chans", in_chans)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{key} of model {name!r} must be a whole number of at least 1, got {value!r}")
    try:
        return build(num_classes=num_classes, img_size=img_size, in_chans=in_chans, **kwargs)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise InputError(f"model {name!r} does not take these arguments: {error}") from error
