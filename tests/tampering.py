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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

Rng = np.random.Generator
KINDS: dict[str, Callable[[Files, Rng], str]] = {}
OF: dict[str, tuple[str, ...]] = {}  # the certificates that a kind applies to
IMAGES, MASKS, ATTENTION, BRANCHES = "images", "masks", "attention", "branches"
ENLARGED, TORUS, POOLED = "enlarged", "torus", "pooled"
ATTENDS = "aten.scaled_dot_product_attention.default"
TRAITS = {
    ATTENDS: ATTENTION, "aten.upsample_bilinear2d.vec": ENLARGED, "aten.pad.default": TORUS,
    "aten.linalg_vector_norm.default": POOLED,
}  # fmt: skip
# what must be said where the proof or the rows are about another network
LOGITS = "factor|margin|radius|prediction|valid and correct|can be proved"


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
        return pick(
            rng,
            [name for name, tensor in self.tensors.items() if tensor.ndim > 1 and tensor.size > 10 and tensor.any()],
        )

    def row(self, rng: Rng) -> list[str]:
        return pick(rng, [row for row in self.rows[1:] if float(row[3]) > 0])


def pick(rng: Rng, items: list[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


def tampering(
    change: Callable[[Files, Rng], str], of: tuple[str, ...] = (IMAGES, MASKS)
) -> Callable[[Files, Rng], str]:
    KINDS[change.__name__], OF[change.__name__] = change, of
    return change


def of(*traits: str) -> Callable[[Callable[[Files, Rng], str]], Callable[[Files, Rng], str]]:
    return partial(tampering, of=traits)


def kinds(files: Files) -> dict[str, Callable[[Files, Rng], str]]:
    """Return the kinds that apply to a certificate: of images or of masks, and those of the operators that it has."""
    ops = {node["op"] for node in files.nodes if node["arguments"].get("mode") != "constant"}
    traits = {IMAGES if files.labels is None else MASKS, *(trait for op, trait in TRAITS.items() if op in ops)}
    traits |= {BRANCHES for step in files.steps if "branches" in step}
    return {kind: change for kind, change in KINDS.items() if traits & {*OF[kind]}}


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


@of(IMAGES)  # counts of positions may still be true
def weight_edited_hash_fixed(files: Files, rng: Rng) -> str:
    _edit(files, rng, pick(rng, sorted(name for name, tensor in files.tensors.items() if tensor.ndim == 4)))
    return LOGITS


@tampering
def all_weights_scaled(files: Files, rng: Rng) -> str:
    files.tensors[files.weight(rng)] *= 1 + 1e-6
    return "the factor|the margin"  # the bias of attention enters no factor of this size


@of(IMAGES)
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
    shape = pick(rng, [shape for shape in shapes if shapes.count(shape) > 1])
    first, second = rng.permutation([name for name, tensor in files.tensors.items() if tensor.shape == shape])[:2]
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


@of(IMAGES)
def joint_flipped(files: Files, rng: Rng) -> str:
    """With one source it makes no difference: the root of a square."""
    step = pick(rng, files.steps)
    step["joint"] = not step["joint"]
    return "" if len(step["sources"]) == 1 else "jointly|is below what"


@tampering
def step_dropped(files: Files, rng: Rng) -> str:
    del files.steps[int(rng.integers(len(files.steps)))]
    return "is not the input or the value of an earlier step|no step"


@of(IMAGES)
def steps_swapped(files: Files, rng: Rng) -> str:
    i = int(rng.integers(len(files.steps) - 2))  # the last two have one source
    first, second = files.steps[i], files.steps[i + 1]
    files.steps[i], files.steps[i + 1] = second, first
    return "is not the input or the value of an earlier step" if first["value"] in second["sources"] else ""


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
    return "the radius|which is what can be proved"


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


@of(IMAGES)
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


@of(IMAGES)
def offset_changed(files: Files, rng: Rng) -> str:
    files.node(rng, "aten.sub.Tensor")["arguments"]["other"] = 0.5 + 10.0 ** -int(rng.integers(1, 5))
    return LOGITS


@of(IMAGES)
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


@of(IMAGES)
def radius_raised(files: Files, rng: Rng) -> str:
    row = files.row(rng)
    row[3] = repr(float(row[3]) * (1 + 10.0 ** -int(rng.integers(0, 5))))
    return "the radius"


@of(IMAGES)
def radius_not_a_number(files: Files, rng: Rng) -> str:
    files.row(rng)[3] = pick(rng, ["nan", "inf", "-0.1", "1e9", "", "0,1"])
    return "the radius|malformed"


@of(IMAGES)
def radius_lowered(files: Files, rng: Rng) -> str:
    """Less is claimed: still true."""
    row = files.row(rng)
    row[3] = repr(float(row[3]) * rng.uniform(0, 1))
    return ""


@of(IMAGES)
def prediction_changed(files: Files, rng: Rng) -> str:
    row = files.row(rng)
    row[2] = str((int(row[2]) + 1) % 3)
    row[4] = str(int(row[1] == row[2]))
    return "prediction|the radius|margin"


@of(IMAGES)
def label_changed(files: Files, rng: Rng) -> str:
    """Labels enter `correct` alone: consistent ones cannot be refuted by the network (the command knows the data)."""
    row = files.row(rng)
    row[1] = str(int(row[1]) + 1)
    row[4] = str(int(row[1] == row[2]))
    return ""


@of(IMAGES)
def correct_changed(files: Files, rng: Rng) -> str:
    row = files.row(rng)
    row[4] = str(1 - int(row[4]))
    return "correct"


@of(IMAGES)
def margin_changed(files: Files, rng: Rng) -> str:
    row = files.row(rng)
    row[6] = repr(float(row[6]) * (1 + pick(rng, [-1, 1]) * 1e-6))
    return "margin"


@of(IMAGES)
def error_not_finite(files: Files, rng: Rng) -> str:
    files.row(rng)[7] = pick(rng, ["nan", "inf", "-1.0"])
    return "an error"


@of(IMAGES)
def image_hash_changed(files: Files, rng: Rng) -> str:
    files.row(rng)[8] = rng.bytes(32).hex()
    return "the image has another SHA-256"


@of(IMAGES)
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


@of(IMAGES)
def rows_swapped(files: Files, rng: Rng) -> str:
    i = int(rng.integers(1, len(files.rows) - 1))
    a, b = files.rows[i], files.rows[i + 1]
    files.rows[i], files.rows[i + 1] = [a[0], *b[1:]], [b[0], *a[1:]]
    return "the image has another SHA-256"


@tampering
def row_dropped(files: Files, rng: Rng) -> str:
    del files.rows[int(rng.integers(1, len(files.rows)))]
    return "rows, not"


@of(IMAGES)
def row_repeated(files: Files, rng: Rng) -> str:
    files.rows.insert(2, files.rows[1])
    files.record["n"] += 1
    return "its idx is 0"


@tampering
def rows_cut(files: Files, rng: Rng) -> str:
    files.raw[files.table] = lambda text: text[: -int(rng.integers(1, 60))]
    return "damaged"


@tampering
def column_renamed(files: Files, rng: Rng) -> str:
    files.rows[0] = ["sigma" if cell in ("radius", "stable") else cell for cell in files.rows[0]]
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


# masks


def _count(files: Files, rng: Rng, column: int) -> list[str]:
    row = pick(rng, files.rows[1:])
    row[column] = str(int(row[column]) + 1)
    return row


def _raising(column: int, reason: str) -> Callable[[Files, Rng], str]:
    def change(files: Files, rng: Rng) -> str:
        _count(files, rng, column)
        return reason

    return change


for name, column, reason in (
    ("stable_raised", 3, "stable .* is above|contradict"),
    ("certified_raised", 6, "certified .* is above|contradict"),
    ("certified_alone_raised", 7, "certified_alone .* is above|contradict"),
    ("pixels_changed", 2, "contradict"),
):
    KINDS[name], OF[name] = _raising(column, reason), (MASKS,)


@of(MASKS)
def counts_lowered(files: Files, rng: Rng) -> str:
    """Less is claimed: still true."""
    row = pick(rng, files.rows[1:])
    row[3] = str(int(rng.integers(int(row[3]) + 1)))
    row[6] = row[7] = str(int(rng.integers(min(int(row[6]), int(row[7])) + 1)))
    return ""


@of(MASKS)
def labelled_changed(files: Files, rng: Rng) -> str:
    row = pick(rng, files.rows[1:])
    row[4] = str(int(row[4]) + (1 if row[4] != row[2] else -1))
    return "valid and correct are|contradict"


@of(MASKS)
def right_changed(files: Files, rng: Rng) -> str:
    row = _count(files, rng, 5)
    row[5] = str(min(int(row[5]), int(row[4])))
    return "valid and correct are"


@of(MASKS)
def eps_of_a_row_raised(files: Files, rng: Rng) -> str:
    row = pick(rng, files.rows[1:])
    row[1] = repr(float(row[1]) * 1.01)
    return "it is image"


@of(MASKS)
def all_eps_raised(files: Files, rng: Rng) -> str:
    factor = 3.0 + rng.random()
    files.record["eps"] = [eps * factor for eps in files.record["eps"]]
    for row in files.rows[1:]:
        row[1] = repr(float(row[1]) * factor)
    return "which is what can be proved"


@of(MASKS)
def eps_not_numbers(files: Files, rng: Rng) -> str:
    files.record["eps"] = pick(rng, [[], [True], ["0.1"], [-1], None])
    return "eps"


@of(MASKS)
def labels_edited(files: Files, rng: Rng) -> str:
    assert files.labels is not None
    files.labels.reshape(-1)[int(rng.integers(files.labels.size))] ^= 1
    return "labels have another SHA-256"


@of(MASKS)
def labels_edited_hash_fixed(files: Files, rng: Rng) -> str:
    assert files.labels is not None
    i = int(rng.integers(len(files.labels)))
    files.labels[i] = np.where(files.labels[i] == 255, 255, (files.labels[i] + 1) % 4)
    digest = hashlib.sha256(files.labels[i].astype("<i8").tobytes()).hexdigest()
    files.record["scenes"][i][1] = digest
    return "valid and correct are"


@of(MASKS)
def scene_hash_changed(files: Files, rng: Rng) -> str:
    pick(rng, files.record["scenes"])[int(rng.integers(2))] = rng.bytes(32).hex()
    return "another SHA-256"


@of(MASKS)
def scene_hashes_too_few(files: Files, rng: Rng) -> str:
    files.record["scenes"].pop()
    return "one pair of SHA-256 for each image"


@of(MASKS)
def task_renamed(files: Files, rng: Rng) -> str:
    files.record["task"] = pick(rng, ["detection", "", None])
    return "task"


@of(MASKS)
def head_bias_edited(files: Files, rng: Rng) -> str:
    files.tensors["head.bias"] = files.tensors["head.bias"] + np.eye(4)[int(rng.integers(4))] * 100
    return LOGITS


def _branching(files: Files, rng: Rng) -> dict[str, Any]:
    return pick(rng, [step for step in files.steps if "branches" in step])


@of(BRANCHES)
def branches_missing(files: Files, rng: Rng) -> str:
    del _branching(files, rng)["branches"]
    return "not an affine function"


@of(BRANCHES)
def branch_missing(files: Files, rng: Rng) -> str:
    step = _branching(files, rng)
    step["branches"].pop(int(rng.integers(len(step["branches"]))))
    return "one branch for each part"


@of(BRANCHES)
def branches_swapped(files: Files, rng: Rng) -> str:
    _branching(files, rng)["branches"].reverse()
    return "no step bounds"


@of(BRANCHES)
def branch_starts_at_the_source(files: Files, rng: Rng) -> str:
    """Then the parts are no functions of different pieces."""
    step = _branching(files, rng)
    source = step["sources"][0]
    for branch in step["branches"]:
        if branch["steps"]:
            for inner in branch["steps"]:
                inner["sources"] = [source if s == branch["start"] else s for s in inner["sources"]]
            branch["start"] = source
    return "the factor"


@of(BRANCHES)
def branch_step_dropped(files: Files, rng: Rng) -> str:
    steps = next(b["steps"] for b in _branching(files, rng)["branches"] if b["steps"])
    steps.pop(int(rng.integers(len(steps))))
    return "no step bounds|is not the input or the value"


@of(BRANCHES)
def branch_factor_lowered(files: Files, rng: Rng) -> str:
    steps = next(b["steps"] for b in _branching(files, rng)["branches"] if b["steps"])
    _lower(pick(rng, steps))
    return "the factor"


@of(BRANCHES)
def step_with_branches_lowered(files: Files, rng: Rng) -> str:
    """The step alone claims less than its branches prove."""
    step = _branching(files, rng)
    step["factors"] = [step["factors"][0] * (1 - 1e-3)]
    recompose(files)
    return "the factor"


# attention


@of(ATTENTION)
def temperature_raised(files: Files, rng: Rng) -> str:
    arguments = files.node(rng, ATTENDS)["arguments"]
    arguments["scale"] *= 1 + 1e-4
    return "the factor"


@of(ATTENTION)
def attention_bias_enlarged(files: Files, rng: Rng) -> str:
    name = files.node(rng, ATTENDS)["arguments"]["attn_mask"]["tensor"]
    files.tensors[name] = files.tensors[name] * 3 + np.linspace(0, 1, files.tensors[name].shape[-1])
    return "the factor"


@of(ATTENTION)
def attention_factor_lowered(files: Files, rng: Rng) -> str:
    step = pick(rng, [step for step in files.steps if step["rule"] == "attention"])
    step["factors"][int(rng.integers(3))] *= 1 - 1e-5
    recompose(files)
    return "the factor"


@of(ATTENTION)
def normalisation_weakened(files: Files, rng: Rng) -> str:
    files.node(rng, "lipcert.normalize")["arguments"]["eps"] *= 0.999
    return "the factor"


@of(ATTENTION)
def normalisation_of_another_kind(files: Files, rng: Rng) -> str:
    arguments = files.node(rng, "lipcert.normalize")["arguments"]
    if rng.random() < 0.5:
        arguments["kind"] = pick(rng, ["mean", "sum", "max", "none"])
    else:
        arguments["dim"] -= 1
    return "another normalisation"


@of(ATTENTION)
def normalisation_bypassed(files: Files, rng: Rng) -> str:
    node = files.node(rng, ATTENDS)
    side = pick(rng, ["query", "key", "value"])
    before = next(n for n in files.nodes if n["name"] == node["arguments"][side]["value"])
    node["arguments"][side] = before["arguments"]["x"]
    return "rows without a bound"


@of(ATTENTION)
def keys_and_values_swapped(files: Files, rng: Rng) -> str:
    arguments = files.node(rng, ATTENDS)["arguments"]
    arguments["key"], arguments["value"] = arguments["value"], arguments["key"]
    return "not its arguments in order"


@of(ATTENTION)
def attention_options_changed(files: Files, rng: Rng) -> str:
    option, value = pick(rng, [("is_causal", True), ("dropout_p", 0.1), ("enable_gqa", True), ("scale", "1")])
    files.node(rng, ATTENDS)["arguments"][option] = value
    return "cannot be rechecked"


@of(ATTENTION)
def windows_transposed_otherwise(files: Files, rng: Rng) -> str:
    node = pick(rng, [n for n in files.nodes if n["op"] == "aten.transpose.int" and len(n["shape"]) == 6])
    node["arguments"]["dim1"] = 4
    return "cannot be rechecked|" + LOGITS


@of(ATTENTION)
def share_of_attention_raised(files: Files, rng: Rng) -> str:
    node = pick(rng, [n for n in files.nodes if n["op"] == "aten.mul.Tensor" and "tensor" in str(n["arguments"])])
    name = next(a["tensor"] for a in node["arguments"].values() if "tensor" in a)
    files.tensors[name] = np.asarray(files.tensors[name] * (1 + 1e-6))
    return "the factor"


# enlarged maps


def _enlarges(files: Files, rng: Rng) -> dict[str, Any]:
    return files.node(rng, "aten.upsample_bilinear2d.vec")


@of(ENLARGED)
def enlarged_by_copies(files: Files, rng: Rng) -> str:
    _enlarges(files, rng)["op"] = "aten.upsample_nearest2d.vec"
    return "cannot be rechecked"


@of(ENLARGED)
def corners_aligned(files: Files, rng: Rng) -> str:
    _enlarges(files, rng)["arguments"]["align_corners"] = True
    return "cannot be rechecked"


@of(ENLARGED)
def enlarged_by_factors(files: Files, rng: Rng) -> str:
    _enlarges(files, rng)["arguments"]["scale_factors"] = [1.9, 1.9]
    return "cannot be rechecked"


@of(ENLARGED)
def enlarged_to_another_size(files: Files, rng: Rng) -> str:
    arguments = _enlarges(files, rng)["arguments"]
    arguments["output_size"] = pick(rng, [arguments["output_size"][::-1], [1, 1], [2], None, [1 << 40] * 2])
    return "cannot be rechecked"


@of(ENLARGED)
def enlargement_lowered(files: Files, rng: Rng) -> str:
    _lower(pick(rng, [step for step in files.steps if step["rule"] == "upsample_bilinear2d"]))
    recompose(files)
    return "the factor"


@of(ENLARGED)
def enlargement_not_paid(files: Files, rng: Rng) -> str:
    """Enlarged maps are no longer divided by what enlarging costs."""
    names = {node["name"] for node in files.nodes if node["op"] == "aten.upsample_bilinear2d.vec"}
    quotients = [node for node in files.nodes if node["op"] == "aten.div.Tensor"]
    node = pick(rng, [node for node in quotients if node["arguments"]["self"]["value"] in names])
    node["arguments"]["other"] /= 2
    return "the factor"


@of(ENLARGED)
def positions_mixed(files: Files, rng: Rng) -> str:
    """A map of all positions stands before the head, where each was said to move by itself: it moves others in."""
    names = [node["name"] for node in files.nodes]
    head = files.record["proof"]["heads"][0]
    last = next(i for i, name in enumerate(names) if name == head)
    shape = files.nodes[last]["shape"]
    files.nodes.insert(
        last + 1,
        {
            "name": "mixed", "op": "aten.roll.default", "shape": shape,
            "arguments": {"self": {"value": head}, "shifts": [1], "dims": [3]},
        },
    )  # fmt: skip
    step = {"value": "mixed", "rule": "affine", "sources": [head], "factors": [1.0], "joint": False, "method": ""}
    at = next(i for i, step in enumerate(files.steps) if step["value"] == head)
    files.steps.insert(at + 1, step | {"bound": files.steps[at]["bound"]})
    files.nodes[-1]["arguments"]["input"] = {"value": "mixed"}
    for later in files.steps[at + 2 :]:
        later["sources"] = ["mixed" if source == head else source for source in later["sources"]]
    files.record["proof"]["heads"] = ["mixed"]
    return "valid and correct|which is what can be proved"


# circular padding


@of(TORUS)
def padded_with_zeros(files: Files, rng: Rng) -> str:
    _wraps(files, rng)["mode"] = "constant"
    return LOGITS + "|cannot be rechecked"  # behind a roll, it is no longer one map


@of(TORUS)
def padded_on_one_side(files: Files, rng: Rng) -> str:
    """It turns the torus: as steep, and another network."""
    arguments = _wraps(files, rng)
    left, right, top, bottom = arguments["pad"]
    arguments["pad"] = pick(rng, [[left + right, 0, top, bottom], [left, right, 0, top + bottom]])
    return LOGITS


@of(TORUS)
def padded_by_another_rule(files: Files, rng: Rng) -> str:
    arguments = _wraps(files, rng)
    arguments.update(pick(rng, [{"mode": "reflect"}, {"mode": "replicate"}, {"mode": None}, {"value": 1.0}]))
    return "cannot be rechecked"


@of(TORUS)
def padded_beyond_the_image(files: Files, rng: Rng) -> str:
    _wraps(files, rng)["pad"][int(rng.integers(4))] += pick(rng, [1, 100, -2])
    return "cannot be rechecked"


def _wraps(files: Files, rng: Rng) -> dict[str, Any]:
    nodes = [node for node in files.nodes if node["arguments"].get("mode") == "circular"]
    return pick(rng, nodes)["arguments"]


# pooling by norms


@of(POOLED)
def pooled_by_another_norm(files: Files, rng: Rng) -> str:
    arguments = files.node(rng, "aten.linalg_vector_norm.default")["arguments"]
    arguments.update(pick(rng, [{"ord": 1}, {"ord": 4}, {"ord": {"number": "inf"}}, {"dtype": "torch.float16"}]))
    return "cannot be rechecked"


@of(POOLED)
def pooled_along_others(files: Files, rng: Rng) -> str:
    arguments = files.node(rng, "aten.linalg_vector_norm.default")["arguments"]
    arguments["dim"] = pick(rng, [[3], [3, 3], [2, 4], [0, 5], []])
    return "cannot be rechecked"


@of(POOLED)
def pooling_lowered(files: Files, rng: Rng) -> str:
    next(step for step in files.steps if step["rule"] == "linalg_vector_norm")["factors"] = [1 - 1e-9]
    recompose(files)
    return "the factor"


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
