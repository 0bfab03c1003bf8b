"""Published SegFormer weights in our network: the key map, and what is checked.

Three layouts are read, recognised by their names:

| ours (stage i = 0 … 3, block j) | original (i+1 = 1 … 4) | transformers, files | transformers ≥ 5 |
|---|---|---|---|
| `stages.i.merge.proj`, `norm` | `patch_embed{i+1}.proj`, `norm` | `patch_embeddings.i.proj`, `layer_norm` | same |
| `stages.i.norm` | `norm{i+1}` | `layer_norm.i` | `stages.i.layer_norm` |
| `stages.i.blocks.j.` | `block{i+1}.j.` | `block.i.j.` | `stages.i.blocks.j.` |
| `norm1`, `norm2` | same | `layer_norm_1`, `_2` | `layernorm_before`, `_after` |
| `attn.q` | same | `attention.self.query` | `attention.q_proj` |
| `attn.k`, `attn.v` | halves of `attn.kv` | `attention.self.key`, `value` | `attention.k_proj`, `v_proj` |
| `attn.proj` | same | `attention.output.dense` | `attention.o_proj` |
| `attn.reduce`, `norm` | `attn.sr`, `norm` | `attention.self.sr`, `layer_norm` | `attention.sequence_reduction.…` |
| `ffn.fc1`, `fc2` | `mlp.fc1`, `fc2` | `mlp.dense1`, `dense2` | `mlp.fc1`, `fc2` |
| `ffn.conv` | `mlp.dwconv.dwconv` | same | same |
| `decoder.linears.i` | `linear_c{i+1}.proj` | `linear_c.i.proj` | `linear_projections.i.proj` |
| `decoder.fuse`, `norm` | `linear_fuse.conv`, `bn` | `linear_fuse`, `batch_norm` | same |
| `decoder.classifier` | `linear_pred` | `classifier` | same |

The original's own leftovers (`head`, the ImageNet classifier; `decode_head.conv_seg`, which its forward never uses) are
left out. Everything else must match by name and shape, both ways.

The weights expect images normalised with ImageNet's mean and deviation, which is what our first layer does; its two
constants are not part of a published file. `norm_eps` is 1e-6 in the original and 1e-5 in transformers: build the
network with the one whose outputs are wanted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lipcert.models.official import fill, read_state
from lipcert.models.segformer import SegFormer

_LEFT_OUT = re.compile(r"(backbone\.)?head\.|decode_head\.conv_seg\.|.*\.num_batches_tracked$")

# Applied in order, each to what the ones before have made of a name.
_ORIGINAL: tuple[tuple[str, str], ...] = (
    (r"^backbone\.", ""),
    (r"^patch_embed(\d)\.", r"stages.<\1>.merge."),
    (r"^block(\d)\.(\d+)\.", r"stages.<\1>.blocks.\2."),
    (r"^norm(\d)\.", r"stages.<\1>.norm."),
    (r"\.attn\.sr\.", ".attn.reduce."),
    (r"\.mlp\.dwconv\.dwconv\.", ".ffn.conv."),
    (r"\.mlp\.", ".ffn."),
    (r"^decode_head\.linear_c(\d)\.proj\.", r"decoder.linears.<\1>."),
    (r"^decode_head\.linear_fuse\.conv\.", "decoder.fuse."),
    (r"^decode_head\.linear_fuse\.bn\.", "decoder.norm."),
    (r"^decode_head\.linear_pred\.", "decoder.classifier."),
)
_TRANSFORMERS: tuple[tuple[str, str], ...] = (
    (r"^segformer\.", ""),
    (r"^encoder\.patch_embeddings\.(\d)\.", r"stages.\1.patch_embeddings."),
    (r"^encoder\.block\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^encoder\.layer_norm\.(\d)\.", r"stages.\1.norm."),
    (r"^stages\.(\d)\.layer_norm\.", r"stages.\1.norm."),
    (r"\.patch_embeddings\.proj\.", ".merge.proj."),
    (r"\.patch_embeddings\.layer_norm\.", ".merge.norm."),
    (r"\.(layer_norm_1|layernorm_before)\.", ".norm1."),
    (r"\.(layer_norm_2|layernorm_after)\.", ".norm2."),
    (r"\.attention\.(self\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(self\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(self\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(self\.sr|sequence_reduction\.sequence_reduction)\.", ".attn.reduce."),
    (r"\.attention\.(self|sequence_reduction)\.layer_norm\.", ".attn.norm."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.mlp\.dwconv\.dwconv\.", ".ffn.conv."),
    (r"\.mlp\.(?:dense|fc)(\d)\.", r".ffn.fc\1."),
    (r"^decode_head\.(linear_c|linear_projections)\.(\d)\.proj\.", r"decoder.linears.\2."),
    (r"^decode_head\.linear_fuse\.", "decoder.fuse."),
    (r"^decode_head\.batch_norm\.", "decoder.norm."),
    (r"^decode_head\.classifier\.", "decoder.classifier."),
)


def load_official(
    model: SegFormer, weights: str | Path | Mapping[str, Tensor], *, encoder_only: bool = False
) -> SegFormer:
    """Copy published weights into `model` and return it.

    Args:
        weights: a .pth or .safetensors file, or a state dict. Pickles are read without executing anything in them.
        encoder_only: leave the decoder as it is: for ImageNet weights (`mit_b0.pth`), which have none, and for other
            classes.

    Raises InputError for a file that cannot be read, and for weights that are missing, left over or of another shape.

    >>> import torch
    >>> from lipcert.registry import create_model
    >>> small = dict(img_size=32, embed_dims=[8, 8], depths=[1, 1], num_heads=[1, 2], reductions=[2, 1])
    >>> model = create_model("segformer_b0", mlp_ratios=[4, 4], **small)
    >>> load_official(model, {"backbone.patch_embed1.proj.weight": torch.zeros(8, 3, 7, 7)})
    Traceback (most recent call last):
        ...
    lipcert.errors.InputError: the weights lack decoder.classifier.bias and 61 others; they are of another model
    """
    found = convert(read_state(weights) if isinstance(weights, str | Path) else weights)
    wanted = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("normalize.") and not name.endswith("num_batches_tracked")
    }
    if encoder_only:
        found, wanted = (
            {name: tensor for name, tensor in state.items() if name.startswith("stages.")} for state in (found, wanted)
        )
    fill(model, found, wanted)
    return model


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published state dict under our names; names that no rule knows stay as they are."""
    original = any("patch_embed1." in name for name in state)
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if _LEFT_OUT.match(name):
            continue
        for pattern, replacement in _ORIGINAL if original else _TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"<(\d)>", lambda found: str(int(found[1]) - 1), name)
        if ".attn.kv." in name:
            for key, half in zip("kv", tensor.chunk(2), strict=True):
                converted[name.replace(".attn.kv.", f".attn.{key}.")] = half
        else:
            converted[name] = tensor
    return converted
