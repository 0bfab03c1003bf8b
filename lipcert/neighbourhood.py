"""The neighbourhood of one input: a file that holds it, and the box of all inputs near it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lipcert.errors import InputError


def read_input(path: Path, shape: tuple[int, ...], domain: tuple[float, float]) -> Tensor:
    """Read one input as float64: an image (pixels scaled to the domain), a .npy array, or a .safetensors tensor "x".

    Raises InputError for what is none of these, has another shape, or holds values outside the domain.
    """
    low, high = domain
    if path.suffix == ".npy":
        x = _array(path)
    elif path.suffix == ".safetensors":
        x = _tensor(path)
    else:
        x = low + (high - low) * _pixels(path, shape)
    if tuple(x.shape) != shape and tuple(x.shape) == (1, *shape):
        x = x[0]
    if tuple(x.shape) != shape:
        raise InputError(f"{path} holds an input of {tuple(x.shape)}; the model takes {shape}")
    if not bool(((x >= low) & (x <= high)).all()):  # also for NaN
        raise InputError(f"{path} has values outside [{low:g}, {high:g}]; scale them, or give --domain")
    return x


def box(x: Tensor, radius: float, domain: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return the box of all inputs in the domain with no value further from x than the radius, ends outward.

    It holds all inputs within that l2 distance of x.

    >>> low, high = box(torch.tensor([0.0, 0.5], dtype=torch.float64), 0.25, (0.0, 1.0))
    >>> [round(float(end), 9) for end in (*low, *high)]
    [0.0, 0.25, 0.25, 0.75]
    """
    infinity = torch.full_like(x, torch.inf)
    below, above = torch.nextafter(x - radius, -infinity), torch.nextafter(x + radius, infinity)
    return below.clamp_min(domain[0]), above.clamp_max(domain[1])


def _array(path: Path) -> Tensor:
    import numpy

    try:
        found = numpy.load(path, allow_pickle=False)
        return torch.from_numpy(numpy.asarray(found, dtype=numpy.float64))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise InputError(f"{path} is not an array of numbers ({error}); write it with numpy.save") from error


def _tensor(path: Path) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("x").double()
    except (OSError, SafetensorError) as error:
        raise InputError(f'{path} holds no tensor "x" ({error}); save the input under that name') from error


def _pixels(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Return an image as (c, h, w) in [0, 1], in grey where the model takes one channel."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("L" if shape[:1] == (1,) else "RGB")
    except OSError as error:
        raise InputError(f"{path} is not a readable image, .npy or .safetensors file ({error})") from error
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).double() / 255.0
    return values.view(image.height, image.width, -1).permute(2, 0, 1)
