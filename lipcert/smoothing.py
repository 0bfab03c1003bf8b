"""SegCertify, the probabilistic baseline for segmentation: which pixels keep their class under Gaussian noise, and how
surely (Fischer, Baader, Vechev, "Scalable Certified Segmentation via Randomized Smoothing", ICML 2021, 2107.00228).

What is certified is not the network but its smoothed version, the class that the network gives a pixel most often when
noise N(0, sigma²) is added to the image. n0 samples guess that class, n more count it, and a binomial test asks whether
its probability is above tau; then no perturbation of norm less than sigma·Φ⁻¹(tau) changes it (Cohen, Rosenfeld, Kolter
2019). By Holm's correction the statement holds for all pixels that do not abstain together, with probability 1 - alpha,
whatever the dependence between them.

This differs from `lipcert.segment` in kind: it may be wrong with probability alpha, costs n0 + n evaluations an image,
each prediction of the smoothed network costs as many again, its noise is only as Gaussian as floats are, and pixels
that abstain have no class, so that its intersection over union is no bound under attack (docs/segmentation.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom, norm
from torch import Tensor

ABSTAIN = -1


@dataclass(frozen=True)
class Smoothed:
    """The certificate of one image: with probability 1 - alpha, all but the abstaining pixels keep `predict`."""

    predict: NDArray[np.int64]  # (h, w), ABSTAIN where nothing is certified
    guess: NDArray[np.int64]  # (h, w), the class that was tested
    pvalue: NDArray[np.float64]  # (h, w), of one pixel, before the correction
    radius: float
    alpha: float

    @property
    def abstained(self) -> float:
        return float((self.predict == ABSTAIN).mean())


def segcertify(
    model: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    sigma: float = 0.25,
    n0: int = 10,
    n: int = 100,
    tau: float = 0.75,
    alpha: float = 0.001,
    batch_size: int = 10,
    seed: int = 0,
) -> Smoothed:
    """Certify the smoothed network at one image (c, h', w'); `model` maps a batch to logits (m, k, h, w).

    Samples are drawn on the CPU from `seed` and depend on nothing else. Raises ValueError for a tau outside [1/2, 1),
    an alpha outside (0, 1), a sigma that is not positive, and fewer than one sample.

    >>> model = torch.nn.Conv2d(1, 2, 1, bias=False)
    >>> model.weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    >>> found = segcertify(model, torch.tensor([[[0.9, 0.5, 0.0]]]))
    >>> found.predict.tolist(), round(found.radius, 4)
    ([[0, 0, -1]], 0.1686)
    """
    if not 0.5 <= tau < 1 or not 0 < alpha < 1 or not 0 < sigma < math.inf or min(n0, n, batch_size) < 1:
        raise ValueError(
            f"tau must be in [1/2, 1), alpha in (0, 1), sigma positive and the numbers of samples at least 1; got "
            f"{tau}, {alpha}, {sigma}, {n0} and {n}"
        )
    generator = torch.Generator().manual_seed(seed)
    guess = _counts(model, image, sigma, n0, batch_size, generator).argmax(dim=0)  # (h, w)
    hits = _counts(model, image, sigma, n, batch_size, generator).gather(0, guess[None])[0]
    pvalue = binom.sf(hits.numpy() - 1, n, tau)  # P(at least so many | probability tau)
    rejected = holm(pvalue.ravel(), alpha).reshape(pvalue.shape)
    predict = np.where(rejected, guess.numpy(), ABSTAIN)
    return Smoothed(predict, guess.numpy(), pvalue, float(sigma * norm.ppf(tau)), alpha)


def holm(pvalues: ArrayLike, alpha: float) -> NDArray[np.bool_]:
    """Return which hypotheses (m,) Holm's step-down method rejects, so that one is wrongly with probability ≤ alpha.

    >>> holm([0.01, 0.04, 0.02, 0.005], 0.05).tolist()
    [True, True, True, True]
    >>> holm([0.02, 0.03, 0.02], 0.05).tolist()
    [False, False, False]
    """
    p = np.asarray(pvalues, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    holds = p[order] <= alpha / np.arange(len(p), 0, -1)
    rejected = np.zeros(len(p), dtype=np.bool_)
    rejected[order[: len(p) if holds.all() else int(np.argmin(holds))]] = True
    return rejected


def _counts(
    model: Callable[[Tensor], Tensor], image: Tensor, sigma: float, n: int, batch_size: int, generator: torch.Generator
) -> Tensor:
    """Return how often each class was predicted under noise: (k, h, w) int64 on the CPU."""
    counts: Tensor | None = None
    with torch.no_grad():
        for noise in _noise(image, n, batch_size, generator):
            logits = model(image[None] + sigma * noise)
            votes = torch.zeros_like(logits, dtype=torch.int64).scatter_(1, logits.argmax(1, keepdim=True), 1).sum(0)
            counts = votes if counts is None else counts + votes
    assert counts is not None  # n ≥ 1
    return counts.cpu()


def _noise(image: Tensor, n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    for first in range(0, n, batch_size):
        size = (min(batch_size, n - first), *image.shape)
        yield torch.randn(size, generator=generator, dtype=image.dtype).to(image.device)
