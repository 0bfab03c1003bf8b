"""Damaged files for every reader of lipcert, and the contract that a reader must keep.

A case is a seed: it takes the valid files of one reader, damages one of them (bits, chunks, lengths, JSON values, the
entries of a zip archive, the header of a safetensors file) and reads them. Allowed are success, InputError, BoundError
and Finding, which are what the command line turns into the exit codes 0, 2 and 3. Anything else, more than `SECONDS` of
processor time, or an allocation beyond the limit is a failure. A case that fails is reproduced by its reader and seed:

    python tests/fuzzing.py --reader run --seed 123 --keep /tmp/case
    python tests/fuzzing.py --seconds 3600
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lipcert.bounds import BoundError
from lipcert.errors import Finding, InputError

SECONDS = 60
MEMORY = 3 << 30  # bytes that the long run may allocate on top of what it holds at the start
ALLOWED = (InputError, BoundError, Finding)

NASTY: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**30, 10**400, 1e308, -0.0, float("nan"),
    float("inf"), "", "nan", "inf", "1e999", "../../etc/passwd", "/etc/passwd", "\0", "💥" * 50, "x" * 100_000, [], {},
    [[]], [None], {"": {}}, [0] * 1000, ["a", 1, None], "__import__('os')", "float64", "aten.relu.default",
)  # fmt: skip
DEEP = '["deep"]'  # replaced by 100 000 brackets: json.dumps itself could not write them


class TooSlow(BaseException):
    """A reader took too long. No Exception, so that no reader can take it for a damaged file."""


# --------------------------------------------------------------------------------------------------------- mutations


def damaged(data: bytes, name: str, rng: random.Random) -> bytes:
    """Return a damaged form of a file; what is damaged depends on the kind of the file, and sometimes on nothing."""
    kind = name.rsplit(".", 1)[-1]
    structured = {"json": _json, "safetensors": _safetensors, "pt2": _zip, "pt": _zip, "tsv": _table, "csv": _table}
    if kind in structured and rng.random() < 0.7:
        return structured[kind](data, rng)
    return _bytes(data, rng)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(20)))
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        at, length = rng.randrange(len(out) + 1), rng.choice((1, 2, 8, 64, 1000))
        what = rng.randrange(7)
        if what == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif what == 1:
            del out[at:]
        elif what == 2:
            del out[at : at + length]
        elif what == 3:
            out[at:at] = out[at : at + length]
        elif what == 4:
            out[at:at] = bytes(rng.randrange(256) for _ in range(length))
        elif what == 5:
            out[at : at + 8] = struct.pack("<q", rng.choice((0, -1, 2**31, 2**62, 2**40)))
        else:
            out[at : at + length] = bytes([rng.choice((0, 255, 34, 91, 123))]) * length
    return bytes(out)


def _json(data: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except ValueError:
        return _bytes(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _edited(value, rng)
    text = json.dumps(value)
    if rng.random() < 0.03:
        text = text.replace(json.dumps(rng.choice((1, 0, "float64", "affine"))), DEEP)
    return text.replace(DEEP, "[" * 100_000 + "]" * 100_000).encode(errors="surrogatepass")


def _edited(value: Any, rng: random.Random) -> Any:
    """Return JSON with one place changed: the deeper, the more often."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        made = dict(value)
        if rng.random() < 0.05:
            made[rng.choice(["", "x", "../x", "__class__", "dim"])] = made.pop(key)
        elif rng.random() < 0.05:
            del made[key]
        else:
            made[key] = _edited(value[key], rng)
        return made
    if isinstance(value, list) and value and rng.random() < 0.9:
        place, made = rng.randrange(len(value)), list(value)
        if rng.random() < 0.05:
            made.insert(place, value[rng.randrange(len(value))])
        elif rng.random() < 0.05:
            del made[place]
        else:
            made[place] = _edited(value[place], rng)
        return made
    if isinstance(value, int | float) and abs(value) < 2**1000 and rng.random() < 0.4:
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, value / 3))
    return rng.choice(NASTY)


def _table(data: bytes, rng: random.Random) -> bytes:
    separator = b"\t" if b"\t" in data else b","
    rows = [row.split(separator) for row in data.split(b"\n")]
    for _ in range(rng.choice((1, 1, 3))):
        row = rng.choice(rows)
        what = rng.randrange(4)
        if what == 0:
            row[rng.randrange(len(row))] = str(rng.choice(NASTY)).encode(errors="surrogatepass")
        elif what == 1 and len(row) > 1:
            del row[rng.randrange(len(row))]
        elif what == 2:
            row.append(rng.choice(row))
        else:
            rows.insert(rng.randrange(len(rows)), list(row))
    return b"\n".join(separator.join(row) for row in rows)


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    what = rng.randrange(4)
    if what == 0:
        return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 2**32, 2**63, 2**64 - 1))) + header + body
    if what == 1:  # numbers in the tensors: NaN, infinities, huge and tiny values
        out = bytearray(body)
        for _ in range(min(4, len(out) // 8)):
            at = rng.randrange(len(out) // 8) * 8
            out[at : at + 8] = struct.pack("<d", rng.choice((float("nan"), float("inf"), 1e308, 5e-324, -1e200)))
        return data[: 8 + length] + bytes(out)
    made = _json(header, rng)
    return struct.pack("<Q", len(made)) + made + body


def _zip(data: bytes, rng: random.Random) -> bytes:
    """Return the archive with one entry damaged, renamed, doubled, or compressed to a fraction of its size."""
    buffer = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            entries = [(name, old.read(name)) for name in old.namelist()]
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return _bytes(data, rng)
    place = rng.randrange(len(entries))
    name, content = entries[place]
    compression = zipfile.ZIP_STORED
    what = rng.randrange(10)
    if what == 0:
        name = rng.choice(
            ("../../evil", "/etc/evil", name + "/../../x", "models/other.json", "data/weights/weight_999", "x")
        )
    elif what == 1:
        entries.append((name, content))
    elif what == 2:
        content, compression = bytes(32 << 20), zipfile.ZIP_DEFLATED
    else:
        content = damaged(content, name if "." in name else "x.bin", rng)
    entries[place] = (name, content)
    with zipfile.ZipFile(buffer, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in entries:
            new.writestr(name, content, compression)
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------------- readers


@dataclass(frozen=True)
class Reader:
    """Make valid files in a folder, and read them; `files` are those to be damaged, as glob patterns.

    `often` is how many cases of a reader make about the work of the slowest.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    files: tuple[str, ...]
    often: int = 1


def _network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3)
    ).eval()


def _make_run(folder: Path) -> None:
    from lipcert.checkpoint import save_model, save_state
    from lipcert.config import TrainConfig, to_yaml
    from lipcert.registry import create_model

    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depths": [1], "neck": 32}
    shape = {"num_classes": 10, "img_size": 8, "in_chans": 1}
    model = create_model("lipshift_tiny", **shape, **sizes)
    save_model(model, folder / "model", {"model": "lipshift_tiny", "data": "digits", "kwargs": sizes, **shape})
    (folder / "config.yaml").write_text(to_yaml(TrainConfig(model="lipshift_tiny", data="digits", model_args=sizes)))
    save_state(folder / "state.pt", {"epoch": 1, "model": model.state_dict(), "history": [{"lr": 0.1}]})


def _make_results(folder: Path) -> None:
    """Certify, bound and fake an attack and a training of the run, for the report and the checker."""
    _make_run(folder)
    from lipcert.cli import main

    for arguments in (["certify", str(folder), "--limit", "4", "--radii", "0.1,1"],
                      ["bound", str(folder), "--lower-steps", "2", "--json", str(folder / "bound.json")]):  # fmt: skip
        with contextlib.suppress(SystemExit), _silent():
            main(arguments)
    rows = (folder / "certificates.tsv").read_text().splitlines()
    label = [row.split("\t")[1] for row in rows[1:]]
    columns = "eps idx label predict success distance time".split()
    cells = [["0.1", str(i), y, y, "0", "nan", "0.1"] for i, y in enumerate(label)]
    (folder / "attacks.tsv").write_text("".join("\t".join(row) + "\n" for row in [columns, *cells]))
    attack = {"eps": 0.1, "n": 4, "clean": 0.25, "robust": 0.25, "contradictions": [], "seconds": 1.0}
    (folder / "attacks.json").write_text(json.dumps([attack]))
    (folder / "env.json").write_text(json.dumps({"python": "3", "torch": "2", "device": "cpu"}))
    (folder / "metrics.csv").write_text("epoch,lr,train_loss,val_clean\n1,0.1,2.0,0.5\n2,0.05,1.0,0.6\n")


def _read_run(folder: Path) -> None:
    from lipcert.checkpoint import load_model, load_state
    from lipcert.config import load_config

    errors = []
    for read in (lambda: load_model(folder), lambda: load_config(folder / "config.yaml"),
                 lambda: load_state(folder / "state.pt")):  # fmt: skip
        try:
            read()
        except ALLOWED as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _read_results(folder: Path) -> None:
    from lipcert import certificate
    from lipcert.report import read, tables

    with contextlib.suppress(*ALLOWED):
        certificate.read(folder)
    runs = read.read_all([folder])
    tables.curves(runs), tables.attacks(runs)


def _build_page(folder: Path) -> None:
    from lipcert.report import page, read

    page.build(read.read_all([folder]))


def _verify(folder: Path) -> None:
    from lipcert.checker import check

    report = check(folder / "certificate.json")
    if not report.accepted:
        raise Finding(report.reason)


def _make_pair(folder: Path) -> None:
    from lipcert.pair import save_pair

    x, y = torch.rand(1, 4, 4, dtype=torch.float64), torch.rand(1, 4, 4, dtype=torch.float64)
    save_pair(folder / "pair.safetensors", x, y, _network().double(), {"quotient": "1.0"})


def _read_pair(folder: Path) -> None:
    from lipcert.pair import quotient, read_pair

    pair, _ = read_pair(folder / "pair.safetensors")
    quotient(torch.nn.Flatten(), pair["x"], pair["y"])


def _make_program(folder: Path) -> None:
    batch = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(_network(), (torch.zeros(2, 1, 4, 4),), dynamic_shapes=batch)
    torch.export.save(program, folder / "program.pt2")


def _read_program(folder: Path) -> None:
    from lipcert.bounds import audit
    from lipcert.cli.model import resolve_model

    found = resolve_model(str(folder / "program.pt2"))
    audit(found.model, found.input_shape or (1, 4, 4))


def _make_onnx(folder: Path) -> None:
    example = torch.zeros(1, 1, 4, 4)
    with _silent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _network(), (example,), folder / "network.onnx", dynamo=True, external_data=False, verbose=False
        )


def _read_onnx(folder: Path) -> None:
    from lipcert.bounds import audit
    from lipcert.onnx import load_onnx

    network = load_onnx(folder / "network.onnx")
    audit(network, network.shape or (1, 4, 4))


def _make_images(folder: Path) -> None:
    from PIL import Image

    for part in ("train", "test"):
        for name, suffix in (("cat", "png"), ("dog", "jpg"), ("fox", "bmp"), ("owl", "gif")):
            place = folder / "photos" / part / name
            place.mkdir(parents=True)
            Image.effect_noise((24, 20), 60).convert("RGB").save(place / f"0.{suffix}")


def _read_images(folder: Path) -> None:
    from lipcert import data

    source = data.load(f"folder:{folder / 'photos'}", None, "test", img_size=16)
    for images, _ in data.loader(source, 4, workers=0):
        assert bool(((images >= 0) & (images <= 1)).all())


RESULTS = (
    "*.tsv", "*.csv", "certificate.json", "summary.json", "bound.json", "attacks.json", "env.json", "config.yaml",
)  # fmt: skip
READERS = {
    "run": Reader(_make_run, _read_run, ("model/config.json", "model/model.safetensors", "config.yaml", "state.pt"), 8),
    "report": Reader(_make_results, _read_results, RESULTS, 16),
    "page": Reader(_make_results, _build_page, RESULTS),
    "checker": Reader(_make_results, _verify, ("certificate.json", "program.safetensors", "certificates.tsv"), 16),
    "pair": Reader(_make_pair, _read_pair, ("pair.safetensors",), 32),
    "pt2": Reader(_make_program, _read_program, ("program.pt2",), 8),
    "onnx": Reader(_make_onnx, _read_onnx, ("network.onnx",), 16),
    "images": Reader(_make_images, _read_images, ("photos/test/*/*",), 16),
}  # fmt: skip


def valid(reader: str, folder: Path) -> Path:
    """Make the valid files of a reader and check that they are valid."""
    READERS[reader].make(folder)
    with _silent(), contextlib.suppress(Finding):
        READERS[reader].read(folder)
    return folder


def case(reader: str, seed: int, source: Path, folder: Path) -> str:
    """Run one case in `folder` and return "read", the kind of error, or "failed: " and a traceback."""
    rng = random.Random(f"{reader} {seed}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    files = sorted(path for pattern in READERS[reader].files for path in folder.glob(pattern))
    for file in {rng.choice(files) for _ in range(rng.choice((1, 1, 1, 2)))}:
        file.write_bytes(damaged(file.read_bytes(), file.name, rng))
    try:
        with _limited(SECONDS), _silent(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[reader].read(folder)
    except ALLOWED as error:
        assert str(error).strip(), "an error without a sentence"
        return type(error).__name__
    except (Exception, TooSlow):
        return "failed: " + traceback.format_exc(limit=-6)
    return "read"


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TooSlow(f"more than {seconds} seconds of processor time")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _limit_memory() -> None:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))


def main() -> int:
    """Run cases for a while and print how many of each reader ended how; exit with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", choices=READERS, action="append", help="default: all, in turn")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=10**9, help="rounds; in one a fast reader has several cases")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--keep", type=Path, help="a folder that keeps the files of the last case")
    parser.add_argument("--seed", type=int, help="only this case of one reader")
    options = parser.parse_args()
    readers, begun = options.reader or list(READERS), time.time()
    found: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in readers}
    distinct: set[str] = set()
    with tempfile.TemporaryDirectory() as base:
        sources = {}
        for name in readers:
            sources[name] = valid(name, Path(tempfile.mkdtemp(dir=base)))
        _limit_memory()
        for number in range(options.first, options.first + options.count):
            cases = [(n, number * READERS[n].often + k) for n in readers for k in range(READERS[n].often)]
            if options.seed is not None:
                cases, options.seconds = [(readers[0], options.seed)], 0.0
            for name, seed in cases:
                result = case(name, seed, sources[name], options.keep or Path(base) / "case")
                found[name][result.split(":")[0]] += 1
                if result.startswith("failed"):
                    last = result.strip().splitlines()[-1][:200] + " | " + result.strip().splitlines()[-3][:160]
                    if last not in distinct:
                        distinct.add(last)
                        print(f"--- {name} {seed}\n{result}", flush=True)
            if time.time() - begun > options.seconds:
                break
    for name, counts in found.items():
        print(f"{name:8} {sum(counts.values()):6} cases: " + ", ".join(f"{n} {k}" for k, n in counts.most_common()))
    print(f"rounds {options.first} to {number}, {len(distinct)} different failures, {time.time() - begun:.0f} s")
    return 1 if distinct else 0


if __name__ == "__main__":
    raise SystemExit(main())
