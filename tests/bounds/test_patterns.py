"""Patterns match exactly: every spelling of MaxMin costs 1, every near miss is left alone and stays sound."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
import torch.nn.functional as F
from dense import Apply, assert_sound
from torch import nn

import lipcert.bounds.patterns
from lipcert.bounds.patterns import lift
from lipcert.bounds.tracing import trace

SHAPE = (4, 2, 2)


def ops(model, shape=SHAPE):
    return {node.op for node in lift(trace(model, shape)).nodes}


def pair(x, dim=1):
    a, b = x.chunk(2, dim)
    return torch.maximum(a, b), torch.minimum(a, b)


def interleaved(x):
    return torch.maximum(x[:, ::2], x[:, 1::2]), torch.minimum(x[:, ::2], x[:, 1::2])


def unbound(x):
    a, b = x.reshape(-1, 2, 2, 2, 2).unbind(2)
    return torch.stack([torch.max(a, b), torch.min(b, a)], 2).flatten(1, 2)


SPELLINGS = {
    "chunk": lambda m, x: torch.cat(pair(x), 1),
    "minimum first": lambda m, x: torch.cat(pair(x)[::-1], 1),
    "split": lambda m, x: torch.cat([torch.max(*x.split(2, 1)), torch.min(*x.split(2, 1))], 1),
    "slices": lambda m, x: torch.cat([torch.maximum(x[:, :2], x[:, 2:]), torch.minimum(x[:, 2:], x[:, :2])], 1),
    "narrow": lambda m, x: torch.cat([f(x.narrow(1, 0, 2), x.narrow(1, 2, 2)) for f in (torch.maximum, torch.minimum)], 1),
    "interleaved, stacked": lambda m, x: torch.stack(interleaved(x), 2).flatten(1, 2),
    "interleaved, concatenated": lambda m, x: torch.cat(interleaved(x), 1),
    "unbind": lambda m, x: unbound(x),
    "amax": lambda m, x: torch.cat([x.view(-1, 2, 2, 2, 2).amax(1), x.view(-1, 2, 2, 2, 2).amin(1)], 1),
    "max along": lambda m, x: torch.cat([x.view(-1, 2, 2, 2, 2).max(1).values, x.view(-1, 2, 2, 2, 2).min(1).values], 1),
    "another axis": lambda m, x: torch.cat(pair(x, 3), 2),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_maxmin_is_an_isometry_however_it_is_spelled(spelling):
    model = Apply(SPELLINGS[spelling])
    assert ops(model) & {"lipcert.maxmin", "lipcert.maxmin_along"}
    assert assert_sound(model, SHAPE, 1e-9).upper.value == 1.0


NEAR_MISSES = {
    "two maxima": lambda m, x: torch.cat([torch.maximum(x[:, :2], x[:, 2:]), torch.maximum(x[:, :2], x[:, 2:])], 1),
    "other halves": lambda m, x: torch.cat([torch.maximum(x[:, :2], x[:, 2:]), torch.minimum(x[:, :2], 2 * x[:, 2:])], 1),
    "a third value": lambda m, x: torch.cat([*pair(x), x[:, :1]], 1),
    "constant": lambda m, x: torch.cat([x.clamp_min(0), x.clamp_max(0)], 1),
    "with itself": lambda m, x: torch.cat([torch.maximum(x, x), torch.minimum(x, x)], 1),
    "groups of four": lambda m, x: torch.cat([x.amax(1, True), x.amin(1, True)], 1),
    "two axes": lambda m, x: torch.cat([x.amax((2, 3)), x.amin((2, 3))], 1),
    "different axes": lambda m, x: torch.cat([x.amax(2), x.amin(3)], 1),
}  # fmt: skip


@pytest.mark.parametrize("spelling", NEAR_MISSES)
def test_near_misses_are_not_lifted_and_stay_sound(spelling):
    model = Apply(NEAR_MISSES[spelling])
    assert not ops(model) & {"lipcert.maxmin", "lipcert.maxmin_along"}
    assert_sound(model, SHAPE)


def test_overlapping_or_unrelated_arguments_cost_what_they_must():
    """The pattern takes any a and b; only complementary halves of one value are worth 1."""
    overlapping = Apply(
        lambda m, x: torch.cat([torch.maximum(x[:, :3], x[:, 1:]), torch.minimum(x[:, :3], x[:, 1:])], 1)
    )
    assert ops(overlapping) >= {"lipcert.maxmin"}
    assert assert_sound(overlapping, SHAPE).upper.value == pytest.approx(math.sqrt(2))
    unrelated = Apply(
        lambda m, x: torch.cat(pair(torch.cat([m.a(x), m.b(x)], 1)), 1), a=nn.Conv2d(4, 2, 1), b=nn.Conv2d(4, 2, 1)
    )
    stacked = torch.cat([unrelated.a.weight, unrelated.b.weight]).detach().flatten(1)
    assert assert_sound(unrelated, SHAPE).upper.value == pytest.approx(
        float(torch.linalg.matrix_norm(stacked, 2)), rel=1e-6
    )


@pytest.mark.parametrize("dims", [(1,), (2, 3), (1, 2, 3), (-1,)])
def test_centring_is_a_projection(dims):
    model = Apply(lambda m, x: x - x.mean(dims, keepdim=True))
    assert "lipcert.center" in ops(model)
    assert assert_sound(model, SHAPE, 1e-9).upper.value == pytest.approx(1.0, abs=1e-9)


CENTRED_ALMOST = {
    "another value": lambda m, x: x - F.relu(x).mean(1, keepdim=True),
    "twice the mean": lambda m, x: torch.sub(x, x.mean(1, keepdim=True), alpha=2),
    "the other way": lambda m, x: x.mean(1, keepdim=True) - 2 * x,
    "the sum": lambda m, x: x - x.sum(1, keepdim=True),
}


@pytest.mark.parametrize("spelling", CENTRED_ALMOST)
def test_what_is_not_centring_is_not_lifted(spelling):
    model = Apply(CENTRED_ALMOST[spelling])
    assert "lipcert.center" not in ops(model)
    assert_sound(model, SHAPE)


def test_operators_are_computed_once_and_idle_ones_dropped():
    model = Apply(
        lambda m, x: torch.cat([*x.chunk(2, 1), *x.chunk(2, 1)], 1).contiguous().clone()[:, :].view(-1, 8, 2, 2)
    )
    graph = lift(trace(model, SHAPE))
    assert [node.op for node in graph.nodes] == ["input", "aten.slice.Tensor", "aten.slice.Tensor", "aten.cat.default"]


def test_examples():
    assert doctest.testmod(lipcert.bounds.patterns).failed == 0
