"""`lipcert bound` sets what a paper's own formula says beside what is proved of the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli.test_cli import run

from lipcert.models.shiftvit import LipShiFTPaper

SMALL = dict(img_size=16, num_classes=3, embed_dim=8, depths=[1], num_heads=[2], window_size=4)
FACTORIES = f"""
from torch import nn
from lipcert.registry import create_model
def theorem(): return create_model("lipsformer_swin_tiny", **{SMALL!r})
def released(): return create_model("lipsformer_swin_tiny", released=True, **{SMALL!r})
def without(): return create_model("swin_tiny", **{SMALL!r})
def slow(): return create_model("lipshift_paper", img_size=16, num_classes=3, embed_dim=12, depths=[1])
def stranger(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
"""


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    file = tmp_path / "factories.py"
    file.write_text(FACTORIES)
    return file


def bound(capsys, factories: Path, name: str, *more: str) -> tuple[str, dict]:
    file = factories.with_name("bound.json")
    args = ("--input-shape", "3,16,16", "--lower-steps", "0", "--json", file, *more)
    code, out, err = run(capsys, "bound", f"{factories}:{name}", *args)
    assert code == 0
    assert ("--published evaluates it" in err) == (name == "slow" and not more)
    return out, json.loads(file.read_text())


def test_theorem_refinement_and_proof_stand_together(capsys, factories: Path) -> None:
    out, record = bound(capsys, factories, "theorem")
    published, features = record["published"], record["features"]
    assert features < published["refined"] < published["value"]
    said = re.search(r"proved: (\S+), which is (\S+) times the published value", out)
    assert said and float(said[1].replace("−", "-")) == pytest.approx(features, rel=1e-3)
    assert float(said[2].replace("−", "-")) == pytest.approx(features / published["value"], rel=1e-2)
    assert "published formula of the features before the head: " in out and "theorem 1 of arXiv 2304.09856" in out
    assert "with its later refinement: " in out


def test_a_theorem_that_says_nothing_is_infinite(capsys, factories: Path) -> None:
    out, record = bound(capsys, factories, "released")
    assert record["published"]["value"] == "inf"
    assert "published formula of the features before the head: ∞" in out and "times the published" not in out


@pytest.mark.parametrize("name", ["without", "stranger"])
def test_networks_of_no_such_paper_say_nothing_of_it(capsys, factories: Path, name: str) -> None:
    out, record = bound(capsys, factories, name)
    assert "published" not in record and "published" not in out


def test_a_formula_that_takes_minutes_is_evaluated_when_asked_for(capsys, factories: Path, monkeypatch) -> None:
    out, record = bound(capsys, factories, "slow", "--published")
    assert record["published"]["value"] > 0 and "published formula of the features" in out
    monkeypatch.setattr(LipShiFTPaper, "published_bound", lambda network: pytest.fail("nobody asked for it"))
    out, record = bound(capsys, factories, "slow")
    assert "published" not in record and "published" not in out
