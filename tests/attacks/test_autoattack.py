"""The adapter against AutoAttack itself, its known defects, and closed forms of linear classifiers."""

import copy
import logging
import random
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pyautoattack
import pytest
import torch
from brief import brief  # noqa: F401
from torch import nn

from lipcert.attacks.autoattack import Ensemble, autoattack

QUICK = Ensemble(attacks=("apgd-ce", "fab-t"))


def linear(classes=4, size=5, seed=0):
    """A linear classifier of 1 x size x size images, and images with the distances of their decision boundaries."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(size * size, classes)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(classes, size * size, generator=generator))
        model[1].bias.copy_(-0.5 * model[1].weight.sum(dim=1))
    images = 0.3 + 0.4 * torch.rand(6, 1, size, size, generator=generator)
    logits = model(images).detach().double()
    labels = logits.argmax(dim=1)
    weight = model[1].weight.detach().double()
    gaps = logits.gather(1, labels[:, None]) - logits
    distances = (gaps / (weight[labels][:, None] - weight).norm(dim=2)).masked_fill(gaps == 0, torch.inf)
    return model, images, labels, distances.min(dim=1).values


def in_double(model):
    return copy.deepcopy(model).double()


def attack(model, images, labels, eps, ensemble=QUICK, first=0, **kwargs):
    (rows,) = autoattack(model, in_double(model), [(first, images, labels)], eps, ensemble, **kwargs)
    return rows


def test_linear_classifier_is_broken_beyond_its_margin_and_never_within():
    model, images, labels, distances = linear()
    middle = float(distances.sort().values[2:4].mean())
    rows = attack(model, images, labels, [middle])
    assert [row.success for row in rows] == (distances < middle).tolist()
    assert {row.success for row in rows} == {True, False}
    for row, image, distance in zip(rows, images.double(), distances.tolist(), strict=True):
        if not row.success:
            assert (row.distance, row.adversarial, row.example) == (0.0, row.predict, None)
            continue
        assert distance <= row.distance <= min(middle, 1.5 * distance)  # pulled back to the boundary
        assert row.distance >= float((row.example - image).norm())
        assert 0 <= row.example.min() and row.example.max() <= 1 and row.example.dtype == torch.float64
        assert int(in_double(model)(row.example[None]).argmax()) == row.adversarial != row.label


def test_images_and_flags_are_those_of_autoattack():
    model, images, labels, distances = linear(classes=10)
    eps = float(distances.median())
    rows = attack(model, images, labels, [eps], Ensemble(attacks=("apgd-ce", "apgd-t", "fab-t"), seed=3), first=7)
    seed = int(np.random.SeedSequence([3, 7]).generate_state(1)[0] >> 1)
    theirs = pyautoattack.AutoAttack(
        model, norm="L2", eps=eps, seed=seed, version="custom", attacks=["apgd-ce", "apgd-t", "fab-t"]
    )
    theirs.apgd.n_restarts = theirs.fab.n_restarts = 1
    state = torch.get_rng_state()
    found, predicted = theirs.run_standard_evaluation(images, labels, batch_size=len(images))
    torch.set_rng_state(state)
    assert [row.success for row in rows] == (predicted != labels).tolist()
    for row, image, ours in zip(rows, images.double(), found.double(), strict=True):
        if row.success:  # ours lies on the segment from the image to theirs
            along, whole = row.example - image, ours - image
            assert float((along / along.norm() - whole / whole.norm()).norm()) < 1e-6
            assert along.norm() <= whole.norm() * (1 + 1e-9)


def test_broken_at_a_small_radius_is_broken_at_every_larger_one():
    model, images, labels, distances = linear()
    small, large = float(distances.median()), float(distances.max()) * 1.2
    rows = attack(model, images, labels, [large, small])
    by_eps = {eps: {row.idx: row for row in rows if row.eps == eps} for eps in (small, large)}
    assert list(by_eps[small]) == list(by_eps[large]) == list(range(6))
    assert all(by_eps[large][idx].success for idx in range(6))
    for idx, row in by_eps[small].items():
        assert not row.success or by_eps[large][idx].distance == row.distance


def test_wrongly_classified_images_are_not_attacked():
    model, images, labels, _ = linear()
    wrong = (labels + 1) % 4
    assert not any(row.success or row.distance for row in attack(model, images, wrong, [10.0]))


def test_a_clean_image_counts_only_if_it_wins_in_both_precisions():
    def logits(x, values):
        return torch.as_tensor(values, dtype=x.dtype) + 0 * x.flatten(1).sum(dim=1, keepdim=True)

    class Single(nn.Module):
        def forward(self, x):
            return logits(x, [[2.0, 1.0], [1.0, 1.0], [2.0, 1.0], [2.0, 1.0]])[: len(x)]

    def double(x):
        return logits(x, [[1.0, 2.0], [2.0, 1.0], [1.0, 1.0], [torch.nan, 1.0]])

    notes = []
    batch = (4, torch.rand(4, 1, 6, 6), torch.zeros(4, dtype=torch.long))
    (rows,) = autoattack(Single().eval(), double, [batch], [0.1], QUICK, note=notes.append)
    assert [row.predict for row in rows] == [1, 1, 1, -1]
    assert not any(row.success for row in rows)
    assert notes == ["images [5] are wrong in float32 only"]


def test_only_the_float64_model_decides():
    model, images, labels, distances = linear()
    double = in_double(model)
    (rows,) = autoattack(model, lambda x: double(images.double()), [(0, images, labels)], [9.0], QUICK)
    assert not any(row.success for row in rows)  # a model that answers for the clean images is never fooled


def test_outputs_beyond_eps_are_moved_inside(monkeypatch):
    model, images, labels, distances = linear()
    eps = float(distances.max()) * 1.5

    def far(self, x, y, **_):  # through the boundary, far outside the ball and the box
        weight = model[1].weight.detach()
        return x - 5 * (weight[y] - weight.mean(dim=0)).reshape(x.shape), y

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", far)
    rows = attack(model, images, labels, [eps])
    assert any(row.success for row in rows)
    assert all(row.distance <= eps for row in rows)
    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", lambda self, x, y, **_: (x * torch.nan, y))
    assert not any(row.success for row in attack(model, images, labels, [eps]))


def test_a_tie_or_a_rounding_error_is_no_success():
    images, labels = torch.full((1, 1, 6, 6), 0.5), torch.tensor([0])

    class Nearly(nn.Module):
        def forward(self, x):
            gap = 1e-13 * torch.ones(len(x), 1, dtype=x.dtype) + 0 * x.flatten(1).mean(dim=1, keepdim=True)
            moved = (x.flatten(1) - 0.5).abs().sum(dim=1, keepdim=True) > 0
            one = torch.ones_like(gap)
            return torch.cat([one + torch.where(moved, 0, gap), one + torch.where(moved, gap, 0)], dim=1)

    model = Nearly().eval()
    (rows,) = autoattack(lambda_model(model), model, [(0, images, labels)], [1.0], Ensemble(attacks=("square",)))
    assert not rows[0].success


def lambda_model(model):
    """The same module, but wrong by a wide margin in float32 as soon as a pixel moves."""

    class Loud(nn.Module):
        def forward(self, x):
            logits = model(x.double())
            return ((logits - 1) * 1e13).float()

    return Loud().eval()


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_leave_out_what_cannot_run(classes):
    model, images, labels, distances = linear(classes)
    notes = []
    eps = [float(distances.max()) * 1.1]
    rows = attack(model, images, labels, eps, Ensemble(attacks=("apgd-t", "fab-t")), note=notes.append)
    assert all(row.success for row in rows)
    assert len(notes) == 1 and "apgd-t left out" in notes[0] and str(classes) in notes[0]
    expected = {2: ("apgd-ce", "fab", "square", "fab-t"), 3: ("apgd-ce", "apgd-dlr", "fab", "square", "fab-t")}
    assert Ensemble(version="plus").plan(classes, (1, 6, 6))[0] == expected[classes]


@pytest.mark.parametrize("size", [*range(1, 34), (32, 12), (12, 32), (5, 40)])
def test_square_is_left_out_exactly_where_it_fails(size):
    height, width = size if isinstance(size, tuple) else (size, size)
    model = lambda x: 1 + x.flatten(1)[:, :1] * torch.tensor([2.0, 1.0])  # noqa: E731
    square = pyautoattack.AutoAttack(model, norm="L2", eps=0.1, seed=0).square
    square.n_queries = 2
    planned, notes = Ensemble(attacks=("apgd-ce", "square")).plan(4, (1, height, width))
    state = torch.get_rng_state()
    try:
        square.init_hyperparam(torch.rand(2, 1, height, width))
        square.attack_single_run(torch.rand(2, 1, height, width), torch.zeros(2, dtype=torch.long))
        runs = True
    except (ZeroDivisionError, RuntimeError):
        runs = False
    torch.set_rng_state(state)
    assert ("square" in planned) == runs
    assert len(notes) == (not runs)


def test_standard_version_runs_all_four_attacks(monkeypatch):
    model, images, labels, distances = linear(classes=10)
    ran = []
    for name in ("apgd", "apgd_targeted", "fab", "square"):
        kind = type(getattr(pyautoattack.AutoAttack(model, norm="L2", eps=1.0, seed=0), name))

        def spy(self, x, y, kind=kind):
            ran.append(kind.__name__)
            return x.clone()

        monkeypatch.setattr(kind, "perturb", spy)
    attack(model, images, labels, [1.0], Ensemble())
    assert ran == ["APGDAttack", "APGDAttack_targeted", "FABAttack_PT", "SquareAttack"]


def test_the_callers_world_is_left_as_it_was(recwarn):
    model, images, labels, distances = linear()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    logger = logging.getLogger("auto-attack")
    handlers = list(logger.handlers)

    def trace(frame, event, argument):
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        attack(model, images, labels, [float(distances.median())])
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert logger.handlers == handlers and logger.propagate
    assert not recwarn.list


def test_results_depend_on_seed_and_first_index_only():
    model, images, labels, distances = linear(classes=10)
    eps = [float(distances.max()) * 1.1]
    batches = [(0, images[:3], labels[:3]), (3, images[3:], labels[3:])]
    together = [row for rows in autoattack(model, in_double(model), batches, eps, QUICK) for row in rows]
    torch.manual_seed(99)
    alone = attack(model, images[3:], labels[3:], eps, first=3)
    assert together[3:] == alone
    assert all(torch.equal(a.example, b.example) for a, b in zip(together[3:], alone, strict=True))


def test_warnings_of_autoattack_become_notes(capfd):
    model, images, labels, _ = linear()
    soft = nn.Sequential(model, nn.Softmax(dim=1)).eval()
    notes = []
    attack(soft, images, labels, [0.01], Ensemble(attacks=("apgd-ce",)), note=notes.append)
    assert any("probability distribution" in text for text in notes)
    assert len(notes) == len(set(notes))
    assert capfd.readouterr() == ("", "")


def test_the_original_package_is_preferred(monkeypatch):
    model, images, labels, distances = linear()
    calls = []

    class Original(pyautoattack.AutoAttack):
        def __init__(self, model, norm="Linf", eps=0.3, seed=None, verbose=True, version="standard", device="cuda"):
            calls.append(verbose)
            super().__init__(model, norm=norm, eps=eps, seed=seed, version=version, device=device)

        def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False):
            return super().run_standard_evaluation(x_orig, y_orig, batch_size=bs)[0]

    expected = attack(model, images, labels, [float(distances.max())])
    monkeypatch.setitem(sys.modules, "autoattack", types.SimpleNamespace(AutoAttack=Original))
    assert attack(model, images, labels, [float(distances.max())]) == expected
    assert calls == [False]


def test_bad_input_is_refused():
    model, images, labels, _ = linear()
    with pytest.raises(ValueError, match="unknown AutoAttack version"):
        Ensemble(version="rand")
    with pytest.raises(ValueError, match="unknown attacks"):
        Ensemble(attacks=("pgd",))
    with pytest.raises(ValueError, match="not both"):
        Ensemble(version="plus", attacks=("square",))
    with pytest.raises(ValueError, match="no attack is left"):
        Ensemble(attacks=("square",)).plan(10, (1, 4, 4))
    with pytest.raises(ValueError, match="at least two classes"):
        Ensemble().plan(1, (1, 8, 8))
    with pytest.raises(ValueError, match="training mode"):
        attack(model.train(), images, labels, [0.1])
    model.eval()
    with pytest.raises(ValueError, match="positive"):
        attack(model, images, labels, [0.0])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        attack(model, images * 9, labels, [0.1])
    with pytest.raises(ValueError, match="4 classes, but there is a label 7"):
        attack(model, images, labels * 0 + 7, [0.1])


def test_the_bare_name_is_refused():
    checkout = Path(__file__).parents[2]
    command = [sys.executable, "-c", "import attacks"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkout, check=False)
    assert done.returncode == 1 and "this package is lipcert.attacks" in done.stderr
