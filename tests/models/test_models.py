"""Every registered model: builds, exports, is bounded, saves and loads; and what the LipShiFT variants promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lipcert.attacks.ascent import lipschitz_lower
from lipcert.bounds import audit
from lipcert.checkpoint import load_model, save_model
from lipcert.errors import InputError
from lipcert.export import export
from lipcert.models.shiftvit import LipShiFTPaper, lipshift, lipshift_published
from lipcert.registry import create_model, models

_SWIN = dict(embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=2, patch_size=2)
_CSWIN = dict(embed_dim=8, depths=[1, 1], num_heads=[2, 2], splits=[1, 1], patch_size=2)
SMALL = {  # small enough for a test, same code
    "shiftvit": dict(embed_dim=16, depths=[1, 1], patch_size=2),
    "lipshift": dict(embed_dim=12, depths=[1, 1], neck=16),
    "lipshift_paper": dict(embed_dim=12, depths=[1, 1]),
    "lipsegformer": dict(embed_dim=12, depths=[1, 1], decoder_depths=[1]),
    "swin": _SWIN,
    "lipsformer_swin": _SWIN,
    "cswin": _CSWIN,
    "lipsformer_cswin": _CSWIN,
    "1lip": dict(embed_dim=12, depths=[1, 1], attention=[False, True], num_heads=2, neck=16),
    "segformer": dict(embed_dims=[8, 16], depths=[1, 1], num_heads=[1, 2], reductions=[2, 1], mlp_ratios=[2, 2]),
}


def _arguments(name: str) -> dict:
    """Return the arguments of the longest entry of SMALL that the name starts with; "1lip" is what a name ends with."""
    if name.endswith("_1lip"):
        return SMALL["1lip"]
    return SMALL[max((family for family in SMALL if name.startswith(family)), key=len)]


ARGUMENTS = {name: _arguments(name) for name in models.list()}


@pytest.mark.parametrize("name", models.list())
def test_model_saves_loads_and_exports_to_the_same_function(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    recipe = dict(model=name, kwargs=ARGUMENTS[name], num_classes=3, img_size=8, in_chans=1, data="digits")
    model = create_model(name, num_classes=3, img_size=8, in_chans=1, **ARGUMENTS[name]).eval()
    save_model(model, tmp_path / "model", recipe)
    loaded, config = load_model(tmp_path)
    x = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        assert model(x).shape == ((5, 3) if models.task(name) == "classification" else (5, 3, 2, 2))
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
        torch.testing.assert_close(export(model)(x.double()).float(), model(x), rtol=1e-4, atol=1e-5)
    assert {**recipe, "lipcert": config["lipcert"]} == config


@pytest.mark.parametrize("residual", ["linear", "published"])
@pytest.mark.parametrize("shift", ["circular", "branch", "zero"])
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("neck", [16, 0])
def test_estimate_proof_and_attack_agree(residual: str, shift: str, circular: bool, neck: int) -> None:
    """lower <= proved <= 1.25 estimate, wherever shift, shortcut and convolution make one operator."""
    torch.manual_seed(0)
    model = lipshift(
        num_classes=3,
        img_size=8,
        in_chans=1,
        embed_dim=12,
        depths=(2, 1),
        patch_size=1,
        residual=residual,
        shift=shift,
        circular=circular,
        neck=neck,
        pool="avg",
        neck_depth=1 if neck else 0,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        estimate = model.lipschitz_estimate(300).item()
    plain = export(model)
    proof = audit(plain, (1, 8, 8))
    assert proof.head is not None
    proved = proof.head.penultimate.require_upper()
    one_operator = residual == "published" or shift != "branch" or circular
    # The estimate multiplies the parts; the proof may fuse two of them and then be smaller.
    assert proved <= estimate * (1.25 if one_operator else 4)
    assert lipschitz_lower(plain, (1, 8, 8), steps=10).value <= proof.upper.require_upper()


def test_paper_model_has_the_published_size_and_grids() -> None:
    with torch.device("meta"):
        model = lipshift_published(num_classes=100, img_size=32, in_chans=3)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == pytest.approx(49.29e6, rel=2e-3)
    grids = [part.in_shape[1] for part in model.parts if hasattr(part, "in_shape")]
    assert sorted(set(grids), reverse=True) == [32, 17, 9, 5, 3]
    with torch.device("meta"):
        plain = lipshift_published(num_classes=100, img_size=32, in_chans=3, padding_quirk=False)
    assert sorted({part.in_shape[1] for part in plain.parts if hasattr(part, "in_shape")}) == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("name, millions", [("shiftvit_tiny", 29), ("shiftvit_small", 50)])
def test_shiftvit_has_the_published_size(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=1000, img_size=224)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)


def _linear_paper_model() -> LipShiFTPaper:
    """The published network with its branches switched off: its product of norms is then nearly attained."""
    torch.manual_seed(0)
    model = lipshift_published(num_classes=3, img_size=16, in_chans=3, embed_dim=12, depths=[1, 1], padding_quirk=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".scale"):
                parameter.zero_()
    return model.eval()


def test_a_pair_of_inputs_violates_the_published_formula_and_not_our_bound() -> None:
    model = _linear_paper_model()
    claimed = model.published_bound()["value"]
    plain = export(model)
    plain.head = nn.Identity()  # the formula speaks of the features
    proved = audit(plain, (3, 16, 16)).upper.require_upper()
    found = lipschitz_lower(plain, (3, 16, 16), steps=50)
    steepness = (plain(found.x[None]) - plain(found.y[None])).norm() / (found.x - found.y).norm()
    assert claimed < found.value <= steepness.item() <= proved


def test_published_formula_is_ours_times_factors_that_inference_does_not_have() -> None:
    torch.manual_seed(0)
    arguments = dict(num_classes=3, img_size=16, in_chans=1, embed_dim=12, depths=[1, 1])
    with_dropout = lipshift_published(**arguments)
    without = lipshift_published(**arguments, dropout=0.0, drop_path=0.0)
    without.load_state_dict(with_dropout.state_dict())
    assert with_dropout.published_bound()["value"] < 0.6 * without.published_bound()["value"]


@pytest.mark.parametrize("size", [8, 28, 32, 64, 224])
def test_lipshift_tiny_takes_inputs_from_8_to_224_pixels(size: int) -> None:
    with torch.device("meta"):
        model = create_model("lipshift_tiny", img_size=size)
        assert model(torch.empty(1, 3, size, size)).shape == (1, 10)


@pytest.mark.parametrize(
    "arguments",
    [dict(shift="left"), dict(residual="none"), dict(neck=0, pool="max"), dict(patch_size=3), dict(kernel_size=2)],
)
def test_wrong_arguments_are_refused(arguments: dict) -> None:
    with pytest.raises(InputError):
        create_model("lipshift_tiny", img_size=32, **arguments)


def test_shiftvit_has_no_estimate_and_says_which_loss_to_use() -> None:
    model = create_model("shiftvit_tiny", img_size=8, in_chans=1, **SMALL["shiftvit"])
    with pytest.raises(InputError, match="cross_entropy"):
        model.lipschitz_estimate()
