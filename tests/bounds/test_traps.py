"""Models that a careless auditor would get wrong: each is refused, or bounded truthfully, with one sentence."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from dense import Apply
from torch import nn
from torch.nn import functional as F

from lipcert.bounds import Audit, BoundError, audit
from lipcert.bounds.replay import replay

SHAPE = (1, 2, 3)
DOMAIN = (0.0, 1.0)


def checked(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> Audit:
    return audit(model, shape, DOMAIN)


def branch_on_data(self, x):
    return x if x.sum() > 1 else 3 * x


def branch_on_item(self, x):
    return x * 2 if x.max().item() > 0.5 else x


def loop_on_data(self, x):
    while x.norm() > 1:
        x = x / 2
    return x


def factor_from_item(self, x):
    return x * x.max().item()


def through_numpy(self, x):
    return torch.from_numpy(np.tanh(x.detach().cpu().numpy()))


def as_list(self, x):
    return torch.tensor(x.tolist())


class Exporting(nn.Module):
    def forward(self, x):
        return x if torch.compiler.is_exporting() else 10 * x


class Compiling(nn.Module):
    def forward(self, x):
        return x if torch.compiler.is_compiling() else 10 * x


class Counting(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x):
        self.last.add_(1)
        return x * self.last


def complex_weights():
    weight = nn.Parameter(torch.randn(4, 6, dtype=torch.complex64))
    return Apply(lambda self, x: x.flatten(1) @ self.w.abs().T.to(x.dtype), w=weight)


def integer_weights():
    return Apply(
        lambda self, x: F.linear(x.flatten(1), self.w.to(x.dtype) * 0.1),
        w=nn.Parameter(torch.diag(torch.tensor([1, 2, 3, 4, 5, 60], dtype=torch.int8)), requires_grad=False),
    )


def broken(value: float) -> nn.Module:
    layer = nn.Linear(6, 2)
    layer.weight.data[0, 0] = value
    return nn.Sequential(nn.Flatten(), layer)


def hidden_nan() -> nn.Module:
    return Apply(lambda self, x: x * torch.tensor([1.0, 2.0, float("nan")], dtype=torch.float64))


REFUSED = {
    "unknown operator": (Apply(lambda self, x: torch.fft.fft(x).real), "no rule for"),
    "branch on data": (Apply(branch_on_data), "branches on data"),
    "branch on item": (Apply(branch_on_item), "branches on data"),
    "loop on data": (Apply(loop_on_data), "branches on data"),
    "a number from data": (Apply(factor_from_item), ""),
    "NumPy": (Apply(through_numpy), "cannot export"),
    "lists": (Apply(as_list), "into a Python number"),
    "another graph while exporting": (Exporting(), "something else than what it shows"),
    "another graph while compiling": (Compiling(), "something else than what it shows"),
    "a counter": (Counting(), "something else than what it shows"),
    "a buffer that changes": (Remembering(), "changes last while it runs"),
    "the mean of the batch": (Apply(lambda self, x: x - x.mean(0)), "mixes the images"),
    "the largest of the batch": (Apply(lambda self, x: x / (1 + x.amax(0, keepdim=True))), "mixes the images"),
    "a roll over the batch": (Apply(lambda self, x: x.roll(1, 0)), "mixes the images"),
    "attention over the batch": (Apply(lambda self, x: torch.softmax(x, 0)), "mixes the images"),
    "BatchNorm on the batch": (nn.BatchNorm2d(1, track_running_stats=False), "batch"),
    "BatchNorm forced to train": (Apply(lambda self, x: F.batch_norm(x, None, None, training=True)), "batch"),
    "noise": (Apply(lambda self, x: x + torch.randn_like(x)), "randn_like"),
    "fixed noise": (Apply(lambda self, x: x + torch.rand(2, 3, dtype=x.dtype)), "random"),
    "dropout forced on": (Apply(lambda self, x: F.dropout(x, 0.5, training=True)), "random while training"),
    "complex weights": (complex_weights(), "imaginary"),
    "NaN weights": (broken(math.nan), "has NaN or infinite entries"),
    "infinite weights": (broken(math.inf), "has NaN or infinite entries"),
    "NaN constants": (hidden_nan(), "NaN"),
    "several outputs": (Apply(lambda self, x: (x, 2 * x)), "must return one tensor"),
    "no output": (Apply(lambda self, x: None), "must return one tensor"),
    "a constant output": (Apply(lambda self, x: torch.ones(2, 2)), "must return one tensor"),
    "several inputs": (nn.Bilinear(6, 6, 2), "cannot export"),
    "a fixed batch size": (Apply(lambda self, x: x.reshape(2, 6)), "batch"),
    "another input shape": (nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), "Give the right input shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_bounded_is_refused_in_a_sentence(name: str) -> None:
    model, sentence = REFUSED[name]
    with pytest.raises(BoundError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about imaginary parts
        checked(model)
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 700


UNBOUNDED = {
    "sign": (Apply(lambda self, x: x.sign()), "jumps"),
    "straight-through estimator": (Apply(lambda self, x: x + (x.round() - x).detach()), "jumps"),
    "straight-through sign": (Apply(lambda self, x: x.clamp(-1, 1) + (x.sign() - x.clamp(-1, 1)).detach()), "jumps"),
    "hard shrinkage": (Apply(lambda self, x: F.hardshrink(x)), "jumps"),
    "a threshold with a step": (Apply(lambda self, x: F.threshold(x, 0.5, 0.0)), "jumps"),
    "what is left of a division": (Apply(lambda self, x: x % 0.3), "jumps"),
    "a root at zero": (Apply(lambda self, x: x.sqrt()), "slope"),
    "a quotient": (Apply(lambda self, x: x / (x - 0.5)), "divisor"),
    "normalisation without ε": (Apply(lambda self, x: F.layer_norm(x, (3,), eps=0.0)), "ε = 0"),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_what_has_no_constant_is_infinite_with_a_reason(name: str) -> None:
    model, reason = UNBOUNDED[name]
    result = checked(model)
    assert math.isinf(result.upper.value)
    assert any(reason in why and ".py:" in why for _, _, why in result.unbounded), result.unbounded


BOUNDED = {  # the bound of what is run, which is not what the gradient or a naive reading says
    "detach": (Apply(lambda self, x: 3 * x.detach()), 3.0),
    "half of it detached": (Apply(lambda self, x: x + 2 * x.detach()), 3.0),
    "no_grad": (Apply(lambda self, x: nested(x)), 2.0),
    "dropout in evaluation mode": (nn.Sequential(nn.Dropout(0.9), nn.Flatten()).train(), 1.0),
    "BatchNorm left in training mode": (nn.BatchNorm2d(1).train(), 1.0),
    "a single-entry dictionary": (Apply(lambda self, x: {"out": 2 * x}), 2.0),
    "integer weights, dequantised": (integer_weights(), 6.0),
    "a mask of data": (Apply(lambda self, x: torch.where(x > 0.5, x, 0.5)), None),
}


def nested(x):
    with torch.no_grad():
        return 2 * x


@pytest.mark.parametrize("name", BOUNDED)
def test_what_is_bounded_is_bounded_as_it_runs(name: str) -> None:
    model, expected = BOUNDED[name]
    try:
        result = checked(model)
    except BoundError:
        assert expected is None  # refusing is truthful, too
        return
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 64, *SHAPE, generator=generator, dtype=torch.float64)
    moved = (result.program(x) - result.program(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert float(moved.max()) <= result.upper.require_upper()
    assert expected is None or result.upper.value == pytest.approx(expected, rel=1e-4)


def test_a_replay_leaves_module_and_random_state_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2)).train()
    before = torch.get_rng_state()
    checked(model)
    assert model.training and model[1].weight.dtype == torch.float32
    assert torch.equal(before, torch.get_rng_state())


def test_a_replay_sees_a_small_difference() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
    program = audit(model, SHAPE).program
    model[1].weight.data[0, 0] += 1e-3
    with pytest.raises(BoundError, match="disagree at the first run"):
        replay(model, program, SHAPE, DOMAIN)
