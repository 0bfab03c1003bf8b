"""Attacks on segmentation in l2: one perturbation of the image against all of its pixels.

The ensemble of Croce, Singh, Hein, "Towards Reliable Evaluation and Fast Training of Robust Semantic Segmentation
Models" (ECCV 2024, arXiv 2306.12941), APGD with a budget that decreases from 2 eps to eps, once for each loss, and one
attack of our own, `lipcert.attacks.cheapest`. Losses, per pixel, p the softmax and y the label:

    masked-ce    cross-entropy where the pixel is still right
    balanced-ce  the same, divided by how often the class occurs: aims at the intersection over union
    js           Jensen-Shannon divergence of p and y, which fades out for pixels that are lost for good
    segpgd       (1 - t) cross-entropy where right, t where wrong, t from 0 to 1/2 (Gu et al., ECCV 2022, 2207.12391)
    cospgd       cross-entropy times the cosine of p and y (Agnihotri et al., ICML 2024, arXiv 2302.02213)

What differs: l2 with the box [0, 1], which the published code has for l∞ only; a random start of fixed seed per batch;
every point found is moved into ball and box in float64, and its predictions are those of a float64 model, where a pixel
keeps its clean class unless another one wins clearly. So each row is a test of a certificate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lipcert.attacks.apgd import IGNORE as IGNORE
from lipcert.attacks.apgd import decreasing
from lipcert.attacks.autoattack import distance_up, within
from lipcert.attacks.cheapest import cheapest

LOSSES = ("masked-ce", "balanced-ce", "js", "segpgd", "cospgd")
ATTACKS = (*LOSSES, "cheapest")
_CLEARLY = 1e-10  # of the largest logit of the image: by so much another class must win, far more than float64 rounding


@dataclass(frozen=True, kw_only=True)
class SceneEnsemble:
    """Which attacks to run, losses to maximise or "cheapest", and for how many gradients each."""

    attacks: tuple[str, ...] = ("masked-ce", "balanced-ce", "js", "cheapest")
    steps: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [attack for attack in self.attacks if attack not in ATTACKS]
        if wrong or not self.attacks:
            raise ValueError(f"unknown attacks {wrong or 'none'}; known are: {', '.join(ATTACKS)}")
        if self.steps < 4:
            raise ValueError(f"an attack needs at least 4 steps, got {self.steps}")


@dataclass(frozen=True)
class SceneAttacked:
    """One image after one attack; counts of labelled pixels. `attack` is "clean" for the image as it is."""

    eps: float
    idx: int
    attack: str
    distance: float  # l2, rounded up
    valid: int
    correct: int
    hits: tuple[int, ...]  # of each class: true positives
    union: tuple[int, ...]  # true and false positives, false negatives
    labelled: tuple[int, ...]
    predict: Tensor = field(repr=False, compare=False)  # (h, w)
    example: Tensor = field(repr=False, compare=False)  # (c, h', w') float64


def attack_scenes(
    model: nn.Module,
    recheck: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[int, Tensor, Tensor]],
    eps: float,
    ensemble: SceneEnsemble | None = None,
    *,
    frequency: Sequence[float] | None = None,
) -> Iterator[list[SceneAttacked]]:
    """Attack images in l2 balls, batch by batch, and yield each batch's rows: all images clean, then after each attack.

    Args:
        model: The float32 model that is attacked, in eval mode; pixels (n, c, h', w') in [0, 1] to logits (n, k, h, w).
        recheck: Maps float64 pixels to float64 logits; it alone decides what is predicted.
        batches: First index, images (n, c, h', w') and labels (n, h, w), IGNORE where a pixel does not count.
        eps: Radius in l2, for each image.
        frequency: For "balanced-ce", how many training pixels each class has; None: as in the batch.

    Raises ValueError if the model is in training mode, eps is not positive, pixels lie outside [0, 1], or the labels
    are of another size or beyond the classes.
    """
    ensemble = ensemble or SceneEnsemble()
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call model.eval() before the attack")
    if not 0 < eps < math.inf:
        raise ValueError(f"the radius must be positive and finite, got {eps}")
    for first, images, labels in batches:
        if not ((images >= 0) & (images <= 1)).all():
            raise ValueError(f"pixels must lie in [0, 1]; the batch from image {first} on has others")
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), images.device)
        images, labels = images.to(device), labels.to(device).long()
        clean = images.double()
        with torch.no_grad():
            logits = recheck(clean)
        _check(logits, labels)
        before = logits.argmax(dim=1)
        rows = _rows(eps, first, "clean", clean, clean, before, labels, logits.shape[1])
        weight = _weight(labels, logits.shape[1], frequency)
        seed = int(np.random.SeedSequence([ensemble.seed, first]).generate_state(1)[0] >> 1)
        for attack in ensemble.attacks:
            generator = torch.Generator().manual_seed(seed)
            if attack == "cheapest":
                found = cheapest(model, images.float(), labels, eps, ensemble.steps)
            else:

                def objective(x: Tensor, progress: float, name: str = attack) -> tuple[Tensor, Tensor]:
                    out = model(x)
                    return losses(name, out, labels, weight, progress), out  # noqa: B023 (called within the loop)

                found = decreasing(objective, images.float(), labels, eps, ensemble.steps, generator)
            points = within(torch.where(found.isfinite(), found, images).double().clamp(0, 1), clean, eps)
            with torch.no_grad():
                after = _predictions(recheck(points), before)
            rows += _rows(eps, first, attack, points, clean, after, labels, logits.shape[1])
        yield rows


def worst_accuracy(rows: Sequence[SceneAttacked]) -> tuple[float, float]:
    """Return the accuracy of labelled pixels if every image meets the attack that leaves it the fewest right ones: over
    all pixels, and as the mean over images. No row with a labelled pixel raises ValueError."""
    least: dict[int, tuple[int, int]] = {}
    for row in rows:
        if row.valid:
            least[row.idx] = min(least.get(row.idx, (row.valid, row.valid)), (row.correct, row.valid))
    if not least:
        raise ValueError("there is no labelled pixel")
    pooled = sum(correct for correct, _ in least.values()) / sum(valid for _, valid in least.values())
    return pooled, sum(correct / valid for correct, valid in least.values()) / len(least)


def worst_miou(rows: Sequence[SceneAttacked], *, seed: int = 0) -> float:
    """Return the lowest mean intersection over union of the set that was found by choosing an attack for each image.

    Which choice is the worst depends on all images at once. Starting from the one attack that is worst for all, images
    in random order change theirs while that lowers the mean, until none does: an attack, so no lower value is excluded.
    Classes that are labelled nowhere are left out. Every image needs a row for every attack; else ValueError is raised.
    """
    names, images = sorted({row.attack for row in rows}), sorted({row.idx for row in rows})
    by_place = {(row.attack, row.idx): row for row in rows}
    if len(by_place) != len(names) * len(images) or len(rows) != len(by_place) or not rows:
        raise ValueError("every image needs one row for every attack")
    table = np.array([[(by_place[n, i].hits, by_place[n, i].union) for i in images] for n in names])  # (a, n, 2, k)
    labelled = np.array([by_place[names[0], i].labelled for i in images]).sum(axis=0) > 0
    if not labelled.any():
        raise ValueError("there is no labelled pixel")
    table = table[..., labelled]
    start = int(np.argmin([_miou(total) for total in table.sum(axis=1)]))
    choice = np.full(len(images), start)
    total = table[start].sum(axis=0)
    value, changed = _miou(total), True
    generator = np.random.default_rng(seed)
    while changed:
        changed = False
        for i in generator.permutation(len(images)):
            options = total - table[choice[i], i] + table[:, i]  # (a, 2, k)
            values = [_miou(option) for option in options]
            best = int(np.argmin(values))
            if values[best] < value:
                choice[i], total, value, changed = best, options[best], values[best], True
    return value


def _miou(total: NDArray[np.int64]) -> float:
    """Return the mean of hits / union: (2, k) -> number; every class is labelled, so no union is 0."""
    return float(np.mean(total[0] / total[1]))


def losses(name: str, logits: Tensor, labels: Tensor, weight: Tensor, progress: float) -> Tensor:
    """Return the loss of each image, averaged over its labelled pixels: logits (n, k, h, w), labels (n, h, w) -> (n,).

    `weight` (k,) is for "balanced-ce", `progress` (0 … 1) for "segpgd".
    """
    valid = labels != IGNORE
    target = torch.where(valid, labels, 0)
    log_p = F.log_softmax(logits, dim=1)
    log_own = log_p.gather(1, target[:, None])[:, 0]  # (n, h, w)
    right = (logits.detach().argmax(dim=1) == target).to(logits.dtype)
    if name == "masked-ce":
        pixels = -log_own * right
    elif name == "balanced-ce":
        pixels = -log_own * right * weight[target]
    elif name == "js":
        own = log_own.exp()
        # of two distributions one of which has a single outcome: only its probability p in the other one matters,
        # (1 - p) log 2 + p log(2p / (1 + p)) - log((1 + p) / 2), halved
        pixels = (2 * math.log(2) + own * log_own - (1 + own) * torch.log1p(own)) / 2
    elif name == "segpgd":
        pixels = -log_own * (right * (1 - progress / 2) + (1 - right) * progress / 2)
    elif name == "cospgd":
        p = log_p.detach().exp()
        pixels = -log_own * log_own.detach().exp() / p.norm(dim=1)
    else:
        raise ValueError(f"unknown loss {name!r}")
    return (pixels * valid).flatten(1).sum(dim=1) / valid.flatten(1).sum(dim=1).clamp(min=1)


def _weight(labels: Tensor, classes: int, frequency: Sequence[float] | None) -> Tensor:
    """Return 1 / frequency of each class (k,), scaled so that the rarest of them has 1."""
    if frequency is None:
        counts = torch.bincount(labels[labels != IGNORE].flatten(), minlength=classes).to(torch.float32)
    else:
        counts = torch.as_tensor(frequency, dtype=torch.float32, device=labels.device)
        if counts.shape != (classes,) or not bool((counts >= 0).all()):
            raise ValueError(f"there must be a frequency for each of {classes} classes, at least 0; got {frequency}")
    counts = counts.clamp(min=1.0)
    return counts.min() / counts


def _predictions(logits: Tensor, before: Tensor) -> Tensor:
    """Return the classes (n, h, w): the old one unless another wins clearly over it."""
    top, winner = logits.max(dim=1)
    old = logits.gather(1, before[:, None])[:, 0]
    scale = logits.abs().flatten(1).amax(dim=1)[:, None, None]
    return torch.where(top - old > _CLEARLY * scale, winner, before)  # false for NaN


def _rows(
    eps: float, first: int, attack: str, points: Tensor, clean: Tensor, predict: Tensor, labels: Tensor, classes: int
) -> list[SceneAttacked]:
    distance = distance_up(points, clean).tolist()
    rows = []
    for i, (label, found) in enumerate(zip(labels, predict, strict=True)):
        valid = label != IGNORE
        right = valid & (found == label)
        hits, predicted, labelled = (
            torch.bincount(numbers, minlength=classes) for numbers in (label[right], found[valid], label[valid])
        )
        rows.append(
            SceneAttacked(
                eps=eps,
                idx=first + i,
                attack=attack,
                distance=distance[i],
                valid=int(valid.sum()),
                correct=int(right.sum()),
                hits=tuple(hits.tolist()),
                union=tuple((predicted + labelled - hits).tolist()),
                labelled=tuple(labelled.tolist()),
                predict=found.clone(),
                example=points[i].clone(),
            )
        )
    return rows


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 4 or labels.shape != (len(logits), *logits.shape[2:]):
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} are not of the same pixels")
    beyond = labels[(labels != IGNORE) & ((labels < 0) | (labels >= logits.shape[1]))]
    if len(beyond):
        raise ValueError(f"the model has {logits.shape[1]} classes, but there is a label {int(beyond[0])}")
