"""What all tests share: seeds, few threads, no network, a small run folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")  # before torch is imported

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from lipcert.checkpoint import save_model  # noqa: E402
from lipcert.config import TrainConfig, to_yaml  # noqa: E402
from lipcert.registry import create_model  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
hypothesis.settings.register_profile("lipcert", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("lipcert")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _empty_data_root(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's own data sets: tests see the same on every machine."""
    monkeypatch.setenv("LIPCERT_DATA", str(tmp_path_factory.getbasetemp() / "no-data"))


@pytest.fixture(scope="session")
def _untrained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained") / "run"
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depths": [1], "neck": 32}
    shape = {"num_classes": 10, "img_size": 8, "in_chans": 1}
    recipe = {"model": "lipshift_tiny", "data": "digits", "kwargs": sizes, **shape}
    save_model(create_model("lipshift_tiny", **shape, **sizes), folder / "model", recipe)
    (folder / "config.yaml").write_text(to_yaml(TrainConfig(model="lipshift_tiny", data="digits", model_args=sizes)))
    return folder


@pytest.fixture
def run_folder(_untrained_run: Path, tmp_path: Path) -> Path:
    """A run folder of a small untrained network for the digits; the test may change it."""
    return Path(shutil.copytree(_untrained_run, tmp_path / "run"))


@pytest.fixture
def torchvision():
    """torchvision, or a skip where it cannot be imported (RuntimeError: it was built for another torch)."""
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    return torchvision
