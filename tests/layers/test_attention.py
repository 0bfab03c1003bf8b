"""Attention and windows: the contract, the paper's formulas written out, bounds against the estimate and Jacobians."""

from __future__ import annotations

import math

import pytest
import torch
from contract import jacobian_norm, layer_contract
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lipcert.bounds import audit
from lipcert.export import export
from lipcert.layers import AOLLinear, CenterNorm, DotProductAttention, ScaledCosineAttention, WindowMix
from lipcert.layers.windows import merge, partition, relative_index, shift_mask


def cosine(**options) -> ScaledCosineAttention:
    return ScaledCosineAttention(4, 2, **{"tau": 2.0, "nu": 0.5, **options})


test_tokens = layer_contract(cosine, (5, 4))
test_small_eps = layer_contract(lambda: cosine(eps=0.01), (5, 4))
test_one_token = layer_contract(cosine, (1, 4))
test_clamped = layer_contract(lambda: cosine(eps=0.5, clamp=True), (5, 4))
test_biases_of_positions = layer_contract(lambda: cosine(window=(2, 3)), (6, 4))
test_windows = layer_contract(lambda: WindowMix(cosine(window=(2, 2)), (2, 2)), (4, 4, 4))
test_shifted = layer_contract(lambda: WindowMix(cosine(window=(2, 2)), (2, 2), shift=True), (4, 4, 4))
test_padded = layer_contract(lambda: WindowMix(cosine(), (2, 2), shift=True), (3, 3, 4))
test_orthogonal = layer_contract(lambda: cosine(orthogonal=True), (5, 4))
test_aol = layer_contract(lambda: AOLLinear(4, 6), (4,))
test_aol_blocks = layer_contract(lambda: AOLLinear(4, 12, blocks=3, bias=False), (3, 4))
test_center_last = layer_contract(lambda: CenterNorm(4, axis=-1), (3, 3, 4))


def by_hand(layer: DotProductAttention, x: Tensor, weigh, tau: float, nu: float) -> Tensor:
    """Compute attention row by row: `weigh` says what happens to queries, keys and values, one vector at a time."""
    dim, width = layer.dim, layer.dim // layer.heads
    out = torch.zeros_like(x)
    for n in range(x.shape[0]):
        projected = x[n] @ layer.qkv.weight.T + (0 if layer.qkv.bias is None else layer.qkv.bias)
        for head in range(layer.heads):
            q, k, v = (projected[:, i * dim + head * width : i * dim + (head + 1) * width] for i in range(3))
            for i in range(x.shape[1]):
                scores = []
                for j in range(x.shape[1]):
                    score = tau * torch.dot(weigh(q[i], "q"), weigh(k[j], "k"))
                    if layer.table is not None:
                        (a, b), rows = layer.window, (i // layer.window[1] - j // layer.window[1])
                        columns = i % b - j % b
                        score = score + layer.table[(rows + a - 1) * (2 * b - 1) + columns + b - 1, head]
                    scores.append(score)
                exponentials = torch.exp(torch.stack(scores) - max(scores))
                mean = sum(e * weigh(v[j], "v") for j, e in enumerate(exponentials)) / exponentials.sum()
                out[n, i, head * width : (head + 1) * width] = nu * mean
    return out @ layer.proj.weight.T + layer.proj.bias


FORMS = {  # what a row is divided by
    "paper": (dict(tau=3.0, nu=0.7, eps=0.3), lambda x, _: x / math.sqrt(float(x @ x) + 0.3), 3.0, 0.7),
    "released": (
        dict(tau=10.0, eps=1e-12, clamp=True, values=False),
        lambda x, role: x if role == "v" else x / float(x.norm()), 10.0, 1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("window", [None, (2, 3)])
@pytest.mark.parametrize("form", [*FORMS, "dot"])
@torch.no_grad()
def test_outputs_are_those_of_the_formula(form: str, window, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    if form == "dot":
        layer, arguments = DotProductAttention(8, 2, window=window), (lambda x, _: x, 0.5, 1.0)
    else:
        options, *arguments = FORMS[form]
        layer = ScaledCosineAttention(8, 2, window=window, **options)
    if layer.table is not None:
        nn.init.normal_(layer.table)
    layer, x = layer.to(dtype), torch.randn(2, 6, 8, dtype=dtype)
    torch.testing.assert_close(layer(x), by_hand(layer, x, *arguments), rtol=tolerance, atol=tolerance)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_windows_are_put_together_as_they_were_cut(a: int, b: int, rows: int, columns: int) -> None:
    x = torch.arange(2 * a * rows * b * columns * 3).reshape(2, a * rows, b * columns, 3)
    windows = partition(x, (a, b))
    torch.testing.assert_close(merge(windows, (a, b), (a * rows, b * columns)), x, rtol=0, atol=0)
    for row in range(rows):
        for column in range(columns):
            block = x[:, a * row : a * (row + 1), b * column : b * (column + 1)].reshape(2, a * b, 3)
            assert torch.equal(windows[:, row * columns + column], block)


def test_a_window_that_does_not_divide_the_map_is_refused() -> None:
    with pytest.raises(ValueError, match="2x2 do not divide a map of 3x4"):
        partition(torch.zeros(1, 3, 4, 1), (2, 2))


def test_equal_steps_have_equal_rows_of_the_table() -> None:
    index = relative_index((2, 3))
    places = [(i, j) for i in range(2) for j in range(3)]
    for t, p in enumerate(places):
        for s, q in enumerate(places):
            assert index[t, s] == (p[0] - q[0] + 1) * 5 + p[1] - q[1] + 2
    assert index.unique().numel() == 3 * 5


def test_the_mask_hides_what_the_roll_brought_together() -> None:
    """Roll a map of places: tokens of one window see each other exactly if they are neighbours without the roll."""
    size, window, shift = (4, 6), (2, 3), (1, 1)
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij"), -1)[None]
    rolled = partition(torch.roll(places, (-1, -1), (1, 2)), window)[0]
    mask = shift_mask(size, window, shift)
    for tokens, seen in zip(rolled, mask == 0, strict=True):
        near = (tokens[:, None] - tokens[None]).abs()
        assert torch.equal(seen, (near[..., 0] < window[0]) & (near[..., 1] < window[1]))


def test_dot_product_attention_has_no_constant_without_a_bound_on_its_input_and_a_large_one_on_a_box() -> None:
    torch.manual_seed(0)
    layer = export(DotProductAttention(4, 2))
    unbounded = audit(layer, (5, 4), domain=(-math.inf, math.inf))
    assert unbounded.upper.value == math.inf
    assert any("no Lipschitz constant" in str(row) for row in unbounded.unbounded)
    assert math.isfinite(audit(layer, (5, 4)).upper.require_upper())
    assert jacobian_norm(layer, torch.rand(5, 4, dtype=torch.float64)) <= audit(layer, (5, 4)).upper.require_upper()


def test_raw_values_have_no_global_constant_and_normalised_ones_have() -> None:
    anywhere = dict(domain=(-math.inf, math.inf))
    raw = audit(export(cosine(values=False)), (5, 4), **anywhere)
    assert raw.upper.value == math.inf and raw.unbounded
    assert math.isfinite(audit(export(cosine()), (5, 4), **anywhere).upper.require_upper())


@settings(deadline=None, max_examples=15)
@given(
    heads=st.sampled_from([1, 2, 4]), tokens=st.sampled_from([1, 2, 6]), tau=st.sampled_from([0.1, 1.0, 10.0]),
    eps=st.sampled_from([0.01, 1.0]), clamp=st.booleans(), positions=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_estimate_is_the_proved_bound(heads, tokens, tau, eps, clamp, positions, seed) -> None:
    """On unbounded inputs nothing but the formula is known: estimate and proof agree, and are above every Jacobian."""
    torch.manual_seed(seed)
    window = (tokens // 2, 2) if positions and tokens > 1 else None
    layer = ScaledCosineAttention(8, heads, tau=tau, nu=0.6, eps=eps, clamp=clamp, window=window).double()
    if layer.table is not None:
        nn.init.normal_(layer.table)
    weights = [*layer.qkv.weight.detach().chunk(3), layer.proj.weight.detach()]
    estimate = layer.estimate(tokens, [torch.linalg.matrix_norm(w, 2) for w in weights]).item()
    proved = audit(export(layer), (tokens, 8), domain=(-math.inf, math.inf)).upper.require_upper()
    assert proved == pytest.approx(estimate, rel=5e-3)  # the proof widens the rows by what rounding may add
    x = torch.randn(tokens, 8, dtype=torch.float64) * 10 ** (seed % 3 - 1)
    assert jacobian_norm(export(layer), x) <= proved


def test_estimate_has_gradients_that_lower_it() -> None:
    torch.manual_seed(0)
    layer = cosine(window=(2, 3))
    nn.init.normal_(layer.table)

    def estimate() -> Tensor:
        weights = [*layer.qkv.weight.chunk(3), layer.proj.weight]
        return layer.estimate(6, [torch.linalg.matrix_norm(w, 2) for w in weights])

    before = estimate()
    gradients = torch.autograd.grad(before, [layer.qkv.weight, layer.proj.weight, layer.table])
    assert all(bool(torch.isfinite(g).all()) and float(g.abs().max()) > 0 for g in gradients)
    with torch.no_grad():
        for parameter, gradient in zip([layer.qkv.weight, layer.proj.weight, layer.table], gradients, strict=True):
            parameter -= 0.01 * gradient
    assert estimate() < before


@settings(deadline=None)
@given(
    inputs=st.integers(1, 6), rows=st.integers(1, 6), blocks=st.integers(1, 3), seed=st.integers(0, 999),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e5]),
)  # fmt: skip
def test_blocks_have_norm_at_most_one_whatever_the_parameter_is(inputs, rows, blocks, seed, scale) -> None:
    torch.manual_seed(seed)
    layer = AOLLinear(inputs, rows * blocks, blocks=blocks).double()
    layer.raw.data.normal_().mul_(scale)
    for block in layer.weight.detach().chunk(blocks):
        assert torch.linalg.matrix_norm(block, 2) <= 1 + 1e-12


def test_orthogonal_columns_stay_as_they_are() -> None:
    layer = AOLLinear(3, 8, blocks=2).double()
    for block in layer.raw.detach().chunk(2):
        nn.init.orthogonal_(block)
    torch.testing.assert_close(layer.weight.detach(), layer.raw.detach())


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="3 heads do not divide 4"):
        DotProductAttention(4, 3)
    with pytest.raises(ValueError, match="eps .* must be positive"):
        cosine(eps=0.0)
    with pytest.raises(ValueError, match="no Lipschitz constant"):
        cosine(values=False).estimate(4, [torch.ones(())] * 4)
