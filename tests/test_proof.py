"""The proof as data: it states what the audit found, a little enlarged, and the program computes the same logits."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import load
from torch import nn

from lipcert.bounds import audit
from lipcert.errors import InputError
from lipcert.export import export
from lipcert.layers import MaxMin
from lipcert.models.shiftvit import lipshift
from lipcert.proof import SLACK, Proof
from lipcert.registry import create_model


def written(model: nn.Module, shape: tuple[int, ...]):
    found = audit(export(model), shape)
    proof = Proof.of(found)
    return found, proof, json.loads(json.dumps(proof.to_json()))


def small() -> nn.Module:
    torch.manual_seed(0)
    model = lipshift(num_classes=3, img_size=8, in_chans=1, embed_dim=12, depths=(1, 1), patch_size=2, neck=16)
    return model.eval()


def test_steps_compose_to_the_bound_and_are_just_above_the_audit() -> None:
    found, proof, data = written(small(), (1, 8, 8))
    known = {data["program"]["input"]: 1.0}
    for step in data["proof"]["steps"]:
        parts = [f * known[s] for f, s in zip(step["factors"], step["sources"], strict=True)]
        total = math.hypot(*parts) if step["joint"] else math.fsum(parts)
        assert total <= step["bound"] <= total * (1 + 1e-14)
        known[step["value"]] = step["bound"]
    assert known[data["program"]["output"]] == data["proof"]["upper"] == proof.upper
    changed = sum(len(step["factors"]) for step in data["proof"]["steps"])
    assert found.upper.value < proof.upper <= found.upper.value * SLACK**changed * (1 + 1e-12)
    ratio = proof.pairwise / found.pairwise().fill_diagonal_(1.0)
    assert bool((ratio[~torch.eye(3, dtype=torch.bool)] > 1.0).all()) and float(ratio.max()) < 1 + 1e-4
    assert set(data["proof"]["heads"]) <= known.keys()


def test_tensors_are_in_the_file_and_arguments_name_them() -> None:
    model = small()
    _, proof, data = written(model, (1, 8, 8))
    tensors = load(proof.file)
    assert hashlib.sha256(proof.file).hexdigest() == data["program"]["sha256"]
    named = {
        argument["tensor"]
        for node in data["program"]["nodes"]
        for argument in node["arguments"].values()
        if isinstance(argument, dict) and "tensor" in argument
    }
    assert named == tensors.keys() and all(tensor.dtype == torch.float64 for tensor in tensors.values())
    weights = dict(export(model).named_parameters())
    assert torch.equal(tensors["head.weight"], weights["head.weight"])
    earlier: set[str] = set()
    for node in data["program"]["nodes"]:  # every argument comes before
        for argument in node["arguments"].values():
            for item in argument if isinstance(argument, list) else [argument]:
                if isinstance(item, dict) and "value" in item:
                    assert item["value"] in earlier
        earlier.add(node["name"])


def test_two_arguments_have_two_sources_and_what_is_exact_is_not_enlarged() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act = nn.Linear(4, 4), MaxMin()

        def forward(self, x):
            x = x.flatten(1)
            y = self.a(x).reshape(-1, 4, 1, 1)
            return self.act(y).flatten(1) + x.tanh()

    torch.manual_seed(0)
    _, _, data = written(Sum(), (1, 2, 2))
    steps = {step["value"]: step for step in data["proof"]["steps"]}
    last = steps[data["program"]["output"]]
    assert len(last["sources"]) == 2 and last["factors"] == [1.0, 1.0] and not last["joint"]


def test_without_a_finite_bound_there_is_no_proof() -> None:
    class Root(nn.Module):
        def forward(self, x):
            return x.flatten(1).sqrt()

    with pytest.raises(InputError, match="no finite Lipschitz bound.*slope"):
        Proof.of(audit(Root(), (1, 2, 2)))

    class Huge(nn.Module):
        def forward(self, x):
            x = x.flatten(1)
            for _ in range(4):
                x = (x * 1e100).tanh()
            return x

    with pytest.raises(InputError, match="above the largest float"):
        Proof.of(audit(Huge(), (1, 2, 2)))


def test_attention_in_a_part_of_the_channels_is_proved_inside_its_branch() -> None:
    """Of Lip-SegFormer's halves, one waits and one attends; both come together with the constant of the steeper."""
    torch.manual_seed(0)
    model = create_model(
        "lipsegformer_tiny", num_classes=3, img_size=32, height=16, in_chans=3, embed_dim=12, depths=(1, 1),
        mixers=("shift", "window"), ffn="mix", num_heads=2,
    ).eval()  # fmt: skip
    found, proof, data = written(model, (3, 16, 32))
    (joined,) = [step for step in data["proof"]["steps"] if "branches" in step]
    assert joined["rule"] == "cat" and len(joined["sources"]) == len(joined["factors"]) == 1
    waits, attends = joined["branches"]
    assert [step["rule"] for step in waits["steps"]] in ([], ["affine"])
    assert "attention" in [step["rule"] for step in attends["steps"]]
    assert attends["steps"][-1]["bound"] <= joined["factors"][0] <= attends["steps"][-1]["bound"] * (1 + 1e-5)
    assert proof.upper <= found.upper.value * (1 + 1e-5)
