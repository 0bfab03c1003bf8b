"""The checker's own mathematics against dense references, its agreement with lipcert's bounds, and what it refuses."""

from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_mutations import N, certify, small
from torch import nn

from lipcert import checker
from lipcert.bounds.convolution import conv_norm_upper
from lipcert.checker import Kernel, Rejected, compose, norm, proved_norm
from lipcert.layers import MaxMin

ROOT = Path(__file__).parents[1]


def dense(function, shape: tuple[int, ...]) -> np.ndarray:
    """Return the matrix of a linear function of tensors (1, *shape)."""
    basis = torch.eye(int(np.prod(shape)), dtype=torch.float64).reshape(-1, *shape)
    return function(basis).reshape(len(basis), -1).T.numpy()


def conv(weight: torch.Tensor, n: tuple[int, int], stride: int, padding: int, dilation: int, groups: int) -> Kernel:
    out = F.conv2d(
        torch.zeros(1, weight.shape[1] * groups, *n).double(), weight, None, stride, padding, dilation, groups
    )
    made = checker._conv(
        tuple(out.shape[1:]), {}, checker.Value("x", (weight.shape[1] * groups, *n)), weight.numpy(),
        stride=[stride] * 2, padding=[padding] * 2, dilation=[dilation] * 2, groups=groups,
    )  # fmt: skip
    return made.kernels[0]


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
    assert exact * (1 - 1e-12) <= norm(kernel) <= exact * (1 + 1e-8)  # small: the matrix itself
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checker, "DENSE_SIDE", 0)
        assert exact * (1 - 1e-12) <= norm(kernel)
    x = torch.from_numpy(rng.normal(size=(2, *kernel.source)))
    y, roundings = checker.apply(kernel, x.numpy())
    wanted = F.conv2d(x, weight, None, stride, padding, dilation, groups).numpy()
    majorant = F.conv2d(x.abs(), weight.abs(), None, stride, padding, dilation, groups).numpy()
    assert (np.abs(y - wanted) <= 2 * checker.gamma(roundings + matrix.shape[1]) * majorant + 1e-300).all()
    assert np.linalg.norm(matrix / scale, 2) * scale <= checker.cheap_norm(kernel) * (1 + 1e-12)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6), c=st.integers(1, 3), k=st.sampled_from([1, 3, 5]), n=st.integers(5, 8),
    shift=st.integers(-3, 3), stride=st.integers(1, 2),
)  # fmt: skip
def test_norm_of_a_periodic_convolution_after_a_roll(seed, c, k, n, shift, stride):
    assume(n % stride == 0)
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.normal(size=(c, c, k, k)))
    p = k // 2

    def function(x):
        x = torch.roll(x, shift, 3)
        return F.conv2d(F.pad(x, (p,) * 4, mode="circular"), weight, None, stride)

    grid = (c, n, n)
    roll = checker._roll(grid, {"x": (1, *grid)}, checker.Value("x", grid), [shift], [3]).kernels[0]
    padded = (c, n + 2 * p, n + 2 * p)
    pad = checker._pad(padded, {"x": (1, *grid)}, checker.Value("x", grid), [p] * 4, "circular").kernels[0]
    inner = compose(compose(conv(weight, padded[1:], stride, 0, 1, 1), pad), roll)
    exact = np.linalg.norm(dense(function, grid), 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checker, "DENSE_SIDE", 0)
        assert exact * (1 - 1e-12) <= norm(inner) <= exact * (1 + 1e-8)  # the torus is the map
    x = torch.from_numpy(rng.normal(size=(2, *grid)))
    assert np.allclose(checker.apply(inner, x.numpy())[0], function(x).numpy(), atol=1e-12)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), c=st.integers(1, 4), k=st.sampled_from([1, 3]), n=st.integers(6, 9))
def test_torus_norms_agree_with_what_lipcert_proves(seed, c, k, n):
    weight = torch.from_numpy(np.random.default_rng(seed).normal(size=(c, c, k, k)))
    theirs = conv_norm_upper(weight, (n, n), padding=k // 2).value
    assert norm(conv(weight, (n, n), 1, k // 2, 1, 1)) == pytest.approx(theirs, rel=1e-8)


def test_the_image_on_its_own_torus_would_be_too_small() -> None:
    """The near miss of the theorem: with zeros, as many positions as the image has are not enough."""
    found = 0
    for seed in range(40):
        weight = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 1, 3, 3)))
        kernel = conv(weight, (4, 4), 1, 1, 1, 1)
        wrong = max(proved_norm(b, 0.0) for b, _ in checker._symbols(kernel.taps, (4, 4), 1.0))
        exact = np.linalg.norm(dense(lambda x, w=weight: F.conv2d(x, w, padding=1), (1, 4, 4)), 2)
        found += wrong < exact
        assert exact <= norm(kernel)
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
    assert exact * (1 - 1e-14) <= proved_norm(blocks, 0.0) <= exact * (1 + 1e-8)
    assert proved_norm(blocks, 1.0) >= exact + 1.0


def test_a_proposal_that_is_too_small_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.random.default_rng(0).normal(size=(1, 20, 20))
    solve = np.linalg.eigvalsh
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda a: solve(a) * (1 - 1e-7))
    with pytest.raises(Rejected, match="no factorisation"):
        proved_norm(matrix, 0.0)


def test_selections_have_norm_exactly_one() -> None:
    grid = (5, 4, 4)
    roll = checker._roll(grid, {"x": (1, *grid)}, checker.Value("x", grid), [1], [2]).kernels[0]
    unshuffle = checker._unshuffle((20, 2, 2), {}, checker.Value("x", grid), 2).kernels[0]
    for kernel in (roll, unshuffle, compose(unshuffle, roll)):
        assert norm(kernel) == 1.0
    twice = checker.stack([roll, roll])
    assert norm(twice) == pytest.approx(np.sqrt(2), rel=1e-8) and norm(twice) > np.sqrt(2)


def test_two_truncated_convolutions_are_not_one() -> None:
    weight = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    first = conv(weight, (6, 6), 1, 1, 1, 1)
    with pytest.raises(Rejected, match="cut off"):
        compose(first, first)
    pointwise = conv(torch.full((1, 1, 1, 1), 2.0).double(), (6, 6), 1, 0, 1, 1)
    assert norm(compose(first, pointwise)) == pytest.approx(2 * norm(first), rel=1e-8)
    wraps = checker._roll((1, 6, 6), {"x": (1, 1, 6, 6)}, checker.Value("x", (1, 6, 6)), [1], [2]).kernels[0]
    with pytest.raises(Rejected, match="mixed"):
        compose(wraps, first)


class Plain(nn.Module):
    """Other operators: strides, groups, pooling, tanh, a sum, a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.head, self.sort = nn.Linear(24, 4), MaxMin()

    def forward(self, x):
        x = self.sort(self.a(x - 0.5))
        x = torch.tanh(x + self.b(x * 0.3))
        return self.head(torch.flatten(F.avg_pool2d(self.sort(x), 2), 1))


def test_a_plain_network_verifies(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.rand(8, 2, 8, 8)
    certify(Plain().eval(), images, tmp_path)
    report = checker.check(tmp_path / "certificate.json", images=images.double().numpy())
    assert report.accepted and report.images == 8, report.reason
    for value, own, claimed in report.own:
        assert own <= claimed <= own * (1 + 1e-6), value


@pytest.mark.parametrize(
    "options",
    [
        {}, {"shift": "branch", "circular": True}, {"shift": "zero"}, {"residual": "published"},
        {"center": False, "kernel_size": 5}, {"neck": 0, "pool": "avg"},
    ],
    ids=str,
)  # fmt: skip
def test_every_lipshift_verifies_and_agrees(options: dict, tmp_path: Path) -> None:
    files = small(tmp_path, **options)
    report = checker.check(tmp_path / "certificate.json", images=files.images)
    assert report.accepted and report.images == N, report.reason
    for value, own, claimed in report.own:
        assert own <= claimed <= own * (1 + 1e-6), value


def test_own_errors_cover_the_distance_to_a_finer_evaluation(tmp_path: Path) -> None:
    """Logits in float64 against the same network in long double."""
    torch.manual_seed(1)
    images = torch.rand(3, 1, 4, 4)
    certify(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), MaxMin(), nn.Flatten(), nn.Linear(64, 3)), images, tmp_path)
    record = checker.read_json(tmp_path / "certificate.json")
    tensors = checker.read_tensors(tmp_path / "program.safetensors", record["program"]["sha256"])
    program = checker.Program(record["program"], tensors)
    steps, _, heads = checker.prove(program, record["proof"])
    logits, errors, _ = checker.evaluate(program, steps, heads, images.double().numpy())
    w, b, v, c = (tensors[name].astype(np.longdouble) for name in ("0.weight", "0.bias", "3.weight", "3.bias"))
    padded = np.pad(images.numpy().astype(np.longdouble), ((0, 0), (0, 0), (1, 1), (1, 1)))
    hidden = np.zeros((3, 4, 4, 4), dtype=np.longdouble) + b[:, None, None]
    for i, j in itertools.product(range(3), range(3)):
        hidden += w[:, 0, i, j][:, None, None] * padded[:, :, i : i + 4, j : j + 4]
    a, d = hidden[:, :2], hidden[:, 2:]
    finer = np.concatenate([np.maximum(a, d), np.minimum(a, d)], axis=1).reshape(3, -1) @ v.T + c
    off = np.sqrt(((logits - finer) ** 2).sum(1)).astype(float)
    assert (off <= errors).all() and (errors < 1e-12).all()


def test_what_it_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    class Softplus(nn.Module):
        def forward(self, x):
            return F.softplus(x.flatten(1))

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(F.relu(self.a(x.flatten(1))))

    certify(Softplus(), torch.rand(2, 1, 2, 2), tmp_path)
    reason = checker.check(tmp_path / "certificate.json").reason
    assert "step" in reason and "operator aten.softplus" in reason and "cannot be rechecked" in reason
    torch.manual_seed(0)
    (tmp_path / "chain").mkdir()
    certify(Chain(), torch.rand(2, 1, 2, 2), tmp_path / "chain")
    assert "chains" in checker.check(tmp_path / "chain" / "certificate.json").reason


def test_the_checker_imports_nothing_of_ours_and_no_torch() -> None:
    tree = ast.parse((ROOT / "lipcert" / "checker.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert outside == {"numpy", "safetensors"}


def test_it_runs_as_a_file_alone(tmp_path: Path) -> None:
    files = small(tmp_path)
    save_file({"images": files.images}, tmp_path / "images.safetensors")
    (tmp_path / "alone.py").write_bytes((ROOT / "lipcert" / "checker.py").read_bytes())
    command = [sys.executable, "-I", tmp_path / "alone.py", tmp_path / "certificate.json"]
    done = subprocess.run([*command, "--images", tmp_path / "images.safetensors"], capture_output=True, text=True)
    assert done.returncode == 0 and f"{N} of {N} radii confirmed" in done.stdout, done.stderr
    record = json.loads((tmp_path / "certificate.json").read_text())
    record["proof"]["upper"] /= 2
    (tmp_path / "certificate.json").write_text(json.dumps(record))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3 and "does not verify: proof: upper" in done.stdout
    (tmp_path / "program.safetensors").unlink()
    assert subprocess.run(command, capture_output=True).returncode == 2


def test_written_certificates_follow_the_schema(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "docs" / "certificate.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    record = small(tmp_path).record
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
