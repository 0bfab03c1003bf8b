"""A pair of inputs with their outputs, as a file that anybody can check with two forward passes.

The file is safetensors: `x`, `y` (one input each) and `f_x`, `f_y` (their outputs) in float64, and as text the model,
the SHA-256 of its weights, and the quotient ‖f(x) − f(y)‖ / ‖x − y‖ less the allowance for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lipcert.errors import InputError
from lipcert.files import require_writable, write_bytes


def save_pair(path: Path, x: Tensor, y: Tensor, network: Callable[[Tensor], Tensor], facts: Mapping[str, str]) -> Path:
    """Write two inputs (no batch dimension) and what the float64 network makes of them; return the path."""
    require_writable(path.parent)
    with torch.no_grad():
        outputs = [network(point[None])[0] for point in (x, y)]
    tensors = {"x": x, "y": y, "f_x": outputs[0], "f_y": outputs[1]}
    plain = {name: tensor.detach().cpu().double().contiguous() for name, tensor in tensors.items()}
    return write_bytes(path, save(plain, {key: str(value) for key, value in facts.items()}))


def read_pair(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the facts of such a file; another file raises InputError."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            facts = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a pair of inputs: {error}") from error
    if not {"x", "y", "f_x", "f_y"} <= tensors.keys():
        raise InputError(f"{path} holds {', '.join(tensors)}; a pair of inputs has x, y, f_x and f_y")
    return tensors, facts


def quotient(network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Return ‖f(x) − f(y)‖ / ‖x − y‖ of two inputs, by two forward passes in the precision of the network.

    >>> quotient(torch.nn.Flatten(), torch.zeros(1, 2, 2), torch.ones(1, 2, 2))
    1.0
    """
    with torch.no_grad():
        moved = network(x[None]) - network(y[None])
    return float(moved.norm() / (x - y).norm())
