"""Training-time norm estimates: warm-started power iteration, batched over all linear segments of one shape.

Power iteration approaches a norm from below (`||A v|| <= ||A||` for every unit v), so what it returns is an
*estimate*: right for a loss, never for a certificate. What this file does differently from published code: each
segment is iterated on its own grid (not on a fixed 32 x 32), equal segments run as one batched call, a segment may
be any affine module (shortcut and CenterNorm included), and a vector that an operator annihilates is drawn afresh
instead of staying zero for ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from lipcert.layers.precision import own_precision

Segment = tuple[nn.Module, tuple[int, ...]]  # an affine module and its input shape (c, h, w) or (d,)


class PowerIteration(nn.Module):
    """Estimate the norms of affine modules that live elsewhere in the network.

    Each segment's parameters named `bias` are taken as zero; the rest must be linear in the input. The vectors are
    buffers (they travel with the state), the segments are referenced, not owned.

    Args:
        segments: pairs (module, input shape without batch).
        seed: of the start vectors, so that all ranks and all runs agree.
    """

    def __init__(self, segments: Sequence[Segment], *, seed: int = 0) -> None:
        super().__init__()
        self._segments = list(segments)  # a plain list: no second owner of the parameters
        groups: dict[tuple, list[int]] = {}
        for index, (module, shape) in enumerate(self._segments):
            groups.setdefault((*_signature(module), shape), []).append(index)
        self._groups = list(groups.values())
        generator = torch.Generator().manual_seed(seed)
        for number, members in enumerate(self._groups):
            module, shape = self._segments[members[0]]
            start = torch.randn(len(members), math.prod(shape), generator=generator, device="cpu")
            like = next(module.parameters(), start)
            start = torch.empty_like(start, device="meta") if like.is_meta else start.to(like.device)
            self.register_buffer(f"vectors{number}", _normalise(start))  # (segments, entries)

    def forward(self, iterations: int = 1) -> list[Tensor]:
        """Run `iterations` steps and return one estimate per segment, each differentiable in that segment's weights."""
        norms: list[Tensor] = [torch.empty(0)] * len(self._segments)
        for number, members in enumerate(self._groups):
            modules = [self._segments[i][0] for i in members]
            shape = self._segments[members[0]][1]
            buffer = getattr(self, f"vectors{number}")
            vectors = buffer.view(len(members), 1, *shape)
            with own_precision(vectors):
                parameters = _stack(modules)
                vectors = _iterate(modules[0], parameters, vectors, iterations)
                images = vmap(_apply(modules[0]))(parameters, vectors)
                estimates = torch.linalg.vector_norm(images.flatten(1), dim=1)
            with torch.no_grad():
                buffer.copy_(vectors.flatten(1))
            for i, estimate in zip(members, estimates, strict=True):
                norms[i] = estimate
        return norms


def _iterate(module: nn.Module, parameters: Mapping[str, Tensor], vectors: Tensor, iterations: int) -> Tensor:
    """Return v after `iterations` steps v <- A* A v / ||A* A v||."""
    frozen = {name: value.detach() for name, value in parameters.items()}

    def step(parameters: dict[str, Tensor], vector: Tensor) -> Tensor:
        image, adjoint, *_ = vjp(lambda v: _apply(module)(parameters, v), vector)
        return adjoint(image)[0]

    for _ in range(iterations):
        with torch.no_grad():
            vectors = _normalise(vmap(step)(frozen, vectors), fallback=vectors)
    return vectors


def _apply(module: nn.Module):
    """Return the linear part of an affine module as a function of (parameters, input)."""

    def linear(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        without_bias = {
            name: torch.zeros_like(value) if name.rsplit(".", 1)[-1] == "bias" else value
            for name, value in parameters.items()
        }
        return functional_call(module, without_bias, (x,))

    return linear


def _stack(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    named = [dict(module.named_parameters()) for module in modules]
    return {name: torch.stack([parameters[name].float() for parameters in named]) for name in named[0]}


def _normalise(vectors: Tensor, fallback: Tensor | None = None) -> Tensor:
    """Scale each vector (the first axis counts them) to norm 1; one that vanished or overflowed is replaced.

    The replacement is the old vector rolled along its entries: a new direction, without drawing from a random state
    that other ranks or a resumed run might not share.
    """
    flat = vectors.flatten(1)
    largest = flat.abs().amax(1, keepdim=True)  # divided out first: squares of 1e-24 would underflow
    good = torch.isfinite(largest) & (largest > torch.finfo(flat.dtype).tiny)
    scaled = flat / torch.where(good, largest, torch.ones_like(largest))
    scaled = scaled / torch.where(good, torch.linalg.vector_norm(scaled, dim=1, keepdim=True), torch.ones_like(largest))
    if fallback is not None:
        scaled = torch.where(good, scaled, fallback.flatten(1).roll(1, dims=1))
    return scaled.view_as(vectors)


def _signature(module: nn.Module) -> tuple:
    """Modules of equal signature compute the same function of their parameters."""
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return type(module), repr(module), shapes
