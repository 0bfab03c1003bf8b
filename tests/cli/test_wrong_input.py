"""Wrong input: exit code 2, nothing on stdout, one sentence on stderr that says what is wrong. One row per mistake."""

from __future__ import annotations

import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from lipcert.cli import main

# (arguments, a part of the sentence); {run}, {mine} ... are made by `places` below
CASES = [
    # the command line itself
    ("certfy {run}", "unknown command 'certfy'; did you mean 'certify'?"),
    ("bound {run} --lower-step 3", "No such option '--lower-step'"),
    ("bound", "Missing argument 'MODEL'"),
    # MODEL
    ("bound lipshift_tny", "unknown model 'lipshift_tny'; did you mean 'lipshift_tiny'?"),
    ("bound runs/none", "there is no folder runs/none; MODEL is a run folder"),
    ("bound {empty}", "holds no model"),
    ("bound timm:resnt18", "did you mean 'resnet18'"),
    ("bound timm:resnet18:V9", "write timm:NAME, timm:NAME.TAG or timm:NAME:random"),
    ("bound hf:segfrmer:random", "did you mean 'segformer'?"),
    ("bound hf:vit", "hf:vit:random builds that model with random weights"),
    ("bound hf:{empty}", "holds no config.json"),
    ("bound hf:{hf}", "transformers cannot load"),
    ("bound {base}/none.pt2", "there is no file"),
    ("bound {pt2}", "is not an exported program"),
    ("bound {zip}", "models/model.json is missing"),
    ("bound {onnx}", "is not a valid ONNX file"),
    ("bound {base}/none.onnx", "there is no file"),
    ("bound torchvision:resnt18", "did you mean 'resnet18'"),
    ("bound torchvision:fasterrcnn_resnet50_fpn", "neither classifies nor segments images"),
    ("bound torchvision:fcn_resnet50:random", "give --input-shape"),
    ("bound torchvision:resnet18:V9", "unknown weights of resnet18 'V9'"),
    ("bound {base}/none.py:build", "there is no file"),
    ("bound {mine}:bild --input-shape 1,8,8", "has no function bild"),
    ("bound {mine}:broken --input-shape 1,8,8", "failed with KeyError: 'width'"),
    ("bound {mine}:number --input-shape 1,8,8", "returned a int; it must return a torch.nn.Module"),
    ("bound {mine}:nothing --input-shape 1,8,8", "returned a NoneType; it must return a torch.nn.Module"),
    ("bound {noise}:build --input-shape 1,8,8", "failed with SyntaxError"),
    ("bound {mine}:branch --input-shape 1,8,8", "branches on data"),
    ("bound {mine}:two --input-shape 1,8,8", "must return one tensor"),
    ("bound {mine}:pair --input-shape 1,8,8", "cannot export"),
    ("bound {mine}:exporting --input-shape 1,8,8", "something else than what it shows"),
    ("bound {mine}:complex --input-shape 1,8,8", "only networks of real numbers"),
    ("bound {mine}:undefined --input-shape 1,8,8", "has NaN or infinite entries"),
    ("bound {syntax}:build --input-shape 1,8,8", "failed with SyntaxError"),
    # weights
    ("bound {truncated}", "is not a complete safetensors file"),
    ("bound {nan}", "has NaN or infinite entries"),
    ("bound {other}", "does not fit the model"),
    ("bound {lacking}", "lacks num_classes"),
    ("bound {nojson}", "is not a JSON file"),
    # shapes and values
    ("bound {mine}:build", "give --input-shape"),
    ("bound {mine}:build --input-shape 3,5,5", ""),
    ("bound {run} --input-shape 3,32,32", "was built for inputs of (1, 8, 8), not (3, 32, 32)"),
    ("bound lipshift_tiny --input-shape 3,32,16", "takes square images"),
    ("bound {run} --input-shape 3x32x32", "'3x32x32' is not a shape; write"),
    ("bound {run} --domain 1,0", "'1,0' is not a domain; write"),
    ("bound {run} --json {mine}/sub/bound.json", "cannot write to the folder"),
    ("bound {run} --json {empty}", "is a folder; name a file or - for stdout"),
    ("bound {run} --html {empty}", "is a folder; name a file"),
    ("bound {run} --html -", "the page goes into a file"),
    ("bound {run} --html {mine}/page.html", "cannot write to the folder"),
    ("bound {run} -o {mine}/pair.safetensors", "cannot write to the folder"),
    ("bound {run} --claimed many", "'many' is not a Lipschitz constant"),
    ("bound {run} --claimed -1", "'-1' is not a Lipschitz constant"),
    ("bound {run} --claimed nan", "'nan' is not a Lipschitz constant"),
    ("bound {run} --data digts", "did you mean 'digits'?"),
    ("bound {mine}:build --input-shape 1,10,10 --data digits", "the images of digits are (1, 8, 8)"),
    # lists
    ("models zzz*", "no model matches 'zzz*'"),
    ("presets digit", "unknown preset 'digit'; did you mean 'digits'?"),
    ("data --download cifar", "unknown dataset 'cifar'; did you mean 'cifar10'"),
    ("env --device gpu", "unknown device 'gpu'; use auto, cpu, cuda or cuda:0"),
    ("env --device cuda:99", "is not there: torch sees"),
    # train
    ("train --model lipshift_tny -o {new}", "unknown model 'lipshift_tny'; did you mean 'lipshift_tiny'?"),
    ("train --model lipshift_tiny --data digts -o {new}", "unknown dataset 'digts'; did you mean 'digits'?"),
    ("train --preset digits --loss ema -o {new}", "unknown loss 'ema'; did you mean 'emma'?"),
    ("train --preset digit -o {new}", "unknown preset 'digit'; did you mean 'digits'?"),
    ("train --preset digits --set epoch=3 -o {new}", "unknown key 'epoch' (did you mean 'epochs'?)"),
    ("train --preset digits --set lr=fast -o {new}", "lr: 'fast' is not a number"),
    ("train --preset digits --set augment=flop -o {new}", "unknown augmentation 'flop'; did you mean 'flip'?"),
    ("train --preset digits --eps abc -o {new}", "'abc' is not a radius; write"),
    ("train --preset digits --epochs 0 -o {new}", "epochs"),
    ("train --preset digits --data cifar10 --data-root {empty} -o {new}", "cifar-10-batches-py is missing; fetch it"),
    ("train --preset digits --device cuda:99 -o {new}", "is not there: torch sees"),
    ("train --preset digits -o {mine}/run", "cannot write to the folder"),
    ("train --preset digits -o {run}", "--resume"),
    ("train --resume -o {empty}", "config.yaml"),
    ("train {base}/none.yaml -o {new}", "none.yaml"),
    # certify
    ("certify {run} --radii abc", "'abc' is not a radius; write"),
    ("certify {run} --data digts", "unknown dataset 'digts'; did you mean 'digits'?"),
    ("certify {run} --split valid", "'valid'"),
    ("certify {run} --data cifar10 --data-root {empty}", "(1, 8, 8)"),
    ("certify {run} --data mnist --data-root {mnist}", "(1, 8, 8)"),
    ("certify lipshift_tiny --data cifar10 --data-root {empty} -o {new}", "cifar-10-batches-py is missing; fetch it"),
    ("certify {run} --limit 0", "limit"),
    ("certify {run} --limit 2 -o {mine}/sub", "cannot write to the folder"),
    ("certify {nan}", "has NaN or infinite entries"),
    ("certify {truncated}", "is not a complete safetensors file"),
    ("certify runs/none", "there is no folder runs/none"),
    # attack
    ("attack {run} --eps abc", "'abc' is not a radius; write"),
    ("attack {run} --eps -1", "'-1' is not a radius; write"),
    ("attack {run} --eps 0.5 --version standrd", "standrd"),
    ("attack {run} --eps 0.5 --data digts", "unknown dataset 'digts'; did you mean 'digits'?"),
    ("attack {nan} --eps 0.5", "has NaN or infinite entries"),
    # report and export
    ("report {base}/none", "none"),
    ("report {empty}", ""),
    ("export {run} {base}/model.xyz", "xyz"),
    ("export runs/none {base}/model.pt2", "there is no folder runs/none"),
]

MINE = """
import torch
def build(): return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 3))
def broken(): return {}["width"]
def number(): return 3
def nothing(): pass
class Apply(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
    def forward(self, *x): return self.function(*x)
def branch(): return Apply(lambda x: x if x.sum() > 1 else 2 * x)
def two(): return Apply(lambda x: (x, x))
def pair(): return torch.nn.Bilinear(8, 8, 2)
def exporting(): return Apply(lambda x: x if torch.compiler.is_exporting() else 2 * x)
def complex():
    network = Apply(lambda x: x)
    network.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    return network
def undefined():
    network = build()
    network[0].weight.data.fill_(float("nan"))
    return network
"""


@pytest.fixture(scope="module")
def _places(tmp_path_factory: pytest.TempPathFactory, _untrained_run: Path) -> dict[str, Path]:
    """Make good and bad runs, files and folders; refused commands change none of them."""
    tmp_path = tmp_path_factory.mktemp("wrong")
    run_folder = Path(shutil.copytree(_untrained_run, tmp_path / "run"))
    made = {"base": tmp_path, "run": run_folder}
    for name in ("empty", "mnist"):
        made[name] = tmp_path / name
        made[name].mkdir()
    for name, text in (("mine", MINE), ("syntax", "def build(:")):
        made[name] = tmp_path / f"{name}.py"
        made[name].write_text(text)
    for name in ("truncated", "nan", "other", "lacking", "nojson"):
        made[name] = Path(shutil.copytree(run_folder, tmp_path / name))
    weights = run_folder / "model" / "model.safetensors"
    (made["truncated"] / "model" / "model.safetensors").write_bytes(weights.read_bytes()[:-1000])
    state = safetensors.numpy.load_file(weights)
    first = next(name for name, array in state.items() if array.ndim > 1)
    _save(made["nan"], {**state, first: np.full_like(state[first], np.nan)})
    _save(made["other"], {**state, first: state[first][:-1]})
    config = made["lacking"] / "model" / "config.json"
    config.write_text(config.read_text().replace('"num_classes"', '"classes"'))
    (made["nojson"] / "model" / "config.json").write_text("{")
    noise = np.random.default_rng(0).bytes(3000)
    for name in ("pt2", "onnx"):
        made[name] = tmp_path / f"noise.{name}"
        made[name].write_bytes(noise)
    made["noise"] = tmp_path / "noise.py"
    made["noise"].write_bytes(b"\x00\x93" + noise)
    made["zip"] = tmp_path / "other.pt2"
    with zipfile.ZipFile(made["zip"], "w") as archive:
        archive.writestr("a/data.txt", "")
    made["hf"] = tmp_path / "hf"
    made["hf"].mkdir()
    (made["hf"] / "config.json").write_text("{}")
    _fake_mnist(made["mnist"] / "MNIST" / "raw")
    return made


@pytest.fixture
def places(_places: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Return what the rows name; {new} is a folder that does not exist."""
    return {**_places, "new": tmp_path / "new"}


def _save(run: Path, state: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file({name: array.copy() for name, array in state.items()}, run / "model/model.safetensors")


def _fake_mnist(raw: Path) -> None:
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 10, 28, 28) + bytes(7840))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 10) + bytes(range(10)))


@pytest.mark.parametrize(("arguments", "sentence"), CASES, ids=[arguments for arguments, _ in CASES])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the optional libraries
def test_wrong_input(arguments: str, sentence: str, places: dict[str, Path], capsys) -> None:
    for sign, library in {"timm:": "timm", "hf:": "transformers", "onnx": "onnx"}.items():
        if sign in arguments and arguments.startswith("bound"):
            pytest.importorskip(library)
    with pytest.raises(SystemExit) as caught:
        main([part.format(**places) for part in arguments.split()])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("running ") and " is untrained: " not in line]
    assert caught.value.code == 2, err
    assert out == ""
    assert lines and lines[0].startswith("Error: ") and sentence in lines[0], err
    assert len(lines) == 1 and "Traceback" not in err, err
    assert not places["new"].exists() or not any(places["new"].iterdir()), "a refused command leaves nothing behind"
