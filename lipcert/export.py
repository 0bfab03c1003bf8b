"""From a training module to plain torch: what is audited, certified and deployed."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lipcert.errors import InputError


def export(model: nn.Module) -> nn.Module:
    """Return a float64 copy in evaluation mode whose layers are plain torch: derived weights computed once, dropout
    gone.

    Every module that has an `export()` is replaced by what it returns; the others stay as they are, because the
    audit reads the operators they run and not their names. The original is not touched. NaN or infinite parameters
    raise InputError.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_complex() or tensor.is_quantized:  # a cast to float64 would drop imaginary parts, or fail
            raise InputError(f"{name} has the type {tensor.dtype}; only networks of real numbers can be audited")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{name} has NaN or infinite entries; train again or load another checkpoint")
    with torch.no_grad():
        plain = copy.deepcopy(model).to(torch.float64).eval()
        return _export(plain).eval().requires_grad_(False)


def _export(module: nn.Module) -> nn.Module:
    convert = getattr(module, "export", None)
    if callable(convert):
        return convert()
    for name, child in list(module.named_children()):
        setattr(module, name, _export(child))
    return module
