"""Exported programs (`.pt2`), read as data.

`torch.export.load` trusts its file: pickled weights, sample inputs and custom objects are unpickled without
restrictions, compiled libraries are loaded, sizes are evaluated as Python expressions, and names go into generated
code. So the archive is not given to it as it is. Its JSON and its raw tensors are read, checked, and written into a
fresh archive without any pickle; whatever is not on the lists below is refused. What is left is a graph of ATen
operators that `lipcert.bounds` has rules for, and numbers.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipcert.bounds.core import RULES
from lipcert.bounds.graph import Graph, call, given
from lipcert.bounds.tracing import trace
from lipcert.errors import InputError
from lipcert.quiet import quiet

_MODEL, _WEIGHTS, _CONSTANTS = "models/model.json", "data/weights/", "data/constants/"
_TENSOR_FILES = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_MARKS = ("archive_format", "archive_version", "byteorder", ".data/version")
_DROPPED = ("data/sample_inputs/model.pt", ".data/serialization_id", ".format_version", ".storage_alignment", "version")

_NAME = re.compile(r"[A-Za-z_]\w*")
_PATH = re.compile(r"[\w.]*")
_SYMBOL = re.compile(r"[su]\d+")
_EXPRESSION = re.compile(
    r"(?:Symbol\('[su]\d+'(?:, [a-z]+=(?:True|False))*\)|Integer|Add|Mul|Max|Min|FloorDiv|Mod|PythonMod|CleanDiv"
    r"|[su]\d+|\d+|[-+*(), ])+"
)
_ARGUMENTS = frozenset(
    f"as_{kind}"
    for kind in (
        "none tensor tensors int ints float floats bool bools string expr name hint scalar_type memory_format layout "
        "device optional_tensor optional_tensors sym_int sym_ints sym_bool sym_float strings"
    ).split()
)
# operators that make constants or take apart what others return; the rest must have a rule
_MORE_OPERATORS = frozenset(
    "arange zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full scalar_tensor "
    "linspace eye tril triu chunk split split_with_sizes unbind tensor_split unsafe_chunk unsafe_split to _to_copy "
    "type_as lift_fresh_copy alias contiguous clone detach sym_size sym_numel dropout feature_dropout _assert_scalar "
    "_assert_tensor_metadata sym_constrain_range_for_size sym_constrain_range cat stack pow arange_ meshgrid outer "
    "rsqrt sqrt reciprocal exp log".split()
)
_FUNCTIONS = frozenset(f"_operator.{n}" for n in "getitem add sub mul floordiv mod eq ne lt le gt ge neg".split()) | {
    "torch.sym_int", "torch.sym_max", "torch.sym_min", "torch.sym_not", "torch.sym_float", "math.ceil", "math.floor"
}  # fmt: skip


class ProgramNetwork(nn.Module):
    """An exported program as a module in float64 whose operators run one by one, and can be differentiated."""

    def __init__(self, program: torch.export.ExportedProgram, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.program, self.input_shape = program, input_shape
        self.graph: Graph = trace(program, input_shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramNetwork:
        return self  # nothing in it ever changes

    def forward(self, x: Tensor) -> Tensor:  # (n, *input_shape)
        if not self.graph.batched and x.shape[0] != 1:
            return torch.cat([self.forward(one) for one in x.split(1)])
        values: dict[str, Any] = {self.graph.input.name: x}
        for node in self.graph.nodes[1:]:
            arguments = {key: given(value, values, x) for key, value in node.arguments.items()}
            if node.op == "aten.copy.default":  # the same as torch's operator, which has no derivative
                result = arguments["src"].expand(arguments["self"].shape)
            else:
                result = call(node.target, arguments)
            values[node.name] = result if node.output is None else result[node.output]
        return values[self.graph.output]


def load_program(path: Path) -> torch.export.ExportedProgram:
    """Read a `.pt2` file that `torch.export.save` wrote; InputError names what is damaged or not plain data."""
    try:
        archive = _sanitised(path)
    except InputError:
        raise
    except Exception as error:  # names that are no text, streams that do not unpack, JSON of another form
        raise InputError(f"{path} is not an exported program; it is damaged ({error})") from error
    try:
        with quiet("torch.export"):
            program = torch.export.load(io.BytesIO(archive))
        program._example_inputs = _example(program), {}  # torch's functionalisation looks at them
        return program
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"torch cannot read the exported program {path}: {reason[0][:200]}") from error


def input_shape(program: torch.export.ExportedProgram, path: Path) -> tuple[int, ...]:
    """Return the shape of one input of a program with one tensor as its input."""
    wanted = set(program.graph_signature.user_inputs)
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted]
    values = [node.meta.get("val") for node in inputs]
    if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].ndim < 2:
        raise InputError(f"{path} takes {len(values)} inputs; a bound needs one tensor (batch, ...)")
    shape = tuple(values[0].shape[1:])
    if not all(isinstance(size, int) for size in shape):
        raise InputError(f"{path} takes inputs of any size {shape}; export it with only the batch dynamic")
    return shape


def _example(program: torch.export.ExportedProgram) -> tuple[Any, ...]:
    wanted = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted]
    sizes = [[size if isinstance(size, int) else 2 for size in v.shape] for v in values if isinstance(v, Tensor)]
    return tuple(torch.zeros(size, dtype=value.dtype) for size, value in zip(sizes, values, strict=False))


# ------------------------------------------------------------------------------------------------------- the archive


def _sanitised(path: Path) -> bytes:
    """Return a fresh archive with the checked JSON and the raw tensors of a .pt2 file, and nothing else."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            size = sum(entry.file_size for entry in archive.infolist())
            if size > path.stat().st_size:
                raise InputError(f"{path} holds {size} bytes, more than it is long; programs are stored uncompressed")
            root = names[0].split("/")[0] + "/" if names else ""
            entries = {name.removeprefix(root): archive.read(name) for name in names}
            if len(entries) != len(names):
                raise InputError(f"{path} holds two files of one name; it is damaged")
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path} is not an exported program: {error}") from error
    if _MODEL not in entries:
        raise InputError(f"{path} is not an exported program: {_MODEL} is missing; write it with torch.export.save")
    strange = [name for name in entries if not _known(name)]
    if strange:
        raise InputError(f"{path} holds {strange[0]}, which is no plain data; only tensors and JSON are read")
    made = {name: data for name, data in entries.items() if _TENSOR_FILES.fullmatch(name) or name in _MARKS}
    made[_MODEL] = json.dumps(_checked_model(_object(path, _MODEL, entries), path)).encode()
    for name in _CONFIGS:
        made[name] = json.dumps(_checked_config(_object(path, name, entries), name, path)).encode()
    samples = io.BytesIO()
    torch.save(((), {}), samples)
    made["data/sample_inputs/model.pt"] = samples.getvalue()
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for name, data in made.items():
        if name not in (".data/version", "byteorder"):  # the writer makes these itself
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return buffer.getvalue()


def _known(name: str) -> bool:
    return bool(_TENSOR_FILES.fullmatch(name)) or name in (_MODEL, *_CONFIGS, *_MARKS, *_DROPPED)


def _object(path: Path, name: str, entries: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        value = json.loads(entries[name])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: {name} is missing or not JSON; the file is damaged") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: {name} is not an object; the file is damaged")
    return value


def _checked_config(config: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    for weight, entry in config.get("config", {}).items():
        if entry.get("use_pickle") or not entry.get("tensor_meta"):
            raise InputError(f"{path}: {weight} is stored as a pickle, which could run code; save plain tensors")
        if not _TENSOR_FILES.fullmatch(name.rsplit("/", 1)[0] + "/" + str(entry.get("path_name"))):
            raise InputError(f"{path}: {weight} lies in {entry.get('path_name')!r}, which is no tensor of this file")
        _check(entry, path, "")
    return config


def _checked_model(model: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the program with only what it needs, every string of it checked."""
    for symbol in model.get("range_constraints", {}):
        _match(_SYMBOL, symbol, path)
    graph = model.get("graph_module", {}).get("graph", {})
    if graph.get("custom_obj_values"):
        raise InputError(f"{path} holds custom objects, which could run code")
    foreign = sorted({str(node.get("target")) for node in graph.get("nodes", ()) if not _allowed(node.get("target"))})
    if foreign:
        raise InputError(f"{path} calls {', '.join(foreign)}: no rule for it, nothing is assumed, and it is not run")
    for node in graph.get("nodes", ()):
        kept = ("stack_trace", "nn_module_stack")
        node["metadata"] = {key: text for key, text in node.get("metadata", {}).items() if key in kept}
    made = {**model, "guards_code": []}
    made["graph_module"] = {**model["graph_module"], "metadata": {}, "treespec_namedtuple_fields": {}}
    _check({key: value for key, value in made["graph_module"].items() if key != "module_call_graph"}, path, "")
    for call_site in made["graph_module"].get("module_call_graph", ()):
        _check_trees(call_site, path)
    return made


def _allowed(target: Any) -> bool:
    if not isinstance(target, str):
        return False
    parts = target.split(".")
    if parts[:3] == ["torch", "ops", "aten"] and len(parts) == 5:
        name = parts[3].removesuffix("_") if not parts[3].startswith("__") else parts[3]
        return name in _MORE_OPERATORS or any(rule.startswith(f"aten.{name}.") for rule in RULES)
    return target in _FUNCTIONS


def _check(value: Any, path: Path, key: str) -> None:
    """Walk JSON: keys, names and expressions may hold nothing that generated code or an evaluation could trip over."""
    if isinstance(value, dict):
        for inner, item in value.items():
            if inner.startswith("as_") and inner not in _ARGUMENTS:
                raise InputError(f"{path} has an argument of the kind {inner}, which is not understood")
            if inner != "metadata":
                _match(_PATH, inner, path)
                _check(item, path, inner)
    elif isinstance(value, list):
        for item in value:
            _check(item, path, key)
    elif isinstance(value, str) and key in _STRINGS:
        _match(_STRINGS[key], value, path)
    elif isinstance(value, str) and key not in ("as_string", "as_strings", "target"):
        _match(_PATH, value, path)


_STRINGS = {"expr_str": _EXPRESSION, "name": _NAME, "as_name": _NAME, "type": re.compile(r"[a-z]+")}


def _check_trees(value: Any, path: Path) -> None:
    """Allow tuples, lists and dicts of tensors as the signature of modules, whose description could name any class."""
    for text in _texts(value):
        if text.startswith("["):
            for kind in re.findall(r'"type"\s*:\s*("[^"]*"|null)', text):
                if kind.strip('"') not in ("null", "builtins.tuple", "builtins.list", "builtins.dict"):
                    raise InputError(f"{path} returns a {kind}, which is not understood; return one tensor")
            if "__enum__" in text or "\\" in text:
                raise InputError(f"{path} describes its results in a way that is not understood; return one tensor")
        else:
            _match(_PATH, text, path)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _match(pattern: re.Pattern[str], text: Any, path: Path) -> None:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise InputError(f"{path} holds {str(text)[:60]!r} where a plain name or size belongs; it is not read further")
