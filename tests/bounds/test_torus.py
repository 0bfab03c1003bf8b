"""Gram matrices from products of taps, twisted tori, open axes: against symbols, closed forms and the operator."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipcert.bounds import convolution, torus
from lipcert.bounds.convolution import conv_norm_upper
from lipcert.bounds.grams import grams
from lipcert.bounds.symbol import Axis, Correlation, dense, frequencies, symbols


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def exact(weight, size, padding):
    basis = torch.eye(weight.shape[1] * math.prod(size), dtype=torch.float64)
    images = basis.reshape(-1, weight.shape[1], *size)
    return float(torch.linalg.matrix_norm(nn.functional.conv2d(images, weight, padding=padding).flatten(1), 2))


@st.composite
def correlations(draw):
    dims = draw(st.integers(1, 2))
    extents = [draw(st.integers(1, 3)) for _ in range(dims)]
    shifts = torch.cartesian_prod(*(torch.arange(e) - draw(st.integers(0, 2)) for e in extents)).reshape(-1, dims)
    strides = [draw(st.integers(1, 2)) for _ in range(dims)]
    axes = tuple(Axis(draw(st.integers(3, 6)), draw(st.integers(1, 4)), s) for s in strides)
    groups, rows, columns = (draw(st.integers(1, 3)) for _ in range(3))
    taps = random(len(shifts), groups, rows, columns, seed=draw(st.integers(0, 2**31)))
    return Correlation(taps, shifts, axes)


@settings(max_examples=150)
@given(correlations(), st.booleans())
def test_gram_matrices_are_those_of_the_symbols(correlation, twisted):
    sizes = tuple(range(3, 3 + len(correlation.axes)))
    frequency, turns = frequencies(sizes, twisted)
    made = grams(correlation)
    gram, error = made.at(frequency, turns)
    blocks = symbols(correlation, frequency, turns)
    outputs = blocks.shape[1] <= blocks.shape[2]
    expected = blocks @ blocks.mH if outputs else blocks.mH @ blocks
    assert (gram - expected).abs().max() <= 1e-12 and 0 < error.max() < 1e-11
    traces = expected.diagonal(dim1=-2, dim2=-1).sum(-1).real.reshape(len(frequency), -1).amax(1)
    assert torch.allclose(made.traces(frequency, turns), traces, atol=1e-11)


@settings(max_examples=100)
@given(correlations())
def test_all_axes_open_in_turn(correlation):
    """A one-dimensional correlation with its axis open is its matrix."""
    if len(correlation.axes) > 1:
        axis = correlation.axes[0]
        correlation = Correlation(correlation.taps, correlation.shifts[:, :1], (axis,))
    gram, _ = grams(correlation, open=0).at(torch.zeros(1, 1, dtype=torch.int64), (1,))
    matrix = dense(correlation)
    largest = torch.linalg.matrix_norm(matrix, 2).max().square()
    assert torch.allclose(torch.linalg.eigvalsh(gram).max(), largest, rtol=1e-11, atol=1e-12)


def test_the_error_of_the_coefficients_covers_cancellation():
    """Taps that cancel at frequency 0: the computed matrix is little but rounding, and the error has to say so."""
    taps = torch.stack([random(1, 4, 4) * 1e8, -random(1, 4, 4) * 1e8, random(1, 4, 4, seed=1)])
    correlation = Correlation(taps, torch.tensor([[0], [1], [2]]), (Axis(9, 9, 1),))
    gram, error = grams(correlation).at(torch.zeros(1, 1, dtype=torch.int64), (10,))
    exact = taps[2, 0] @ taps[2, 0].mT
    assert 0 < torch.linalg.matrix_norm(gram[0] - exact) <= error.item()


@pytest.mark.parametrize("size", [(3, 3), (4, 7), (7, 7), (12, 5)])
def test_twisted_and_open_tori_bound_and_help(monkeypatch, size):
    """The kernel [1 1 1] has the norm 1 + 2 cos(π/(n + 1)) on n positions, which the twisted torus attains."""
    monkeypatch.setattr(convolution, "DENSE_SIDE", 0)
    monkeypatch.setattr(torus, "OPEN", 0)
    weight = torch.ones(1, 1, 3, 3)
    closed = math.prod(1 + 2 * math.cos(math.pi / (n + 1)) for n in size)
    bound = conv_norm_upper(weight, size, padding=1)
    assert "twisted" in bound.method and closed <= bound.value <= closed * (1 + 1e-9) < 9


def test_the_twisted_torus_is_smaller_for_smooth_kernels_and_never_false(monkeypatch):
    monkeypatch.setattr(convolution, "DENSE_SIDE", 0)
    monkeypatch.setattr(torus, "OPEN", 0)
    gained = 0
    for seed, n in itertools.product(range(30), (2, 3, 5)):
        weight = random(2, 3, 3, 3, seed=seed) + (seed % 3) * 0.7
        truth = exact(weight, (n, n), 1)
        bound = conv_norm_upper(weight, (n, n), padding=1)
        assert bound.value >= truth * (1 - 1e-13)
        gained += "twisted" in bound.method
    assert gained >= 20


def test_an_open_axis_is_tighter_than_the_torus(monkeypatch):
    monkeypatch.setattr(convolution, "DENSE_SIDE", 0)
    weight = random(6, 5, 3, 3)
    truth = exact(weight, (7, 7), 1)
    opened = conv_norm_upper(weight, (7, 7), padding=1)
    monkeypatch.setattr(torus, "OPEN", 0)
    closed = conv_norm_upper(weight, (7, 7), padding=1)
    assert "open" in opened.method and "open" not in closed.method
    assert truth * (1 - 1e-13) <= opened.value < closed.value


def test_tight_opens_axes_of_larger_maps(monkeypatch):
    monkeypatch.setattr(convolution, "DENSE_SIDE", 0)
    monkeypatch.setattr(torus, "OPEN_WORK", {"eigenvalue": 0.0, "tight": math.inf, "gram": 0.0})
    weight = random(3, 3, 3, 3)
    methods = {m: conv_norm_upper(weight, (6, 6), padding=1, method=m).method for m in ("auto", "tight", "gram")}
    assert [m for m, text in methods.items() if "open" in text] == ["tight"]


@pytest.mark.parametrize("twisted", [False, True])
@pytest.mark.parametrize("sizes", [(1,), (2,), (5,), (6,), (1, 4), (3, 4), (4, 4), (5, 3), (2, 3, 4)])
def test_half_of_the_frequencies_with_their_opposites_are_all(sizes, twisted):
    frequency, turns = frequencies(sizes, twisted)
    full = {tuple(f) for f in frequency.tolist()}
    opposite = {tuple(-a % t for a, t in zip(f, turns, strict=True)) for f in full}
    shift = [0.5 if twisted and s > 1 else 0.0 for s in sizes]
    expected = {
        tuple((j + h) / s for j, h, s in zip(index, shift, sizes, strict=True))
        for index in itertools.product(*map(range, sizes))
    }
    turned = {tuple(a / t for a, t in zip(f, turns, strict=True)) for f in full | opposite}
    assert turned == expected and len(full) == len(frequency)
