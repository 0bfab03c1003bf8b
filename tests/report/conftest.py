"""Small run folders for the tests of the report; what is in them: `synthetic.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from report.synthetic import write_run, write_smoothing_log


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A complete run: 300 images, all attacked at 36/255 and 72/255."""
    return write_run(tmp_path / "runs" / "a", n=300, attacked=300, blocks=2, epochs=5)


@pytest.fixture
def certified(run: Path) -> Path:
    """The same run as somebody certified it who did not train it: no metrics, hence less to draw."""
    (run / "metrics.csv").unlink()
    return run


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of randomized smoothing on 100 images, with abstentions."""
    return write_smoothing_log(tmp_path / "sigma_0.25.tsv", n=100)
