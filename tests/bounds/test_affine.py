"""The algebra of affine maps against their matrices, entry by entry; norms against the SVD of the matrix."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from dense import dense
from hypothesis import given, settings
from hypothesis import strategies as st

from lipcert.bounds.affine import LARGEST, AffineMap, add, compose, identity, pointwise, segment_bound, stack


def norm(matrix):
    return float(np.linalg.svd(matrix, compute_uv=False)[0]) if matrix.any() else 0.0


@st.composite
def maps(draw, c_in=None, n=None, c_out=None, out=None, plain=False):
    """Draw a map; `plain` ones are stride 1 onto their own grid, so that they add."""
    c_in = c_in or draw(st.sampled_from([1, 2, 4]))
    c_out = c_out or draw(st.sampled_from([1, 2, 4]))
    n = n or (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    groups = draw(st.sampled_from([g for g in (1, 2, 4) if c_in % g == 0 and c_out % g == 0]))
    stride = (1, 1) if plain else (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    wrap = (draw(st.booleans()), draw(st.booleans()))
    out = out or (n if plain else (draw(st.integers(1, 5)), draw(st.integers(1, 5))))
    reach = st.tuples(st.integers(-2, 2), st.integers(-2, 2))
    shifts = tuple(draw(st.lists(reach, min_size=1, max_size=3, unique=True)))
    if draw(st.booleans()):
        shifts = ((0, 0),)
    seed = draw(st.integers(0, 2**16))
    taps = torch.randn(len(shifts), groups, c_out // groups, c_in // groups, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(seed))  # fmt: skip
    if draw(st.booleans()):
        taps = taps.round().clamp(0, 1)
    return AffineMap(taps, shifts, n, out, stride=stride, wrap=wrap)


@st.composite
def pairs(draw):
    first = draw(maps())
    return draw(maps(c_in=first.c_out, n=first.out)), first


@settings(max_examples=120)
@given(pairs())
def test_composition_is_the_product_of_the_matrices(pair):
    second, first = pair
    fused = compose(second, first)
    if fused is not None:
        exact = dense(second) @ dense(first)
        assert torch.allclose(dense(fused), exact, rtol=0, atol=1e-12)
        assert norm(dense(fused) - exact) <= fused.error + 1e-15


@settings(max_examples=80)
@given(st.data())
def test_sums_and_stacks_are_those_of_the_matrices(data):
    a = data.draw(maps(plain=True))
    b = data.draw(maps(c_in=a.c_in, n=a.n, c_out=a.c_out, plain=True))
    total = add(a, b)
    if total is not None:
        assert torch.allclose(dense(total), dense(a) + dense(b), rtol=0, atol=1e-13)
        assert norm(dense(total) - (dense(a) + dense(b))) <= total.error + 1e-15
    joined = stack([a, b])
    if joined is not None:
        assert torch.equal(dense(joined), torch.cat([dense(a), dense(b)]))
    if a.wrap == b.wrap:
        assert total is not None and joined is not None


@settings(max_examples=50)
@given(maps())
def test_the_norm_of_a_map_is_bounded_and_tight_enough(m):
    exact = norm(dense(m))
    bound = segment_bound(m)
    assert exact <= bound.value * (1 + 1e-12) and bound.kind == "upper"
    assert exact <= m.magnitude * (1 + 1e-12)
    assert bound.value <= m.magnitude
    if m.wrap == (False, False) and m.stride == (1, 1):
        assert bound.value <= exact * (1 + 1e-9)  # maps this small are bounded by their matrix


@settings(max_examples=30)
@given(maps(), st.integers(0, 1000))
def test_rows_scaling_and_regrouping_are_those_of_the_matrix(m, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, m.c_out, (5,), generator=generator)
    factors = torch.randn(m.c_out, generator=generator, dtype=torch.float64)
    blocks = dense(m).reshape(m.c_out, -1)
    assert torch.equal(dense(m.rows(index)).reshape(5, -1), blocks[index])
    scaled = m.scaled(factors)
    assert torch.allclose(dense(scaled).reshape(m.c_out, -1), factors[:, None] * blocks, rtol=0, atol=1e-14)
    assert torch.equal(dense(m.regrouped(1)), dense(m))
    assert torch.equal(dense(m.regrouped(1).untangled()), dense(m))


def kernel(*taps, c=2, n=(6, 6), wrap=(False, False), seed=0):
    values = torch.randn(len(taps), 1, c, c, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return AffineMap(values, taps, n, n, wrap=wrap)


SQUARE = tuple(itertools.product((-1, 0, 1), (-1, 0, 1)))


def test_which_maps_fuse():
    """The table of classes: pointwise with everything, periodic with periodic, zero-padded with zero-padded never."""
    zeros, ring = kernel(*SQUARE), kernel(*SQUARE, wrap=(True, True))
    point = pointwise(torch.randn(2, 2, dtype=torch.float64), (6, 6))
    assert compose(zeros, point) and compose(point, zeros) and compose(ring, point) and compose(point, ring)
    assert compose(ring, ring).wrap == (True, True)
    assert compose(zeros, zeros) is None and compose(zeros, ring) is None and compose(ring, zeros) is None
    assert add(zeros, point) and add(ring, point) and add(zeros, ring) is None
    assert add(ring, point).wrap == (True, True)


def test_truncations_that_lose_nothing_fuse():
    """A crop followed by zero padding is a shift; a periodic pad before a valid convolution is a ring."""
    crop = replace(identity(2, (6, 6)), shifts=((1, 0),), out=(5, 6))
    pad = replace(identity(2, (5, 6)), out=(6, 6))
    shift = compose(pad, crop)
    assert shift is not None and shift.shifts == ((1, 0),) and shift.out == (6, 6)
    assert torch.equal(dense(shift), dense(pad) @ dense(crop))
    other = replace(pad, shifts=((-1, 0),))  # padding on the other side puts the crop back in its place: a mask
    assert compose(other, crop) is None
    around = replace(identity(2, (6, 6)), shifts=((-1, -1),), out=(8, 8), wrap=(True, True))
    valid = replace(kernel(*itertools.product((0, 1, 2), (0, 1, 2)), n=(8, 8)), out=(6, 6))
    ring = compose(valid, around)
    assert ring is not None and ring.wrap == (True, True) and ring.out == ring.n == (6, 6)
    assert torch.allclose(dense(ring), dense(valid) @ dense(around))


def test_the_norm_of_a_periodic_residual_is_exact():
    ring = kernel(*SQUARE, wrap=(True, True), c=3)
    block = add(identity(3, (6, 6)), ring.scaled(torch.tensor([0.3])))
    exact = norm(dense(block))
    assert exact <= segment_bound(block).value <= exact * (1 + 1e-8)


def test_padding_by_copies_counts_the_copies():
    around = replace(identity(1, (4, 4)), shifts=((-1, -1),), out=(6, 6), wrap=(True, True))
    assert segment_bound(around).value == 2.0
    assert norm(dense(around)) == pytest.approx(2.0)


def test_the_error_of_the_kernel_is_added():
    m = replace(identity(2, (3, 3)), error=0.5)
    assert segment_bound(m).value == 1.5
    assert segment_bound(replace(m, taps=m.taps * 0)).value == 0.5


def test_composition_errors_cover_ill_conditioned_products():
    """The exact product, in rational arithmetic, lies within `error` of the stored one."""
    from fractions import Fraction

    generator = torch.Generator().manual_seed(3)
    a, b = (
        torch.randn(6, 6, generator=generator, dtype=torch.float64) * 10.0 ** torch.arange(-9, 9, 3)[:, None]
        for _ in "ab"
    )
    fused = compose(pointwise(a, (1, 1)), pointwise(b, (1, 1)))
    worst = 0.0
    for i, j in itertools.product(range(6), range(6)):
        exact = sum((Fraction(float(a[i, k])) * Fraction(float(b[k, j])) for k in range(6)), Fraction(0))
        worst += float(exact - Fraction(float(fused.taps[0, 0, i, j]))) ** 2
    assert 0.0 < math.sqrt(worst) <= fused.error


def test_selections_compose_without_any_error():
    pick = AffineMap(torch.eye(4, dtype=torch.float64)[[2, 0]][None, None], ((0, 0),), (3, 3), (3, 3))
    m = kernel(*SQUARE, c=4, n=(3, 3))
    assert pick.selection and compose(pick, m).error == 0.0
    assert m.scaled(torch.tensor([0.5, -2.0, 1.0, 0.0])).error == 0.0  # powers of two
    assert m.scaled(torch.tensor([0.3])).error > 0.0


def test_a_kernel_that_would_be_too_large_does_not_fuse():
    c = 64
    window = AffineMap(
        torch.ones(c * c, c, 1, 1, dtype=torch.float64), tuple(itertools.product(range(c), range(c))), (c, c), (1, 1)
    )
    mixing = pointwise(torch.randn(c, c, dtype=torch.float64), (c, c))
    assert c * c * c * c >= LARGEST and compose(window, identity(c, (c, c))) is window
    small = replace(window, taps=window.taps, shifts=window.shifts)
    assert (compose(small, mixing) is None) == (c**4 > LARGEST)
