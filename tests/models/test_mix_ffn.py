"""Lipschitz Mix-FFN: values by dense matrices, and a constant that is proved, estimated and nearly attained."""

from __future__ import annotations

import pytest
import torch
from contract import jacobian_norm, layer_contract
from hypothesis import given, settings
from hypothesis import strategies as st

from lipcert.attacks.ascent import lipschitz_lower
from lipcert.bounds import audit
from lipcert.errors import InputError
from lipcert.export import export
from lipcert.layers import PowerIteration
from lipcert.models.mix_ffn import LipschitzMixFFN

test_contract = layer_contract(lambda: LipschitzMixFFN((4, 3, 5), ratio=2, start=0.7), (4, 3, 5))


def block(shape=(4, 3, 5), noise=0.2, **options) -> LipschitzMixFFN:
    torch.manual_seed(0)
    made = LipschitzMixFFN(shape, **{**dict(ratio=2, start=0.7), **options})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += noise * torch.randn_like(parameter)
    return made.eval()


@torch.no_grad()
def test_values_are_those_of_the_formula() -> None:
    """Position by position: expand, weigh the 3 x 3 neighbours that exist, sort pairs, gather, mean with the input."""
    made = block().double()
    expand, depthwise = made.spread
    x = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wide = torch.einsum("oc,chw->ohw", expand.weight[:, :, 0, 0], x) + expand.bias[:, None, None]
    expected = torch.empty_like(x)
    for i in range(3):
        for j in range(5):
            mixed = depthwise.bias.clone()
            for a in (-1, 0, 1):
                for b in (-1, 0, 1):
                    if 0 <= i + a < 3 and 0 <= j + b < 5:
                        mixed += depthwise.weight[:, 0, 1 + a, 1 + b] * wide[:, i + a, j + b]
            first, second = mixed[:4], mixed[4:]  # MaxMin pairs channels (i, i + 4)
            paired = torch.cat([torch.maximum(first, second), torch.minimum(first, second)])
            y = made.gather.weight[:, :, 0, 0] @ paired + made.gather.bias
            expected[:, i, j] = (1 - made.share) * x[:, i, j] + made.share * y
    torch.testing.assert_close(made(x[None])[0], expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=8, deadline=None)
@given(
    dim=st.sampled_from([2, 4, 6]), ratio=st.integers(1, 4), h=st.integers(1, 4), w=st.integers(2, 5),
    noise=st.sampled_from([0.0, 0.05, 0.5]),
)  # fmt: skip
def test_estimate_proof_and_attack_agree(dim: int, ratio: int, h: int, w: int, noise: float) -> None:
    shape = (dim, h, w)
    made = block(shape, noise, ratio=ratio)
    proved = audit(export(made), shape).upper.require_upper()
    with torch.no_grad():
        estimate = made.lipschitz(PowerIteration(made.segments())(100)).item()
    assert 0.8 * estimate <= proved <= 1.25 * estimate
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert jacobian_norm(export(made), x) <= proved * (1 + 1e-9)
    assert lipschitz_lower(export(made), shape, steps=5).value <= proved


def test_a_mean_with_a_nonexpansive_branch_is_nonexpansive() -> None:
    made = block(noise=0.0)
    with torch.no_grad():
        made.spread[1].weight.zero_()
        made.spread[1].weight[:, 0, 1, 1] = 1.0
    assert audit(export(made), (4, 3, 5)).upper.require_upper() == pytest.approx(1.0, rel=1e-5)


def test_pointwise_and_depthwise_are_one_operator() -> None:
    """Channels that one enlarges and the other shrinks cost nothing; apart they would cost 10 · 1."""
    made = block(noise=0.0, ratio=1)
    expand, depthwise = made.spread
    with torch.no_grad():
        expand.weight.copy_(torch.diag(torch.tensor([10.0, 1, 1, 1]))[:, :, None, None])
        depthwise.weight.zero_()
        depthwise.weight[:, 0, 1, 1] = torch.tensor([0.1, 1, 1, 1])
        estimate = made.lipschitz(PowerIteration(made.segments())(100)).item()
    assert estimate == pytest.approx(1.0, rel=1e-5)
    assert audit(export(made), (4, 3, 5)).upper.require_upper() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "change", "match"),
    [((3, 2, 2), dict(ratio=1), "even"), ((4, 2, 2), dict(ratio=0), "even"), ((4, 2, 2), dict(start=0.0), "start in")],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, int, int], change: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        LipschitzMixFFN(shape, **change)
