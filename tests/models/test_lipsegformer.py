"""Lip-SegFormer: estimate, proof and attack agree, mixers mix what they say, and decoders cost what they are built
for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import jacobian_norm
from torch import nn

from lipcert.attacks.ascent import lipschitz_lower
from lipcert.bounds import audit
from lipcert.checkpoint import load_model, save_model
from lipcert.errors import InputError
from lipcert.export import export
from lipcert.models.lipsegformer import DECODERS, LipSegFormer, lipsegformer
from lipcert.models.lipsegformer_decoders import MLPDecoder, ShuffleDecoder
from lipcert.models.lipsformer_certified import AttentionBlock
from lipcert.models.mix_ffn import LipschitzMixFFN
from lipcert.models.parts import Affine, LinearShiftBlock
from lipcert.models.reduced_attention import ReducedAttentionBlock
from lipcert.registry import create_model


def small(decoder: str = "split", depths=(2, 1, 1), noise=0.05, **arguments) -> LipSegFormer:
    torch.manual_seed(0)
    model = lipsegformer(**{
        **dict(num_classes=3, img_size=32, height=16, in_chans=3, embed_dim=12, depths=depths, decoder=decoder),
        **dict(decoder_dim=12, num_heads=2),
        **arguments,
    })  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model.eval()


def features(model: LipSegFormer) -> nn.Module:
    """Return the network without its head: that is what the estimate speaks of."""
    plain = export(model)
    plain.head = nn.Identity()
    return plain


ATTENDING = [dict(mixers=("shift", "shift", "window")), dict(mixers=("shift", "reduced", "window"), ffn="mix")]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("options", [dict(), *ATTENDING], ids=["shift", "window", "mixed"])
def test_estimate_proof_and_attack_agree(decoder: str, options: dict) -> None:
    model = small(decoder, **options)
    estimate = model.lipschitz_estimate(60).item()
    proof = audit(features(model), (3, 16, 32))
    proved = proof.upper.require_upper()
    assert 0.8 * proved <= estimate <= 1.25 * proved
    assert proof.position is not None and proof.position.order <= proof.upper.order
    assert lipschitz_lower(features(model), (3, 16, 32), steps=10).value <= proved


@pytest.mark.parametrize("options", [
    {}, {"mixers": ("shift", "shift", "window")}, {"mixers": ("shift", "shift", "window"), "ffn": "mix"},
    {"mixers": ("shift", "shift", "reduced")}, {"mixers": ("window", "reduced", "window"), "ffn": "mix"},
], ids=str)  # fmt: skip
def test_the_proof_is_near_the_estimate_with_and_without_attention(options: dict) -> None:
    """The halves of a split are pieces of one value: together they cost the steeper, whatever is done to one of them.

    Small maps are where a bound on a torus is farthest from what zero padding really is, so weights are near their
    start.
    """
    model = small(depths=(1, 1, 2), noise=0.01, height=32, **options)
    proved = audit(features(model), (3, 32, 32)).upper.require_upper()
    assert proved <= 1.1 * model.lipschitz_estimate(200).item()


@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_blocks_that_are_isometries_cost_nothing(decoder: str) -> None:
    """Not the shuffles, the halves, the convolutions that merge patches, or putting all together."""
    model = small(decoder, noise=0.0)
    for name, parameter in model.named_parameters():
        if name.endswith(("scale", "mix.bias")):
            parameter.zero_()
    for conv in (model.stem, *model.decoder.children()):
        if isinstance(conv, nn.Conv2d):
            nn.init.orthogonal_(conv.weight.flatten(1))
    proof = audit(features(model), (3, 16, 32))
    assert proof.upper.value <= 1.0 + 1e-5
    assert proof.upper.value == pytest.approx(1.0, rel=1e-5) or decoder != "split"
    assert model.lipschitz_estimate(60).item() <= 1.0 + 1e-3
    if decoder == "mlp":
        assert proof.position is not None and proof.position.value < 0.95 * proof.upper.value


def test_mixers_are_where_they_are_named() -> None:
    model = small(depths=(1, 2, 2), mixers=("shift", "reduced", "window"), height=32)
    kinds = [[type(part) for part in stage] for stage in model.stages]
    assert kinds[0] == [LinearShiftBlock]
    assert kinds[1] == [ReducedAttentionBlock, LinearShiftBlock] * 2
    assert kinds[2] == [AttentionBlock, LinearShiftBlock] * 2
    reduced, window = model.stages[1][0], model.stages[2][0]
    assert reduced.in_shape == (24, 4, 4) and reduced.reduce.size == 2
    assert window.mix.window == (2, 2) and [block.mix.shift for block in model.stages[2][::2]] == [False, True]
    mixed = small(depths=(1, 1, 1), mixers="window", ffn="mix", ffn_ratio=3, height=32)
    assert [type(part) for part in mixed.stages[2]] == [AttentionBlock, LipschitzMixFFN]
    assert mixed.stages[2][1].hidden == 3 * 48
    merging = small("mlp", depths=(1, 1, 1))
    assert [type(stage[0]) for stage in merging.stages] == [LinearShiftBlock, Affine, Affine]


@pytest.mark.parametrize(("side", "window"), [((96, 128), (3, 4)), ((64, 64), (4, 4)), ((160, 96), (2, 3))])
def test_windows_divide_the_map(side: tuple[int, int], window: tuple[int, int]) -> None:
    model = small(depths=(0, 0, 1), mixers="window", height=side[0], img_size=side[1], noise=0.0)
    assert model.stages[2][0].mix.window == window


@torch.no_grad()
def test_the_shuffle_decoder_may_repeat_pixels() -> None:
    """With rows repeated s² times and divided by s, it enlarges by repetition, at the same norm."""
    decoder = ShuffleDecoder((4, 8, 16), 6, (4, 8))
    plain = MLPDecoder((4, 8, 16), 6, (4, 8))
    for i, (linear, once) in enumerate(zip(decoder.linears, plain.linears, strict=True)):
        s = 2**i
        linear.weight.copy_(once.weight.repeat_interleave(s * s, 0) / s)
        x = torch.randn(1, once.in_channels, 4 // s, 8 // s)
        expected = F.interpolate(once(x), scale_factor=s, mode="nearest") / s
        torch.testing.assert_close(decoder.enlarge(linear(x), s), expected, rtol=1e-5, atol=1e-6)
        norms = [torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() for conv in (linear, once)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("kind", [MLPDecoder, ShuffleDecoder])
@pytest.mark.parametrize("s", [2, 4])
def test_enlarging_costs_nothing(kind: type, s: int) -> None:
    """The norm of the dense matrix is at most 1; bilinear maps divided by less than s would exceed it."""
    decoder = kind((4, 8, 16), 2, (4, 8))

    class Enlarge(nn.Module):
        def forward(self, x):
            return decoder.enlarge(x, s)

    x = torch.randn(decoder.factor(s), 3, 4, dtype=torch.float64)
    norm = jacobian_norm(Enlarge(), x)
    assert (0.999 if kind is ShuffleDecoder else 0.9) < norm <= 1 + 1e-9


@torch.no_grad()
def test_decoders_fuse_all_stages() -> None:
    """Values by hand: projected, enlarged, averaged, fused."""
    for kind in (MLPDecoder, ShuffleDecoder):
        torch.manual_seed(0)
        decoder = kind((4, 8), 6, (2, 4)).double()
        maps = [torch.randn(2, 4, 2, 4, dtype=torch.float64), torch.randn(2, 8, 1, 2, dtype=torch.float64)]
        first = torch.einsum("oc,nchw->nohw", decoder.linears[0].weight[:, :, 0, 0], maps[0])
        second = torch.einsum("oc,nchw->nohw", decoder.linears[1].weight[:, :, 0, 0], maps[1])
        if kind is ShuffleDecoder:
            large = torch.empty(2, 6, 2, 4, dtype=torch.float64)
            for a in range(2):
                for b in range(2):
                    large[:, :, a::2, b::2] = second[:, 2 * a + b :: 4]
        else:
            large = F.interpolate(second, scale_factor=2, mode="bilinear") / 2
        fused = torch.einsum("oc,nchw->nohw", decoder.fuse.weight[:, :, 0, 0], torch.cat([first, large], 1) / 2**0.5)
        low, high = fused[:, :3], fused[:, 3:]
        expected = torch.cat([torch.maximum(low, high), torch.minimum(low, high)], 1)
        torch.testing.assert_close(decoder(maps), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(height=20), "multiples of 16"),
        (dict(embed_dim=18), "multiple of 4"),
        (dict(decoder="unet"), "one of split, mlp, pixelshuffle, not 'unet'"),
        (dict(decoder_depths=(1,)), "names 1 levels"),
        (dict(mixers="swin"), "mixers must be of shift, window, reduced, not 'swin'"),
        (dict(mixers=("shift", "window")), "names 2 stages, and depths 3"),
        (dict(ffn="gelu"), "linear or mix"),
        (dict(mixers="window", num_heads=5), "5 heads do not divide"),
        (dict(mixers="swin", decoder="unet"), "decoder must.*mixers must"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, match: str) -> None:
    arguments = dict(num_classes=3, img_size=32, in_chans=3, embed_dim=12, depths=(1, 1, 1))
    with pytest.raises(InputError, match=match):
        lipsegformer(**{**arguments, **change})


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("options", ATTENDING, ids=["window", "mixed"])
def test_registered_models_take_mixers_and_decoders_and_come_back_from_files(
    decoder: str, options: dict, tmp_path: Path
) -> None:
    """As a recipe's JSON has them: tuples become lists."""
    sizes = dict(num_classes=3, img_size=32, in_chans=3)
    kwargs = dict(height=16, embed_dim=12, depths=[1, 1, 1], num_heads=2, decoder=decoder, decoder_dim=12, **options)
    torch.manual_seed(0)
    model = create_model("lipsegformer_tiny", **sizes, **kwargs).eval()
    save_model(model, tmp_path / "model", dict(model="lipsegformer_tiny", kwargs=kwargs, data="camvid", **sizes))
    x = torch.rand(2, 3, 16, 32)
    with torch.no_grad():
        expected = model(x)
        assert expected.shape == (2, 3, 4, 8)
        torch.testing.assert_close(load_model(tmp_path)[0](x), expected, rtol=0, atol=0)
        torch.testing.assert_close(export(model)(x.double()).float(), expected, rtol=1e-4, atol=1e-5)
    with torch.device("meta"):
        create_model("lipsegformer_tiny", **sizes, **kwargs)
