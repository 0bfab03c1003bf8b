"""Exported programs: read back as the same function, and never run as code, whatever the file holds."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli.test_cli import run
from torch import Tensor, nn

from lipcert.bounds import audit
from lipcert.errors import InputError
from lipcert.programs import ProgramNetwork, input_shape, load_program

MODEL = "models/model.json"


class Shifted(nn.Module):
    """In-place writing, pieces, constants and a symbolic batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        moved = torch.zeros_like(x)
        moved[:, :2, 1:] = x[:, :2, :-1]
        first, second = (self.inner(moved) + x).chunk(2, 1)
        return torch.cat([first, second * torch.arange(3.0, dtype=x.dtype)[0]], 1).reshape(x.shape[0], -1)


def small() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))


def saved(path: Path, network: nn.Module, shape: tuple[int, ...], batch: bool = True) -> Path:
    example = torch.zeros(2 if batch else 1, *shape)
    dynamic = ({0: torch.export.Dim("batch", min=1)},) if batch else None
    torch.export.save(torch.export.export(network.eval(), (example,), dynamic_shapes=dynamic), path)
    return path


@pytest.mark.parametrize(
    ("build", "shape", "batch"), [(Shifted, (4, 5, 5), True), (small, (1, 2, 3), True), (small, (1, 2, 3), False)]
)
def test_a_program_is_the_network_it_was_made_of(build, shape, batch, tmp_path) -> None:
    network = build()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2.0)
    program = load_program(saved(tmp_path / "m.pt2", network, shape, batch))
    assert input_shape(program, tmp_path) == shape
    again = ProgramNetwork(program, shape)
    x = torch.rand(3, *shape, dtype=torch.float64)
    torch.testing.assert_close(again(x), network.double()(x), rtol=1e-9, atol=1e-12)
    assert audit(program, shape).upper.value == pytest.approx(audit(network, shape).upper.value, rel=1e-5)
    (gradient,) = torch.autograd.grad(again(x.requires_grad_()).sum(), x)
    assert gradient.isfinite().all() and gradient.any()


def test_bound_knows_the_shape_and_names_the_modules(tmp_path, capsys) -> None:
    file = saved(tmp_path / "m.pt2", small(), (1, 2, 3))
    code, out, _ = run(capsys, "bound", file, "--lower-steps", "5", "--json", "-")
    record = json.loads(out)
    assert code == 0 and record["input"]["shape"] == [1, 2, 3]
    assert 0 < record["lower"] <= record["upper"] and record["layers"][0]["name"] == "1"
    code, _, err = run(capsys, "bound", file, "--input-shape", "3,4,4")
    assert code == 2 and "exported for inputs" in err


# --------------------------------------------------------------------------------------------- files that are attacks


class Mark:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def rewritten(file: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Return a copy of an archive after a change to its entries, by their names below the root."""
    with zipfile.ZipFile(file) as archive:
        entries = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    change(entries)
    made = file.with_name("changed.pt2")
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in entries.items():
            archive.writestr(f"changed/{name}", data)
    return made


def in_model(change: Callable[[dict], None]) -> Callable[[dict[str, bytes]], None]:
    def apply(entries: dict[str, bytes]) -> None:
        model = json.loads(entries[MODEL])
        change(model)
        entries[MODEL] = json.dumps(model).encode()

    return apply


def nodes(model: dict) -> list[dict]:
    return model["graph_module"]["graph"]["nodes"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(tmp_path / "m.pt2", small(), (1, 2, 3))


def test_a_pickle_in_the_sample_inputs_is_not_read(file, tmp_path) -> None:
    mark, buffer = tmp_path / "executed", io.BytesIO()
    torch.save((Mark(mark),), buffer)
    changed = rewritten(file, lambda entries: entries.update({"data/sample_inputs/model.pt": buffer.getvalue()}))
    expected = ProgramNetwork(load_program(file), (1, 2, 3))
    x = torch.rand(2, 1, 2, 3, dtype=torch.float64)
    assert torch.equal(ProgramNetwork(load_program(changed), (1, 2, 3))(x), expected(x))
    assert not mark.exists()


def test_torch_itself_would_run_it(file, tmp_path) -> None:
    """If this fails, torch has become safer, and programs.py may become shorter."""
    mark, buffer = tmp_path / "executed", io.BytesIO()
    torch.save((Mark(mark),), buffer)
    changed = rewritten(file, lambda entries: entries.update({"data/sample_inputs/model.pt": buffer.getvalue()}))
    with pytest.raises(Exception):  # noqa: B017 (whatever it says then)
        torch.export.load(changed)
    assert mark.exists()


def pickled_weight(entries: dict[str, bytes]) -> None:
    config = json.loads(entries["data/weights/model_weights_config.json"])
    next(iter(config["config"].values()))["use_pickle"] = True
    entries["data/weights/model_weights_config.json"] = json.dumps(config).encode()


def other_path(entries: dict[str, bytes]) -> None:
    config = json.loads(entries["data/weights/model_weights_config.json"])
    next(iter(config["config"].values()))["path_name"] = "../constants/opaque_obj_0"
    entries["data/weights/model_weights_config.json"] = json.dumps(config).encode()


def renamed(model: dict) -> None:
    text = json.dumps(model).replace('"input"', '"x=__import__(1)"')
    model.clear()
    model.update(json.loads(text))


def batch_size(model: dict, text: str) -> None:
    sizes = model["graph_module"]["graph"]["tensor_values"]["input"]["sizes"]
    sizes[0]["as_expr"]["expr_str"] = text


def tree(model: dict) -> None:
    call = model["graph_module"]["module_call_graph"][0]["signature"]
    call["in_spec"] = call["in_spec"].replace("builtins.tuple", "collections.namedtuple")


ATTACKS: dict[str, tuple[Callable[[dict[str, bytes]], None], str]] = {
    "pickled weights": (pickled_weight, "is stored as a pickle"),
    "weights elsewhere": (other_path, "is no tensor of this file"),
    "old weights": (lambda e: e.update({"data/weights/model.pt": pickle.dumps(1)}), "is no plain data"),
    "custom objects": (lambda e: e.update({"data/constants/custom_obj_0": pickle.dumps(1)}), "is no plain data"),
    "compiled code": (lambda e: e.update({"data/aotinductor/model/m.so": b"ELF"}), "is no plain data"),
    "a function of torch": (in_model(lambda m: nodes(m)[0].update(target="torch.hub.load")), "calls torch.hub.load"),
    "an operator that writes files": (
        in_model(lambda m: nodes(m)[0].update(target="torch.ops.aten.from_file.default")),
        "aten.from_file.default: no rule",
    ),
    "another library": (in_model(lambda m: nodes(m)[0].update(target="torch.ops.mine.evil.default")), "mine.evil"),
    "an expression": (in_model(lambda m: batch_size(m, "__import__('os').getcwd()")), "where a plain name or size"),
    "a name that is code": (in_model(renamed), "where a plain name or size"),
    "a class in the signature": (in_model(tree), "is not understood"),
    "no JSON": (lambda e: e.update({MODEL: b"{"}), "not JSON"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_no_plain_data_is_refused(name: str, file: Path, capsys) -> None:
    change, sentence = ATTACKS[name]
    changed = rewritten(file, change)
    with pytest.raises(InputError) as caught:
        load_program(changed)
    assert sentence in str(caught.value)
    code, out, err = run(capsys, "bound", changed)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1


def test_several_inputs_and_free_sizes_are_refused(tmp_path) -> None:
    two = torch.export.export(nn.Bilinear(2, 2, 2), (torch.zeros(1, 2), torch.zeros(1, 2)))
    torch.export.save(two, tmp_path / "two.pt2")
    with pytest.raises(InputError, match="bilinear|takes 2 inputs"):
        input_shape(load_program(tmp_path / "two.pt2"), tmp_path / "two.pt2")
    sizes = ({0: torch.export.Dim("n"), 2: torch.export.Dim("h")},)
    free = torch.export.export(nn.ReLU(), (torch.zeros(2, 3, 4, 4),), dynamic_shapes=sizes)
    torch.export.save(free, tmp_path / "free.pt2")
    with pytest.raises(InputError, match="only the batch dynamic"):
        input_shape(load_program(tmp_path / "free.pt2"), tmp_path / "free.pt2")
