"""An attack on segmentation that spends its budget where it turns the most pixels: a companion of the published losses.

Cross-entropies pull at all pixels that are still right, most of which are out of reach. For a map whose pixels respond
alike, the worst perturbation is known (docs/segmentation.md, 3): bring the margins m_i of the k cheapest pixels to
zero, each moved in proportion to its margin, which is the direction of steepest descent of the sum of m_i² over these
k. How many can be turned is searched for by bisection, each try a short run of APGD from the clean image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipcert.attacks.apgd import IGNORE, apgd, wide

ROUNDS = 6  # of the bisection
_BEYOND = 1e-3  # of the largest margin: how far past a tie a pixel is pushed


def cheapest(model: nn.Module, images: Tensor, labels: Tensor, eps: float, steps: int) -> Tensor:
    """Return points (n, c, h', w') within eps with as few right pixels as were met: labels (n, h, w)."""
    with torch.no_grad():
        clean = _margins(model(images), labels).flatten(1)  # (n, p)
    right = (labels != IGNORE).flatten(1) & (clean > 0)
    order = torch.where(right, clean, torch.inf).argsort(dim=1).argsort(dim=1)  # rank of each pixel
    total = right.sum(dim=1)
    beyond = _BEYOND * clean.abs().amax(dim=1)
    low, high = torch.zeros_like(total), total + 1
    points, least = images, total
    for _ in range(ROUNDS):
        aim = torch.clamp((low + high) // 2, min=1)
        chosen = right & (order < aim[:, None])

        def objective(x: Tensor, step: int, chosen: Tensor = chosen) -> tuple[Tensor, Tensor]:
            logits = model(x)
            rest = (_margins(logits, labels).flatten(1) + beyond[:, None]).clamp(min=0)
            return -(rest.square() * chosen).sum(dim=1), logits

        _, found, count = apgd(objective, images, images, labels, eps, max(4, steps // ROUNDS))
        fewer = count < least
        points, least = torch.where(wide(fewer), found, points), torch.minimum(count, least)
        reached = total - count >= aim
        low, high = torch.where(reached, torch.maximum(aim, total - count), low), torch.where(reached, high, aim)
    return points


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return by how much the label's logit is above the largest other one: (n, k, h, w), (n, h, w) -> (n, h, w)."""
    target = torch.where(labels != IGNORE, labels, 0)[:, None]
    return (logits.gather(1, target) - logits.scatter(1, target, -torch.inf).amax(dim=1, keepdim=True))[:, 0]
