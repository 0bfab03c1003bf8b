"""Weights are computed in their own precision, whatever autocast does to the activations around them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def own_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast on the device of `tensor` (the meta device knows no autocast)."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)
