"""Networks that others trained: the proved bound against the product of layer norms, published values, and attacks.

    python benchmarks/audit.py --networks DIR [--only NAME ...] [--tight] [--record]

Seconds for the fully connected networks, minutes for each convolutional one with --tight. DIR holds the weights under
the names that their projects publish:

    lipsdp_random.mat, lipsdp_mnist.mat                                 arobey1/LipSDP (MIT)
    kw_mnist.pth, kw_fashion_mnist.pth, kw_l2_cifar_small_36px.pth      locuslab/convex_adversarial (MIT)
    mnist_cnn_small.pth, mnist_fc_3layer.pth, spectral_NOR_MLP_B.pth    Verified-Intelligence/auto_LiRPA (BSD-3)
    all others                                                          Verified-Intelligence/alpha-beta-CROWN (BSD-3)

The product is that of the bounds of the layers, each audited alone. "Attained" is the difference quotient of two inputs
in [0, 1], proved in real arithmetic; an upper bound below it is an error, and ends the run. Published: LipSDP's own
results. For lipsdp_mnist that is LipSDP-Network, whose multipliers were later shown to be invalid (Pauli et al. 2020,
arXiv 2005.02929): a reference, not a target. All weights of lipsdp_random are nonnegative, so its constant is known.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import scipy.io
import torch
from results import record
from torch import Tensor, nn

from lipcert.attacks.ascent import lipschitz_lower
from lipcert.bounds import audit


class Shift(nn.Module):
    """Normalise images: (x - mean) / std, per channel."""

    def __init__(self, mean: tuple[float, ...], std: float) -> None:
        super().__init__()
        self.mean, self.std = torch.tensor(mean)[:, None, None], std

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean.to(x.dtype)) / self.std


class Block(nn.Module):
    """A residual block of two 3×3 convolutions, with a 1×1 convolution beside them where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1)
        changed = stride > 1 or before != after
        self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride)) if changed else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


def dense(*widths: int, bias: bool = True) -> list[nn.Module]:
    layers = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b, bias), nn.ReLU())]
    return [nn.Flatten(), *layers[:-1]]


def convolutional(convolutions: list[tuple[int, ...]], *widths: int) -> list[nn.Module]:
    """Return Conv2d(in, out, kernel, stride, padding) each followed by ReLU, then fully connected layers."""
    return [part for options in convolutions for part in (nn.Conv2d(*options), nn.ReLU())] + dense(*widths)


def residual(first: int, blocks: list[tuple[int, int, int]], *widths: int) -> list[nn.Module]:
    return [nn.Conv2d(3, first, 3, 2, 1), nn.ReLU(), *(Block(*block) for block in blocks), *dense(*widths)]


MNIST, CIFAR = (1, 28, 28), (3, 32, 32)
FOUR = [(1, 16, 4, 2, 1), (16, 32, 4, 2, 1)]
OVAL = [(3, 8, 4, 2, 1), (8, 8, 3, 1, 1), (8, 8, 3, 1, 1), (8, 8, 4, 2, 1)]
MEAN = (0.485, 0.456, 0.406)
NETWORKS: dict[str, tuple[tuple[int, ...], Callable[[], list[nn.Module]]]] = {
    "lipsdp_random.mat": ((2,), lambda: dense(2, 10, 30, 20, 2, bias=False)),
    "lipsdp_mnist.mat": ((784,), lambda: dense(784, 50, 10, bias=False)),
    "mnist_fc_3layer.pth": (MNIST, lambda: dense(784, 128, 64, 10)),
    "spectral_NOR_MLP_B.pth": (MNIST, lambda: dense(784, 100, 100, 10)),
    "mnist_6_100_nat.pth": (MNIST, lambda: dense(784, *[100] * 5, 10)),
    "mnist_9_200_nat.pth": (MNIST, lambda: dense(784, *[200] * 8, 10)),
    "mnist_cnn_small.pth": (MNIST, lambda: convolutional([(1, 8, 4, 2, 1), (8, 16, 4, 2, 1)], 784, 256, 10)),
    "mnist_conv_small_nat.pth": (MNIST, lambda: convolutional([(1, 16, 4, 2), (16, 32, 4, 2)], 800, 100, 10)),
    "kw_mnist.pth": (MNIST, lambda: convolutional(FOUR, 1568, 100, 10)),
    "kw_fashion_mnist.pth": (MNIST, lambda: convolutional(FOUR, 1568, 100, 10)),
    "kw_l2_cifar_small_36px.pth": (
        CIFAR, lambda: [Shift(MEAN, 0.225), *convolutional([(3, 16, 4, 2, 1), FOUR[1]], 2048, 100, 10)]),
    "cifar_base.pth": (CIFAR, lambda: convolutional([(3, 8, 4, 2, 1), (8, 16, 4, 2, 1)], 1024, 100, 10)),
    "cifar_wide.pth": (CIFAR, lambda: convolutional([(3, 16, 4, 2, 1), FOUR[1]], 2048, 100, 10)),
    "cifar_deep.pth": (CIFAR, lambda: convolutional(OVAL, 512, 100, 10)),
    "cifar_marabou_medium.pth": (CIFAR, lambda: convolutional([(3, 16, 4, 2), (16, 32, 4, 2)], 1152, 128, 64, 10)),
    "resnet2b.pth": (CIFAR, lambda: residual(8, [(8, 16, 2), (16, 16, 1)], 1024, 100, 10)),
    "resnet4b.pth": (
        CIFAR, lambda: residual(16, [(16, 32, 2), (32, 32, 1), (32, 32, 2), (32, 32, 1)], 512, 100, 10)),
}  # fmt: skip
PUBLISHED = {
    "lipsdp_random.mat": "36.482 (LipSDP-Neuron; exact 36.48222959637795)",
    "lipsdp_mnist.mat": "24.320 (LipSDP-Network, invalid)",
}


def load(path: Path) -> nn.Sequential:
    """Return a network with the weights of a file, which must fit one by one in their order."""
    shape, layers = NETWORKS[path.name]
    model = nn.Sequential(*layers())
    if path.suffix == ".mat":
        tensors = [torch.as_tensor(w) for w in scipy.io.loadmat(path)["weights"].ravel()]
    else:
        state = torch.load(path, weights_only=True, map_location="cpu")
        state = state["state_dict"] if "state_dict" in state else state
        tensors = [*(state[0] if isinstance(state, list) else state).values()]
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    return model.double().eval()


def product(model: nn.Sequential, shape: tuple[int, ...]) -> float:
    """Return the product of the bounds of the layers."""
    value, x = 1.0, torch.zeros(1, *shape, dtype=torch.float64)
    for layer in model:
        value *= audit(layer, x.shape[1:]).upper.require_upper()
        x = layer(x)
    return value


def row(path: Path) -> str:
    """Return the cells of one network; raise SystemExit where an upper bound is below what two inputs attain."""
    model, shape = load(path), NETWORKS[path.name][0]
    with torch.no_grad():
        plain = product(model, shape)
    bounds, cells = {}, []
    for tightness in ["fast", "tight"] if args.tight else ["fast"]:
        begun = time.perf_counter()
        bounds[tightness] = audit(model, shape, tightness=tightness)
        method = bounds[tightness].layers[-1].method.split(",")[0]
        cells.append(f"{bounds[tightness].upper.value:.6g} ({method}, {time.perf_counter() - begun:.1f} s)")
    program = bounds["fast"].program
    lower = lipschitz_lower(model, shape, steps=args.steps, evaluate=program.evaluate)
    ends = program(torch.stack([lower.x, lower.y]))
    quotient = float((ends[0] - ends[1]).norm() / (lower.x - lower.y).norm())
    least = min(bound.upper.value for bound in bounds.values())
    if not lower.value <= quotient * (1 + 1e-9) <= least * (1 + 1e-6):
        raise SystemExit(f"{path.name}: two inputs attain {quotient}, says {lower.value}, the bound is {least}")
    cells += ["—"] * (2 - len(cells))
    cells += [PUBLISHED.get(path.name, "—"), f"{lower.value:.6g}", f"{least / lower.value:.2f}"]
    return " | ".join([path.stem, f"{plain:.6g}", *cells])


def main() -> None:
    torch.manual_seed(0)
    names = [name for name in NETWORKS if not args.only or name in args.only or name.split(".")[0] in args.only]
    missing = [name for name in names if not (args.networks / name).is_file()]
    if missing or not names:
        raise SystemExit(f"{args.networks} lacks {', '.join(missing) or 'all of these names'}")
    print("network | product | fast | tight | published | attained | bound / attained")
    for name in names:
        cells = row(args.networks / name)
        print(cells, flush=True)
        if args.record:
            record("Published networks", cells)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=Path, required=True, help="folder with the weights")
    parser.add_argument("--only", nargs="+", default=[], help="names of networks")
    parser.add_argument("--tight", action="store_true", help="also with optimised multipliers")
    parser.add_argument("--steps", type=int, default=200, help="of the search for a lower bound")
    parser.add_argument("--record", action="store_true", help="add rows to RESULTS.md")
    args = parser.parse_args()
    sys.argv = ["DIR" if word == str(args.networks) else word for word in sys.argv]  # rows name no folder of a machine
    main()
