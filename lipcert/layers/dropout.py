"""Dropout and stochastic depth. In evaluation mode both are identities: their Lipschitz factor there is 1, never 1 - p.

PyTorch scales *while training* (by 1/(1-p)), so that nothing is left to do at inference. Published code multiplies
Lipschitz bounds by 1-p at evaluation all the same; that factor belongs to no network anybody runs.
"""

from __future__ import annotations

from torch import Tensor, nn


class DropPath(nn.Module):
    """Drop the whole branch of a sample with probability `rate` while training (Huang et al., ECCV 2016)."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"DropPath rate must be in [0, 1), not {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:  # (n, ...) -> (n, ...)
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)

    def export(self) -> nn.Module:
        return nn.Identity()

    def extra_repr(self) -> str:
        return f"{self.rate}"


class Dropout(nn.Dropout):
    """torch's Dropout; `export()` shows what it is at inference."""

    def export(self) -> nn.Module:
        return nn.Identity()
