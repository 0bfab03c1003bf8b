"""Spectral norms of convolutions: lipcert's proved bounds against exact norms and against what others compute.

    python benchmarks/spectral_norm.py [--record]            about 4 minutes on 2 cores
    python benchmarks/spectral_norm.py --resnet50 [--record] all 53 convolutions of ResNet-50 at 224 x 224

Kernels are random (orthogonal at the start, as layers are) or smooth (low-pass, as trained ones tend to be); one run,
every method on the same kernels, in turn. The ratio is to the largest singular value over the torus that contains the
padded image, by a full SVD of every frequency, which is an upper bound. lipcert's is below 1 where it takes a tighter
torus; what is below that is no bound. Methods: lipcert; that SVD; torch's
spectral_norm (power iteration on the flattened kernel); power iteration on the operator itself; Gram iteration as
published (Delattre et al. 2023, float32, 6 steps, circular on the size of the image), here by its formulas; and, where
they are installed, deel-torchlip's and orthogonium's functions.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from results import record
from torch import Tensor, nn

from lipcert.bounds.convolution import conv_norm_upper

LAYERS = ((64, 32, 3), (128, 16, 3), (256, 16, 3), (512, 8, 3), (64, 28, 5))  # channels, image, kernel


def kernel(channels: int, size: int, smooth: bool) -> Tensor:
    weight = nn.init.orthogonal_(torch.empty(channels, channels * size * size)).view(channels, channels, size, size)
    if smooth:
        weight = weight + torch.ones(size, size) / size**2 * nn.init.orthogonal_(torch.empty(channels, channels))[
            :, :, None, None
        ]
    return weight


def full_svd(weight: Tensor, size: int) -> float:
    n = size + weight.shape[-1] // 2
    symbol = torch.fft.rfft2(weight.double(), s=(n, n)).permute(2, 3, 0, 1).flatten(0, 1)
    return max(float(torch.linalg.svdvals(block).amax()) for block in symbol.split(16))


def flattened_power(weight: Tensor, size: int, iterations: int) -> float:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], bias=False)
    conv.weight.data.copy_(weight)
    normed = nn.utils.parametrizations.spectral_norm(conv, n_power_iterations=iterations)
    with torch.no_grad():
        normed.train()(torch.zeros(1, weight.shape[1], size, size))
        return float(weight.flatten(1).norm() / normed.weight.flatten(1).norm())


def operator_power(weight: Tensor, size: int, iterations: int) -> float:
    x = torch.randn(1, weight.shape[1], size, size)
    pad = weight.shape[-1] // 2
    for _ in range(iterations):
        y = F.conv2d(x / x.norm(), weight, padding=pad)
        x = F.conv_transpose2d(y, weight, padding=pad)
    return float(F.conv2d(x / x.norm(), weight, padding=pad).norm())


def published_gram(weight: Tensor, size: int, steps: int = 6) -> float:
    blocks = torch.fft.rfft2(weight, s=(size, size)).permute(2, 3, 0, 1).flatten(0, 1)
    logarithm = torch.zeros(len(blocks))
    for _ in range(steps):
        norm = torch.linalg.vector_norm(blocks, dim=(1, 2))
        blocks = blocks / norm[:, None, None]
        logarithm = 2 * (logarithm + norm.log())
        blocks = blocks.mH @ blocks
    last = torch.linalg.vector_norm(blocks, dim=(1, 2)).log() + logarithm
    return math.exp(float(last.max()) / 2**steps)


def methods(channels: int, size: int) -> dict[str, Callable[[Tensor], float]]:
    found: dict[str, Callable[[Tensor], float]] = {
        "lipcert": lambda w: conv_norm_upper(w, (size, size), padding=w.shape[-1] // 2).value,
        "SVD of every frequency": lambda w: full_svd(w, size),
        **{f"torch spectral_norm, {k}": (lambda w, k=k: flattened_power(w, size, k)) for k in (1, 5, 20, 100)},
        **{f"power iteration, {k}": (lambda w, k=k: operator_power(w, size, k)) for k in (5, 100)},
        "Gram iteration as published, circular": lambda w: published_gram(w, size),
    }
    if importlib.util.find_spec("deel") is not None:
        from deel.torchlip.normalizers import spectral_normalization

        found["deel-torchlip spectral_normalization"] = lambda w: float(spectral_normalization(w.flatten(1))[2])
    if importlib.util.find_spec("orthogonium") is not None:
        from orthogonium.layers.conv.singular_values.delattre24 import compute_delattre2023, compute_delattre2024

        found["orthogonium, circular"] = lambda w: float(compute_delattre2023(w.clone(), size, 6))
        if channels <= 64:  # its kernels grow with every step
            found["orthogonium, zero padding"] = lambda w: float(compute_delattre2024(w.clone(), 3))
    return found


def compare() -> None:
    for channels, size, width in LAYERS:
        rows: dict[str, list[tuple[float, float]]] = {}
        for smooth in (False, True):
            torch.manual_seed(channels)
            weight = kernel(channels, width, smooth)
            exact = full_svd(weight, size)
            for name, method in methods(channels, size).items():
                times = []
                for _ in range(args.rounds):
                    begun = time.perf_counter()
                    value = method(weight)
                    times.append(time.perf_counter() - begun)
                rows.setdefault(name, []).append((value / exact, statistics.median(times)))
        base = statistics.median(t for _, t in rows["lipcert"])
        for name, found in rows.items():
            ratios, seconds = [r for r, _ in found], statistics.median(t for _, t in found)
            text = (
                f"{channels} channels, {width} x {width}, image {size}, {name}: {min(ratios):.6f} to {max(ratios):.6f} "
                f"of the norm, {1000 * seconds:.0f} ms, {seconds / base:.2f} x lipcert"
            )
            print(text, flush=True)
            if args.record:
                record("Spectral norms of convolutions", text)


def resnet50() -> None:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    sizes: dict[nn.Conv2d, tuple[int, ...]] = {}
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda layer, given, _: sizes.__setitem__(layer, tuple(given[0].shape[2:])))
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    begun = time.perf_counter()
    bounds = {
        layer: conv_norm_upper(
            layer.weight, size, stride=layer.stride, padding=layer.padding, method=args.method
        ).value
        for layer, size in sizes.items()
    }
    seconds = time.perf_counter() - begun
    ratios = [bound / estimate(layer, sizes[layer]) for layer, bound in bounds.items()]
    text = (
        f"ResNet-50, {len(bounds)} convolutions at 224 x 224, {args.method}: {seconds:.0f} s, bound at most "
        f"{max(ratios):.4f} of the converged power iteration (median {statistics.median(ratios):.6f})"
    )
    print(text)
    if args.record:
        record("Spectral norms of convolutions", text)


@torch.no_grad()
def estimate(layer: nn.Conv2d, size: tuple[int, ...]) -> float:
    """Return the norm of one convolution by power iteration, until a step gains less than 1e-6; at most 1000 steps."""
    torch.manual_seed(0)
    weight, options = layer.weight, {"stride": layer.stride, "padding": layer.padding}
    x, last = torch.randn(1, weight.shape[1], *size), 0.0
    for _ in range(1000):
        x = x / x.norm()
        y = F.conv2d(x, weight, **options)
        norm = float(y.norm())
        if norm - last <= 1e-6 * norm:
            break
        last = norm
        x = torch.ops.aten.convolution_backward(
            y, x, weight, None, layer.stride, layer.padding, (1, 1), False, (0, 0), 1, (True, False, False)
        )[0]
    return norm


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resnet50", action="store_true")
    parser.add_argument("--method", default="auto", choices=("auto", "tight"), help="of lipcert, with --resnet50")
    parser.add_argument("--record", action="store_true", help="add rows to RESULTS.md")
    args = parser.parse_args()
    (resnet50 if args.resnet50 else compare)()
