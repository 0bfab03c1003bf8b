"""The numerical setting in which certificates are computed.

Convolutions run in TF32 by default on NVIDIA GPUs (ten bits of mantissa), cuDNN and NNPACK may choose Winograd or FFT
algorithms, to which the usual rounding bounds do not apply, and autocast silently lowers the precision. `exact()`
switches all of it off in one place and says so in a record that goes into the certificate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import torch

# Where PyTorch keeps the precision of float32 products. Parents stand first: a child never set follows its parent.
_PRECISIONS = (
    ("generic", "all"),
    ("cuda", "all"),
    ("mkldnn", "all"),
    ("cuda", "matmul"),
    ("cuda", "conv"),
    ("cuda", "rnn"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
    ("mkldnn", "rnn"),
)


@contextmanager
def exact() -> Iterator[MappingProxyType[str, bool]]:
    """Compute without gradients, TF32, autocast, cuDNN and NNPACK, deterministically; restore every setting at the end.

    Yields the facts to be recorded beside a result. Raises RuntimeError if TF32 cannot be switched off.

    >>> with exact() as facts:
    ...     print(facts["tf32"], torch.is_grad_enabled())
    False False
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device in _autocast_devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        _without_reduced_precision(stack)
        _set(stack, torch.backends.cudnn, "enabled", False)
        _set(stack, torch.backends.cudnn, "benchmark", False)
        _set(stack, torch.backends.cudnn, "deterministic", True)
        nnpack = torch.backends.nnpack.set_flags(False)
        stack.callback(torch.backends.nnpack.set_flags, *nnpack)
        _deterministic(stack)
        facts = _facts()
        if facts["tf32"]:
            raise RuntimeError("TF32 could not be switched off; unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE and try again")
        yield MappingProxyType(facts)


def _without_reduced_precision(stack: ExitStack) -> None:
    """Set every float32 precision to "ieee", and the legacy flags with it.

    PyTorch refuses to read a legacy flag that disagrees with the newer settings, so they are changed together. The
    setters of the legacy flags overwrite newer settings, which therefore come back after them.
    """
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    matmul = _readable(torch.get_float32_matmul_precision)
    products = [(backend, "matmul", get(backend, "matmul")) for backend in ("cuda", "mkldnn")]
    convolutions = [("cuda", operation, get("cuda", operation)) for operation in ("conv", "rnn")]
    for backend, operation in _PRECISIONS:
        before = get(backend, operation)
        if before != "ieee":
            put(backend, operation, "ieee")
            stack.callback(put, backend, operation, before)
    if _readable(lambda: torch.backends.cudnn.allow_tf32) is None:  # it disagrees with "ieee", so it is on
        for setting in convolutions:
            stack.callback(put, *setting)
        _set(stack, torch.backends.cudnn, "allow_tf32", False, before=True)
    if matmul not in (None, "highest"):
        for setting in products:
            stack.callback(put, *setting)
        torch.set_float32_matmul_precision("highest")
        stack.callback(torch.set_float32_matmul_precision, matmul)


def _deterministic(stack: ExitStack) -> None:
    mode = torch.get_deterministic_debug_mode()
    stack.callback(torch.set_deterministic_debug_mode, mode)
    _set(stack, torch.utils.deterministic, "fill_uninitialized_memory", False)
    # Warn only: cuBLAS is deterministic on a single stream, but says otherwise unless an environment variable is set.
    stack.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", message=".*[Dd]eterministic.*", category=UserWarning)
    if not mode:  # somebody who asked for errors keeps them
        torch.use_deterministic_algorithms(True, warn_only=True)


def _facts() -> dict[str, bool]:
    read = torch._C._get_fp32_precision_getter
    return {
        "tf32": any(read(backend, operation) in ("tf32", "bf16") for backend, operation in _PRECISIONS),
        "autocast": any(torch.is_autocast_enabled(device) for device in _autocast_devices()),
        "cudnn": torch.backends.cudnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad": torch.is_grad_enabled(),
    }


def _autocast_devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _readable(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:  # legacy and newer settings were mixed
        return None


def _set(stack: ExitStack, owner: Any, name: str, value: object, before: object = None) -> None:
    before = getattr(owner, name) if before is None else before
    setattr(owner, name, value)
    stack.callback(setattr, owner, name, before)
