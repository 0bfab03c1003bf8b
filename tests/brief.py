"""A fixture that shortens AutoAttack: `from brief import brief` in a test module makes it hold for all its tests."""

import sys

import pyautoattack
import pytest


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Twelve steps instead of a hundred are enough against linear classifiers."""

    def shortened(kind):
        def start(self, *args, **kwargs):
            kind.__init__(self, *args, **{**kwargs, "n_iter": 12})

        return type(kind.__name__, (kind,), {"__init__": start})

    module = sys.modules[pyautoattack.AutoAttack.__module__]
    for name in ("APGDAttack", "APGDAttack_targeted", "FABAttack_PT"):
        monkeypatch.setattr(module, name, shortened(getattr(module, name)))
