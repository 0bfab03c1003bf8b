"""AutoAttack in l2 (Croce & Hein 2020, arXiv 2003.01690) over batches of images, with every finding checked in float64.

The attacks are those of `autoattack` (github.com/fra31/auto-attack) where it is installed, else of `pyautoattack`
(PyPI, the same code). What the adapter adds:

- AutoAttack works in float32 and trusts its own distances. Here an image counts as broken only if the point found,
  moved into the ball and the box in float64, is misclassified by the float64 model; it is then pulled towards the clean
  image as far as it stays misclassified, so that the distance is a sharp test of a certificate.
- Every batch has its own seed, made of the seed and the batch's first index: results do not depend on where a run was
  interrupted. The caller's random states, trace function and loggers come back as they were.
- Attacks that cannot run (too few classes for the targeted DLR loss, images on which Square divides by zero) are left
  out with a note; AutoAttack's own warnings come back as notes, too.
- An image broken at one radius is broken at every larger one, and is not attacked again.
"""

from __future__ import annotations

import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lipcert.attacks.apgd import wide

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
}
ATTACKS = VERSIONS["plus"]
_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # the smallest number of classes for which the loss is defined; else 2
_TARGETS = 9  # AutoAttack's number of target classes, where there are so many
_CLEARLY = 1e-10  # of the largest logit: by so much a wrong class must win, far more than float64 rounding
_HALVINGS = 16  # of the segment between the clean and the found image


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Which attacks to run: those of an AutoAttack version, or the listed ones with the settings of `standard`."""

    version: str = "standard"
    attacks: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise ValueError(f"unknown AutoAttack version {self.version!r}; known are: {', '.join(VERSIONS)}")
        wrong = [attack for attack in self.attacks or () if attack not in ATTACKS]
        if wrong or self.attacks == ():
            raise ValueError(f"unknown attacks {wrong or 'none'}; known are: {', '.join(ATTACKS)}")
        if self.attacks is not None and self.version != "standard":
            raise ValueError(f"give a version or a list of attacks, not both (got {self.version!r} and a list)")

    def plan(self, classes: int, shape: tuple[int, ...]) -> tuple[tuple[str, ...], list[str]]:
        """Return the attacks that can run on images of a shape (c, h, w), and a note for each that cannot.

        >>> Ensemble().plan(3, (1, 4, 4))[0]
        ('apgd-ce', 'fab-t')
        """
        if classes < 2 or len(shape) != 3:
            raise ValueError(f"attacks need at least two classes and images (c, h, w); got {classes} and {shape}")
        chosen, notes = [], []
        for attack in self.attacks or VERSIONS[self.version]:
            needed = _CLASSES.get(attack, 2)
            if classes < needed:
                notes.append(f"{attack} left out: its loss needs at least {needed} classes, the model has {classes}")
            elif attack == "square" and not _square_runs(*shape[1:]):
                notes.append(f"square left out: AutoAttack's code fails on images of {shape[1]}x{shape[2]} pixels")
            else:
                chosen.append(attack)
        if not chosen:
            raise ValueError(f"no attack is left to run: {'; '.join(notes)}")
        return tuple(chosen), notes


@dataclass(frozen=True)
class Attacked:
    """One image attacked at one radius. `example` is the float64 image (c, h, w) that was found, if one was."""

    eps: float
    idx: int
    label: int
    predict: int  # of the clean image: the label only if it wins in float32 and in float64, -1 if a logit is not finite
    adversarial: int  # prediction on the found image, or `predict` if none was found
    distance: float  # l2, rounded up; 0 if none was found
    success: bool  # the clean image was classified rightly, and the example within eps is not
    example: Tensor | None = field(default=None, repr=False, compare=False)


def autoattack(
    model: nn.Module,
    recheck: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[int, Tensor, Tensor]],
    eps: Sequence[float],
    ensemble: Ensemble | None = None,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[list[Attacked]]:
    """Attack images in l2 balls, batch by batch, and yield for each batch one row per image and radius.

    Args:
        model: The float32 model that is attacked, in eval mode; pixels (n, c, h, w) in [0, 1] to logits (n, k).
        recheck: Maps float64 pixels to float64 logits; it alone decides what is misclassified.
        batches: First index, images (n, c, h, w) float32 and labels (n,) of each batch.
        eps: Radii in l2.
        note: Is called with each thing a reader of the results should know, once per batch at most.

    Raises ValueError if the model is in training mode, no radius is positive, or pixels lie outside [0, 1].
    """
    ensemble = ensemble or Ensemble()
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call model.eval() before the attack")
    if not eps or not all(0 < radius < float("inf") for radius in eps):
        raise ValueError(f"attack radii must be positive and finite; got {list(eps)}")
    for first, images, labels in batches:
        if not ((images >= 0) & (images <= 1)).all():
            raise ValueError(f"pixels must lie in [0, 1]; the batch from image {first} on has others")
        yield _attack_batch(model, recheck, first, images, labels, sorted(eps), ensemble, note)


def _attack_batch(
    model: nn.Module,
    recheck: Callable[[Tensor], Tensor],
    first: int,
    images: Tensor,
    labels: Tensor,
    eps: Sequence[float],
    ensemble: Ensemble,
    note: Callable[[str], None],
) -> list[Attacked]:
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), images.device)
    images, labels = images.to(device), labels.to(device)
    clean = images.double()
    with torch.no_grad():
        single, double = model(images.float()), recheck(clean)
    classes = double.shape[1]
    if not ((labels >= 0) & (labels < classes)).all():
        raise ValueError(f"the model has {classes} classes, but there is a label {int(labels.max())}; use other data")
    wins, predict = _clean(double, labels)
    wins_single, predict_single = _clean(single, labels)
    disagree = (wins & ~wins_single).nonzero().flatten().tolist()
    if disagree:
        note(f"images {[first + i for i in disagree]} are wrong in float32 only")
    right, predict = wins & wins_single, torch.where(wins, predict_single, predict)
    attacks, left_out = ensemble.plan(classes, tuple(images.shape[1:]))
    for text in left_out:
        note(text)
    seed = int(np.random.SeedSequence([ensemble.seed, first]).generate_state(1)[0] >> 1)
    found: dict[int, tuple[Tensor, int, float]] = {}  # position in the batch: image, its class, its distance
    rows = []
    for radius in eps:
        todo = [i for i in right.nonzero().flatten().tolist() if i not in found]
        if todo:
            points = _run(model, images[todo], labels[todo], radius, ensemble, attacks, classes, seed, note)
            found.update(_confirm(recheck, todo, clean[todo], points.double(), labels[todo], radius))
        for i, (label, prediction) in enumerate(zip(labels.tolist(), predict.tolist(), strict=True)):
            example, adversarial, distance = found.get(i, (None, prediction, 0.0))
            rows.append(Attacked(radius, first + i, label, prediction, adversarial, distance, i in found, example))
    return rows


def _run(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    ensemble: Ensemble,
    attacks: tuple[str, ...],
    classes: int,
    seed: int,
    note: Callable[[str], None],
) -> Tensor:
    """Run AutoAttack once and return its images (n, c, h, w)."""
    implementation, is_original = _implementation()
    settings: dict[str, Any] = {"norm": "L2", "eps": eps, "seed": seed, "version": ensemble.version}
    settings |= {"device": images.device} | ({"verbose": False} if is_original else {})
    with _undisturbed(model, images.device, note):
        attack = implementation(model, **settings)
        attack.attacks_to_run = list(attacks)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(_TARGETS, classes - 1)
        size = {"bs" if is_original else "batch_size": len(images)}
        result = attack.run_standard_evaluation(images.float(), labels, **size)
    return result if isinstance(result, Tensor) else result[0]


def _confirm(
    recheck: Callable[[Tensor], Tensor], positions: list[int], clean: Tensor, points: Tensor, labels: Tensor, eps: float
) -> dict[int, tuple[Tensor, int, float]]:
    """Return the points that are adversarial in float64 and within eps, pulled towards the clean image meanwhile."""

    @torch.no_grad()
    def classes(candidates: Tensor) -> Tensor:  # the winning wrong class, or -1 where no wrong class wins clearly
        logits = recheck(candidates)
        own = logits.gather(1, labels[:, None])[:, 0]
        others, winner = logits.scatter(1, labels[:, None], -torch.inf).max(dim=1)
        clearly = others - own > _CLEARLY * logits.abs().amax(dim=1)  # false for NaN
        return torch.where(clearly, winner, -1)

    points = torch.where(points.isfinite(), points, clean).clamp(0, 1)
    length = distance_up(points, clean)
    inside = within(points, clean, eps)
    stretched = within(clean + (points - clean) * wide(2 * eps / length.clamp(min=1e-300)), clean, eps)
    winner = classes(inside)
    farther = classes(stretched)  # what float32 took for adversarial may need a little more in float64
    use = (winner < 0) & (farther >= 0)
    far, winner = torch.where(wide(use), stretched, inside), torch.where(use, farther, winner)
    near = clean.clone()
    for _ in range(_HALVINGS):
        middle = ((near + far) / 2).clamp(0, 1)
        here = classes(middle)
        broken = here >= 0
        far, near = torch.where(wide(broken), middle, far), torch.where(wide(broken), near, middle)
        winner = torch.where(broken, here, winner)
    distance = distance_up(far, clean)
    success = (length > 0) & (winner >= 0) & (distance <= eps)
    return {
        position: (far[i].clone(), int(winner[i]), float(distance[i]))
        for i, position in enumerate(positions)
        if bool(success[i])
    }


def _clean(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the label's logit is larger than every other, and the predictions; a tie goes to the wrong class."""
    own = logits.gather(1, labels[:, None])[:, 0]
    others, winner = logits.scatter(1, labels[:, None], -torch.inf).max(dim=1)
    finite = logits.isfinite().all(dim=1)
    wins = (own > others) & finite
    return wins, torch.where(wins, labels, torch.where(finite, winner, -1))


def within(points: Tensor, clean: Tensor, eps: float) -> Tensor:
    """Move points straight towards the clean images until they lie within eps and [0, 1], also after rounding."""
    for inside in (1.0, 1 - 1e-12, 1 - 1e-9):
        factor = (inside * eps / distance_up(points, clean).clamp(min=1e-300)).clamp(max=1)
        points = torch.where(wide(factor < 1), clean + (points - clean) * wide(factor), points).clamp(0, 1)
    return points


def distance_up(points: Tensor, clean: Tensor) -> Tensor:
    """Return upper bounds (n,) of the l2 distances: a sum of n squares in any order errs by at most n + 2 roundoffs."""
    difference = (points - clean).flatten(1)
    return difference.square().sum(dim=1).sqrt() * (1 + (difference.shape[1] + 8) * 2.0**-53)


def _square_runs(height: int, width: int) -> bool:
    """Say whether Square's initial pattern of tiles fits (it starts from five tiles per column and assumes a lot)."""
    side = height // 5
    if side == 0:
        return False
    start = (height - 5 * side) // 2
    return side == 1 or all(start + (length // side) * side <= length for length in (height, width))


def _implementation() -> tuple[Any, bool]:
    """Return the AutoAttack class, and whether it is the original with its other argument names."""
    try:
        from autoattack import AutoAttack
    except ImportError:
        from pyautoattack import AutoAttack

        return AutoAttack, False
    return AutoAttack, True


class _Collect(logging.Handler):
    """Hands each message of AutoAttack's logger on as a note."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.note = note

    def emit(self, record: logging.LogRecord) -> None:
        self.note(record.getMessage())


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device, note: Callable[[str], None]) -> Iterator[None]:
    """Let AutoAttack reseed, trace, warn and fill gradients, and undo all of it."""
    seen: set[str] = set()

    def once(text: str) -> None:
        text = f"AutoAttack: {text.splitlines()[0]}"
        if text not in seen:
            seen.add(text)
            note(text)

    logger, handler = logging.getLogger("auto-attack"), _Collect(once)
    trace, propagate = sys.gettrace(), logger.propagate
    numpy_state, python_state = np.random.get_state(), random.getstate()
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    accelerators = [device.index or 0] if device.type != "cpu" else []
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with (
            torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            for parameter, _ in wanted:
                parameter.requires_grad_(False)  # fab calls backward, which would fill .grad
            yield
        for warning in caught:
            once(str(warning.message))
    finally:
        sys.settrace(trace)
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        logger.removeHandler(handler)
        logger.propagate = propagate
        np.random.set_state(numpy_state)
        random.setstate(python_state)
