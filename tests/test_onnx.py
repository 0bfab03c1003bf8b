"""ONNX files: operators against onnx's own reference evaluator, whole networks against torch, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli.test_cli import run
from torch import nn

from lipcert.bounds import audit
from lipcert.errors import InputError
from lipcert.export import export
from lipcert.onnx import load_onnx
from lipcert.onnx_operators import OPERATORS

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

Shape = Sequence[int | str]


def floats(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def write(path: Path, nodes: Sequence[Any], shape: Shape, constants: dict[str, np.ndarray], opset: int = 20) -> Path:
    """Write a graph from "x" of this shape to "y"."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["any"])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, path)
    return path


def one(kind: str, constants: Sequence[np.ndarray | None] = (), outputs: int = 1, **attributes: Any) -> tuple:
    """Return one node with "x" and constants as its inputs, as (nodes, constants)."""
    names = ["" if array is None else f"c{i}" for i, array in enumerate(constants)]
    results = ["y", *(f"unused{i}" for i in range(1, outputs))]
    node = helper.make_node(kind, ["x", *names], results, name=f"my/{kind}", **attributes)
    return [node], {name: array for name, array in zip(names, constants, strict=True) if array is not None}


IMAGE: Shape = ("n", 3, 8, 8)
ROW: Shape = ("n", 6)
POSITIVE = np.abs(floats(3, seed=5)) + 0.1

NODES: dict[str, tuple[Shape, tuple]] = {
    **{kind: (ROW, one(kind)) for kind in "Relu Sigmoid Tanh Abs Neg Exp Erf Softplus Mish Sin Cos Sign".split()},
    **{kind: (ROW, one(kind)) for kind in "Floor Ceil Round HardSwish HardSigmoid Identity LeakyRelu Elu".split()},
    "LeakyRelu 0.3": (ROW, one("LeakyRelu", alpha=0.3)),
    "Elu 2": (ROW, one("Elu", alpha=2.0)),
    "HardSigmoid 1/6": (ROW, one("HardSigmoid", alpha=1 / 6, beta=0.5)),
    "PRelu": (IMAGE, one("PRelu", [floats(3, 1, 1)])),
    "PRelu, one slope": (IMAGE, one("PRelu", [floats(1)])),
    "Gelu": (ROW, one("Gelu")),
    "Gelu tanh": (ROW, one("Gelu", approximate="tanh")),
    "Softmax": (ROW, one("Softmax")),
    "Softmax of channels": (IMAGE, one("Softmax", axis=1)),
    "Clip": (ROW, one("Clip", [np.float32(-0.5), np.float32(0.5)])),
    "Clip from below": (ROW, one("Clip", [np.float32(-0.5)])),
    "Clip from above": (ROW, one("Clip", [None, np.float32(0.5)])),
    "Pow": (ROW, one("Pow", [np.float32(2.0)])),
    "Add": (IMAGE, one("Add", [floats(3, 1, 1)])),
    "Sub": (ROW, one("Sub", [floats(6)])),
    "Mul": (ROW, one("Mul", [floats(6)])),
    "Div": (ROW, one("Div", [floats(6) + 3])),
    "Max": (ROW, one("Max", [floats(6), floats(6, seed=1)])),
    "Min": (ROW, one("Min", [floats(6)])),
    "Sum": (ROW, one("Sum", [floats(6), floats(6, seed=1)])),
    "MatMul": (ROW, one("MatMul", [floats(6, 4)])),
    "Gemm": (ROW, one("Gemm", [floats(6, 4), floats(4)])),
    "Gemm, all attributes": (ROW, one("Gemm", [floats(4, 6), floats(1, 4)], transB=1, alpha=0.5, beta=2.0)),
    "Gemm without C": (ROW, one("Gemm", [floats(6, 4)])),
    "Gemm, scalar C": (ROW, one("Gemm", [floats(6, 4), floats(1)])),
    "Conv": (IMAGE, one("Conv", [floats(4, 3, 3, 3), floats(4)], pads=[1, 1, 1, 1])),
    "Conv, strides": (IMAGE, one("Conv", [floats(4, 3, 3, 3)], strides=[2, 1], dilations=[1, 2])),
    "Conv, groups": (IMAGE, one("Conv", [floats(6, 1, 3, 3)], group=3)),
    "Conv, unequal pads": (IMAGE, one("Conv", [floats(4, 3, 3, 3)], pads=[0, 1, 1, 2])),
    "Conv, same upper": (IMAGE, one("Conv", [floats(4, 3, 4, 4)], auto_pad="SAME_UPPER", strides=[2, 2])),
    "Conv, same lower": (IMAGE, one("Conv", [floats(4, 3, 4, 4)], auto_pad="SAME_LOWER")),
    "Conv of a line": (("n", 3, 8), one("Conv", [floats(4, 3, 3)], pads=[1, 1])),
    "ConvTranspose": (IMAGE, one("ConvTranspose", [floats(3, 4, 3, 3)], strides=[2, 2], pads=[1, 1, 1, 1])),
    "MaxPool": (IMAGE, one("MaxPool", kernel_shape=[2, 2], strides=[2, 2])),
    "MaxPool, unequal pads": (IMAGE, one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])),
    "MaxPool, ceil": (IMAGE, one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)),
    "AveragePool": (IMAGE, one("AveragePool", kernel_shape=[2, 2], strides=[2, 2])),
    "AveragePool, pads": (IMAGE, one("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1])),
    "AveragePool, counted": (IMAGE, one("AveragePool", kernel_shape=[3, 3], pads=[0, 0, 1, 1], count_include_pad=1)),
    "GlobalAveragePool": (IMAGE, one("GlobalAveragePool")),
    "GlobalMaxPool": (IMAGE, one("GlobalMaxPool")),
    "BatchNormalization": (IMAGE, one("BatchNormalization", [floats(3), floats(3), floats(3), POSITIVE], epsilon=1e-3)),
    "LayerNormalization": (ROW, one("LayerNormalization", [floats(6), floats(6)], epsilon=1e-2)),
    "LayerNormalization, axis": (IMAGE, one("LayerNormalization", [floats(3, 8, 8)], axis=1)),
    "InstanceNormalization": (IMAGE, one("InstanceNormalization", [floats(3), floats(3)], epsilon=1e-2)),
    "Flatten": (IMAGE, one("Flatten")),
    "Reshape": (IMAGE, one("Reshape", [whole(0, 3, -1)])),
    "Reshape by the rest": (IMAGE, one("Reshape", [whole(-1, 192)])),
    "Squeeze": (("n", 6, 1, 1), one("Squeeze", [whole(2, 3)])),
    "Unsqueeze": (ROW, one("Unsqueeze", [whole(1, -1)])),
    "Transpose": (IMAGE, one("Transpose", perm=[0, 2, 3, 1])),
    "Concat": (ROW, ([helper.make_node("Concat", ["x", "x"], ["y"], axis=1)], {})),
    "Split": (ROW, one("Split", [whole(2, 4)], outputs=2, axis=1)),
    "Split evenly": (ROW, one("Split", outputs=2, axis=1, num_outputs=2)),
    "Slice": (ROW, one("Slice", [whole(1), whole(5), whole(1), whole(2)])),
    "Slice to the end": (ROW, one("Slice", [whole(-3), whole(2**63 - 1), whole(1)])),
    "Gather": (ROW, one("Gather", [whole(5, 0, -2)], axis=1)),
    "Gather one": (ROW, one("Gather", [np.array(2)], axis=1)),
    "Gather a table": (ROW, one("Gather", [np.array([[0, 1], [2, 3]])], axis=1)),
    "Pad": (IMAGE, one("Pad", [whole(0, 0, 1, 2, 0, 0, 3, 0), np.float32(0.5)])),
    "Pad, reflect": (IMAGE, one("Pad", [whole(0, 0, 1, 2, 0, 0, 3, 0)], mode="reflect")),
    "Pad, edge": (IMAGE, one("Pad", [whole(0, 0, 1, 0, 0, 0, 0, 1)], mode="edge")),
    "ReduceMean": (IMAGE, one("ReduceMean", [whole(2, 3)], keepdims=0)),
    "ReduceSum": (IMAGE, one("ReduceSum", [whole(1)])),
    "ReduceMax": (IMAGE, one("ReduceMax", [whole(2, 3)])),
    "ReduceMin": (IMAGE, one("ReduceMin", [whole(-1)])),
    "ReduceL2": (IMAGE, one("ReduceL2", [whole(1)])),
    "ReduceL1": (IMAGE, one("ReduceL1", [whole(1)])),
    "Dropout": (ROW, one("Dropout")),
    "Cast": (ROW, one("Cast", to=TensorProto.FLOAT)),
}  # fmt: skip


@pytest.mark.parametrize("name", NODES)
def test_an_operator_means_what_onnx_says(name: str, tmp_path: Path) -> None:
    shape, (nodes, constants) = NODES[name]
    file = write(tmp_path / "one.onnx", nodes, shape, constants)
    x = floats(3, *(int(size) for size in shape[1:]), seed=7)
    (expected,) = ReferenceEvaluator(str(file)).run(["y"], {"x": x})
    network = load_onnx(file).eval()
    assert network.shape == tuple(shape[1:])
    np.testing.assert_allclose(network(torch.from_numpy(x)).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_every_operator_has_a_row() -> None:
    tested = {node.op_type for _, (nodes, _) in NODES.values() for node in nodes}
    elsewhere = {"Shape", "Range", "Expand", "Log", "Sqrt", "Reciprocal"}
    assert set(OPERATORS) - tested == elsewhere


@pytest.mark.parametrize("kind", ["Log", "Sqrt", "Reciprocal"])
def test_functions_of_positive_numbers(kind: str, tmp_path: Path) -> None:
    file = write(tmp_path / "one.onnx", *[one(kind)[0], ROW, {}])
    x = np.abs(floats(3, 6)) + 0.5
    (expected,) = ReferenceEvaluator(str(file)).run(["y"], {"x": x})
    np.testing.assert_allclose(load_onnx(file)(torch.from_numpy(x)).numpy(), expected, rtol=1e-5)


def test_sizes_that_the_file_computes_follow_the_batch(tmp_path: Path) -> None:
    """What exporters write for x.reshape(len(x), -1) and for a class token."""
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"], start=0, end=1),
        helper.make_node("Constant", [], ["rest"], value_ints=[-1]),
        helper.make_node("Concat", ["sizes", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["flat"]),
        helper.make_node("Constant", [], ["width"], value_ints=[2]),
        helper.make_node("Concat", ["sizes", "width"], ["wide"], axis=0),
        helper.make_node("Expand", ["token", "wide"], ["tokens"]),
        helper.make_node("Concat", ["tokens", "flat"], ["y"], axis=1),
    ]
    file = write(tmp_path / "sizes.onnx", nodes, IMAGE, {"token": floats(1, 2)})
    x = floats(5, 3, 8, 8)
    (expected,) = ReferenceEvaluator(str(file)).run(["y"], {"x": x})
    network = load_onnx(file)
    np.testing.assert_allclose(network(torch.from_numpy(x)).numpy(), expected)
    assert audit(export(network), (3, 8, 8)).upper.require_upper() == pytest.approx(1.0, rel=1e-9)


def test_a_benchmark_file_for_one_input_takes_many(tmp_path: Path) -> None:
    """VNN-COMP's files fix the batch at 1, in the input and in Reshape."""
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["a"]),
        helper.make_node("Reshape", ["a", "flat"], ["b"]),
        helper.make_node("MatMul", ["b", "w1"], ["c"]),
        helper.make_node("Add", ["c", "b1"], ["d"]),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "w2"], ["y"], transB=1),
    ]
    first, second = floats(12, 7), floats(2, 7)
    constants = {"mean": floats(1, 1, 3, 4), "flat": whole(1, 12), "w1": first, "b1": floats(7), "w2": second}
    file = write(tmp_path / "vnn.onnx", nodes, (1, 1, 3, 4), constants, opset=13)
    network = load_onnx(file).eval()
    x = floats(4, 1, 3, 4)
    single = [ReferenceEvaluator(str(file)).run(["y"], {"x": image[None]})[0] for image in x]
    np.testing.assert_allclose(network(torch.from_numpy(x)).numpy(), np.concatenate(single), rtol=1e-4, atol=1e-5)
    bound = audit(export(network), (1, 3, 4)).upper.require_upper()
    norms = np.linalg.norm(first.astype(float), 2) * np.linalg.norm(second.astype(float), 2)
    assert 0.3 * norms < bound <= norms * (1 + 1e-9)


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * 4, 2),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)[:, :, :1].expand(-1, -1, 8)
        tokens = tokens + torch.nn.functional.gelu(self.inner(self.norm(tokens)))
        return self.head(tokens.mean(1))


@pytest.mark.slow
@pytest.mark.parametrize("build", [small, Residual])
def test_what_torch_exports_is_read_back(build: Callable[[], nn.Module], tmp_path: Path, capsys) -> None:
    pytest.importorskip("onnxscript")
    network, x = build().eval(), torch.rand(2, 3, 8, 8)
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(network, (x,), dynamo=True, dynamic_shapes=(batch,), verbose=False).save(str(tmp_path / "m.onnx"))
    loaded = load_onnx(tmp_path / "m.onnx").eval()
    torch.testing.assert_close(loaded(x), network(x), rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    code, out, _ = run(capsys, "bound", tmp_path / "m.onnx", "--lower-steps", "3", "--json", "-")
    record = json.loads(out)
    assert code == 0 and record["input"]["shape"] == [3, 8, 8]
    assert record["upper"] == pytest.approx(audit(network, (3, 8, 8)).upper.value, rel=1e-4)
    assert any("node_" in row["name"] for row in record["layers"])


REFUSED: dict[str, tuple[Shape, tuple, str]] = {
    "unknown operator": (ROW, one("Selu"), "are not understood: Selu (node my/Selu)"),
    "training BatchNormalization": (
        IMAGE,
        one("BatchNormalization", [floats(3), floats(3), floats(3), POSITIVE], outputs=3, training_mode=1),
        "training mode",
    ),
    "training Dropout": (ROW, one("Dropout", [np.float32(0.5), np.bool_(True)]), "Dropout in training mode"),
    "indices of MaxPool": (IMAGE, one("MaxPool", outputs=2, kernel_shape=[2, 2]), "the indices"),
    "Flatten of the batch": (IMAGE, one("Flatten", axis=2), "mixes the inputs"),
    "ReduceMean over everything": (IMAGE, one("ReduceMean"), "mixes the inputs"),
    "Squeeze without axes": (("n", 6, 1), one("Squeeze"), "export it with axes"),
    "Cast to integers": (ROW, one("Cast", to=TensorProto.INT64), "is not understood"),
    "a batch of two": ((2, 6), one("Relu"), "must count the inputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name: str, tmp_path: Path) -> None:
    shape, (nodes, constants), sentence = REFUSED[name]
    file = write(tmp_path / "bad.onnx", nodes, shape, constants)
    with pytest.raises(InputError) as caught:
        load_onnx(file)
    assert sentence in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_softmax_of_old_opsets_is_another_function(tmp_path: Path) -> None:
    file = write(tmp_path / "old.onnx", one("Softmax")[0], ROW, {}, opset=11)
    with pytest.raises(InputError, match="convert it to opset 13"):
        load_onnx(file)


def test_an_unknown_size_is_asked_for(tmp_path: Path, capsys) -> None:
    file = write(tmp_path / "free.onnx", one("Relu")[0], ("n", 3, "h", "w"), {})
    assert load_onnx(file).shape is None
    code, _, err = run(capsys, "bound", file)
    assert code == 2 and "give --input-shape" in err
    code, out, _ = run(capsys, "bound", file, "--input-shape", "3,4,4", "--lower-steps", "0", "--json", "-")
    assert code == 0 and json.loads(out)["upper"] == 1.0
