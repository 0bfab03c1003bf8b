"""Lip-SegFormer: estimate, proof and attack agree, and the decoders cost what they are built for."""

from __future__ import annotations

import pytest
import torch

from lipcert.attacks.ascent import lipschitz_lower
from lipcert.bounds import audit
from lipcert.errors import InputError
from lipcert.export import export
from lipcert.models.lipsegformer import LipSegFormer, lipsegformer


def small(decoder: str, depths=(2, 1, 1), **arguments) -> LipSegFormer:
    torch.manual_seed(0)
    model = lipsegformer(
        num_classes=3, img_size=32, height=16, in_chans=3, embed_dim=12, depths=depths, decoder=decoder, decoder_dim=12,
        **arguments,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("decoder", ["split", "mlp"])
def test_estimate_proof_and_attack_agree(decoder: str) -> None:
    model = small(decoder)
    estimate = model.lipschitz_estimate(300).item()
    plain = export(model)
    plain.head = torch.nn.Identity()  # the estimate speaks of the features
    proof = audit(plain, (3, 16, 32))
    assert 0.8 * estimate <= proof.upper.require_upper() <= 1.3 * estimate
    assert proof.position is not None and proof.position.order <= proof.upper.order
    assert lipschitz_lower(plain, (3, 16, 32), steps=10).value <= proof.upper.require_upper()


def test_disjoint_halves_cost_the_larger_of_the_two() -> None:
    """With blocks that are isometries, nothing grows: not by the shuffles, the halves or their concatenation."""
    model = small("split", scale=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        torch.nn.init.orthogonal_(model.stem.weight.view(12, -1))
    plain = export(model)
    plain.head = torch.nn.Identity()
    assert audit(plain, (3, 16, 32)).upper.value == pytest.approx(1.0, rel=1e-6)
    assert model.lipschitz_estimate(300).item() == pytest.approx(1.0, rel=1e-3)


def test_enlarged_maps_cost_no_more_than_small_ones() -> None:
    """The mean over n stages of orthogonal projections, each enlarged by s and divided by s: at most 1."""
    model = small("mlp", depths=(0, 0, 0))
    with torch.no_grad():
        for conv in (*model.decoder.linears, model.decoder.fuse, model.stem):
            torch.nn.init.orthogonal_(conv.weight.flatten(1))
    plain = export(model)
    plain.head = torch.nn.Identity()
    proof = audit(plain, (3, 16, 32))
    assert 0.9 < proof.upper.value <= 1.0 + 1e-6
    assert proof.position is not None and proof.position.value < 0.95 * proof.upper.value


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(height=20), "multiples of 16"),
        (dict(embed_dim=18), "multiple of 4"),
        (dict(decoder="unet"), "split or mlp"),
        (dict(decoder_depths=(1,)), "names 1 levels"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, match: str) -> None:
    arguments = dict(num_classes=3, img_size=32, in_chans=3, embed_dim=12, depths=(1, 1, 1))
    with pytest.raises(InputError, match=match):
        lipsegformer(**{**arguments, **change})
