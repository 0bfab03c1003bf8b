"""The training loop: one process, or several under `torchrun`.

    lipcert train --model lipshift_tiny --data cifar10 -o runs/a
    torchrun --nproc-per-node 8 -m lipcert train --model lipshift_tiny --data cifar10 -o runs/a

A killed run continues with `resume` from `state.pt` (written every epoch and every minute) and ends with the same
weights as an undisturbed one: batches, augmentations and dropout depend on (seed, epoch, batch) and the saved random
state only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lipcert.bounds import audit
from lipcert.checkpoint import load_state, save_model, save_state
from lipcert.config import TrainConfig, to_yaml
from lipcert.data.batches import seed_of
from lipcert.data.mixing import Mix, dominant, smooth
from lipcert.errors import InputError
from lipcert.export import export
from lipcert.files import require_writable, write_json, write_text
from lipcert.layers import pairwise_distances
from lipcert.models.network import Estimated
from lipcert.registry import create_model, losses
from lipcert.runtime import Processes, environment, processes, seed_everything, select_device
from lipcert.schedule import optimizer, schedule
from lipcert.tasks import mean_iou, task_of

log = logging.getLogger(__name__)

METRICS = (
    "epoch",
    "step",
    "lr",
    "eps",
    "train_loss",
    "train_clean",
    "val_loss",
    "val_clean",
    "val_certified",
    "val_miou",
    "lipschitz_estimate",
    "lipschitz_upper",
    "images_per_second",
    "seconds",
)
SAVE_EVERY = 60.0  # seconds between two states inside an epoch
VALIDATION_ITERATIONS = 50  # power iterations before a validation
MIXING = 0  # tells the seeds of mixed images from those of other draws for the same batch


class Diverged(RuntimeError):
    """The loss is not finite any more; the last good checkpoint is kept."""


class WithPairwise(nn.Module):
    """The network and, in the same forward pass, the pairwise Lipschitz estimates of its logits (so that DDP sees
    both)."""

    def __init__(self, model: Estimated, estimated: bool) -> None:
        super().__init__()
        self.model, self.estimated = model, estimated

    def forward(self, x: Tensor, iterations: int) -> tuple[Tensor, Tensor]:  # (n, c, h, w) -> (n, K), (K, K)
        constant = self.model.lipschitz_estimate(iterations) if self.estimated else torch.inf
        return self.model(x), constant * pairwise_distances(self.model.rows)


def train(
    config: TrainConfig,
    folder: str | Path,
    *,
    data_root: str | None = None,
    download: bool = False,
    device: str = "auto",
    resume: bool = False,
    progress: Callable[[Iterable, int, str], Iterable] = lambda batches, length, label: batches,
) -> dict[str, Any]:
    """Train as `config` says and leave a run folder; return the last row of its metrics.

    Args:
        folder: run folder; one that already holds a run needs `resume`.
        progress: wraps the batches of an epoch, to draw a bar: (batches, number left, label) -> batches.

    Raises InputError for a folder, configuration or data that do not fit, and Diverged for a loss that is not finite.
    """
    folder = require_writable(folder)
    state_path = folder / "state.pt"
    if resume:
        state = load_state(state_path)
    elif state_path.exists() or (folder / "config.yaml").exists() or (folder / "model").exists():
        raise InputError(f"{folder} already holds a run; continue it with --resume or name another folder with -o")
    else:
        state = None
    with processes(select_device(device)) as (group, place):
        return _Training(config, folder, data_root, download, place, group, state, progress).run()


class _Training:
    """One run: what has to be kept between batches. Made by `train`."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        data_root: str | None,
        download: bool,
        device: torch.device,
        group: Processes,
        state: dict[str, Any] | None,
        progress: Callable,
    ) -> None:
        self.config, self.folder, self.device, self.group, self.progress = config, folder, device, group, progress
        if config.batch_size % group.world:
            raise InputError(f"batch_size {config.batch_size} must be a multiple of the {group.world} processes")
        self.task = task_of(config)
        self.loss = losses.get(config.loss)
        self.task.check_augmentation(config.augment)  # a wrong name is found before anything is written
        if self.task.name == "segmentation" and (config.mixup or config.cutmix):
            raise InputError("mixup and cutmix need one label an image; leave them out for segmentation")
        self.train_set, self.val_set = (
            self.task.load(config, data_root, split, download, device) for split in ("train", "val")
        )
        self.steps_per_epoch = len(self.train_set) // config.batch_size
        if self.steps_per_epoch == 0:
            raise InputError(f"batch_size {config.batch_size} is larger than the {len(self.train_set)} training images")
        self.steps = self.steps_per_epoch * config.epochs
        self.mix = Mix(config.mixup, config.cutmix, self.train_set.num_classes)

        seed_everything(config.seed)  # the same on all ranks: equal weights
        self.recipe = {
            "model": config.model,
            "kwargs": {**config.model_args, **({"height": height} if (height := self.train_set.height) else {})},
            "num_classes": self.train_set.num_classes,
            "img_size": self.train_set.img_size,
            "in_chans": self.train_set.in_chans,
            "data": config.data,
        }
        self.model = build(self.recipe).to(device)
        self.estimated = self._warm_up()
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
        self.optimizer = optimizer(config, self.model)
        seed_everything(config.seed + 1000 * group.rank)  # different dropout on each rank
        wrapped = WithPairwise(self.model, self.estimated)
        self.network = DistributedDataParallel(wrapped) if group.world > 1 else wrapped
        self.epoch = self.batch = 0
        self.rows: list[dict[str, Any]] = []
        self.sums = [0.0, 0.0, 0.0]  # loss, correct, labels of the running epoch
        self.elapsed = 0.0
        if state is not None:
            self._restore(state)

    def _warm_up(self) -> bool:
        """Start the power iterations; return whether the model has an estimate at all."""
        try:
            self.model.lipschitz_estimate(VALIDATION_ITERATIONS)
        except InputError:
            if self.config.loss != "cross_entropy":
                raise
            return False
        return True

    def run(self) -> dict[str, Any]:
        if self.group.is_main and not (self.folder / "config.yaml").exists():
            write_text(self.folder / "config.yaml", to_yaml(self.config))
            write_json(self.folder / "env.json", environment(self.device))
        board = _tensorboard(self.folder) if self.group.is_main else None
        self.started = self.saved = time.monotonic()
        if self.rows and self.rows[-1]["lipschitz_upper"] is not None:
            return self.rows[-1]  # already finished
        while self.epoch < self.config.epochs:
            row = self._epoch()
            if board is not None:
                for key in METRICS[2:]:
                    if row[key] is not None:
                        board.add_scalar(key, row[key], row["step"])
        if board is not None:
            board.close()
        return self._finish()

    def _epoch(self) -> dict[str, Any]:
        batches = self.task.batches(
            self.train_set,
            self.config.batch_size // self.group.world,
            shuffle=True,
            seed=self.config.seed,
            epoch=self.epoch,
            augment=self.config.augment,
            drop_last=True,
            rank=self.group.rank,
            world=self.group.world,
            start_batch=self.batch,
        )
        begun, first = time.monotonic(), self.batch
        self.network.train()
        label = f"epoch {self.epoch + 1}/{self.config.epochs}"
        for images, labels in self.progress(batches, self.steps_per_epoch - self.batch, label):
            self._step(images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))
            self.batch += 1
            if time.monotonic() - self.saved > SAVE_EVERY:
                self._save()
        seconds = time.monotonic() - begun
        row = self._row((self.batch - first) * self.config.batch_size / seconds)
        self.rows.append(row)
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, [0.0, 0.0, 0.0]
        self._save()
        if self.group.is_main:
            save_model(self._best(), self.folder / "model", self.recipe)
            self._say(label, row)
        return row

    def _say(self, label: str, row: dict[str, Any]) -> None:
        log.info(
            "%s: loss %.4f; validation clean %.2f %%, certified at %.4f by estimate %.2f %%; L about %s; %.0f images/s",
            label,
            row["train_loss"],
            100 * row["val_clean"],
            self.config.eps,
            100 * row["val_certified"],
            "unknown" if row["lipschitz_estimate"] is None else f"{row['lipschitz_estimate']:.4g}",
            row["images_per_second"],
        )

    def _step(self, images: Tensor, labels: Tensor) -> None:
        step = self.epoch * self.steps_per_epoch + self.batch
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.config.lr * parameters["factor"] * schedule(step, self.steps, self.config)
        images, labels = self.mix(images, labels, seed_of(self.config.seed, self.epoch, self.batch, MIXING))
        with self._autocast():
            logits, pairwise = self.network(images, self.config.power_iterations)
        logits, labels = self.task.rows(logits.float(), labels)
        targets = smooth(labels, logits.shape[1], self.config.label_smoothing)
        loss = self.loss(logits, targets, pairwise, self._eps(step))
        if not bool(torch.isfinite(loss)):  # under torchrun the other ranks are ended with this one
            raise Diverged(
                f"the loss is {loss.item()} at step {step} (epoch {self.epoch + 1}); the last good checkpoint is kept "
                f"in {self.folder}: train again with a smaller lr (now {self.config.lr:g})"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        count = len(labels)
        self.sums[0] += loss.item() * count
        self.sums[1] += (logits.detach().argmax(1) == dominant(labels)).sum().item()
        self.sums[2] += count

    def _row(self, rate: float) -> dict[str, Any]:
        step = (self.epoch + 1) * self.steps_per_epoch
        validation = self._validate()
        return {
            "epoch": self.epoch + 1,
            "step": step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "eps": self._eps(step),
            "train_loss": self.sums[0] / max(self.sums[2], 1),
            "train_clean": self.sums[1] / max(self.sums[2], 1),
            **validation,
            "lipschitz_upper": None,
            "images_per_second": rate,
            "seconds": self.elapsed + time.monotonic() - self.started,
        }

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Evaluate on the validation split with the *estimate* of L; certificates come from `lipcert certify`."""
        model = self._best()
        model.eval()
        logits_of = WithPairwise(model, self.estimated)
        constant = model.lipschitz_estimate(VALIDATION_ITERATIONS).item() if self.estimated else None
        classes = self.train_set.num_classes
        sums = torch.zeros(4, device=self.device)  # loss, clean, certified, labels
        confusion = torch.zeros(classes, classes, device=self.device)
        for images, labels in self.task.batches(
            self.val_set, self.config.batch_size // self.group.world, rank=self.group.rank, world=self.group.world
        ):
            images, labels = images.to(self.device), labels.to(self.device)
            with self._autocast():
                logits, pairwise = logits_of(images, 0)
            logits, labels = self.task.rows(logits.float(), labels)
            margins = logits.gather(1, labels[:, None]) - logits - self.config.eps * pairwise[labels]
            margins.scatter_(1, labels[:, None], torch.inf)
            sums[0] += self.loss(logits, labels, pairwise, self.config.eps) * len(labels)
            sums[1] += (logits.argmax(1) == labels).sum()
            sums[2] += (margins.amin(1) > 0).sum()
            sums[3] += len(labels)
            pairs = labels * classes + logits.argmax(1)
            confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        if self.group.world > 1:
            dist.all_reduce(sums)
            dist.all_reduce(confusion)
        loss, clean, certified = (sums[:3] / sums[3]).tolist()
        return {
            "val_loss": loss,
            "val_clean": clean,
            "val_certified": certified,
            "val_miou": mean_iou(confusion) if self.task.name == "segmentation" else None,
            "lipschitz_estimate": constant,
        }

    def _finish(self) -> dict[str, Any]:
        """Prove the bound of the final network and log it beside the estimate."""
        row = self.rows[-1]
        if self.group.is_main:
            proved = audit(export(self._best().cpu()), self.train_set.shape)
            bound = proved.upper if proved.head is None else proved.head.penultimate
            row["lipschitz_upper"] = bound.require_upper()
        self._save()  # by all processes: each adds its random state
        return row

    def _best(self) -> Estimated:
        if self.average is None:
            return self.model
        averaged = self.average.module
        assert isinstance(averaged, Estimated)  # AveragedModel copies what it is given
        return averaged

    def _eps(self, step: int) -> float:
        share = min(1.0, step / max(1.0, self.config.eps_ramp * self.steps))
        return self.config.eps * (self.config.eps_start + (self.config.eps_end - self.config.eps_start) * share)

    def _autocast(self):
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _metrics(self) -> str:
        return pd.DataFrame(self.rows, columns=list(METRICS)).to_csv(index=False)

    def _save(self) -> None:
        """Write `state.pt` and, derived from it, `metrics.csv`."""
        self.saved = time.monotonic()
        states = _gather(torch.get_rng_state(), self.group)
        if not self.group.is_main:
            return
        save_state(
            self.folder / "state.pt",
            {
                "config": to_yaml(self.config),
                "epoch": self.epoch,
                "batch": self.batch,
                "rows": self.rows,
                "sums": self.sums,
                "seconds": self.elapsed + self.saved - self.started,
                "model": self.model.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": states,
                "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
        )
        write_text(self.folder / "metrics.csv", self._metrics())

    def _restore(self, state: dict[str, Any]) -> None:
        if state["config"] != to_yaml(self.config):
            raise InputError(f"{self.folder} was trained with another configuration; resume it without changed options")
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.batch, self.rows = state["epoch"], state["batch"], state["rows"]
        self.sums, self.elapsed = state["sums"], state["seconds"]
        if len(state["random"]) != self.group.world:
            raise InputError(f"{self.folder} was trained by {len(state['random'])} processes; resume it with as many")
        torch.set_rng_state(state["random"][self.group.rank])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)


def build(recipe: dict[str, Any]) -> Estimated:
    """Create the model of a recipe (the content of a model folder's config.json); wrong arguments raise InputError."""
    keys = ("num_classes", "img_size", "in_chans")
    try:
        model = create_model(recipe["model"], **{key: recipe[key] for key in keys}, **recipe["kwargs"])
    except TypeError as error:
        raise InputError(f"model {recipe['model']!r}: {error}") from error
    if not isinstance(model, Estimated):
        raise InputError(f"model {recipe['model']!r} is not a lipcert.models.network.Estimated, which training needs")
    return model


def _gather(value: Tensor, group: Processes) -> list[Tensor]:
    if group.world == 1:
        return [value]
    values: list[Any] = [None] * group.world
    dist.all_gather_object(values, value)
    return values


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))
