"""Sums in blocks: the same function, the same bound, and a much smaller proved error in float32."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from cli.test_cli import run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipcert.blocked import BlockedSum, blocked
from lipcert.bounds import audit
from lipcert.errors import InputError
from lipcert.layers import MaxMin


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(12, 16, 3, padding=1, stride=2), MaxMin(), nn.Conv2d(16, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(8, 8, 3, groups=2), MaxMin(), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    return model.double().eval()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200))
def test_blocks_of_any_length_compute_the_same(length: int) -> None:
    model, x = network(), torch.rand(3, 12, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(blocked(model, length)(x), model(x), rtol=1e-12, atol=1e-12)


def test_bounds_stay_and_errors_in_float32_shrink() -> None:
    model = network()
    cut = blocked(model, 9)
    assert sum(isinstance(module, BlockedSum) for module in cut.modules()) == 3  # the grouped one stays
    assert not any(isinstance(module, BlockedSum) for module in model.modules())
    one, other = audit(model, (12, 8, 8)), audit(cut, (12, 8, 8))
    assert math.isclose(one.upper.value, other.upper.value, rel_tol=1e-6)
    torch.testing.assert_close(one.pairwise(), other.pairwise(), rtol=1e-6, atol=0.0)
    x = torch.rand(4, 12, 8, 8, dtype=torch.float64)
    plain, short = (found.program.evaluate(x, "float32", 0.1)[1] for found in (one, other))
    assert bool((short < plain / 3).all())
    computed = cut.float()(x.float()).double()
    exact = model.double()(x)
    assert bool(((computed - exact).norm(dim=1) <= short).all())


def test_lengths_below_one_are_refused_and_short_sums_stay() -> None:
    with pytest.raises(InputError, match="at least one product"):
        blocked(network(), 0)
    assert isinstance(blocked(nn.Sequential(nn.Linear(8, 3)), 8)[0], nn.Linear)


def test_export_writes_a_blocked_program_that_can_be_certified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = str(tmp_path / "blocked.pt2"), tmp_path / "certified"
    code, _, err = run(capsys, "export", "lipshift_tiny", file, "--input-shape", "1,8,8", "--blocked", "512")
    assert code == 0, err
    code, _, err = run(
        capsys, "certify", file, "--data", "digits", "--limit", "4", "--deployed", "float32", "-o", str(folder)
    )
    assert code == 0, err
    assert json.loads((folder / "summary.json").read_text())["precision"] == "float32"
