"""How many pixels can change: exact against all subsets, attained by the identity, never broken by an attack."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipcert.flips import flip_radii, most_flips, most_lost

# small integers: every sum of squares is exact, so that counts must agree to the pixel, ties included
DISTANCES = st.lists(st.integers(0, 8), min_size=1, max_size=7)
EPS = st.integers(0, 20)


def subsets(n: int) -> list[tuple[int, ...]]:
    return [chosen for size in range(n + 1) for chosen in combinations(range(n), size)]


@given(DISTANCES, EPS, st.integers(1, 3), st.integers(1, 3))
def test_count_is_the_best_of_all_subsets(distances: list[int], eps: int, joint: int, pixel: int) -> None:
    allowed = [
        len(chosen)
        for chosen in subsets(len(distances))
        if sum(distances[i] ** 2 for i in chosen) <= (joint * eps) ** 2
        and all(distances[i] <= pixel * eps for i in chosen)
    ]
    exact = max(allowed)
    found = most_flips(np.array(distances, dtype=float), eps, joint, pixel)
    # rounding may only count a set as affordable that is not, and only by 1e-14: never here, where costs are integers
    assert found == exact


@given(
    st.lists(st.floats(0, 1e3, allow_subnormal=False), min_size=1, max_size=30),
    st.floats(0, 1e3, allow_subnormal=False),
    st.floats(0.01, 10),
)
def test_rounding_only_ever_counts_more(distances: list[float], eps: float, joint: float) -> None:
    budget, spent, exact, almost = (Fraction(joint) * Fraction(eps)) ** 2, Fraction(0), 0, 0
    for distance in sorted(distances):
        spent += Fraction(distance) ** 2
        exact += spent <= budget
        almost += spent <= budget * (1 + Fraction(1, 10**13)) + Fraction(1, 10**290)
    assert exact <= most_flips(np.array(distances), eps, joint) <= almost


@given(DISTANCES, st.integers(1, 3), st.integers(1, 3))
def test_radii_are_where_the_count_grows(distances: list[int], joint: int, pixel: int) -> None:
    d = np.array(distances, dtype=float)
    radius = flip_radii(d, joint, pixel)
    assert (np.diff(radius) >= 0).all()
    for k, r in enumerate(radius, start=1):
        if r > 0:
            assert most_flips(d, r * (1 - 1e-9), joint, pixel) < k
        assert most_flips(d, r * (1 + 1e-9), joint, pixel) >= k


@given(DISTANCES, st.data(), EPS)
def test_values_are_bounded_by_their_relaxation(distances: list[int], data: st.DataObject, eps: int) -> None:
    """Brute force ≤ ours ≤ linear relaxation, solved exactly, to rounding."""
    values = data.draw(st.lists(st.integers(0, 5), min_size=len(distances), max_size=len(distances)))
    best = max(
        sum(values[i] for i in chosen)
        for chosen in subsets(len(distances))
        if sum(distances[i] ** 2 for i in chosen) <= eps**2
    )
    found = most_lost(np.array(distances, dtype=float), np.array(values, dtype=float), eps, 1.0)
    within = [(Fraction(distances[i] ** 2), Fraction(values[i])) for i in range(len(values)) if distances[i] <= eps]
    rest, relaxed = Fraction(eps**2), Fraction(0)
    for cost, value in sorted(within, key=lambda item: item[1] / item[0] if item[0] else Fraction(10**9), reverse=True):
        part = min(Fraction(1), rest / cost) if cost else Fraction(1)
        relaxed, rest = relaxed + part * value, rest - part * cost
    assert best <= found <= float(relaxed) * (1 + 1e-9) + 1e-12


@given(DISTANCES, EPS)
def test_equal_values_lose_less_than_one_more_than_the_count(distances: list[int], eps: int) -> None:
    d = np.array(distances, dtype=float)
    count = most_flips(d, eps, 1.0)
    assert count <= most_lost(d, np.ones(len(d)), eps, 1.0) < count + 1 + 1e-9


def test_values_with_many_pixels_are_never_below_the_exact_optimum() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        d = generator.exponential(size=200) * 10.0 ** generator.integers(-5, 5)
        v = generator.exponential(size=200)
        eps = float(np.sqrt((np.sort(d)[: generator.integers(1, 200)] ** 2).sum()))
        order = np.argsort(-v / d**2)
        rest, relaxed = Fraction(eps) ** 2, Fraction(0)
        for i in order:
            if d[i] > eps:
                continue
            part = min(Fraction(1), rest / Fraction(d[i]) ** 2)
            relaxed, rest = relaxed + part * Fraction(v[i]), rest - part * Fraction(d[i]) ** 2
        found = most_lost(d, v, eps, 1.0)
        assert relaxed <= Fraction(found) <= relaxed * (1 + Fraction(1, 10**9))


def test_a_sum_that_equals_the_budget_is_affordable() -> None:
    assert most_flips(np.array([3.0, 4.0]), eps=5.0, joint=1.0) == 2
    assert most_flips(np.array([3.0, 4.0]), eps=np.nextafter(5.0, 0) * (1 - 1e-14), joint=1.0) == 1
    # 0.1 has no binary form: the exact sum of a hundred squares is above the budget, by less than can be told apart
    assert most_flips(np.full(100, 0.1), eps=1.0, joint=1.0) == 100


def test_ties_are_free_and_infinite_distances_are_never_crossed() -> None:
    d = np.array([0.0, 0.0, 1e-200, np.inf])
    assert most_flips(d, eps=0.0, joint=1.0) == 2
    assert most_flips(d, eps=1e300, joint=1.0) == 3 or most_flips(d, eps=1e300, joint=1.0) == 4
    assert most_flips(d, eps=1e100, joint=1.0) == 3
    assert flip_radii(d, 1.0)[:2].tolist() == [0, 0] and flip_radii(d, 1.0)[3] > 1e300
    assert most_flips(np.ones(3), eps=1.0, joint=np.inf) == 3
    assert most_flips(np.ones(3), eps=1.0, joint=0.0) == 0
    assert most_flips(np.array([]), eps=1.0, joint=1.0) == 0 == most_lost(np.array([]), np.array([]), 1.0, 1.0)


def test_a_million_pixels_lose_next_to_nothing_to_rounding() -> None:
    d = np.random.default_rng(0).random(10**6) + 0.5
    k = 500_000
    eps = np.sqrt(float(np.sum(np.sort(d)[:k].astype(np.longdouble) ** 2)))
    assert k <= most_flips(d, eps * (1 + 1e-12), 1.0) <= k + 1
    radius = flip_radii(d, 1.0)[k - 1]
    assert eps * (1 - 1e-9) <= radius <= eps * (1 + 1e-15)


def test_together_is_never_worse_than_alone() -> None:
    generator = np.random.default_rng(0)
    for _ in range(100):
        d, eps = generator.exponential(size=40), generator.exponential()
        together, alone = most_flips(d, eps, 2.0), int((d <= 2.0 * eps).sum())
        both = most_flips(d, eps, 2.0, 0.7)
        assert both <= together <= alone and both <= int((d <= 0.7 * eps).sum())


@pytest.mark.parametrize(
    "wrong", [dict(eps=-1.0), dict(joint=np.nan), dict(pixel=-0.1), dict(distance=np.array([-1.0]))]
)
def test_impossible_numbers_are_refused(wrong: dict) -> None:
    arguments = {**dict(distance=np.ones(2), eps=1.0, joint=1.0), **wrong}
    with pytest.raises(ValueError, match="at least 0"):
        most_flips(**arguments)
    with pytest.raises(ValueError, match="at least 0"):
        most_lost(value=np.array([1.0, -1.0]), **{**arguments, "distance": np.ones(2)})
