"""Spatially reduced cosine attention: values by hand, the constant that it is built for, and what can break it."""

from __future__ import annotations

import math

import pytest
import torch
from contract import jacobian_norm, layer_contract
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipcert.attacks.ascent import lipschitz_lower
from lipcert.bounds import audit
from lipcert.errors import InputError
from lipcert.export import export
from lipcert.layers import PowerIteration
from lipcert.models.reduced_attention import OrthogonalPatches, ReducedAttentionBlock

test_contract = layer_contract(lambda: ReducedAttentionBlock((8, 4, 4), heads=2, reduction=2, start=0.9), (8, 4, 4))
test_patches_contract = layer_contract(lambda: OrthogonalPatches(3, 2), (3, 4, 6))


def block(shape=(8, 4, 6), noise=0.3, **options) -> ReducedAttentionBlock:
    torch.manual_seed(0)
    made = ReducedAttentionBlock(shape, **{**dict(heads=2, reduction=2, start=0.9), **options})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += noise * torch.randn_like(parameter)
    return made.eval()


def by_hand(made: ReducedAttentionBlock, x: torch.Tensor) -> torch.Tensor:
    """Write the block out position by position, head by head: (dim, h, w) -> the same."""
    dim, height, width = x.shape
    places = [(i, j) for i in range(height) for j in range(width)]
    tokens = torch.stack([x[:, i, j] for i, j in places])
    few = tokens
    if made.reduce is not None:
        r, kernel = made.reduce.size, made.reduce.weight
        corners = [(i, j) for i in range(0, height, r) for j in range(0, width, r)]
        few = torch.stack([
            torch.stack([(kernel[c] * x[:, i : i + r, j : j + r]).sum() for c in range(dim)]) + made.reduce.bias
            for i, j in corners
        ])  # fmt: skip
    q = tokens @ made.q.weight.T + made.q.bias
    k, v = (few @ weight.T + bias for weight, bias in zip(made.kv.weight.chunk(2), made.kv.bias.chunk(2), strict=True))

    def unit(row: torch.Tensor) -> torch.Tensor:
        return row / math.sqrt(float(row @ row) + made.eps)

    out = torch.zeros_like(tokens)
    size = dim // made.heads
    for head in range(made.heads):
        own = slice(head * size, (head + 1) * size)
        for i in range(len(tokens)):
            scores = torch.stack([made.tau * unit(q[i, own]) @ unit(row[own]) for row in k])
            weights = scores.exp() / scores.exp().sum()
            out[i, own] = made.nu * sum(w * unit(row[own]) for w, row in zip(weights, v, strict=True))
    out = out @ made.proj.weight.T + made.proj.bias
    share = made.share
    result = (1 - share) * tokens + share * out
    return torch.stack([result[n] for n in range(len(places))], 1).view(dim, height, width)


@pytest.mark.parametrize("options", [dict(), dict(reduction=1), dict(tau=3.0, eps=0.2, heads=4), dict(heads=1)])
@torch.no_grad()
def test_values_are_those_of_the_formula(options: dict) -> None:
    made = block(**options).double()
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([by_hand(made, image) for image in x])
    torch.testing.assert_close(made(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(export(made)(x), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=8, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 4]), reduction=st.sampled_from([1, 2]), rows=st.integers(1, 3), tau=st.floats(0.2, 4),
    eps=st.floats(0.1, 2), noise=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
)  # fmt: skip
def test_estimate_proof_and_attack_agree(
    heads: int, reduction: int, rows: int, tau: float, eps: float, noise: float
) -> None:
    """Whatever training does to the weights, the block has a constant of at most 1; nothing attains more than is
    proved."""
    shape = (8, 2 * rows, 4)
    made = block(shape, noise, heads=heads, reduction=reduction, tau=tau, eps=eps)
    proved = audit(export(made), shape).upper.require_upper()
    with torch.no_grad():
        estimate = made.lipschitz(PowerIteration(made.segments())(60)).item()
    assert proved <= 1.01
    # the proof may fuse a reduction and the projection behind it, and is then smaller
    assert 0.8 * proved <= estimate <= 1.02
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for scale in (0.0, 1.0):
        assert jacobian_norm(export(made), scale * x) <= proved * (1 + 1e-9)
    assert lipschitz_lower(export(made), shape, steps=5).value <= proved


def test_with_one_key_the_constant_is_attained() -> None:
    """M = 1: softmax weighs nothing, every position gets the same value, √N times as steep as one; at 0 that is it."""
    made = block((4, 2, 2), noise=0.0, heads=1, reduction=2)
    plain = nn.Sequential(_Branch(made))
    assert made.nu == pytest.approx(0.5)
    steepest = jacobian_norm(export(plain), torch.zeros(4, 2, 2, dtype=torch.float64))
    assert steepest == pytest.approx(1.0, rel=1e-5)


def test_fewer_keys_cost_more() -> None:
    """Column sums of the softmax are of order N/M: ν falls with M, and for M = N it is that of plain attention."""
    from lipcert.models.lipsformer_certified import unit_nu

    nus = [ReducedAttentionBlock((4, 8, 8), heads=1, reduction=r).nu for r in (1, 2, 4, 8)]
    assert nus[0] == pytest.approx(unit_nu(64, 1.0, 1.0))
    assert nus[0] > nus[1] > nus[2]
    assert nus[3] == pytest.approx(1 / 8)


@pytest.mark.parametrize(("dim", "size"), [(2, 2), (3, 3), (8, 1), (5, 4)])
def test_patches_have_norm_one_at_the_start_and_never_more(dim: int, size: int) -> None:
    torch.manual_seed(0)
    layer = OrthogonalPatches(dim, size)
    for noise, least in ((0.0, 1 - 1e-5), (3.0, 0.0)):
        with torch.no_grad():
            layer.transposed.raw += noise * torch.randn_like(layer.transposed.raw)
            steepest = jacobian_norm(export(layer), torch.zeros(dim, 2 * size, size, dtype=torch.float64))
        assert least <= steepest <= 1 + 1e-5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(reduction=4), "patches of 4 do not divide a map of 4x6"),
        (dict(reduction=0), "patches of 0"),
        (dict(heads=3), "3 heads do not divide 8"),
        (dict(start=1.0), "start in"),
        (dict(tau=0.0), "must be positive"),
        (dict(eps=-1.0), "must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        ReducedAttentionBlock((8, 4, 6), **{**dict(heads=2, reduction=2), **change})


class _Branch(nn.Module):
    """The attention of a block without its shortcut."""

    def __init__(self, made: ReducedAttentionBlock) -> None:
        super().__init__()
        self.block = made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = self.block.share
        return (self.block(x) - (1 - share) * x) / share
