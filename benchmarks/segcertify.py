"""The cost of a certificate for segmentation: lipcert's of an image against SegCertify's (100 + 10 samples).

    python benchmarks/segcertify.py [--record]                about 2 minutes on 2 cores

Both certify the same exported Lip-SegFormer in turns; reported is the ratio of their times for one image, its median
and range. Ours evaluates images in batches, as `lipcert certify` does, in float64 with a bound of the rounding error,
and counts pixels at four radii (`clearances`, `count`); its audit, once per network, is reported on its own. SegCertify
evaluates the samples of one image in batches, in float32, and the test of all pixels is part of it. What the two
certify differs: see lipcert/smoothing.py.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from results import record

from lipcert.bounds import audit
from lipcert.export import export
from lipcert.registry import create_model
from lipcert.segment import clearances, constants, count
from lipcert.smoothing import segcertify

EPS = (0.1, 0.25, 0.5, 1.0)


def main() -> None:
    torch.manual_seed(0)
    height, width = args.size
    model = create_model(args.model, num_classes=11, img_size=width, height=height).eval()
    begun = time.perf_counter()
    plain = export(model)
    proof = audit(plain, (3, height, width))
    auditing = time.perf_counter() - begun
    used = constants(proof)
    deployed = copy.deepcopy(plain).float()  # weights materialised: nothing that only training needs is timed
    labels = torch.zeros(height // 4, width // 4, dtype=torch.int64).numpy()

    def ours(images: torch.Tensor) -> int:
        for logits, error in zip(*proof.program.evaluate(images.double()), strict=True):
            found = clearances(logits.numpy(), error.item(), used.pairs)
            for eps in EPS:
                count(found, labels, eps, used.joint, used.pixel)
        return len(images)

    def theirs(images: torch.Tensor) -> int:
        segcertify(deployed, images[0], n=args.n, n0=args.n0)
        return 1

    contenders: tuple[Callable[[torch.Tensor], int], ...] = (ours, theirs)
    seconds: list[tuple[float, ...]] = []
    for number in range(args.rounds + 1):
        images, times = torch.rand(args.batch, 3, height, width), []
        for certify in contenders:
            begun = time.perf_counter()
            certified = certify(images)
            times.append((time.perf_counter() - begun) / certified)
        if number:  # the first one warms up
            seconds.append(tuple(times))
    ratios = [smoothing / mine for mine, smoothing in seconds]
    mine, smoothing = (1000 * statistics.median(times) for times in zip(*seconds, strict=True))
    text = (
        f"{args.model}, {height}x{width}, {args.rounds} rounds, batches of {args.batch}: "
        f"SegCertify with {args.n} + {args.n0} samples takes "
        f"{statistics.median(ratios):.1f} times as long (range {min(ratios):.1f} to {max(ratios):.1f}); "
        f"{mine:.0f} and {smoothing:.0f} ms an image; audit once {auditing:.1f} s"
    )
    print(text)
    if args.record:
        record("Segmentation", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lipsegformer_tiny")
    parser.add_argument("--size", type=int, nargs=2, default=(96, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--n0", type=int, default=10)
    parser.add_argument("--record", action="store_true", help="add a row to RESULTS.md")
    args = parser.parse_args()
    main()
