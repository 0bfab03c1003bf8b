"""One training step of LipShiFT against ShiftViT of the same shape, and against the cost of the published estimate.

    python benchmarks/training_step.py [--record]          about 2 minutes on 2 cores

All contenders have the same width, depths, patches, images and batch; forward, loss, backward and AdamW step are
timed. ShiftViT has MLP ratio 4, so that a block has 8 C^2 weights where LipShiFT's 3x3 convolution has 9 C^2.
"published estimate" is the same LipShiFT with the norms estimated as the released code does: 10 power iterations per
convolution, one layer after the other, each on a fixed 32x32 grid. Contenders take turns; ratios are taken within a
round, and their median and range are reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from results import record
from torch import Tensor, nn

from lipcert.layers import pairwise_distances
from lipcert.models.shiftvit import lipshift, shiftvit
from lipcert.registry import losses

SHAPE = dict(num_classes=10, img_size=32, in_chans=3, embed_dim=96, depths=(2, 2, 4), patch_size=2)


def published_estimate(model: nn.Module) -> Tensor:
    """Return the sum of all convolution norms, estimated as the released code does."""
    total = torch.zeros(())
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            total = total + fixed_grid_norm(module.weight, module.stride[0], 0)
        elif hasattr(module, "branch"):
            total = total + fixed_grid_norm(module.weight, 1, module.weight.shape[-1] // 2)
    return total


def fixed_grid_norm(weight: Tensor, stride: int, padding: int) -> Tensor:
    if weight.shape[-1] > 8:  # the dense layer over the last map: its own grid
        return torch.linalg.vector_norm(weight.flatten(1) @ F.normalize(weight.flatten(1).detach().sum(0), dim=0))
    x = weight.new_ones(1, weight.shape[1], 32, 32)
    frozen = weight.detach()
    for _ in range(10):
        x = x / x.norm()
        x = F.conv_transpose2d(
            F.conv2d(x, frozen, stride=stride, padding=padding), frozen, stride=stride, padding=padding
        )
    return F.conv2d(x / x.norm(), weight, stride=stride, padding=padding).norm()


def contenders() -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    images, labels = torch.rand(args.batch, 3, 32, 32), torch.randint(10, (args.batch,))
    emma = losses.get("emma")

    def step(model: nn.Module, estimate: Callable[[nn.Module], Tensor] | None) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

        def run() -> None:
            logits = model(images)
            if estimate is None:
                loss = F.cross_entropy(logits, labels)
            else:
                loss = emma(logits, labels, estimate(model) * pairwise_distances(model.head.weight), 0.14)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        return run

    ours = dict(SHAPE, neck=0, pool="avg")
    return {
        "ShiftViT": step(shiftvit(**SHAPE, mlp_ratio=4, drop_path=0.0, divisor=12), None),
        "LipShiFT": step(lipshift(**ours), lambda model: model.lipschitz_estimate(1)),
        "LipShiFT, published block": step(
            lipshift(**ours, residual="published"), lambda model: model.lipschitz_estimate(1)
        ),
        "LipShiFT, published estimate": step(lipshift(**ours), published_estimate),
    }


def main() -> None:
    steps = contenders()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for run in steps.values():
        run()
    for _ in range(args.rounds):
        for name, run in steps.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    for name, times in seconds.items():
        ratios = [mine / base for mine, base in zip(times, seconds["ShiftViT"], strict=True)]
        text = (
            f"{name}: {statistics.median(ratios):.2f} x ShiftViT (range {min(ratios):.2f} to {max(ratios):.2f}, "
            f"{args.rounds} rounds), {1000 * statistics.median(times) / args.batch:.2f} ms an image"
        )
        print(text)
        if args.record and name != "ShiftViT":
            record("Training step", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--record", action="store_true", help="add rows to RESULTS.md")
    args = parser.parse_args()
    main()
