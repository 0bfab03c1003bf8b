"""Chains of matrices and slopes: every method above what slopes attain, exact where it must be, and proved."""

from __future__ import annotations

import doctest
import math
from fractions import Fraction

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lipcert.bounds.composition.chain
import lipcert.bounds.composition.methods
from lipcert.bounds import BoundError
from lipcert.bounds.composition import METHODS, Chain, chain_bound
from lipcert.bounds.composition.certificate import proved
from lipcert.bounds.composition.chain import _compressed
from lipcert.bounds.composition.methods import _closed_form, product
from lipcert.bounds.composition.multipliers import _differentiate, _eliminated


def attained(chain, seed=0, tries=12):
    """Return a large norm of W_K D_{K-1} ⋯ D_1 W_1 over diagonal D_k with slopes at an end, improved one at a time."""
    generator = torch.Generator().manual_seed(seed)

    def norm(choice):
        total = chain.matrices[0]
        for W, (low, high), bits in zip(chain.matrices[1:], chain.slopes, choice, strict=True):
            total = W @ (torch.where(bits, high, low).double()[:, None] * total)
        return float(numpy.linalg.norm(total.numpy(), 2))

    best, chosen = -1.0, None
    for _ in range(tries):
        choice = [torch.rand(len(W), generator=generator) < 0.5 for W in chain.matrices[:-1]]
        if (value := norm(choice)) > best:
            best, chosen = value, choice
    best = max(best, norm([torch.ones(len(W), dtype=torch.bool) for W in chain.matrices[:-1]]))
    for bits in chosen or []:
        for i in range(len(bits)):
            bits[i] = ~bits[i]
            value = norm(chosen)
            if value > best:
                best = value
            else:
                bits[i] = ~bits[i]
    return best * 2.0**chain.exponent


@st.composite
def chains(draw, linear=False, widest=12, deepest=5):
    """Draw widths, depth, slopes of all activations, scales from 1e-6 to 1e6, ranks and zeros."""
    depth = draw(st.integers(1, deepest))
    widths = draw(st.lists(st.integers(1, widest), min_size=depth + 1, max_size=depth + 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    matrices = []
    for rows, columns in zip(widths[1:], widths[:-1], strict=True):
        kind = draw(st.sampled_from(["normal", "normal", "low rank", "positive", "zero rows", "zero"]))
        W = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        if kind == "low rank":
            W = W[:, :1] @ torch.randn(1, columns, generator=generator, dtype=torch.float64)
        elif kind == "positive":
            W = W.abs()
        elif kind == "zero rows":
            W[::2] = 0.0
        elif kind == "zero" and draw(st.integers(0, 5)) == 0:
            W = torch.zeros_like(W)
        matrices.append(W * 10.0 ** draw(st.integers(-6, 6)))
    ends = st.floats(-2.0, 2.0, width=32)
    ranges = []
    for _ in range(depth - 1):
        if linear:
            ranges.append((end := draw(ends), end))
        else:
            low, high = sorted((draw(ends), draw(ends)))
            known = [(0.0, 1.0), (-0.13, 1.13), (0.0, 0.25), (-1.0, 1.0), (-0.5, 1.5)]
            ranges.append(draw(st.sampled_from(known)) if draw(st.booleans()) else (low, high))
    return Chain(tuple(matrices), tuple(ranges))


def nonnegative(matrix):
    """Return whether a symmetric matrix of Fractions is positive semidefinite: no pivot is negative."""
    rows = [list(row) for row in matrix]
    for k in range(len(rows)):
        pivot = rows[k][k]
        if pivot < 0 or (pivot == 0 and any(rows[i][k] for i in range(k + 1, len(rows)))):
            return False
        for i in range(k + 1, len(rows)):
            if rows[i][k]:
                ratio = rows[i][k] / pivot
                rows[i] = [a - ratio * b for a, b in zip(rows[i], rows[k], strict=True)]
    return True


@given(chains(widest=3, deepest=3), st.sampled_from([0.0, 1e-13, 1e-11]))
@settings(max_examples=80, deadline=None)
def test_the_certificate_holds_in_rational_arithmetic(chain, less):
    """Q + δ is positive semidefinite for the δ that the returned bound stands for, with no rounding at all."""
    normal = chain.normal()
    if normal is None or normal.depth < 2 or (start := _closed_form(normal)) is None:
        return
    square, scalars = start[0] * (1.0 - less), start[1]
    multipliers = [torch.full_like(W[:, 0], s) for W, s in zip(normal.matrices, scalars, strict=False)]
    value = proved(normal, square, multipliers)
    if value is None:
        return
    total = (Fraction(value) / Fraction(2) ** normal.exponent) ** 2
    delta = (total - Fraction(square)) / normal.depth
    assert 0 < delta < Fraction(1, 10**6)
    exact = [[[Fraction(v) for v in row] for row in W.tolist()] for W in normal.matrices]
    sizes = [normal.matrices[0].shape[1], *(len(W) for W in exact[:-1])]
    offsets = [sum(sizes[:k]) for k in range(len(sizes))]
    Q = [[Fraction(0)] * sum(sizes) for _ in range(sum(sizes))]
    for i in range(sum(sizes)):
        Q[i][i] = delta + (Fraction(square) if i < sizes[0] else Fraction(scalars[offsets_index(offsets, i) - 1]))
    for k, (W, (low, high)) in enumerate(zip(exact, [*normal.slopes, (None, None)], strict=True)):
        for row, out in zip(W, range(len(W)), strict=True):
            for i, a in enumerate(row):
                for j, b in enumerate(row):
                    weight = Fraction(-1) if low is None else Fraction(low) * Fraction(high) * Fraction(scalars[k])
                    Q[offsets[k] + i][offsets[k] + j] += weight * a * b
                if low is not None:
                    off = -(Fraction(low) + Fraction(high)) / 2 * Fraction(scalars[k]) * a
                    Q[offsets[k] + i][offsets[k + 1] + out] += off
                    Q[offsets[k + 1] + out][offsets[k] + i] += off
    assert nonnegative(Q)


def offsets_index(offsets, i):
    """Return the block that a row lies in."""
    return max(k for k, start in enumerate(offsets) if start <= i)


def test_gradients_of_multipliers_are_those_of_the_bound():
    torch.manual_seed(1)
    W = tuple(torch.randn(n, m, dtype=torch.float64) for n, m in ((6, 5), (7, 6), (5, 7), (3, 5)))
    chain = Chain(W, ((0.0, 1.0), (-0.13, 1.13), (0.0, 0.25))).normal()
    directions = [0.3 * torch.randn(len(V), dtype=torch.float64) for V in chain.matrices[:-1]]
    distances = [torch.tensor(x, dtype=torch.float64) for x in (0.1, -0.5, 0.3)]
    _differentiate(chain, _eliminated(chain, directions, distances, None), directions, distances)
    for p in [*directions, *distances]:
        flat, gradient = p.view(-1), p.grad.clone().view(-1)
        for i in range(len(flat)):
            kept, ends = flat[i].item(), []
            for step in (1e-6, -1e-6):
                flat[i] = kept + step
                ends.append(math.log(_eliminated(chain, directions, distances, None).square))
            flat[i] = kept
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(gradient[i]), abs=1e-7)


@given(chains())
@settings(max_examples=100, deadline=None)
def test_every_method_is_above_what_slopes_within_the_range_attain(chain):
    floor, normal = attained(chain), chain.normal()
    limit = product(chain)
    assert limit.value >= floor * (1 - 1e-12)
    whole = chain_bound(chain)
    assert whole.kind == "upper" and floor * (1 - 1e-12) <= whole.value <= limit.value
    if normal is not None:
        assert all(norm * steep <= 1.0 for norm, steep in zip(normal.norms, (*normal.steepest, 1.0), strict=True))
        for method in METHODS["fast"]:
            bound = method(normal)
            assert bound is None or (bound.kind == "upper" and bound.value >= floor * (1 - 1e-12)), method


@given(chains(widest=6, deepest=4))
@settings(max_examples=25, deadline=None)
def test_optimised_multipliers_are_sound_and_no_worse(chain):
    tight, fast = chain_bound(chain, "tight").value, chain_bound(chain).value
    assert attained(chain) * (1 - 1e-12) <= tight <= fast


@given(chains(linear=True))
@settings(max_examples=80, deadline=None)
def test_linear_activations_give_the_norm_of_the_product(chain):
    total = chain.matrices[0]
    for W, (slope, _) in zip(chain.matrices[1:], chain.slopes, strict=True):
        total = W @ (slope * total)
    exact, limit = float(torch.linalg.matrix_norm(total, 2)), product(chain).value
    bound = chain_bound(chain).value
    assert exact * (1 - 1e-12) <= bound <= exact * (1 + 1e-9) + 1e-12 * limit


def test_almost_linear_activations_are_almost_the_norm_of_the_product():
    torch.manual_seed(0)
    W = [torch.randn(8, 8, dtype=torch.float64) for _ in range(3)]
    exact = float(torch.linalg.matrix_norm(W[2] @ W[1] @ W[0], 2))
    for width, slack in ((1e-2, 0.3), (1e-4, 0.05), (1e-6, 0.01), (1e-9, 0.01)):
        bound = chain_bound(Chain(tuple(W), ((1.0 - width, 1.0),) * 2)).value
        assert exact <= bound <= exact * (1 + slack)


def test_one_neuron_at_a_time_is_exact():
    chain = Chain(tuple(torch.tensor([[w]], dtype=torch.float64) for w in (3.0, -2.0, 0.5)), ((0.0, 1.0), (-0.5, 0.25)))
    for tightness in METHODS:
        assert 1.5 <= chain_bound(chain, tightness).value <= 1.5 * (1 + 1e-9)


def test_nonnegative_weights_have_the_norm_of_their_product_and_less_is_refused():
    """With all ReLUs active the product of the matrices is attained; multipliers prove it and nothing smaller."""
    torch.manual_seed(0)
    W = [torch.rand(n, m, dtype=torch.float64) for n, m in ((10, 2), (12, 10), (2, 12))]
    chain = Chain(tuple(W), ((0.0, 1.0),) * 2)
    exact = float(torch.linalg.matrix_norm(W[2] @ W[1] @ W[0], 2))
    bound = chain_bound(chain, "tight")
    assert bound.method == "LipSDP-Neuron" and exact <= bound.value <= exact * (1 + 1e-5)
    normal = chain.normal()
    square, scalars = _closed_form(normal)
    multipliers = [torch.full_like(V[:, 0], s) for V, s in zip(normal.matrices, scalars, strict=False)]
    closed = proved(normal, square, multipliers)
    assert exact < closed < product(chain).value * 0.999
    for factor in (1 - 1e-6, 0.99, 0.5, 1e-3):
        assert proved(normal, square * factor, multipliers) is None
    for k in range(2):
        wrong = [m * (1.01 if i == k else 1.0) for i, m in enumerate(multipliers)]
        value = proved(normal, square, wrong)
        assert value is None or value >= closed * (1 - 1e-9)
    assert proved(normal, square, [m * 1e-3 for m in multipliers]) is None
    assert proved(normal, square, [-m for m in multipliers]) is None
    assert proved(normal, square, [m * math.nan for m in multipliers]) is None


@given(chains(widest=5, deepest=3), st.floats(-3.0, 3.0), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_no_proposal_proves_a_bound_below_what_is_attained(chain, exponent, seed):
    """Random multipliers and any L: either nothing, or something true."""
    normal = chain.normal()
    if normal is None or normal.depth < 2 or (start := _closed_form(normal)) is None:
        return
    generator = torch.Generator().manual_seed(seed)
    multipliers = [
        s * 10.0 ** (exponent * torch.rand(len(W), generator=generator, dtype=torch.float64))
        for s, W in zip(start[1], normal.matrices, strict=False)
    ]
    for factor in (0.01, 0.5, 0.9, 1.0, 2.0):
        value = proved(normal, start[0] * factor, multipliers)
        assert value is None or value >= attained(chain) * (1 - 1e-12)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**31), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_compressed_input_dominates_the_wide_one_exactly(rows, extra, seed, singular):
    """M Mᵀ - W Wᵀ is positive semidefinite in rational arithmetic: all pivots of an elimination are nonnegative."""
    W = torch.randn(rows, rows + extra, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if singular:
        W[0] = W[-1]
    M = _compressed(W)
    assert M is not None and M.shape == (rows, rows)
    assert torch.linalg.matrix_norm(M @ M.T - W @ W.T, 2) <= 1e-12 * torch.linalg.matrix_norm(W, 2) ** 2
    big, small = ([[Fraction(v) for v in row] for row in X.tolist()] for X in (M, W))
    square = [
        [
            sum(x * y for x, y in zip(big[i], big[j], strict=True))
            - sum(x * y for x, y in zip(small[i], small[j], strict=True))
            for j in range(rows)
        ]
        for i in range(rows)
    ]
    assert nonnegative(square)


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e150])
def test_scales_do_not_matter(scale):
    torch.manual_seed(0)
    W = [torch.randn(n, m, dtype=torch.float64) for n, m in ((6, 9), (7, 6), (3, 7))]
    plain = chain_bound(Chain(tuple(W), ((0.0, 1.0),) * 2))
    far = chain_bound(Chain((W[0] * scale, W[1], W[2]), ((0.0, 1.0),) * 2))
    assert far.value / scale == pytest.approx(plain.value, rel=1e-9) and plain.method == far.method


@pytest.mark.parametrize("layer", range(3))
def test_errors_of_the_matrices_are_counted(layer):
    """A matrix known up to 0.01 has a bound above that of any within the distance, also where the bound is exact."""
    torch.manual_seed(0)
    W = [torch.rand(n, m, dtype=torch.float64) for n, m in ((5, 4), (6, 5), (3, 6))]
    left, _, right = torch.linalg.svd(W[layer])
    moved = [V + 0.01 * torch.outer(left[:, 0], right[0]) if k == layer else V for k, V in enumerate(W)]
    exact = float(torch.linalg.matrix_norm(moved[2] @ moved[1] @ moved[0], 2))
    errors = tuple(0.01 if k == layer else 0.0 for k in range(3))
    known = Chain(tuple(W), ((0.0, 1.0), (-0.5, 1.0)), errors)
    assert chain_bound(Chain(known.matrices, known.slopes), "tight").value < exact
    normal = known.normal()
    for method in METHODS["tight"]:
        bound = method(normal)
        assert bound is None or exact <= bound.value <= exact * 1.5


@pytest.mark.parametrize(
    "arguments",
    [
        ((torch.eye(2), torch.eye(3)), ((0.0, 1.0),)),
        ((torch.eye(2),) * 2, ()),
        ((torch.eye(2),) * 2, ((1.0, 0.0),)),
        ((torch.eye(2),) * 2, ((0.0, math.inf),)),
        ((torch.eye(2),) * 2, ((math.nan, 1.0),)),
        ((torch.ones(2),), ()),
    ],
)
def test_chains_that_do_not_fit_are_refused(arguments):
    with pytest.raises(BoundError):
        Chain(*arguments)


@pytest.mark.parametrize("module", ["chain", "methods"])
def test_docstrings(module):
    assert doctest.testmod(getattr(lipcert.bounds.composition, module)).failed == 0
