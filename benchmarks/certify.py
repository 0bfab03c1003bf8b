"""The cost of a certificate: lipcert's certification of images against plain inference of the same network.

    python benchmarks/certify.py [--record]                about 1 minute on 2 cores

Certification evaluates in float64 and carries a bound of the rounding error through every operator; inference is the
float32 network in evaluation mode. The audit (once per network) is reported on its own. Medians over rounds in which
all take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from results import record

from lipcert.bounds import audit
from lipcert.export import export
from lipcert.registry import create_model


def main() -> None:
    torch.manual_seed(0)
    model = create_model(args.model, img_size=32).eval()
    plain = export(model)
    begun = time.perf_counter()
    proof = audit(plain, (3, 32, 32))
    auditing = time.perf_counter() - begun
    images = torch.rand(args.batch, 3, 32, 32)
    doubled = images.double()
    contenders: dict[str, Callable[[], object]] = {
        "inference, float32": lambda: model(images),
        "inference, float64": lambda: plain(doubled),
        "certification": lambda: proof.program.evaluate(doubled),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        for run in contenders.values():
            run()
        for _ in range(args.rounds):
            for name, run in contenders.items():
                begun = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begun)
    for name, times in seconds.items():
        ratios = [mine / base for mine, base in zip(times, seconds["inference, float32"], strict=True)]
        text = (
            f"{args.model}, {name}: {statistics.median(ratios):.2f} x float32 inference (range {min(ratios):.2f} to "
            f"{max(ratios):.2f}), {1000 * statistics.median(times) / args.batch:.2f} ms an image; "
            f"audit once {auditing:.1f} s"
        )
        print(text)
        if args.record and name == "certification":
            record("Certification", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lipshift_tiny")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--record", action="store_true", help="add rows to RESULTS.md")
    args = parser.parse_args()
    main()
