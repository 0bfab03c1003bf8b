"""Spectral norms from above: never below the truth, tight, and independent of what a solver proposes."""

import doctest
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipcert.bounds import BoundError, hermitian, matrix
from lipcert.bounds.matrix import (
    eigenvalue_upper,
    gram_upper,
    spectral_norm_estimate,
    spectral_norm_upper,
)

METHODS = [eigenvalue_upper, gram_upper]


def reference(W):
    """The largest singular value by numpy, scaled so that it neither under- nor overflows."""
    blocks = W.detach().to(torch.complex128 if W.is_complex() else torch.float64).numpy()
    size = np.abs(blocks).max(initial=0.0)
    if size == 0.0:
        return 0.0
    size = 2.0 ** math.frexp(size)[1]
    return np.linalg.svd(blocks / size, compute_uv=False).max() * size


def random(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=150)
@given(
    batch=st.sampled_from([(), (1,), (4,), (2, 3)]),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    dtype=st.sampled_from([torch.float64, torch.complex128, torch.float32, torch.complex64]),
    rank=st.integers(1, 12),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
)
def test_never_below_the_norm_and_tight(batch, rows, columns, dtype, rank, exponent, seed):
    W = random((*batch, rows, rank), dtype, seed) @ random((*batch, rank, columns), dtype, seed + 1) * 2.0**exponent
    norm = reference(W)
    exact, gram = eigenvalue_upper(W), gram_upper(W)
    assert exact.kind == gram.kind == "upper"
    assert norm * (1 - 1e-13) <= exact.value <= norm * (1 + 1e-10)
    assert norm * (1 - 1e-13) <= gram.value <= norm * (1 + 2e-4)


@settings(max_examples=150)
@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.floats(-8.0, 8.0) | st.sampled_from([0.1, 1.0, 1e-9]), min_size=2 * n, max_size=2 * n)
    )
)
def test_no_tolerance_at_all_for_two_rows(entries):
    """The largest eigenvalue of an exact rational 2×2 Gram matrix is compared without any rounding."""
    W = torch.tensor(entries, dtype=torch.float64).reshape(2, -1)
    a, b, d = (
        sum(Fraction(x) * Fraction(y) for x, y in zip(W[i].tolist(), W[j].tolist(), strict=True))
        for i, j in ((0, 0), (0, 1), (1, 1))
    )
    for method, oriented in itertools.product(METHODS, (W, W.T)):
        twice = 2 * Fraction(method(oriented).value) ** 2 - (a + d)  # ≥ √((a-d)² + 4b²)
        assert twice >= 0 and twice**2 >= (a - d) ** 2 + 4 * b**2


def test_known_values():
    assert 4.0 <= spectral_norm_upper(torch.diag(torch.tensor([3.0, 4.0]))).value <= 4.0 + 1e-13
    assert 15.0 == pytest.approx(eigenvalue_upper(torch.ones(9, 25)).value, rel=1e-12)
    assert eigenvalue_upper(torch.ones(9, 25)).value >= 15.0
    golden = Fraction(eigenvalue_upper(torch.tensor([[1.0, 1.0], [0.0, 1.0]])).value)
    assert (2 * golden**2 - 3) ** 2 >= 5  # λ = (3 + √5)/2


@pytest.mark.parametrize("method", METHODS)
def test_orthogonal_and_permutation(method):
    for dtype in (torch.float64, torch.complex128):
        Q = torch.linalg.qr(random((60, 60), dtype))[0]
        assert 1.0 - 1e-14 <= method(Q).value <= 1.0 + 1e-10
    P = torch.eye(50)[torch.randperm(50)]
    assert 1.0 <= method(P).value <= 1.0 + 1e-12
    assert (
        1.0 <= method(torch.eye(7).expand(3, 7, 7) * torch.tensor([0.5, 1.0, 0.9]).reshape(3, 1, 1)).value <= 1 + 1e-12
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-320, 1e-308, 1e-300, 1e-160, 1e-20, 1e-5, 1e150, 1e300, 5e307])
def test_any_scale(method, scale):
    W = random((6, 9)).clamp(-1, 1) * scale  # at 1e-320 a number has a few bits: the reference sees the same ones
    norm = reference(W)
    assert norm * (1 - 1e-13) <= method(W).value <= norm * (1 + 1e-9) + 5e-324


@pytest.mark.parametrize("method", METHODS)
def test_mixed_scales(method):
    assert 2.0**-1073 <= method(torch.full((2, 2), 2.0**-1074, dtype=torch.float64)).value <= 3 * 2.0**-1074
    W = random((3, 8, 8)) * torch.tensor([1e-200, 1e-3, 1e-320], dtype=torch.float64).reshape(3, 1, 1)
    assert reference(W) * (1 - 1e-13) <= method(W).value <= reference(W) * (1 + 1e-9)
    graded = random((8, 8)) * torch.logspace(-300, 0, 8, dtype=torch.float64)
    assert reference(graded) * (1 - 1e-13) <= method(graded).value <= reference(graded) * (1 + 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_zero_empty_and_overflow(method):
    assert method(torch.zeros(2, 3, 4)).value == 0.0
    assert method(torch.zeros(0, 4)).value == method(torch.zeros(0, 4, 4)).value == 0.0
    assert method(torch.full((4, 4), 1.5e308, dtype=torch.float64)).value == math.inf


@pytest.mark.parametrize("method", [*METHODS, spectral_norm_upper, spectral_norm_estimate])
def test_refused(method):
    for value in (math.nan, math.inf, -math.inf):
        W = torch.ones(3, 3)
        W[1, 2] = value
        with pytest.raises(BoundError, match="NaN or ∞"):
            method(W)
    with pytest.raises(BoundError, match="matrix"):
        method(torch.ones(3))
    with pytest.raises(BoundError, match="int64"):
        method(torch.ones(3, 3, dtype=torch.int64))


def test_choice_of_method():
    W = random((4, 4))
    assert spectral_norm_upper(W).method == "eigenvalue" and spectral_norm_upper(W, "gram").method == "gram"
    with pytest.raises(BoundError, match="method"):
        spectral_norm_upper(W, "power")
    with pytest.raises(BoundError, match="iteration"):
        gram_upper(W, iterations=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_weights_are_exact_numbers(dtype):
    W = random((10, 20)).to(dtype)
    assert eigenvalue_upper(W).value == eigenvalue_upper(W.double()).value


def test_gram_is_an_upper_bound_at_every_iteration_and_converges():
    W = random((30, 20))
    values = [gram_upper(W, iterations=t).value for t in range(1, 16)]
    assert all(v >= reference(W) * (1 - 1e-13) for v in values)
    assert all(a >= b * (1 - 1e-12) for a, b in zip(values, values[1:], strict=False))
    assert values[0] > values[-1] and values[-1] < reference(W) * (1 + 1e-10)


PROPOSALS = {
    "zero": lambda V: torch.zeros_like(V),
    "nan": lambda V: torch.full_like(V, math.nan),
    "huge": lambda V: V * 1e200,
    "not orthogonal": lambda V: V + 0.02 * random(V.shape, V.dtype),
    "another basis": lambda V: torch.linalg.qr(random(V.shape, V.dtype))[0],
    "short": lambda V: 0.9 * V,  # the bound is sharp: 0.81 λ / (1 - 0.19)
    "singular": lambda V: torch.cat([V[..., :1], V[..., :1], V[..., 2:]], -1),
    "rounded": lambda V: V.to(torch.complex64 if V.is_complex() else torch.float32).to(V.dtype),
}


@pytest.mark.parametrize("name", PROPOSALS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_wrong_eigenvectors_only_enlarge(monkeypatch, name, dtype):
    W = random((5, 12, 9), dtype)
    eigh, right = torch.linalg.eigh, eigenvalue_upper(W).value

    def wrong(matrix):
        values, vectors = eigh(matrix)
        return values, PROPOSALS[name](vectors)

    monkeypatch.setattr(torch.linalg, "eigh", wrong)
    value = eigenvalue_upper(W).value
    assert value >= reference(W) * (1 - 1e-13)
    assert right * (1 - 1e-10) <= value <= right * 10


def test_a_failing_eigensolver_is_survived(monkeypatch):
    def fail(matrix):
        raise torch.linalg.LinAlgError("no convergence")

    W = random((12, 9))
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    assert reference(W) * (1 - 1e-13) <= eigenvalue_upper(W).value <= reference(W) * (1 + 1e-3)


@pytest.mark.parametrize("wrong", ["zero", "noise", "nan", "too large", "always failing"])
def test_a_wrong_factorisation_only_enlarges(monkeypatch, wrong):
    """Blocks after the first are only compared with it; were the factor believed, the larger ones would be lost."""
    cholesky = torch.linalg.cholesky_ex

    def propose(matrix):
        factor, info = cholesky(matrix)
        noise = random(factor.shape, factor.dtype)
        factor = {"zero": 0 * noise, "noise": noise, "nan": factor * math.nan, "too large": factor * 1.1}.get(
            wrong, factor
        )
        return factor, torch.ones_like(info) if wrong == "always failing" else torch.zeros_like(info)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", propose)
    monkeypatch.setattr(hermitian, "rayleigh", lambda gram: -torch.arange(len(gram)))  # the smallest comes first
    W = random((6, 10, 10)) * torch.linspace(1, 2, 6).reshape(6, 1, 1)
    assert reference(W) * (1 - 1e-13) <= eigenvalue_upper(W).value <= reference(W) * (1 + 1e-9)


@pytest.mark.parametrize("factor", [0.5, 1.0 - 1e-6, 1.0, 1.0 + 1e-7, 3.0, math.nan])
def test_a_wrong_lanczos_value_only_enlarges(monkeypatch, factor):
    W = random((24, 20))
    lanczos = hermitian._lanczos
    monkeypatch.setattr(hermitian, "LARGE", 10)
    monkeypatch.setattr(hermitian, "_lanczos", lambda matrix: lanczos(matrix) * factor)
    value = eigenvalue_upper(W).value
    assert reference(W) * (1 - 1e-13) <= value <= reference(W) * max(1 + 1e-9, factor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shortcut", [0.0, 1.0, 30.0])
def test_large_matrices_are_tight_without_eigenvectors(monkeypatch, dtype, shortcut):
    """Also with eigenvalues in a cluster, as an identity shortcut makes them."""

    def fail(gram, error):
        raise AssertionError("the factorisation was enough")

    monkeypatch.setattr(hermitian, "eigenvalue", fail)
    monkeypatch.setattr(hermitian, "LARGE", 60)
    W = shortcut * torch.eye(150, dtype=dtype) + random((150, 150), dtype) / 20
    assert reference(W) * (1 - 1e-13) <= eigenvalue_upper(W).value <= reference(W) * (1 + 1e-9)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), size=st.integers(2, 40), spread=st.sampled_from([0.0, 1e-12, 1e-3, 1.0]))
def test_the_largest_of_a_batch_is_found(seed, size, spread):
    Q = torch.linalg.qr(random((size, 6, 6), seed=seed))[0]  # nearly equal norms are the hard case for the pruning
    W = Q * (1.0 + spread * random((size, 1, 1), seed=seed + 1).abs())
    norms = [reference(block) for block in W]
    for method in METHODS:
        assert max(norms) * (1 - 1e-13) <= method(W).value <= max(norms) * (1 + 1e-4)
    assert eigenvalue_upper(W).value <= max(norms) * (1 + 1e-9)


def test_chunks_do_not_matter(monkeypatch):
    W = random((9, 5, 7))
    whole = eigenvalue_upper(W).value
    monkeypatch.setattr(matrix, "MEMORY", 1)
    assert eigenvalue_upper(W).value == pytest.approx(whole, rel=1e-9) and eigenvalue_upper(W).value >= reference(W)


def test_estimate_is_from_below_and_converges():
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0])).double() @ torch.linalg.qr(random((3, 3)))[0]
    bounds = [spectral_norm_estimate(W, steps) for steps in (1, 2, 5, 100)]
    assert all(b.kind == "estimate" and b.value <= 3.0 * (1 + 1e-12) for b in bounds)
    assert bounds[-1].value == pytest.approx(3.0, rel=1e-12)
    batch = torch.stack([W, 5 * W, 2 * W])
    assert spectral_norm_estimate(batch, 100).value == pytest.approx(15.0, rel=1e-12)


def test_estimate_is_never_trapped_at_zero():
    for seed in range(5):
        one = torch.zeros(40, 40, dtype=torch.float64)
        one[seed, 3 * seed] = 1e-200
        assert spectral_norm_estimate(one, 1).value == pytest.approx(1e-200, rel=1e-12)
    assert spectral_norm_estimate(torch.tensor([[0.0, 0.0], [1.0, -1.0]]), 20).value == pytest.approx(math.sqrt(2))
    assert spectral_norm_estimate(torch.zeros(3, 3), 5).value == 0.0
    with pytest.raises(BoundError, match="step"):
        spectral_norm_estimate(torch.ones(2, 2), 0)


def test_the_random_state_of_the_caller_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    spectral_norm_estimate(random((4, 4)), 3), eigenvalue_upper(random((4, 4)))
    assert torch.equal(torch.rand(1), expected)


def test_examples():
    assert doctest.testmod(matrix).failed == 0


def test_parameters_are_taken_without_a_graph():
    W = torch.nn.Parameter(random((4, 4)))
    assert spectral_norm_upper(W).value >= reference(W) * (1 - 1e-13) and W.grad is None
