"""Random networks of the worst numbers: huge, tiny, denormal, cancelling, nearly equal; against rational arithmetic.

Whatever happens inside, a radius above zero must be true: of the network in rational arithmetic, and of the program
that runs in float64 or float32, in several orders of summation and with denormal numbers flushed to zero.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_floating_point import dense, exactly, ours, winner, within
from torch import Tensor, nn

from lipcert.bounds import BoundError
from lipcert.bounds.audit import _differences
from lipcert.bounds.matrix import spectral_norm_upper
from lipcert.certify import Row, radii_from_margins
from lipcert.errors import InputError

SCALES = (0, 0, 0, 1, -1, 30, -30, 100, -100, 118, -126, -140, 498, -498, 900, -900, -1060)  # of two; 1e±30, 1e±150
EXAMPLES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)

unit = st.floats(0.0, 1.0, allow_subnormal=False).map(lambda v: float(np.float32(v)))
any_float = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def matrices(draw: st.DrawFn, rows: int, columns: int, scale: int) -> list[list[float]]:
    """Draw entries of about 2^scale, some of them far away, zero or copies; then perhaps rows that nearly cancel."""
    entries = st.floats(-4.0, 4.0).map(lambda v: float(np.float32(v)))
    made = [[math.ldexp(draw(entries), scale) for _ in range(columns)] for _ in range(rows)]
    for row in made:
        what = draw(st.sampled_from(["", "", "", "zero", "mixed", "tiny"]))
        place = draw(st.integers(0, columns - 1))
        if what == "zero":
            row[:] = [0.0] * columns
        elif what == "mixed":
            row[place] = math.ldexp(row[place], draw(st.sampled_from([-60, -24, 24, 60])))
        elif what == "tiny":
            row[place] = draw(st.sampled_from([5e-324, 1e-310, 2.0**-126, 2.0**-149, -(2.0**-1022)]))
    if rows > 1 and draw(st.booleans()):
        almost = 1.0 + draw(st.sampled_from([0.0, 2.0**-52, 2.0**-30, 2.0**-23, 2.0**-10]))
        made[1] = [value * almost for value in made[0]]
    return made


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Sequential, list[float]]:
    """Draw two layers with or without ReLU between them, whose scales may undo each other, and an input in [0, 1]."""
    inner, width, classes = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(2, 3))
    first = draw(st.sampled_from(SCALES))
    second = draw(st.sampled_from([-first, -first, *SCALES]))
    bias = draw(st.sampled_from([0.0, 1.0, 2.0**25, 2.0**-30]))
    shift = [bias * draw(st.sampled_from([-1.0, 0.0, 0.5, 1.0])) * 2.0 ** min(first, 900) for _ in range(width)]
    head = draw(matrices(classes, width, second))
    ends = [draw(st.sampled_from([0.0, 0.0, 0.25, 1.0, 2.0**-30, -(2.0**25)])) for _ in range(classes)]
    x = [draw(unit) for _ in range(inner)]
    layers: list[nn.Module] = [dense(draw(matrices(width, inner, first)), shift)]
    if draw(st.booleans()):
        layers.append(nn.ReLU())
    made = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    assume(all(bool(weight.isfinite().all()) for weight in made))
    return nn.Sequential(*layers, dense(head, ends)), x


@st.composite
def traps(draw: st.DrawFn) -> tuple[nn.Sequential, list[float]]:
    """Draw networks without biases that float32 cannot hold though their logits are harmless.

    Either the second weights are denormal and undo a large first layer, or the products overflow and cancel.
    """
    overflow = draw(st.booleans())
    first = draw(st.integers(60, 66)) if overflow else draw(st.integers(90, 118))
    second = draw(st.integers(60, 66)) if overflow else draw(st.integers(-149, -140))
    diagonal = [[math.ldexp(1.0, first) * (i == j) for j in range(2)] for i in range(2)]
    a, b = (math.ldexp(draw(st.integers(1, 31)) / 8, second) for _ in range(2))
    x = draw(unit)
    head = [[a, -a], [0.0, 0.0]] if overflow else [[a, 0.0], [b, 0.0]]
    x = [x, x * (1 - 2.0 ** -draw(st.integers(8, 16)))]
    return nn.Sequential(dense(diagonal), dense(head)), x


def certified(network: nn.Sequential, x: list[float], precision: str) -> Row | None:
    """Return what is certified, None where nothing is: an error, or a radius of zero."""
    try:
        row = ours(network, x, precision)
    except (BoundError, InputError):
        return None
    assert math.isfinite(row.radius) and row.radius >= 0
    return row if row.radius > 0 else None


def gradients(network: nn.Sequential, x: list[Fraction]) -> list[list[Fraction]]:
    """Return the exact Jacobian in the region of x."""
    rows = [[Fraction(int(i == j)) for j in range(len(x))] for i in range(len(x))]  # of the value, by input
    values = x
    for layer in network:
        if isinstance(layer, nn.Linear):
            weight = [[Fraction(w) for w in row] for row in layer.weight.tolist()]
            rows = [
                [sum((w * r[k] for w, r in zip(row, rows, strict=True)), Fraction(0)) for k in range(len(x))]
                for row in weight
            ]
        else:
            rows = [row if value > 0 else [Fraction(0)] * len(x) for row, value in zip(rows, values, strict=True)]
        values = exactly(nn.Sequential(layer), values)
    return rows


def towards(network: nn.Sequential, x: list[float], label: int) -> Iterator[list[Fraction]]:
    """Yield points just beyond where the region of x says that another class wins, and corners of the domain."""
    start = [Fraction(v) for v in x]
    logits, slopes = exactly(network, start), gradients(network, start)
    for other in range(len(logits)):
        direction = [a - b for a, b in zip(slopes[label], slopes[other], strict=True)]
        squared = sum(d * d for d in direction)
        if other != label and squared:
            t = (logits[label] - logits[other]) / squared * (1 + Fraction(1, 1 << 30))
            yield [v - t * d for v, d in zip(start, direction, strict=True)]
    yield from ([Fraction(c) for c in corner] for corner in itertools.product((0, 1), repeat=len(x)))


@EXAMPLES
@given(networks())
def test_no_radius_is_false_in_real_arithmetic(problem: tuple[nn.Sequential, list[float]]) -> None:
    network, x = problem
    row = certified(network, x, "float64")
    if row is None:
        return
    assert winner(exactly(network, [Fraction(v) for v in x])) == row.predict
    for point in towards(network, x, row.predict):
        if within([Fraction(v) for v in x], point, row.radius) and all(0 <= v <= 1 for v in point):
            assert winner(exactly(network, point)) == row.predict
    if not any(isinstance(layer, nn.ReLU) for layer in network):  # linear: then the exact distances are known
        start = [Fraction(v) for v in x]
        logits, slopes = exactly(network, start), gradients(network, start)
        for other in set(range(len(logits))) - {row.predict}:
            squared = sum((a - b) ** 2 for a, b in zip(slopes[row.predict], slopes[other], strict=True))
            assert Fraction(row.radius) ** 2 * squared <= (logits[row.predict] - logits[other]) ** 2


@contextlib.contextmanager
def flushing(wanted: bool) -> Iterator[None]:
    torch.set_flush_denormal(wanted)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def sequential(network: nn.Sequential, x: Tensor, order: np.random.Generator) -> Tensor:
    """Evaluate in the type of x, every inner product term by term in a random order, the bias at a random place."""
    values = x.numpy()
    for layer in network:
        if not isinstance(layer, nn.Linear):
            values = np.maximum(values, values.dtype.type(0))
            continue
        weight = layer.weight.to(x.dtype).numpy()
        sums = np.zeros((len(values), len(weight)), dtype=values.dtype)
        terms = [values[:, None, k] * weight[None, :, k] for k in range(weight.shape[1])]
        terms.append(np.broadcast_to(layer.bias.to(x.dtype).numpy(), sums.shape))
        for k in order.permutation(len(terms)):
            sums = sums + terms[k]
        values = sums
    return torch.from_numpy(values)


@EXAMPLES
@given(st.one_of(networks(), traps()), st.sampled_from(["float64 program", "float32"]), st.integers(0, 2**32 - 1))
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_no_radius_is_false_for_a_program(
    problem: tuple[nn.Sequential, list[float]], precision: str, seed: int
) -> None:
    network, x = problem
    row = certified(network, x, precision)
    if row is None:
        return
    dtype = torch.float32 if precision == "float32" else torch.float64
    generator, order = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    centre = torch.tensor([x], dtype=torch.float64)
    steps = torch.randn(8, len(x), generator=generator, dtype=torch.float64)
    points = centre + row.radius * 0.99 * steps / steps.norm(dim=1, keepdim=True)
    beyond = [[float(v) for v in point] for point in towards(network, x, row.predict) if max(map(abs, point)) < 10]
    nearer = [
        centre + (torch.tensor([p]) - centre) * min(1.0, 0.99 * row.radius / max(1e-300, math.dist(x, p)))
        for p in beyond
    ]
    points = torch.cat([centre, points, *nearer]).clamp(0.0, 1.0).to(dtype)
    points = points[(points.double() - centre).norm(dim=1) < row.radius]
    plain = copy.deepcopy(network).to(dtype)
    for flush in (False, True):
        with flushing(flush), torch.no_grad():
            found = [plain(points), torch.cat([plain(p) for p in points.split(1)]), sequential(network, points, order)]
        for logits in found:
            others = logits.clone()
            others[:, row.predict] = -math.inf
            assert bool((logits[:, row.predict] > others.amax(1)).all()), (precision, flush, row)


def test_the_random_networks_are_not_all_given_up() -> None:
    """Else the two tests above would hold of a certifier that never certifies."""
    counts = dict.fromkeys(("float64", "float64 program", "float32"), 0)

    @settings(max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(networks())
    def count(problem: tuple[nn.Sequential, list[float]]) -> None:
        for precision in counts:
            counts[precision] += certified(*problem, precision) is not None

    count()
    assert counts["float64"] >= counts["float64 program"] >= counts["float32"] >= 4


# ------------------------------------------------------------------------------------------------------------- pieces


def positive_semidefinite(matrix: list[list[Fraction]]) -> bool:
    """Return whether all principal minors of a small matrix are nonnegative."""
    size = range(len(matrix))

    def minor(index: tuple[int, ...]) -> Fraction:
        if not index:
            return Fraction(1)
        first, rest = index[0], index[1:]
        return sum(
            (
                (-1) ** k * matrix[first][index[k]] * _determinant(matrix, rest, index[:k] + index[k + 1 :])
                for k in range(len(index))
            ),
            Fraction(0),
        )

    return all(minor(index) >= 0 for n in range(1, len(matrix) + 1) for index in itertools.combinations(size, n))


def _determinant(matrix: list[list[Fraction]], rows: tuple[int, ...], columns: tuple[int, ...]) -> Fraction:
    if not rows:
        return Fraction(1)
    return sum(
        (
            (-1) ** k * matrix[rows[0]][columns[k]] * _determinant(matrix, rows[1:], columns[:k] + columns[k + 1 :])
            for k in range(len(columns))
        ),
        Fraction(0),
    )


@settings(max_examples=150, deadline=None)
@given(
    st.data(), st.integers(1, 3), st.integers(1, 3), st.sampled_from(SCALES), st.sampled_from(["eigenvalue", "gram"])
)
def test_norms_of_the_worst_matrices_are_proved(data, rows: int, columns: int, scale: int, method: str) -> None:
    entries = data.draw(matrices(rows, columns, scale))
    weight = torch.tensor(entries, dtype=torch.float64)
    bound = spectral_norm_upper(weight, method)
    if math.isinf(bound.value):
        assert bool((weight.abs() > 1e150).any())
        return
    exact = [[Fraction(v) for v in row] for row in entries]
    gram = [[sum((row[i] * row[j] for row in exact), Fraction(0)) for j in range(columns)] for i in range(columns)]
    square = Fraction(bound.value) ** 2
    assert positive_semidefinite([[square * (i == j) - gram[i][j] for j in range(columns)] for i in range(columns)])


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 4), st.sampled_from(SCALES))
def test_distances_of_the_worst_rows_are_proved(data, columns: int, scale: int) -> None:
    entries = data.draw(matrices(3, columns, scale))
    found = _differences(torch.tensor(entries, dtype=torch.float64)).tolist()
    for i, j in itertools.permutations(range(3), 2):
        squared = sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(entries[i], entries[j], strict=True))
        assert math.isinf(found[i][j]) or Fraction(found[i][j]) ** 2 >= squared


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(2, 4))
def test_radii_from_any_floats_are_never_too_large(data, classes: int) -> None:
    """Subnormal numbers, overflows and near ties included; `parts` alone may be smaller than 2E."""
    small = st.floats(0.0, allow_infinity=False)
    near = data.draw(any_float)
    logits = [data.draw(any_float | st.just(near) | st.just(math.nextafter(near, 0.0))) for _ in range(classes)]
    error, before, since = (data.draw(small | st.just(0.0)) for _ in range(3))
    constants, distances = ([[data.draw(small) for _ in range(classes)] for _ in range(classes)] for _ in range(2))
    tensors = [torch.tensor(v, dtype=torch.float64) for v in ([logits], [error], constants)]
    parts = tuple(torch.tensor(v, dtype=torch.float64) for v in ([before], distances, [since]))
    for given_parts in (None, parts):
        predict, radius, _ = radii_from_margins(*tensors, parts=given_parts)
        y = int(predict[0])
        if not radius[0] > 0:
            continue
        for j in set(range(classes)) - {y}:
            doubt = 2 * Fraction(error)
            if given_parts is not None:
                root = Fraction(math.isqrt(2 << 200), 1 << 100)  # below √2 by less than 2^-100
                doubt = min(doubt, Fraction(before) * Fraction(distances[y][j]) + root * Fraction(since))
            gap = Fraction(logits[y]) - Fraction(logits[j]) - doubt
            assert gap > 0 and Fraction(radius[0]) * Fraction(constants[y][j]) <= gap
