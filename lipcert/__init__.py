"""lipcert: train, audit and certify Lipschitz vision models in l2.

The names below are loaded on first use, so that `import lipcert` and `lipcert --help` do not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lipcert.bounds.audit import Audit as Audit
    from lipcert.bounds.audit import audit as audit
    from lipcert.bounds.core import Bound as Bound
    from lipcert.bounds.core import BoundError as BoundError
    from lipcert.certify import certify as certify
    from lipcert.checkpoint import load_model as load_model
    from lipcert.checkpoint import save_model as save_model
    from lipcert.errors import InputError as InputError
    from lipcert.export import export as export
    from lipcert.registry import create_model as create_model

__version__ = "0.1.0"

_checkout = Path(__file__).parents[1]
if (_checkout / "setup.py").is_file():  # in a checkout, bounds/ and attacks/ lie beside this folder
    __path__.append(str(_checkout))

_PUBLIC = {
    "Audit": "lipcert.bounds.audit",
    "Bound": "lipcert.bounds.core",
    "BoundError": "lipcert.bounds.core",
    "InputError": "lipcert.errors",
    "audit": "lipcert.bounds.audit",
    "certify": "lipcert.certify",
    "create_model": "lipcert.registry",
    "export": "lipcert.export",
    "load_model": "lipcert.checkpoint",
    "save_model": "lipcert.checkpoint",
}


class _Package(ModuleType):
    """`lipcert.certify` is the function, also after `import lipcert.certify` has loaded the module of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
