"""The frame that all of our classifiers share: parts in a row, a linear head, one training-time estimate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from lipcert.errors import InputError
from lipcert.layers import NormalizedLinear, PowerIteration
from lipcert.models.parts import Part


@runtime_checkable
class Published(Protocol):
    """A network that follows a paper with a Lipschitz formula of its own."""

    published_slow: bool  # whether evaluating it takes minutes

    def published_bound(self) -> dict[str, Any] | None:
        """Return what the authors' own formula claims for this network at inference, if it is published ("value",
        "formula", "note")."""
        ...


class Estimated(nn.Module):
    """What training needs of a network: a last linear layer, and an estimate of the constant of what comes before it.

    The head's weight is (num_classes, features), or that of a 1 x 1 convolution.
    """

    head: nn.Module

    @property
    def rows(self) -> Tensor:
        """Return the rows of the head, (num_classes, features)."""
        weight: Any = self.head.weight
        return weight.flatten(1)

    def lipschitz_estimate(self, iterations: int = 1) -> Tensor:
        """Return the estimate of the features' constant, differentiable in all weights; InputError if there is none."""
        raise InputError(f"{type(self).__name__} has no Lipschitz estimate; train it with --loss cross_entropy")


class PartNetwork(Estimated):
    """Parts in a row, then a linear head on the flattened features.

    `lipschitz_estimate()` multiplies the parts' estimates: the constant of the features, input pixels to head input.
    """

    head: nn.Linear | NormalizedLinear
    power: PowerIteration

    def __init__(self, parts: Sequence[Part | nn.Module], head: nn.Linear | NormalizedLinear) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)
        self.head = head
        self.power = PowerIteration([segment for part in self._parts() for segment in part.segments()])

    def forward(self, x: Tensor) -> Tensor:  # (n, c, h, w) in [0, 1] -> (n, num_classes)
        return self.head(self.parts(x).flatten(1))

    def lipschitz_estimate(self, iterations: int = 1) -> Tensor:
        """Run the power iterations and return the estimate of the features' constant, differentiable in all weights."""
        norms = iter(self.power(iterations))
        constant = self.head.weight.new_ones(())
        for part in self._parts():
            constant = constant * part.lipschitz([next(norms) for _ in part.segments()])
        return constant

    def _parts(self) -> list[Part]:
        return [part for part in self.parts if isinstance(part, Part)]
