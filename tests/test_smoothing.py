"""SegCertify against scipy's own test, Holm's method written out, and a smoothed network that is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from torch import Tensor

from lipcert.smoothing import ABSTAIN, holm, segcertify


def above_half(x: Tensor) -> Tensor:
    """Class 1 where a pixel is above 1/2: smoothed, with probability Φ((x - 1/2) / sigma)."""
    return torch.cat([torch.full_like(x, 0.5), x], dim=1)


@given(st.lists(st.floats(0, 0.1), min_size=1, max_size=12), st.floats(0.001, 0.2))
def test_holm_as_it_is_defined(pvalues: list[float], alpha: float) -> None:
    expected, left = [False] * len(pvalues), sorted(range(len(pvalues)), key=lambda i: pvalues[i])
    while left and pvalues[left[0]] <= alpha / len(left):
        expected[left.pop(0)] = True
    assert holm(pvalues, alpha).tolist() == expected
    bonferroni = np.array(pvalues) <= alpha / len(pvalues)
    assert (holm(pvalues, alpha) >= bonferroni).all()


def test_pvalues_are_those_of_the_binomial_test() -> None:
    image = torch.linspace(0, 1, 12).view(1, 3, 4)
    found = segcertify(above_half, image, sigma=0.3, n0=5, n=40, tau=0.7, seed=3)
    generator = torch.Generator().manual_seed(3)
    torch.randn(5, 1, 3, 4, generator=generator)
    votes = torch.zeros(3, 4)
    for _ in range(4):  # the samples come in batches of ten
        votes += (image + 0.3 * torch.randn(10, 1, 3, 4, generator=generator) > 0.5).sum(0)[0]
    hits = torch.where(torch.from_numpy(found.guess) == 1, votes, 40 - votes)
    for count, p in zip(hits.flatten().tolist(), found.pvalue.ravel(), strict=True):
        assert p == pytest.approx(binomtest(int(count), 40, 0.7, alternative="greater").pvalue, rel=1e-9)
    assert found.radius == pytest.approx(0.3 * norm.ppf(0.7))
    kept = found.predict != ABSTAIN
    assert kept.any() and not kept.all() and (found.predict[kept] == found.guess[kept]).all()


def test_one_wrong_pixel_is_as_rare_as_promised() -> None:
    """Pixels whose probability is tau itself, or just below, must abstain all together but for alpha of the images."""
    tau, sigma, alpha = 0.75, 0.25, 0.1
    edge = 0.5 + sigma * norm.ppf(tau) - 1e-6
    image = torch.full((1, 5, 5), float(edge), dtype=torch.float64)
    wrong = sum(
        segcertify(above_half, image, sigma=sigma, tau=tau, alpha=alpha, seed=seed).abstained < 1 for seed in range(300)
    )
    assert wrong <= 300 * alpha + 4 * math.sqrt(300 * alpha * (1 - alpha))
    # and what is clearly above it is certified
    clear = segcertify(above_half, image + sigma, sigma=sigma, tau=tau, alpha=alpha)
    assert clear.abstained == 0 and (clear.predict == 1).all()


def test_fewer_samples_and_a_higher_tau_abstain_more() -> None:
    image = torch.linspace(0, 1, 64).view(1, 8, 8)
    shares = [segcertify(above_half, image, n=n, tau=tau).abstained for n, tau in ((500, 0.6), (100, 0.6), (100, 0.9))]
    assert shares[0] < shares[1] < shares[2]
    assert segcertify(above_half, image, n=20, tau=0.9).abstained == 1  # 0.9^20 = 0.12: too few to show anything
    again = [segcertify(above_half, image, seed=5, batch_size=size).predict for size in (10, 10, 7)]
    assert (again[0] == again[1]).all() and again[2].shape == (8, 8)


@pytest.mark.parametrize("wrong", [dict(tau=0.4), dict(tau=1.0), dict(alpha=0.0), dict(sigma=0.0), dict(n0=0)])
def test_parameters_that_prove_nothing_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="tau must be in"):
        segcertify(above_half, torch.zeros(1, 2, 2), **wrong)
