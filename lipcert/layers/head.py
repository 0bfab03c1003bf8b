"""Last-layer normalisation: a linear head whose rows have unit norm (Singla, Singla, Feizi, ICLR 2022, arXiv
2108.04062).

Every logit is then exactly as steep as the features, and no class buys margin with a longer row. Certificates use
the pairwise distances of the rows, which are at most 2 and usually near sqrt(2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.layers.derived import DerivedLinear
from lipcert.layers.precision import own_precision


class NormalizedLinear(DerivedLinear):
    """Linear layer with l2-normalised rows; the raw parameter is `raw` (out, in), the effective one the property
    `weight`."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        nn.init.orthogonal_(self.raw)

    @property
    def weight(self) -> Tensor:  # (out, in), rows of norm 1 (0 where the raw row is 0)
        with own_precision(self.raw):
            return F.normalize(self.raw, dim=1, eps=torch.finfo(self.raw.dtype).tiny)


def pairwise_distances(weight: Tensor) -> Tensor:
    """Return `||w_i - w_j||` for the rows of a head, (K, d) -> (K, K), differentiable also on the diagonal.

    The distances of *differences*, not of a Gram matrix: equal rows give exactly 0.
    """
    with own_precision(weight):
        difference = weight[:, None] - weight[None]  # (K, K, d)
        return torch.linalg.vector_norm(difference, dim=2)
