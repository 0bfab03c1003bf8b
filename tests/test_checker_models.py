"""The checker confirms what our own certified networks are made of: every option of every one of them, tiny.

A network that gets an operator, or an arrangement of operators, that the checker cannot follow fails here. So does an
option that nobody has listed below.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from issuing import certify_masks, lipsformer, paper, small

from lipcert.checker import check
from lipcert.models.lipsegformer import DECODERS, MIXERS, lipsegformer
from lipcert.models.lipsformer_certified import lipsformer_certified
from lipcert.models.shiftvit import lipshift, lipshift_published
from lipcert.registry import models

ONE: dict[str, Any] = {"depths": (1,)}
LIPSHIFT: list[dict[str, Any]] = [
    {"circular": True, "kernel_size": 5},
    {"circular": True, "shift": "branch", "patch_size": 1} | ONE,
    {"circular": True, "shift": "zero", "center": False},
    {"kernel_size": 1, "neck_depth": 2},
    {"kernel_size": 1, "shift": "branch"} | ONE,
    {"residual": "published"} | ONE,
    {"residual": "published", "shift": "zero", "divisor": 5} | ONE,
    {"neck": 0, "pool": "l2", "num_classes": 2, "scale": 0.5},
    {"neck": 0, "pool": "avg", "embed_dim": 14, "in_chans": 3} | ONE,
    {"img_size": 12, "patch_size": 2},  # grids of 6 and 3
    {"img_size": 15, "patch_size": 3, "circular": True} | ONE,
    {"img_size": 16, "depths": (1, 1, 1), "patch_size": 4, "circular": True},  # the last grid is a single position
]
PAPER: list[dict[str, Any]] = [
    {"dropout": 0.3, "drop_path": 0.1},
    {"padding_quirk": False, "scale": 0.1},
    {"img_size": 9, "embed_dim": 14, "divisor": 5},
]
LIPSFORMER: list[dict[str, Any]] = [
    {"attention": (2,), "window_size": 2, "residual": "weighted", "orthogonal": False, "scale": 0.3},  # one is shifted
    {"attention": (0,), "channel_mix": (1,), "kernel_size": 1},
    {"depths": (1, 1), "attention": (1, 1), "channel_mix": (0, 1), "num_heads": (1, 2), "divisor": 5},
    {"tau": 4.0, "eps": 0.01, "start": 0.3, "window_size": 1, "patch_size": 1} | ONE,
    {"img_size": 12, "window_size": 3, "embed_dim": 16, "residual": "convex"} | ONE,
]
TWO: dict[str, Any] = {"depths": (1, 1)}
MASKS: list[dict[str, Any]] = [
    *({"decoder": decoder, "mixers": mixer} | TWO for decoder in DECODERS for mixer in MIXERS),
    {"mixers": "window", "ffn": "mix", "ffn_ratio": 1, "depths": (2, 1), "window_size": 2},
    {"mixers": ("shift", "reduced"), "ffn": "mix", "decoder": "mlp", "reduction": 1, "kernel_size": 1} | TWO,
    {"decoder_depths": (1, 1), "kernel_size": 1, "divisor": 5, "scale": 0.3},
    {"decoder": "mlp", "decoder_dim": 6, "height": 48, "img_size": 80, "num_classes": 2},  # 12 x 20, 6 x 10, 3 x 5
    {"decoder": "pixelshuffle", "mixers": "reduced", "reduction": 3, "height": 24, "img_size": 24, "in_chans": 1} | TWO,
    {"mixers": "window", "num_heads": 2, "window_size": 1, "tau": 3.0, "eps": 0.1, "start": 0.4, "embed_dim": 16} | TWO,
    {"depths": (1,), "kernel_size": 5},
]
CASES: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    *((small, options) for options in LIPSHIFT),
    *((paper, options) for options in PAPER),
    *((lipsformer, options) for options in LIPSFORMER),
    *((certify_masks, options) for options in MASKS),
]


@pytest.mark.parametrize("make, options", CASES, ids=lambda x: x.__name__ if callable(x) else str(x))
def test_it_is_confirmed(make: Callable[..., Any], options: dict[str, Any], tmp_path: Path) -> None:
    files = make(tmp_path, **options)
    report = check(tmp_path / "certificate.json", images=files.images, labels=files.labels)
    assert report.accepted and report.images == len(files.images), report.reason


@pytest.mark.parametrize(
    "build, cases",
    [(lipshift, LIPSHIFT), (lipshift_published, PAPER), (lipsformer_certified, LIPSFORMER), (lipsegformer, MASKS)],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_every_option_is_tried(build: Callable[..., Any], cases: list[dict[str, Any]]) -> None:
    options = {*inspect.signature(build).parameters}
    tried = {option for case in cases for option in case}
    assert options - tried <= {"num_classes", "in_chans", "neck", "depths"}, "a new option: try it above"


def test_every_certified_network_is_one_of_these() -> None:
    """Names of the registry that certificates are made for; a new family needs a list above."""
    certified = {name for name in models.list() if name.startswith(("lipshift", "lipsegformer")) or "1lip" in name}
    assert certified == {
        "lipshift_paper", "lipshift_tiny", "lipshift_small", "lipshift_base",
        "lipsformer_swin_tiny_1lip", "lipsformer_swin_small_1lip",
        "lipsegformer_tiny", "lipsegformer_b0", "lipsegformer_b1",
    }  # fmt: skip
