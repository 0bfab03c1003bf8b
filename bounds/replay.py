"""Run the audited graph against the module that it was exported from.

torch.export follows the Python code of a model once. A model that asks `torch.compiler.is_exporting()`, draws at
random, or keeps a state that changes shows the exporter another function than it computes. So both are run on the same
random inputs of the domain, and a difference that rounding cannot explain is an error. Two functions that agree on
these inputs may still differ elsewhere: this catches mistakes, it is no proof.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lipcert.bounds.core import BoundError

_POINTS = 3
_TOLERANCE = 1e-5  # of the size of the outputs: islands of float32 in a model stay below, a wrong graph far above
_SINGLE = 1e-3  # the same for models that run in float32 alone


def replay(
    model: nn.Module,
    program: Callable[[Tensor], Tensor],
    input_shape: tuple[int, ...],
    domain: tuple[float | Tensor, float | Tensor],
) -> None:
    """Raise BoundError unless the module in float64 and evaluation mode computes what the exported program does.

    `program` maps float64 inputs (n, *input_shape) to outputs (n, ...). The inputs are drawn from the domain with a
    fixed seed; the caller's random state and the module are left alone.
    """
    plain = copy.deepcopy(model).eval().to(torch.float64)
    device = next((tensor.device for tensor in (*plain.parameters(), *plain.buffers())), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    bottom, top = (torch.as_tensor(end, dtype=torch.float64).cpu() for end in domain)
    low = torch.maximum(bottom, top.clamp_max(0.0) - 1.0)  # a finite part
    high = torch.minimum(top, bottom.clamp_min(0.0) + 1.0)
    unit = torch.rand(_POINTS, *input_shape, generator=generator, dtype=torch.float64)
    inputs = (low + (high - low) * unit).to(device)
    accelerators = [device.index or 0] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(accelerators), torch.autocast(device.type, enabled=False):
        expected = program(inputs)
        for turn in ("first", "second"):
            found, tolerance = _run(plain, inputs)
            found = _tensor(found)
            if found.shape != expected.shape:
                raise BoundError(
                    f"the model returns {tuple(found.shape)} where the program exported from it returns "
                    f"{tuple(expected.shape)}; it shows torch.export another function than it computes"
                )
            if not _agree(found, expected, tolerance):
                raise BoundError(
                    f"the model and the program exported from it disagree at the {turn} run by "
                    f"{float((found - expected).abs().max()):.3g}: it computes something else than what it shows "
                    "torch.export (torch.compiler.is_exporting(), random numbers, a state that changes); only what is "
                    "run can be bounded"
                )


def _run(plain: nn.Module, inputs: Tensor) -> tuple[object, float]:
    """Return what a module gives in float64, or in float32 if its own casts let it run in nothing else."""
    try:
        return plain(inputs.clone()), _TOLERANCE
    except Exception as error:
        try:
            return plain.to(torch.float32)(inputs.to(torch.float32)), _SINGLE
        except Exception:
            raise BoundError(
                f"the model was exported, but does not run in float64: {type(error).__name__}: {error}"
            ) from error


def _tensor(found: object) -> Tensor:
    """Return the one tensor that an export with one output returns, whatever holds it."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
    if len(leaves) != 1:
        raise BoundError(f"the model returns {len(leaves)} tensors, the program exported from it one")
    return leaves[0].to(torch.float64)


def _agree(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    same = torch.isnan(found) & torch.isnan(expected) | (found == expected)  # infinities too
    difference = torch.where(same, 0.0, found - expected).abs()
    scale = torch.where(torch.isfinite(expected), expected, 0.0).abs().max()
    return bool((difference <= tolerance * scale + 1e-280).all())
