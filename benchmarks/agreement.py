"""The checker's own factors beside lipcert's: two programs that share no method, on every step of every certificate.

    python benchmarks/agreement.py FOLDER… [--record]        a few seconds a certificate, one core

FOLDER holds a certificate.json and program.safetensors that `lipcert certify` wrote. A factor of lipcert's is the one
that is written, without the slack that `lipcert.proof` adds. Deviations are |own / lipcert's - 1|, over all steps and
those of branches; what only composes branches is left out. Exits with 1 if a certificate does not verify.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from results import record

from lipcert.checker import check
from lipcert.checker.reading import read_json
from lipcert.proof import SLACK

CLOSE = 1e-6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    failed = False
    print("certificate | steps | factors not exactly 1 | largest deviation | at | above 1e-6 | own L | lipcert's L")
    for folder in options.folders:
        report = check(folder / "certificate.json")
        if not report.accepted:
            failed = True
            print(f"{folder}: {report.reason}")
            continue
        composed = {*_composed(read_json(folder / "certificate.json")["proof"]["steps"])}
        found = {
            value: abs(own * SLACK / claimed - 1)
            for value, own, claimed in report.own
            if (own, claimed) != (1.0, 1.0) and value not in composed
        }
        worst = max(found, key=lambda value: found[value])
        above = sum(deviation > CLOSE for deviation in found.values())
        row = (
            f"{folder.name} | {report.steps} | {len(found)} | {found[worst]:.1e} | {worst} | {above} | "
            f"{report.upper:.7g} | {report.claimed:.7g}"
        )
        print(row)
        if options.record:
            record("The checker's own factors", row)
    return int(failed)


def _composed(steps: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the values of steps with branches."""
    for step in steps:
        for branch in step.get("branches", []):
            yield step["value"]
            yield from _composed(branch["steps"])


if __name__ == "__main__":
    sys.exit(main())
