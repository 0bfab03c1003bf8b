"""How fast what learns: optimizers and learning rates of a configuration."""

from __future__ import annotations

import math

import torch
from torch import nn

from lipcert.config import TrainConfig


def optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a configuration, in two groups: the encoder, and head and decoder at `head_lr` times its
    rate ("factor")."""
    encoder: list[nn.Parameter] = []
    last: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (last if name.startswith(("head.", "decoder.")) else encoder).append(parameter)
    groups = [{"params": encoder, "factor": 1.0}, {"params": last, "factor": config.head_lr}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.NAdam
    return kind(groups, config.lr, weight_decay=config.weight_decay)


def schedule(step: int, steps: int, config: TrainConfig) -> float:
    """Linear warm-up over the first share of the steps; over all of them cosine or a straight line to zero."""
    rise = min(1.0, (step + 1) / max(1.0, config.warmup * steps))
    return rise * (1 - step / steps if config.schedule == "poly" else 0.5 * (1 + math.cos(math.pi * step / steps)))
