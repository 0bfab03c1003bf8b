"""Tampered certificates: how many of them `lipcert verify` rejects, and whether it says the right reason.

    python benchmarks/mutations.py [--model lipsformer] [--certificate FOLDER] [--seeds 8] [--record]
                                                                                        about 4 minutes, one core

Every kind of `tests/tampering.py` that applies, with several random choices, on a certificate of its own (an untrained
LipShiFT or LipsFormer on 6 digits, or an untrained Lip-SegFormer on 3 images with masks) or on one that
`lipcert certify` wrote, with the images of its data set. Exits with 1 if one that is false is accepted, or one that is
still true is rejected.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from results import record

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import issuing  # noqa: E402
from tampering import Files, kinds, matches  # noqa: E402

from lipcert.checker import check  # noqa: E402
from lipcert.checker.reading import read_json  # noqa: E402
from lipcert.data import load, loader  # noqa: E402


def given(folder: Path, limit: int) -> Files:
    """Read a certificate and the first images of its data set."""
    facts = read_json(folder / "certificate.json")
    images = load(facts["data"], None, facts["split"]).first(facts["n"])
    files = Files.read(folder, np.concatenate([x.double().numpy() for x, _ in loader(images, 100)]))
    files.rows, files.images, files.record["n"] = files.rows[: 1 + limit], files.images[:limit], limit
    return files


MODELS = {
    "lipshift": ("LipShiFT", issuing.small),
    "lipshift-circular": ("LipShiFT, circular convolutions", partial(issuing.small, circular=True)),
    "lipshift-pooled": ("LipShiFT, l2 pooling", partial(issuing.small, neck=0)),
    "lipsformer": ("LipsFormer", issuing.lipsformer),
    "lipsegformer": ("Lip-SegFormer", issuing.certify_masks),
    "lipsegformer-mlp": ("Lip-SegFormer, mlp decoder", partial(issuing.certify_masks, decoder="mlp", depths=(2, 1, 1))),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--certificate", type=Path, help="folder with certificate.json; needs its data set")
    parser.add_argument("--model", choices=MODELS, default="lipshift", help="of the certificate of its own")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    counts: Counter[tuple[str, str, str]] = Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        name, made = MODELS[options.model]
        original = made(folder) if options.certificate is None else given(options.certificate, 6)
        for kind, change in kinds(original).items():
            for seed in range(options.seeds):
                files = original.copy()
                expected = change(files, np.random.default_rng([zlib.crc32(kind.encode()), seed]))
                files.write(folder)
                report = check(folder / "certificate.json", images=files.images, labels=files.labels)
                outcome = "accepted" if report.accepted else "rejected"
                right = matches(expected, report.reason)
                counts["still true" if expected == "" else "false", outcome, "right" if right else "other"] += 1
                if not right:
                    wrong.append(f"{kind} {seed}: {report.reason or 'accepted'}")
    false = sum(n for key, n in counts.items() if key[0] == "false")
    true = sum(n for key, n in counts.items() if key[0] == "still true")
    what = f"untrained {name}" if options.certificate is None else options.certificate.name
    row = (
        f"{what} | {false} | {counts['false', 'rejected', 'right'] + counts['false', 'rejected', 'other']} | "
        f"{counts['false', 'rejected', 'right']} | {true} | {counts['still true', 'accepted', 'right']}"
    )
    print("certificate | made false | rejected | for the reason | still true | accepted")
    print("\n".join([row, *wrong]))
    if options.record:
        record("Tampered certificates", row)
    return int(bool(counts["false", "accepted", "other"] or counts["still true", "rejected", "other"]))


if __name__ == "__main__":
    sys.exit(main())
