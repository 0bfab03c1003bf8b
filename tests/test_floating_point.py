"""False certificates of the usual kinds, each with a point that refutes it, beside what lipcert says of the network.

All networks and points are dyadic: they are evaluated in rational arithmetic, so that nothing here rests on rounding.
docs/soundness.md tells the same story in words.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from cli.test_cli import run
from torch import Tensor, nn

from lipcert.bounds import BoundError, audit
from lipcert.certify import Row, rows_of_batches

Layer = tuple[Tensor, Tensor]  # weight, bias


# -------------------------------------------------------------------------------------- networks and exact arithmetic


class Apply(nn.Module):
    """A function of x and of named constants."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **constants: object) -> None:
        super().__init__()
        self.function = function
        for name, value in constants.items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def dense(weight: Sequence[Sequence[float]] | Tensor, bias: Sequence[float] | None = None) -> nn.Linear:
    weight = torch.as_tensor(weight, dtype=torch.float64)
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    layer.weight.data = weight
    layer.bias.data = torch.zeros(len(weight), dtype=torch.float64) if bias is None else torch.tensor(bias).double()
    return layer.requires_grad_(False)


def exactly(network: nn.Sequential, x: Sequence[Fraction]) -> list[Fraction]:
    """Evaluate linear layers, ReLU and dropout (which does nothing) in rational arithmetic."""
    values = [Fraction(v) for v in x]
    for layer in network:
        if isinstance(layer, nn.Linear):
            rows, bias = layer.weight.double().tolist(), layer.bias.double().tolist()
            values = [
                sum((Fraction(w) * v for w, v in zip(row, values, strict=True) if w), Fraction(b))
                for row, b in zip(rows, bias, strict=True)
            ]
        elif isinstance(layer, nn.ReLU):
            values = [max(v, Fraction(0)) for v in values]
    return values


def winner(logits: Sequence[Fraction]) -> int:
    """Return the class of the largest logit, -1 for a tie."""
    best = max(logits)
    return logits.index(best) if logits.count(best) == 1 else -1


def within(x: Sequence[Fraction], y: Sequence[Fraction], radius: float) -> bool:
    return sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(x, y, strict=True)) < Fraction(radius) ** 2


def ours(network: nn.Module, x: Sequence[float], precision: str = "float64") -> Row:
    """Return what lipcert certifies for one input in [0, 1]."""
    found = audit(network, (len(x),))
    ((row,),) = rows_of_batches(found, [(torch.tensor([x]).double(), torch.tensor([0]))], precision=precision)
    return row


# ------------------------------------------------------------------------------------------------- naive certifiers


def power_iteration(weight: Tensor, steps: int, start: Tensor) -> float:
    """Return the estimate of the usual layers: ‖Wv‖ after some steps of v ← WᵀWv, normalised."""
    v = start / start.norm()
    for _ in range(steps):
        v = weight.T @ (weight @ v)
        v = v / v.norm()
    return float((weight @ v).norm())


def naive(network: nn.Sequential, x: Sequence[float], norm: Callable[[Tensor], float], dtype=torch.float32,
          factor: float = 1.0) -> tuple[int, float]:  # fmt: skip
    """Return (class, radius) as published evaluations compute it: margin / (product of norms · ‖w_i - w_j‖)."""
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    lipschitz = factor * math.prod(norm(layer.weight.to(dtype)) for layer in layers[:-1])
    logits = copy.deepcopy(network).to(dtype)(torch.tensor([x], dtype=dtype))[0]
    first, second = logits.topk(2).indices.tolist()
    head = layers[-1].weight.to(dtype)
    return first, float((logits[first] - logits[second]) / (lipschitz * (head[first] - head[second]).norm()))


def spectral(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight, 2))


# ------------------------------------------------------------------------------------------------- counterexamples


def difference(size: int, factor: float) -> Tensor:
    """Return I + factor·ddᵀ for d = e_0 - e_1: norm 1 + 2·factor, attained by d alone, which 1 … 1 is orthogonal to."""
    weight = torch.eye(size, dtype=torch.float64)
    weight[:2, :2] += factor * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    return weight


@pytest.mark.parametrize("steps", [1, 10, 10_000])
def test_power_iteration_from_an_unlucky_start_never_sees_the_norm(steps: int) -> None:
    """The start 1 … 1 is an eigenvector of WᵀW: whatever the number of steps, the estimate is 1, and the norm is 9."""
    network = nn.Sequential(dense(difference(8, 4.0)), dense([[1.0, -1.0, *[0.0] * 6], [0.0] * 8]))
    x = [0.5 + 1 / 16, 0.5 - 1 / 16, *[0.5] * 6]  # z_0 - z_1 = 9 (x_0 - x_1) = 9/8
    start = torch.ones(8, dtype=torch.float64)
    label, claimed = naive(network, x, lambda w: power_iteration(w, steps, start), torch.float64)
    assert label == 0 and claimed == pytest.approx(9 / 8 / math.sqrt(2))
    other = [*(Fraction(1, 2) + sign * Fraction(1, 1 << 20) for sign in (-1, 1)), *[Fraction(1, 2)] * 6]
    assert within(x, other, claimed / 8) and winner(exactly(network, x)) == 0 and winner(exactly(network, other)) == 1
    row = ours(network, x)
    assert row.predict == 0 and 0.088 < row.radius and not within(x, other, row.radius)


def test_few_steps_of_power_iteration_with_close_singular_values() -> None:
    """A random start and 5 steps, as in training: 512 singular values of 0.98 hide the one of 1."""
    size = 512
    weight = 0.98 * torch.eye(size, dtype=torch.float64)
    weight[0, 0] = 1.0
    head = torch.zeros(2, size, dtype=torch.float64)
    head[0, 0] = 1.0
    network = nn.Sequential(dense(weight), dense(head))
    start = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = [0.5, *[0.0] * (size - 1)]
    label, claimed = naive(network, x, lambda w: power_iteration(w, 5, start), torch.float64)
    assert label == 0 and claimed > 0.5 * 1.015
    network[1].bias.data[1] = 0.25  # now class 1 wins below x_0 = 0.25
    _, claimed = naive(network, x, lambda w: power_iteration(w, 5, start), torch.float64)
    other = [Fraction(1, 4) - Fraction(1, 1 << 20), *[Fraction(0)] * (size - 1)]
    assert within(x, other, claimed) and winner(exactly(network, other)) == 1
    row = ours(network, x)
    assert 0.2499 < row.radius < 0.25


def test_a_factor_for_dropout_is_none_at_inference() -> None:
    """LipShiFT's evaluation multiplies its bound by 1 - p for a dropout layer, which is the identity once trained."""
    network = nn.Sequential(dense(torch.eye(2)), nn.Dropout(0.4), dense([[1.0, -1.0], [0.0, 0.0]])).eval()
    x = [0.75, 0.25]
    label, claimed = naive(network, x, spectral, torch.float64, factor=1 - 0.4)
    other = [Fraction(1, 2) - Fraction(1, 64), Fraction(1, 2) + Fraction(1, 64)]
    assert label == 0 and within(x, other, claimed) and winner(exactly(network, other)) == 1
    row = ours(network, x)
    assert 0.35 < row.radius and not within(x, other, row.radius)


def test_what_float32_absorbs(x: float = 0.75) -> None:
    """h = x + 2^25 loses x in float32 (Zombori et al. 2021): the class that a float32 evaluation certifies is wrong."""
    network = nn.Sequential(dense([[1.0]], [2.0**25]), dense([[1.0], [0.0]], [-(2.0**25), 0.25]))
    label, claimed = naive(network, [x], spectral)
    assert label == 1 and claimed == pytest.approx(0.25)
    assert winner(exactly(network, [Fraction(x)])) == 0
    exact, deployed = ours(network, [x]), ours(network, [x], "float32")
    assert (exact.predict, exact.radius) == (0, pytest.approx(0.5, abs=1e-6))
    assert deployed.radius == 0.0  # of a program whose class is 1, nothing is claimed


def tf32(tensor: Tensor) -> Tensor:
    """Round to 10 bits after the leading one, to nearest, as tensor cores round what they multiply."""
    mantissa, exponent = torch.frexp(tensor.double())
    return torch.ldexp((mantissa * 2**11).round(), exponent - 11).float()


def test_tf32_products_certify_the_wrong_class() -> None:
    rows = [[1 + 0.9 * 2.0**-11], [1 + 1.1 * 2.0**-11]]  # rounded to 1 and to 1 + 2^-10
    network = nn.Sequential(dense(rows, [2.0**-12, 0.0]))
    logits = tf32(network[0].weight) @ tf32(torch.ones(1, dtype=torch.float64)) + network[0].bias.float()
    claimed = float((logits[1] - logits[0]) / (math.sqrt(2) * spectral(network[0].weight)))
    assert claimed > 3e-4 and winner(exactly(network, [Fraction(1)])) == 0
    assert ours(network, [1.0]).predict == 0
    assert ours(network, [1.0], "float32").predict == 0


def test_radii_of_linear_classifiers_in_float32_are_too_large_in_many_of_50_cases() -> None:
    """Jin et al. 2022: even an exact method certifies points beyond the boundary, once rounded. Distances are rational.

    The counterexample is x - t·(w_0 - w_1) for a t that goes beyond the boundary and stays within the claim.
    """
    refuted = 0
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        head = torch.randn(2, 100, generator=generator).double()
        x = torch.rand(100, generator=generator).tolist()
        network = nn.Sequential(dense(head))
        label, claimed = naive(network, x, spectral)
        logits = exactly(network, x)
        direction = [
            Fraction(a) - Fraction(b) for a, b in zip(head[label].tolist(), head[1 - label].tolist(), strict=True)
        ]
        margin, squared = logits[label] - logits[1 - label], sum(v * v for v in direction)
        t = margin / squared * (1 + Fraction(1, 1 << 40))
        other = [Fraction(v) - t * d for v, d in zip(x, direction, strict=True)]
        assert margin > 0 and winner(exactly(network, other)) == 1 - label
        refuted += within(x, other, claimed)
        row = ours(network, x)
        assert Fraction(row.radius) ** 2 * squared <= margin**2 and row.radius > 0.999 * claimed
    assert refuted >= 10


# ------------------------------------------------------------------- what a float32 program does otherwise, one by one


def normalised(x: Tensor) -> Tensor:
    return x / (x.norm(dim=1, keepdim=True) + 2.0**-80)


def statistics(variance: float) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(2, eps=0.0).double().eval()
    layer.running_var.fill_(variance)
    return layer


BIG, SMALL = 2.0**118, 2.0**-100
OTHERWISE: dict[str, tuple[nn.Module, list[float]]] = {
    "weights are rounded to few bits": (
        nn.Sequential(dense(BIG * torch.eye(2)), dense([[2.6 * 2.0**-149, 0.0], [3.4 * 2.0**-149, 0.0]])), [1.0, 0.75]),
    "products overflow, their difference does not": (
        nn.Sequential(dense([[2.0**65, 0.0], [0.0, 2.0**65]]), dense([[2.0**64, -(2.0**64)], [0.0, 0.0]])),
        [1.0, 1.0 - 2.0**-12]),
    "squares overflow": (nn.Sequential(dense(2.0**80 * torch.eye(2)), Apply(lambda m, x: nn.functional.normalize(x)),
                                       dense([[1.0, 0.0], [0.0, 0.0]], [0.0, 0.1])), [1.0, 0.75]),
    "squares underflow": (nn.Sequential(dense(2.0**-80 * torch.eye(2)), Apply(lambda m, x: normalised(x)),
                                        dense([[1.0, 0.0], [0.0, 0.0]], [0.0, 0.9])), [1.0, 0.75]),
    "a norm underflows": (nn.Sequential(Apply(lambda m, x: (x * 1e-25).norm(dim=1, keepdim=True)),
                                        dense([[1e25], [0.0]], [0.0, 0.1])), [1.0, 0.75]),
    "a variance underflows": (nn.Sequential(statistics(1e-50), dense(torch.eye(2))), [1.0, 0.75]),
    "a divisor overflows": (nn.Sequential(dense(2.0**110 * torch.eye(2)), Apply(lambda m, x: x / 1e39),
                                          dense([[1.0, 0.0], [0.0, 0.0]], [0.0, 1e-7])), [1.0, 0.75]),
    "a factor overflows": (nn.Sequential(dense(SMALL * torch.eye(2)), Apply(lambda m, x: x * 1e39),
                                         dense([[1.0, 0.0], [0.0, 0.0]], [0.0, 1e-7])), [1.0, 0.75]),
    "a whole number is rounded": (nn.Sequential(Apply(lambda m, x: (x + 16777217) - 16777216),
                                                dense([[1.0, 0.0], [0.0, 0.0]], [0.0, 0.5])), [1.0, 0.75]),
    "whole numbers in a tensor are rounded": (
        nn.Sequential(Apply(lambda m, x: (x + torch.tensor([16777217])) - torch.tensor([16777216])),
                      dense([[1.0, 0.0], [0.0, 0.0]], [0.0, 0.5])), [1.0, 0.75]),
    "a sum overflows before a mean": (
        nn.Sequential(Apply(lambda m, x: (x * m.c).sum(1, keepdim=True), c=[[2.0**127, 2.0**127, -(2.0**127)]]),
                      dense([[2.0**-127], [0.0]], [0.0, 0.1])), [1.0, 1.0, 1.0]),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERWISE)
def test_a_float32_program_that_does_something_else_gets_no_radius(what: str) -> None:
    """In real arithmetic all of these have a radius; the float32 program loses, or turns into NaN, what decides."""
    network, x = OTHERWISE[what]
    exact = ours(network, x)
    deployed = copy.deepcopy(network).float()(torch.tensor([x]))[0]
    one = network(torch.tensor([x]).double())[0]
    decided = (deployed == deployed.max()).nonzero().flatten().tolist()
    assert decided != [int(one.argmax())] or deployed.isnan().any()
    assert ours(network, x, "float32").radius == 0.0
    assert exact.predict == int(one.argmax())


@pytest.mark.parametrize(("what", "function"), [
    ("computes weights, aten.add.Tensor", lambda m, x: x @ ((m.w + 1e9) - 1e9)),
    ("casts to bfloat16", lambda m, x: (x.bfloat16() @ m.w.bfloat16()).to(x.dtype)),
    ("casts to float16", lambda m, x: x @ m.w.half().to(x.dtype)),
])  # fmt: skip
@pytest.mark.parametrize("precision", ["float32", "float64 program"])
def test_a_program_that_is_not_its_list_of_operators_is_refused(
    what: str, function: Callable[[nn.Module, Tensor], Tensor], precision: str
) -> None:
    """Real arithmetic is defined for it; what a machine computes beside the operators that are listed is not proved."""
    x, labels = torch.tensor([[1.0, 0.75]]), torch.tensor([0])
    program = torch.export.export(Apply(function, w=[[0.5, 0.0], [0.0, 0.1]]).float(), (x,))
    found = audit(program, (2,))
    ((row,),) = rows_of_batches(found, [(x, labels)])
    assert row.radius > 0
    with pytest.raises(BoundError, match=what):
        list(rows_of_batches(found, [(x, labels)], precision=precision))


def test_a_program_with_its_own_epsilon_in_each_precision_is_refused_in_float32() -> None:
    network = nn.Sequential(nn.RMSNorm(2), dense(torch.eye(2)))
    assert ours(network, [1.0, 0.75]).radius > 0 and ours(network, [1.0, 0.75], "float32").radius == 0.0


@pytest.mark.parametrize("order", [3.0, 100.0])
def test_powers_that_underflow_count_also_in_float64(order: float) -> None:
    """0.0001^100 is no float: the 100-norm is computed as 0."""
    network = nn.Sequential(
        Apply(lambda m, x: torch.linalg.vector_norm(x * 1e-4, order, dim=1, keepdim=True)),
        dense([[1e4], [0.0]], [0.0, 0.5]),
    )
    row = ours(network, [1.0, 0.75])
    assert row.predict == 0 or row.radius == 0.0


def test_a_batch_of_classes_that_are_equal_certifies_nothing_between_them() -> None:
    for rows in ([[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]):
        assert ours(nn.Sequential(dense(rows)), [1.0, 0.5]).radius == 0.0
    for bias, (a, b) in itertools.product(([0.0, 5e-324], [0.0, 2.0**-1060]), ([1.0, 0.5], [0.0, 0.0])):
        row = ours(nn.Sequential(dense([[1.0, 0.0], [1.0, 0.0]], bias)), [a, b])
        assert row.radius == 0.0  # real, but below what an evaluation in float64 can tell apart


def test_three_readings_on_the_command_line(run_folder: Path, tmp_path: Path, capsys) -> None:
    """The float64 program loses almost nothing, the float32 program something; each says what it is about."""
    radii = {}
    for reading, about in {"": "real arithmetic", "float64": "in float64", "float32": "in float32"}.items():
        folder = tmp_path / (reading or "real")
        extra = ["--deployed", reading] if reading else []
        code, out, err = run(capsys, "certify", str(run_folder), "--limit", "20", "-o", str(folder), *extra)
        assert code == 0, err
        assert about.split()[-1] in out.splitlines()[0]
        assert about in json.loads((folder / "certificate.json").read_text())["statement"]
        precision = json.loads((folder / "summary.json").read_text())["precision"]
        assert precision == {"": "float64", "float64": "float64 program"}.get(reading, reading)
        radii[reading] = [
            float(line.split("\t")[3]) for line in (folder / "certificates.tsv").read_text().splitlines()[1:]
        ]
        code, out, err = run(capsys, "verify", str(folder), "--limit", "0")
        assert code == 0, err
    rows = list(zip(*radii.values(), strict=True))
    assert all(real > program > single > 0 for real, program, single in rows)
    assert all(program > real * (1 - 1e-6) for real, program, _ in rows)
    code, _, err = run(
        capsys, "certify", str(run_folder), "--limit", "20", "-o", str(tmp_path / "real"), "--deployed", "float64"
    )
    assert code == 2 and "precision: float64 there, float64 program now" in err  # readings never mix in one folder
