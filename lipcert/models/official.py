"""Published weights in our networks: reading them, matching them, and the key maps of Swin and LipsFormer-Swin.

| ours (stage i, block j) | torchvision `swin_t`, `swin_s`, `swin_b` | LipsFormer's released code |
|---|---|---|
| `embed.0`, `embed.2` | `features.0.0`, `features.0.2` | `patch_embed.proj`, `patch_embed.norm` |
| `stages.i.blocks.j.` | `features.{2i+1}.j.` | `layers.i.blocks.j.` |
| `stages.i.merge.` | `features.{2i}.` | `layers.{i-1}.downsample.` |
| `attn.attention.qkv`, `proj` | `attn.qkv`, `attn.proj` | same |
| `attn.attention.table` | `attn.relative_position_bias_table` | same |
| `mlp.fc1`, `fc2` | `mlp.0`, `mlp.3` | `mlp.fc1`, `mlp.fc2` |
| `convs.0.depthwise`, `convs.1.depthwise` | | `dwconv_layers.0`, `dwconv_layers.1` |
| `convs.0.pointwise` | | `nin` |
| `scales.0` … `scales.3`, `.alpha` | | `scale_layers.0`, `scale_layers.1`, `alpha1`, `alpha2`, `.scale` |
| `norm1`, `norm2`, `norm`, `head` | same | same |

`relative_position_index`, which both keep beside their tables, follows from the window and is left out. Everything else
must match by name and shape, both ways. The weights expect images normalised with ImageNet's mean and deviation, which
is what our first layer does; its two constants are not part of a published file.

Checked: outputs of torchvision's networks with random weights, and of LipsFormer's formulas on weights under its names.
Not checked: LipsFormer's one released checkpoint (Swin-Tiny, 82.7 % top-1) itself, which was not at hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipcert.errors import InputError
from lipcert.models.swin import WindowNetwork

_LEFT_OUT = re.compile(r".*\.(relative_position_index|attn_mask)$")

# Applied in order, each to what the ones before have made of a name; <n+d> and <n/2> are numbers to compute.
_BOTH: tuple[tuple[str, str], ...] = (
    (r"\.attn\.(qkv|proj)\.", r".attn.attention.\1."),
    (r"\.attn\.relative_position_bias_table$", ".attn.attention.table"),
)
_TORCHVISION: tuple[tuple[str, str], ...] = (
    (r"^features\.0\.", "embed."),
    (r"^features\.([1357])\.(\d+)\.", r"stages.<\1/2>.blocks.\2."),
    (r"^features\.([246])\.", r"stages.<\1/2>.merge."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
_LIPSFORMER: tuple[tuple[str, str], ...] = (
    (r"^patch_embed\.proj\.", "embed.0."),
    (r"^patch_embed\.norm\.", "embed.2."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^layers\.(\d+)\.downsample\.", r"stages.<\1+1>.merge."),
    (r"\.dwconv_layers\.(\d)\.", r".convs.\1.depthwise."),
    (r"\.nin\.", ".convs.0.pointwise."),
    (r"\.scale_layers\.(\d)\.scale$", r".scales.\1.alpha"),
    (r"\.alpha([12])\.scale$", r".scales.<\1+1>.alpha"),
)


def load_official(model: WindowNetwork, weights: str | Path | Mapping[str, Tensor]) -> WindowNetwork:
    """Copy torchvision's weights into a `swin_*`, or LipsFormer's into a `lipsformer_swin_*` made with `released=True`.

    Args:
        weights: a .pth or .safetensors file, or a state dict. Pickles are read without executing anything in them.

    Raises InputError for a file that cannot be read, and for weights that are missing, left over or of another shape.

    >>> from lipcert.registry import create_model
    >>> model = create_model("swin_tiny", img_size=32, embed_dim=12, depths=[1], num_heads=[2])
    >>> load_official(model, {"features.0.0.weight": torch.zeros(12, 3, 4, 4)})
    Traceback (most recent call last):
        ...
    lipcert.errors.InputError: the weights lack embed.0.bias and 19 others; they are of another model
    """
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("normalize.")}
    fill(model, convert(read_state(weights) if isinstance(weights, str | Path) else weights), wanted)
    return model


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published state dict under our names; names that no rule knows stay as they are."""
    rules = _TORCHVISION if any(name.startswith("features.") for name in state) else _LIPSFORMER
    converted = {}
    for name, tensor in state.items():
        if _LEFT_OUT.match(name):
            continue
        for pattern, replacement in (*_BOTH, *rules):
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"<(\d+)/2>", lambda found: str(int(found[1]) // 2), name)
        name = re.sub(r"<(\d+)\+1>", lambda found: str(int(found[1]) + 1), name)
        converted[name] = tensor
    return converted


def fill(model: nn.Module, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Load `found` into a model whose entries `wanted` it must have, all and only, in their shapes; else InputError."""
    for names, what in ((wanted.keys() - found.keys(), "lack"), (found.keys() - wanted.keys(), "also hold")):
        if names:
            more = f" and {len(names) - 1} others" if len(names) > 1 else ""
            raise InputError(f"the weights {what} {min(names)}{more}; they are of another model")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            shapes = f"{tuple(found[name].shape)}, not {tuple(tensor.shape)}"
            raise InputError(f"{name} of the weights is {shapes}; they are of another model or other classes")
    model.load_state_dict(dict(found), strict=False)


def read_state(path: str | Path) -> Mapping[str, Tensor]:
    """Read a state dict from .safetensors or .pth; the training frameworks put it under "state_dict" or "model"."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            return safetensors.torch.load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise whatever they trip over
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} is not a readable file of weights ({reason})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and key in content:
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path} holds no state dict; save one with torch.save(model.state_dict(), …)")
    return content
