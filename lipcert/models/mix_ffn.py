"""Mix-FFN with a Lipschitz estimate: SegFormer's feed-forward network, which knows positions by its convolution.

SegFormer (arXiv 2105.15203, equation 3) has `x + MLP(GELU(conv(MLP(x))))` with a depthwise 3 x 3 convolution between
two pointwise ones. What differs: the two maps before the activation are one operator, bounded as one; MaxMin, which
keeps norms, replaces GELU, whose slope exceeds 1; and the branch joins its input as a mean, `(1 - a) x + a f(x)` with a
learned in (0, 1), no steeper than the steeper of both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lipcert.errors import InputError
from lipcert.layers import MaxMin
from lipcert.layers.power import Segment
from lipcert.models.parts import MeanPart


class LipschitzMixFFN(MeanPart):
    """`(1 - a) x + a W₂ MaxMin(D W₁ x)`, D depthwise 3 x 3: maps (n, dim, h, w) -> the same.

    Estimate: `1 - a + a ‖D W₁‖ ‖W₂‖`. At the start W₁ has orthonormal columns, W₂ orthonormal rows, and D is near the
    identity.

    Args:
        ratio: channels between the two pointwise convolutions, as a multiple of dim; their number must be even.
        start: a before training.
    """

    def __init__(self, in_shape: tuple[int, int, int], *, ratio: int = 2, start: float = 0.2) -> None:
        super().__init__(start)
        dim = in_shape[0]
        hidden = dim * ratio
        if ratio < 1 or hidden % 2:
            raise InputError(f"a Mix-FFN of {dim} channels needs an even number of hidden ones, not {hidden}")
        self.in_shape, self.hidden = in_shape, hidden
        expand = nn.Conv2d(dim, hidden, 1)
        depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.spread, self.activation = nn.Sequential(expand, depthwise), MaxMin()
        self.gather = nn.Conv2d(hidden, dim, 1)
        nn.init.orthogonal_(expand.weight.flatten(1))
        nn.init.orthogonal_(self.gather.weight.flatten(1))
        nn.init.normal_(depthwise.weight, std=0.02)
        with torch.no_grad():
            depthwise.weight[:, 0, 1, 1] += 1.0
        for conv in (expand, depthwise, self.gather):
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.mean(x, self.gather(self.activation(self.spread(x))))

    def segments(self) -> list[Segment]:
        return [(self.spread, self.in_shape), (self.gather, (self.hidden, *self.in_shape[1:]))]

    def lipschitz(self, norms: Sequence[Tensor]) -> Tensor:
        return self.mean(1.0, norms[0] * norms[1])
