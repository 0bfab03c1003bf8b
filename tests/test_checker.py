"""The checker's own mathematics against dense references, its agreement with lipcert's bounds, and what it refuses."""

from __future__ import annotations

import ast
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from issuing import N, certify, certify_masks, lipsformer, small
from safetensors.numpy import save_file
from torch import nn

from lipcert.bounds.attention import Columns, Rows, coefficients, column_sums
from lipcert.bounds.convolution import conv_norm_upper
from lipcert.checker import Rejected, Report, certificate, check, norms
from lipcert.checker.attention import WIDE
from lipcert.checker.evaluation import evaluate
from lipcert.checker.maps import Kernel, Map, compose
from lipcert.checker.norms import Aim, kernel_norm, norm, proved_norm, symbols
from lipcert.checker.operators import apply
from lipcert.checker.program import Program
from lipcert.checker.reading import read_json, read_tensors
from lipcert.checker.steps import pairwise, position, positions, prove
from lipcert.layers import MaxMin

ROOT = Path(__file__).parents[1]
CHECKER = ROOT / "lipcert" / "checker"


def program(shape: tuple[int, ...], *nodes: tuple[str, dict[str, Any], tuple[int, ...]], **tensors: Any) -> Any:
    """Return a program of operators, each of the values before it: "0" is the input, "1" the first result, …"""
    known = [("input", {}, shape), *nodes]
    written = [
        {"name": str(i), "op": op, "arguments": arguments, "shape": list(size)}
        for i, (op, arguments, size) in enumerate(known)
    ]
    record = {"schema": 1, "input": "0", "output": str(len(nodes)), "nodes": written, "sha256": ""}
    return Program(record, {name: np.asarray(t, dtype=np.float64) for name, t in tensors.items()})


def dense(function: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return the matrix of a linear function of tensors (1, *shape)."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, 1, *shape)
    return torch.stack([function(x).flatten() for x in basis]).T.numpy()


def written_out(m: Map) -> np.ndarray:
    """Return the matrix of a map without one before it."""
    size = math.prod(m.source)
    inner = np.eye(size)
    if m.kernel is not None:
        basis = np.eye(size).reshape(-1, *m.kernel.source)
        inner = apply(m.kernel, basis).reshape(size, -1).T
    rows = np.concatenate([inner, np.zeros((1, size))])
    return m.scale.reshape(-1, 1) * rows[m.where.ravel()]


X = {"value": "0"}
IMAGE, ROWS = (1, 6, 4, 6), (1, 2, 3, 8)
OPERATORS: list[tuple[str, tuple[int, ...], dict[str, Any], Any]] = [
    ("aten.slice.Tensor", IMAGE, {"dim": 1, "start": 1, "end": 6, "step": 2}, lambda x: x[:, 1:6:2]),
    ("aten.slice.Tensor", ROWS, {"dim": -1, "start": -3, "end": None, "step": 1}, lambda x: x[..., -3:]),
    ("aten.narrow.default", IMAGE, {"dim": 3, "start": 1, "length": 4}, lambda x: x.narrow(3, 1, 4)),
    ("aten.roll.default", IMAGE, {"shifts": [-1, 2], "dims": [2, 3]}, lambda x: torch.roll(x, (-1, 2), (2, 3))),
    ("aten.roll.default", IMAGE, {"shifts": [4], "dims": [1]}, lambda x: torch.roll(x, 4, 1)),
    ("aten.permute.default", IMAGE, {"dims": [0, 2, 3, 1]}, lambda x: x.permute(0, 2, 3, 1)),
    ("aten.transpose.int", ROWS, {"dim0": -3, "dim1": -2}, lambda x: x.transpose(-3, -2)),
    ("aten.reshape.default", IMAGE, {"shape": [1, 2, 3, -1]}, lambda x: x.reshape(1, 2, 3, -1)),
    ("aten.view.default", ROWS, {"size": [6, 8]}, lambda x: x.view(6, 8)),
    ("aten.flatten.using_ints", IMAGE, {"start_dim": 1, "end_dim": -2}, lambda x: x.flatten(1, -2)),
    ("aten.unflatten.int", ROWS, {"dim": -1, "sizes": [2, -1]}, lambda x: x.unflatten(-1, (2, -1))),
    ("aten.pixel_unshuffle.default", IMAGE, {"downscale_factor": 2}, lambda x: F.pixel_unshuffle(x, 2)),
    ("aten.pixel_shuffle.default", (1, 8, 3, 2), {"upscale_factor": 2}, lambda x: F.pixel_shuffle(x, 2)),
    ("aten.pad.default", IMAGE, {"pad": [1, 0, 2, 3]}, lambda x: F.pad(x, (1, 0, 2, 3))),
    ("aten.pad.default", IMAGE, {"pad": [1, 2, 4, 0], "mode": "circular"},
     lambda x: F.pad(x, (1, 2, 4, 0), mode="circular")),
    ("aten.upsample_bilinear2d.vec", IMAGE, {"output_size": [8, 12], "align_corners": False, "scale_factors": None},
     lambda x: F.interpolate(x, size=(8, 12), mode="bilinear")),
    ("aten.upsample_bilinear2d.vec", IMAGE, {"output_size": [3, 17], "align_corners": False},
     lambda x: F.interpolate(x, size=(3, 17), mode="bilinear")),
    ("aten.conv2d.default", IMAGE, {"weight": "w", "bias": None, "padding": [1, 0]},
     lambda x, w: F.conv2d(x, w, padding=(1, 0))),
    ("aten.conv2d.default", IMAGE, {"weight": "g", "stride": [2, 1], "padding": [1, 1], "groups": 3},
     lambda x, g: F.conv2d(x, g, stride=(2, 1), padding=1, groups=3)),
    ("aten.conv2d.default", IMAGE, {"weight": "w", "dilation": [1, 2], "padding": [2, 2]},
     lambda x, w: F.conv2d(x, w, padding=2, dilation=(1, 2))),
    ("aten.linear.default", ROWS, {"weight": "m"}, lambda x, m: F.linear(x, m)),
    ("aten.linear.default", (1, 8), {"weight": "m"}, lambda x, m: F.linear(x, m)),
    ("aten.avg_pool2d.default", IMAGE, {"kernel_size": [2, 3], "padding": [1, 0]},
     lambda x: F.avg_pool2d(x, (2, 3), padding=(1, 0))),
    ("aten.mul.Tensor", IMAGE, {"other": "c"}, lambda x, c: x * c),
    ("aten.div.Tensor", IMAGE, {"other": "c"}, lambda x, c: x / c),
    ("aten.mT.default", ROWS, {}, lambda x: x.mT),
    ("lipcert.center", IMAGE, {"dims": [1]}, lambda x: x - x.mean(1, keepdim=True)),
    ("lipcert.center", IMAGE, {"dims": [2, 3]}, lambda x: x - x.mean((2, 3), keepdim=True)),
    ("aten.add.Tensor", IMAGE, {"other": {"value": "0"}}, lambda x: 2 * x),
    ("aten.sub.Tensor", IMAGE, {"other": {"value": "0"}}, lambda x: 0 * x),
    ("aten.cat.default", IMAGE, {"dim": 2}, lambda x: torch.cat([x, x], 2)),
]  # fmt: skip


@pytest.mark.parametrize("op, shape, options, function", OPERATORS, ids=lambda x: x if isinstance(x, str) else "")
def test_linear_operators_are_those_of_torch(op: str, shape: tuple[int, ...], options: dict, function: Any) -> None:
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 6, 3, 2), "g": (6, 2, 3, 3), "m": (5, 8), "c": (6, 1, 1)}
    names = [value for value in options.values() if isinstance(value, str) and value in shapes]
    tensors = {name: torch.from_numpy(rng.normal(size=shapes[name])) for name in names}
    linear = lambda x: function(x.reshape(shape), **tensors)  # noqa: E731
    given = {
        key: {"tensor": value} if isinstance(value, str) and value in names else value for key, value in options.items()
    }
    arguments = {"cat": "tensors", "center": "x", "conv2d": "input", "linear": "input", "upsample_bilinear2d": "input"}
    argument = arguments.get(op.split(".")[1], "self")
    result = linear(torch.zeros(shape, dtype=torch.float64))
    read = {argument: [X, X] if argument == "tensors" else X}
    made = program(shape, (op, read | given, tuple(result.shape)), **tensors)
    operation = made.operation("1")
    x = torch.from_numpy(rng.normal(size=(3, *shape)))
    value, arisen = operation.run(*[x.numpy()] * len(operation.inputs))
    wanted = torch.stack([linear(image) for image in x]).numpy()
    assert (np.linalg.norm((value - wanted).reshape(3, -1), axis=1) <= 2 * arisen + 1e-300).all()
    assert (arisen <= 2e-13 * np.linalg.norm(x.reshape(3, -1).numpy(), axis=1)).all()
    matrix = dense(linear, shape[1:])
    exact = np.linalg.norm(matrix, 2)
    several = math.sqrt(sum(f * f for f in operation.factors)) if operation.joint else sum(operation.factors)
    assert exact <= several * (1 + 1e-12)
    if operation.trace is None and not operation.joint:
        assert several <= exact * (1 + 1e-8)
    if operation.trace is not None:
        found = made.maps(["1"], "0")[0]
        bound = norm(found)
        assert exact * (1 - 1e-12) - 1e-13 <= bound <= exact * (1 + 1e-8) + 1e-13
        if found.before is None:
            assert np.allclose(written_out(found), matrix, atol=1e-13)
    wrong = list(result.shape)
    wrong[-1] += 1
    with pytest.raises(Rejected, match="cannot be rechecked"):
        program(shape, (op, read | given, tuple(wrong)), **tensors).operation("1")


@settings(max_examples=80)
@given(data=st.data())
def test_composed_moves_are_kernels_or_refused(data: st.DataObject) -> None:
    """Slices, rolls, pads, shuffles, products in any order: the map is the matrix, as a kernel if it is one."""
    shape, nodes, functions = (1, 4, 4, 6), [], []
    for i in range(data.draw(st.integers(1, 5))):
        _, c, h, w = shape
        name = data.draw(st.sampled_from(["roll", "slice", "pad", "wrap", "unshuffle", "shuffle", "mul", "narrow"]))
        value = {"self": {"value": str(i)}}
        if name == "roll":
            dim = data.draw(st.integers(1, 3))
            functions.append(lambda x, dim=dim: torch.roll(x, 1, dim))
            nodes.append(["aten.roll.default", value | {"shifts": [1], "dims": [dim]}, shape])
        elif name == "slice" and c > 1:
            functions.append(lambda x: x[:, 1:])
            shape = (1, c - 1, h, w)
            nodes.append(["aten.slice.Tensor", value | {"dim": 1, "start": 1, "end": c, "step": 1}, shape])
        elif name == "narrow" and w > 2:
            functions.append(lambda x, w=w: x.narrow(3, 1, w - 1))
            shape = (1, c, h, w - 1)
            nodes.append(["aten.narrow.default", value | {"dim": 3, "start": 1, "length": w - 1}, shape])
        elif name == "unshuffle" and h % 2 == w % 2 == 0:
            functions.append(lambda x: F.pixel_unshuffle(x, 2))
            shape = (1, 4 * c, h // 2, w // 2)
            nodes.append(["aten.pixel_unshuffle.default", value | {"downscale_factor": 2}, shape])
        elif name == "shuffle" and c % 4 == 0:
            functions.append(lambda x: F.pixel_shuffle(x, 2))
            shape = (1, c // 4, 2 * h, 2 * w)
            nodes.append(["aten.pixel_shuffle.default", value | {"upscale_factor": 2}, shape])
        elif name == "wrap":
            functions.append(lambda x: F.pad(x, (0, 1, 1, 0), mode="circular"))
            shape = (1, c, h + 1, w + 1)
            nodes.append(["aten.pad.default", value | {"pad": [0, 1, 1, 0], "mode": "circular"}, shape])
        elif name == "mul":
            functions.append(lambda x: x * -1)
            nodes.append(["aten.mul.Tensor", value | {"other": -1}, shape])
        else:
            functions.append(lambda x: F.pad(x, (1, 0, 0, 1)))
            shape = (1, c, h + 1, w + 1)
            nodes.append(["aten.pad.default", value | {"pad": [1, 0, 0, 1]}, shape])

    def function(x: torch.Tensor) -> torch.Tensor:
        for each in functions:
            x = each(x)
        return x

    matrix = dense(function, (4, 4, 6))
    found = program((1, 4, 4, 6), *nodes).maps([str(len(nodes))], "0")[0]
    assert (written_out(found) == matrix).all() and norm(found) == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-12)
    try:
        kernel = found.as_kernel()
    except Rejected:
        return
    assert (written_out(Map.of(kernel, (1, 4, 4, 6))) == matrix).all()


def test_a_shift_is_a_kernel_a_roll_a_periodic_one_and_a_transposition_none() -> None:
    roll = ["aten.roll.default", {"self": X, "shifts": [1], "dims": [3]}, (1, 2, 3, 4)]
    periodic = program((1, 2, 3, 4), roll).maps(["1"], "0")[0].as_kernel()
    assert periodic.periodic and {*periodic.taps} == {(0, 3)}
    with pytest.raises(Rejected, match="in another way"):
        turn = ["aten.transpose.int", {"self": X, "dim0": 2, "dim1": 3}, (1, 2, 4, 3)]
        program((1, 2, 3, 4), turn).maps(["1"], "0")[0].as_kernel()
    cut = ["aten.narrow.default", {"self": X, "dim": 3, "start": 1, "length": 3}, (1, 2, 3, 3)]
    pad = ["aten.pad.default", {"self": {"value": "1"}, "pad": [0, 1]}, (1, 2, 3, 4)]
    assert {*program((1, 2, 3, 4), cut, pad).maps(["2"], "0")[0].as_kernel().taps} == {(0, 1)}


def conv(weight: torch.Tensor, n: tuple[int, int], stride: int, padding: int, dilation: int, groups: int) -> Kernel:
    shape = (1, weight.shape[1] * groups, *n)
    out = F.conv2d(torch.zeros(shape).double(), weight, None, stride, padding, dilation, groups)
    options = {"stride": [stride] * 2, "padding": [padding] * 2, "dilation": [dilation] * 2, "groups": groups}
    node = ("aten.conv2d.default", {"input": X, "weight": {"tensor": "w"}, **options}, tuple(out.shape))
    return program(shape, node, w=weight).maps(["1"], "0")[0].as_kernel()


sizes = st.integers(1, 4)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6), channels=st.tuples(st.integers(1, 2), st.integers(1, 2)), groups=st.integers(1, 2),
    k=st.tuples(sizes, sizes), n=st.tuples(st.integers(2, 7), st.integers(2, 7)), stride=st.integers(1, 3),
    padding=st.integers(0, 2), dilation=st.integers(1, 2), scale=st.sampled_from([1e-120, 1.0, 1e90]),
)  # fmt: skip
def test_norm_of_a_convolution_against_its_matrix(
    seed, channels, groups, k, n, stride, padding, dilation, scale
):  # fmt: skip
    assume(all(dilation * (a - 1) < b + 2 * padding for a, b in zip(k, n, strict=True)))
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.normal(size=(channels[0] * groups, channels[1], *k))) * scale
    kernel = conv(weight, n, stride, padding, dilation, groups)
    matrix = dense(lambda x: F.conv2d(x, weight, None, stride, padding, dilation, groups), kernel.source)
    exact = np.linalg.norm(matrix / scale, 2) * scale
    found = kernel_norm(kernel)
    assert exact * (1 - 1e-12) <= found
    if all(side % stride == 0 for side in n):
        assert found <= exact * (1 + 1e-8)  # small: the matrix itself
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "DENSE_SIDE", 0)
        for method in ("", "twisted", "open", "open, twisted"):
            assert exact * (1 - 1e-12) <= kernel_norm(kernel, Aim(math.inf, method))  # each torus alone
    assert exact <= kernel.size + kernel.error


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), c=st.integers(1, 4), k=st.sampled_from([1, 3]), n=st.integers(6, 9))
def test_torus_norms_agree_with_what_lipcert_proves(seed, c, k, n):
    weight = torch.from_numpy(np.random.default_rng(seed).normal(size=(c, c, k, k)))
    theirs = conv_norm_upper(weight, (n, n), padding=k // 2).value
    assert kernel_norm(conv(weight, (n, n), 1, k // 2, 1, 1)) == pytest.approx(theirs, rel=1e-8)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6), c=st.integers(1, 3), k=st.sampled_from([1, 3, 5]), n=st.tuples(sizes, sizes),
    stride=st.integers(1, 3), roll=st.booleans(), scale=st.sampled_from([1e-120, 1.0, 1e90]),
)  # fmt: skip
def test_norm_of_a_periodic_convolution_against_its_matrix(seed, c, k, n, stride, roll, scale):
    """Patches, a roll of one channel, circular padding, a convolution: one kernel, on the torus that its image is."""
    assume(k // 2 <= min(n))
    rng = np.random.default_rng(seed)
    patches, weight = rng.normal(size=(c + 1, 2, stride, stride)), rng.normal(size=(c, c + 1, k, k)) * scale
    p, grid = k // 2, (1, c + 1, *n)
    value = lambda i: {"value": str(i)}  # noqa: E731
    nodes = [
        ("aten.conv2d.default", {"input": X, "weight": {"tensor": "a"}, "stride": [stride, stride]}, grid),
        ("aten.slice.Tensor", {"self": value(1), "dim": 1, "start": 0, "end": 1}, (1, 1, *n)),
        ("aten.slice.Tensor", {"self": value(1), "dim": 1, "start": 1, "end": c + 1}, (1, c, *n)),
        ("aten.roll.default", {"self": value(2), "shifts": [1], "dims": [3]}, (1, 1, *n)),
        ("aten.cat.default", {"tensors": [value(4 if roll else 2), value(3)], "dim": 1}, grid),
        ("aten.pad.default", {"self": value(5), "pad": [p] * 4, "mode": "circular"},
         (1, c + 1, n[0] + 2 * p, n[1] + 2 * p)),
        ("aten.conv2d.default", {"input": value(6), "weight": {"tensor": "b"}}, (1, c, *n)),
    ]  # fmt: skip

    def function(x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, torch.from_numpy(patches), stride=stride)
        x = torch.cat([torch.roll(x[:, :1], 1, 3), x[:, 1:]], 1) if roll else x
        return F.conv2d(F.pad(x, [p] * 4, mode="circular"), torch.from_numpy(weight))

    source = (1, 2, stride * n[0], stride * n[1])
    made = program(source, *nodes, a=patches, b=weight)
    found = made.maps(["7"], "0")[0]
    matrix = dense(function, source[1:])
    exact = np.linalg.norm(matrix / scale, 2) * scale
    assert found.kernel is not None and (found.kernel.periodic or k == 1)
    assert exact * (1 - 1e-12) <= norm(found) <= exact * (1 + 1e-8)
    assert np.allclose(written_out(found) / scale, matrix / scale, atol=1e-12)


def test_a_torus_must_be_the_same_and_taken_once() -> None:
    """Circular padding behind zero padding is no kernel; and no torus bounds what is read twice."""
    value, w = {"value": "1"}, torch.ones(1, 1, 3, 3).double()
    first = ("aten.conv2d.default", {"input": X, "weight": {"tensor": "w"}, "padding": [1, 1]}, (1, 1, 4, 4))
    wrap = ("aten.pad.default", {"self": value, "pad": [1] * 4, "mode": "circular"}, (1, 1, 6, 6))
    second = ("aten.conv2d.default", {"input": {"value": "2"}, "weight": {"tensor": "w"}}, (1, 1, 4, 4))
    with pytest.raises(Rejected, match="a torus beyond that of another"):
        program((1, 1, 4, 4), first, wrap, second, w=w).maps(["3"], "0")
    only = ("aten.pad.default", {"self": X, "pad": [1] * 4, "mode": "circular"}, (1, 1, 6, 6))
    twice = program((1, 1, 4, 4), only).maps(["1"], "0")[0]
    assert norm(twice) == pytest.approx(2.0, rel=1e-12)
    with pytest.raises(Rejected, match="taken twice"):
        kernel_norm(twice.as_kernel())
    with pytest.raises(Rejected, match="wider than the image"):
        wide = ("aten.pad.default", {"self": X, "pad": [5, 0, 0, 0], "mode": "circular"}, (1, 1, 4, 9))
        program((1, 1, 4, 4), wide).operation("1")


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), c=st.integers(1, 4), n=st.sampled_from([2, 4]), window=st.sampled_from([1, 2]),
       drop=st.booleans())  # fmt: skip
def test_a_matrix_at_each_position_acts_before_positions_are_moved(seed, c, n, window, drop):
    """Patches, windows, a linear layer by rows, as attention has it: one map, and its norm that of its matrix."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(c, 2, 2, 2)), rng.normal(size=(3, c))
    k, value = n // window, lambda i: {"value": str(i)}
    rows, kept = k * k * window * window, k * k * window * window - drop
    nodes = [
        ("aten.conv2d.default", {"input": X, "weight": {"tensor": "a"}, "stride": [2, 2]}, (1, c, n, n)),
        ("aten.permute.default", {"self": value(1), "dims": [0, 2, 3, 1]}, (1, n, n, c)),
        ("aten.reshape.default", {"self": value(2), "shape": [1, k, window, k, window, c]},
         (1, k, window, k, window, c)),
        ("aten.transpose.int", {"self": value(3), "dim0": 2, "dim1": 3}, (1, k, k, window, window, c)),
        ("aten.reshape.default", {"self": value(4), "shape": [1, -1, c]}, (1, rows, c)),
        ("aten.slice.Tensor", {"self": value(5), "dim": 1, "start": 0, "end": kept}, (1, kept, c)),
        ("aten.linear.default", {"input": value(6), "weight": {"tensor": "b"}}, (1, kept, 3)),
    ]  # fmt: skip

    def function(x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, torch.from_numpy(a), stride=2).permute(0, 2, 3, 1)
        x = x.reshape(1, k, window, k, window, c).transpose(2, 3).reshape(1, -1, c)[:, :kept]
        return F.linear(x, torch.from_numpy(b))

    found = program((1, 2, 2 * n, 2 * n), *nodes, a=a, b=b).maps(["7"], "0")[0]
    matrix = dense(function, (2, 2 * n, 2 * n))
    exact = np.linalg.norm(matrix, 2)
    assert np.allclose(written_out(found), matrix, atol=1e-13)
    assert exact * (1 - 1e-12) <= norm(found) <= exact * (1 + 1e-8)


def test_what_is_moved_between_windows_is_refused() -> None:
    w, value = torch.ones(1, 1, 3, 3).double(), {"value": "2"}
    first = ("aten.conv2d.default", {"input": X, "weight": {"tensor": "w"}, "padding": [1, 1]}, (1, 1, 4, 4))
    turn = ("aten.transpose.int", {"self": {"value": "1"}, "dim0": 2, "dim1": 3}, (1, 1, 4, 4))
    second = ("aten.conv2d.default", {"input": value, "weight": {"tensor": "w"}, "padding": [1, 1]}, (1, 1, 4, 4))
    with pytest.raises(Rejected, match="in another way"):
        program((1, 1, 4, 4), first, turn, second, w=w).maps(["3"], "0")


def test_the_image_on_its_own_torus_would_be_too_small() -> None:
    """The near miss of the theorem: as many positions as the image has are not enough."""
    found = 0
    for seed, twisted in itertools.product(range(40), (False, True)):
        weight = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 1, 3, 3)))
        kernel = conv(weight, (4, 4), 1, 1, 1, 1)
        exact = np.linalg.norm(dense(lambda x, w=weight: F.conv2d(x, w, padding=1), (1, 4, 4)), 2)
        found += proved_norm(symbols(kernel.taps, (4, 4), twisted)) < exact
        assert exact <= proved_norm(symbols(kernel.taps, (5, 5), twisted)) * (1 + 1e-12)
    assert found > 0


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), shape=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)),
       real=st.booleans(), spread=st.integers(0, 12))  # fmt: skip
def test_proved_norm_is_above_and_near(seed, shape, real, spread):
    rng = np.random.default_rng(seed)
    blocks = rng.normal(size=shape) * 10.0 ** -rng.integers(0, spread + 1, size=shape)
    if not real:
        blocks = blocks + 1j * rng.normal(size=shape)
    exact = np.linalg.norm(blocks, 2, axis=(1, 2)).max()
    assert exact * (1 - 1e-14) <= proved_norm(blocks) <= exact * (1 + 1e-8)


def test_a_proposal_that_is_too_small_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.random.default_rng(0).normal(size=(1, 20, 20))
    solve = np.linalg.eigvalsh
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda a: solve(a) * (1 - 1e-7))
    with pytest.raises(Rejected, match="no factorisation"):
        proved_norm(matrix)


def test_two_truncated_convolutions_are_not_one() -> None:
    weight = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    first = conv(weight, (6, 6), 1, 1, 1, 1)
    with pytest.raises(Rejected, match="cut off"):
        compose(first, first)
    pointwise = conv(torch.full((1, 1, 1, 1), 2.0).double(), (6, 6), 1, 0, 1, 1)
    assert kernel_norm(compose(first, pointwise)) == pytest.approx(2 * kernel_norm(first), rel=1e-8)


def attention(q: tuple[int, ...], k: tuple[int, ...], *, eps: float = 1.0, **options: Any) -> Any:
    """Return the operation of attention on normalised rows."""
    tensors = {name: value for name, value in options.items() if isinstance(value, np.ndarray)}
    given = {name: {"tensor": name} if name in tensors else value for name, value in options.items()}
    rows = [("aten.slice.Tensor", {"self": X, "dim": -2, "start": a, "end": a + s[-2]}, s)
            for a, s in ((0, q), (q[-2], k), (q[-2] + k[-2], k))]  # fmt: skip
    unit = [("lipcert.normalize", {"x": {"value": str(i + 1)}, "dim": len(q) - 1, "eps": eps, "kind": "squares"}, s)
            for i, s in enumerate((q, k, k))]  # fmt: skip
    parts = dict(zip(("query", "key", "value"), ({"value": str(i)} for i in (4, 5, 6)), strict=True))
    last = ("aten.scaled_dot_product_attention.default", parts | given, q)
    return program((*q[:-2], q[-2] + 2 * k[-2], q[-1]), *rows, *unit, last, **tensors)


def test_attention_is_that_of_torch_and_its_constants_those_of_lipcert() -> None:
    rng = np.random.default_rng(0)
    for n, m, scale, spread in ((5, 5, 1.0, 0.0), (4, 9, 0.25, 1.0), (49, 49, None, 0.01), (7, 1, 3.0, 0.0)):
        mask = rng.uniform(-spread, spread, size=(3, n, m))
        made = attention((1, 2, 3, n, 4), (1, 2, 3, m, 4), scale=scale, attn_mask=mask)
        operation = made.operation("7")
        q, k, v = (rng.normal(size=(2, 1, 2, 3, rows, 4)) for rows in (n, m, m))
        q, k, v = (x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-3) for x in (q, k, v))
        value, arisen = operation.run(q, k, v)
        wanted = F.scaled_dot_product_attention(*(torch.from_numpy(x) for x in (q, k, v, mask)), scale=scale).numpy()
        off = np.linalg.norm((value - wanted).reshape(2, -1), axis=1)
        assert (off <= 2 * arisen).all() and (arisen < 1e-12).all()
        s = 0.5 if scale is None else scale
        wide = Rows(WIDE, WIDE)
        osc = float((mask.max(-1) - mask.min(-1)).max())
        columns = column_sums(2 * s * WIDE**2 + osc, None, n, m)
        assert isinstance(columns, Columns)
        theirs = coefficients(wide, wide, wide, s, columns)
        assert operation.factors == pytest.approx(theirs, rel=1e-9, abs=1e-12)


def test_attention_constants_are_not_exceeded() -> None:
    """Derivatives at random and at adverse points, in each argument alone."""
    rng = np.random.default_rng(1)
    made = attention((1, 6, 3), (1, 6, 3), scale=4.0)
    factors, run = made.operation("7").factors, made.operation("7").run
    largest = np.zeros(3)
    for trial in range(300):
        x = [rng.normal(size=(1, 1, 6, 3)) for _ in range(3)]
        if trial % 2:  # all queries seek one key, whose value is apart
            x[0] = np.broadcast_to(x[1][:, :, :1], x[0].shape) + 0.1 * rng.normal(size=x[0].shape)
            x[2][:, :, 1:] = -x[2][:, :, :1]
        x = [a / np.maximum(1.0, np.linalg.norm(a, axis=-1, keepdims=True)) for a in x]
        for i in range(3):
            d = rng.normal(size=x[i].shape)
            d *= 1e-6 / np.linalg.norm(d)
            moved = [a + d if j == i else a for j, a in enumerate(x)]
            largest[i] = max(largest[i], np.linalg.norm(run(*moved)[0] - run(*x)[0]) / 1e-6)
    assert (largest <= np.array(factors) * (1 + 1e-6)).all() and largest[2] > 1.0


def test_attention_of_rows_without_a_bound_is_refused() -> None:
    shape = (1, 2, 4, 3)
    node = ("aten.scaled_dot_product_attention.default", {"query": X, "key": X, "value": X}, shape)
    with pytest.raises(Rejected, match="rows without a bound"):
        program(shape, node).operation("1")
    with pytest.raises(Rejected, match="another normalisation"):
        half = ("lipcert.normalize", {"x": X, "dim": 2, "eps": 1.0, "kind": "squares"}, shape)
        program(shape, half).operation("1")
    for options in ({"is_causal": True}, {"dropout_p": 0.1}, {"scale": "x"}, {"attn_mask": np.zeros((5, 5))}):
        with pytest.raises(Rejected, match="cannot be rechecked"):
            attention(shape, shape, **options).operation("7")


class Plain(nn.Module):
    """Other operators: strides, groups, pooling, a sum, a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.head, self.sort = nn.Linear(24, 4), MaxMin()

    def forward(self, x):
        x = self.sort(self.a(x - 0.5))
        x = self.sort(x + self.b(x * 0.3))
        return self.head(torch.flatten(F.avg_pool2d(self.sort(x), 2), 1))


def test_a_plain_network_verifies(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.rand(8, 2, 8, 8)
    certify(Plain().eval(), images, tmp_path)
    report = check(tmp_path / "certificate.json", images=images.double().numpy())
    assert report.accepted and report.images == 8, report.reason
    assert_agreement(report)


def assert_agreement(report: Report, composed: Collection[str] = ()) -> None:
    """Compare factors; `composed` ones are products of others, each with its slack."""
    for value, own, claimed in report.own:
        assert own <= claimed <= own * (1 + (1e-5 if value in composed else 1e-6)), value


def branches_of(steps: list[dict]) -> Iterator[dict]:
    for step in steps:
        for branch in step.get("branches", []):
            yield step
            yield from branches_of(branch["steps"])


@pytest.mark.parametrize(
    "options",
    [
        {}, {"shift": "branch"}, {"shift": "zero"}, {"residual": "published"},
        {"center": False, "kernel_size": 5}, {"neck": 0, "pool": "avg"}, {"circular": True}, {"neck": 0},
    ],
    ids=str,
)  # fmt: skip
def test_every_lipshift_verifies_and_agrees(options: dict, tmp_path: Path) -> None:
    files = small(tmp_path, **options)
    report = check(tmp_path / "certificate.json", images=files.images)
    assert report.accepted and report.images == N, report.reason
    assert_agreement(report)


@pytest.mark.parametrize("options", [{}, {"window_size": 2}], ids=str)
def test_every_lipsformer_verifies_and_agrees(options: dict, tmp_path: Path) -> None:
    files = lipsformer(tmp_path, **options)
    report = check(tmp_path / "certificate.json", images=files.images)
    assert report.accepted and report.images == N, report.reason
    assert any("scaled_dot_product" in value for value, _, _ in report.own)
    assert_agreement(report)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"name": "lipsegformer_b0"}, {"mixers": ("shift", "window", "reduced")}, {"decoder": "pixelshuffle"},
        {"mixers": "window", "ffn": "mix"}, {"decoder": "mlp"},
    ],
    ids=str,
)  # fmt: skip
def test_every_lipsegformer_verifies_and_agrees(options: dict, tmp_path: Path) -> None:
    files = certify_masks(tmp_path, **options)
    report = check(tmp_path / "certificate.json", images=files.images, labels=files.labels)
    assert report.accepted and report.images == len(files.images), report.reason
    branching = {step["value"] for step in branches_of(files.steps)}
    assert branching or "decoder" in options or "mixers" in options
    assert_agreement(report, branching)


def test_lengths_are_those_of_torch_and_nonexpansive() -> None:
    rng, shape = np.random.default_rng(0), (1, 3, 2, 4, 1, 5)
    given = {"self": X, "ord": 2, "dim": [3, 5], "keepdim": False, "dtype": None}
    node = ("aten.linalg_vector_norm.default", given, (1, 3, 2, 1))
    operation = program(shape, node).operation("1")
    x, y = rng.normal(size=(50, *shape)), rng.normal(size=(50, *shape)) * 10.0 ** rng.integers(-9, 2, size=shape)
    a, b = operation.run(x)[0], operation.run(x + y)[0]
    wanted = torch.linalg.vector_norm(torch.from_numpy(x), dim=(4, 6)).numpy()
    assert (np.linalg.norm((a - wanted).reshape(50, -1), axis=1) <= 2 * operation.run(x)[1]).all()
    off = np.linalg.norm((a - b).reshape(50, -1), axis=1) / np.linalg.norm(y.reshape(50, -1), axis=1)
    assert operation.factors == [1.0] and (off <= 1 + 1e-12).all()
    for change in ({"ord": 1}, {"ord": True}, {"dim": []}, {"dim": [3, 3]}, {"dim": [0, 5]}, {"dtype": "half"}):
        with pytest.raises(Rejected, match="cannot be rechecked"):
            program(shape, (node[0], given | change, node[2])).operation("1")


def test_one_position_of_an_enlarged_map(tmp_path: Path) -> None:
    """The counts of the decoder that interpolates rest on the constant of one position, and are refused without it."""
    files = certify_masks(tmp_path, decoder="mlp")
    made = Program(files.record["program"], files.tensors)
    steps, bounds = prove(made, files.steps, made.input)
    head, constants = files.record["proof"]["heads"][0], files.record["constants"]
    found = positions(made, steps, bounds)[head]
    assert found <= constants["pixel"] <= found * (1 + 3e-7) and found < 0.6 * bounds[head]
    look = partial(check, tmp_path / "certificate.json", images=files.images, labels=files.labels)
    assert look().accepted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificate, "position", lambda program, steps, bounds, head: bounds[head])
        assert "certified_alone" in look().reason


def test_logits_that_read_several_positions_of_an_enlarged_map() -> None:
    """They are a matrix times the head, and move by more than one position of it does."""
    shape, size = (1, 2, 2, 2), {"output_size": [4, 4], "align_corners": False, "scale_factors": None}
    w = np.stack([np.ones((2, 2, 2)), -np.ones((2, 2, 2))])
    step = {"rule": "affine", "joint": False, "method": "", "factors": [1e3]}
    steps = [step | {"value": "1", "rule": "upsample_bilinear2d", "sources": ["0"], "bound": 1e3},
             step | {"value": "2", "sources": ["1"], "bound": 1e6}]  # fmt: skip
    for stride, several in ((2, True), (1, False)):
        weight = w if several else w[:, :, :1, :1]
        side = 4 // stride
        nodes = [
            ("aten.upsample_bilinear2d.vec", {"input": X, **size}, (1, 2, 4, 4)),
            ("aten.conv2d.default", {"input": {"value": "1"}, "weight": {"tensor": "w"}, "stride": [stride] * 2},
             (1, 2, side, side)),
        ]  # fmt: skip
        made = program(shape, *nodes, w=weight)
        proved, bounds = prove(made, steps, "0")
        apart = pairwise(made, bounds, ["1"])[1]["1"][0, 1]
        found = position(made, proved, bounds, "1")

        def function(x: torch.Tensor, weight: Any = weight, stride: int = stride) -> torch.Tensor:
            z = F.conv2d(F.interpolate(x, size=(4, 4), mode="bilinear"), torch.from_numpy(weight), stride=stride)
            return z[:, 0] - z[:, 1]

        exact = np.linalg.norm(dense(function, shape[1:]), axis=1).max()
        assert exact <= found * apart
        assert found == pytest.approx(2.0 if several else 1.0)
        assert not several or exact > positions(made, proved, bounds)["1"] * apart * 1.5


def branching(a: Any, b: Any) -> Any:
    """Return a program f(x) = (Ax, enlarged Bx) of images (1, 2, 2, 4), its two parts of one size."""
    value = lambda i: {"value": str(i)}  # noqa: E731
    large, small = (1, 3, 4, 8), (1, 3, 2, 4)
    size = {"output_size": [4, 8], "align_corners": False, "scale_factors": None}
    return program(
        (1, 2, 4, 8),
        ("aten.conv2d.default", {"input": X, "weight": {"tensor": "a"}}, large),
        ("aten.conv2d.default", {"input": X, "weight": {"tensor": "b"}, "stride": [2, 2]}, small),
        ("aten.upsample_bilinear2d.vec", {"input": value(2), **size}, large),
        ("aten.cat.default", {"tensors": [value(1), value(3)], "dim": 1}, (1, 6, 4, 8)),
        ("aten.roll.default", {"self": value(4), "shifts": [1], "dims": [3]}, (1, 6, 4, 8)),
        ("aten.add.Tensor", {"self": value(4), "other": value(5)}, (1, 6, 4, 8)),
        a=a, b=b,
    )  # fmt: skip


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_positions_against_the_rows_of_the_matrix(seed):
    """No position moves more than its constant, also where a sum of two positions follows."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(3, 2, 1, 1)), rng.normal(size=(3, 2, 2, 2))
    made = branching(a, b)
    record = [("1", ["0"]), ("2", ["0"]), ("3", ["2"]), ("4", ["1", "3"]), ("5", ["4"]), ("6", ["4"])]
    op = lambda v: {"3": "upsample_bilinear2d", "4": "cat"}.get(v, "affine")  # noqa: E731
    steps = [
        {"value": v, "rule": op(v), "sources": s, "factors": [1e3] * len(s), "joint": v == "4", "method": "",
         "bound": 1e4 ** (i + 1)} for i, (v, s) in enumerate(record)
    ]  # fmt: skip
    proved, bounds = prove(made, steps, "0")
    found = positions(made, proved, bounds)

    def function(x: torch.Tensor) -> torch.Tensor:
        small = F.conv2d(x, torch.from_numpy(b), stride=2)
        large = F.interpolate(small, size=(4, 8), mode="bilinear")
        x = torch.cat([F.conv2d(x, torch.from_numpy(a)), large], 1)
        return torch.cat([x, x + torch.roll(x, 1, 3)], 1)

    blocks = dense(function, (2, 4, 8)).reshape(2, 6, 32, 64).transpose(0, 2, 1, 3)
    exact = np.linalg.norm(blocks, 2, axis=(2, 3)).max(1)
    for value, rows in (("4", exact[0]), ("6", exact[1])):
        assert rows * (1 - 1e-12) <= found[value] <= bounds[value]
    assert found["4"] < bounds["4"]


def test_own_errors_cover_the_distance_to_a_finer_evaluation(tmp_path: Path) -> None:
    """Logits in float64 against the same network in long double."""
    torch.manual_seed(1)
    images = torch.rand(3, 1, 4, 4)
    certify(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), MaxMin(), nn.Flatten(), nn.Linear(64, 3)), images, tmp_path)
    record = read_json(tmp_path / "certificate.json")
    tensors = read_tensors(tmp_path / "program.safetensors", record["program"]["sha256"])
    made = Program(record["program"], tensors)
    steps, _ = prove(made, record["proof"]["steps"], made.input)
    logits, error, _ = evaluate(made, steps, {}, images.double().numpy())
    w, b, v, c = (tensors[name].astype(np.longdouble) for name in ("0.weight", "0.bias", "3.weight", "3.bias"))
    padded = np.pad(images.numpy().astype(np.longdouble), ((0, 0), (0, 0), (1, 1), (1, 1)))
    hidden = np.zeros((3, 4, 4, 4), dtype=np.longdouble) + b[:, None, None]
    for i, j in itertools.product(range(3), range(3)):
        hidden += w[:, 0, i, j][:, None, None] * padded[:, :, i : i + 4, j : j + 4]
    a, d = hidden[:, :2], hidden[:, 2:]
    finer = np.concatenate([np.maximum(a, d), np.minimum(a, d)], axis=1).reshape(3, -1) @ v.T + c
    off = np.sqrt(((logits - finer) ** 2).sum(1)).astype(float)
    assert (off <= error).all() and (error < 1e-12).all()


def test_what_it_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    class Softplus(nn.Module):
        def forward(self, x):
            return F.softplus(x.flatten(1))

    certify(Softplus(), torch.rand(2, 1, 2, 2), tmp_path)
    reason = check(tmp_path / "certificate.json").reason
    assert "step" in reason and "operator aten.softplus" in reason and "cannot be rechecked" in reason


ORDER = [
    "reading", "rounding", "maps", "norms", "operators", "resampling", "attention", "program", "steps", "evaluation",
    "rows", "certificate", "__init__", "__main__",
]  # fmt: skip


@pytest.mark.parametrize("name", ORDER)
def test_the_checker_imports_nothing_of_ours_and_no_torch(name: str) -> None:
    """Each file imports the standard library, NumPy, safetensors, and files of the checker that are read before it."""
    nodes = [*ast.walk(ast.parse((CHECKER / f"{name}.py").read_text()))]
    outside = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    outside |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    assert {module.partition(".")[0] for module in outside} <= {"numpy", "safetensors", *sys.stdlib_module_names}
    inside = {(node.level, node.module) for node in nodes if isinstance(node, ast.ImportFrom) and node.level}
    assert inside <= {(1, before) for before in ORDER[: ORDER.index(name)]}
    assert not {"__import__", "importlib", "exec", "eval"} & {getattr(node, "id", "") for node in nodes}


def test_every_file_of_the_checker_is_short_and_in_the_order_of_reading() -> None:
    lines = {path.stem: path.read_text().count("\n") for path in CHECKER.iterdir() if path.suffix == ".py"}
    assert {*lines} == {*ORDER} and max(lines.values()) <= 400
    listed = re.findall(r"^    (\w+)  +", (CHECKER / "__init__.py").read_text(), re.MULTILINE)
    assert listed == [name for name in ORDER if not name.startswith("_")]


def test_a_copy_of_the_folder_runs_alone(tmp_path: Path) -> None:
    files = small(tmp_path)
    save_file({"images": files.images}, tmp_path / "images.safetensors")
    shutil.copytree(CHECKER, tmp_path / "checker", ignore=shutil.ignore_patterns("__pycache__"))
    program = "import sys, checker.__main__; print({name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert "'checker'" in done.stdout and not re.search("'(lipcert|torch)'", done.stdout), done.stderr
    command = [sys.executable, "-m", "checker", "certificate.json"]
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
    done = run([*command, "--images", "images.safetensors"])
    assert done.returncode == 0 and f"rows of {N} images confirmed" in done.stdout, done.stderr
    record = json.loads((tmp_path / "certificate.json").read_text())
    record["proof"]["upper"] /= 2
    (tmp_path / "certificate.json").write_text(json.dumps(record))
    done = run(command)
    assert done.returncode == 3 and "does not verify: proof: upper" in done.stdout
    (tmp_path / "program.safetensors").unlink()
    assert run(command).returncode == 2


@pytest.mark.parametrize("make", [small, certify_masks], ids=["images", "masks"])
def test_written_certificates_follow_the_schema(make: Any, tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "docs" / "certificate.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    record = make(tmp_path).record
    validator.validate(record)
    for change in (
        lambda r: r["program"].update(schema=2),
        lambda r: r["proof"]["steps"][0].update(trust=1),
        lambda r: r["proof"]["steps"][0]["factors"].append("1"),
        lambda r: r["program"]["nodes"][1]["arguments"].update(x={"code": "1"}),
        lambda r: r.pop("norm"),
    ):
        changed = json.loads(json.dumps(record))
        change(changed)
        assert not validator.is_valid(changed)
