"""Losses against their formulas, written out per sample, and against what they are for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lipcert.registry import losses


def problem(seed: int, n: int = 6, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(classes, 5, generator=generator)
    pairwise = 2.0 * (head[:, None] - head[None]).norm(dim=2)
    logits = 3 * torch.randn(n, classes, generator=generator)
    return logits, torch.randint(classes, (n,), generator=generator), pairwise


def cross_entropy(values: list[float], label: int) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values)) - values[label]


@given(st.integers(0, 999), st.floats(0.01, 2.0))
def test_emma_is_its_formula(seed: int, eps: float) -> None:
    logits, labels, pairwise = problem(seed)
    expected = 0.0
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        shifted = []
        for i, value in enumerate(z):
            margin = eps * pairwise[y, i].item()
            share = min(1.0, max(0.01, (z[y] - value) / margin)) if i != y else 0.0
            shifted.append(value - z[y] + share * margin)
        expected += cross_entropy(shifted, y) / len(labels)
    assert losses.get("emma")(logits, labels, pairwise, eps).item() == pytest.approx(expected, rel=1e-4)


@given(st.integers(0, 999), st.floats(0.01, 2.0))
def test_gloro_and_trades_are_their_formulas(seed: int, eps: float) -> None:
    logits, labels, pairwise = problem(seed)
    gloro = trades = 0.0
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        top = max(range(len(z)), key=lambda i: z[i])
        bottom = max(v + eps * pairwise[top, i].item() for i, v in enumerate(z) if i != top)
        gloro += cross_entropy([*z, bottom], y) / len(labels)
        p = torch.tensor(z).softmax(0)
        q = torch.tensor([*z, bottom]).softmax(0)[:-1]
        trades += (cross_entropy(z, y) + 1.5 * (p * (p / q).log()).sum().item()) / len(labels)
    assert losses.get("gloro")(logits, labels, pairwise, eps).item() == pytest.approx(gloro, rel=1e-4)
    assert losses.get("trades")(logits, labels, pairwise, eps).item() == pytest.approx(trades, rel=1e-3, abs=1e-5)


def test_offset_cross_entropy_is_the_papers_for_equal_pairs() -> None:
    logits, labels, _ = problem(0)
    pairwise = math.sqrt(2) * (1 - torch.eye(4))
    eps, temperature = 0.3, 0.25 * math.sqrt(2)
    shifted = logits - eps * math.sqrt(2) * torch.eye(4)[labels]
    expected = temperature * torch.nn.functional.cross_entropy(shifted / temperature, labels)
    assert losses.get("offset_cross_entropy")(logits, labels, pairwise, eps).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


@pytest.mark.parametrize("name", [n for n in losses.list() if n != "cross_entropy"])
def test_margin_losses_punish_steepness_and_reward_margin(name: str) -> None:
    logits = torch.tensor([[3.0, 0.0, -1.0]], requires_grad=True)
    constant = torch.tensor(1.0, requires_grad=True)
    labels, pairwise = torch.tensor([0]), constant * math.sqrt(2) * (1 - torch.eye(3))
    losses.get(name)(logits, labels, pairwise, 0.5).backward()
    assert constant.grad is not None and constant.grad.item() > 0
    assert logits.grad is not None and logits.grad[0, 0] < 0


@pytest.mark.parametrize("name", losses.list())
@pytest.mark.parametrize("logits", [[[0.0, 0.0, 0.0]], [[1e4, -1e4, 0.0]]])
def test_losses_are_finite_with_finite_gradients(name: str, logits: list[list[float]]) -> None:
    z = torch.tensor(logits, requires_grad=True)
    loss = losses.get(name)(z, torch.tensor([1]), torch.zeros(3, 3), 0.1)
    loss.backward()
    assert torch.isfinite(loss) and z.grad is not None and bool(torch.isfinite(z.grad).all())


def test_tau_cross_entropy_is_that_of_a_network_with_pairwise_constant_one() -> None:
    """z and its constants times 5: the same loss times 5, and the same gradient by z."""
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    pairwise = math.sqrt(2) * (1 - torch.eye(4))
    loss = losses.get("tau_cross_entropy")
    one, five = loss(logits, labels, pairwise, 0.1), loss(5 * logits, labels, 5 * pairwise, 0.7)
    assert five.item() == pytest.approx(5 * one.item(), rel=1e-5)
    tau = 1 / (0.25 * math.sqrt(2))
    assert one.item() == pytest.approx(torch.nn.functional.cross_entropy(tau * logits, labels).item() / tau, rel=1e-5)
