"""Attention: the inequality against attacks over random configurations, column sums, masks, forms it is written in."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from dense import Apply
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipcert.bounds import BoundError, audit
from lipcert.bounds.attention import Rows, coefficients, column_sums
from lipcert.bounds.patterns import lift
from lipcert.bounds.tracing import trace


class Attention(nn.Module):
    """Self-attention of pre-normalised tokens, `form` says how it is written and what keeps its rows bounded."""

    def __init__(self, dim=6, heads=2, *, form="operator", eps=0.1, weight=1.0, temperature=1.0, mask=None):
        super().__init__()
        self.heads, self.form, self.eps, self.temperature = heads, form, eps, temperature
        self.norm = nn.LayerNorm(dim, eps=eps)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.qkv.weight.data.mul_(weight)
        self.register_buffer("mask", mask)

    def forward(self, x):  # (n, tokens, dim)
        n, tokens, dim = x.shape
        if self.form != "cosine":
            x = self.norm(x)
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.form == "operator":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=self.temperature)
        else:
            if self.form == "cosine":
                q, k, v = (F.normalize(each, dim=-1, eps=self.eps) for each in (q, k, v))
            scores = (q * self.temperature) @ k.transpose(-2, -1)
            y = (scores if self.mask is None else scores + self.mask).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(n, tokens, dim))


def attacked(model, shape, seeds=range(6)):
    """Return the largest Jacobian norm at random points of the unit box, flat and scattered ones."""
    best = 0.0
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
        if seed % 2:
            x = 0.5 + 0.02 * (x - 0.5)  # small variance: LayerNorm is steep there
        jacobian = torch.autograd.functional.jacobian(model, x).reshape(-1, x.numel())
        best = max(best, float(torch.linalg.matrix_norm(jacobian, 2)))
    return best


@pytest.mark.parametrize("form", ["operator", "written", "cosine"])
@pytest.mark.parametrize("seed", range(8))
def test_the_bound_is_above_every_attack(form, seed):
    torch.manual_seed(seed)
    heads, tokens = (1, 2, 3)[seed % 3], (2, 5, 9)[seed % 3]
    mask = torch.randn(tokens, tokens).double() if seed % 2 else None
    model = Attention(6, heads, form=form, eps=(0.1, 1.0)[seed % 2], weight=(0.3, 1.0, 4.0)[seed % 3],
                      temperature=(0.2, 1.0, 5.0)[(seed // 2) % 3], mask=mask).double().eval()  # fmt: skip
    result = audit(model, (tokens, 6))
    assert "attention" in {row.op for row in result.layers}
    assert attacked(model, (tokens, 6)) <= result.upper.value < math.inf
    x = torch.rand(4, tokens, 6, dtype=torch.float64)
    output, error = result.program.evaluate(x)
    assert bool(((output - model(x)).flatten(1).norm(dim=1) <= 2 * error).all()) and float(error.max()) < 1e-8


class Relative(Attention):
    """Attention with position biases made of the queries, as in SAM and ViTDet: the mask depends on the input."""

    def __init__(self, *args, shared=False, **options):
        super().__init__(*args, **options)
        self.places = nn.Linear(self.qkv.in_features // self.heads, 5)
        self.shared = shared

    def forward(self, x):
        n, tokens, dim = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mask = self.places(q)  # (n, heads, queries, keys)
        mask = mask[:, :1] if self.shared else mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.temperature)
        return self.out(y.transpose(1, 2).reshape(n, tokens, dim))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_a_mask_that_depends_on_the_input_is_bounded(seed, shared):
    torch.manual_seed(seed)
    model = Relative(6, (1, 2, 3)[seed % 3], temperature=(0.0, 0.3)[seed % 2], eps=0.1, shared=shared)
    model.places.weight.data.mul_(5.0)
    model = model.double().eval()
    result = audit(model, (5, 6))
    assert attacked(model, (5, 6)) <= result.upper.value < math.inf
    x = torch.rand(4, 5, 6, dtype=torch.float64)
    output, error = result.program.evaluate(x)
    assert float(error.max()) < 1e-8


def test_the_part_of_a_mask_is_what_the_inequality_says():
    """Values that are constant but differ from key to key: what moves is the mask alone."""
    torch.manual_seed(0)
    values = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)

    def forward(m, x):  # (n, 2, 2) are the scores themselves
        zero = x.new_zeros(1) * x[..., :1].clamp(0.0, 0.0)
        return F.scaled_dot_product_attention(zero, zero, zero + values, attn_mask=m.scale(x), scale=1.0)

    model = Apply(forward, scale=nn.Linear(2, 2)).double()
    nn.init.eye_(model.scale.weight)
    nn.init.zeros_(model.scale.bias)
    result = audit(model, (2, 2))
    x = torch.zeros(1, 2, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(model, x).reshape(-1, 4)
    attained = float(torch.linalg.matrix_norm(jacobian, 2))  # 2·p(1-p)·√2 = 1/√2 of at most 1
    assert math.isclose(attained, math.sqrt(0.5), rel_tol=1e-12) and attained <= result.upper.value


@pytest.mark.nightly
def test_the_inequality_is_above_the_jacobian_of_a_thousand_random_configurations():
    for seed in range(1000):
        check_inequality(seed)


def test_the_inequality_on_some_random_configurations():
    for seed in range(60):
        check_inequality(seed)


def check_inequality(seed):
    """Compare the three coefficients with the three Jacobian blocks of one head at points of the stated balls."""
    generator = torch.Generator().manual_seed(seed)
    tokens, width = (1, 2, 3, 6, 12)[seed % 5], (1, 2, 4)[seed % 3]
    scale = 10.0 ** (2 * torch.rand(1, generator=generator, dtype=torch.float64).item() - 1)
    shift = torch.randn(2, width, generator=generator, dtype=torch.float64) * 3
    rows = torch.randn(3, tokens, width, generator=generator, dtype=torch.float64)
    if seed % 2:  # one token far from the others draws all attention
        rows[1, 0] *= 10
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1.0)
    q, k, v = rows[0], rows[1] + shift[0], rows[2] + shift[1]
    bias = torch.randn(tokens, tokens, generator=generator, dtype=torch.float64) if seed % 4 < 2 else None

    def attend(q, k, v):
        scores = scale * q @ k.T
        return (scores if bias is None else scores + bias).softmax(-1) @ v

    spread = 2 * scale + (0.0 if bias is None else float((bias.amax(-1) - bias.amin(-1)).max()))
    columns = column_sums(spread, None, tokens, tokens)
    probabilities = (scale * q @ k.T + (0.0 if bias is None else bias)).softmax(-1)
    assert float(probabilities.sum(0).max()) <= columns.plain
    bounds = coefficients(Rows(1.0, 1.0), Rows(9.0, 1.0), Rows(9.0, 1.0), scale, columns)
    for block, bound in zip(torch.autograd.functional.jacobian(attend, (q, k, v)), bounds, strict=True):
        assert float(torch.linalg.matrix_norm(block.reshape(tokens * width, -1), 2)) <= bound * (1 + 1e-12)


def test_the_value_term_is_attained():
    """All queries look at one key: ‖P‖ = √N."""
    keys = torch.zeros(9, 2, dtype=torch.float64)
    keys[0, 0] = 1.0
    queries = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(9, 2)
    p = (60.0 * queries @ keys.T).softmax(-1)
    bound = coefficients(Rows(1, 1), Rows(1, 0.5), Rows(1, 1), 60.0, column_sums(60.0, None, 9, 9))[2]
    assert float(torch.linalg.matrix_norm(p, 2)) == pytest.approx(bound, rel=1e-9) and bound == pytest.approx(3.0)


@given(st.integers(1, 7), st.integers(1, 7), st.floats(0, 800), st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_column_sums_hold_for_scores_of_this_spread(queries, keys, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(queries, keys, generator=generator, dtype=torch.float64).round() * spread
    bias = torch.zeros(queries, keys, dtype=torch.float64)
    bias[torch.rand(queries, keys, generator=generator) < 0.3] = -math.inf
    bias[:, 0] = 0.0
    for constant in (None, bias):
        p = (scores if constant is None else scores + constant).softmax(-1)
        found = column_sums(spread, constant, queries, keys)
        assert float(p.sum(0).max()) <= found.plain
        for values in (torch.randn(keys, 1, generator=generator).sign().double(), torch.eye(keys).double()):
            centred = values - (p @ values)[:, None]  # (queries, keys, width), rows of length 1
            variance = (p * centred.square().sum(-1)).sum(-1, keepdim=True)
            assert float((p * variance).sum(0).max()) <= found.varying * (1 + 1e-12)


def test_the_variance_term_is_attained_where_two_thirds_meet_one_third():
    """Keys at ±1 with probabilities 2/3 and 1/3, the same for all queries: Σ_i p V = N·16/27."""
    p = torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64).expand(9, 2)
    values = torch.tensor([1.0, -1.0], dtype=torch.float64)
    variance = (p * (values - (p @ values)[:, None]).square()).sum(-1)
    assert float((p[:, 0] * variance).sum()) == pytest.approx(column_sums(math.inf, None, 9, 2).varying, rel=1e-9)
    assert column_sums(math.inf, None, 9, 1).varying == 0.0  # one key: nothing varies


def test_scaled_cosine_attention_has_the_constant_of_its_formula():
    """ν/√ε (τ‖W_Q‖ + τ√c'‖W_K‖ + √c‖W_V‖), N = 16, orthogonal weights, ε = 0.01: 56.0 where LipsFormer's has 5420.

    Every probability is below 1/2 here, so c' = c.
    """
    tau, eps, tokens, dim = 1.0, 0.01, 16, 8
    eye = torch.eye(dim, dtype=torch.float64)

    def attend(m, x):
        rows = x / (x.square().sum(-1, keepdim=True) + eps).sqrt()
        return (tau * rows @ rows.transpose(1, 2)).softmax(-1) @ rows

    column = tokens * math.exp(2 * tau) / (math.exp(2 * tau) + tokens - 1)
    expected = (tau + (tau + 1) * math.sqrt(column)) / math.sqrt(eps)
    assert audit(Apply(attend, w=nn.Parameter(eye)), (tokens, dim)).upper.value == pytest.approx(expected, rel=0.01)
    assert expected == pytest.approx(56.0, abs=1.0)
    published = 2 / math.sqrt(eps) * (tokens * (tokens - 1) * tau + (tokens - 1) * tau + tokens)
    assert published == pytest.approx(5420, rel=0.01)


def test_swin_windows_are_a_hundred_times_below_the_published_theorem():
    """Windows of 7x7 tokens and τ = 10, as LipsFormer-Swin has them, unit norms of the projections."""
    tokens, tau = 49, 10.0
    a, b, c = coefficients(Rows(1, 1), Rows(1, 1), Rows(1, 1), tau, column_sums(2 * tau, None, tokens, tokens))
    published = 2 * (tokens * (tokens - 1) * tau + (tokens - 1) * tau + tokens)
    assert published / (a + b + c) > 100


def test_biases_and_masks_cost_what_they_must():
    torch.manual_seed(0)
    plain = Attention().double()
    state = {**plain.state_dict(), "mask": torch.ones(5, 5, dtype=torch.bool).tril()}
    masked = Attention(mask=state["mask"]).double()
    masked.load_state_dict(state)
    causal = Apply(lambda m, x: m.a.out(causally(m.a, m.a.qkv(m.a.norm(x)))), a=plain)
    assert audit(masked, (5, 6)).upper.value == audit(causal, (5, 6)).upper.value
    assert attacked(masked, (5, 6)) <= audit(masked, (5, 6)).upper.value
    shifted = Attention(mask=torch.full((5, 5), 3.0, dtype=torch.float64)).double()
    shifted.load_state_dict({**plain.state_dict(), "mask": shifted.mask})
    assert audit(shifted, (5, 6)).upper.value == pytest.approx(audit(plain, (5, 6)).upper.value, rel=1e-12)
    nothing = Attention(mask=torch.zeros(5, 5, dtype=torch.bool)).double()
    with pytest.raises(BoundError, match="sees no key"):
        audit(nothing, (5, 6))


def causally(attention, x):
    n, tokens, width = x.shape
    q, k, v = x.reshape(n, tokens, 3, attention.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    return y.transpose(1, 2).reshape(n, tokens, width // 3)


def test_dot_product_attention_of_unbounded_inputs_has_no_bound():
    def attend(m, x):
        return F.scaled_dot_product_attention(x, x, x)

    result = audit(Apply(attend), (4, 3), domain=(-math.inf, math.inf))
    assert math.isinf(result.upper.value) and "normalise" in result.unbounded[0][2]
    assert math.isfinite(audit(Apply(attend), (4, 3)).upper.value)


@pytest.mark.parametrize("written", [False, True])
def test_keys_and_values_shared_by_heads_count_for_each(written):
    """Three heads with one set of keys and values, which is broadcast: √3 for their moves."""

    def attend(m, x):
        q, k, v = m.q(x).unflatten(-1, (3, 2)).transpose(1, 2), m.k(x)[:, None], m.v(x)[:, None]
        if written:
            return (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)

    torch.manual_seed(3)
    parts = dict(q=nn.Linear(4, 6), k=nn.Linear(4, 2), v=nn.Linear(4, 2))
    nn.init.zeros_(parts["q"].weight)  # uniform attention: only the values move
    nn.init.zeros_(parts["q"].bias)
    parts["v"].weight.data.mul_(10)
    model = Apply(attend, **parts).double()
    result = audit(model, (5, 4))
    assert attacked(model, (5, 4)) <= result.upper.value < math.inf
    assert result.upper.value <= attacked(model, (5, 4)) * (1.1 if not written else 1.5)


NEAR = {
    "softmax over the queries": lambda m, x: (x @ x.transpose(1, 2)).softmax(1) @ x,
    "a data mask": lambda m, x: (x @ x.transpose(1, 2) + x.sum(2, keepdim=True)).softmax(-1) @ x,
    "no softmax": lambda m, x: (x @ x.transpose(1, 2)).sigmoid() @ x,
}


@pytest.mark.parametrize("which", NEAR)
def test_near_misses_fall_back_to_products(which):
    model = Apply(NEAR[which])
    result = audit(model, (4, 3))
    assert "attention" not in {row.op for row in result.layers}
    assert attacked(model, (4, 3)) <= result.upper.value < math.inf


NORMALISED = {
    "max": (lambda m, x: F.normalize(x, dim=-1, eps=0.2), 5.0),
    "sum": (lambda m, x: x / (x.norm(dim=-1, keepdim=True) + 0.2), 5.0),
    "squares": (lambda m, x: x / (x.square().sum(-1, keepdim=True) + 0.04).sqrt(), 5.0),
    "mean": (lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.04), 5.0),
    "module": (lambda m, x: m.a(x), 10.0),
}


@pytest.mark.parametrize("which", NORMALISED)
def test_normalised_rows_have_their_constant_and_it_is_attained(which):
    forward, slope = NORMALISED[which]
    norm = nn.RMSNorm(4, eps=0.04)
    norm.weight.data.fill_(2.0)
    model = Apply(forward, a=norm).double()
    result = audit(model, (3, 4), domain=(-1, 1))
    jacobian = torch.autograd.functional.jacobian(model, torch.full((1, 3, 4), 1e-9, dtype=torch.float64))
    attained = float(torch.linalg.matrix_norm(jacobian.reshape(12, 12), 2))
    assert attained <= result.upper.value <= slope * (1 + 1e-9) and attained >= slope * (1 - 1e-6)
    x = torch.rand(2, 3, 4, dtype=torch.float64)
    output, error = result.program.evaluate(x)
    assert bool(((output - model(x)).flatten(1).norm(dim=1) <= error).all())


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x / (2 * x).norm(dim=-1, keepdim=True).clamp_min(0.2),
        lambda m, x: x / x.norm(p=1, dim=-1, keepdim=True).clamp_min(0.2),
        lambda m, x: x / x.norm(dim=1, keepdim=True).clamp(0.2, 0.3),
        lambda m, x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 0.04),
        lambda m, x: x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 0.04),
    ],
)
def test_near_misses_of_a_normalisation_are_left_alone(forward):
    graph = lift(trace(Apply(forward), (3, 4)))
    assert all(node.op != "lipcert.normalize" for node in graph.nodes)
