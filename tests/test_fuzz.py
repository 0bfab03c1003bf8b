"""Readers of damaged and hostile files end in a sentence; `tests/fuzzing.py` makes the files and says what is right."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import fuzzing
import pytest
from cli.test_cli import run
from fuzzing import READERS, case, valid
from hypothesis import given, settings
from hypothesis import strategies as st

FEW, MANY = 6, 400
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what makes the valid files of a reader, once."""
    made: dict[str, Path] = {}

    def source(reader: str) -> Path:
        if reader == "onnx":
            pytest.importorskip("onnx")
            pytest.importorskip("onnxscript")
        if reader not in made:
            made[reader] = valid(reader, tmp_path_factory.mktemp(reader))
        return made[reader]

    return source


def check(reader: str, seeds: range, sources: Callable[[str], Path], folder: Path) -> None:
    source = sources(reader)
    results = {seed: case(reader, seed, source, folder / "case") for seed in seeds}
    failed = {seed: result for seed, result in results.items() if result.startswith("failed")}
    assert not failed, f"{len(failed)} of {len(seeds)}, such as seed {min(failed)}: {failed[min(failed)]}"
    assert len(seeds) < FEW or any(result != "read" for result in results.values()), "the damage was never noticed"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the optional libraries
def test_damaged_files_end_in_a_sentence(reader: str, sources: Callable[[str], Path], tmp_path: Path) -> None:
    check(reader, range(FEW * min(4, READERS[reader].often)), sources, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_many_damaged_files_end_in_a_sentence(reader: str, sources: Callable[[str], Path], tmp_path: Path) -> None:
    check(reader, range(1000, 1000 + MANY * READERS[reader].often // 8), sources, tmp_path)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([name for name in READERS if name not in ("page", "onnx", "images")]))
def test_noise_is_refused(tmp_path_factory: pytest.TempPathFactory, sources, noise: bytes, reader: str) -> None:
    folder = tmp_path_factory.mktemp("noise")
    name = {"run": "model/config.json", "report": "summary.json", "checker": "certificate.json"}.get(reader)
    path = folder / (name or READERS[reader].files[0])
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(noise)
    with pytest.raises((*fuzzing.ALLOWED, OSError)) as caught:
        READERS[reader].read(folder)
    assert str(caught.value) and (isinstance(caught.value, fuzzing.ALLOWED) or reader == "checker")


def edited(path: Path, change: Callable[[dict], object]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


HOSTILE: list[tuple[str, Callable[[Path], object], str]] = [
    # what would not fit into memory, or never end
    ("bound {}", lambda f: edited(f / "model/config.json", lambda r: r.update(num_classes=10**9)), "does not fit"),
    ("bound {}", lambda f: edited(f / "model/config.json", lambda r: r["kwargs"].update(embed_dim=10**12)), "no size"),
    ("bound {}", lambda f: edited(f / "model/config.json", lambda r: r["kwargs"].update(embed_dim=10**400)), "no size"),
    ("bound {}", lambda f: edited(f / "model/config.json", lambda r: r["kwargs"].update(depths=[10**6])), "no size"),
    ("bound {}", lambda f: edited(f / "model/config.json", lambda r: r["kwargs"].update(embed_dim="x")), "arguments"),
    ("bound {}", lambda f: edited(f / "model/config.json", lambda r: r.update(model=["lipshift_tiny"])), "by a text"),
    ("bound {}", lambda f: (f / "model/config.json").write_text("7"), "does not describe a model"),
    ("bound {}", lambda f: (f / "model/config.json").write_text(DEEP), "not a JSON file"),
    ("train --resume -o {}", lambda f: (f / "config.yaml").write_text("lr: .inf\nepochs: .inf\n"), "epochs"),
    ("train --resume -o {}", lambda f: (f / "config.yaml").write_text(DEEP), "not a YAML file"),
    ("train --resume -o {}", lambda f: (f / "config.yaml").write_text("seed: 2024-99-99\n"), "not a YAML file"),
    ("report {}", lambda f: (f / "bound.json").write_text('{"upper": 1' + "0" * 400 + "}"), "above all floats"),
    ("report {}", lambda f: (f / "config.yaml").write_text(DEEP), "nested too deeply"),
    ("report {}", lambda f: (f / "summary.json").write_text(DEEP), "not a JSON file"),
    ("verify {}", lambda f: [(f / name).write_text(DEEP) for name in ("certificate.json", "certificates.tsv")]
        + [(f / "program.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")], "certificate.json"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "change", "sentence"), HOSTILE, ids=[f"{i}" for i in range(len(HOSTILE))])
def test_hostile_files_of_a_run(arguments: str, change, sentence: str, run_folder: Path, capsys) -> None:
    change(run_folder)
    code, _, err = run(capsys, *arguments.format(run_folder).split())
    assert code in (2, 3) and sentence in err and "Traceback" not in err, err
    assert len(err) < 1000  # also where the file holds a hundred thousand brackets


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "x/../../evil", "archive/data/../../../evil"])
def test_no_entry_of_an_archive_leaves_it(name: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "inner" / "program.pt2"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/models/model.json", "{}")
        archive.writestr(name, "evil")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(capsys, "bound", str(path))
    assert code == 2 and "holds" in err and sorted(tmp_path.rglob("*")) == before


def test_an_archive_that_expands_is_not_unpacked(tmp_path: Path, capsys) -> None:
    path = tmp_path / "program.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/models/model.json", bytes(64 << 20))
    assert path.stat().st_size < 1 << 20
    code, _, err = run(capsys, "bound", str(path))
    assert code == 2 and "stored uncompressed" in err


def test_a_stripe_is_not_enlarged(tmp_path: Path) -> None:
    from PIL import Image

    from lipcert.data.images import ImageFiles
    from lipcert.errors import InputError

    buffer = io.BytesIO()
    Image.new("RGB", (100_000, 1)).save(buffer, "png")
    (tmp_path / "stripe.png").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="stripe"):
        ImageFiles((tmp_path / "stripe.png",), 224)[0]
