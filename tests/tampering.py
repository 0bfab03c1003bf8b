"""Certificates that were changed after they had been written, each with the words that its rejection must contain.

`KINDS` are changes by name; a change gets the files and a random generator, and says what must be in the sentence of
the checker, or "" where the change is harmless: what is claimed is still true, and can be confirmed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

Rng = np.random.Generator
KINDS: dict[str, Callable[[Files, Rng], str]] = {}
LOGITS = "factor|margin|radius|prediction"  # the proof or the rows are about another network


@dataclass
class Files:
    """The files of a certificate, taken apart."""

    record: dict[str, Any]
    tensors: dict[str, np.ndarray]
    rows: list[list[str]]  # the header first
    images: np.ndarray
    labels: np.ndarray | None = None  # of the positions of images with masks
    hashed: bool = True  # write the right SHA-256 of the tensors
    raw: dict[str, Callable[[bytes], bytes]] = field(default_factory=dict)  # last changes, of the bytes of files

    @classmethod
    def read(cls, folder: Path, images: np.ndarray, labels: np.ndarray | None = None) -> Files:
        record = json.loads((folder / "certificate.json").read_text())
        table = "certificates.tsv" if labels is None else "scenes.tsv"
        rows = [line.split("\t") for line in (folder / table).read_text().splitlines()]
        return cls(record, load((folder / "program.safetensors").read_bytes()), rows, images, labels)

    @property
    def table(self) -> str:
        return "certificates.tsv" if self.labels is None else "scenes.tsv"

    def copy(self) -> Files:
        return copy.deepcopy(self)

    def write(self, folder: Path) -> None:
        tensors = self.raw.get("program.safetensors", bytes)(save(self.tensors))
        if self.hashed:
            self.record["program"]["sha256"] = hashlib.sha256(tensors).hexdigest()
        files = {
            "certificate.json": json.dumps(self.record, indent=1).encode(),
            self.table: "".join("\t".join(row) + "\n" for row in self.rows).encode(),
        }
        (folder / "program.safetensors").write_bytes(tensors)
        for name, content in files.items():
            (folder / name).write_bytes(self.raw.get(name, bytes)(content))

    @property
    def nodes(self) -> list[dict[str, Any]]:
        return self.record["program"]["nodes"]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return self.record["proof"]["steps"]

    def node(self, rng: Rng, op: str) -> dict[str, Any]:
        return pick(rng, [node for node in self.nodes if node["op"] == op])

    def weight(self, rng: Rng) -> str:
        return pick(rng, [name for name, tensor in self.tensors.items() if tensor.ndim > 1 and tensor.size > 10])

    def row(self, rng: Rng) -> list[str]:
        return pick(rng, [row for row in self.rows[1:] if float(row[3]) > 0])


def pick(rng: Rng, items: list[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


def tampering(change: Callable[[Files, Rng], str]) -> Callable[[Files, Rng], str]:
    KINDS[change.__name__] = change
    return change


def matches(expected: str, reason: str) -> bool:
    """Whether a rejection says what it must; "" stands for no rejection."""
    return bool(re.search(expected, reason)) if expected else not reason


# the tensors


def _edit(files: Files, rng: Rng, name: str) -> None:
    """Change one entry that matters, by a relative 1e-3."""
    flat = files.tensors[name].reshape(-1).copy()
    large = np.flatnonzero(np.abs(flat) >= np.median(np.abs(flat)))
    flat[pick(rng, list(large))] *= 1 + 1e-3
    files.tensors[name] = flat.reshape(files.tensors[name].shape)


@tampering
def weight_edited_hash_kept(files: Files, rng: Rng) -> str:
    _edit(files, rng, files.weight(rng))
    files.hashed = False
    return "SHA-256"


@tampering
def weight_edited_hash_fixed(files: Files, rng: Rng) -> str:
    _edit(files, rng, pick(rng, sorted(name for name, tensor in files.tensors.items() if tensor.ndim == 4)))
    return LOGITS


@tampering
def all_weights_scaled(files: Files, rng: Rng) -> str:
    files.tensors[files.weight(rng)] *= 1 + 1e-6
    return "the factor"


@tampering
def bias_edited(files: Files, rng: Rng) -> str:
    name = pick(rng, sorted(name for name in files.tensors if name.endswith("bias") and "head" not in name))
    files.tensors[name] = files.tensors[name] + np.eye(len(files.tensors[name]))[0] * 1e-3
    return LOGITS


@tampering
def weight_transposed(files: Files, rng: Rng) -> str:
    name = files.weight(rng)
    files.tensors[name] = np.ascontiguousarray(files.tensors[name].swapaxes(0, 1)[:, :-1])
    return "cannot be rechecked"


@tampering
def weight_not_finite(files: Files, rng: Rng) -> str:
    name = files.weight(rng)
    files.tensors[name].reshape(-1)[int(rng.integers(files.tensors[name].size))] = pick(rng, [np.nan, np.inf, -np.inf])
    return "not finite"


@tampering
def weight_of_lower_precision(files: Files, rng: Rng) -> str:
    name = files.weight(rng)
    files.tensors[name] = files.tensors[name].astype(np.float32)
    return "float32, not float64"


@tampering
def tensor_missing(files: Files, rng: Rng) -> str:
    del files.tensors[files.weight(rng)]
    return "there is no tensor"


@tampering
def tensors_swapped(files: Files, rng: Rng) -> str:
    shapes = [tensor.shape for tensor in files.tensors.values() if tensor.ndim == 4]
    alike = [n for n, t in files.tensors.items() if t.ndim == 4 and shapes.count(t.shape) > 1]
    first, second = rng.permutation(alike)[:2]
    files.tensors[first], files.tensors[second] = files.tensors[second], files.tensors[first]
    return LOGITS


@tampering
def tensors_truncated(files: Files, rng: Rng) -> str:
    files.raw["program.safetensors"] = lambda data: data[: int(len(data) * rng.uniform(0.1, 0.9))]
    return "not a safetensors file"


@tampering
def tensors_replaced(files: Files, rng: Rng) -> str:
    files.raw["program.safetensors"] = lambda data: rng.bytes(100)
    return "not a safetensors file"


@tampering
def hash_wrong(files: Files, rng: Rng) -> str:
    files.hashed = False
    files.record["program"]["sha256"] = rng.bytes(32).hex()
    return "SHA-256"


# the proof


def _lower(step: dict[str, Any], relative: float = 1e-6) -> None:
    i = int(np.argmax(step["factors"]))
    step["factors"][i] *= 1 - relative


@tampering
def factor_lowered(files: Files, rng: Rng) -> str:
    _lower(pick(rng, files.steps))
    return "the factor"


@tampering
def factor_lowered_and_bounds_recomposed(files: Files, rng: Rng) -> str:
    _lower(pick(rng, files.steps))
    recompose(files)
    return "the factor"


@tampering
def factor_raised_and_bounds_recomposed(files: Files, rng: Rng) -> str:
    """A larger constant is as true; the radii, which rested on the smaller one, are confirmed all the same."""
    pick(rng, files.steps)["factors"][0] *= 1.5
    recompose(files)
    return ""


@tampering
def factor_raised_alone(files: Files, rng: Rng) -> str:
    pick(rng, files.steps)["factors"][0] *= 1 + 1e-6
    return "is below what its factors give"


def recompose(files: Files) -> None:
    known = {files.record["program"]["input"]: 1.0}
    for step in files.steps:
        parts = [f * known[s] for f, s in zip(step["factors"], step["sources"], strict=True)]
        known[step["value"]] = step["bound"] = (float(np.linalg.norm(parts)) if step["joint"] else sum(parts)) * (
            1 + 1e-13
        )
    files.record["proof"]["upper"] = files.steps[-1]["bound"]


@tampering
def bound_lowered(files: Files, rng: Rng) -> str:
    pick(rng, files.steps)["bound"] *= 1 - 1e-6
    return "is below what its factors give"


@tampering
def upper_lowered(files: Files, rng: Rng) -> str:
    files.record["proof"]["upper"] *= 1 - 1e-6
    return "upper"


@tampering
def joint_flipped(files: Files, rng: Rng) -> str:
    """With one source it makes no difference: the root of a square."""
    step = pick(rng, files.steps)
    step["joint"] = not step["joint"]
    return "" if len(step["sources"]) == 1 else "jointly|is below what"


@tampering
def step_dropped(files: Files, rng: Rng) -> str:
    del files.steps[int(rng.integers(len(files.steps)))]
    return "is not the input or the value of an earlier step|no step"


@tampering
def steps_swapped(files: Files, rng: Rng) -> str:
    i = int(rng.integers(len(files.steps) - 2))  # the last two have one source
    files.steps[i], files.steps[i + 1] = files.steps[i + 1], files.steps[i]
    return "is not the input or the value of an earlier step"


@tampering
def step_repeated(files: Files, rng: Rng) -> str:
    step = pick(rng, files.steps)
    files.steps.append(dict(step))
    return "bounded before"


@tampering
def sources_cyclic(files: Files, rng: Rng) -> str:
    files.steps[0]["sources"] = [files.steps[-1]["value"]]
    return "is not the input or the value of an earlier step"


@tampering
def source_is_the_value(files: Files, rng: Rng) -> str:
    step = pick(rng, files.steps)
    step["sources"] = [step["value"]] * len(step["sources"])
    return "is not the input or the value of an earlier step"


@tampering
def source_too_early(files: Files, rng: Rng) -> str:
    step = pick(rng, files.steps[2:])
    step["sources"] = [files.record["program"]["input"]] * len(step["sources"])
    step["bound"] = sum(step["factors"]) * 2
    return "not an affine function|not its arguments|cannot be rechecked"


@tampering
def rule_renamed(files: Files, rng: Rng) -> str:
    step = pick(rng, files.steps)
    step["rule"] = pick(rng, [r for r in ("affine", "relu", "gelu", "chain", "MaxMin") if r != step["rule"]])
    return "not called|not an affine function|one source|chains"


@tampering
def factors_too_few(files: Files, rng: Rng) -> str:
    pick(rng, files.steps)["factors"].pop()
    return "do not correspond"


@tampering
def factor_of_another_kind(files: Files, rng: Rng) -> str:
    pick(rng, files.steps)["factors"][0] = pick(rng, ["1", None, True, [], -1.0])
    return "factor"


@tampering
def heads_missing(files: Files, rng: Rng) -> str:
    files.record["proof"]["heads"] = []
    return "the radius"


@tampering
def head_unknown(files: Files, rng: Rng) -> str:
    files.record["proof"]["heads"] = ["nothing"]
    return "head"


@tampering
def head_before_an_activation(files: Files, rng: Rng) -> str:
    files.record["proof"]["heads"] = [files.steps[0]["value"]]
    return "head.*not an affine function"


@tampering
def upper_missing(files: Files, rng: Rng) -> str:
    del files.record["proof"]["upper"]
    return "'upper' is missing"


# the program


@tampering
def operator_unknown(files: Files, rng: Rng) -> str:
    files.node(rng, "aten.conv2d.default")["op"] = pick(rng, ["aten.conv1d.default", "aten.exec.default", "os.system"])
    return "because of|cannot be rechecked|not called"


@tampering
def activation_replaced(files: Files, rng: Rng) -> str:
    node = files.node(rng, "lipcert.maxmin")
    node["op"], node["arguments"] = "aten.cat.default", {"tensors": [node["arguments"][k] for k in "ab"], "dim": 1}
    return "not called"


@tampering
def activation_flipped(files: Files, rng: Rng) -> str:
    node = files.node(rng, "lipcert.maxmin")
    node["arguments"]["flipped"] = not node["arguments"]["flipped"]
    return LOGITS


@tampering
def activation_of_one_half(files: Files, rng: Rng) -> str:
    arguments = files.node(rng, "lipcert.maxmin")["arguments"]
    arguments["b"] = arguments["a"]
    return "the factor"  # of a stack of the same half twice


@tampering
def node_dropped(files: Files, rng: Rng) -> str:
    del files.nodes[int(rng.integers(1, len(files.nodes) - 1))]
    return "not that of an earlier node"


@tampering
def node_bypassed(files: Files, rng: Rng) -> str:
    """Take the shift out of the network: the arguments of a roll or a shift go where it went."""
    node = files.node(rng, "aten.cat.default")
    node["arguments"]["tensors"] = node["arguments"]["tensors"][::-1]
    return LOGITS + "|cannot be rechecked"


@tampering
def stride_changed(files: Files, rng: Rng) -> str:
    arguments = files.node(rng, "aten.conv2d.default")["arguments"]
    arguments["stride"] = [arguments["stride"][0] + 1, arguments["stride"][1]]
    return "cannot be rechecked|" + LOGITS  # a single position has no stride


@tampering
def padding_changed(files: Files, rng: Rng) -> str:
    arguments = files.node(rng, "aten.conv2d.default")["arguments"]
    arguments["padding"] = [arguments["padding"][0] + 4, arguments["padding"][1]]
    return "cannot be rechecked"


@tampering
def groups_changed(files: Files, rng: Rng) -> str:
    files.node(rng, "aten.conv2d.default")["arguments"]["groups"] = pick(rng, [0, -1, 2, 1.0, True])
    return "cannot be rechecked"


@tampering
def argument_unknown(files: Files, rng: Rng) -> str:
    files.node(rng, "aten.conv2d.default")["arguments"]["scale"] = 0.5
    return "cannot be rechecked: arguments"


@tampering
def bias_dropped(files: Files, rng: Rng) -> str:
    nodes = [n for n in files.nodes if n["arguments"].get("bias")]
    nodes = [n for n in nodes if files.tensors[n["arguments"]["bias"]["tensor"]].any()]
    pick(rng, nodes)["arguments"]["bias"] = None
    return LOGITS


@tampering
def slice_moved(files: Files, rng: Rng) -> str:
    node = files.node(rng, "aten.slice.Tensor")
    node["arguments"]["start"] += pick(rng, [-1, 1]) if node["arguments"]["start"] else 1
    return "cannot be rechecked"


@tampering
def offset_changed(files: Files, rng: Rng) -> str:
    files.node(rng, "aten.sub.Tensor")["arguments"]["other"] = 0.5 + 10.0 ** -int(rng.integers(1, 5))
    return LOGITS


@tampering
def scale_changed(files: Files, rng: Rng) -> str:
    files.node(rng, "aten.sub.Tensor")["arguments"]["alpha"] = 2
    return "cannot be rechecked"


@tampering
def shape_changed(files: Files, rng: Rng) -> str:
    node = pick(rng, files.nodes[1:])
    node["shape"][1] += 1
    return "cannot be rechecked|shape"


@tampering
def input_shape_changed(files: Files, rng: Rng) -> str:
    files.record["input_shape"][1] *= 2
    return "input"


@tampering
def reference_forward(files: Files, rng: Rng) -> str:
    files.node(rng, "aten.conv2d.default")["arguments"]["input"] = {"value": files.nodes[-1]["name"]}
    return "not that of an earlier node"


@tampering
def name_twice(files: Files, rng: Rng) -> str:
    files.nodes.insert(2, dict(files.nodes[1]))
    return "the name appears twice"


@tampering
def second_input(files: Files, rng: Rng) -> str:
    files.nodes.insert(1, {**files.nodes[0], "name": "y"})
    return "the input is the first node"


@tampering
def output_changed(files: Files, rng: Rng) -> str:
    files.record["program"]["output"] = files.steps[-3]["value"]
    return "head|vector of logits|SHA|row|cannot be rechecked"


@tampering
def schema_changed(files: Files, rng: Rng) -> str:
    files.record["program"]["schema"] = pick(rng, [0, 2, -1])
    return "schema"


@tampering
def schema_missing(files: Files, rng: Rng) -> str:
    del files.record["program"]["schema"]
    return "schema"


@tampering
def key_unknown(files: Files, rng: Rng) -> str:
    pick(rng, [files.record["program"], files.record["proof"], files.steps[0], files.nodes[1]])["trust"] = True
    return "unknown key 'trust'"


# the rows and what they are about


@tampering
def radius_raised(files: Files, rng: Rng) -> str:
    row = files.row(rng)
    row[3] = repr(float(row[3]) * (1 + 10.0 ** -int(rng.integers(0, 5))))
    return "the radius"


@tampering
def radius_not_a_number(files: Files, rng: Rng) -> str:
    files.row(rng)[3] = pick(rng, ["nan", "inf", "-0.1", "1e9", "", "0,1"])
    return "the radius|malformed"


@tampering
def radius_lowered(files: Files, rng: Rng) -> str:
    """Less is claimed: still true."""
    row = files.row(rng)
    row[3] = repr(float(row[3]) * rng.uniform(0, 1))
    return ""


@tampering
def prediction_changed(files: Files, rng: Rng) -> str:
    row = files.row(rng)
    row[2] = str((int(row[2]) + 1) % 3)
    row[4] = str(int(row[1] == row[2]))
    return "prediction|the radius|margin"


@tampering
def label_changed(files: Files, rng: Rng) -> str:
    """Labels enter `correct` alone: consistent ones cannot be refuted by the network (the command knows the data)."""
    row = files.row(rng)
    row[1] = str(int(row[1]) + 1)
    row[4] = str(int(row[1] == row[2]))
    return ""


@tampering
def correct_changed(files: Files, rng: Rng) -> str:
    row = files.row(rng)
    row[4] = str(1 - int(row[4]))
    return "correct"


@tampering
def margin_changed(files: Files, rng: Rng) -> str:
    row = files.row(rng)
    row[6] = repr(float(row[6]) * (1 + pick(rng, [-1, 1]) * 1e-6))
    return "margin"


@tampering
def error_not_finite(files: Files, rng: Rng) -> str:
    files.row(rng)[7] = pick(rng, ["nan", "inf", "-1.0"])
    return "an error"


@tampering
def image_hash_changed(files: Files, rng: Rng) -> str:
    files.row(rng)[8] = rng.bytes(32).hex()
    return "the image has another SHA-256"


@tampering
def image_hash_malformed(files: Files, rng: Rng) -> str:
    row = files.row(rng)
    row[8] = pick(rng, ["", row[8].upper() + "A", row[8][:-1]])
    return "malformed"


@tampering
def images_permuted(files: Files, rng: Rng) -> str:
    files.images = np.roll(files.images, 1 + int(rng.integers(3)), axis=0)
    return "the image has another SHA-256"


@tampering
def image_changed(files: Files, rng: Rng) -> str:
    image = files.images[int(rng.integers(len(files.images)))].reshape(-1)
    image[int(np.argmax(image))] -= 1e-12
    return "the image has another SHA-256"


@tampering
def rows_swapped(files: Files, rng: Rng) -> str:
    i = int(rng.integers(1, len(files.rows) - 1))
    a, b = files.rows[i], files.rows[i + 1]
    files.rows[i], files.rows[i + 1] = [a[0], *b[1:]], [b[0], *a[1:]]
    return "the image has another SHA-256"


@tampering
def row_dropped(files: Files, rng: Rng) -> str:
    del files.rows[int(rng.integers(1, len(files.rows)))]
    return "rows, not"


@tampering
def row_repeated(files: Files, rng: Rng) -> str:
    files.rows.insert(2, files.rows[1])
    files.record["n"] += 1
    return "its idx is 0"


@tampering
def rows_cut(files: Files, rng: Rng) -> str:
    files.raw["certificates.tsv"] = lambda text: text[: -int(rng.integers(1, 60))]
    return "damaged"


@tampering
def column_renamed(files: Files, rng: Rng) -> str:
    files.rows[0] = ["sigma" if cell == "radius" else cell for cell in files.rows[0]]
    return "the header"


@tampering
def domain_enlarged(files: Files, rng: Rng) -> str:
    """The constants of these operators hold everywhere, so the larger claim is true as well."""
    files.record["domain"] = [-1.0, 2.0]
    return ""


@tampering
def domain_narrowed(files: Files, rng: Rng) -> str:
    files.record["domain"] = [0.0, 0.5]
    return "outside the domain|beyond the domain"


@tampering
def domain_not_an_interval(files: Files, rng: Rng) -> str:
    files.record["domain"] = pick(rng, [[1, 0], [0], [0, 0], ["0", "1"], [0, True]])
    return "is no interval"


@tampering
def precision_unknown(files: Files, rng: Rng) -> str:
    files.record["precision"] = pick(rng, ["float16", "exact", ""])
    return "precision"


@tampering
def norm_changed(files: Files, rng: Rng) -> str:
    files.record["norm"] = pick(rng, ["linf", "l1", "L2"])
    return "norm"


# the file


@tampering
def json_truncated(files: Files, rng: Rng) -> str:
    files.raw["certificate.json"] = lambda text: text[: int(len(text) * rng.uniform(0.01, 0.99))]
    return "is not JSON"


@tampering
def json_deep(files: Files, rng: Rng) -> str:
    depth = int(rng.integers(100, 100_000))
    files.raw["certificate.json"] = lambda text: b'{"a": ' + b"[" * depth + b"]" * depth + b"," + text[1:]
    return "nested deeper"


@tampering
def json_not_numbers(files: Files, rng: Rng) -> str:
    files.raw["certificate.json"] = lambda text: (
        b'{"x": ' + pick(rng, [b"NaN", b"Infinity", b"-Infinity", b"1e999"]) + b"," + text[1:]
    )
    return "not a finite number"


@tampering
def json_key_twice(files: Files, rng: Rng) -> str:
    key = pick(rng, ["precision", "proof", "n", "domain"])
    files.raw["certificate.json"] = lambda text: b'{"' + key.encode() + b'": 1,' + text[1:]
    return f"'{key}' appears twice"


@tampering
def json_of_another_kind(files: Files, rng: Rng) -> str:
    files.raw["certificate.json"] = lambda text: pick(rng, [b"[]", b"3", b"null", b'"text"', b"{}"])
    return "missing or malformed"


@tampering
def json_not_utf8(files: Files, rng: Rng) -> str:
    files.raw["certificate.json"] = lambda text: text.replace(b"statement", b"\xff\xfestatement", 1)
    return "is not JSON"


@tampering
def json_huge(files: Files, rng: Rng) -> str:
    files.raw["certificate.json"] = lambda text: text + b" " * (65 << 20)
    return "is larger than"


@tampering
def json_long_number(files: Files, rng: Rng) -> str:
    files.raw["certificate.json"] = lambda text: b'{"x": ' + b"9" * 5000 + b"," + text[1:]
    return "is too long"
