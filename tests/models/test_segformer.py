"""SegFormer: the published sizes, transformers' outputs, and each block against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf
from torch import nn

from lipcert.bounds import audit
from lipcert.errors import InputError
from lipcert.export import export
from lipcert.models.segformer import EfficientSelfAttention, MixFFN, MLPDecoder, OverlapPatchMerging, SegFormer
from lipcert.models.segformer_official import convert, load_official
from lipcert.registry import create_model, models

SMALL = dict(embed_dims=[8, 16], depths=[2, 1], num_heads=[1, 2], reductions=[2, 1], mlp_ratios=[2, 4], decoder_dim=12)


def small(**kwargs) -> SegFormer:
    model = create_model("segformer_b0", **{**dict(num_classes=5, img_size=32), **SMALL, **kwargs})
    assert isinstance(model, SegFormer)
    return model


def shaken(model: nn.Module) -> nn.Module:
    """Give every parameter and buffer a value of its own: zeros and ones would hide a wrong name."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not name.startswith("normalize."):
                tensor += 0.1 * torch.randn_like(tensor)
                if "running_var" in name:
                    tensor.abs_()
    return model.eval()


PUBLISHED = {  # encoder, with 150 classes, with 4 classes; in thousands
    "segformer_b0": (3319, 3753, 3715),
    "segformer_b1": (13151, 13716, 13678),
    "segformer_b2": (24196, 27462, 27350),
    "segformer_b3": (44072, 47338, 47226),
    "segformer_b4": (60843, 64108, 63996),
    "segformer_b5": (81443, 84709, 84596),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    def thousands(module: nn.Module) -> int:
        return round(sum(parameter.numel() for parameter in module.parameters()) / 1000)

    with torch.device("meta"):
        large = create_model(name, num_classes=150, img_size=512)
        few = create_model(name, num_classes=4, img_size=256)
    assert (thousands(large.stages), thousands(large), thousands(few)) == PUBLISHED[name]


def test_parameters_are_as_many_as_the_layers_have() -> None:
    """Counted from the paper's equations: c wide, e times wider inside, reduction r."""

    def block(c: int, e: int, r: int) -> int:
        reduced = c * c * r * r + c + 2 * c if r > 1 else 0
        attention = 4 * (c * c + c) + reduced
        ffn = (c * e * c + e * c) + (9 * e * c + e * c) + (e * c * c + c)
        return 2 * c + attention + 2 * c + ffn

    widths, expansions, reductions, previous, total = (32, 64, 160, 256), (8, 8, 4, 4), (8, 4, 2, 1), 3, 0
    for stage, (c, e, r) in enumerate(zip(widths, expansions, reductions, strict=True)):
        total += (3 if stage else 7) ** 2 * previous * c + c + 2 * c + 2 * block(c, e, r) + 2 * c
        previous = c
    total += sum(c * 256 + 256 for c in widths) + 4 * 256**2 + 2 * 256 + 256 * 4 + 4
    with torch.device("meta"):
        model = create_model("segformer_b0_course", num_classes=4, img_size=256)
        assert model(torch.empty(1, 3, 256, 256)).shape == (1, 4, 64, 64)
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    assert round((total - sum(p.numel() for p in model.decoder.parameters())) / 1000) == 3410


@pytest.mark.parametrize("shape", [(64, 96), (50, 71)])
def test_outputs_are_those_of_transformers(shape: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(num_labels=150)  # its default is B0
    theirs = shaken(transformers.SegformerForSemanticSegmentation(config))
    ours = create_model("segformer_b0", num_classes=150, img_size=64, norm_eps=1e-5).eval()
    assert ours.normalize.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    load_official(ours, theirs.state_dict())
    x = torch.rand(2, 3, *shape)
    with torch.no_grad():
        expected = theirs((x - ours.normalize.mean) / ours.normalize.std).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_files_of_transformers_load(tmp_path) -> None:
    """What save_pretrained writes has older names than the network in memory."""
    transformers = pytest.importorskip("transformers")
    arguments = dict(num_encoder_blocks=2, num_labels=5, decoder_hidden_size=12, patch_sizes=[7, 3], strides=[4, 2],
                     hidden_sizes=SMALL["embed_dims"], depths=SMALL["depths"], sr_ratios=SMALL["reductions"],
                     num_attention_heads=SMALL["num_heads"], mlp_ratios=SMALL["mlp_ratios"])  # fmt: skip
    theirs = shaken(transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**arguments)))
    theirs.save_pretrained(tmp_path)
    ours = load_official(small(norm_eps=1e-5), tmp_path / "model.safetensors").eval()
    x = torch.rand(1, 3, 33, 40)
    with torch.no_grad():
        expected = theirs((x - ours.normalize.mean) / ours.normalize.std).logits
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    encoder = small()
    before = encoder.decoder.fuse.weight.clone()
    load_official(encoder, tmp_path / "model.safetensors", encoder_only=True)
    assert torch.equal(encoder.decoder.fuse.weight, before)
    assert torch.equal(encoder.stages[1].norm.weight, ours.stages[1].norm.weight)


def original_names() -> dict[str, str]:
    """Return the names of the authors' code for the small network, written down by hand: theirs -> ours."""
    names = {}
    for i in (0, 1):
        names[f"backbone.patch_embed{i + 1}.proj"] = f"stages.{i}.merge.proj"
        names[f"backbone.patch_embed{i + 1}.norm"] = f"stages.{i}.merge.norm"
        names[f"backbone.norm{i + 1}"] = f"stages.{i}.norm"
        names[f"decode_head.linear_c{i + 1}.proj"] = f"decoder.linears.{i}"
        for j in range((2, 1)[i]):
            theirs, ours = f"backbone.block{i + 1}.{j}", f"stages.{i}.blocks.{j}"
            names |= {f"{theirs}.norm1": f"{ours}.norm1", f"{theirs}.norm2": f"{ours}.norm2"}
            names |= {f"{theirs}.attn.q": f"{ours}.attn.q", f"{theirs}.attn.proj": f"{ours}.attn.proj"}
            names |= {f"{theirs}.mlp.fc1": f"{ours}.ffn.fc1", f"{theirs}.mlp.fc2": f"{ours}.ffn.fc2"}
            names |= {f"{theirs}.mlp.dwconv.dwconv": f"{ours}.ffn.conv"}
            if i == 0:
                names |= {f"{theirs}.attn.sr": f"{ours}.attn.reduce", f"{theirs}.attn.norm": f"{ours}.attn.norm"}
    names |= {"decode_head.linear_fuse.conv": "decoder.fuse", "decode_head.linear_fuse.bn": "decoder.norm"}
    return names | {"decode_head.linear_pred": "decoder.classifier"}


def original_state(model: SegFormer) -> dict[str, torch.Tensor]:
    ours = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("normalize.")}
    theirs = {}
    for their_name, our_name in original_names().items():
        for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if f"{our_name}.{kind}" in ours:
                theirs[f"{their_name}.{kind}"] = ours[f"{our_name}.{kind}"]
    for i, j in ((0, 0), (0, 1), (1, 0)):
        for kind in ("weight", "bias"):
            halves = [ours[f"stages.{i}.blocks.{j}.attn.{key}.{kind}"] for key in "kv"]
            theirs[f"backbone.block{i + 1}.{j}.attn.kv.{kind}"] = torch.cat(halves)
    return theirs | {"backbone.head.weight": torch.zeros(1000, 16), "decode_head.conv_seg.weight": torch.zeros(1)}


def test_original_weights_load_from_a_file(tmp_path) -> None:
    source, target = shaken(small()), small().eval()
    torch.save({"state_dict": original_state(source), "meta": {"epoch": 160000}}, tmp_path / "official.pth")
    load_official(target, tmp_path / "official.pth")
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)
    backbone = {name.removeprefix("backbone."): tensor for name, tensor in original_state(source).items()}
    imagenet = {name: tensor for name, tensor in backbone.items() if not name.startswith("decode_head")}
    load_official(small(), imagenet, encoder_only=True)
    with pytest.raises(InputError, match=r"the weights lack decoder\.classifier\.bias and \d+ others"):
        load_official(small(), imagenet)


def test_weights_that_do_not_fit_are_refused(tmp_path) -> None:
    state = original_state(small())
    with pytest.raises(InputError, match="the weights also hold backbone2.x and 1 others; they are of another model"):
        load_official(small(), state | {"backbone.more.weight": torch.zeros(1)} | {"backbone2.x": torch.zeros(1)})
    with pytest.raises(InputError, match=r"decoder.classifier.weight of the weights is \(5, 12, 1, 1\), not \(7,"):
        load_official(small(num_classes=7), {**state, "decode_head.linear_pred.bias": torch.zeros(7)})
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match="bad.pth is not a readable file of weights"):
        load_official(small(), tmp_path / "bad.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds no state dict"):
        load_official(small(), tmp_path / "list.pth")
    assert set(convert({"head.weight": torch.zeros(1), "patch_embed1.proj.bias": torch.zeros(1)})) == {
        "stages.0.merge.proj.bias"
    }


def numbers(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in module.named_parameters()}


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight + bias


@settings(max_examples=15)
@given(st.integers(1, 3), st.sampled_from([1, 2, 3]), st.integers(3, 7), st.integers(3, 7))
def test_attention_is_equations_1_and_2(heads: int, reduction: int, height: int, width: int) -> None:
    """Token by token: equation 2 reshapes r x r neighbours to one row of C r² entries and multiplies by a matrix."""
    dim = 4 * heads
    layer = shaken(EfficientSelfAttention(dim, heads=heads, reduction=reduction).double())
    w = numbers(layer)
    x = np.random.default_rng(0).standard_normal((height * width, dim))
    few = x
    if reduction > 1:
        rows = []
        for top in range(0, height - reduction + 1, reduction):
            for left in range(0, width - reduction + 1, reduction):
                patch = x.reshape(height, width, dim)[top : top + reduction, left : left + reduction]
                rows.append(w["reduce.weight"].reshape(dim, -1) @ patch.transpose(2, 0, 1).ravel() + w["reduce.bias"])
        few = layer_norm(np.array(rows), w["norm.weight"], w["norm.bias"])
    q, k, v = (t @ w[f"{n}.weight"].T + w[f"{n}.bias"] for t, n in ((x, "q"), (few, "k"), (few, "v")))
    out = np.empty_like(x)
    for head in range(heads):
        part = slice(4 * head, 4 * head + 4)
        scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(4))
        out[:, part] = scores / scores.sum(1, keepdims=True) @ v[:, part]
    expected = out @ w["proj.weight"].T + w["proj.bias"]
    with torch.no_grad():
        np.testing.assert_allclose(layer(torch.tensor(x)[None], height, width)[0].numpy(), expected, atol=1e-10)


def test_mix_ffn_is_equation_3() -> None:
    layer = shaken(MixFFN(3, 6).double())
    w = numbers(layer)
    x = np.random.default_rng(0).standard_normal((4 * 5, 3))
    wide = (x @ w["fc1.weight"].T + w["fc1.bias"]).reshape(4, 5, 6)
    padded = np.pad(wide, ((1, 1), (1, 1), (0, 0)))
    mixed = np.empty_like(wide)
    for i in range(4):
        for j in range(5):
            mixed[i, j] = np.einsum("abc,cab->c", padded[i : i + 3, j : j + 3], w["conv.weight"][:, 0]) + w["conv.bias"]
    active = mixed * (1 + erf(mixed / math.sqrt(2))) / 2
    expected = active.reshape(20, 6) @ w["fc2.weight"].T + w["fc2.bias"]
    with torch.no_grad():
        np.testing.assert_allclose(layer(torch.tensor(x)[None], 4, 5)[0].numpy(), expected, atol=1e-12)


def test_patches_overlap() -> None:
    """Stage 1 sees 7 x 7 pixels around every fourth one; a pixel between two patches reaches both."""
    merge = shaken(OverlapPatchMerging(1, 2, size=7, stride=4).double())
    merge.norm = nn.Identity()
    x = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    before, height, width = merge(x)
    x[0, 0, 6, 4] = 1.0  # within three pixels of rows 4 and 8, and of column 4 only
    changed = (merge(x)[0] - before).abs().sum(2).reshape(height, width).nonzero().tolist()
    assert (height, width) == (4, 4) and changed == [[1, 1], [2, 1]]


def test_decoder_is_equation_4() -> None:
    decoder = shaken(MLPDecoder([2, 3], 4, 5, dropout=0.5).double())
    w = numbers(decoder) | {name: tensor.numpy() for name, tensor in decoder.named_buffers()}
    maps = [torch.randn(1, 2, 4, 6).double(), torch.randn(1, 3, 2, 3).double()]

    def doubling(n: int) -> np.ndarray:  # bilinear, half-pixel centres: weights 1/4 and 3/4, borders repeated
        matrix = np.zeros((2 * n, n))
        for i in range(2 * n):
            at = (i + 0.5) / 2 - 0.5
            for j, share in ((math.floor(at), 1 - at % 1), (math.floor(at) + 1, at % 1)):
                matrix[i, min(max(j, 0), n - 1)] += share
        return matrix

    first, second = (
        np.einsum("oc,chw->ohw", w[f"linears.{i}.weight"], maps[i][0].numpy()) + w[f"linears.{i}.bias"][:, None, None]
        for i in range(2)
    )
    second = np.einsum("yh,xw,chw->cyx", doubling(2), doubling(3), second)
    fused = np.einsum("oc,chw->ohw", w["fuse.weight"][:, :, 0, 0], np.concatenate([second, first]))
    scale = w["norm.weight"] / np.sqrt(w["norm.running_var"] + 1e-5)
    shift = w["norm.bias"] - scale * w["norm.running_mean"]
    active = np.maximum(fused * scale[:, None, None] + shift[:, None, None], 0)
    expected = np.einsum("oc,chw->ohw", w["classifier.weight"][:, :, 0, 0], active)
    expected += w["classifier.bias"][:, None, None]
    with torch.no_grad():
        np.testing.assert_allclose(decoder(maps)[0].numpy(), expected, atol=1e-12)


def test_there_is_no_positional_code_but_zero_padding() -> None:
    """Any size goes in: a quarter of it, rounded up, comes out."""
    model = small().eval()
    for height, width in ((32, 32), (33, 47), (48, 36)):
        with torch.no_grad():
            assert model(torch.rand(1, 3, height, width)).shape == (1, 5, math.ceil(height / 4), math.ceil(width / 4))


def test_it_compiles_and_trains_in_bfloat16() -> None:
    torch.manual_seed(0)
    model, x = small().eval(), torch.rand(2, 3, 32, 32)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model.train()(x)
    low.float().square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model.eval()(x).float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


def test_stochastic_depth_rises_to_the_published_rate() -> None:
    with torch.device("meta"):
        model = create_model("segformer_b2", img_size=64)
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.1) and np.allclose(np.diff(rates), 0.1 / 15)


def test_the_bound_is_finite_and_useless() -> None:
    """LayerNorm makes a product of 1/sqrt(eps) per layer; what matters is that no operator is unknown."""
    torch.manual_seed(0)
    found = audit(export(small(depths=[1, 1], dropout=0.5)), (3, 16, 16))
    assert 1e3 < found.upper.require_upper() < math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(depths=[1, 1, 1]), "need one number for each stage"),
        (dict(num_heads=[3, 2]), "3 heads do not divide 8 channels"),
        (dict(img_size=4), r"images of 4 pixels leave 1 tokens a side in stage 1, which reduces by 2"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        small(**arguments)


def test_models_know_their_task() -> None:
    assert models.task("segformer_b3") == "segmentation" and models.task("lipshift_tiny") == "classification"
    with pytest.raises(InputError, match="model segformer_b0 is for segmentation, and this is classification; choose"):
        models.require_task("segformer_b0", "classification")
