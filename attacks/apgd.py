"""Auto-PGD in l2 (Croce & Hein 2020, arXiv 2003.01690) for any loss of images, with the two points worth keeping.

Its published code belongs to classification: it minimises accuracy, which for one label is what its loss says. Here the
loss is one thing and the count of right pixels another, so the best point of each is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

IGNORE = 255  # the label of pixels that do not count

Objective = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # (points, step) -> losses (n,) to maximise, logits
_PHASES = ((2.0, 0.3), (1.5, 0.3), (1.0, 0.4))  # of eps, of the steps


def decreasing(
    objective: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    images: Tensor,
    labels: Tensor,
    eps: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Run APGD in balls of 2, 1.5 and 1 eps, each from the best point of the one before, and return the points with the
    fewest right pixels that were met in the last one.

    `objective` gets the share of the steps that are done (0 ... 1). The first start is random, of norm eps.
    """
    direction = torch.randn(images.shape, generator=generator).to(images)
    best = images + direction * wide(eps / direction.flatten(1).norm(dim=1).clamp(min=1e-12))
    done, fewest = 0.0, images
    for factor, share in _PHASES:
        count = max(1, round(share * steps))

        def at(x: Tensor, step: int, done: float = done, pace: float = share / count) -> tuple[Tensor, Tensor]:
            return objective(x, done + pace * step)

        start = project(best, images, factor * eps)
        best, fewest, _ = apgd(at, images, start, labels, factor * eps, count)
        done += share
    return fewest


def apgd(
    objective: Objective,
    clean: Tensor,
    start: Tensor,
    labels: Tensor,
    eps: float,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximise a loss by gradient ascent that halves its own steps.

    Returns, image by image, the point of the largest loss, the one with the fewest right pixels, and their number (n,).
    """

    def evaluate(x: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        x = x.detach().requires_grad_(True)
        losses, logits = objective(x, step)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        right = ((logits.detach().argmax(dim=1) == labels) & (labels != IGNORE)).flatten(1).sum(dim=1)
        return losses.detach(), torch.nan_to_num(gradient), right

    x = before = start
    value, gradient, right = evaluate(x, 0)
    best, best_value, best_gradient = x, value, gradient
    fewest, least = x, right
    size = torch.full_like(value, 2 * eps)
    period, shrink, shortest = max(1, int(0.22 * steps)), max(1, int(0.03 * steps)), max(1, int(0.06 * steps))
    rises, since = torch.zeros_like(value), 0
    value_then, halved_then = best_value, torch.ones_like(value, dtype=torch.bool)
    for step in range(1, steps + 1):
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-20)
        ahead = project(x + gradient * wide(size / length), clean, eps)
        momentum = 0.75 if step > 1 else 1.0
        x, before = project(x + momentum * (ahead - x) + (1 - momentum) * (x - before), clean, eps), x
        last = value
        value, gradient, right = evaluate(x, step)
        rises, since = rises + (value > last), since + 1
        higher, fewer = value > best_value, right < least
        best, best_gradient = torch.where(wide(higher), x, best), torch.where(wide(higher), gradient, best_gradient)
        best_value = torch.maximum(value, best_value)
        fewest, least = torch.where(wide(fewer), x, fewest), torch.minimum(right, least)
        if since == period:
            halve = (rises <= 0.75 * since) | (~halved_then & (best_value <= value_then))
            size = torch.where(halve, size / 2, size)
            x, before = torch.where(wide(halve), best, x), torch.where(wide(halve), best, before)
            value, gradient = torch.where(halve, best_value, value), torch.where(wide(halve), best_gradient, gradient)
            value_then, halved_then = best_value, halve
            period, rises, since = max(period - shrink, shortest), torch.zeros_like(rises), 0
    return best, fewest, least


def project(points: Tensor, clean: Tensor, eps: float) -> Tensor:
    """Shorten differences to eps, then cut to [0, 1]; the clean image is inside, so that lengthens nothing."""
    difference = points - clean
    length = difference.flatten(1).norm(dim=1).clamp(min=1e-20)
    return (clean + difference * wide((eps / length).clamp(max=1.0))).clamp(0, 1)


def wide(values: Tensor) -> Tensor:
    """Return one number an image (n,) as (n, 1, 1, 1)."""
    return values[:, None, None, None]
