"""Bounds near one input: files of inputs, boxes that hold the ball, and constants that are smaller there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from cli.test_cli import run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from lipcert.attacks.ascent import lipschitz_lower
from lipcert.bounds import BoundError, audit
from lipcert.certify import certify
from lipcert.errors import InputError
from lipcert.neighbourhood import box, read_input


class Square(nn.Module):
    """x ↦ Wx ∘ x: steeper the larger x is."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.map(x.flatten(1)) * x.flatten(1)


FACTORY = """
from torch import nn
class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(12, 12, bias=False)
        nn.init.eye_(self.map.weight)
    def forward(self, x): return self.map(x.flatten(1)) * x.flatten(1)
def square(): return Square()
"""


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4), st.floats(1e-9, 2.0))
def test_the_box_holds_the_ball(values: list[float], radius: float) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    low, high = box(x, radius, (0.0, 1.0))
    assert bool(((low <= x) & (x <= high)).all()) and float(low.min()) >= 0.0 and float(high.max()) <= 1.0
    for k, value in enumerate(values):  # in exact arithmetic
        assert low[k] == 0.0 or float(low[k]) < value - radius or float(low[k]).hex() == (value - radius).hex()
        assert high[k] == 1.0 or float(high[k]) > value + radius or float(high[k]).hex() == (value + radius).hex()


def test_a_bound_near_an_input_holds_there_and_is_smaller() -> None:
    torch.manual_seed(0)
    model, shape = Square().double(), (1, 2, 3)
    everywhere = audit(model, shape)
    x = 0.1 * torch.rand(shape, dtype=torch.float64)
    place = box(x, 0.05, (0.0, 1.0))
    near = audit(model, shape, place)
    assert near.upper.value < 0.3 * everywhere.upper.value
    assert near.domain == (float(place[0].min()), float(place[1].max())) and near.box is not None
    lower = lipschitz_lower(model, shape, steps=30, domain=place)
    assert 0.3 * near.upper.value < lower.value <= near.upper.value
    for point in (lower.x, lower.y):
        assert bool(((point >= place[0]) & (point <= place[1])).all())
    images = torch.rand(2, *shape)
    with pytest.raises(InputError, match="around one input only"):
        certify(model, [(images, torch.tensor([0, 1]))], audit=near)
    with pytest.raises(BoundError, match="low ≤ high"):
        audit(model, shape, (place[1] + 1.0, place[0]))
    with pytest.raises(BoundError, match="shape of one input"):
        audit(model, shape, (place[0].flatten(), place[1].flatten()))


def test_inputs_are_read_from_images_arrays_and_tensors(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (4, 5, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "image.png")
    image = read_input(tmp_path / "image.png", (3, 4, 5), (-1.0, 1.0))
    assert torch.equal(image, pixels.permute(2, 0, 1).double() / 255 * 2 - 1)
    assert read_input(tmp_path / "image.png", (1, 4, 5), (0.0, 1.0)).shape == (1, 4, 5)
    x = torch.rand(3, 4, 5)
    numpy.save(tmp_path / "x.npy", x.numpy()[None])
    save_file({"x": x}, tmp_path / "x.safetensors")
    for name in ("x.npy", "x.safetensors"):
        assert torch.equal(read_input(tmp_path / name, (3, 4, 5), (0.0, 1.0)), x.double())
    numpy.save(tmp_path / "objects.npy", numpy.array([{"a": 1}], dtype=object), allow_pickle=True)
    save_file({"y": x}, tmp_path / "y.safetensors")
    (tmp_path / "text.png").write_text("no image")
    numpy.save(tmp_path / "nan.npy", numpy.full((3, 4, 5), numpy.nan))
    for name, message in (
        ("objects.npy", "not an array"), ("y.safetensors", "no tensor"), ("text.png", "not a readable image"),
        ("nan.npy", "outside"), ("x.npy", "the model takes"),
    ):  # fmt: skip
        shape = (3, 4, 4) if name == "x.npy" else (3, 4, 5)
        with pytest.raises(InputError, match=message):
            read_input(tmp_path / name, shape, (0.0, 1.0))


def test_the_command_bounds_near_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "square.py").write_text(FACTORY)
    numpy.save(tmp_path / "x.npy", numpy.full((3, 2, 2), 0.25))
    model, page = f"{tmp_path / 'square.py'}:square", tmp_path / "page.html"
    code, out, err = run(
        capsys, "bound", model, "--input-shape", "3,2,2", "--around", str(tmp_path / "x.npy"), "--radius", "0.05",
        "--lower-steps", "20", "--json", "-", "--html", str(page),
    )  # fmt: skip
    assert code == 0, err
    record = json.loads(out[out.index("{") :])
    assert record["input"]["around"] == "x.npy" and record["input"]["radius"] == 0.05
    assert 0.59 < record["lower"] <= record["upper"] < 0.605  # the slope of x² at 0.3 is 0.6
    assert "no value further than 0.05 from x.npy" in page.read_text()
    code, _, err = run(capsys, "bound", model, "--input-shape", "3,2,2", "--radius", "0.05")
    assert code == 2 and "go together" in err
