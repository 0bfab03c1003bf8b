"""LSTM layers: never below the Jacobian, not absurdly above it for short sequences, and images kept apart."""

from __future__ import annotations

import pytest
import torch
from dense import Apply, assert_sound
from torch import nn

from lipcert.bounds import BoundError, audit
from lipcert.bounds.rules.recurrent import _response


def layer(scale: float = 1.0, **options) -> nn.Module:
    lstm = nn.LSTM(3, 4, batch_first=True, **options)
    for parameter in lstm.parameters():
        nn.init.normal_(parameter, std=scale)
    return Apply(lambda m, x: m.a(x)[0], a=lstm)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"bias": False}])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_bounds_hold(options, scale):
    result = assert_sound(layer(scale, **options), (3, 3))
    assert result.upper.kind == "upper" and result.upper.value < 1e4


def test_one_step_of_a_small_input_is_nearly_attained():
    """For one step and small weights the cell gate alone moves: slope 1 in g, 1/2 for i and for o."""
    model = layer(0.01, bias=False)
    result = audit(model, (1, 3))
    W = model.a.weight_ih_l0.detach().double()
    attained = float(torch.linalg.matrix_norm(W[8:12], 2)) / 4
    assert attained < result.upper.value < 12 * attained


def test_the_response_is_that_of_the_recursion():
    """Against the inequality of the module docstring, iterated for one disturbance at a time."""
    size, state = 0.7, 0.25
    R = _response(5, state, size)
    for s in range(5):
        h = c = 0.0
        for t in range(5):
            p = size * h + (1.0 if t == s else 0.0)
            c = c + p * (((state + t) / 4) ** 2 + 1 / 16 + 1) ** 0.5
            h = c + p / 4
            assert float(R[t, s]) == pytest.approx(h, rel=1e-12)


def test_errors_are_contained():
    model = layer(0.5, bidirectional=True)
    program = audit(model, (4, 3)).program
    x = torch.rand(3, 4, 3)
    with torch.no_grad():
        deployed = model.float()(x).double()
        output, error = program.evaluate(x.double())
        _, allowed = program.evaluate(x.double(), "float32")
        happened = (deployed - output).flatten(1).norm(dim=1)
        assert torch.allclose(output, model.double()(x.double()), rtol=1e-13)
    assert (happened <= allowed).all() and (error < 1e-8).all() and (allowed < 10.0).all()


def test_rows_of_images_are_sequences():
    """As vision models do it: rows and columns are sequences of one batch of images."""
    model = Apply(lambda m, x: m.a(x.reshape(-1, 4, 3))[0].reshape(-1, 2, 4, 4), a=nn.LSTM(3, 4, batch_first=True))
    assert_sound(model, (2, 4, 3), points=2)


@pytest.mark.parametrize("function", [
    lambda m, x: m.a(x.transpose(0, 1))[0].transpose(0, 1), lambda m, x: m.a(x)[1][0].transpose(0, 1),
    lambda m, x: m.b(x)[0],
])  # fmt: skip
def test_what_mixes_images_or_has_no_rule_is_refused(function):
    model = Apply(function, a=nn.LSTM(3, 4, batch_first=True), b=nn.LSTM(3, 4, 2, batch_first=True))
    with pytest.raises(BoundError):
        audit(model, (2, 3))


def test_states_made_of_the_input_have_no_bound():
    def forward(m, x):
        state = m.b(x[:, 0])[None]
        return m.a(x, (state, state))[0]

    model = Apply(forward, a=nn.LSTM(3, 4, batch_first=True), b=nn.Linear(3, 4))
    assert audit(model, (2, 3)).upper.value == float("inf")
