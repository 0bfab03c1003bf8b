"""Radii against exact rational arithmetic, their edge cases, and certificates against true distances of boundaries."""

import math
import sys
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipcert.attacks import Ensemble, autoattack
from lipcert.bounds import Bound
from lipcert.bounds.program import Errors
from lipcert.certify import (
    Row,
    certify,
    contradictions,
    diameter,
    frame,
    radii_from_margins,
    rows_of_batches,
    summarise,
)
from lipcert.errors import InputError

INF, NAN = math.inf, math.nan


def radii(logits, error, pairwise, **kwargs):
    tensors = (torch.tensor(value, dtype=torch.float64) for value in (logits, error, pairwise))
    return radii_from_margins(*tensors, **kwargs)


@st.composite
def problems(draw):
    classes, images = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    number = st.floats(-1e3, 1e3, allow_subnormal=False)
    positive = st.floats(1e-6, 1e6)
    logits = [[draw(number) for _ in range(classes)] for _ in range(images)]
    error = [draw(st.sampled_from([0.0, 1e-12, 0.1, 3.0])) for _ in range(images)]
    return logits, error, [[draw(positive) for _ in range(classes)] for _ in range(classes)]


@settings(max_examples=200, deadline=None)
@given(problems())
def test_radius_is_the_exact_minimum_rounded_down(problem):
    logits, error, pairwise = problem
    predict, radius, margin = radii(logits, error, pairwise)
    for z, e, y, r, m in zip(logits, error, predict.tolist(), radius.tolist(), margin.tolist(), strict=True):
        assert z[y] == max(z)
        others = [j for j in range(len(z)) if j != y]
        truth = min((Fraction(z[y]) - Fraction(z[j]) - 2 * Fraction(e)) / Fraction(pairwise[y][j]) for j in others)
        assert m == pytest.approx(z[y] - max(z[j] for j in others))
        if truth <= 0:
            assert r == 0.0
        else:
            gap = min(z[y] - z[j] - 2 * e for j in others)
            assert Fraction(r) <= truth
            assert r >= float(truth) * (1 - 1e-12) or gap < 1e-9 * max(map(abs, z))


def test_the_last_bit_goes_down():
    # 0.3 - 0.1 is rounded to 0.19999999999999998, below 0.3 − 0.1 of the two floats; and 1/3 up or down must end below
    for z, bound in (([0.3, 0.1], 1.0), ([1.0, 0.0], 3.0), ([2.0**53, -1.0], 1.0), ([1.0, -(2.0**-60)], 1.0)):
        _, radius, _ = radii([z], [0.0], [[bound, bound]] * 2)
        assert 0 < Fraction(radius[0]) <= (Fraction(z[0]) - Fraction(z[1])) / Fraction(bound)


@pytest.mark.parametrize(
    ("logits", "error", "predict"),
    [
        ([1.0, 1.0, 0.0], 0.0, 0),  # a tie
        ([2.0, 1.0, 0.0], 0.5, 0),  # the margin is exactly twice the error
        ([2.0, 1.0, 0.0], INF, 0),
        ([2.0, 1.0, 0.0], NAN, 0),
        ([NAN, 1.0, 0.0], 0.0, -1),
        ([1.0, NAN, 0.0], 0.0, -1),
        ([NAN, NAN, NAN], 0.0, -1),
        ([INF, 1.0, 0.0], 0.0, 0),
        ([2.0, 1.0, -INF], 0.0, 0),
        ([INF, INF, 0.0], 0.0, 0),
        ([-INF, -INF, -INF], 0.0, 0),
    ],
)
def test_doubtful_logits_certify_nothing(logits, error, predict):
    got, radius, _ = radii([logits, [5.0, 0.0, 0.0]], [error, 0.0], np.full((3, 3), 2.0).tolist())
    assert (got[0], radius[0]) == (predict, 0.0)
    assert (got[1], radius[1]) == (0, pytest.approx(2.5, rel=1e-15))  # the neighbour is not disturbed


def test_errors_of_differences_are_taken_where_they_are_smaller():
    """(z_y - z_j - min(2E, before·d_yj + √2·since)) / L, never above the exact value and hardly below."""
    z, constants = [3.0, 2.0, 1.0], np.full((3, 3), 2.0).tolist()
    near = torch.tensor([[0.0, 0.1, 9.0], [0.1, 0.0, 9.0], [9.0, 9.0, 0.0]])
    for e, before, since in ((0.4, 0.5, 0.1), (0.01, 5.0, 0.0), (0.4, 0.0, 0.0), (0.4, INF, 0.0), (0.4, 0.5, 0.2)):
        parts = (torch.tensor([before]), near, torch.tensor([since]))
        _, radius, _ = radii([z], [e], constants, parts=parts)
        doubts = [min(2 * e, before * float(near[0, j]) + math.sqrt(2) * since) for j in (1, 2)]
        truth = min((z[0] - z[j] - doubt) / 2.0 for j, doubt in zip((1, 2), doubts, strict=True))
        assert truth * (1 - 1e-6) <= radius[0] <= truth * (1 + 1e-7) and (radius[0] < truth or before in (0.0, INF))


def test_constants_of_zero_and_infinity():
    free = [[0.0, 0.0], [0.0, 0.0]]
    assert radii([[1.0, 0.0]], [0.0], free)[1][0] == sys.float_info.max
    assert radii([[1.0, 0.0]], [0.0], free, largest=8.0)[1][0] == 8.0
    assert radii([[1.0, 0.0]], [0.0], [[0.0, 1e-9]] * 2, largest=8.0)[1][0] == 8.0
    assert radii([[1.0, 1.0]], [0.0], free, largest=8.0)[1][0] == 0.0  # a tie that can never be broken is still a tie
    assert radii([[1.0, 0.0]], [0.0], [[0.0, INF]] * 2)[1][0] == 0.0
    mixed = [[0.0, 0.0, 4.0], [0.0, 0.0, 4.0], [4.0, 4.0, 0.0]]
    assert radii([[1.0, 0.0, -1.0]], [0.0], mixed, largest=8.0)[1][0] == pytest.approx(0.5, rel=1e-15)


def test_wrong_arguments_are_refused():
    ones = [[1.0, 1.0]] * 2
    for bad in ([[[1.0]], [0.0], [[1.0]]], [[[1.0, 0.0]], [0.0, 0.0], ones], [[[1.0, 0.0]], [0.0], [[1.0] * 3] * 3]):
        with pytest.raises(ValueError, match="must be"):
            radii(*bad)
    for bad in (
        [[0.0], [[-1.0, 1.0]] * 2, {}],
        [[0.0], [[NAN, 1.0]] * 2, {}],
        [[-1.0], ones, {}],
        [[0.0], ones, {"largest": 0}],
    ):
        with pytest.raises(ValueError, match="must not be negative"):
            radii([[1.0, 0.0]], *bad[:2], **bad[2])


# ------------------------------------------------------------------------------------- a network with a known bound


@dataclass
class Head:
    constants: torch.Tensor

    def pairwise(self):
        return self.constants

    def distances(self):
        return torch.full_like(self.constants, INF)  # 2E is taken


class Program:
    def __init__(self, model, error):
        self.model, self.error = model, error

    def evaluate(self, x, precision="float64", radius=0.0):
        assert x.dtype == torch.float64 and not torch.is_grad_enabled()
        size = self.error if precision == "float64" else self.error + 1e-6 * (1 + radius)
        return self.model(x), x.new_full((len(x),), size)


@dataclass
class Stub:
    """What certification needs of an audit, with the exact constants of a linear classifier."""

    upper: Bound
    head: Head | None
    program: Program
    input_shape: tuple[int, ...]
    domain: tuple[float, float] = (0.0, 1.0)
    unbounded: tuple[tuple[str, str, str], ...] = ()
    box: None = None

    def evaluate(self, x, precision="float64", radius=0.0):
        logits, error = self.program.evaluate(x, precision, radius)
        return logits, Errors(error, error, error)

    def pairwise(self):
        constants = torch.full((4, 4), math.sqrt(2) * self.upper.value, dtype=torch.float64)
        return constants if self.head is None else self.head.pairwise()


def linear(classes=4, size=5, factor=1.0, seed=0, error=1e-12):
    """Return a linear classifier in float64, its audit with all constants times `factor`, images and labels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, size * size, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(size * size, classes)).double().eval().requires_grad_(False)
    model[1].weight.copy_(weight)
    model[1].bias.copy_(-0.5 * weight.sum(dim=1))
    constants = (weight[:, None] - weight).norm(dim=2) * (1 + 1e-14) * factor
    upper = Bound(float(torch.linalg.matrix_norm(weight, 2)) * (1 + 1e-14) * factor, "upper", "test")
    images = 0.3 + 0.4 * torch.rand(8, 1, size, size, generator=generator)
    labels = model(images.double()).argmax(dim=1)
    return model, Stub(upper, Head(constants), Program(model, error), (1, size, size)), images, labels


def boundary(model, images, labels):
    """Return the true distances of the decision boundaries of a linear classifier."""
    weight, logits = model[1].weight, model(images.double())
    gaps = (logits.gather(1, labels[:, None]) - logits) / (weight[labels][:, None] - weight).norm(dim=2)
    return gaps.nan_to_num(INF).scatter(1, labels[:, None], INF).min(dim=1).values.numpy()


def test_radii_of_a_linear_classifier_are_the_distances_of_its_boundary():
    model, audit, images, labels = linear()
    rows = certify(model, [(images[:3], labels[:3]), (images[3:], labels[3:])], audit=audit)
    truth = boundary(model, images, labels)
    assert list(rows.columns) == ["idx", "label", "predict", "radius", "correct", "time", "margin", "error", "image"]
    assert rows["idx"].tolist() == list(range(8))
    assert rows["correct"].tolist() == [1] * 8
    assert (rows["radius"].to_numpy() < truth).all()
    assert (rows["radius"].to_numpy() > truth * (1 - 1e-9)).all()
    assert rows.attrs["summary"]["n"] == 8
    weaker = certify(model, [(images, labels)], audit=Stub(audit.upper, None, audit.program, audit.input_shape))
    assert (weaker["radius"] < rows["radius"]).all()  # without the head: √2·L


def test_float32_certificates_are_smaller_and_account_for_the_ball():
    model, audit, images, labels = linear()
    exact = certify(model, [(images, labels)], audit=audit)
    deployed = certify(model, [(images, labels)], audit=audit, precision="float32")
    reach = exact["radius"].max()
    assert (deployed["radius"] < exact["radius"]).all()
    assert (deployed["error"] >= 1e-12 + 1e-6 * (1 + reach)).all()  # E at the largest ball of the batch
    lost = exact["radius"] - deployed["radius"]
    constants = audit.head.constants.numpy()
    assert (lost <= 2.1e-6 * (1 + reach) / constants[constants > 0].min()).all()
    assert (lost >= 1.9e-6 / constants.max()).all()
    large = certify(
        model,
        [(images, labels)],
        audit=Stub(audit.upper, audit.head, Loud(model, 0.0), audit.input_shape),
        precision="float32",
    )
    assert (large["radius"] == 0).all()


@pytest.mark.parametrize(("precision", "arithmetic"), [("float64 program", "float64"), ("float32", "float32")])
def test_errors_of_a_program_are_asked_for_the_ball_of_the_real_radius(precision: str, arithmetic: str) -> None:
    asked = []

    class Asked(Program):
        def evaluate(self, x, precision="float64", radius=0.0):
            asked.append((precision, radius))
            return self.model(x), x.new_full((len(x),), self.error + 1e-6 * radius)

    model, audit, images, labels = linear()
    audit = Stub(audit.upper, audit.head, Asked(model, 0.0), audit.input_shape)
    exact = certify(model, [(images, labels)], audit=audit)
    deployed = certify(model, [(images, labels)], audit=audit, precision=precision)
    assert asked == [("float64", 0.0)] * 2 + [(arithmetic, exact["radius"].max())]
    assert (deployed["radius"] < exact["radius"]).all() and (deployed["error"] == 1e-6 * exact["radius"].max()).all()
    tied = Stub(audit.upper, audit.head, Asked(torch.nn.Sequential(model, Tie()), 0.0), audit.input_shape)
    asked.clear()
    assert (certify(model, [(images, labels)], audit=tied, precision=precision)["radius"] == 0).all()
    assert asked[1][0] == arithmetic and asked[1][1] > 0  # the program is asked for, also where nothing holds


class Tie(nn.Module):
    def forward(self, z):
        return torch.zeros_like(z)


class Loud(Program):
    def evaluate(self, x, precision="float64", radius=0.0):
        return self.model(x), x.new_full((len(x),), 0.0 if precision == "float64" else INF)


def test_an_unsound_bound_is_found_by_the_attack_and_a_sound_one_is_not():
    for factor, alarm in ((1.0, False), (0.5, True), (0.05, True)):
        model, audit, images, labels = linear(factor=factor)
        certificates = certify(model, [(images, labels)], audit=audit)
        eps = float(boundary(model, images, labels).max()) * 1.4
        single = nn.Sequential(nn.Flatten(), nn.Linear(25, 4)).eval()
        single.load_state_dict(model.state_dict())
        attacks = Ensemble(attacks=("apgd-ce",))
        found = [row for batch in autoattack(single, model, [(0, images, labels)], [eps], attacks) for row in batch]
        table = pd.DataFrame(
            [{name: getattr(row, name) for name in ("idx", "label", "distance", "success")} for row in found]
        )
        assert table["success"].all()
        assert bool(contradictions(certificates, table)) is alarm


def test_images_outside_the_domain_or_of_another_shape_or_class_are_refused():
    model, audit, images, labels = linear()
    with pytest.raises(InputError, match="outside"):
        certify(model, [(images * 2, labels)], audit=audit)
    with pytest.raises(InputError, match="outside"):
        certify(model, [(images * NAN, labels)], audit=audit)
    with pytest.raises(InputError, match=r"\(1, 5, 5\).*\(1, 5, 4\)"):
        certify(model, [(images[..., :4], labels)], audit=audit)
    with pytest.raises(InputError, match="label 4, but the network has 4 classes"):
        certify(model, [(images, labels * 0 + 4)], audit=audit)
    with pytest.raises(InputError, match="precision"):
        certify(model, [(images, labels)], audit=audit, precision="bfloat16")
    with pytest.raises(InputError, match="no images"):
        certify(model, [], audit=audit)


def test_only_a_proved_finite_bound_certifies():
    model, audit, images, labels = linear()
    estimate = Stub(Bound(1.0, "estimate", "power iteration"), audit.head, audit.program, audit.input_shape)
    with pytest.raises(ValueError, match="proved upper bound"):
        certify(model, [(images, labels)], audit=estimate)
    infinite = Stub(
        Bound(INF, "upper", "test"),
        None,
        audit.program,
        audit.input_shape,
        unbounded=(("act", "softplus", "no range"),),
    )
    with pytest.raises(InputError, match="act: no range"):
        certify(model, [(images, labels)], audit=infinite)


def test_rows_continue_from_the_first_index():
    model, audit, images, labels = linear()
    whole = [
        row for rows in rows_of_batches(audit, [(images[:4], labels[:4]), (images[4:], labels[4:])]) for row in rows
    ]
    (rest,) = rows_of_batches(audit, [(images[4:], labels[4:])], first=4)
    assert [(r.idx, r.radius) for r in whole[4:]] == [(r.idx, r.radius) for r in rest]
    assert all(row.time > 0 for row in whole)


def test_the_diameter_of_the_domain_caps_radii():
    assert diameter((0.0, 1.0), (3, 2, 2)) == pytest.approx(math.sqrt(12), rel=1e-14)
    assert diameter((0.0, 1.0), (3, 2, 2)) ** 2 >= 12
    model, audit, images, labels = linear(factor=1e-9)
    rows = certify(model, [(images, labels)], audit=audit)
    assert (rows["radius"] == diameter((0.0, 1.0), (1, 5, 5))).all()


# --------------------------------------------------------------------------------------------- summaries and alarms


def rows_with(radius, correct, label=0):
    predict = [label if c else label + 1 for c in correct]
    return frame(
        Row(i, label, p, r, c, 0.0, 0.0, 0.0) for i, (r, c, p) in enumerate(zip(radius, correct, predict, strict=True))
    )


def test_summary_counts_strictly_and_only_correct_images():
    rows = rows_with([0.0, 0.25, 0.5, 2.0], [1, 1, 1, 0])
    assert summarise(rows, [0.25, 0.5, 1.0]) == {
        "n": 4,
        "clean": 0.75,
        "certified": {"0.0000": 0.5, "0.2500": 0.25, "0.5000": 0.0, "1.0000": 0.0},
        "acr": 0.75 / 4,
    }
    assert list(summarise(rows)["certified"]) == ["0.0000", "0.1412", "0.2824", "0.4235", "1.0000"]
    assert len(summarise(rows, [0.25, 0.250001])["certified"]) == 3  # radii that print alike stay apart
    with pytest.raises(InputError):
        summarise(rows.iloc[:0])


def attacked(idx, distance, success, label=0):
    return pd.DataFrame({"idx": idx, "label": label, "distance": distance, "success": success, "predict": 0})


def test_a_contradiction_is_a_success_strictly_within_the_radius_of_a_correct_image():
    rows = rows_with([0.5, 0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1, 0])
    below = math.nextafter(0.5, 0)
    assert contradictions(rows, attacked([0, 1, 2, 4, 9], [below, 0.5, 0.1, 0.1, 0.1], [1, 1, 0, 1, 1])) == [0]
    twice = attacked([3, 3, 0], [0.4, 0.3, 0.2], [1, 1, 1])  # several radii
    assert contradictions(rows, twice) == [0, 3]
    assert contradictions(rows, attacked([], [], [])) == []
    with pytest.raises(InputError, match="different labels for image 1"):
        contradictions(rows, attacked([1], [0.1], [1], label=7))
