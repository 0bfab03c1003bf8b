"""`lipcert bound --claimed`: proved, refuted with a pair that two forward passes recheck, or open."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli.test_cli import run
from safetensors.torch import load_file
from torch import nn

from lipcert.pair import quotient, read_pair

FACTORIES = """
import torch
from torch import nn
from lipcert.export import export
from lipcert.layers import MaxMin
from lipcert.models.shiftvit import lipshift_published

def published():
    '''LipShiFT as published, its branches switched off: the product of its norms is then nearly attained.'''
    torch.manual_seed(0)
    model = lipshift_published(num_classes=3, img_size=16, in_chans=3, embed_dim=12, depths=[1, 1], padding_quirk=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".scale"):
                parameter.zero_()
    model.head = nn.Identity()  # the formula speaks of the features
    return model

def spectral():
    '''torch's spectral_norm normalises the matrix of a kernel, not the convolution; a low-pass kernel shows it.'''
    layer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3, padding=1, bias=False))
    with torch.no_grad():
        layer.parametrizations.weight.original.fill_(1.0)
        layer.train()
        for _ in range(20):
            layer.weight
    return nn.Sequential(layer)

def orthogonal():
    first, second = nn.Linear(48, 48), nn.Linear(48, 10)
    parametrize = nn.utils.parametrizations.orthogonal
    return nn.Sequential(nn.Flatten(), parametrize(first), MaxMin(), parametrize(second))

def rectified():
    first, second = nn.Linear(48, 48), nn.Linear(48, 10)
    parametrize = nn.utils.parametrizations.orthogonal
    return nn.Sequential(nn.Flatten(), parametrize(first), nn.ReLU(), parametrize(second))

class Root(nn.Module):
    def forward(self, x): return x.flatten(1).sqrt()

def root(): return Root()
"""


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    file = tmp_path / "factories.py"
    file.write_text(FACTORIES)
    return file


def answer(out: str) -> str:
    (line,) = [line for line in out.splitlines() if line.startswith("claim ")]
    return line.split(": ")[1].split(" ")[0]


def rebuild(factories: Path, name: str) -> nn.Module:
    space: dict = {}
    torch.manual_seed(0)
    exec(compile(FACTORIES, str(factories), "exec"), space)
    return space[name]().double().eval()


def test_the_published_formula_of_lipshift_is_refuted_by_a_saved_pair(capsys, factories, tmp_path) -> None:
    network = rebuild(factories, "published")
    claimed = network.published_bound()["value"]
    args = ("--input-shape", "3,16,16", "--claimed", repr(claimed), "--lower-steps", "50")
    code, out, err = run(capsys, "bound", f"{factories}:published", *args, "-o", tmp_path / "p.safetensors")
    assert code == 3 and answer(out) == "refuted"
    assert f"the claimed constant {claimed!r} is refuted: the pair of inputs in p.safetensors attains" in err
    tensors, facts = read_pair(tmp_path / "p.safetensors")
    attained = quotient(network, tensors["x"], tensors["y"])
    assert claimed < float(facts["quotient"]) <= attained * (1 + 1e-12)
    assert facts["answer"] == "refuted" and facts["rounding"] == "proved"


def test_spectral_norm_of_torch_is_refuted_on_a_convolution(capsys, factories, tmp_path) -> None:
    file = tmp_path / "bound.json"
    code, out, err = run(
        capsys, "bound", f"{factories}:spectral", "--input-shape", "3,8,8", "--claimed", "1", "--json", file
    )
    assert code == 3 and answer(out) == "refuted"
    record = json.loads(file.read_text())
    assert record["claim"] == {"claimed": 1.0, "answer": "refuted"} and record["lower_proved"] is True
    assert 2.5 < record["lower"] <= record["upper"] < 3.0  # nine equal taps: the constant image grows by almost 3
    pair = load_file(tmp_path / record["lower_witness"]["file"])
    network = rebuild(factories, "spectral")
    with torch.no_grad():
        torch.testing.assert_close(network(pair["x"][None])[0], pair["f_x"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(network(pair["y"][None])[0], pair["f_y"], rtol=1e-12, atol=1e-12)
    assert ((pair["f_x"] - pair["f_y"]).norm() / (pair["x"] - pair["y"]).norm()).item() > 2.5


@pytest.mark.parametrize("name", ["orthogonal", "rectified"])
def test_orthogonal_networks_are_proved_to_a_millionth_and_not_to_1(capsys, factories, name) -> None:
    """Weights in float32 are orthogonal to about 1e-7 only, so that 1 itself may be false, and is never proved."""
    args = ("bound", f"{factories}:{name}", "--input-shape", "3,4,4")
    code, out, _ = run(capsys, *args, "--claimed", "1.000001")
    assert code == 0 and answer(out) == "proved"
    code, out, _ = run(capsys, *args, "--claimed", "1")
    assert (code, answer(out)) in ((0, "open"), (3, "refuted"))


def test_what_lies_between_both_bounds_is_open(capsys, factories, tmp_path) -> None:
    args = ("--input-shape", "3,4,4", "--claimed", "0.9", "--lower-steps", "0", "--json", tmp_path / "b.json")
    code, out, _ = run(capsys, "bound", f"{factories}:rectified", *args)
    assert code == 0 and answer(out) == "open" and "at least what was not searched for, at most 1.0000" in out
    assert not (tmp_path / "b_pair.safetensors").exists()


def test_without_a_finite_bound_a_claim_can_still_be_refuted(capsys, factories, tmp_path) -> None:
    args = ("--input-shape", "1,2,2", "-o", tmp_path / "pair.safetensors")
    code, out, err = run(capsys, "bound", f"{factories}:root", *args, "--claimed", "1")
    assert code == 3 and answer(out) == "refuted" and "which is not proved" in err
    assert "no bound: " in out and "sqrt" in out
    code, out, _ = run(capsys, "bound", f"{factories}:root", *args, "--claimed", "1e9")
    assert code == 0 and answer(out) == "open"


def test_the_search_may_begin_at_images(capsys, run_folder) -> None:
    code, out, err = run(capsys, "bound", run_folder, "--lower-steps", "2", "--data", "digits")
    assert code == 0 and "lower bound, attained by two inputs" in out
    tensors, facts = read_pair(run_folder / "bound_pair.safetensors")
    assert f"wrote {run_folder / 'bound_pair.safetensors'}" in err
    record = json.loads((run_folder / "bound.json").read_text())
    assert facts["weights_sha256"] == record["weights_sha256"] and float(facts["quotient"]) == record["lower"]
    assert tensors["x"].shape == (1, 8, 8) and tensors["f_x"].shape == (10,)


def test_the_page_says_what_the_json_says(capsys, factories, tmp_path) -> None:
    args = ("--input-shape", "3,8,8", "--claimed", "1", "--html", tmp_path / "page.html")
    code, _, err = run(capsys, "bound", f"{factories}:spectral", *args)
    page = (tmp_path / "page.html").read_text()
    assert code == 3 and f"wrote {tmp_path / 'page.html'}" in err
    assert "The claimed constant 1.0 is refuted" in page and "page_pair.safetensors" in page
    assert (tmp_path / "page_pair.safetensors").is_file()
