"""The command line: 0 if everything holds, 3 if not, 2 if files are missing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load_file

from .certificate import check


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="checker", description="Re-prove a certificate of lipcert with NumPy alone.")
    parser.add_argument("certificate", type=Path, help="certificate.json")
    parser.add_argument("--weights", type=Path, help="program.safetensors, if it is not beside the certificate")
    parser.add_argument("--images", type=Path, help="safetensors: images (n, c, h, w), perhaps labels (n, h, w)")
    options = parser.parse_args(arguments)
    try:
        tensors = {} if options.images is None else load_file(options.images)
        labels, images = tensors.pop("labels", None), next(iter(tensors.values()), None)
        report = check(options.certificate, weights=options.weights, images=images, labels=labels)
    except (OSError, ValueError, SafetensorError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(report if report.accepted else f"does not verify: {report.reason}")
    return 0 if report.accepted else 3


if __name__ == "__main__":
    sys.exit(main())
